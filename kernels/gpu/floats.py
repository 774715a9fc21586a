"""Triton kernels of the packed linear layer when activations stay float, and their launchers.

_float_dot computes codes . x^T on tensor cores: codes become bfloat16 or float16 in registers, exactly, tiles of x stay
  in shared memory, and sums are float32. A scale of the tensor or row is applied to a whole sum, one of a group to that
  group's: in float32 both. So there is one rounding, to x's dtype, at the end, where reference.float_linear rounds the
  product, too, and with groups every weight: this is closer to the exact product.
  |y - exact| <= u |y| + K 2^-22 (sum |x w| + |bias|), with u = 2^-8 for bfloat16, 2^-11 for float16, 2^-24 for float32.
  The second term is that of float32 sums in whatever order, cut off or rounded, as tensor cores have it.
  With few tokens, programs share a tile as in linear._dot; the last to arrive adds their sums up in the order of K, so
  that two runs give the same bits.
_three_bfloat16s splits float32 x into three bfloat16 whose sum it is, exactly: three products on tensor cores, of the
  accuracy of float32 ones, are several times as fast as the latter on plain cores.

Bytes: N B of weights times the number of token tiles, 2 M K (6 M K) times that of row tiles, mostly from L2.

Hardware: run on an H100 (sm_90) and in Triton's interpreter; only compiled for sm_80, sm_100, sm_120 and gfx942.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import size_of_groups
from .configs import Dot, float_heuristic, gpu_of, tiles
from .parts import GROUP, PreparedWeight, assembly, comes_last, float_planes, in_order, pair_in_order, place
from .quantize import rows_of


@triton.jit(do_not_specialize=["m"])
def _three_bfloat16s(x, parts, m, x_stride, parts_stride, K: tl.constexpr, BLOCK: tl.constexpr):
    """A token's leading, middle and last 8 bits, each one M rows after the other. All of Inf or NaN is in the first."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(x + row * x_stride + k, mask=k < K, other=0.0)
    bad = (rest.to(tl.int32, bitcast=True) & 0x7F800000) == 0x7F800000
    for i in tl.static_range(3):
        part = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        if i == 0:
            part = tl.where(bad, rest, part)  # the bits that say NaN may be the last ones
        tl.store(parts + (i * m.to(tl.int64) + row) * parts_stride + k, part.to(tl.bfloat16), mask=k < K)
        rest = tl.where(bad, 0.0, rest - part)


