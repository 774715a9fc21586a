"""The formulas of BitNet written a second time, in numpy: int64 accumulators, one float32 operation a line.

Nothing here imports bitnet. Means are exact (float64, rounded once), so for bit equality feed values on a coarse
grid (`grid`): a float32 sum of them is exact too, whatever its order.
"""

import numpy as np
import torch
from torch import Tensor

F32 = np.float32
EPS = F32(1e-5)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def grid(*shape: int, step: float = 1 / 16, limit: int = 15) -> Tensor:
    """Random multiples of step up to limit * step: exact in float32, bfloat16 and float16, and so are their sums."""
    return torch.randint(-limit, limit + 1, shape).float() * step


def array(t: Tensor) -> np.ndarray:
    """A tensor's values; bfloat16, which numpy lacks, passes exactly through float64."""
    return t.detach().double().numpy() if t.is_floating_point() else t.detach().numpy()


def weight(w: Tensor, kind: str = "ternary", per_row: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """codes int64 [N, K], scale float32 [1] or [N]"""
    w64 = array(w)
    axis = 1 if per_row else None
    if kind == "int8":
        inv = F32(127) * (F32(1) / np.maximum(np.abs(w64).max(axis, keepdims=True).astype(F32), EPS))
        return np.clip(np.rint(w64.astype(F32) * inv), -127, 127).astype(np.int64), (F32(1) / inv).reshape(-1)
    inv = F32(1) / np.maximum(np.abs(w64).mean(axis, keepdims=True).astype(F32), EPS)
    if kind == "ternary":
        codes = np.clip(np.rint(w64.astype(F32) * inv), -1, 1)
    else:
        codes = np.where(w64 > w64.mean(axis, keepdims=True), 1, -1)
    return codes.astype(np.int64), (F32(1) / inv).reshape(-1)


def q4_0(w: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """4-bit codes int64 [N, K] and scales float16 [N, G] of groups of 32 features, value by value."""
    rows = array(w).astype(F32)
    codes = np.zeros(rows.shape, np.int64)
    scale = np.zeros((len(rows), -(-rows.shape[1] // 32)), np.float16)
    for n, row in enumerate(rows):
        for at in range(0, len(row), 32):
            group = row[at : at + 32]
            top = F32(0)
            for value in group:
                top = value if abs(value) > abs(top) else top
            d = scale[n, at // 32] = np.float16(top / F32(-8))
            if d:
                codes[n, at : at + 32] = np.clip(np.rint(group / F32(d)), -8, 7)
    return codes, scale


def activation(x: Tensor, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """codes int64 [..., K], s float32 [..., 1]"""
    x64 = array(x)
    magnitude = np.abs(x64).mean(-1, keepdims=True) if bits == 4 else np.abs(x64).max(-1, keepdims=True)
    s = F32({8: 127, 4: 7**0.5, 16: 32639}[bits]) * (F32(1) / np.maximum(magnitude.astype(F32), EPS))
    low, high = {8: (-128, 127), 4: (-8, 7), 16: (-32639, 32639)}[bits]
    return np.clip(np.rint(x64.astype(F32) * s), low, high).astype(np.int64), s


def linear(x: Tensor, codes: np.ndarray, scale: np.ndarray, bias: Tensor | None, bits: int | None) -> Tensor:
    """x [..., K] -> [..., N] in x's dtype: the exact integer product, times scale / s, plus bias, rounded once.

    For bits None the product must itself be exact in x's dtype (feed small_sums).
    """
    if bits is None:
        y = (array(x) @ codes.T).astype(F32) * scale
    else:
        q, s = activation(x, bits)
        y = (q @ codes.T).astype(F32) * (scale / s)
    if bias is not None:
        y = y + array(bias).astype(F32)
    return torch.from_numpy(y).to(x.dtype)


def grouped(x: Tensor, codes: np.ndarray, scale: np.ndarray, size: int, bias: Tensor | None, bits: int) -> Tensor:
    """linear with scales float16 [N, G] of groups of `size` features: one float32 operation after the other."""
    q, s = activation(x, bits)
    y = np.zeros((len(q), len(codes)), F32)
    for first in range(0, q.shape[1], 1024):
        span = np.zeros_like(y)
        for at in range(first, min(first + 1024, q.shape[1]), size):
            product = (q[:, at : at + size] @ codes[:, at : at + size].T).astype(F32)
            span = span + product * scale[:, at // size].astype(F32)
        y = y + span
    y = y * (F32(1) / s)
    if bias is not None:
        y = y + array(bias).astype(F32)
    return torch.from_numpy(y).to(x.dtype)


def small_sums(*shape: int) -> Tensor:
    """Random -1/2, 0, 1/2: sums of up to a few thousand of them times -1, 0, 1 stay exact even in bfloat16.

    They stay below 128 = 256 halves: for K = 1536 that is at least eight standard deviations, and tests are seeded.
    """
    return torch.randint(-1, 2, shape).float() / 2
