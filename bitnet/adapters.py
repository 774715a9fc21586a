"""Low-rank adapters (LoRA, arXiv 2106.09685; rsLoRA, arXiv 2312.03732) beside packed layers, through PEFT.

    y = packed(x) + scaling * B (A (dropout(x)))

The packed weight stays as it is; only A and B are trained. PEFT has no entry point for others' layers, so importing
bitnet has `register` run whenever PEFT's LoRA is imported: get_peft_model, PeftModel.from_pretrained and transformers'
load_adapter then know packed layers, by name and as "all-linear". This module needs PEFT; nothing else here does.
"""

import re
import warnings
from typing import Any

from peft.tuners import tuners_utils
from peft.tuners.lora.layer import Linear
from torch import nn

from .experts import PackedExperts
from .packed import PackedBitLinear, PackedEmbedding

FRESH = (True, False, None, "gaussian")  # values of init_lora_weights that look at no base weight
MERGING = (
    "an adapter cannot be merged into a packed weight, whose steps are larger than most of what an adapter adds; serve "
    "it beside the packed layers, or see what bitnet.merge_adapter, which quantizes anew, leaves of it"
)
_PACKED = (PackedBitLinear, PackedExperts, PackedEmbedding)


class PackedLoraLinear(Linear):
    """A packed layer and its adapters. PEFT tells adapters of linear layers by the end of their class's name."""

    def __init__(self, base_layer: PackedBitLinear, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # whose features it then finds all the same
            super().__init__(base_layer, *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: see convert.swap.merge."""
        raise ValueError(MERGING)

    def unmerge(self) -> None:
        """There is nothing to do, since nothing is ever merged."""


def register(lora: Any) -> None:
    """Teach PEFT's LoRA about packed layers; lora: the module peft.tuners.lora.model, which has just been imported."""
    prepare, create, check_merge = (
        getattr(lora.LoraModel, name) for name in ("_prepare_model", "_create_new_module", "_check_merge_allowed")
    )

    def prepare_model(self: Any, config: Any, model: nn.Module) -> None:
        targets = config.target_modules
        everything = isinstance(targets, str) and targets.lower() == "all-linear"
        packed = {name: module for name, module in model.named_modules() if isinstance(module, _PACKED)}
        for name, module in packed.items():
            refuse_saved(name, module, config)
            if isinstance(module, PackedExperts):
                named = any(
                    f".{name}.{m.parameter}".endswith(f".{t}") for m in module.stacks for t in parameters(config)
                )
            else:
                named = everything and isinstance(module, PackedBitLinear)
            if named or self._check_target_module_exists(config, name.removesuffix(".base_layer")):
                refuse_target(name, module, config)
        prepare(self, config, model)
        if packed and everything:
            tuners_utils._maybe_include_all_linear_layers(config, model)
            head = getattr(model, "get_output_embeddings", lambda: None)()
            linear = {name for name, module in model.named_modules() if isinstance(module, PackedBitLinear)}
            names = {name for name in linear if model.get_submodule(name) is not head}
            config.target_modules |= {name for name in names if not name.endswith(".base_layer")}  # has one already

    def create_new_module(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(target, PackedBitLinear):
            return PackedLoraLinear(target, adapter_name, config=config, **kwargs)
        made: nn.Module = create(config, adapter_name, target, **kwargs)
        return made

    def check_merge_allowed(self: Any) -> None:  # before the first layer, also of those that PEFT could merge
        if any(isinstance(module, PackedLoraLinear) for module in self.model.modules()):
            raise ValueError(MERGING)
        check_merge(self)

    lora.LoraModel._prepare_model, lora.LoraModel._check_merge_allowed = prepare_model, check_merge_allowed
    lora.LoraModel._create_new_module = staticmethod(create_new_module)


def parameters(config: Any) -> tuple[str, ...]:
    """What a config names as target_parameters."""
    return tuple(config.target_parameters or ())


def refuse_saved(name: str, module: nn.Module, config: Any) -> None:
    """Raise ValueError if a config has a copy of a packed module trained in full."""
    kept = "embedding" if isinstance(module, PackedEmbedding) else "layer"
    for saved in config.modules_to_save or ():
        if re.fullmatch(rf"(.*\.)?{saved}(\..*)?", name):
            raise ValueError(
                f"modules_to_save={saved!r} has {name}, a packed {kept}, which cannot be trained; name layers in "
                "target_modules instead"
            )
    if config.trainable_token_indices and isinstance(module, PackedEmbedding):
        raise ValueError(
            f"trainable_token_indices: {name} is an int8 embedding, which cannot be trained; pack without head='int8'"
        )


def refuse_target(name: str, module: nn.Module, config: Any) -> None:
    """Raise ValueError for a packed module that takes no adapter, or not one of this kind."""
    if isinstance(module, PackedExperts):
        raise ValueError(
            f"{name} are packed experts, which take no adapters: PEFT adds theirs to float weights; target other "
            "layers, those of the attention say"
        )
    if isinstance(module, PackedEmbedding):
        raise ValueError(f"{name} is an int8 embedding, which takes no adapter; pack without head='int8'")
    if config.use_dora:
        raise ValueError(
            f"use_dora=True needs the norms of the float weight's rows, which {name}, a packed layer, does not have; "
            "use_rslora=True is for packed layers, too, or train DoRA beside the float model"
        )
    others = [option for option in ("kasa_config", "use_bdlora") if getattr(config, option, None)]
    if config.init_lora_weights not in FRESH:
        others.append(f"init_lora_weights={config.init_lora_weights!r}")
    if others:
        raise ValueError(
            f"{others[0]} starts from the float weight, which {name}, a packed layer, does not have; leave it out, or "
            "take init_lora_weights=True or 'gaussian'"
        )
    if config.bias != "none" and module.bias is not None:
        raise ValueError(
            f"bias={config.bias!r} trains biases of the layers themselves, and that of {name}, a packed layer, cannot "
            "be trained; take lora_bias=True, a bias of the adapter's own"
        )
