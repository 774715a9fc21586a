"""ggml's ternary tensor types, bit by bit: packed from codes and scale, and back.

A row of K weights is cut into blocks; d is a block's scale as float16 and 0 where all its weights are 0, as ggml's own
quantizers write it. A code is stored as code + 1, so 0 = -1, 1 = 0, 2 = +1.

    type    id  weights  bytes  block
    TQ1_0   34  256      54     48 + 4 bytes of base-3 digits, d. Byte j < 32 holds the weights j + 32i, i = 0..4, byte
                                32 + j the weights 160 + j + 16i, byte 48 + j the weights 240 + j + 4i, i = 0..3; the
                                digits, first weight highest, make v = 81 a + 27 b + ..., stored as ceil(256 v / 243)
    TQ2_0   35  256      66     64 bytes, d. Bits 2i..2i+1 of byte 32h + j hold the weight 128h + j + 32i, i = 0..3
    Q2_0    42  64       18     d, 16 bytes. Bits 2i..2i+1 of byte j hold the weight 4j + i
    I2_S    36  128      32     Bits 6-2i..7-2i of byte j hold the weight j + 32i; no d, but 32 bytes behind the whole
                                tensor that start with one float32 scale. bitnet.cpp's own type, in its x86 layout;
                                built for ARM, it has blocks of 64 in 16 bytes and misreads these files.

Sources: ggml/src/ggml-quants.c of llama.cpp; src/ggml-bitnet-mad.cpp of bitnet.cpp.
"""

import math
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Bytes = NDArray[np.uint8]


class Ternary(NamedTuple):
    """A ternary type of ggml."""

    id: int
    block: int  # weights
    bytes: int  # of a block
    file_type: int  # general.file_type of a file whose matrices have this type


TERNARY = {
    "TQ1_0": Ternary(34, 256, 54, 36),
    "TQ2_0": Ternary(35, 256, 66, 37),
    "Q2_0": Ternary(42, 64, 18, 41),
    "I2_S": Ternary(36, 128, 32, 40),
}
NAMES = {int(kind): kind.name for kind in gguf.GGMLQuantizationType} | {kind.id: n for n, kind in TERNARY.items()}
F32, F16, Q8_0, BF16 = 0, 1, 8, 30
FLOATS = {"F32": F32, "F16": F16, "BF16": BF16}  # as safetensors spells them
TRAILER = 32  # bytes behind an I2_S tensor

