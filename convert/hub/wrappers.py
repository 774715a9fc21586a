"""The Hugging Face models in a module, and the module in wrappers that add nothing that is stored."""

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


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DataParallel, DistributedDataParallel and torch.compile, which add nothing that is stored."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model
