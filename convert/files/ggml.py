"""ggml's ternary and binary tensor types, bit by bit: packed from codes and scale, and back.

A row of K weights is cut into blocks; d is a block's scale as float16 and 0 where all its weights are 0, as ggml's own
quantizers write it. A code is stored as code + 1, so 0 = -1, 1 = 0, 2 = +1; of Q2_0 and PQ2_0 also 3 = +2.

    type       id   weights  bytes  block
    TQ1_0      34   256      54     48 + 4 bytes of base-3 digits, d. Byte j < 32 holds the weights j + 32i, i = 0..4,
                                    byte 32 + j the weights 160 + j + 16i, byte 48 + j the weights 240 + j + 4i,
                                    i = 0..3; the digits, first weight highest, make v = 81 a + 27 b + ..., stored as
                                    ceil(256 v / 243)
    TQ2_0      35   256      66     64 bytes, d. Bits 2i..2i+1 of byte 32h + j hold the weight 128h + j + 32i, i = 0..3
    I2_S       36   128      32     Bits 6-2i..7-2i of byte j hold the weight j + 32i; no d, but 32 bytes behind the
                                    whole tensor that start with one float32 scale. bitnet.cpp's own type, in its x86
                                    layout; built for ARM, it has blocks of 64 in 16 bytes and misreads these files.
    Q1_0       41   128      18     d, 16 bytes. Bit i of byte j holds the weight 8j + i: 1 = +1, 0 = -1
    Q2_0       42   64       18     d, 16 bytes. Bits 2i..2i+1 of byte j hold the weight 4j + i
    PQ2_0      142  128      34     d, 32 bytes, in Q2_0's order. PrismML's fork wrote this as type 42, too, until
                                    upstream took that for Q2_0: which one a file has shows by the sizes of its tensors
    PTQ1_0     143  128      28     24 + 2 bytes of digits as in TQ1_0, d. Byte j < 16 holds the weights j + 16i, byte
                                    16 + j the weights 80 + j + 8i, i = 0..4, byte 24 + j the weights 120 + j + 2i,
                                    i = 0..3. PrismML's fork
    IQ1_BN     134  64       13     Byte 3i + k, k < 3, holds the weights 16i + 5k + j, j = 0..4, byte 12 the weights
                                    16i + 15, i = 0..3, first weight lowest; ceil(256 v / 243) again. ik_llama.cpp's,
                                    and so are the next two; the scale is a row's: a float16 that the row starts with
    IQ2_BN     135  64       16     Bits 2i..2i+1 of byte j hold the weight j + 16i; a row starts with a float32 scale
    IQ2_BN_R4  335  64       16     Four rows as one: their float32 scales, then 64 bytes for each block of theirs. Bits
                                    2j..2j+1 of byte 16l + 4r + i hold the weight 16l + 4j + i of row r

Sources: ggml/src/ggml-quants.c of llama.cpp and of PrismML's fork; src/ggml-bitnet-mad.cpp of bitnet.cpp;
ggml/src/iqk/iqk_quantize.cpp of ik_llama.cpp.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bitnet.kernels.layout import BLOCK, pack_int4, unpack_int4
from bitnet.kernels.reference import size_of_groups

from .scales import coarsest

Bytes = NDArray[np.uint8]


class Ternary(NamedTuple):
    """A ternary or binary type of ggml."""

    id: int
    block: int  # weights
    bytes: int  # of a block
    file_type: int = 0  # general.file_type of a file whose matrices have this type; 0: it is only read here
    row: int = 0  # bytes of the scale that a row starts with
    rows: int = 1  # that are stored as one


TERNARY = {
    "TQ1_0": Ternary(34, 256, 54, 36),
    "TQ2_0": Ternary(35, 256, 66, 37),
    "Q2_0": Ternary(42, 64, 18, 41),
    "Q1_0": Ternary(41, 128, 18, 40),
    "I2_S": Ternary(36, 128, 32, 40),
    "PQ2_0": Ternary(142, 128, 34, 128),
    "PTQ1_0": Ternary(143, 128, 28, 129),
    "IQ1_BN": Ternary(134, 64, 13, row=2),
    "IQ2_BN": Ternary(135, 64, 16, row=4),
    "IQ2_BN_R4": Ternary(335, 64, 16, row=4, rows=4),
}
NAMES = {int(kind): kind.name for kind in gguf.GGMLQuantizationType} | {kind.id: n for n, kind in TERNARY.items()}
F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30
FLOATS = {"F32": F32, "F16": F16, "BF16": BF16}  # as safetensors spells them
TRAILER = 32  # bytes behind an I2_S tensor
# Types that are known and not read: numbers of forks, which other forks may give to something else.
FOREIGN = dict.fromkeys((43, 44), "FV5 of Neutrino's fork, with five values (elsewhere STQ1_0)")

_SIZES: dict[int, tuple[int, int]] = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
_SIZES |= {kind.id: (kind.block, kind.bytes) for kind in TERNARY.values()}
_DIGIT_SPANS = {  # first weight, end, digits, bytes
    "TQ1_0": ((0, 160, 5, 32), (160, 240, 5, 16), (240, 256, 4, 4)),
    "PTQ1_0": ((0, 80, 5, 16), (80, 120, 5, 8), (120, 128, 4, 2)),
}
_TYPE_42 = {"Q2_0": (64, 18), "PQ2_0": (128, 34), "STQ1_0": (256, 42)}  # weights and bytes of a block
_D_FIRST = ("Q1_0", "Q2_0", "PQ2_0")
_POWERS = np.array([81, 27, 9, 3, 1], dtype=np.uint8)
_FIXED = ((np.arange(243) * 256 + 242) // 243).astype(np.uint8)  # base-3 value -> byte
_INVALID = 2  # the code of what encodes none; of Q2_0 and PQ2_0 it is one
_DIGITS = np.full((5, 256), _INVALID, dtype=np.int8)  # byte -> code of each digit
_DIGITS[:, _FIXED] = np.arange(243) // _POWERS[:, None] % 3 - 1


def nbytes(kind: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of ggml type `kind`, shape [..., K]. Raises ValueError for types and shapes there are not."""
    if kind in FOREIGN:
        raise ValueError(f"its ggml type {kind} is {FOREIGN[kind]}, which is not read here")
    if kind not in _SIZES:
        raise ValueError(f"its ggml type {kind} is unknown here")
    block, size = _SIZES[kind]
    if shape[-1] % block:
        raise ValueError(f"its rows of {shape[-1]} weights are no whole number of {NAMES[kind]} blocks ({block})")
    total = math.prod(shape) // block * size + (TRAILER if kind == TERNARY["I2_S"].id else 0)
    if (ternary := TERNARY.get(NAMES[kind])) and ternary.row:
        rows = math.prod(shape[:-1])
        if rows % ternary.rows:
            raise ValueError(f"its {rows} rows are no multiple of {ternary.rows}, as {NAMES[kind]} stores them")
        total += rows * ternary.row
    return total


