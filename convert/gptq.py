"""Ternary rounding of one matrix that accounts for the inputs it will see.

For calibration inputs X [tokens, K] all that matters is H = X^T X: the squared error of the outputs is
|X (W - V)^T|^2 = sum over rows of (w - v) H (w - v)^T. Codes are chosen column by column, each one's error moved to the
columns that are still free (GPTQ, arXiv 2210.17323), and then revisited in turn (cyclic coordinate descent, as in
QuantEase, arXiv 2309.01885) with the scale refitted in between; ternary rounding errs so much that a second look pays.
"""

import torch
from torch import Tensor

from bitnet.kernels import ops

BLOCK = 128  # columns whose errors are propagated at once


def ternarize(weight: Tensor, h: Tensor, per_row: bool, *, damping: float = 0.01, sweeps: int = 8, candidates=(1.0,), order=False, use_gptq=True) -> tuple[Tensor, Tensor]:
    w, h = weight.double().float(), h.clone()
    dead = h.diagonal() <= 0
    h[dead, dead] = 1
    w = w.masked_fill(dead, 0)
    best = None
    base = best_scale(w, h.diagonal(), per_row)
    plain = ops.quantize_weight(weight, per_row=per_row)
    pc = plain[0].masked_fill(dead, 0)
    tries = [(pc, plain[1])]
    for c in candidates:
        scale = base * c
        codes = gptq(w, h, scale, damping, order) if use_gptq else round_codes(w, scale)
        tries.append((codes, scale))
    out = []
    for i, (codes, scale) in enumerate(tries):
        if i and sweeps >= 0:
            scale = refit(w, h, codes, scale, per_row)
            for _ in range(sweeps):
                codes = sweep(w, h, codes, scale)
                scale = refit(w, h, codes, scale, per_row)
        out.append((codes, scale, errors(w, h, codes, scale)))
    codes, scale, err = out[0]
    for c2, s2, e2 in out[1:]:
        if per_row:
            better = (e2 < err) & (s2 > 0)
            codes = torch.where(better[:, None], c2, codes)
            scale = torch.where(better, s2, scale)
            err = torch.where(better, e2, err)
        elif e2.sum() < err.sum():
            codes, scale, err = c2, s2, e2
    return codes.to(torch.int8), 1 / (1 / scale)


def round_codes(w, scale):
    return (w / scale[:, None]).round().clamp(-1, 1)


def best_scale(w: Tensor, d: Tensor, per_row: bool) -> Tensor:
    """the scale that minimises sum d (w - scale*code)^2 over scale and codes, exactly: code = 1 above scale/2, so the
    nonzero codes are the largest |w|; of each number of them the error is sum d w^2 - (sum d|w|)^2 / sum d."""
    size, d = w.abs(), d.expand_as(w)
    if not per_row:
        size, d = size.reshape(1, -1), d.reshape(1, -1)
    size, order = size.sort(dim=1, descending=True)
    d = d.gather(1, order).double()
    a, b = (d * size).cumsum(1), d.cumsum(1)
    at = (a * a / b).argmax(1, keepdim=True)
    return (a / b).gather(1, at).squeeze(1).float().clamp(min=1e-8)


def refit(w, h, codes, scale, per_row):
    hc = codes.float() @ h
    num, den = (w * hc).sum(1).double(), (codes * hc).sum(1).double()
    if not per_row:
        num, den = num.sum().view(1), den.sum().view(1)
    s = num / den
    return torch.where((den > 0) & (s > 0), s, scale.double()).float()


def errors(w, h, codes, scale):
    e = w - codes * scale[:, None]
    return ((e @ h) * e).sum(1)


def gptq(w, h, scale, damping, order=False):
    k = w.shape[1]
    if order:
        perm = h.diagonal().argsort(descending=True, stable=True)
        inv = perm.argsort()
        return gptq(w[:, perm], h[perm][:, perm], scale, damping)[:, inv]
    hd = h.double()
    hd.diagonal().add_(damping * hd.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hd)), upper=True).float()
    w = w.clone()
    codes = torch.empty_like(w)
    s = scale.expand(w.shape[0])
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        part, block = w[:, start:end], u[start:end, start:end]
        errs = torch.empty_like(part)
        for j in range(end - start):
            column = part[:, j]
            c = (column / s).round().clamp(-1, 1)
            codes[:, start + j] = c
            err = (column - c * s) / block[j, j]
            part[:, j:] -= err[:, None] * block[j, j:]
            errs[:, j] = err
        w[:, end:] -= errs @ u[start:end, end:]
    return codes


def sweep(w, h, codes, scale):
    s = scale.expand(w.shape[0])
    codes = codes.clone()
    r = (w - codes * s[:, None]) @ h
    k = w.shape[1]
    for start in range(0, k, BLOCK):
        end = min(start + BLOCK, k)
        part, block = r[:, start:end], h[start:end, start:end]
        deltas = torch.empty_like(part)
        for j in range(end - start):
            old = codes[:, start + j]
            new = (old + part[:, j] / (block[j, j] * s)).round().clamp(-1, 1)
            delta = (new - old) * s
            part -= delta[:, None] * block[j]
            codes[:, start + j] = new
            deltas[:, j] = delta
        r[:, :start] -= deltas @ h[start:end, :start]
        r[:, end:] -= deltas @ h[start:end, end:]
    return codes
