"""The forms of weights in the `triton` backends, made and undone by plain torch operations.

A layer's weight is int8 or uint8 [N, B], one row of B bytes (a multiple of 32) after the other. A block of 32 bytes
holds 32 features in each of its planes: byte j of block b holds features 32 (b PLANES + p) + j, p = 0 .. PLANES - 1.

    TWO_BITS  4 planes; plane p is bits 2p..2p+1, as code + 1
    BASE3     5 planes; the byte is ceil(256 v / 243), where v = sum of (code of plane p, + 1) * 3^(4 - p). As a fixed-
              point fraction of 256 it yields its digits from the top: T_p = floor(byte * 3^(p + 1) / 256) is v without
              its last 4 - p digits, and digit p is T_p - 3 T_(p - 1)
    INT8      1 plane: the codes themselves, signed (output heads)

Features beyond K have code 0. In registers a plane of four bytes is four codes in a 32-bit word, which is what the
integer units take, and a row's features stay in the thread that loaded its bytes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import codes_of

INT8, TWO_BITS, BASE3 = 1, 4, 5  # planes


def planes_of(weight: Tensor, planes: int) -> int:
    """The planes of a weight, stored or prepacked: int8 ones have one, others the given number."""
    return INT8 if weight.dtype == torch.int8 else planes


def row_bytes(k: int, planes: int) -> int:
    """Bytes that hold a row of K codes."""
    return 32 * -(-k // (32 * planes))


def prepack(packed: Tensor, n: int, planes: int) -> Tensor:
    """Hub bytes uint8 [ceil(N/4), K], or codes int8 [N, K], in the layout above: [N, row_bytes(K, planes)]."""
    codes, planes = codes_of(packed, n), planes_of(packed, planes)
    padding = row_bytes(codes.shape[1], planes) * planes - codes.shape[1]
    codes = F.pad(codes, (0, padding)) if padding else codes
    if planes == INT8:
        return codes.contiguous()
    fields = (codes + 1).view(torch.uint8).view(n, -1, planes, 32).unbind(2)
    if planes == TWO_BITS:
        low, second, third, high = fields
        return (low | second << 2 | third << 4 | high << 6).view(n, -1)
    value = torch.zeros_like(fields[0])
    for digit in fields:
        value = value * 3 + digit  # at most 242
    return ((value.to(torch.int32) * 256 + 242) // 243).to(torch.uint8).view(n, -1)


def unprepack(weight: Tensor, n: int, k: int, planes: int) -> Tensor:
    """The inverse, as codes int8 [N, K]."""
    planes = planes_of(weight, planes)
    if planes == INT8:
        return weight[:, :k].contiguous()
    blocks = weight.view(n, -1, 1, 32)
    if planes == TWO_BITS:
        fields = torch.cat([blocks >> 2 * p & 3 for p in range(4)], dim=2)
    else:
        wide = blocks.to(torch.int32)
        tops = [wide * 3**p >> 8 for p in range(6)]
        fields = torch.cat([tops[p + 1] - 3 * tops[p] for p in range(5)], dim=2)
    return (fields.reshape(n, -1)[:, :k].to(torch.int8) - 1).contiguous()
