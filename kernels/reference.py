"""The definition of every operation in plain torch: the specification each backend must equal.

Written to be read and checked against the papers, not for speed (but for steps in place, which halve the time of
quantizing). All arithmetic on scales is float32; the product of codes is an exact integer; there is one rounding, to
the input's dtype, at the very end.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

EPS = 1e-5  # lower bound of mean|W| and max|x|: keeps scales finite (The Era of 1-bit LLMs: Training Tips, p. 5)
GROUP_SIZES = (32, 64, 128, 256)  # features that may share a scale in a row
SPAN = 1024  # features whose groups are summed before the sum goes to the total: see group_linear
MOST_FLOATS = 1 << 24  # weights that a backward pass expands to float at a time
MOST_16 = 65_536  # features whose products with 16-bit activations an int32 holds
MAX_16 = 127 * 256 + 127  # of 16-bit activations: the largest integer that is two int8 limbs, 256 h + l


def quantize_weight(
    weight: Tensor,
    kind: str = "ternary",
    per_row: bool = False,
    group_size: int | None = None,
    centered: bool = True,
) -> tuple[Tensor, Tensor]:
    """Quantize a latent weight.

    weight:  floating [N, K]
    kind:    "ternary" (BitNet b1.58, arXiv 2402.17764, eq. 1-3):  codes = clamp(round(W / mean|W|), -1, 1)
             "binary"  (BitNet, arXiv 2310.11453, eq. 1-3):        codes = sign(W - mean W), where sign(0) = -1
             "int8"    (absmax, as for activations):               codes = clamp(round(W * 127 / max|W|), -127, 127)
             "int4"    (llama.cpp's Q4_0, groups of 32 features):  codes = clamp(round(W / scale), -8, 7)
                       where scale = the value of the largest magnitude (the first such one of the group) / -8
    per_row: take the means and maxima over each row instead of the whole tensor
    group_size: take the means over each row and group of as many features (BitNet, arXiv 2310.11453, sec. 2.3; the last
             group may be shorter); one of GROUP_SIZES, not for "int8", and 32 for "int4"
    centered: False leaves the mean out of "binary": codes = sign(W)
    returns: codes int8 [N, K] and scale float32 [1] ([N] if per_row; float16 [N, G] for groups, with
             G = ceil(K / group_size)), so that weight ~ codes * scale

    Means, here and below, are summed in float64 and rounded once, so that they do not depend on the order of summation:
    values get the same codes on every device and with every number of threads.
    The scale is 1 / inv with inv = 1 / mean|W| (127 / max|W| for int8), because inv is what Hub checkpoints store: a
    float32 save and load then gives back the same bits. An all-zero weight gets the codes of its kind and scale EPS
    (EPS / 127). Scales of groups are mean|W| rounded to float16, and it is by these that weights are divided: training,
    files and kernels know no others. Means above float16's range become Inf, which no layer takes. "int4" rounds its
    scales likewise; groups whose scale is 0 have codes 0.
    """
    if group_size is not None:
        return _quantize_groups(weight, kind, group_size, centered)
    w, inv = weight.float(), inverse_scale(weight, kind, per_row)
    if kind == "ternary":
        codes = (w * inv).round_().clamp_(-1, 1)  # torch rounds half to even
    elif kind == "binary":
        middle = _mean(w, 1 if per_row else None).float() if centered else torch.zeros((), device=w.device)
        codes = (w > middle).float() * 2 - 1
    elif kind == "int8":
        codes = (w * inv).round_().clamp_(-127, 127)
    else:
        needed = "; 'int4' is for groups of 32" if kind == "int4" else ""
        raise ValueError(f"kind must be 'ternary', 'binary' or 'int8', got {kind!r}{needed}")
    return codes.to(torch.int8), (1 / inv).reshape(-1)


def _quantize_groups(weight: Tensor, kind: str, group_size: int, centered: bool) -> tuple[Tensor, Tensor]:
    w = grouped(weight.float(), group_size)  # [N, G, group_size]
    if kind == "int4":
        scale = (w.gather(-1, w.abs().argmax(-1, keepdim=True)) / -8).half()
        codes = torch.where(scale == 0, 0, (w / scale.float()).round_().clamp_(-8, 7))
        return codes.flatten(1)[:, : weight.shape[1]].to(torch.int8).contiguous(), scale.squeeze(-1)
    sizes = group_sizes(weight.shape[1], group_size, weight.device)[:, None]
    scale = (_sum(w.abs()) / sizes).float().clamp(min=EPS).half()
    if kind == "ternary":
        codes = (w * (1 / scale.float())).round_().clamp_(-1, 1)
    elif kind == "binary":
        middle = (_sum(w) / sizes).float() if centered else torch.zeros((), device=w.device)
        codes = (w > middle).float() * 2 - 1
    else:
        raise ValueError(f"kind must be 'ternary', 'binary' or 'int4' for groups, got {kind!r}")
    return codes.flatten(1)[:, : weight.shape[1]].to(torch.int8).contiguous(), scale.squeeze(-1)


def grouped(t: Tensor, group_size: int) -> Tensor:
    """[..., K] as [..., G, group_size]; a last group that is shorter is filled with zeros."""
    return torch.nn.functional.pad(t, (0, -t.shape[-1] % group_size)).unflatten(-1, (-1, group_size))


def group_sizes(in_features: int, group_size: int, device: torch.device) -> Tensor:
    """How many features each group has: float64 [G] (float32 where there is no float64)."""
    starts = torch.arange(0, in_features, group_size, device=device)
    return (in_features - starts).clamp(max=group_size).to(_wide(device))


def size_of_groups(in_features: int, groups: int) -> int:
    """The group_size of a scale [N, G]: the smallest of GROUP_SIZES that makes G groups of K features.

    Raises ValueError if there is none. (With one group, all sizes from K on mean the same.)
    """
    for size in GROUP_SIZES:
        if -(-in_features // size) == groups:
            return size
    raise ValueError(f"{groups} scales a row fit no groups of {GROUP_SIZES} among {in_features} features")


def inverse_scale(weight: Tensor, kind: str = "ternary", per_row: bool = False) -> Tensor:
    """The inv of quantize_weight, by which its codes are multiplied before rounding: float32 [1, 1], or [N, 1]."""
    size = weight.abs()
    if kind == "int8":
        # as a reciprocal and a product: bit for bit what torch computes for 127 / a
        top = (size.amax(dim=1) if per_row else size.amax()).float()
        return 127 * top.clamp(min=EPS).reciprocal().reshape(-1, 1)
    return inverse_of_mean(_mean(size, 1 if per_row else None))


def inverse_of_mean(mean: Tensor) -> Tensor:
    """1 / mean|W|: float64 means, one or N, to float32 [1, 1] or [N, 1]."""
    return 1 / mean.float().clamp(min=EPS).reshape(-1, 1)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # which Apple's GPUs do not have


def _sum(t: Tensor) -> Tensor:
    return t.sum(dim=-1, keepdim=True, dtype=_wide(t.device))


def _mean(t: Tensor, dim: int | None) -> Tensor:
    wide = _wide(t.device)
    return t.mean(dtype=wide) if dim is None else t.mean(dim=dim, keepdim=True, dtype=wide)


def quantize_activation(x: Tensor, activation_bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantize activations per token (the last dimension is one token).

    x:               floating [..., K]
    activation_bits: 8: s = 127 / max|x|,      codes = clamp(round(x s), -128, 127)   (arXiv 2402.17764; b1.58 code)
                     4: s = sqrt(7) / mean|x|, codes = clamp(round(x s), -8, 7)       (a4.8, arXiv 2411.04965, eq. 3)
                     16: s = MAX_16 / max|x|,  codes = clamp(round(x s), -MAX_16, MAX_16)
    returns:         codes int8 (16 bits: int16) [..., K] and s float32 [..., 1], which *divides*: x ~ codes / s

    A token that holds NaN or Inf yields an s that makes every product with it NaN; others are not affected.
    """
    x = x.float()
    if activation_bits == 8:
        # as a reciprocal and a product: bit for bit what torch computes for 127 / a, and GPU kernels can follow
        s = 127 * x.abs().amax(dim=-1, keepdim=True).clamp(min=EPS).reciprocal()
        low, high = -128, 127
    elif activation_bits == 4:
        s = 7**0.5 * _mean(x.abs(), dim=-1).float().clamp(min=EPS).reciprocal()
        low, high = -8, 7
    elif activation_bits == 16:
        s = MAX_16 * x.abs().amax(dim=-1, keepdim=True).clamp(min=EPS).reciprocal()
        low, high = -MAX_16, MAX_16
    else:
        raise ValueError(f"activation_bits must be 16, 8 or 4, got {activation_bits!r}")
    codes = (x * s).round_().clamp_(low, high).nan_to_num_(0)
    return codes.to(torch.int16 if activation_bits == 16 else torch.int8), s


def limbs(q: Tensor) -> tuple[Tensor, Tensor]:
    """16-bit codes as two int8 limbs (h, l): q = 256 h + l, both from -128 to 127."""
    high = (q + 128) >> 8
    return high.to(torch.int8), (q - (high << 8)).to(torch.int8)


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact integer product a @ b.T of int8 codes.

    a: int8 [M, K], or int16 of at most MAX_16 where b is ternary; b: int8 [N, K]; returns int32 [M, N].
    """
    if a.dtype == torch.int16:  # 256 K h + K l stays below 2^31 up to MOST_16
        high, low = limbs(a)
        return 256 * int_matmul(high, b) + int_matmul(low, b)
    acc = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    # |partial sums| <= 128 * 128 * 1024 = 2^24: every float32 up to that is an exact integer
    device = a.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        for qa, qb in zip(a.split(1024, dim=1), b.split(1024, dim=1), strict=True):
            acc += (qa.float() @ qb.float().T).to(torch.int32)
    return acc


def rescale(acc: Tensor, s: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The epilogue of every kernel: acc * (scale / s) + bias in float32, rounded once to dtype.

    acc: int32 or integer-valued float32 [M, N]; s: float32 [M, 1]; scale: float32 [1] or [N]; bias: [N] or None
    """
    y = acc.float()
    y = y * (scale / s) if y is acc else y.mul_(scale / s)
    if bias is not None:
        y += bias.float()
    return y.to(dtype)


def group_linear(q: Tensor, s: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The product with a scale for each row and group of features.

    Accumulators are exact integers, one for each group, below 2^23 in magnitude and so exact as float32, too. They are
    summed in float32, every product and every sum rounded by itself: each times its scale, from first to last within
    a span of 1024 features; the spans from first to last; the total times 1 / s.

    q: int8 or int16 [M, K]; s: float32 [M, 1]; codes: int8 [N, K], -1, 0, 1 (of 4 bits for q int8); scale: float16
    [N, G]; bias: [N] or None
    """
    k, size = codes.shape[1], size_of_groups(codes.shape[1], scale.shape[1])
    y = torch.zeros(len(q), len(codes), device=q.device)
    for span in range(0, k, SPAN):
        part = torch.zeros_like(y)
        for at in range(span, min(span + SPAN, k), size):
            acc = int_matmul(q[:, at : at + size], codes[:, at : at + size])
            part += acc.float() * scale[:, at // size].float()
        y += part
    y *= 1 / s
    if bias is not None:
        y += bias.float()
    return y.to(dtype)


def hadamard(x: Tensor, block: int, signs: Tensor | None = None) -> Tensor:
    """H (signs x) in blocks of features: the normalized Walsh-Hadamard transform in Sylvester's order, its own inverse.

    x: floating [..., K], K a multiple of block; block: a power of two; signs: int8 [K], each 1 or -1
    returns: x.dtype [..., K], rounded once. Butterflies (a + b, a - b) of neighbours first, then at distance 2, 4, ...;
    the factor block ** -0.5, rounded to float32, comes last. (BitNet v2, arXiv 2504.18415, eq. 4; H H = 1)
    """
    y = x.float() if signs is None else x.float() * signs
    y = y.unflatten(-1, (-1, block))
    distance = 1
    while distance < block:
        a, b = y.unflatten(-1, (-1, 2, distance)).unbind(-2)
        y = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        distance *= 2
    return (y * block**-0.5).flatten(-2).to(x.dtype)


def dequantize_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that codes stand for, codes * scale, multiplied in float32 and rounded once to dtype.

    codes: int8 [..., N, K]; scale: float32 [..., 1] or [..., N]; or float16 [..., N, G], a scale a group
    """
    if scale.dtype == torch.float16:
        size = size_of_groups(codes.shape[-1], scale.shape[-1])
        return (grouped(codes, size) * scale.float()[..., None]).flatten(-2)[..., : codes.shape[-1]].to(dtype)
    return (codes * scale[..., None]).to(dtype)


def float_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The product when activations stay float (activation bits "none"): (x @ codes.T) * scale + bias.

    x: floating [..., K]; codes: [N, K]; the matrix product runs in x's dtype, the rest in float32. With scales of
    groups the weight is multiplied by them before: x @ (codes * scale).T.
    """
    if scale.dtype == torch.float16:
        b = None if bias is None else bias.to(x.dtype)
        return torch.nn.functional.linear(x, dequantize_weight(codes, scale, x.dtype), b)
    y = torch.nn.functional.linear(x, codes.to(x.dtype)).float() * scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def ternary_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, activation_bits: int | None = 8
) -> Tensor:
    """y = (q . codes) * (scale / s) + bias, where q, s = quantize_activation(x); with scales of groups group_linear.

    x: floating [..., K]; codes: int8 [N, K]; scale: float32 [1] or [N], or float16 [N, G]; bias: [N] or None
    returns: x.dtype [..., N]
    """
    if activation_bits is None:
        return float_linear(x, codes, scale, bias)
    q, s = quantize_activation(x.reshape(-1, x.shape[-1]), activation_bits)
    if scale.dtype == torch.float16:
        y = group_linear(q, s, codes, scale, bias, x.dtype)
    else:
        y = rescale(int_matmul(q, codes), s, scale, bias, x.dtype)
    return y.reshape(*x.shape[:-1], codes.shape[0])


def grad_input(grad_y: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Straight-through gradient of the input, dX = dY (codes * scale): the quantizer counts as the identity.

    grad_y: floating [M, N]; codes: int8 [N, K]; scale: float32 [1] or [N], or float16 [N, G]
    returns: grad_y.dtype [M, K]
    """
    rows = max(1, MOST_FLOATS // codes.shape[1])
    if codes.shape[0] > rows:  # the weight in pieces, since it may be a head of gigabytes
        total = torch.zeros(grad_y.shape[0], codes.shape[1], dtype=torch.float32, device=grad_y.device)
        pieces = [slice(first, first + rows) for first in range(0, codes.shape[0], rows)]
        for piece in pieces:
            total += grad_input(grad_y[:, piece], codes[piece], scale if scale.numel() == 1 else scale[piece])
        return total.to(grad_y.dtype)
    if scale.dtype == torch.float16:
        return grad_y @ dequantize_weight(codes, scale, grad_y.dtype)
    return (grad_y * scale.to(grad_y.dtype)) @ codes.to(grad_y.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """softmax(q k^T scaling) v in float32, rounded once; 0 for a query that sees nothing.

    q: floating [B, H, T, D]; k: [B, G, P, D]; v: [B, G, P, E], each of whose heads H / G of q's share; mask: bool,
    broadcast to [B, H, T, P], what is seen, or None for all
    returns: q.dtype [B, T, H, E]
    """
    share = q.shape[1] // k.shape[1]
    keys, values = (t.float().repeat_interleave(share, dim=1) for t in (k, v))
    scores = (q.float() * scaling) @ keys.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0)
    return (weights @ values).transpose(1, 2).to(q.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight in float32, rounded once (arXiv 1910.07467, equation 4).

    x: floating [..., K]; weight: float32 [K]
    returns: x.dtype [..., K]
    """
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
