"""Helpers for training loops: the quantization warm-up, and optimizer groups that suit low-bit weights."""

import torch
from torch import nn

from .linear import BitLinear


def set_strength(model: nn.Module, strength: float) -> None:
    """Set how far every BitLinear of `model` quantizes in training mode, from 0 (not at all) to 1 (fully).

    Raises ValueError outside [0, 1], or if the model has no BitLinear.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]
    if not layers:
        raise ValueError("the model has no BitLinear layers; call bitnet.replace_linear(model) first")
    value = float(strength) if strength in (0, 1) else torch.tensor(float(strength))
    for layer in layers:
        layer.strength = value


def strength_at(step: int, steps: int, start: float = 0.5, end: float = 0.9) -> float:
    """The warm-up schedule: 0 before start * steps, then linear, 1 from end * steps on (the last steps included)."""
    if not 0 <= start <= end <= 1:
        raise ValueError(f"need 0 <= start <= end <= 1, got start={start}, end={end}")
    done = step / max(steps, 1)
    if done >= end or step >= steps - 1:
        return 1.0
    return max(0.0, (done - start) / (end - start)) if end > start else 0.0
