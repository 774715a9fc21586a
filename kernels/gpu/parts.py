"""What the Triton products share: packed bytes to planes of codes, which program has which tile, and which is last."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantize import rows_of

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
GROUP = 16  # token tiles that walk along the rows together, so that their activations stay in L2


# Assembly. $0.. are the outputs, then the inputs; registers are 32 bits: four bytes of packed weights or codes.

_TWO_BITS = tl.constexpr("""{
.reg .b32 t;
and.b32 $0, $4, 0x03030303;
shr.u32 t, $4, 2;
and.b32 $1, t, 0x03030303;
shr.u32 t, $4, 4;
and.b32 $2, t, 0x03030303;
shr.u32 t, $4, 6;
and.b32 $3, t, 0x03030303;
}""")
# the even and the odd bytes times 3^(p + 1), in 16 bits each; their upper bytes, side by side, are T_p
_BASE3 = tl.constexpr("""{
.reg .b32 even, odd, a, b, t, u;
and.b32 even, $5, 0x00FF00FF;
shr.u32 odd, $5, 8;
and.b32 odd, odd, 0x00FF00FF;
mul.lo.u32 a, even, 3;
mul.lo.u32 b, odd, 3;
prmt.b32 t, a, b, 0x7351;
mov.b32 $0, t;
mul.lo.u32 a, even, 9;
mul.lo.u32 b, odd, 9;
prmt.b32 u, a, b, 0x7351;
mad.lo.s32 $1, t, -3, u;
mul.lo.u32 a, even, 27;
mul.lo.u32 b, odd, 27;
prmt.b32 t, a, b, 0x7351;
mad.lo.s32 $2, u, -3, t;
mul.lo.u32 a, even, 81;
mul.lo.u32 b, odd, 81;
prmt.b32 u, a, b, 0x7351;
mad.lo.s32 $3, t, -3, u;
mul.lo.u32 a, even, 243;
mul.lo.u32 b, odd, 243;
prmt.b32 t, a, b, 0x7351;
mad.lo.s32 $4, u, -3, t;
}""")
# A code c + 1 of plane p, placed in the mantissa of a power of two, makes it that plus 4^p (c + 1): one multiplication
# and addition, exact, make it c. Two weights a register; bfloat16's mantissa is too short for plane 3: it is shifted.
_TWO_BITS_AS_BFLOAT16 = tl.constexpr("""{
.reg .b32 low, high, t, one, c;
mov.b32 one, 0x3F803F80;
prmt.b32 low, $8, 0, 0x4140;
prmt.b32 high, $8, 0, 0x4342;
mov.b32 c, 0xC301C301;
lop3.b32 t, low, 0x00030003, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, t, one, c;
lop3.b32 t, high, 0x00030003, 0x43004300, 0xEA;
fma.rn.bf16x2 $1, t, one, c;
mov.b32 one, 0x3E803E80;
mov.b32 c, 0xC204C204;
lop3.b32 t, low, 0x000C000C, 0x43004300, 0xEA;
fma.rn.bf16x2 $2, t, one, c;
lop3.b32 t, high, 0x000C000C, 0x43004300, 0xEA;
fma.rn.bf16x2 $3, t, one, c;
mov.b32 one, 0x3D803D80;
mov.b32 c, 0xC110C110;
lop3.b32 t, low, 0x00300030, 0x43004300, 0xEA;
fma.rn.bf16x2 $4, t, one, c;
lop3.b32 t, high, 0x00300030, 0x43004300, 0xEA;
fma.rn.bf16x2 $5, t, one, c;
mov.b32 one, 0x3F803F80;
mov.b32 c, 0xC301C301;
shr.u32 low, low, 6;
lop3.b32 t, low, 0x00030003, 0x43004300, 0xEA;
fma.rn.bf16x2 $6, t, one, c;
shr.u32 high, high, 6;
lop3.b32 t, high, 0x00030003, 0x43004300, 0xEA;
fma.rn.bf16x2 $7, t, one, c;
}""")
_TWO_BITS_AS_FLOAT16 = tl.constexpr("""{
.reg .b32 low, high, t, one, c;
prmt.b32 low, $8, 0, 0x4140;
prmt.b32 high, $8, 0, 0x4342;
mov.b32 one, 0x3C003C00;
mov.b32 c, 0xE401E401;
lop3.b32 t, low, 0x00030003, 0x64006400, 0xEA;
fma.rn.f16x2 $0, t, one, c;
lop3.b32 t, high, 0x00030003, 0x64006400, 0xEA;
fma.rn.f16x2 $1, t, one, c;
mov.b32 one, 0x34003400;
mov.b32 c, 0xDC04DC04;
lop3.b32 t, low, 0x000C000C, 0x64006400, 0xEA;
fma.rn.f16x2 $2, t, one, c;
lop3.b32 t, high, 0x000C000C, 0x64006400, 0xEA;
fma.rn.f16x2 $3, t, one, c;
mov.b32 one, 0x2C002C00;
mov.b32 c, 0xD410D410;
lop3.b32 t, low, 0x00300030, 0x64006400, 0xEA;
fma.rn.f16x2 $4, t, one, c;
lop3.b32 t, high, 0x00300030, 0x64006400, 0xEA;
fma.rn.f16x2 $5, t, one, c;
mov.b32 one, 0x24002400;
mov.b32 c, 0xCC40CC40;
lop3.b32 t, low, 0x00C000C0, 0x64006400, 0xEA;
fma.rn.f16x2 $6, t, one, c;
lop3.b32 t, high, 0x00C000C0, 0x64006400, 0xEA;
fma.rn.f16x2 $7, t, one, c;
}""")
_FOUR_BITS = tl.constexpr("""{
.reg .b32 t;
and.b32 $0, $2, 0x0F0F0F0F;
shr.u32 t, $2, 4;
and.b32 $1, t, 0x0F0F0F0F;
}""")
_DOT4 = tl.constexpr("dp4a.s32.s32 $0, $1, $2, $3;")


@triton.jit
def two_bit_planes(w, ASM: tl.constexpr):
    """Bytes [R, B] to the four planes of codes + 1, int8 [R, B] each."""
    if ASM:
        return tl.inline_asm_elementwise(
            _TWO_BITS, "=r,=r,=r,=r,r", [w], dtype=(tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        return (w & 3).to(tl.int8), (w >> 2 & 3).to(tl.int8), (w >> 4 & 3).to(tl.int8), (w >> 6).to(tl.int8)


@triton.jit
def four_bit_planes(w, ASM: tl.constexpr):
    """Bytes [R, B] to the two planes of codes + 8, int8 [R, B] each."""
    if ASM:
        return tl.inline_asm_elementwise(_FOUR_BITS, "=r,=r,r", [w], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        return (w & 15).to(tl.int8), (w >> 4).to(tl.int8)


@triton.jit
def _as_float(codes, dtype: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        return codes.to(dtype)
    else:
        return codes.to(tl.float32).to(dtype)  # the interpreter knows no other way to bfloat16


@triton.jit
def float_planes(w, PLANES: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Bytes [R, B] to the planes of codes [R, B], as bfloat16 or float16."""
    if PLANES == 1:
        return (_as_float(w, dtype, ASM),)
    elif PLANES == 2:
        a, b = four_bit_planes(w, ASM)
        return _as_float(a - 8, dtype, ASM), _as_float(b - 8, dtype, ASM)
    elif PLANES == 5:
        a, b, c, d, e = base3_planes(w, ASM)
        return (
            _as_float(a - 1, dtype, ASM), _as_float(b - 1, dtype, ASM), _as_float(c - 1, dtype, ASM),
            _as_float(d - 1, dtype, ASM), _as_float(e - 1, dtype, ASM),
        )  # fmt: skip
    elif not ASM:
        a, b, c, d = two_bit_planes(w, ASM)
        return (
            _as_float(a - 1, dtype, ASM), _as_float(b - 1, dtype, ASM), _as_float(c - 1, dtype, ASM),
            _as_float(d - 1, dtype, ASM),
        )  # fmt: skip
    elif dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            _TWO_BITS_AS_BFLOAT16, "=r,=r,=r,=r,=r,=r,=r,=r,r", [w],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return tl.inline_asm_elementwise(
            _TWO_BITS_AS_FLOAT16, "=r,=r,=r,=r,=r,=r,=r,=r,r", [w],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def base3_planes(w, ASM: tl.constexpr):
    """Bytes [R, B] to the five planes of codes + 1, int8 [R, B] each."""
    if ASM:
        return tl.inline_asm_elementwise(
            _BASE3, "=r,=r,=r,=r,=r,r", [w],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        v = w.to(tl.int32)
        a, b, c, d, e = v * 3 >> 8, v * 9 >> 8, v * 27 >> 8, v * 81 >> 8, v * 243 >> 8
        b3, c3, d3, e3 = b - 3 * a, c - 3 * b, d - 3 * c, e - 3 * d
        return a.to(tl.int8), b3.to(tl.int8), c3.to(tl.int8), d3.to(tl.int8), e3.to(tl.int8)


@triton.jit
def in_order(a, b, c, d):
    """Four planes [R, B] as one tile [R, 4 B] in the order of the features."""
    R: tl.constexpr = a.shape[0]
    B: tl.constexpr = a.shape[1]
    both = tl.join(tl.join(a, c), tl.join(b, d))  # [R, B, 2, 2]; the last two axes are bits 1 and 0 of the plane
    return both.reshape(R, B // 32, 32, 4).permute(0, 1, 3, 2).reshape(R, 4 * B)


@triton.jit
def pair_in_order(a, b):
    """Two planes [R, 32] as one tile [R, 64] in the order of the features."""
    R: tl.constexpr = a.shape[0]
    return tl.join(a, b).permute(0, 2, 1).reshape(R, 64)


@triton.jit
def thirds(w, power):
    """(byte * power) >> 8 for each byte of int32 words."""
    even = (w & 0x00FF00FF) * power
    odd = (w >> 8 & 0x00FF00FF) * power
    return (even >> 8 & 0x00FF00FF) | (odd & ~0x00FF00FF)


@triton.jit
def word_plane(w, p: tl.constexpr, PLANES: tl.constexpr):
    """Plane p of int32 words of packed bytes, as words of four codes."""
    if PLANES == 1:
        return w
    elif PLANES == 4:
        return w >> 2 * p & 0x03030303
    elif p == 0:
        return thirds(w, 3)
    else:
        return thirds(w, 3 ** (p + 1)) - 3 * thirds(w, 3**p)


@triton.jit
def dot4(a, b, acc, ASM: tl.constexpr):
    """acc + the sum of the four products of signed bytes."""
    if ASM:
        return tl.inline_asm_elementwise(_DOT4, "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1)
    else:
        for i in tl.static_range(4):
            acc += (a << 24 - 8 * i >> 24) * (b << 24 - 8 * i >> 24)
        return acc


@triton.jit
def place(m, n, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr):
    """This program's part of K, its tile, and the rows and tokens of that."""
    split = tl.program_id(0) % SPLIT
    tile = tl.program_id(0) // SPLIT
    n_tiles = tl.cdiv(n, BLOCK_N)
    group = tile // (GROUP * n_tiles)
    width = tl.minimum(tl.cdiv(m, BLOCK_M) - group * GROUP, GROUP)
    m_tile = group * GROUP + tile % (GROUP * n_tiles) % width
    n_tile = tile % (GROUP * n_tiles) // width
    rows = n_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tokens = m_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    return split, tile, rows, tokens


@triton.jit
def comes_last(counter, SPLIT: tl.constexpr):
    """Whether the other SPLIT - 1 programs of this tile have stored their parts, as this one has."""
    tl.debug_barrier()  # every thread's stores before the one that counts
    return tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1


def assembly(x: Tensor) -> bool:
    """Whether NVIDIA's assembly can be used; tensors on the CPU are here only in the interpreter."""
    return x.is_cuda and torch.version.hip is None


class PreparedWeight(NamedTuple):
    """A prepacked weight and what belongs to it; scale and bias are contiguous."""

    weight: Tensor  # layout.py, a row a row
    scale: Tensor
    bias: Tensor | None
    n: int
    k: int
    planes: int


def bind(layer: PreparedWeight, run: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor], Tensor]:
    """The layer as a function x [..., K] -> [..., N] in x's dtype; run(x [M, K], y) fills y."""
    device = layer.weight.device

    def linear(x: Tensor) -> Tensor:
        if x.dtype not in FLOATS:  # float64 and exotic ones: the definition computes in float32, too
            return linear(x.float()).to(x.dtype)
        if x.device != device:
            raise ValueError(f"x is on {x.device}, but this layer is on {device}; move one of them")
        y = x.new_empty(*x.shape[:-1], layer.n)
        rows = rows_of(x, layer.k)
        if len(rows):
            run(rows, y)
        return y

    return linear