@triton.jit
def _add_product(
    acc, tile, x_at, k, limit, next_part,
    K: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """acc plus a tile of codes times the tokens' features k, those of the last parts of x first."""
    for i in tl.static_range(PARTS):
        at = x_at + ((PARTS - 1 - i) * next_part + k)[None, :]
        if EVEN:
            v = tl.load(at)
        else:
            v = tl.load(at, mask=(k < limit)[None, :], other=0.0)
        acc = tl.dot(tile, v.T, acc)
    return acc


@triton.jit(do_not_specialize=["m"])
def _float_dot(
    x, w, scale, bias, y, partial, counters, chosen, m, n, x_stride,
    K: tl.constexpr, PLANES: tl.constexpr, BYTES: tl.constexpr, SIZE: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_B: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    PER_ROW: tl.constexpr, ASM: tl.constexpr, SHARE: tl.constexpr = 1,
):  # fmt: skip
    """x, of one or three parts, times packed rows w; scales of groups of SIZE where that is not 0.

    chosen: see linear._gemv
    """
    STEP: tl.constexpr = BLOCK_B * PLANES  # features; with groups one of them, 128, or 64 of 4 bits
    STEPS: tl.constexpr = (BYTES + BLOCK_B * SPLIT - 1) // (BLOCK_B * SPLIT)
    EVEN: tl.constexpr = BYTES == BLOCK_B * SPLIT * STEPS and K == BYTES * PLANES
    GROUPS: tl.constexpr = (K + SIZE - 1) // SIZE if SIZE > 0 else 1
    SPACE: tl.constexpr = BLOCK_N * BLOCK_M
    next_part = m.to(tl.int64) * x_stride
    if chosen is not None:
        m = m * 0 + 1
    split, tile, rows, tokens = place(m, n, BLOCK_N, BLOCK_M, SPLIT, GROUP)
    if chosen is not None:
        pair = tl.program_id(1).to(tl.int64)
        layer = tl.load(chosen + pair).to(tl.int64)
        tile += tl.program_id(1) * tl.cdiv(n, BLOCK_N)
        x += pair // SHARE * x_stride
        y += pair * n
        w += layer * n * BYTES
        scale += layer * (n * GROUPS if SIZE > 0 or PER_ROW else 1)
        if bias is not None:
            bias += layer * n
    # rows and tokens beyond the end repeat the last one; they are not stored
    row = tl.minimum(rows, n - 1)
    first = split * STEPS
    b = tl.arange(0, BLOCK_B)
    w_at = w + row[:, None] * BYTES + (first * BLOCK_B + b)[None, :]
    x_at = x + tl.minimum(tokens, m - 1)[:, None] * x_stride + first * STEP
    scale_at = scale + row * GROUPS
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for i in range(STEPS):
        step = first + i
        left = K - step * STEP  # features from here on
        if EVEN:
            packed = tl.load(w_at)
        else:
            packed = tl.load(w_at, mask=(step * BLOCK_B + b)[None, :] < BYTES, other=0)
        planes = float_planes(packed, PLANES, x.dtype.element_ty, ASM)
        if PLANES == 5:
            for p in tl.static_range(5):
                k = b // 32 * 160 + p * 32 + b % 32
                total = _add_product(total, planes[p], x_at, k, left, next_part, K, PARTS, EVEN)
        else:
            if PLANES == 1 or SIZE == 32:  # all of 4 bits
                found = planes
            elif SIZE == 64:
                found = (pair_in_order(planes[0], planes[1]), pair_in_order(planes[2], planes[3]))
            else:
                found = (in_order(planes[0], planes[1], planes[2], planes[3]),)
            if SIZE == 0:
                total = _add_product(total, found[0], x_at, tl.arange(0, STEP), left, next_part, K, PARTS, EVEN)
            else:
                for j in tl.static_range(STEP // SIZE):
                    k = j * SIZE + tl.arange(0, SIZE)
                    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                    acc = _add_product(acc, found[j], x_at, k, left, next_part, K, PARTS, EVEN)
                    # the sum of a group that is not there is 0, whatever it is multiplied with
                    group = tl.minimum(step * (STEP // SIZE) + j, GROUPS - 1)
                    total += acc * tl.load(scale_at + group).to(tl.float32)[:, None]
        w_at += BLOCK_B
        x_at += STEP

    last = True
    if SPLIT > 1:
        slot = tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_M)[None, :] * BLOCK_N
        slot += partial + tile.to(tl.int64) * (SPLIT * SPACE)
        tl.store(slot + split * SPACE, total, mask=tokens[None, :] < m)
        last = comes_last(counters + tile, SPLIT)
        if last:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for i in range(SPLIT):
                total += tl.load(slot + i * SPACE, mask=tokens[None, :] < m, other=0.0, cache_modifier=".cg")
    if last:
        if SIZE == 0 and PER_ROW:
            total *= tl.load(scale + rows, mask=rows < n, other=1.0)[:, None]
        elif SIZE == 0:
            total *= tl.load(scale)
        if bias is not None:
            total += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
        inside = (rows[:, None] < n) & (tokens[None, :] < m)
        tl.store(y + tokens[None, :] * n + rows[:, None], total.to(y.dtype.element_ty), mask=inside)


# Launchers


def bound(layer: PreparedWeight) -> Callable[[Tensor, Tensor], None]:
    """A function that fills y [..., N] with x [M, K] times the layer."""
    gpu, size = gpu_of(layer.weight.device), _size(layer)

    def run(x: Tensor, y: Tensor) -> None:
        parts = 3 if x.dtype == torch.float32 else 1
        multiply(float_heuristic(gpu, len(x), layer.n, layer.k, layer.planes, size, parts), layer, x, y)

    return run


def _size(layer: PreparedWeight) -> int:
    return size_of_groups(layer.k, layer.scale.shape[-1]) if layer.scale.dtype == torch.float16 else 0


def multiply(config: Dot, layer: PreparedWeight, x: Tensor, y: Tensor, chosen: Tensor | None = None) -> None:
    """Fill y [..., N] with x [M, K], floats, times the layer; or y [P, N] with those chosen from a stack."""
    (m, k), n, planes, size = x.shape, layer.n, layer.planes, _size(layer)
    columns, share = (1, 1) if chosen is None else (len(chosen), len(chosen) // m)
    parts = 3 if x.dtype == torch.float32 else 1
    if parts == 3:
        x = three_bfloat16s(x)
    partial, counters, count = None, None, tiles(config, m if chosen is None else 1, n)
    if config.split > 1:
        space = columns * count * config.split * config.block_n * config.block_m
        partial = torch.empty(space, dtype=torch.float32, device=x.device)
        counters = torch.zeros(columns * count, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        _float_dot[count * config.split, columns](
            x, layer.weight, layer.scale, layer.bias, y, partial, counters, chosen, m, n, x.stride(0),
            K=k, PLANES=planes, BYTES=layer.weight.shape[-1], SIZE=size, PARTS=parts, BLOCK_N=config.block_n,
            BLOCK_M=config.block_m, BLOCK_B=config.block_k // min(planes, 4), SPLIT=config.split,
            GROUP=GROUP, PER_ROW=layer.scale[0].numel() > 1 if chosen is not None else layer.scale.numel() > 1,
            ASM=assembly(x), SHARE=share,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
        )  # fmt: skip


def choosing(stack: PreparedWeight) -> Callable[[Tensor, Tensor], Tensor]:
    """linear.choosing for float activations; scale: float32 [E, 1] or [E, N], or float16 [E, N, G]."""
    gpu, size = gpu_of(stack.weight.device), _size(stack)

    def run(x: Tensor, chosen: Tensor) -> Tensor:
        x, parts = rows_of(x, stack.k), 3 if x.dtype == torch.float32 else 1
        y = x.new_empty(len(chosen), stack.n)
        config = float_heuristic(gpu, 1, len(chosen) * stack.n, stack.k, stack.planes, size, parts)
        multiply(config, stack, x, y, chosen)
        return y

    return run


def three_bfloat16s(x: Tensor) -> Tensor:
    """float32 x [M, K] as bfloat16 [3 M, K], whose thirds add up to it; rows begin at multiples of 16 bytes."""
    m, k = x.shape
    parts = torch.empty(3 * m, -(-k // 8) * 8, dtype=torch.bfloat16, device=x.device)
    block = min(triton.next_power_of_2(k), 2048)
    with torch.cuda.device_of(x):
        _three_bfloat16s[m, triton.cdiv(k, block)](x, parts, m, x.stride(0), parts.shape[1], K=k, BLOCK=block)
    return parts[:, :k]
