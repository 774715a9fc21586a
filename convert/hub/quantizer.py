"""transformers' hook into from_pretrained and save_pretrained, and what a model carries to be saved right."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer

from bitnet.decode.attach import attach_decoding
from bitnet.experts import PackedExperts
from bitnet.packed import PackedBitLinear

from ..files.damaged import Damaged
from ..files.folder import inside
from ..files.safetensors import read_headers
from ..swap.floats import packed_head, to_float_head, to_floats
from .config import BitNetConfig, config_of
from .legacy import inner_norms
from .loading import finish_loading, swap_for_loading
from .names import forget_names, keep_apart, model_names
from .values import stored_state
from .wrappers import outermost


def attach(model: nn.Module, weight_bits: float = 2) -> None:
    """Bring the configs of the Hugging Face models in a module in line with their layers.

    Their save_pretrained then writes what from_pretrained rebuilds, whatever wraps them.
    """
    for inner in outermost(model).values():
        _attach(inner, weight_bits)


def _attach(model: PreTrainedModel, weight_bits: float) -> None:
    config = config_of(model, weight_bits)
    packed = any(isinstance(module, PackedBitLinear | PackedExperts) for module in model.modules())
    if config is None:
        present = getattr(model.config, "quantization_config", None)
        if present is not None:
            method = present.get("quant_method") if isinstance(present, dict) else present.quant_method
            if method != "bitnet":
                return  # quantized by another method, which is not ours to undo
            del model.config.quantization_config
    else:
        model.config.quantization_config = config
    for part in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        if config is None:
            vars(part.config).pop("_is_quantized", None)
        else:  # as when it is loaded: some models compute otherwise then (FalconMamba's time steps), by an ulp
            part.config._is_quantized = True
    # Latent weights save as they are, and Trainer should treat their model like any other.
    model.is_quantized = packed
    model.hf_quantizer = BitNetQuantizer(config) if packed else None
    if "resize_token_embeddings" in vars(model):
        del model.resize_token_embeddings
    if packed_head(model):
        model.resize_token_embeddings = MethodType(_resize_token_embeddings, model)


def _resize_token_embeddings(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> nn.Module:
    """transformers' method, for a model with a packed head, which it finds float."""
    if new_num_tokens not in (None, model.get_input_embeddings().weight.shape[0]) or pad_to_multiple_of is not None:
        kind = packed_head(model)
        to_float_head(model)
        attach(model)
        warnings.warn(
            f"the {kind} head is float again, for its new tokens; bitnet.pack(model, head={kind!r}) packs it",
            stacklevel=2,
        )
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)


class BitNetQuantizer(BitNetHfQuantizer):
    """transformers' hook into from_pretrained and save_pretrained, with our layers instead of its own."""

    quantization_config: BitNetConfig
    inner_norms: Mapping[str, str] = MappingProxyType({})  # see legacy.py

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "packed layers cannot be offloaded to disk; they are an eighth of bf16, so use the CPU instead"
            )

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        return max_memory

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        spread = getattr(model.config, "distributed_config", None)
        for option in ("tp_size", "ep_size"):
            if (getattr(spread, option, None) or 1) > 1:
                raise ValueError(
                    f"{option}={getattr(spread, option)}: low-bit layers cannot be spread over processes by tensor or "
                    "expert parallelism, as the scale of a part of a weight is not the weight's; load the model whole "
                    "in each process, and to train it in many use DistributedDataParallel or fully_shard"
                )
        if embedding := self.quantization_config.embedding:
            # transformers ties Parameters while loading, and these are buffers: tied afterwards
            self.ties = {t: s for t, s in model.all_tied_weights_keys.items() if s == f"{embedding}.weight"}
            for target in self.ties:
                del model.all_tied_weights_keys[target]
            known = model._keys_to_ignore_on_load_missing or []
            model._keys_to_ignore_on_load_missing = [*known, *map(re.escape, self.ties)]
        files = [Path(file) for file in checkpoint_files or [] if file.endswith(".safetensors")]
        folder = Path(model.config._name_or_path)  # as the user named it, "../model" say
        for file in files:
            name = file.relative_to(folder) if file.is_relative_to(folder) else file
            if file.parent != files[0].parent or ".." in name.parts or not inside(file.parent, file):
                raise Damaged(file, "is no file of the checkpoint's folder, though the index names it")
        headers = read_headers(files)
        self.inner_norms = inner_norms(headers)
        headers = {self.inner_norms.get(key, key): header for key, header in headers.items()}
        named = {name: headers[key] for key, name in model_names(model, headers).items()}
        swap_for_loading(model, self.quantization_config, named or None)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.quantization_config.embedding:
            model.all_tied_weights_keys |= self.ties
            model.tie_weights(recompute_mapping=False)
        finish_loading(model, self.quantization_config)
        if self.quantization_config.embedding:
            model.tie_weights(recompute_mapping=False)  # again: weights of other layouts are new tensors now
        attach(model)
        forget_names(model, self.inner_norms)
        attach_decoding(model)
        return model

    def get_load_operations(self) -> dict[str, Any]:
        return {}  # transformers' own are not used, and importing them takes seconds: they are compiled by torch

    def get_weight_conversions(self) -> list[Any]:
        # else our layers' buffers have the names and the contents of the stored tensors
        return [WeightRenaming(f"^{re.escape(old)}$", new) for old, new in self.inner_norms.items()]

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        state = stored_state(model, self.quantization_config.weight_bits)
        keep_apart(model, [key for key in state if f"{key.rpartition('.')[0]}.weight_scale" in state])
        return state, {}

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside packed layers

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        to_floats(model, dtype)
        attach(model)
        return model
