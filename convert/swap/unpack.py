"""Packed -> float, in place."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitnet.experts import PackedExperts
from bitnet.linear import become
from bitnet.packed import PackedBitLinear, PackedEmbedding

from ..hub import loading as hf
from .kinds import settle_fast_paths
from .report import Report, report_on


def unpack(model: nn.Module, dtype: torch.dtype | None = None) -> Report:
    """Turn every packed layer back into what it was before replace_linear, in place: weights are exactly codes * scale.

    dtype: of the new weights; default that of the bias, else of the model's first parameter. The result runs anywhere,
    at full size and with float activations, so its outputs differ from the packed model's by the activation
    rounding. Raises ValueError for layers with an RMSNorm inside, which no nn.Linear can express.
    """
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, PackedBitLinear | PackedExperts)
    }
    if not layers:
        raise ValueError("unpack: the model has no PackedBitLinear layers")
    if normed := [name for name, layer in layers.items() if getattr(layer, "rms_norm", None) is not None]:
        raise ValueError(f"unpack: {normed[0]} has an RMSNorm inside, which an nn.Linear cannot express")
    floats = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    default = next(floats, torch.get_default_dtype())
    for layer in layers.values():
        if isinstance(layer, PackedExperts):
            biases = layer.stack(layer.stacks[0]).bias
            layer.to_experts(dtype or (default if biases is None else biases.dtype))
            continue
        bias, training, transposed = layer.bias, layer.training, layer.transposed
        as_dtype = dtype or (bias.dtype if bias is not None else default)
        weight = (layer.codes() * layer.weight_scale[:, None]).to(as_dtype)
        del (
            layer.weight,
            layer.weight_scale,
            layer.bias,
            layer.rms_norm,
            layer.spec,
            layer.backend,
            layer.bits,
            layer._prepacked,
            layer._bound,
        )
        if transposed:
            del layer.in_features, layer.out_features, layer.transposed
        origin = vars(layer).pop("origin", nn.Linear)
        linear = become(layer, Conv1D if transposed else origin)
        linear.weight = nn.Parameter(weight.T.contiguous() if transposed else weight)
        linear.bias = None if bias is None else nn.Parameter(bias.to(as_dtype))
        linear.train(training)
    for inner in hf.outermost(model).values():
        for module in inner.modules():
            if isinstance(module, PackedEmbedding):
                module.to_embedding(dtype)
                inner.tie_weights()
    settle_fast_paths(model)
    hf.attach(model)
    return report_on(model)
