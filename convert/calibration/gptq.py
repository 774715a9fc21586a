"""Ternary or binary rounding of one matrix that accounts for the inputs it gets.

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

from functools import partial

import torch
from torch import Tensor

from bitnet.kernels import reference
from bitnet.kernels.cpu.choose import choose
from bitnet.kernels.quantizers import on_native
from bitnet.quantize import QuantSpec

DAMPING = 0.1  # of the mean of the diagonal of Y^T Y; columns without any input are rounded to W itself by it
SWEEPS = 8
BLOCK = 128  # columns whose errors are moved on together


def round_matrix(weight: Tensor, h: Tensor, c: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Codes and scale of a matrix, given its inputs before and after the rounding of earlier layers.

    weight:  float32 [N, K]
    h, c:    float32 [K, K]: Y^T Y and Y^T X
    spec:    ternary or binary weights, and what shares a scale: all, a row (per_row) or a group of it (group_size)
    returns: codes int8 [N, K] and scale float32 [1] or [N], or float16 [N, G] of groups

    The sum above is at most that of plain rounding (of each row, but for a scale for all), which takes over where it is
    smaller. Codes are ones that the layer's own quantizer can make: centered binary ones are never all +1 where they
    share a mean. Raises ValueError where float32 does not hold the sums.
    """
    binary, per_row, group_size = spec.weights == "binary", spec.per_row, spec.group_size
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

    group_of = None if group_size is None else order // group_size
    if group_size is None:
        scale = first_scale(target, h.diagonal(), per_row, binary)
    else:
        back, d = order.argsort(), h.diagonal().expand_as(target)
        sizes, masses = (reference.grouped(t[:, back], group_size) for t in (target, d))
        scale = first_scale(sizes.flatten(0, 1), masses.flatten(0, 1), True, binary).view(sizes.shape[:2])
    codes = gptq(target, u, columns(scale, group_of), binary)
    slope = (target - codes * columns(scale, group_of)) @ h
    best = partial(refit, target, target @ h) if group_of is None else partial(refit_groups, h, group_of)
    for _ in range(SWEEPS):
        scale, before = best(codes, scale, slope), codes.clone()
        sweep(h, codes, columns(scale, group_of), slope, binary)
        if torch.equal(codes, before):
            break
    scale = best(codes, scale, slope)
    if group_of is None:
        scale = 1 / (1 / scale)  # as 1 / inv, like trained scales: Hub files store inv
    else:  # codes have the last word, because scales are stored as float16
        scale = scale.clamp(min=reference.EPS).half()
        sweep(h, codes, columns(scale, group_of), (target - codes * columns(scale, group_of)) @ h, binary)
    if binary and spec.centered:
        turn_one(target, h, codes, columns(scale, group_of), group_of, per_row)

    plain, plain_scale = reference.quantize_weight(weight, spec.weights, per_row, group_size, spec.centered)
    plain = plain[:, order]
    worse = errors(target, h, codes, columns(scale, group_of))
    worse -= errors(target, h, plain.float(), columns(plain_scale, group_of))
    if not bool(worse.isfinite().all()):
        raise ValueError(f"its outputs overflow float32 (weights are up to {weight.abs().max().item():.3g})")
    worse = worse >= 0 if per_row or group_of is not None else worse.sum(0, keepdim=True) >= 0
    codes = torch.where(worse[:, None], plain, codes.to(torch.int8))
    return codes[:, order.argsort()], torch.where(worse if scale.ndim == 1 else worse[:, None], plain_scale, scale)


def turn_one(w: Tensor, h: Tensor, codes: Tensor, scale: Tensor, group_of: Tensor | None, per_row: bool) -> None:
    """Where all codes that share a mean are +1, make the one -1 that costs least, in place; scale: from columns()."""
    scale = scale.expand_as(w)
    cost = scale * (scale * h.diagonal() + (w - codes * scale) @ h)
    if group_of is None and not per_row:
        codes, cost = codes.view(1, -1), cost.view(1, -1)
    groups = [slice(None)] if group_of is None else [(group_of == g).nonzero()[:, 0] for g in group_of.unique()]
    for group in groups:
        part = codes[:, group]
        rows = (part == 1).all(1).nonzero()[:, 0]
        part[rows, cost[rows][:, group].argmin(1)] = -1
        codes[:, group] = part


def columns(scale: Tensor, group_of: Tensor | None) -> Tensor:
    """What each code is multiplied by, float32 [N, K], or [N, 1] or [1, 1] where that is the same in a row."""
    return scale[:, None] if group_of is None else scale.float()[:, group_of]


def inverse_factor(h: Tensor) -> Tensor:
    """The upper triangular U with U^T U = H^-1, as float32; h [K, K] is positive definite."""
    # the Cholesky factor of H, rows and columns reversed, is the inverse of U reversed: nothing is factored twice
    lower = torch.linalg.cholesky(h.double().flip(0, 1))
    eye = torch.eye(len(h), dtype=lower.dtype, device=h.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False).flip(0, 1).float()


