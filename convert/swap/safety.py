"""What must not be swapped whatever the user wants, and what is kept unless the user includes it."""

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from bitnet.experts import stacks_of
from bitnet.quantize import is_sharded

from ..hub.config import with_fp32
from ..hub.wrappers import outermost
from .kinds import HEADS, ROUTERS, computes_linear
from .reads import find_reads, root_of

# What PEFT's modules hold besides adapters.
NOT_ADAPTERS = {"base_layer", "base_model", "model", "original_module", "modules_to_save"}

COORDINATES = 3  # a code a feature would be a vector of few directions


class Verdict(NamedTuple):
    """Why a layer should be kept; "" if there is no reason to."""

    certain: str = ""  # a swap would be wrong
    possible: str = ""  # it may be
    default: str = ""  # it is seldom wanted


def judge(model: nn.Module, layers: dict[nn.Module, list[str]]) -> dict[nn.Module, Verdict]:
    """Whether each of these modules, given with all its names, can become low-bit.

    Embeddings count as safe if nothing else uses their weight.
    """
    holders: dict[int, str] = {}  # of each parameter that a module other than these layers holds, that module
    for name, owner in model.named_modules():
        if owner not in layers:
            holder = f"the embedding {name}" if isinstance(owner, nn.Embedding) else name or type(owner).__name__
            for parameter in owner.parameters(recurse=False):
                holders.setdefault(id(parameter), holder)
    inner = outermost(model)
    ties = _ties(inner, layers)
    reads = find_reads(model, {module: stacks_of(module) or ["weight"] for module in layers})
    verdicts = {}
    for module, names in layers.items():
        certain, possible = _unfit(module, holders) or ties.get(module, ""), ""
        if read := reads.get(module):
            certain, possible = certain or (read.why if read.certain else ""), read.why
        verdicts[module] = Verdict(certain, possible, _default_skip(model, inner, names[0], module))
    return verdicts


def _ties(inner: dict[str, Any], layers: dict[nn.Module, list[str]]) -> dict[nn.Module, str]:
    """Those that transformers ties to each other, and to what: it does so whenever it loads, and to Parameters only.

    An embedding and a head go together into their packed forms.
    """
    named = {
        f"{name}.{leaf}": (module, parameter)
        for module, names in layers.items()
        if not isinstance(module, nn.Embedding)
        for name in names
        for leaf, parameter in module.named_parameters(recurse=False)
    }
    found: dict[nn.Module, str] = {}
    for prefix, pretrained in inner.items():
        for pair in pretrained.all_tied_weights_keys.items():
            one, other = (f"{prefix}.{key}".removeprefix(".") for key in pair)
            if one in named and other in named and named[one][1] is named[other][1]:
                found |= {named[one][0]: f"tied to {other}", named[other][0]: f"tied to {one}"}
    return found


def _unfit(module: nn.Module, holders: dict[int, str]) -> str:
    """What is wrong with the layer itself."""
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values()):
        return "has no weight before its first call; run the model once, then swap"
    if isinstance(module, nn.Linear | Conv1D) and not computes_linear(module):
        kind = "nn.Linear" if isinstance(module, nn.Linear) else "Conv1D"
        return f"a subclass of {kind} ({type(module).__name__}) with behaviour of its own"
    if "forward" in vars(module) and "_old_forward" not in vars(module):
        return "its forward is patched on the instance (tensor parallelism?)"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over devices (expert parallelism)"
    for leaf in stacks_of(module) or ["weight"]:
        if leaf not in module._parameters:
            return f"its {leaf} is computed before each call (weight or spectral norm, pruning)"
        values = module.get_parameter(leaf)
        if is_sharded(values):
            return f"its {leaf} is sharded; swap before fully_shard (tensor parallelism is not supported)"
        if type(values.data) is not torch.Tensor:
            return f"its {leaf} is a {type(values.data).__name__} (quantized already?)"
        if not values.is_floating_point():
            return f"its {leaf} is {values.dtype}"
        if 0 in values.shape:
            return f"its {leaf} is empty"
        if id(values) in holders:
            return f"tied to {holders[id(values)]}"
    return ""


def _default_skip(model: nn.Module, inner: dict[str, Any], name: str, module: nn.Module) -> str:
    """Why this layer is kept unless the user includes it, going by its place in the model."""
    parts = name.split(".")
    for prefix, pretrained in inner.items():
        if prefix and not name.startswith(f"{prefix}."):
            continue
        if module is pretrained.get_output_embeddings():
            return "output embedding"
        base = pretrained.base_model_prefix
        if pretrained.base_model is not pretrained and not name.removeprefix(f"{prefix}.").startswith(f"{base}."):
            return f"task head (outside {base})"
        if not should_convert_module(name.removeprefix(f"{prefix}."), with_fp32(pretrained)):
            return "float32 whatever the model's dtype"
    if parts[-1] in ROUTERS:
        return "router"
    if HEADS.intersection(parts):
        return "task head"
    for depth, part in enumerate(parts):
        owner = type(model.get_submodule(".".join(parts[:depth])))
        if "router" in parts[:depth] or "router" in owner.__name__.lower():  # what it is made of (Gemma 4, JetMoE)
            return "router"
        if part.startswith("lora_") or (root_of(owner) == "peft" and part not in NOT_ADAPTERS):
            return "adapter"
    if isinstance(module, nn.Linear) and module.in_features <= COORDINATES:
        return f"takes {module.in_features} features, as of coordinates"
    return ""
