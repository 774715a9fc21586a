"""Triton kernels around the integer product: activations to codes and back, latent weights to ternary codes.

One program a row. Bytes moved for M x K values of b bytes: the quantizer reads M K b (its second look at a row finds
it in a cache) and writes M K; magnitudes read N K b; weight codes read N K b and write N K; dequantize reads M K and
writes M K b.

Exactness: the formulas are reference.py's, one correctly rounded float32 operation each, and every launch passes
enable_fp_fusion=False, so products and sums stay apart. The largest |x| is found on the bit patterns, where NaN is
above Inf and Inf above all numbers, so that both reach the scale as they do in the reference. Four-bit codes come from
the reference. An RMSNorm is not fused, because it would not have the bits of torch's.

Hardware: run on an H100 (sm_90) and in Triton's interpreter; only compiled for sm_80, sm_100, sm_120 and gfx942.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_EPS = tl.constexpr(1e-5)  # reference.EPS
_SQRT_7 = tl.constexpr(7**0.5)
TOP_8 = tl.constexpr(127.0)
TOP_16 = tl.constexpr(32639.0)  # reference.MAX_16
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: a sum with it has no fraction bits, so it is rounded half to even
ROUND_BITS = tl.constexpr(0x4B400000)  # its bit pattern, which from there on counts whole numbers


@triton.jit
def largest_bits(x):
    """|x| as an integer: the order of these is that of the values, NaN above all."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def activation_scale(bits, TOP: tl.constexpr):
    """s = TOP / max|x| from the bit pattern of max|x|."""
    size = bits.to(tl.float32, bitcast=True)
    return tl.div_rn(1.0, tl.where(size < _EPS, _EPS, size)) * TOP  # a maximum could lose NaN