_SIZES: dict[int, tuple[int, int]] = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
_SIZES |= {kind.id: (kind.block, kind.bytes) for kind in TERNARY.values()}
_DIGIT_SPANS = ((0, 160, 5, 32), (160, 240, 5, 16), (240, 256, 4, 4))  # TQ1_0: first weight, end, digits, bytes
_POWERS = np.array([81, 27, 9, 3, 1], dtype=np.uint8)
_FIXED = ((np.arange(243) * 256 + 242) // 243).astype(np.uint8)  # base-3 value -> byte
_DIGITS = np.full((5, 256), 2, dtype=np.int8)  # byte -> code of each digit; 2 where it has none
_DIGITS[:, _FIXED] = np.arange(243) // _POWERS[:, None] % 3 - 1


def nbytes(kind: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of ggml type `kind`, shape [..., K]. Raises ValueError for types and K there are not."""
    if kind not in _SIZES:
        raise ValueError(f"its ggml type {kind} is unknown here")
    block, size = _SIZES[kind]
    if shape[-1] % block:
        raise ValueError(f"its rows of {shape[-1]} weights are no whole number of {NAMES[kind]} blocks ({block})")
    return math.prod(shape) // block * size + (TRAILER if kind == TERNARY["I2_S"].id else 0)


def pack(name: str, codes: Tensor, scale: Tensor) -> Bytes:
    """A ternary matrix as ggml stores it.

    name:    one of TERNARY
    codes:   int8 [N, K], values -1, 0, 1; K a multiple of the block
    scale:   float32 [1] or [N] (I2_S: [1])
    returns: uint8 [nbytes]
    Raises ValueError for a scale that float16 cannot hold to its full precision.
    """
    kind = TERNARY[name]
    blocks = codes.numpy().reshape(-1, kind.block)
    fields = (blocks + np.int8(1)).view(np.uint8)
    if name == "I2_S":
        trailer = np.zeros(TRAILER, np.uint8)
        trailer[:4] = scale.numpy().astype(np.float32).view(np.uint8)
        return np.concatenate([_planes(fields.reshape(-1, 4, 32), (6, 4, 2, 0)).reshape(-1), trailer])
    d = _float16(np.repeat(_rows(scale, codes), codes.shape[1] // kind.block) * blocks.any(1))
    packed = np.empty((len(blocks), kind.bytes), np.uint8)
    if name == "Q2_0":
        packed[:, :2] = d
        packed[:, 2:] = _planes(fields.reshape(-1, 16, 4).transpose(0, 2, 1), (0, 2, 4, 6))
        return packed.reshape(-1)
    packed[:, -2:] = d
    if name == "TQ2_0":
        for half in range(2):
            part = fields[:, 128 * half : 128 * (half + 1)].reshape(-1, 4, 32)
            packed[:, 32 * half : 32 * (half + 1)] = _planes(part, (0, 2, 4, 6))
        return packed.reshape(-1)
    at = 0
    for start, end, digits, width in _DIGIT_SPANS:
        part = fields[:, start:end].reshape(-1, digits, width)
        value = sum(part[:, i] * _POWERS[i] for i in range(digits))  # at most 242
        packed[:, at : at + width] = _FIXED[value]
        at += width
    return packed.reshape(-1)


def unpack(name: str, data: Bytes, rows: int) -> Tensor:
    """The int8 codes [N, K] in the bytes of a ternary tensor, 0 where a block's scale is 0; the inverse of pack.

    data: uint8 [nbytes]; rows: N
    Raises ValueError for bytes that hold no ternary codes.
    """
    kind = TERNARY[name]
    blocks = (data[:-TRAILER] if name == "I2_S" else data).reshape(-1, kind.bytes)
    codes = np.empty((len(blocks), kind.block), np.int8)
    if name == "TQ1_0":
        at = 0
        for start, _, digits, width in _DIGIT_SPANS:
            for i in range(digits):
                codes[:, start + width * i : start + width * (i + 1)] = _DIGITS[i][blocks[:, at : at + width]]
            at += width
        invalid = 2
    else:
        invalid = 3
        for i in range(4):
            if name == "I2_S":
                codes[:, 32 * i : 32 * (i + 1)] = blocks >> (6 - 2 * i) & 3
            elif name == "Q2_0":
                codes[:, i::4] = blocks[:, 2:] >> 2 * i & 3
            else:
                codes.reshape(-1, 2, 4, 32)[:, :, i] = blocks[:, :64].reshape(-1, 2, 32) >> 2 * i & 3
    if codes.max(initial=0) == invalid:
        raise ValueError("holds bytes that encode no ternary weights; it is corrupt, or was quantized by another rule")
    if name != "TQ1_0":
        codes -= np.int8(1)
    d = _block_scales(name, data)
    if not d.all():
        codes *= d != 0
    return torch.from_numpy(codes).view(rows, -1)


def scales(name: str, data: Bytes, rows: int) -> Tensor:
    """The float32 scale of a ternary tensor: [1] if all rows have the same, else [N]. Rows of zeros take any: 1.

    data: uint8 [nbytes]; rows: N
    Raises ValueError for scales that are not finite or negative, or that differ within a row.
    """
    d = _block_scales(name, data).reshape(1 if name == "I2_S" else rows, -1)
    if not ((d >= 0) & np.isfinite(d)).all():
        raise ValueError("has a scale that is negative, infinite or NaN; it is corrupt, so convert or fetch it again")
    row = d.max(axis=1)
    if not ((d == row[:, None]) | (d == 0)).all():
        raise ValueError(
            "has scales that differ within a row, which a packed layer here cannot hold (one scale a row, or one a "
            "matrix); convert the file to floats: --to bf16"
        )
    known = row[row > 0]
    if not len(known):
        return torch.ones(1)
    if (known == known[0]).all():
        return torch.from_numpy(known[:1].copy())
    return torch.from_numpy(np.where(row > 0, row, np.float32(1)))


def dequantize(name: str, data: Bytes, rows: int) -> Tensor:
    """A ternary tensor as float32 [N, K], whatever scales its blocks have."""
    codes = unpack(name, data, rows)
    blocks = codes.numpy().reshape(-1, TERNARY[name].block)
    return torch.from_numpy(blocks * _block_scales(name, data)).view(rows, -1)


def pack_q8_0(codes: Tensor, scale: Tensor) -> Bytes:
    """An 8-bit matrix as Q8_0: blocks of a float16 scale and 32 codes. codes int8 [N, K], scale [1] or [N]."""
    blocks = codes.numpy().reshape(-1, 32)
    d = _float16(np.repeat(_rows(scale, codes), codes.shape[1] // 32))
    return np.concatenate([d, blocks.view(np.uint8)], axis=1).reshape(-1)


def _block_scales(name: str, data: Bytes) -> Any:
    """The scale of each block, float32 [blocks, 1]; of I2_S, which has one for all, [1, 1]."""
    if name == "I2_S":
        return data[-TRAILER : 4 - TRAILER].view(np.float32)[None]
    at = 0 if name == "Q2_0" else TERNARY[name].bytes - 2
    d = data.reshape(-1, TERNARY[name].bytes)[:, at : at + 2]
    return np.ascontiguousarray(d).view(np.float16).astype(np.float32)


def _planes(fields: Any, shifts: tuple[int, ...]) -> Any:
    """fields [blocks, 4, width], each below 4, shifted and joined to bytes [blocks, width]."""
    first, second, third, fourth = (fields[:, i] << np.uint8(shift) for i, shift in enumerate(shifts))
    return first | second | third | fourth


def _rows(scale: Tensor, codes: Tensor) -> Any:
    return np.broadcast_to(scale.numpy().astype(np.float32), (len(codes),))


def _float16(scale: Any) -> Any:
    """Scales [blocks] as float16 bytes [blocks, 2]; raises ValueError where they would lose precision."""
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if not ((scale == 0) | (half >= np.finfo(np.float16).tiny) & np.isfinite(half)).all():
        raise ValueError(
            f"its scales, {scale[scale != 0].min():.3g} to {scale.max():.3g}, are outside of float16's normal range "
            "(6.1e-5 to 65504), in which this type stores them"
        )
    return half.reshape(-1, 1).view(np.uint8)
