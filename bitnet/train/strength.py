"""How far training quantizes, step by step."""

import torch
from torch import nn

from ..linear import BitLayer


def set_strength(model: nn.Module, strength: float) -> None:
    """Set how far all BitLinear, BitConv1D and BitExperts of `model` quantize in training, from 0 to 1 (fully).

    Raises ValueError outside [0, 1], or if the model has no BitLinear.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie in [0, 1], got {strength}")
    layers = [module for module in model.modules() if isinstance(module, BitLayer)]
    if not layers:
        raise ValueError("the model has no BitLinear layers; call bitnet.replace_linear(model) first")
    value = float(strength) if strength in (0, 1) else torch.tensor(float(strength))
    for layer in layers:
        layer.strength = value


def strength_at(step: int, steps: int, start: float = 0.2, end: float = 0.7) -> float:
    """The warm-up schedule: 0 before start * steps, then linear, 1 from end * steps on (the last steps included)."""
    if not 0 <= start <= end <= 1:
        raise ValueError(f"need 0 <= start <= end <= 1, got start={start}, end={end}")
    done = step / max(steps, 1)
    if done >= end or step >= steps - 1:
        return 1.0
    return max(0.0, (done - start) / (end - start)) if end > start else 0.0