def first_scale(w: Tensor, d: Tensor, per_row: bool, binary: bool = False) -> Tensor:
    """A scale that is the best for its own codes, in the sum of d (w - scale * code)^2: [N], or [1]; d: [K] or [N,
    K]."""
    size, dims = w.abs(), 1 if per_row else (0, 1)
    scale = reference.EPS + size.mean(dims, keepdim=True)
    for _ in range(1 if binary else 20):  # codes for the scale (1 above half of it, or all), scale for the codes
        used = d.expand_as(size) if binary else (size > scale / 2) * d
        before, scale = scale, (used * size).sum(dims, keepdim=True) / used.sum(dims, keepdim=True)
        scale = scale.nan_to_num(0).clamp(min=reference.EPS)
        if torch.equal(scale, before):
            break
    return scale.reshape(-1)


def nearest(v: Tensor, binary: bool) -> Tensor:
    """The codes that are closest to v, which is changed."""
    return torch.where(v > 0, 1.0, -1.0) if binary else v.round_().clamp_(-1, 1)


def gptq(w: Tensor, u: Tensor, scale: Tensor, binary: bool = False) -> Tensor:
    """Codes (as float32) of w [N, K], column by column, with errors moved to later columns; u from inverse_factor.

    scale: from columns()
    """
    w, codes, scale = w.clone(), torch.empty_like(w), scale.expand_as(w)
    for start in range(0, w.shape[1], BLOCK):
        own = slice(start, start + BLOCK)
        moved = feed(w[:, own], u[own, own], scale[:, own], codes[:, own], binary)
        w[:, own.stop :].addmm_(moved, u[own, own.stop :], alpha=-1)
    return codes


def sweep(h: Tensor, codes: Tensor, scale: Tensor, slope: Tensor, binary: bool = False) -> None:
    """Each column's codes in turn become the best ones, given those of all others; scale: from columns().

    slope: (w - codes * scale) h [N, K], of the error along each column, negative and halved; it changes with the codes
    """
    scale = scale.expand_as(codes)
    for start in range(0, codes.shape[1], BLOCK):
        own = slice(start, start + BLOCK)
        changed = descend(slope[:, own].clone(), h[own, own], scale[:, own], codes[:, own], binary)
        slope.addmm_(changed, h[own], alpha=-1)


def feed(part: Tensor, corner: Tensor, scale: Tensor, codes: Tensor, binary: bool) -> Tensor:
    """gptq within a block of J columns, whose codes it fills in: part [N, J], which it spoils, corner [J, J] of u.

    returns: the errors [N, J] that later blocks are to make up for
    """
    if on_native(part):
        return choose(part, corner, scale, codes, binary, descend=False)
    part = part.T.contiguous()
    moved = torch.empty_like(part)
    for j, own in enumerate(scale.T):
        codes[:, j] = nearest(part[j] / own, binary)
        moved[j] = (part[j] - codes[:, j] * own) / corner[j, j]
        part[j:].addr_(corner[j, j:], moved[j], alpha=-1)
    return moved.T


def descend(part: Tensor, corner: Tensor, scale: Tensor, codes: Tensor, binary: bool) -> Tensor:
    """sweep within a block of J columns, whose codes it replaces: part [N, J] of the slope, which it spoils, corner [J,
    J] of h.

    returns: by how much the weights [N, J] changed
    """
    if on_native(part):
        return choose(part, corner, scale, codes, binary, descend=True)
    part = part.T.contiguous()
    changed = torch.empty_like(part)
    for j, own in enumerate(scale.T):
        old = codes[:, j].clone()
        codes[:, j] = nearest(old + part[j] / (corner[j, j] * own), binary)
        changed[j] = (codes[:, j] - old) * own
        part.addr_(corner[j], changed[j], alpha=-1)
    return changed.T


def refit(w: Tensor, total: Tensor, codes: Tensor, scale: Tensor, slope: Tensor) -> Tensor:
    """The scale that fits codes best, of each row or all; where there is none that is positive, the one given.

    total: w h; slope: as in sweep, it changes with the scale
    """
    product = (total - slope) / scale[:, None]  # codes h
    above, below = (w * product).sum(1, dtype=torch.float64), (codes * product).sum(1, dtype=torch.float64)
    if len(scale) != len(w):
        above, below = above.sum(0, keepdim=True), below.sum(0, keepdim=True)
    scale = torch.where((above > 0) & (below > 0), above / below, scale.double()).float()
    torch.sub(total, product.mul_(scale[:, None]), out=slope)
    return scale


def refit_groups(h: Tensor, group_of: Tensor, codes: Tensor, scale: Tensor, slope: Tensor) -> Tensor:
    """Scales [N, G]: each group's in turn the best one, given those of all others, if it is positive; slope: as in
    sweep, it changes with them."""
    scale = scale.float().clone()
    for group in range(scale.shape[1]):
        own = (group_of == group).nonzero()[:, 0]
        part = codes[:, own]
        below = ((part @ h[own[:, None], own]) * part).sum(1, dtype=torch.float64)
        step = (part * slope[:, own]).sum(1, dtype=torch.float64) / below
        step = torch.where((below > 0) & (scale[:, group] + step > 0), step, 0.0).float()
        scale[:, group] += step
        slope.addmm_(step[:, None] * part, h[own], alpha=-1)
    return scale


def errors(w: Tensor, h: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The sum that is minimised, by row; scale: from columns()."""
    difference = w - codes * scale
    return ((difference @ h) * difference).sum(1)
