"""From a float model and a checkpoint's config to a model with its low-bit layers, filled."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from bitnet.experts import PackedExperts, PackedStack
from bitnet.kernels import layout
from bitnet.kernels.cpu import pages
from bitnet.linear import BitLinear
from bitnet.packed import PackedBitLinear, PackedEmbedding
from bitnet.packing import to_packed

from ..files.safetensors import TensorHeader
from ..swap.kinds import HEADS, misfit, settle_fast_paths, to_training
from .compare import compare_layer, compare_merged
from .config import EXTENDED, BitNetConfig, candidates, with_fp32
from .match import misfits
from .names import merged, model_names
from .values import float_codes


def swap_for_loading(model: nn.Module, config: BitNetConfig, headers: dict[str, TensorHeader] | None = None) -> None:
    """Put the layers that `config` describes into a freshly built model, usually on the meta device.

    headers: what the checkpoint holds; where it contradicts the config, one ValueError says which tensor and how.
    """
    skips = config.modules_to_not_convert
    if skips is not None and config.linear_class != EXTENDED:  # stock transformers would not swap these
        skips = with_fp32(model, skips)
    if skips is None and isinstance(model, PreTrainedModel):
        skips = BitNetHfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    # The weights of a task model, loaded into its bare base model, get names without a prefix: not compared.
    comparable = headers is not None and any(f"{name}.weight" in headers for name, _ in model.named_modules())
    parts = merged(model, headers) if comparable and headers else {}
    for name, module in candidates(model, linear_only=config.linear_class != EXTENDED):
        stored = None
        if comparable and headers:
            stored = headers.get(f"{name}.weight") or headers.get(f"{name}.packed_down_proj.weight")
        if not should_convert_module(name, skips):
            if stored and stored.dtype in ("U8", "I8"):
                raise ValueError(
                    f"config.json keeps {name} as it is (modules_to_not_convert), but {stored.file.name} holds packed "
                    f"bytes for it; one of the two is wrong"
                )
            continue
        if headers is not None and _is_new(model, name, headers):
            continue
        packed, spec = config.layer(name)
        if why := misfit(module, spec):
            raise ValueError(f"config.json gives {name} options it cannot have: {why}")
        layer = to_training(module, spec)
        if packed and stored and stored.dtype != "U8" and config.linear_class == "autobitlinear":
            # the codes as floats, which finish_loading packs
            layer.register_buffer("weight_scale", torch.ones(1, device=layer.get_parameter("weight").device))
        elif packed:
            to_packed(layer)
            _as_stored(module, config)
            if isinstance(layer, PackedExperts):  # which some blocks initialize, under names that are gone
                vars(model.get_submodule(name.rpartition(".")[0]))["_is_hf_initialized"] = True
        if comparable and headers is not None:
            # a tied head's weight is stored under the embedding's name
            tied = config.embedding and isinstance(model, PreTrainedModel) and module is model.get_output_embeddings()
            compare_layer(name, module, headers, parts, bool(tied))
    settle_fast_paths(model)
    if config.embedding is not None:
        found = dict(model.named_modules()).get(config.embedding)
        if not isinstance(found, nn.Embedding):
            raise ValueError(
                f"config.json says that {config.embedding!r:.80} is the packed embedding, but the model has none there"
            )
        embedding = PackedEmbedding.from_embedding(found, config.embedding_spec)
        _as_stored(embedding, config)
        if comparable and headers is not None:
            compare_layer(config.embedding, embedding, headers)
    if comparable and headers is not None:  # shapes are transformers' to compare, which may be told not to
        entries = {name: (header.dtype, header.shape) for name, header in headers.items()}
        if line := next(misfits(model, entries, shapes=False), None):
            raise ValueError(line)


def _as_stored(module: nn.Module, config: BitNetConfig) -> None:
    """Give the packed layers in a module weights of the files' layout, until finish_loading."""
    for part in module.modules():
        if not isinstance(part, PackedBitLinear | PackedStack | PackedEmbedding):
            continue
        if (dense := layout.dense(config.weight_bits, part.spec.weights)) is not None:
            shape = *part.weight.shape[:-2], part.out_features, -(-part.in_features // dense.per_byte)
            part.weight = torch.empty(shape, dtype=torch.uint8, device=part.weight.device)


_CHECKS = ContextVar("_CHECKS", default=True)


@contextmanager
def prepacked_next() -> Iterator[None]:
    """In here finish_loading leaves the values to check_values(name, module, PackedBitLinear.prepack), which reads them
    anyway."""
    token = _CHECKS.set(False)
    try:
        yield
    finally:
        _CHECKS.reset(token)


def finish_loading(model: nn.Module, config: BitNetConfig) -> None:
    """Turn stored scales into ours and check every packed layer's values; raises ValueError naming the layer."""
    divides = config.linear_class != "autobitlinear"
    for name, module in list(model.named_modules()):
        if isinstance(module, BitLinear) and hasattr(module, "weight_scale"):
            module = _pack_float_codes(name, module)
        elif not isinstance(module, PackedBitLinear | PackedStack | PackedEmbedding):
            continue
        elif divides and module.spec.group_size is None:
            module.weight_scale = 1 / module.weight_scale.float()
        if module.weight.is_meta:
            continue
        if (dense := layout.dense(config.weight_bits, module.spec.weights)) is not None:
            try:
                module.weight = dense.to_hub(module.weight, module.in_features)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        # of an embedding the head, which has the same weight, is checked
        if _CHECKS.get() and not isinstance(module, PackedEmbedding):
            check_values(name, module, _check)


def check_values(name: str, module: PackedBitLinear | PackedStack, check: Callable[[PackedBitLinear], object]) -> None:
    """Call check with each layer of a packed module; raises its ValueError with the layer's name."""
    for expert, layer in enumerate(module.layers() if isinstance(module, PackedStack) else [module]):
        where = f"{name}, expert {expert}" if isinstance(module, PackedStack) else name
        if layer.weight.dtype == torch.uint8 and not (bool(layer.weight[0].any()) or bool(layer.weight.any())):
            warnings.warn(
                f"{where}: every packed byte is zero, which means every weight is -1; the checkpoint is "
                "probably damaged (some uploads are)",
                stacklevel=2,
            )
        try:
            check(layer)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def _check(layer: PackedBitLinear) -> None:
    layer.check()
    if layer.weight.is_cpu:  # read again when the backend makes its own form of it
        pages.drop(layer.weight)


def _is_new(model: nn.Module, name: str, headers: Iterable[str]) -> bool:
    """Is it a head that a task adds to a checkpoint without one? It has to be trained, in float."""
    if f"{name}.weight" in headers or f"{name}.weight_scale" in headers:
        return False
    if isinstance(model, PreTrainedModel) and model.base_model is not model:
        return not name.startswith(f"{model.base_model_prefix}.")
    return bool(HEADS.intersection(name.split(".")))


def compare_all(
    directory: str | Path, model: nn.Module, headers: dict[str, TensorHeader], settings: dict[str, Any] | None = None
) -> None:
    """Raise ValueError for a tensor of the model that is stored as another kind of number or in another shape.

    settings: quantization_config as in config.json: of which layers a float model's are to be; on the meta device
    """
    try:
        names = model_names(model, headers) if isinstance(model, PreTrainedModel) else {key: key for key in headers}
        named = {name: headers[key] for key, name in names.items()}
        if settings is not None and settings["quant_method"] == "bitnet":
            swap_for_loading(model, BitNetConfig.from_dict(settings), named)
        made = merged(model, named)
        stored = {name: (header.dtype, header.shape) for name, header in named.items() if name not in made}
        if line := next(misfits(model, stored), None):
            raise ValueError(line)
        compare_merged(model, named, made)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def _pack_float_codes(name: str, layer: BitLinear) -> PackedBitLinear:
    try:
        codes = float_codes(layer.weight.detach())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    packed, scale = layout.pack_ternary(codes), layer.get_buffer("weight_scale").float()
    del layer.weight_scale
    return PackedBitLinear.from_bit_linear(layer, packed, scale)
