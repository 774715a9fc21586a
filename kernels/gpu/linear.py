"""Triton kernels of the packed linear layer, y = (q . codes) * (scale / s) + bias, and their launchers.

_gemv, for a token or two. A program takes block_n x repeat whole rows of packed weights; a thread's 16-byte load is 64
  weights of one row, rows of a tile are spread over registers. The program quantizes the tokens itself (every program
  does: cheaper than a kernel before it) and keeps their codes in registers, so that a weight costs 0.44 instructions of
  unpacking (a shift and a mask a word and plane, for 16 weights) and 0.25 of dp4a. Bytes: N B of weights, and 2 K a
  program from L2. Of a mixture's few tokens it takes each with the experts that a tensor says, all in one launch.
_dot, for any number of tokens, on tensor cores. It computes codes . q^T: as first operand the weights go from shared
  memory through registers, where they are unpacked, into the matrix instruction; tiles of q stay in shared memory. The
  planes' order in memory makes that a thread's own affair: no layout conversion inside the loop. Bytes: N B times the
  number of token tiles, M K times the number of row tiles, mostly from L2.
  With few tokens, split > 1 programs share a tile: each stores its int32 sums, the last to arrive (a counter a tile,
  which the quantizer has set to zero in the kernel before) adds them up and finishes. Integers: the order is no matter,
  two runs give the same bits. All scratch memory is the call's own, so streams and CUDA graphs need no care.
_unpack, for thousands of tokens where a configuration says so: int8 codes once, then _dot on those.

Zero points: packed codes are code + 1, so the token's sum of codes is subtracted from each accumulator.
One body serves all layouts (PLANES, see layout.py) and all hardware: ASM chooses assembly (parts.py), for NVIDIA, or
the same in Triton, for AMD and the interpreter, which knows no assembly. Codes of 16 bits are two int8 limbs (LIMBS)
with products and accumulators of their own: 256 times the high ones and the low ones add up to the integer.

Hardware: run on an H100 and an H200 (sm_90) and in Triton's interpreter; only compiled for sm_80, sm_100, sm_120 and
gfx942. With layers chosen from a stack, only compiled for sm_90 and interpreted.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config, Dot, Gemv, choose, counters_of, gpu_of, heuristic, tiles, workspace_of
from .layout import INT8
from .parts import (
    GROUP,
    PreparedWeight,
    assembly,
    base3_planes,
    comes_last,
    dot4,
    in_order,
    place,
    two_bit_planes,
    word_plane,
)
from .quantize import (
    TOP_8,
    TOP_16,
    activation_codes,
    activation_scale,
    largest_bits,
    limb,
    quantize,
    quantize_4_bits,
    rows_of,
)


@triton.jit(do_not_specialize=["m"])
def _gemv(
    x, s, w, scale, bias, y, chosen, m, n, x_stride,
    K: tl.constexpr, PLANES: tl.constexpr, BYTES: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr,
    REPEAT: tl.constexpr, BLOCK_W: tl.constexpr, PER_ROW: tl.constexpr, LIMBS: tl.constexpr, ASM: tl.constexpr,
    SHARE: tl.constexpr = 1,
):  # fmt: skip
    """m <= TOKENS tokens of floats, or of codes where there is s; w: int32 words. See the top of this file.

    chosen: of a stack of layers, which one each column of programs takes; SHARE of them have a token in common
    """
    if chosen is not None:
        pair = tl.program_id(1).to(tl.int64)
        layer = tl.load(chosen + pair).to(tl.int64)
        x += pair // SHARE * x_stride
        y += pair * n
        w += layer * n * (BYTES // 4)
        scale += layer * (n if PER_ROW else 1)
        if bias is not None:
            bias += layer * n
    words = tl.arange(0, BLOCK_W)
    inside = (words < BYTES // 4)[None, :]
    k = (words // 8 * (32 * PLANES) + words % 8 * 4)[:, None] + tl.arange(0, 4)[None, :]  # of plane 0
    rows = tl.program_id(0).to(tl.int64) * (BLOCK_N * REPEAT) + tl.arange(0, BLOCK_N)
    # rows and tokens beyond the end repeat the last one; they are not stored
    ahead = tl.load(w + tl.minimum(rows, n - 1)[:, None] * (BYTES // 4) + words[None, :], mask=inside, other=0)
    codes = ()
    scales = ()
    sums = ()
    for t in tl.static_range(TOKENS):
        token = tl.minimum(t, m - 1).to(tl.int64)
        if s is None:
            bits = tl.zeros([BLOCK_W, 4], tl.int32)
            for p in tl.static_range(PLANES):
                v = tl.load(x + token * x_stride + k + 32 * p, mask=k + 32 * p < K, other=0.0)
                bits = tl.maximum(bits, largest_bits(v))
            token_s = activation_scale(tl.max(tl.max(bits, 1), 0), TOP_8 if LIMBS == 1 else TOP_16)
        else:
            token_s = tl.load(s + token)
        total = tl.zeros([BLOCK_W, 4], tl.int32)
        for p in tl.static_range(PLANES):
            q = tl.load(x + token * x_stride + k + 32 * p, mask=k + 32 * p < K, other=0)
            if s is None:
                q = activation_codes(q, token_s)
            q = q.to(tl.int32)
            total += q
            for i in tl.static_range(LIMBS):
                byte = limb(q, i, LIMBS) & 255
                codes = codes + (tl.sum(byte << (8 * tl.arange(0, 4))[None, :], 1),)  # type: ignore[assignment]
        scales = scales + (token_s,)  # type: ignore[assignment]
        sums = sums + (tl.sum(tl.sum(total, 1), 0),)  # type: ignore[assignment]
    for turn in tl.static_range(REPEAT):
        packed = ahead
        following = rows + BLOCK_N
        if turn + 1 < REPEAT:
            ahead = tl.load(
                w + tl.minimum(following, n - 1)[:, None] * (BYTES // 4) + words[None, :], mask=inside, other=0
            )
        if PER_ROW:
            row_scale = tl.load(scale + rows, mask=rows < n, other=1.0)
        else:
            row_scale = tl.load(scale)
        for t in tl.static_range(TOKENS):
            acc = tl.zeros([BLOCK_N, BLOCK_W], tl.int32)
            for i in tl.static_range(LIMBS):
                acc = acc << 8 * i
                for p in tl.static_range(PLANES):
                    plane = word_plane(packed, p, PLANES)
                    acc = dot4(plane, codes[(t * PLANES + p) * LIMBS + i][None, :], acc, ASM)
            sum_of_row = tl.sum(acc, 1)
            if PLANES != 1:
                sum_of_row -= sums[t]
            v = sum_of_row.to(tl.float32) * tl.div_rn(row_scale, scales[t])
            if bias is not None:
                v += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)
            tl.store(y + t * n + rows, v.to(y.dtype.element_ty), mask=rows < tl.where(m > t, n, 0))
        rows = following


@triton.jit(do_not_specialize=["m"])
def _dot(
    q, s, sums, w, scale, bias, y, partial, counters, m, n, q_stride,
    K: tl.constexpr, PLANES: tl.constexpr, BYTES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_B: tl.constexpr, SPLIT: tl.constexpr, GROUP: tl.constexpr, PER_ROW: tl.constexpr, LIMBS: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Codes q times packed rows w; without s the accumulators themselves. See the top of this file.

    The low limbs of codes that have two follow all high ones, and have accumulators of their own.
    """
    STEPS: tl.constexpr = (BYTES + BLOCK_B * SPLIT - 1) // (BLOCK_B * SPLIT)
    EVEN: tl.constexpr = BYTES == BLOCK_B * SPLIT * STEPS and K == BYTES * PLANES
    split, tile, rows, tokens = place(m, n, BLOCK_N, BLOCK_M, SPLIT, GROUP)
    # rows and tokens beyond the end repeat the last one; they are not stored
    first = split * STEPS * BLOCK_B
    b = tl.arange(0, BLOCK_B)
    w_at = w + tl.minimum(rows, n - 1)[:, None] * BYTES + (first + b)[None, :]
    q_at = q + tl.minimum(tokens, m - 1)[:, None] * q_stride + first * PLANES
    low = m.to(tl.int64) * q_stride
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    low_acc = acc
    for step in range(STEPS):
        byte = first + step * BLOCK_B
        if EVEN:
            packed = tl.load(w_at)
        else:
            packed = tl.load(w_at, mask=(byte + b)[None, :] < BYTES, other=0)
        if PLANES == 5:  # no power of two: a product for each plane
            planes = base3_planes(packed, ASM)
            for p in tl.static_range(5):
                k = b // 32 * 160 + p * 32 + b % 32
                codes = tl.load(q_at + k[None, :], mask=(byte * 5 + k)[None, :] < K, other=0)
                acc = tl.dot(planes[p], codes.T, acc, out_dtype=tl.int32)
                if LIMBS == 2:
                    codes = tl.load(q_at + (low + k)[None, :], mask=(byte * 5 + k)[None, :] < K, other=0)
                    low_acc = tl.dot(planes[p], codes.T, low_acc, out_dtype=tl.int32)
        else:
            k = tl.arange(0, BLOCK_B * PLANES)
            if EVEN:
                codes = tl.load(q_at + k[None, :])
            else:
                codes = tl.load(q_at + k[None, :], mask=(byte * PLANES + k)[None, :] < K, other=0)
            if PLANES == 4:
                first_plane, second, third, fourth = two_bit_planes(packed, ASM)
                packed = in_order(first_plane, second, third, fourth)
            acc = tl.dot(packed, codes.T, acc, out_dtype=tl.int32)
            if LIMBS == 2:
                if EVEN:
                    codes = tl.load(q_at + (low + k)[None, :])
                else:
                    codes = tl.load(q_at + (low + k)[None, :], mask=(byte * PLANES + k)[None, :] < K, other=0)
                low_acc = tl.dot(packed, codes.T, low_acc, out_dtype=tl.int32)
        w_at += BLOCK_B
        q_at += BLOCK_B * PLANES
    if LIMBS == 2:
        acc = (acc << 8) + low_acc

    last = True
    if SPLIT > 1:
        SIZE: tl.constexpr = BLOCK_N * BLOCK_M
        part = tl.arange(0, BLOCK_N)[:, None] + tl.arange(0, BLOCK_M)[None, :] * BLOCK_N
        part += partial + tile.to(tl.int64) * (SPLIT * SIZE)
        tl.store(part + split * SIZE, acc)
        last = comes_last(counters + tile, SPLIT)
        if last:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
            for i in range(SPLIT):
                acc += tl.load(part + i * SIZE, cache_modifier=".cg")
    if last:
        inside = (rows[:, None] < n) & (tokens[None, :] < m)
        y_at = y + tokens[None, :] * n + rows[:, None]
        if PLANES != 1:
            acc -= tl.load(sums + tokens, mask=tokens < m, other=0)[None, :]
        if s is None:
            tl.store(y_at, acc, mask=inside)
        else:
            token_s = tl.load(s + tokens, mask=tokens < m, other=1.0)[None, :]
            if PER_ROW:
                factor = tl.div_rn(tl.load(scale + rows, mask=rows < n, other=1.0)[:, None], token_s)
            else:
                factor = tl.div_rn(tl.load(scale), token_s)
            v = acc.to(tl.float32) * factor
            if bias is not None:
                v += tl.load(bias + rows, mask=rows < n, other=0.0).to(tl.float32)[:, None]
            tl.store(y_at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _unpack(
    w, codes, n, K: tl.constexpr, PLANES: tl.constexpr, BYTES: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Packed rows to codes int8 [N, K]."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    b = tl.program_id(1) * BLOCK_B + tl.arange(0, BLOCK_B)[None, :]
    packed = tl.load(w + rows * BYTES + b, mask=(rows < n) & (b < BYTES), other=0)
    if PLANES == 4:
        planes = two_bit_planes(packed, ASM)
    else:
        planes = base3_planes(packed, ASM)
    for p in tl.static_range(PLANES):
        k = b // 32 * (32 * PLANES) + 32 * p + b % 32
        tl.store(codes + rows * K + k, planes[p] - 1, mask=(rows < n) & (k < K))


# Launchers


def bound(layer: PreparedWeight, activation_bits: int) -> Callable[[Tensor, Tensor], None]:
    """A function that fills y [..., N] with x [M, K] times the layer, with activations of 16, 8 or 4 bits."""
    gpu, per_row, limbs = gpu_of(layer.weight.device), layer.scale.numel() > 1, 2 if activation_bits == 16 else 1

    def run(x: Tensor, y: Tensor) -> None:
        s = None
        if activation_bits == 4:
            x, s = quantize_4_bits(x)
        multiply(choose(gpu, len(x), layer.n, layer.k, layer.planes, per_row, limbs), layer, x, s, y, limbs)

    return run


def multiply(config: Config, layer: PreparedWeight, x: Tensor, s: Tensor | None, y: Tensor, limbs: int = 1) -> None:
    """Fill y [..., N] with x [M, K] times the layer. x: floats to be quantized, or codes with their s.

    limbs: 2 for codes of 16 bits
    """
    if isinstance(config, Gemv):
        _launch_gemv(config, layer, x, s, y, limbs)
        return
    if config.dense and layer.planes != INT8:
        layer = layer._replace(weight=unpack(layer), planes=INT8)
    workspace = workspace_of(config, len(x), layer.n, x.device)
    if s is None or layer.planes != INT8 or workspace is not None or limbs > 1:
        x, own_s, sums = quantize(x, layer.planes != INT8, counters_of(config, workspace), aligned=True, limbs=limbs)
        s = s if own_s is None else own_s
    else:
        sums = None
    _launch_dot(config, layer, x, s, sums, y, workspace, limbs)


def int_matmul(q: Tensor, weight: Tensor, n: int, planes: int, config: Dot) -> Tensor:
    """reference.int_matmul of codes q int8 [M, K] and prepacked ones, on tensor cores: int32 [M, N]."""
    y = torch.empty(len(q), n, dtype=torch.int32, device=q.device)
    layer = PreparedWeight(weight, torch.empty(1, device=q.device), None, n, q.shape[1], planes)
    if len(q):
        workspace = workspace_of(config, len(q), n, q.device)
        q, _, sums = quantize(q, True, counters_of(config, workspace), aligned=True)
        _launch_dot(config, layer, q, None, sums, y, workspace)
    return y


def int_linear(
    q: Tensor, s: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """reference.rescale(reference.int_matmul(q, codes), s, scale, bias, dtype) in one kernel: [M, N].

    q: int8 or int16 [M, K]; codes: int8 [N, K], not prepacked; s: float32 [M, 1]; scale: float32 [1] or [N];
    bias: [N] or None
    """
    y = torch.empty(len(q), len(codes), dtype=dtype, device=q.device)
    if len(q):
        n, k = codes.shape
        bias = None if bias is None else bias.contiguous()
        layer = PreparedWeight(codes.contiguous(), scale.contiguous(), bias, n, k, INT8)
        m, limbs = max(len(q), 256), 2 if q.dtype == torch.int16 else 1  # never split: nobody has zeroed counters
        config = choose(gpu_of(q.device), m, n, k, INT8, scale.numel() > 1, limbs)
        multiply(config, layer, q.contiguous(), s.contiguous(), y, limbs)
    return y


def unpack(layer: PreparedWeight) -> Tensor:
    """The codes of a packed layer, int8 [N, K], in one pass."""
    codes = torch.empty(layer.n, layer.k, dtype=torch.int8, device=layer.weight.device)
    size = layer.weight.shape[1]
    with torch.cuda.device_of(codes):
        _unpack[triton.cdiv(layer.n, 16), triton.cdiv(size, 128)](
            layer.weight, codes, layer.n, K=layer.k, PLANES=layer.planes, BYTES=size,
            BLOCK_N=16, BLOCK_B=128, ASM=assembly(codes),
        )  # fmt: skip
    return codes


def _launch_gemv(
    config: Gemv,
    layer: PreparedWeight,
    x: Tensor,
    s: Tensor | None,
    y: Tensor,
    limbs: int = 1,
    chosen: Tensor | None = None,
) -> None:
    words, scale = layer.weight.shape[-1] // 4, layer.scale
    m, columns, share = (len(x), 1, 1) if chosen is None else (1, len(chosen), len(chosen) // len(x))
    with torch.cuda.device_of(x):
        _gemv[triton.cdiv(layer.n, config.block_n * config.repeat), columns](
            x, s, layer.weight.view(torch.int32), scale, layer.bias, y, chosen, m, layer.n, x.stride(0),
            K=layer.k, PLANES=layer.planes, BYTES=4 * words, TOKENS=triton.next_power_of_2(m),
            BLOCK_N=config.block_n, REPEAT=config.repeat, BLOCK_W=triton.next_power_of_2(words),
            PER_ROW=(scale if chosen is None else scale[0]).numel() > 1, LIMBS=limbs, ASM=assembly(x), SHARE=share,
            num_warps=config.warps, enable_fp_fusion=False,
        )  # fmt: skip


def choosing(stack: PreparedWeight, activation_bits: int) -> Callable[[Tensor, Tensor], Tensor] | None:
    """A function of x [M, K] and layers of a stack, int64 [P], P / M a token: each by its token, [P, N].

    stack: weight [E, N, BYTES], scale [E, 1] or [E, N], bias [E, N] or None
    Which layers is read by the kernel. None where a row is too long for it.
    """
    limbs, per_row = 2 if activation_bits == 16 else 1, stack.scale.shape[1] > 1
    config = heuristic(gpu_of(stack.weight.device), 1, stack.n, stack.k, stack.planes, per_row, limbs)
    if not isinstance(config, Gemv):
        return None

    def run(x: Tensor, chosen: Tensor) -> Tensor:
        x = rows_of(x, stack.k)
        y = x.new_empty(len(chosen), stack.n)
        _launch_gemv(config, stack, x, None, y, limbs, chosen)
        return y

    return run


def _launch_dot(
    config: Dot,
    layer: PreparedWeight,
    q: Tensor,
    s: Tensor | None,
    sums: Tensor | None,
    y: Tensor,
    space: Tensor | None,
    limbs: int = 1,
) -> None:
    m, n, planes = len(q) // limbs, layer.n, layer.planes
    with torch.cuda.device_of(q):
        _dot[tiles(config, m, n) * config.split,](
            q, s, sums, layer.weight, layer.scale, layer.bias, y, space, counters_of(config, space),
            m, n, q.stride(0), K=layer.k, PLANES=planes, BYTES=layer.weight.shape[1],
            BLOCK_N=config.block_n, BLOCK_M=config.block_m, BLOCK_B=config.block_k // (1 if planes == INT8 else 4),
            SPLIT=config.split, GROUP=GROUP, PER_ROW=layer.scale.numel() > 1, LIMBS=limbs, ASM=assembly(q),
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
        )  # fmt: skip
