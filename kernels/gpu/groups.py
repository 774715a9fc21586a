"""Triton kernel of the packed linear layer with a scale for each row and group of features, and its launchers.

_group_dot, for any number of tokens, on tensor cores: linear._dot with accumulators that live for one group. A step is
  a group, or 32 bytes that hold several: 128 features of 2 bits, 64 of 4. The integers of a group become float32, are
  multiplied by its scale and added, every operation rounded by itself (launches pass enable_fp_fusion=False), from
  first to last within a span of 1024 features; then the spans from first to last: reference.group_linear, whose bits it
  has to have.
  Where programs share a tile, each has whole spans and stores one float32 sum a span; the last to arrive adds all of
  them in their order. So the bits do not depend on how many there are.

An accumulator starts at the bits of 1.5 * 2^23, minus the token's sum of codes in the group, since packed codes are
code + 1 (eight times it, where they have 4 bits and are code + 8): what it ends as is, read as a float, 1.5 * 2^23 plus
the wanted sum, exactly, while that is below 2^22. A subtraction makes it a float32, at eight times the rate of a
conversion. Only 16-bit codes in groups of 256, or times weights of 4 bits, can be beyond and are converted. Scales and
sums of the next step are loaded a step ahead.

Bytes: those of linear._dot, and 2 N G of scales. Bound by memory with few tokens; with many by the four operations that
each output takes a group, which for groups of 128 are about as long as the products.

Hardware: run on an H100 (sm_90) and in Triton's interpreter; only compiled for sm_80, sm_100, sm_120 and gfx942.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import SPAN, size_of_groups
from .configs import Dot, gpu_of, group_heuristic, tiles
from .layout import INT8
from .parts import (
    GROUP,
    PreparedWeight,
    assembly,
    comes_last,
    four_bit_planes,
    in_order,
    pair_in_order,
    place,
    two_bit_planes,
)
from .quantize import ROUND, ROUND_BITS, quantize, quantize_4_bits, rows_of


@triton.jit
def _ahead(
    step, sums_at, scale_at, tokens, m, stride,
    GROUPS: tl.constexpr, EACH: tl.constexpr, PLANES: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """What accumulators of a step's groups start at, and the groups' scales; sums of groups are `stride` apart."""
    starts = ()
    scales = ()
    for j in tl.static_range(EACH):
        group = step * EACH + j
        start = tl.zeros([tokens.shape[0]], tl.int32)
        if ROUNDED:
            start += ROUND_BITS
        if PLANES != 1:
            sums = tl.load(sums_at + group.to(tl.int64) * stride, mask=tokens < tl.where(group < GROUPS, m, 0), other=0)
            start -= sums * 8 if PLANES == 2 else sums
        starts = starts + (start,)  # type: ignore[assignment]
        # the sum of a group that is not there is 0, whatever it is multiplied with
        scales = scales + (tl.load(scale_at + tl.minimum(group, GROUPS - 1)),)  # type: ignore[assignment]
    return starts, scales


@triton.jit
def _add_group(
    part, tile, start, scale, group, q_at, low,
    K: tl.constexpr, SIZE: tl.constexpr, LIMBS: tl.constexpr, EVEN: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """part plus a tile [R, SIZE] of a group's codes times the tokens' codes there, times the group's scale."""
    k = group * SIZE + tl.arange(0, SIZE)
    if EVEN:
        codes = tl.load(q_at + k[None, :])
    else:
        codes = tl.load(q_at + k[None, :], mask=k[None, :] < K, other=0)
    acc = tl.broadcast_to(start[None, :], part.shape)
    if LIMBS == 2:
        high = tl.dot(tile, codes.T, out_dtype=tl.int32)
        acc += high << 8
        if EVEN:
            codes = tl.load(q_at + (low + k)[None, :])
        else:
            codes = tl.load(q_at + (low + k)[None, :], mask=k[None, :] < K, other=0)
    acc = tl.dot(tile, codes.T, acc, out_dtype=tl.int32)
    if ROUNDED:
        value = acc.to(tl.float32, bitcast=True) - ROUND
    else:
        value = acc.to(tl.float32)
    return part + value * scale.to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["m"])
