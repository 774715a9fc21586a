"""The Hugging Face models in a module."""

from torch import nn
from transformers import PreTrainedModel


def outermost(model: nn.Module, name: str = "") -> dict[str, PreTrainedModel]:
    """The Hugging Face models in a module, by name, but not those inside another: in most cases itself, as ""."""
    if isinstance(model, PreTrainedModel):
        return {name: model}
    found: dict[str, PreTrainedModel] = {}
    for child, module in model.named_children():
        found |= outermost(module, f"{name}.{child}" if name else child)
    return found
