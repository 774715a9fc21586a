"""The definition of every operation in plain torch: the specification each backend must equal.

Written to be read and checked against the papers, not for speed (but for steps in place, which halve the time of
quantizing). All arithmetic on scales is float32; the product of codes is an exact integer; there is one rounding, to
the input's dtype, at the very end.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

EPS = 1e-5  # lower bound of mean|W| and max|x|: keeps scales finite (The Era of 1-bit LLMs: Training Tips, p. 5)


def quantize_weight(weight: Tensor, kind: str = "ternary", per_row: bool = False) -> tuple[Tensor, Tensor]:
    """Quantize a latent weight.

    weight:  floating [N, K]
    kind:    "ternary" (BitNet b1.58, arXiv 2402.17764, eq. 1-3):  codes = clamp(round(W / mean|W|), -1, 1)
             "binary"  (BitNet, arXiv 2310.11453, eq. 1-3):        codes = sign(W - mean W), where sign(0) = -1
             "int8"    (absmax, as for activations):               codes = clamp(round(W * 127 / max|W|), -127, 127)
    per_row: take the means and maxima over each row instead of the whole tensor
    returns: codes int8 [N, K] and scale float32 [1] (or [N] if per_row), so that weight ~ codes * scale

    Means, here and below, are summed in float64 and rounded once, so that they do not depend on the order of summation:
    values get the same codes on every device and with every number of threads.
    The scale is 1 / inv with inv = 1 / mean|W| (127 / max|W| for int8), because inv is what Hub checkpoints store: a
    float32 save and load then gives back the same bits. An all-zero weight gets the codes of its kind and scale EPS
    (EPS / 127).
    """
    w, inv = weight.float(), inverse_scale(weight, kind, per_row)
    if kind == "ternary":
        codes = (w * inv).round_().clamp_(-1, 1)  # torch rounds half to even
    elif kind == "binary":
        codes = (w > _mean(w, 1 if per_row else None).float()).float() * 2 - 1
    elif kind == "int8":
        codes = (w * inv).round_().clamp_(-127, 127)
    else:
        raise ValueError(f"kind must be 'ternary', 'binary' or 'int8', got {kind!r}")
    return codes.to(torch.int8), (1 / inv).reshape(-1)


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


def _mean(t: Tensor, dim: int | None) -> Tensor:
    wide = torch.float32 if t.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
    return t.mean(dtype=wide) if dim is None else t.mean(dim=dim, keepdim=True, dtype=wide)


def quantize_activation(x: Tensor, activation_bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantize activations per token (the last dimension is one token).

    x:               floating [..., K]
    activation_bits: 8: s = 127 / max|x|,      codes = clamp(round(x s), -128, 127)   (arXiv 2402.17764; b1.58 code)
                     4: s = sqrt(7) / mean|x|, codes = clamp(round(x s), -8, 7)       (a4.8, arXiv 2411.04965, eq. 3)
    returns:         codes int8 [..., K] and s float32 [..., 1]. Note that s *divides*: x ~ codes / s.

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
    else:
        raise ValueError(f"activation_bits must be 8 or 4, got {activation_bits!r}")
    return (x * s).round_().clamp_(low, high).nan_to_num_(0).to(torch.int8), s


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Exact integer product a @ b.T of int8 codes.

    a: int8 [M, K]; b: int8 [N, K]; returns int32 [M, N].
    """
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


def dequantize_weight(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight that codes stand for, codes * scale, multiplied in float32 and rounded once to dtype.

    codes: int8 [..., N, K]; scale: float32 [..., 1] or [..., N]
    """
    return (codes * scale[..., None]).to(dtype)


def float_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The product when activations stay float (activation bits "none"): (x @ codes.T) * scale + bias.

    x: floating [..., K]; codes: [N, K]; the matrix product runs in x's dtype, the rest in float32.
    """
    y = torch.nn.functional.linear(x, codes.to(x.dtype)).float() * scale
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def ternary_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, activation_bits: int | None = 8
) -> Tensor:
    """y = (q . codes) * (scale / s) + bias, where q, s = quantize_activation(x).

    x: floating [..., K]; codes: int8 [N, K]; scale: float32 [1] or [N]; bias: [N] or None; returns x.dtype [..., N]
    """
    if activation_bits is None:
        return float_linear(x, codes, scale, bias)
    q, s = quantize_activation(x.reshape(-1, x.shape[-1]), activation_bits)
    y = rescale(int_matmul(q, codes), s, scale, bias, x.dtype)
    return y.reshape(*x.shape[:-1], codes.shape[0])


def grad_input(grad_y: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Straight-through gradient of the input, dX = dY (codes * scale): the quantizer counts as the identity.

    grad_y: floating [M, N]; codes: int8 [N, K]; scale: float32 [1] or [N]; returns grad_y.dtype [M, K]
    """
    return (grad_y * scale.to(grad_y.dtype)) @ codes.to(grad_y.dtype)