@triton.jit
def activation_codes(x, s):
    """round(x s) as int32, and 0 in a token with NaN or Inf, whose s is NaN or 0. |x s| rounds to TOP at most."""
    codes = (x.to(tl.float32) * s + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS
    return tl.where(s > 0, codes, 0)


@triton.jit
def limb(codes, i: tl.constexpr, LIMBS: tl.constexpr):
    """reference.limbs, the high one first; the codes themselves where they have one limb."""
    if LIMBS == 1:
        return codes
    else:
        high = (codes + 128) >> 8
        if i == 0:
            return high
        else:
            return codes - (high << 8)


@triton.jit
def _store_codes(codes, q, sums, k, m, q_stride, K: tl.constexpr, SIZE: tl.constexpr, LIMBS: tl.constexpr):
    """A block of a token's codes, one limb M rows after the other, and their sums over groups of SIZE."""
    for i in tl.static_range(LIMBS):
        tl.store(q + i * m.to(tl.int64) * q_stride + k, limb(codes, i, LIMBS).to(q.dtype.element_ty), mask=k < K)
    if SIZE > 0:
        groups = tl.min(k, 0) // SIZE + tl.arange(0, k.shape[0] // SIZE)
        total = tl.sum(codes.reshape(k.shape[0] // SIZE, SIZE), 1)
        tl.store(sums + groups.to(tl.int64) * m, total, mask=groups * SIZE < K)


@triton.jit(do_not_specialize=["m"])
def _quantize(
    x, q, s, sums, counters, m, x_stride, q_stride, COUNTERS: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
    SIZE: tl.constexpr, LIMBS: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """A token's codes, their sum (one each SIZE features where that is not 0), and s; without s, x holds codes already.

    The first program zeroes the counters.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x += row * x_stride
    q += row * q_stride
    total = tl.zeros([BLOCK], tl.int32)
    if s is None:
        for start in range(0, K, BLOCK):
            k = start + columns
            codes = tl.load(x + k, mask=k < K, other=0).to(tl.int32)
            _store_codes(codes, q, None if SIZE == 0 else sums + row, k, m, q_stride, K, SIZE, LIMBS)
            total += codes
    else:
        bits = tl.zeros([BLOCK], tl.int32)
        for start in range(0, K, BLOCK):
            k = start + columns
            bits = tl.maximum(bits, largest_bits(tl.load(x + k, mask=k < K, other=0.0)))
        scale = activation_scale(tl.max(bits, 0), TOP)
        tl.store(s + row, scale)
        for start in range(0, K, BLOCK):
            k = start + columns
            codes = activation_codes(tl.load(x + k, mask=k < K, other=0.0), scale)
            _store_codes(codes, q, None if SIZE == 0 else sums + row, k, m, q_stride, K, SIZE, LIMBS)
            total += codes
    if sums is not None and SIZE == 0:
        tl.store(sums + row, tl.sum(total, 0))
    if COUNTERS > 0:
        if row == 0:
            for start in range(0, COUNTERS, BLOCK):
                tl.store(counters + start + columns, 0, mask=start + columns < COUNTERS)


@triton.jit
def _quantize_4_bits(x, q, s, x_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    """A token's 4-bit codes and its s = sqrt(7) / mean|x|, the mean summed in float64."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        total += tl.abs(tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)).to(tl.float64)
    mean = (tl.sum(total, 0) / K).to(tl.float32)
    scale = tl.div_rn(1.0, tl.where(mean < _EPS, _EPS, mean)) * _SQRT_7
    tl.store(s + row, scale)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        v = tl.load(x + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32) * scale
        v = tl.where(v < -8.0, -8.0, tl.where(v > 7.0, 7.0, v))  # clamped before it is rounded: the bounds are integers
        codes = tl.where(scale > 0, (v + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS, 0)
        tl.store(q + row * K + k, codes.to(tl.int8), mask=k < K)


@triton.jit
def _magnitudes(w, sums, w_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    """A row's sum of |w|, in float64."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        total += tl.abs(tl.load(w + row * w_stride + k, mask=k < K, other=0.0).to(tl.float32)).to(tl.float64)
    tl.store(sums + row, tl.sum(total, 0))


@triton.jit
def _ternary_codes(w, inv, codes, w_stride, K: tl.constexpr, BLOCK: tl.constexpr, PER_ROW: tl.constexpr):
    """A row's clamp(round(w inv), -1, 1): half to even, so exactly those beyond 1/2 are not 0."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(inv + row * PER_ROW)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        v = tl.load(w + row * w_stride + k, mask=k < K, other=0.0).to(tl.float32) * scale
        tl.store(codes + row * K + k, (v > 0.5).to(tl.int8) - (v < -0.5).to(tl.int8), mask=k < K)


@triton.jit
def _dequantize(q, s, x, K: tl.constexpr, BLOCK: tl.constexpr):
    """A token's q / s."""
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(s + row)
    for start in range(0, K, BLOCK):
        k = start + tl.arange(0, BLOCK)
        v = tl.div_rn(tl.load(q + row * K + k, mask=k < K, other=0).to(tl.float32), scale)
        tl.store(x + row * K + k, v.to(x.dtype.element_ty), mask=k < K)


def _block(k: int) -> int:
    """Values a program works on at a time: 32 a thread."""
    return min(triton.next_power_of_2(k), 4096)


def quantize(
    x: Tensor,
    sums: bool = False,
    counters: Tensor | None = None,
    aligned: bool = False,
    limbs: int = 1,
    size: int = 0,
    dtype: torch.dtype = torch.int8,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """reference.quantize_activation with 8 or 16 bits, of x [M, K] floating: codes [M, K], s float32 [M, 1].

    x:        with stride 1 along K; integer x are codes already: they are copied, and s is None
    sums:     return a token's sum of codes, too, int32 [M]; with a size [G, M], that of each group of as many features
    counters: int32, set to zero by the way, for a kernel that follows
    aligned:  the codes' rows begin at multiples of 16 bytes; the tensor is then a view of a larger one
    limbs:    2 for 16 bits in two int8 limbs, codes [2 M, K]: all high ones, then all low ones
    dtype:    int16 for 16 bits in one
    """
    m, k = x.shape
    q = torch.empty(limbs * m, -(-k // 16) * 16 if aligned else k, dtype=dtype, device=x.device)
    s = torch.empty(m, 1, dtype=torch.float32, device=x.device) if x.is_floating_point() else None
    groups = -(-k // size) if size else 1
    total = torch.empty(groups * m, dtype=torch.int32, device=x.device) if sums else None
    if m:
        with torch.cuda.device_of(x):
            _quantize[m,](
                x, q, s, total, counters, m, x.stride(0), q.shape[1],
                COUNTERS=0 if counters is None else counters.numel(), K=k, BLOCK=max(_block(k), size),
                SIZE=size if sums else 0, LIMBS=limbs,
                TOP=(TOP_16 if limbs == 2 or dtype == torch.int16 else TOP_8).value, enable_fp_fusion=False,
            )  # fmt: skip
    return q[:, :k], s, total


def quantize_activation(x: Tensor, activation_bits: int = 8) -> tuple[Tensor, Tensor]:
    """reference.quantize_activation, of any shape and strides."""
    rows = rows_of(x, x.shape[-1])
    if activation_bits == 4:
        q, s = quantize_4_bits(rows)
    else:
        q, s, _ = quantize(rows, dtype=torch.int16 if activation_bits == 16 else torch.int8)  # type: ignore[assignment]
    assert s is not None
    return q.reshape(x.shape), s.reshape(*x.shape[:-1], 1)


def quantize_4_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """reference.quantize_activation(x, 4) of x [M, K] floating, with stride 1 along K."""
    m, k = x.shape
    q = torch.empty(m, k, dtype=torch.int8, device=x.device)
    s = torch.empty(m, 1, dtype=torch.float32, device=x.device)
    if m:
        with torch.cuda.device_of(x):
            _quantize_4_bits[m,](x, q, s, x.stride(0), K=k, BLOCK=_block(k), enable_fp_fusion=False)
    return q, s


def rows_of(x: Tensor, k: int) -> Tensor:
    """x [..., K] as [M, K] with stride 1 along K, copied only if it must be."""
    x = x.reshape(-1, k)
    return x if x.stride(1) == 1 or k == 1 else x.contiguous()


def magnitudes(weight: Tensor) -> Tensor:
    """The sum of |W| over each row, float64 [N], in an order that depends on nothing but K. Waits for nothing."""
    weight = rows_of(weight, weight.shape[1])
    n, k = weight.shape
    sums = torch.empty(n, dtype=torch.float64, device=weight.device)
    with torch.cuda.device_of(weight):
        _magnitudes[n,](weight, sums, weight.stride(0), K=k, BLOCK=_block(k))
    return sums


def ternary_codes(weight: Tensor, inv: Tensor) -> Tensor:
    """clamp(round(weight * inv), -1, 1) as int8 [N, K]; inv: float32 [1, 1] or [N, 1]. Waits for nothing."""
    weight = rows_of(weight, weight.shape[1])
    n, k = weight.shape
    codes = torch.empty(n, k, dtype=torch.int8, device=weight.device)
    with torch.cuda.device_of(weight):
        _ternary_codes[n,](
            weight, inv, codes, weight.stride(0), K=k, BLOCK=_block(k), PER_ROW=inv.numel() > 1, enable_fp_fusion=False
        )
    return codes


def dequantize(q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """(q / s).to(dtype) of contiguous codes int8 [M, K] and s float32 [M, 1]."""
    m, k = q.shape
    x = torch.empty(m, k, dtype=dtype, device=q.device)
    if m:
        with torch.cuda.device_of(q):
            _dequantize[m,](q, s, x, K=k, BLOCK=_block(k), enable_fp_fusion=False)
    return x
