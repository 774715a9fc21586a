"""The packed layouts, bit by bit.

Hub layout (transformers `bitnet`, every 1.58-bit checkpoint on the Hub): 2 bits a weight, four *rows* to a
byte. With R = ceil(N/4) packed rows, byte [r, k] holds

    bits   7 6        5 4        3 2        1 0
    row    r + 3R     r + 2R     r + R      r         each as code + 1, so 0 = -1, 1 = 0, 2 = +1

Field value 3 never occurs in a valid tensor. Transformers itself only knows N % 4 == 0; other N are padded
with rows of zeros at the end, and readers cut them off again.

Base-3 layout (files only, `bitnet.save(..., weight_bits=1.6)`): 1.6 bits a weight, five *features* to a byte. Byte
[n, b] is the sum of (code of feature 5b + i, + 1) * 3^i over i = 0..4, so 0 to 242; features beyond K count as code 0.

4-bit layout (output heads): 4.5 bits a weight with its scales, a float16 for each row and group of 32 features. Codes
are uint8 [N, ceil(K/32), 16] in the order of llama.cpp's Q4_0: byte [n, g, i] holds feature 32g + i in its low four
bits and feature 32g + 16 + i in its high ones, each as code + 8; features beyond K count as code 0.

Binary layout (for weights without zeros): 1 bit a weight, eight *features* to a byte, the first in the
lowest bit: 1 for the code +1, 0 for -1. Features beyond K count as -1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ZEROS = 0b01010101  # the byte that holds four codes of 0
ZEROS_4 = 0x88  # the byte that holds two in the 4-bit layout
BLOCK = 32  # features of a block of the 4-bit layout, which share a scale
WIDE = ("int8", "int4")  # kinds of weights with other codes than -1, 0 and 1


def packed_rows(out_features: int) -> int:
    """Rows of the packed tensor that holds `out_features` rows of codes: ceil(N / 4)."""
    return -(-out_features // 4)


def pack_ternary(codes: Tensor) -> Tensor:
    """Pack ternary codes four to a byte, in the Hub's layout.

    codes:   int8 [N, K], values -1, 0, 1. Left unchanged.
    returns: uint8 [ceil(N/4), K]; row i + j*ceil(N/4) is bits 2j..2j+1 of row i, as code + 1.
    Raises ValueError for other dtypes, shapes or codes. unpack_ternary inverts it exactly.
    """
    _check_codes("pack_ternary", codes)
    n, k = codes.shape
    fields = torch.ones(4 * packed_rows(n), k, dtype=torch.uint8, device=codes.device)
    fields[:n] = (codes + 1).to(torch.uint8)
    low, second, third, high = fields.view(4, packed_rows(n), k)
    return low | second << 2 | third << 4 | high << 6


def unpack_ternary(packed: Tensor, out_features: int | None = None) -> Tensor:
    """The inverse of pack_ternary.

    packed:       uint8 [ceil(N/4), K]
    out_features: N; default 4 * rows. Rows beyond it are padding and dropped.
    returns:      int8 [N, K], values -1, 0, 1 (a field of 3, which validate_packed finds, comes out as 2)
    """
    n = check_packed(packed, out_features)
    fields = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    return fields[:n].to(torch.int8) - 1


def slice_packed(packed: Tensor, out_features: int, rows: slice, columns: slice = slice(None)) -> Tensor:
    """Some rows and columns of a matrix in the Hub layout, in that layout: its bytes interleave quarters of N, so rows
    are not consecutive ones of the packed tensor.

    packed:  uint8 [ceil(N/4), K] of N = out_features rows
    returns: what pack_ternary makes of unpack_ternary(packed, N)[rows, columns]
    Raises ValueError for another dtype or shape, and for bytes that encode no codes.
    """
    check_packed(packed, out_features)
    return pack_ternary(unpack_ternary(packed[:, columns], out_features)[rows])


def concat_packed(parts: Sequence[Tensor], out_features: Sequence[int]) -> Tensor:
    """Matrices in the Hub layout one below the other, as one. (Side by side they are what torch.cat makes of them.)

    parts:        uint8 [ceil(N_i/4), K]
    out_features: the N_i
    returns:      uint8 [ceil(N/4), K] with N the sum of the N_i; slice_packed takes them out again
    Raises ValueError for another dtype or shape, and for bytes that encode no codes.
    """
    codes = [unpack_ternary(part, n) for part, n in zip(parts, out_features, strict=True)]
    if len({part.shape[1] for part in codes}) > 1:
        raise ValueError(f"concat_packed: parts have different numbers of features: {[p.shape[1] for p in codes]}")
    return pack_ternary(torch.cat(codes))


def pack_base3(codes: Tensor) -> Tensor:
    """Pack ternary codes five to a byte, in the base-3 layout.

    codes:   int8 [N, K], values -1, 0, 1. Left unchanged.
    returns: uint8 [N, ceil(K/5)]
    Raises ValueError for other dtypes, shapes or codes. unpack_base3 inverts it exactly.
    """
    _check_codes("pack_base3", codes)
    n, k = codes.shape
    digits = torch.ones(n, -(-k // 5) * 5, dtype=torch.uint8, device=codes.device)
    digits[:, :k] = (codes + 1).to(torch.uint8)
    first, second, third, fourth, fifth = digits.view(n, -1, 5).unbind(-1)
    return first + 3 * second + 9 * third + 27 * fourth + 81 * fifth


def unpack_base3(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of pack_base3: uint8 [N, ceil(K/5)] to int8 [N, K].

    Raises ValueError for another dtype or shape, and for bytes above 242, which encode no five codes.
    """
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != -(-in_features // 5):
        raise ValueError(f"base-3 weight must be uint8 [N, ceil({in_features}/5)], got {_describe(packed)}")
    if packed.numel() and int(packed.max()) > 242:
        row, column = (packed > 242).nonzero()[0].tolist()
        raise ValueError(
            f"base-3 weight is corrupt: {int((packed > 242).count_nonzero())} bytes are above 242, the first at "
            f"[{row}, {column}] ({int(packed[row, column])}). Fetch or convert the checkpoint again."
        )
    digits = torch.stack([packed // 3**i % 3 for i in range(5)], dim=-1).view(packed.shape[0], -1)
    return digits[:, :in_features].to(torch.int8) - 1


def pack_binary(codes: Tensor) -> Tensor:
    """Pack binary codes eight to a byte.

    codes:   int8 [N, K], values -1, 1. Left unchanged.
    returns: uint8 [N, ceil(K/8)]
    Raises ValueError for other dtypes, shapes or codes. unpack_binary inverts it exactly.
    """
    _check_codes("pack_binary", codes)
    if zeros := codes.numel() - int(codes.count_nonzero()):
        raise ValueError(f"pack_binary: codes must be -1 or 1, got {zeros} zeros; pack_ternary takes them")
    bits = F.pad((codes > 0).to(torch.uint8), (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8))
    return (bits << torch.arange(8, dtype=torch.uint8, device=codes.device)).sum(-1, dtype=torch.uint8)


def unpack_binary(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of pack_binary: uint8 [N, ceil(K/8)] to int8 [N, K]. Raises ValueError for another dtype or shape."""
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != -(-in_features // 8):
        raise ValueError(f"binary weight must be uint8 [N, ceil({in_features}/8)], got {_describe(packed)}")
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(1)[:, :in_features].to(torch.int8) * 2 - 1


def pack_int4(codes: Tensor) -> Tensor:
    """Pack 4-bit codes two to a byte.

    codes:   int8 [N, K], values -8 to 7. Left unchanged.
    returns: uint8 [N, ceil(K/32), 16]
    Raises ValueError for other dtypes, shapes or codes. unpack_int4 inverts it exactly.
    """
    _check_codes("pack_int4", codes, -8, 7)
    fields = F.pad((codes + 8).view(torch.uint8), (0, -codes.shape[1] % BLOCK), value=8).unflatten(1, (-1, 2, 16))
    return fields[:, :, 0] | fields[:, :, 1] << 4


def unpack_int4(packed: Tensor, in_features: int) -> Tensor:
    """The inverse of pack_int4: uint8 [..., ceil(K/32), 16] to int8 [..., K]."""
    fields = torch.cat([packed & 15, packed >> 4], dim=-1).flatten(-2)
    return fields[..., :in_features].to(torch.int8) - 8


class Dense(NamedTuple):
    """A stored layout with fewer bits than the Hub's: codes [N, K] as uint8 [N, ceil(K / per_byte)]."""

    per_byte: int
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int], Tensor]

    def to_hub(self, packed: Tensor, in_features: int) -> Tensor:
        """A stored weight [..., N, ceil(K / per_byte)] in the Hub layout [..., ceil(N/4), K]."""
        if packed.ndim == 3:
            return torch.stack([self.to_hub(matrix, in_features) for matrix in packed])
        return pack_ternary(self.unpack(packed, in_features))


_DENSE = {1.6: Dense(5, pack_base3, unpack_base3), 1: Dense(8, pack_binary, unpack_binary)}


def dense(weight_bits: float, kind: str) -> Dense | None:
    """How files of so many bits a weight store weights of a kind; None: as others do. 1 bit is for binary ones only."""
    return None if kind in WIDE or (weight_bits == 1 and kind != "binary") else _DENSE.get(weight_bits)


def check_packed(packed: Tensor, out_features: int | None = None) -> int:
    """Check dtype and shape of a Hub-layout tensor and return N; raises ValueError. Looks at no value."""
    if packed.dtype != torch.uint8 or packed.ndim != 2:
        raise ValueError(f"packed weight must be uint8 [ceil(N/4), K], got {_describe(packed)}")
    n = 4 * packed.shape[0] if out_features is None else out_features
    if packed_rows(n) != packed.shape[0]:
        raise ValueError(
            f"packed weight has {packed.shape[0]} rows, but out_features={n} needs ceil({n}/4) = {packed_rows(n)}"
        )
    return n


def validate_packed(packed: Tensor) -> None:
    """Raise ValueError if any field of a Hub-layout tensor holds 3, which encodes no ternary value."""
    rows = max(1, (1 << 18) // max(1, packed.shape[1]))  # at a time: what is in between stays in the caches
    if any(bool((part & part >> 1 & 0b01010101).any()) for part in packed.split(rows)):
        bad = packed & packed >> 1 & 0b01010101
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"packed weight is corrupt: {int(bad.count_nonzero())} bytes hold the code 3, the first at "
            f"[{row}, {column}] (byte 0x{int(packed[row, column]):02x}); valid fields are 0, 1, 2. "
            "Fetch or convert the checkpoint again."
        )


def check_stored(weight: Tensor, out_features: int | None = None, in_features: int | None = None) -> tuple[int, int]:
    """check_packed for a weight of any kind: also int8 [N, K], or uint8 [N, ceil(K/32), 16]; returns N and K."""
    four_bits = weight.dtype == torch.uint8 and weight.ndim == 3 and weight.shape[2] == BLOCK // 2
    if four_bits or (weight.dtype == torch.int8 and weight.ndim == 2):
        n, what = len(weight), "4-bit" if four_bits else "8-bit"
        if out_features not in (None, n):
            raise ValueError(f"{what} weight has {n} rows, but out_features={out_features}")
    else:
        n = check_packed(weight, out_features)
    k = in_features or weight.shape[1] * (BLOCK if four_bits else 1)
    if weight.shape[1] != (-(-k // BLOCK) if four_bits else k):
        raise ValueError(f"packed weight has {weight.shape[1]} {'blocks of ' * four_bits}features, not {k}")
    return n, k


def check_rows(scale: Tensor | None, bias: Tensor | None, out_features: int) -> None:
    """Raise ValueError unless there are scales, float16 [N, G] for groups, else one or N, and a bias for each row."""
    if scale is not None and scale.dtype == torch.float16:
        fits = scale.ndim == 2 and len(scale) == out_features
    else:
        fits = scale is None or scale.numel() in (1, out_features)
    if not fits or (bias is not None and bias.numel() != out_features):
        sizes = [None if t is None else t.numel() if t.ndim < 2 else list(t.shape) for t in (scale, bias)]
        raise ValueError(f"scale and bias of sizes {sizes} do not fit {out_features} rows")


def stored_zeros(out_features: int, in_features: int, kind: str, device: torch.device | str | None = None) -> Tensor:
    """A stored weight of a kind ("ternary", ...) whose codes are all 0."""
    if kind == "int8":
        return torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
    if kind == "int4":
        shape = out_features, -(-in_features // BLOCK), BLOCK // 2
        return torch.full(shape, ZEROS_4, dtype=torch.uint8, device=device)
    return torch.full((packed_rows(out_features), in_features), ZEROS, dtype=torch.uint8, device=device)


def are_scales(scale: Tensor, kind: str) -> bool:
    """Whether these can be the scales of a kind of weights: finite, and positive but for those of 4-bit ones."""
    return bool((scale.isfinite() if kind == "int4" else (scale > 0) & scale.isfinite()).all())


def pack_codes(codes: Tensor, kind: str) -> Tensor:
    """Codes int8 [N, K] as a weight of their kind is stored."""
    return codes if kind == "int8" else pack_int4(codes) if kind == "int4" else pack_ternary(codes)


def put_rows(weight: Tensor, at: int, codes: Tensor) -> None:
    """Write codes int8 [R, K] to rows at, at + 1, ... of a stored weight that holds stored_zeros there."""
    if weight.dtype == torch.int8 or weight.ndim == 3:
        weight[at : at + len(codes)] = codes if weight.dtype == torch.int8 else pack_int4(codes)
        return
    _check_codes("put_rows", codes)
    rows, end = len(weight), at + len(codes)
    for j in range(at // rows, -(-end // rows)):  # the rows whose codes are field j of a byte
        first, last = max(at, j * rows), min(end, j * rows + rows)
        fields = (codes[first - at : last - at] + 1).to(torch.uint8) ^ 1
        weight[first - j * rows : last - j * rows] ^= fields << 2 * j


def codes_of(weight: Tensor, out_features: int, in_features: int | None = None) -> Tensor:
    """The int8 codes [N, K] of a stored weight: of a 4-bit one in_features says how many of its last block count."""
    if weight.dtype == torch.int8:
        return weight
    if weight.ndim == 3:
        return unpack_int4(weight, weight.shape[1] * BLOCK if in_features is None else in_features)
    return unpack_ternary(weight, out_features)


def codes_of_rows(weight: Tensor, rows: Tensor, in_features: int) -> Tensor:
    """Some rows of codes_of(weight), int8 [..., K] for rows [...], without unpacking the others."""
    if weight.dtype == torch.int8:
        return F.embedding(rows, weight)
    if weight.ndim == 3:
        return unpack_int4(F.embedding(rows, weight.flatten(1)).unflatten(-1, (-1, BLOCK // 2)), in_features)
    shift = (rows // len(weight) * 2).to(torch.uint8)[..., None]
    return (F.embedding(rows % len(weight), weight) >> shift & 3).to(torch.int8) - 1


def _check_codes(function: str, codes: Tensor, low: int = -1, high: int = 1) -> None:
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise ValueError(f"{function}: codes must be int8 [N, K], got {_describe(codes)}")
    if codes.numel() and (int(codes.min()) < low or int(codes.max()) > high):
        allowed = "-1, 0 or 1" if high == 1 else f"from {low} to {high}"
        raise ValueError(
            f"{function}: codes must be {allowed}, got values from {int(codes.min())} to {int(codes.max())}; "
            "quantize the weight first (quantize_weight)"
        )


def _describe(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