def _group_dot(
    q, s, sums, w, scale, bias, y, partial, counters, chosen, m, n, q_stride,
    K: tl.constexpr, PLANES: tl.constexpr, BYTES: tl.constexpr, SIZE: tl.constexpr, SPAN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, LIMBS: tl.constexpr,
    ASM: tl.constexpr, EXPERTS: tl.constexpr = 1,
):  # fmt: skip
    """Codes q times packed rows w with scales of groups; sums [G, M] of codes. See the top of this file.

    chosen: see linear._gemv; EXPERTS of them have a token in common
    """
    STEP: tl.constexpr = SIZE if PLANES == 1 or SIZE > 128 else 32 * PLANES
    BLOCK_B: tl.constexpr = STEP // PLANES
    EACH: tl.constexpr = STEP // SIZE  # groups
    TURN: tl.constexpr = SPAN // STEP
    SPANS: tl.constexpr = (K + SPAN - 1) // SPAN
    SHARE: tl.constexpr = (SPANS + SPLIT - 1) // SPLIT  # spans a program
    EVEN: tl.constexpr = K % STEP == 0 and BYTES * PLANES == K
    GROUPS: tl.constexpr = (K + SIZE - 1) // SIZE
    ROUNDED: tl.constexpr = LIMBS == 1 or (SIZE < 256 and PLANES != 2)
    SPACE: tl.constexpr = BLOCK_N * BLOCK_M
    stride = m
    low = m.to(tl.int64) * q_stride
    if chosen is not None:
        m = m * 0 + 1
    split, tile, rows, tokens = place(m, n, BLOCK_N, BLOCK_M, SPLIT, GROUP)
    if chosen is not None:
        pair = tl.program_id(1).to(tl.int64)
        layer = tl.load(chosen + pair).to(tl.int64)
        tile += tl.program_id(1) * tl.cdiv(n, BLOCK_N)
        q += pair // EXPERTS * q_stride
        s += pair // EXPERTS
        if PLANES != 1:
            sums += pair // EXPERTS
        y += pair * n
        w += layer * n * BYTES
        scale += layer * n * GROUPS
        if bias is not None:
            bias += layer * n

    # rows and tokens beyond the end repeat the last one; they are not stored
    row = tl.minimum(rows, n - 1)
    token = tl.minimum(tokens, m - 1)
    first = split * SHARE * TURN
    steps = tl.minimum((K + STEP - 1) // STEP - first, SHARE * TURN)
    b = tl.arange(0, BLOCK_B)
    w_at = w + row[:, None] * BYTES + (first * BLOCK_B + b)[None, :]
    q_at = q + token[:, None] * q_stride
    scale_at = scale + row * GROUPS
    if PLANES == 1:
        sums_at = q  # of no use
    else:
        sums_at = sums + token
    slot = tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_M)[None, :] * BLOCK_N
    if SPLIT > 1:
        slot += partial + tile.to(tl.int64) * (SPANS * SPACE)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    starts, scales = _ahead(first, sums_at, scale_at, tokens, m, stride, GROUPS, EACH, PLANES, ROUNDED)
    for i in range(steps):
        step = first + i
        next_starts, next_scales = _ahead(step + 1, sums_at, scale_at, tokens, m, stride, GROUPS, EACH, PLANES, ROUNDED)
        if EVEN:
            packed = tl.load(w_at)
        else:
            packed = tl.load(w_at, mask=(step * BLOCK_B + b)[None, :] < BYTES, other=0)
        if PLANES == 4:
            one, two, three, four = two_bit_planes(packed, ASM)
            if SIZE == 32:
                found = (one, two, three, four)
            elif SIZE == 64:
                found = (pair_in_order(one, two), pair_in_order(three, four))  # type: ignore[assignment]
            else:
                found = (in_order(one, two, three, four),)  # type: ignore[assignment]
        elif PLANES == 2:
            found = four_bit_planes(packed, ASM)
        else:
            found = (packed,)  # type: ignore[assignment]
        for j in tl.static_range(EACH):
            part = _add_group(
                part, found[j], starts[j], scales[j], step * EACH + j, q_at, low, K, SIZE, LIMBS, EVEN, ROUNDED
            )
        starts, scales = next_starts, next_scales
        w_at += BLOCK_B
        if SHARE > 1:
            if (i + 1) % TURN == 0:
                if SPLIT > 1:
                    tl.store(slot + step // TURN * SPACE, part, mask=tokens[None, :] < m)
                else:
                    total += part
                part = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)

    last = True
    if SPLIT > 1:
        if steps > (0 if SHARE == 1 else steps // TURN * TURN):  # a span is still to be stored
            tl.store(slot + (split * SHARE + (steps - 1) // TURN) * SPACE, part, mask=tokens[None, :] < m)
        last = comes_last(counters + tile, SPLIT)
        if last:
            for span in range(SPANS):
                total += tl.load(slot + span * SPACE, mask=tokens[None, :] < m, other=0.0, cache_modifier=".cg")
    else:
        total += part
    if last:
        v = total * tl.div_rn(1.0, tl.load(s + tokens, mask=tokens < m, other=1.0))[None, :]
        if bias is not None:
            v += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
        inside = (rows[:, None] < n) & (tokens[None, :] < m)
        tl.store(y + tokens[None, :] * n + rows[:, None], v.to(y.dtype.element_ty), mask=inside)


# Launchers


def bound(layer: PreparedWeight, activation_bits: int) -> Callable[[Tensor, Tensor], None]:
    """A function that fills y [..., N] with x [M, K] times the layer, with activations of 16, 8 or 4 bits."""
    gpu, limbs = gpu_of(layer.weight.device), 2 if activation_bits == 16 else 1
    size = size_of_groups(layer.k, layer.scale.shape[1])

    def run(x: Tensor, y: Tensor) -> None:
        s = None
        if activation_bits == 4:
            x, s = quantize_4_bits(x)
        multiply(group_heuristic(gpu, len(x), layer.n, layer.k, layer.planes, size, limbs), layer, x, s, y, limbs)

    return run


def choosing(stack: PreparedWeight, activation_bits: int) -> Callable[[Tensor, Tensor], Tensor]:
    """linear.choosing for scales of groups, float16 [E, N, G]."""
    gpu, limbs = gpu_of(stack.weight.device), 2 if activation_bits == 16 else 1
    size = size_of_groups(stack.k, stack.scale.shape[-1])

    def run(x: Tensor, chosen: Tensor) -> Tensor:
        x = rows_of(x, stack.k)
        y = x.new_empty(len(chosen), stack.n)
        config = group_heuristic(gpu, 1, len(chosen) * stack.n, stack.k, stack.planes, size, limbs)
        multiply(config, stack, x, None, y, limbs, chosen)
        return y

    return run


def multiply(
    config: Dot,
    layer: PreparedWeight,
    x: Tensor,
    s: Tensor | None,
    y: Tensor,
    limbs: int = 1,
    chosen: Tensor | None = None,
) -> None:
    """Fill y [..., N] with x [M, K] times the layer. x: floats to be quantized, or codes with their s.

    limbs: 2 for codes of 16 bits; chosen: of a stack of layers, those that fill y [P, N]
    """
    (m, k), n, packed = x.shape, layer.n, layer.planes != INT8
    size = size_of_groups(k, layer.scale.shape[-1])
    columns, share = (1, 1) if chosen is None else (len(chosen), len(chosen) // m)
    spans, counters, count = None, None, tiles(config, m if chosen is None else 1, n)
    if config.split > 1:
        each = -(-k // SPAN) * config.block_n * config.block_m
        spans = torch.empty(columns * count * each, dtype=torch.float32, device=x.device)
        counters = torch.empty(columns * count, dtype=torch.int32, device=x.device)
    sums = None
    if s is None or packed or counters is not None or limbs > 1:
        x, own_s, sums = quantize(x, packed, counters, aligned=True, limbs=limbs, size=size)
        s = s if own_s is None else own_s
    with torch.cuda.device_of(x):
        _group_dot[count * config.split, columns](
            x, s, sums, layer.weight, layer.scale, layer.bias, y, spans, counters, chosen, m, n, x.stride(0),
            K=k, PLANES=layer.planes, BYTES=layer.weight.shape[-1], SIZE=size, SPAN=SPAN,
            BLOCK_N=config.block_n, BLOCK_M=config.block_m, SPLIT=config.split, GROUP=GROUP, LIMBS=limbs,
            ASM=assembly(x), EXPERTS=share, num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
        )  # fmt: skip


def int_linear(q: Tensor, s: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """reference.group_linear in one kernel: [M, N]. codes: int8 [N, K], not prepacked."""
    (m, k), n = q.shape, len(codes)
    y = torch.empty(m, n, dtype=dtype, device=q.device)
    if m:
        size, limbs = size_of_groups(k, scale.shape[1]), 2 if q.dtype == torch.int16 else 1
        config = group_heuristic(gpu_of(q.device), m, n, k, INT8, size, limbs)
        bias = None if bias is None else bias.contiguous()
        layer = PreparedWeight(codes.contiguous(), scale.contiguous(), bias, n, k, INT8)
        multiply(config, layer, q.contiguous(), s.contiguous(), y, limbs)
    return y
