"""A model's int8 head and embedding, float again: transformers can only resize float ones for new tokens."""

import torch
from torch import nn
from transformers import PreTrainedModel

from bitnet.packed import PackedBitLinear, PackedEmbedding


def has_int8_head(model: PreTrainedModel) -> bool:
    """Whether the output head is int8; then the embedding may be, too."""
    head = model.get_output_embeddings()
    return isinstance(head, PackedBitLinear) and head.spec.weights == "int8"


def to_float_head(model: PreTrainedModel) -> None:
    """Turn the int8 head, and the embedding tied to it, into float ones, in place: exactly codes * scale."""
    for module in list(model.modules()):
        if isinstance(module, PackedEmbedding):
            module.to_embedding()
    head = model.get_output_embeddings()
    assert isinstance(head, PackedBitLinear)
    model.set_output_embeddings(_linear(head, model.get_input_embeddings().weight.dtype))
    model.tie_weights()


def _linear(head: PackedBitLinear, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(head.in_features, head.out_features, head.bias is not None, device="meta")
    linear.weight = nn.Parameter((head.weight * head.weight_scale[:, None]).to(dtype))
    if head.bias is not None:
        linear.bias = nn.Parameter(head.bias.to(dtype))
    return linear.train(head.training)
