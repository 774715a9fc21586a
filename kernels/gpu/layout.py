"""The forms of weights in the `triton` backends, made and undone by plain torch operations.

A layer's weight is int8 or uint8 [N, B], one row of B bytes (a multiple of 32) after the other; where a byte holds two
codes [N, B / 32, 32], since nothing else tells them from others. A block of 32 bytes
holds 32 features in each of its planes: byte j of block b holds features 32 (b PLANES + p) + j, p = 0 .. PLANES - 1.

    TWO_BITS  4 planes; plane p is bits 2p..2p+1, as code + 1
    FOUR_BITS 2 planes, each of which is a group; plane p is bits 4p..4p+3, as code + 8 ("int4")
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

INT8, FOUR_BITS, TWO_BITS, BASE3 = 1, 2, 4, 5  # planes


def planes_of(weight: Tensor, planes: int) -> int:
    """The planes of a weight, stored or prepacked: int8 ones have one, int4 ones two, others the given number."""
    return INT8 if weight.dtype == torch.int8 else FOUR_BITS if weight.dim() == 3 else planes


def own_shape(n: int, k: int, planes: int) -> tuple[int, ...]:
    """The shape of a prepacked weight."""
    size = row_bytes(k, planes)
    return (n, size // 32, 32) if planes == FOUR_BITS else (n, size)


def offset_of(planes: int) -> int:
    """What is added to codes so that their fields are not negative."""
    return {INT8: 0, FOUR_BITS: 8}.get(planes, 1)


def row_bytes(k: int, planes: int) -> int:
    """Bytes that hold a row of K codes."""
    return 32 * -(-k // (32 * planes))


def prepack(packed: Tensor, n: int, planes: int) -> Tensor:
    """Hub bytes uint8 [ceil(N/4), K], int4 ones [N, ceil(K/32), 16], or codes int8 [N, K], in the layout above."""
    codes, planes = codes_of(packed, n), planes_of(packed, planes)
    padding = row_bytes(codes.shape[1], planes) * planes - codes.shape[1]
    codes = F.pad(codes, (0, padding)) if padding else codes
    if planes == INT8:
        return codes.contiguous()
    fields = (codes + offset_of(planes)).view(torch.uint8).view(n, -1, planes, 32).unbind(2)
    if planes == FOUR_BITS:
        low, high = fields
        return low | high << 4
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
    if planes in (FOUR_BITS, TWO_BITS):
        width = 8 // planes
        fields = torch.cat([blocks >> width * p & (1 << width) - 1 for p in range(planes)], dim=2)
    else:
        wide = blocks.to(torch.int32)
        tops = [wide * 3**p >> 8 for p in range(6)]
        fields = torch.cat([tops[p + 1] - 3 * tops[p] for p in range(5)], dim=2)
    return (fields.reshape(n, -1)[:, :k].to(torch.int8) - offset_of(planes)).contiguous()
