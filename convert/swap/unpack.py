"""Packed -> float, in place."""

import torch
from torch import nn

from bitnet.experts import PackedExperts
from bitnet.packed import PackedBitLinear

from ..hub.quantizer import attach
from .floats import to_floats
from .report import Report, report_on


def unpack(model: nn.Module, dtype: torch.dtype | None = None) -> Report:
    """Turn every packed layer back into what it was before replace_linear, in place: weights are exactly codes * scale.

    dtype: of the new weights; default that of the bias, else of the model's first parameter. The result runs anywhere,
    at full size and with float activations, so its outputs differ from the packed model's by the activation
    rounding. Raises ValueError for layers with an RMSNorm inside, which no nn.Linear can express.
    """
    if not any(isinstance(module, PackedBitLinear | PackedExperts) for module in model.modules()):
        raise ValueError("unpack: the model has no PackedBitLinear layers")
    to_floats(model, dtype)
    attach(model)
    return report_on(model)