def type_42(tensors: list[tuple[tuple[int, ...], range]]) -> int:
    """The type of a file's tensors of that number: Q2_0, or what is now PQ2_0.

    tensors: the shape of each, and the sizes that it may have
    Raises ValueError where several fit, or only the third. Where none does, it is upstream's, and its size is wrong.
    """

    def fits(block: int, size: int) -> bool:
        return all(not shape[-1] % block and math.prod(shape) // block * size in sizes for shape, sizes in tensors)

    names = [name for name, blocks in _TYPE_42.items() if fits(*blocks)] if tensors else []
    if len(names) > 1:
        raise ValueError(f"its ggml type 42 may be {' or '.join(names)}; the file's tensors are too small to tell")
    if names == ["STQ1_0"]:
        raise ValueError("its ggml type 42 is by its size STQ1_0 (Sherry), which is not read here")
    return TERNARY[names[0] if names else "Q2_0"].id


def pack(name: str, codes: Tensor, scale: Tensor) -> Bytes:
    """A ternary matrix as ggml stores it.

    name:    one of TERNARY that has a file_type
    codes:   int8 [N, K], values -1, 0, 1; K a multiple of the block
    scale:   float32 [1] or [N] (I2_S: [1]), or float16 [N, G] of groups
    returns: uint8 [nbytes]
    Raises ValueError for a scale that float16 cannot hold to its full precision, or that changes within a block, and
    for zeros in a block of Q1_0 that has others.
    """
    kind = TERNARY[name]
    blocks = codes.numpy().reshape(-1, kind.block)
    fields = (blocks + np.int8(1)).view(np.uint8)
    if name == "I2_S":
        trailer = np.zeros(TRAILER, np.uint8)
        trailer[:4] = scale.numpy().astype(np.float32).view(np.uint8)
        return np.concatenate([_planes(fields.reshape(-1, 4, 32), (6, 4, 2, 0)).reshape(-1), trailer])
    some = blocks.any(1)
    d = _float16(_scales_of_blocks(scale, codes, kind.block) * some)
    packed = np.empty((len(blocks), kind.bytes), np.uint8)
    if name == "Q1_0":
        if not blocks[some].all():
            raise ValueError("it has zeros, and Q1_0 only -1 and +1")
        packed[:, :2] = d
        packed[:, 2:] = np.packbits(blocks > 0, axis=1, bitorder="little")
        return packed.reshape(-1)
    if name in ("Q2_0", "PQ2_0"):
        packed[:, :2] = d
        packed[:, 2:] = _planes(fields.reshape(len(blocks), -1, 4).transpose(0, 2, 1), (0, 2, 4, 6))
        return packed.reshape(-1)
    packed[:, -2:] = d
    if name == "TQ2_0":
        for half in range(2):
            part = fields[:, 128 * half : 128 * (half + 1)].reshape(-1, 4, 32)
            packed[:, 32 * half : 32 * (half + 1)] = _planes(part, (0, 2, 4, 6))
        return packed.reshape(-1)
    at = 0
    for start, end, digits, width in _DIGIT_SPANS[name]:
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
    codes = _codes(name, data, rows)
    if codes.max(initial=0) == _INVALID:
        if name in ("Q2_0", "PQ2_0"):
            twos = int((codes == _INVALID).sum())
            raise ValueError(
                f"holds {twos:,} weights ({100 * twos / codes.size:.2g} %) of +2, so it is not ternary, and no packed "
                "layer can hold it; --to bf16 (open_source(floats=True)) reads it as floats, exactly"
            )
        raise ValueError("holds bytes that encode no ternary weights; it is corrupt, or was quantized by another rule")
    return torch.from_numpy(codes).view(rows, -1)


def is_binary(name: str, data: Bytes, rows: int) -> bool:
    """Whether a tensor's weights are -d and +d everywhere. (Blocks of Q1_0 whose d is 0 hold zeros.)"""
    return name == "Q1_0" and bool(_block_scales(name, data, rows).all())


def scales(name: str, data: Bytes, rows: int) -> Tensor:
    """The scale of a ternary tensor: float32 [1] if all rows have the same, [N] if each row has one, else float16
    [N, G], of the largest groups of features that share one. What is all zeros takes any: 1.

    data: uint8 [nbytes]; rows: N
    Raises ValueError for scales that are not finite or negative.
    """
    return coarsest(_block_scales(name, data, rows).reshape(1 if name == "I2_S" else rows, -1), TERNARY[name].block)


def dequantize(name: str, data: Bytes, rows: int) -> Tensor:
    """A ternary tensor as float32 [N, K], whatever scales its blocks have, the +2 of Q2_0 and PQ2_0 included."""
    codes = _codes(name, data, rows) if name in ("Q2_0", "PQ2_0") else unpack(name, data, rows).numpy()
    d = _block_scales(name, data, rows)
    return torch.from_numpy(codes.reshape(len(d), -1) * d).view(rows, -1)


def pack_q8_0(codes: Tensor, scale: Tensor) -> Bytes:
    """An 8-bit matrix as Q8_0: blocks of a float16 scale and 32 codes. codes int8 [N, K], scale [1] or [N]."""
    blocks = codes.numpy().reshape(-1, 32)
    d = _float16(np.repeat(_rows(scale, codes), codes.shape[1] // 32))
    return np.concatenate([d, blocks.view(np.uint8)], axis=1).reshape(-1)


def pack_q4_0(codes: Tensor, scale: Tensor) -> Bytes:
    """A 4-bit matrix as Q4_0: blocks of a float16 scale and 32 codes. codes int8 [N, K], scale float16 [N, K / 32]."""
    d, blocks = scale.reshape(-1, 1).numpy().view(np.uint8), pack_int4(codes).view(-1, 16).numpy()
    return np.concatenate([d, blocks], axis=1).reshape(-1)


def unpack_q4_0(data: Bytes, rows: int) -> Tensor:
    """The codes int8 [N, K] of a matrix in Q4_0, uint8 [nbytes]; rows: N."""
    blocks = data.reshape(rows, -1, 2 + BLOCK // 2)
    return unpack_int4(torch.from_numpy(np.ascontiguousarray(blocks[..., 2:])), blocks.shape[1] * BLOCK)


def scales_q4_0(data: Bytes, rows: int) -> Tensor:
    """Its scales, float16 [N, K / 32]. Raises ValueError for some that are not finite."""
    d = np.ascontiguousarray(data.reshape(rows, -1, 2 + BLOCK // 2)[..., :2]).view(np.float16)
    if not np.isfinite(d).all():
        raise ValueError("its scales must be finite; it is corrupt")
    return torch.from_numpy(d[..., 0])


# Types of the matrices whose codes are not -1, 0 and 1, by what QuantSpec calls them.
WIDE: dict[str, tuple[int, Callable[[Tensor, Tensor], Bytes]]] = {"int8": (Q8_0, pack_q8_0), "int4": (Q4_0, pack_q4_0)}


def _codes(name: str, data: Bytes, rows: int) -> Any:
    """The codes in a tensor's bytes as int8 [N K / block, block], _INVALID where they encode none (or +2), and 0 under
    a scale of 0, whatever is there."""
    kind = TERNARY[name]
    body = data[:-TRAILER] if name == "I2_S" else data
    if kind.row:  # the scales lie between
        body = body.reshape(rows // kind.rows, -1)[:, kind.row * kind.rows :]
    blocks = body.reshape(-1, kind.bytes * kind.rows)
    codes = np.empty((len(blocks) * kind.rows, kind.block), np.int8)
    if name in _DIGIT_SPANS:
        at = 0
        for start, _, digits, width in _DIGIT_SPANS[name]:
            for i in range(digits):
                codes[:, start + width * i : start + width * (i + 1)] = _DIGITS[i][blocks[:, at : at + width]]
            at += width
    elif name == "IQ1_BN":
        for j in range(5):
            codes.reshape(-1, 4, 16)[:, :, j:15:5] = _DIGITS[4 - j][blocks[:, :12].reshape(-1, 4, 3)]
        for i in range(4):
            codes[:, 16 * i + 15] = np.where(_DIGITS[0][blocks[:, 12]] == -1, _DIGITS[4 - i][blocks[:, 12]], _INVALID)
    elif name == "Q1_0":
        codes[:] = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
        codes += codes - np.int8(1)
    else:
        for i in range(4):
            if name == "I2_S":
                codes[:, 32 * i : 32 * (i + 1)] = blocks >> (6 - 2 * i) & 3
            elif name in ("Q2_0", "PQ2_0"):
                codes[:, i::4] = blocks[:, 2:] >> 2 * i & 3
            elif name == "IQ2_BN":
                codes[:, 16 * i : 16 * (i + 1)] = blocks >> 2 * i & 3
            elif name == "IQ2_BN_R4":
                # of each four rows: block, quarter l, row r, i  ->  r, block, l, bits, i
                part = (blocks >> 2 * i & 3).reshape(rows // 4, -1, 4, 4, 4).transpose(0, 3, 1, 2, 4)
                codes.reshape(rows // 4, 4, -1, 4, 4, 4)[:, :, :, :, i] = part
            else:
                codes.reshape(-1, 2, 4, 32)[:, :, i] = blocks[:, :64].reshape(-1, 2, 32) >> 2 * i & 3
        codes -= np.int8(1)
    d = _block_scales(name, data, rows)
    if not d.all():
        codes.reshape(len(d), -1)[:] *= d != 0
    return codes


def _block_scales(name: str, data: Bytes, rows: int) -> Any:
    """The scale of each block, float32 [blocks, 1]; where a row has one, [N, 1], and of I2_S, which has one for all,
    [1, 1]."""
    kind = TERNARY[name]
    if name == "I2_S":
        return data[-TRAILER : 4 - TRAILER].view(np.float32)[None]
    if kind.row:
        d = np.ascontiguousarray(data.reshape(rows // kind.rows, -1)[:, : kind.row * kind.rows])
        return d.view(np.float16 if kind.row == 2 else np.float32).astype(np.float32).reshape(-1, 1)
    at = 0 if name in _D_FIRST else kind.bytes - 2
    d = data.reshape(-1, kind.bytes)[:, at : at + 2]
    return np.ascontiguousarray(d).view(np.float16).astype(np.float32)


def _planes(fields: Any, shifts: tuple[int, ...]) -> Any:
    """fields [blocks, 4, width], each below 4, shifted and joined to bytes [blocks, width]."""
    first, second, third, fourth = (fields[:, i] << np.uint8(shift) for i, shift in enumerate(shifts))
    return first | second | third | fourth


def _rows(scale: Tensor, codes: Tensor) -> Any:
    return np.broadcast_to(scale.numpy().astype(np.float32), (len(codes),))


def _scales_of_blocks(scale: Tensor, codes: Tensor, block: int) -> Any:
    """The scale of each block, float32 [blocks]."""
    n, k = codes.shape
    if scale.dtype != torch.float16:
        return np.repeat(_rows(scale, codes), k // block)
    size = size_of_groups(k, scale.shape[1])
    d = scale.float().numpy()
    if size >= block:
        return np.repeat(d, size // block, axis=1)[:, : k // block].reshape(-1)
    parts = d.reshape(n, k // block, block // size)
    if not (parts == parts[..., :1]).all():
        raise ValueError(f"it has a scale for {size} features, and this type one for {block}; take gguf-q2_0")
    return parts[..., 0].reshape(-1)


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
