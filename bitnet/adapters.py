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

from .packed import PackedBitLinear

FRESH = (True, False, None, "gaussian", "orthogonal")  # values of init_lora_weights that look at no base weight


class PackedLoraLinear(Linear):
    """A packed layer and its adapters. PEFT tells adapters of linear layers by the end of their class's name."""

    def __init__(self, base_layer: PackedBitLinear, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # whose features it then finds all the same
            super().__init__(base_layer, *args, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter; raises ValueError for kinds that need the float weight."""
        if config.use_dora:
            raise ValueError(
                "use_dora=True needs the norms of the float weight's rows, which a packed layer does not have; "
                "use_rslora=True is for packed layers, too, or train DoRA beside the float model"
            )
        if config.init_lora_weights not in FRESH:
            raise ValueError(
                f"init_lora_weights={config.init_lora_weights!r} changes the float weight, which a packed layer does "
                "not have; use True or 'gaussian'"
            )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused: see convert.swap.merge."""
        raise ValueError(
            "an adapter cannot be merged into a packed weight, whose steps are larger than most of what an adapter "
            "adds; serve it beside the packed layers, or see what bitnet.merge_adapter, which quantizes anew, leaves "
            "of it"
        )

    def unmerge(self) -> None:
        """There is nothing to do, since nothing is ever merged."""


def register(lora: Any) -> None:
    """Teach PEFT's LoRA about packed layers; lora: the module peft.tuners.lora.model, which has just been imported."""
    prepare, create = lora.LoraModel._prepare_model, lora.LoraModel._create_new_module

    def prepare_model(self: Any, config: Any, model: nn.Module) -> None:
        packed = {name for name, module in model.named_modules() if isinstance(module, PackedBitLinear)}
        for name in sorted(packed):
            if any(re.fullmatch(rf"(.*\.)?{saved}", name) for saved in config.modules_to_save or ()):
                raise ValueError(
                    f"modules_to_save has {name}, a packed layer, which cannot be trained; name it in target_modules"
                )
        prepare(self, config, model)
        targets = config.target_modules
        if packed and isinstance(targets, str) and targets.lower() == "all-linear":
            tuners_utils._maybe_include_all_linear_layers(config, model)
            head = getattr(model, "get_output_embeddings", lambda: None)()
            names = {name for name in packed if model.get_submodule(name) is not head}
            config.target_modules |= {name for name in names if not name.endswith(".base_layer")}  # has one already

    def create_new_module(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(target, PackedBitLinear):
            return PackedLoraLinear(target, adapter_name, config=config, **kwargs)
        made: nn.Module = create(config, adapter_name, target, **kwargs)
        return made

    lora.LoraModel._prepare_model, lora.LoraModel._create_new_module = prepare_model, staticmethod(create_new_module)
