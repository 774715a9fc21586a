"""Packed -> float, in place: what unpacking and resizing a model do to its layers."""

import torch
from torch import nn
from transformers import PreTrainedModel

from bitnet.experts import PackedExperts
from bitnet.packed import PackedBitLinear, PackedEmbedding

from ..hub.wrappers import outermost
from .kinds import settle_fast_paths


def packed_head(model: PreTrainedModel) -> str | None:
    """What kind of weights the output head has if it is packed; then the embedding may be, too."""
    head = model.get_output_embeddings()
    return head.spec.weights if isinstance(head, PackedBitLinear) else None


def to_float_head(model: PreTrainedModel) -> None:
    """Turn the packed head, and the embedding tied to it, into float ones, in place: exactly codes * scale.

    transformers can only resize float ones for new tokens.
    """
    for module in list(model.modules()):
        if isinstance(module, PackedEmbedding):
            module.to_embedding()
    head = model.get_output_embeddings()
    assert isinstance(head, PackedBitLinear)
    head.to_linear(model.get_input_embeddings().weight.dtype)
    model.tie_weights()


def to_floats(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn every packed layer and embedding back into what it was, in place; dtype: see unpack."""
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, PackedBitLinear | PackedExperts)
    }
    if normed := [name for name, layer in layers.items() if getattr(layer, "rms_norm", None) is not None]:
        raise ValueError(f"unpack: {normed[0]} has an RMSNorm inside, which an nn.Linear cannot express")
    floats = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    default = next(floats, torch.get_default_dtype())
    for layer in layers.values():
        if isinstance(layer, PackedExperts):
            bias = layer.stack(layer.stacks[0]).bias
            layer.to_experts(dtype or (default if bias is None else bias.dtype))
        else:
            layer.to_linear(dtype or (default if layer.bias is None else layer.bias.dtype))
    for inner in outermost(model).values():
        for module in list(inner.modules()):
            if isinstance(module, PackedEmbedding):
                module.to_embedding(dtype)
                inner.tie_weights()
    settle_fast_paths(model)
