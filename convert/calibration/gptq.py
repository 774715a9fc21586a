"""Ternary rounding of one matrix that accounts for the inputs it gets.

Let X [T, K] be what the layer sees in the float model, Y [T, K] what it will see in the rounded one, W its weight and V
the rounded one. What is to be small is

    |X W^T - Y V^T|^2 + damping |W - V|^2 = tr (V* - V) H (V* - V)^T + constant

    H = Y^T Y + damping        C = Y^T X + damping        V* = W C^T H^-1

so all that matters of the inputs are two [K, K] matrices. V* differs from W by what makes up for the errors of earlier
layers (GPTAQ, arXiv 2504.02692). Codes are chosen column by column, the error of each moved to those that are still
free (GPTQ, arXiv 2210.17323), largest inputs first. Then all columns are visited again in turn, each code set to the
best one given all others (coordinate descent, QuantEase, arXiv 2309.01885), with the scale refitted in between by least
squares: neither step can make the sum larger.
"""

import torch
from torch import Tensor

from bitnet.kernels import reference
from bitnet.kernels.reference import dequantize_weight

DAMPING = 0.1  # of the mean of the diagonal of Y^T Y; columns without any input are rounded to W itself by it
SWEEPS = 8
BLOCK = 128  # columns whose errors are moved on together


def ternarize(weight: Tensor, h: Tensor, c: Tensor, per_row: bool) -> tuple[Tensor, Tensor]:
    """Codes and scale of a matrix, given its inputs before and after the rounding of earlier layers.

    weight:  float32 [N, K]
    h, c:    float32 [K, K]: Y^T Y and Y^T X
    per_row: one scale a row instead of one for all
    returns: codes int8 [N, K] and scale float32 [N] or [1]

    The sum above is at most that of plain rounding (of each row, if per_row), which takes over where it is smaller.
    Raises ValueError where float32 does not hold the sums.
    """
    order = h.diagonal().argsort(descending=True, stable=True)
    mean = h.diagonal().mean()
    damping = DAMPING * mean if mean > 0 else 1.0
    h = h[order[:, None], order]
    h.diagonal().add_(damping)
    u = inverse_factor(h)
    w = weight[:, order]
    target = c[order[:, None], order] @ w.T
    target += damping * w.T
    target = (u.T @ (u @ target)).T.contiguous()

    scale = first_scale(target, h.diagonal(), per_row)
    codes = gptq(target, u, scale)
    for _ in range(SWEEPS):
        scale = refit(target, h, codes, scale)
        before, codes = codes, sweep(target, h, codes, scale)
        if torch.equal(codes, before):
            break
    scale = 1 / (1 / refit(target, h, codes, scale))  # as 1 / inv, like trained scales: Hub files store inv

    plain, plain_scale = reference.quantize_weight(w, per_row=per_row)
    worse = errors(target, h, codes, scale) - errors(target, h, plain.float(), plain_scale)
    if not bool(worse.isfinite().all()):
        raise ValueError(f"its outputs overflow float32 (weights are up to {weight.abs().max().item():.3g})")
    worse = worse >= 0 if per_row else worse.sum(0, keepdim=True) >= 0
    codes = torch.where(worse[:, None], plain, codes.to(torch.int8))
    return codes[:, order.argsort()], torch.where(worse, plain_scale, scale)


def inverse_factor(h: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1, as float32; h [K, K] is positive definite."""
    # the Cholesky factor of H, rows and columns reversed, is the inverse of U reversed: nothing is factored twice
    lower = torch.linalg.cholesky(h.double().flip(0, 1))
    eye = torch.eye(len(h), dtype=lower.dtype, device=h.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).float()


def first_scale(w: Tensor, d: Tensor, per_row: bool) -> Tensor:
    """A scale that is the best for its own codes, in the sum of d (w - scale * code)^2: [N], or [1]."""
    size, dims = w.abs(), 1 if per_row else (0, 1)
    scale = reference.EPS + size.mean(dims, keepdim=True)
    for _ in range(20):  # codes for the scale (1 above half of it), scale for the codes
        used = (size > scale / 2) * d
        scale = (used * size).sum(dims, keepdim=True) / used.sum(dims, keepdim=True)
        scale = scale.nan_to_num(0).clamp(min=reference.EPS)
    return scale.reshape(-1)


def gptq(w: Tensor, u: Tensor, scale: Tensor) -> Tensor:
    """Codes (as float32) of w [N, K], column by column, with errors moved to later columns; u from inverse_factor."""
    w, codes = w.clone(), torch.empty_like(w)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        part, corner = w[:, start:end], u[start:end, start:end]
        moved = torch.empty_like(part)
        for j in range(end - start):
            code = (part[:, j] / scale).round_().clamp_(-1, 1)
            error = (part[:, j] - code * scale) / corner[j, j]
            part[:, j:] -= error[:, None] * corner[j, j:]
            codes[:, start + j], moved[:, j] = code, error
        w[:, end:] -= moved @ u[start:end, end:]
    return codes


def sweep(w: Tensor, h: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """New codes: each column's in turn the best ones, given those of all others."""
    codes = codes.clone()
    slope = (w - dequantize_weight(codes, scale)) @ h  # of the error along each column, negative and halved
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        part, corner = slope[:, start:end].clone(), h[start:end, start:end]
        change = torch.empty_like(part)
        for j in range(end - start):
            old = codes[:, start + j]
            new = (old + part[:, j] / (corner[j, j] * scale)).round_().clamp_(-1, 1)
            change[:, j] = (new - old) * scale
            part -= change[:, j, None] * corner[j]
            codes[:, start + j] = new
        slope -= change @ h[start:end]
    return codes


def refit(w: Tensor, h: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The scale that fits codes best, of each row or all; where there is none that is positive, the one given."""
    product = codes @ h
    above, below = (w * product).sum(1, dtype=torch.float64), (codes * product).sum(1, dtype=torch.float64)
    if len(scale) != len(w):
        above, below = above.sum(0, keepdim=True), below.sum(0, keepdim=True)
    return torch.where((above > 0) & (below > 0), above / below, scale.double()).float()


def errors(w: Tensor, h: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The sum that is minimised, by row."""
    difference = w - dequantize_weight(codes, scale)
    return ((difference @ h) * difference).sum(1)
