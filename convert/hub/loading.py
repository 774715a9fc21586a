"""The Hugging Face `bitnet` checkpoint format: config, scale direction, quantizer. Every quirk lives here.

Three stock forms, all of `quant_method: bitnet`, read and (the first two) written:

    linear_class    quantization_mode   weight                   weight_scale          our layer
    bitlinear       -                   uint8 [N/4, K] packed    stored as 1 / scale   PackedBitLinear
    autobitlinear   online              float [N, K] latent      -                     BitLinear
    autobitlinear   offline             uint8 packed, or the     stored as scale       PackedBitLinear
                                        codes as floats

Models that stock transformers cannot express (per-row scales, other activation bits, binary latent weights,
N % 4 != 0, int8 heads, layers with different options, low-bit Conv1D or fused experts) carry EXTENDED as linear_class:
stock transformers refuses it with a message that names this package. Their options stand under "bitnet_toolkit".
weight_scale is stored as 1 / scale there too. `"bits": 1.6` in that section means that packed weights are stored in the
base-3 layout (kernels/layout.py), uint8 [N, ceil(K/5)]; in memory they are always in the Hub's.

In stock forms only nn.Linear layers are low-bit; in EXTENDED also GPT-2's Conv1D and fused experts, unless
modules_to_not_convert has their name. Their tensors:

                       latent                                      packed
    Conv1D             weight [K, N], as in any GPT-2 checkpoint   weight uint8 [ceil(N/4), K], weight_scale [1] or [N]
    experts            as in any checkpoint of the family: the     packed_gate_up_proj.weight uint8 [E, ceil(2I/4), H],
                       stacks gate_up_proj and down_proj, or one   .weight_scale [E] ([E, 2I] per_row), .bias [E, 2I];
                       tensor an expert, which transformers        packed_down_proj likewise (ceil(H/4), I, [E, H])
                       merges on load and splits on save

Latent tensors are thus those of the float model: without quantization_config in config.json, it loads from them.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from math import prod
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import BitNetQuantConfig

from bitnet.experts import PackedExperts, PackedStack, to_packed
from bitnet.kernels import layout
from bitnet.linear import BitLayer, BitLinear
from bitnet.packed import PackedBitLinear, PackedEmbedding
from bitnet.quantize import QuantSpec

from ..files.damaged import Damaged
from ..files.folder import inside
from ..files.safetensors import TensorHeader, read_headers
from ..swap.head import has_int8_head, to_float_head
from ..swap.kinds import HEADS, settle_fast_paths, swappable, to_training
from .match import leftovers, misfits
from .options import check_options, check_section

EXTENDED = "bitnet_toolkit: this checkpoint needs `pip install bitnet-toolkit` and `import bitnet`"


class BitNetConfig(BitNetQuantConfig):
    """transformers' BitNetQuantConfig, and our options where linear_class is EXTENDED.

    bitnet_toolkit: {"packed": bool, "spec": QuantSpec fields, "overrides": {module name: the same two keys},
                     "bits": 2 or 1.6, of packed weights in the files; 2 where it is missing,
                     "embedding": name of the int8 embedding tied to the head, or null}
    """

    def __init__(self, linear_class: str = "bitlinear", bitnet_toolkit: Any = None, **kwargs: Any) -> None:
        check_options(linear_class, **kwargs)
        extended = linear_class.startswith("bitnet_toolkit")
        super().__init__(linear_class="bitlinear" if extended else linear_class, **kwargs)
        if extended:
            self.linear_class = EXTENDED
            self.bitnet_toolkit = bitnet_toolkit
            check_section(bitnet_toolkit)

    @property
    def bits(self) -> float:
        """Bits a packed weight takes in the files."""
        return self.bitnet_toolkit.get("bits", 2) if self.linear_class == EXTENDED else 2

    @property
    def embedding(self) -> str | None:
        """The int8 embedding tied to the head."""
        return self.bitnet_toolkit.get("embedding") if self.linear_class == EXTENDED else None

    def layer(self, name: str) -> tuple[bool, QuantSpec]:
        """(is it packed, its options) for the swapped layer `name`."""
        if self.linear_class == EXTENDED:
            section = self.bitnet_toolkit["overrides"].get(name, self.bitnet_toolkit)
            return section["packed"], QuantSpec(**section["spec"])
        packed = self.linear_class == "bitlinear" or self.quantization_mode == "offline"
        norm = {"rms_norm": True, "rms_norm_eps": self.rms_norm_eps} if self.use_rms_norm else {}
        return packed, QuantSpec(**norm)


# from_pretrained(quantization_config=...) refuses a config whose class has another name than the checkpoint's.
BitNetConfig.__name__ = BitNetQuantConfig.__name__


def modernize(config: dict[str, Any], keys: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """config.json and tensor names of a checkpoint as transformers' own classes have them; most are left as they are.

    keys: the names in the files; returns the config and, for each name kept, the name in the model

    The 1bitLLM/bitnet_b1_58-* checkpoints were made for code of their own: float latent weights under
    `model_type: llama`, with norms before o_proj and down_proj (the BitNet paper's SubLN) that Llama lacks. They are
    `bitnet` models under other names, with SiLU instead of ReLU^2.
    """
    names = {key: key for key in keys}
    if not any(key.endswith(".self_attn.inner_attn_ln.weight") for key in names):
        return config, names
    if (config.get("weight_bits"), config.get("input_bits")) != (1, 8):
        found = f"weight_bits {config.get('weight_bits')!r} and input_bits {config.get('input_bits')!r}"
        raise ValueError(f"config.json has {found}; of the 1bitLLM checkpoints, those with 1 and 8 are known")
    ours = {key: config[key] for key in config if key not in ("auto_map", "weight_bits", "input_bits", "rope_theta")}
    ours |= {"model_type": "bitnet", "architectures": ["BitNetForCausalLM"]}
    ours["rope_parameters"] = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    skips = {"modules_to_not_convert": ["lm_head"]}
    ours["quantization_config"] = BitNetConfig("autobitlinear", quantization_mode="online", **skips).to_dict()
    norms = {"self_attn.inner_attn_ln": "self_attn.attn_sub_norm", "mlp.ffn_layernorm": "mlp.ffn_sub_norm"}
    for old, new in norms.items():
        names = {key: name.replace(old, new) for key, name in names.items()}
    return ours, {key: name for key, name in names.items() if not name.endswith("rotary_emb.inv_freq")}


def config_of(model: nn.Module, bits: float = 2) -> BitNetConfig | None:
    """The config that rebuilds a model's low-bit layers, in a stock form if there is one; None if it has none.

    bits: what a packed weight takes in the files: 2, or 1.6, which only this package reads
    """
    layers: dict[str, tuple[bool, QuantSpec]] = {}
    ours_only = False  # is there a layer that stock transformers would leave float, or has no room for?
    for name, module in model.named_modules():
        if isinstance(module, BitLayer):
            layers[name] = False, module.spec
            ours_only |= not isinstance(module, BitLinear)
        elif isinstance(module, PackedBitLinear | PackedExperts):
            layers[name] = True, module.spec
            ours_only |= isinstance(module, PackedExperts) or module.transposed or module.out_features % 4 != 0
    if not layers:
        return None
    (packed, spec), _ = Counter(layers.values()).most_common(1)[0]
    skips = _skip_patterns(model, layers)
    overrides = {name: layer for name, layer in layers.items() if layer != (packed, spec)}
    stock = (
        bits == 2
        and not overrides
        and not ours_only
        and not spec.per_row
        and spec.activation_bits == 8
        and (spec.weights == "ternary" or (packed and spec.weights == "binary"))
        and all(should_convert_module(name, _with_fp32(model, skips)) for name in layers)
    )
    common: dict[str, Any] = {"modules_to_not_convert": skips}
    if stock:
        common |= {"use_rms_norm": spec.rms_norm, "rms_norm_eps": spec.rms_norm_eps}
        if packed:
            return BitNetConfig("bitlinear", **common)
        return BitNetConfig("autobitlinear", quantization_mode="online", **common)
    section: dict[str, Any] = {"packed": packed, "spec": asdict(spec), "bits": bits}
    section["embedding"] = next((name for name, m in model.named_modules() if isinstance(m, PackedEmbedding)), None)
    section["overrides"] = {name: {"packed": p, "spec": asdict(s)} for name, (p, s) in overrides.items()}
    return BitNetConfig(EXTENDED, bitnet_toolkit=section, **common)


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


def attach(model: nn.Module, bits: float = 2) -> None:
    """Bring the configs of the Hugging Face models in a module in line with their layers.

    Their save_pretrained then writes what from_pretrained rebuilds, whatever wraps them.
    """
    for inner in outermost(model).values():
        _attach(inner, bits)


def _attach(model: PreTrainedModel, bits: float) -> None:
    config = config_of(model, bits)
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
    # Latent weights save as they are, and Trainer should treat their model like any other.
    model.is_quantized = packed
    model.hf_quantizer = BitNetQuantizer(config) if packed else None
    if "resize_token_embeddings" in vars(model):
        del model.resize_token_embeddings
    if has_int8_head(model):
        model.resize_token_embeddings = MethodType(_resize_token_embeddings, model)


def _resize_token_embeddings(
    model: PreTrainedModel,
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> nn.Module:
    """transformers' method, for a model with an int8 head, which it finds float."""
    if new_num_tokens not in (None, model.get_input_embeddings().weight.shape[0]) or pad_to_multiple_of is not None:
        to_float_head(model)
        attach(model)
        warnings.warn(
            "the int8 head is float again, for its new tokens; bitnet.pack(model, head='int8') packs it", stacklevel=2
        )
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *args, **kwargs)


def swap_for_loading(model: nn.Module, config: BitNetConfig, headers: dict[str, TensorHeader] | None = None) -> None:
    """Put the layers that `config` describes into a freshly built model, usually on the meta device.

    headers: what the checkpoint holds; where it contradicts the config, one ValueError says which tensor and how.
    """
    skips = _with_fp32(model, config.modules_to_not_convert) if config.modules_to_not_convert is not None else None
    if skips is None and isinstance(model, PreTrainedModel):
        skips = BitNetHfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    # The weights of a task model, loaded into its bare base model, get names without a prefix: not compared.
    comparable = headers is not None and any(f"{name}.weight" in headers for name, _ in model.named_modules())
    parts = merged(model, headers) if comparable and headers else {}
    for name, module in _swappable(model, linear_only=config.linear_class != EXTENDED):
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
        layer = to_training(module, spec)
        if packed and stored and stored.dtype != "U8" and config.linear_class == "autobitlinear":
            # the codes as floats, which finish_loading packs
            layer.register_buffer("weight_scale", torch.ones(1, device=layer.get_parameter("weight").device))
        elif packed:
            to_packed(layer)
            if config.bits == 1.6 and spec.weights != "int8":  # until finish_loading
                for part in module.modules():
                    if isinstance(part, PackedBitLinear | PackedStack):
                        shape = *part.weight.shape[:-2], part.out_features, -(-part.in_features // 5)
                        part.weight = torch.empty(shape, dtype=torch.uint8, device=part.weight.device)
        if comparable and headers is not None:
            # a tied head's weight is stored under the embedding's name
            _compare(name, module, headers, parts, tied=config.embedding is not None and spec.weights == "int8")
    settle_fast_paths(model)
    if config.embedding is not None:
        found = dict(model.named_modules()).get(config.embedding)
        if not isinstance(found, nn.Embedding):
            raise ValueError(
                f"config.json says that {config.embedding!r:.80} is the int8 embedding, but the model has none there"
            )
        embedding = PackedEmbedding.from_embedding(found)
        if comparable and headers is not None:
            _compare(config.embedding, embedding, headers)
    if comparable and headers is not None:  # shapes are transformers' to compare, which may be told not to
        entries = {name: (header.dtype, header.shape) for name, header in headers.items()}
        if line := next(misfits(model, entries, shapes=False), None):
            raise ValueError(line)


def finish_loading(model: nn.Module, config: BitNetConfig) -> None:
    """Turn stored scales into ours and check every packed layer's values; raises ValueError naming the layer."""
    divides = config.linear_class != "autobitlinear"
    for name, module in list(model.named_modules()):
        if isinstance(module, BitLinear) and hasattr(module, "weight_scale"):
            module = _pack_float_codes(name, module)
        elif not isinstance(module, PackedBitLinear | PackedStack | PackedEmbedding):
            continue
        elif divides:
            module.weight_scale = 1 / module.weight_scale.float()
        if module.weight.is_meta or isinstance(module, PackedEmbedding):
            continue
        where = name
        try:
            if config.bits == 1.6 and module.weight.dtype == torch.uint8:
                module.weight = _hub_from_base3(module.weight, module.in_features)
            for expert, layer in enumerate(module.layers() if isinstance(module, PackedStack) else [module]):
                where = f"{name}, expert {expert}" if isinstance(module, PackedStack) else name
                layer.check()
                if layer.weight.dtype == torch.uint8 and not bool(layer.weight.any()):
                    warnings.warn(
                        f"{where}: every packed byte is zero, which means every weight is -1; the checkpoint is "
                        "probably damaged (some uploads are)",
                        stacklevel=2,
                    )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def stored_codes(
    weight: Tensor, scale: Tensor, in_features: int, out_features: int, config: BitNetConfig
) -> tuple[Tensor, Tensor]:
    """What the files hold for a packed layer, as int8 codes [N, K] and the float32 scale that multiplies.

    Raises ValueError for a scale that is not positive and finite, and for bytes or floats that encode no code.
    """
    scale = scale.float().reshape(-1)
    scale = scale if config.linear_class == "autobitlinear" else 1 / scale
    if not bool(((scale > 0) & scale.isfinite()).all()):
        raise ValueError("weight_scale must be positive and finite; the checkpoint is corrupt or incomplete")
    if weight.is_floating_point():
        return _float_codes(weight), scale
    if config.bits == 1.6 and weight.dtype == torch.uint8:
        return layout.unpack_base3(weight, in_features), scale
    if weight.dtype == torch.uint8:
        layout.validate_packed(weight)
    return layout.codes_of(weight, out_features), scale


def stored_state(model: nn.Module, bits: float = 2) -> dict[str, Tensor]:
    """model.state_dict() as it goes to disk: packed scales as 1 / scale, packed weights in `bits` bits."""
    state = model.state_dict()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedBitLinear | PackedStack | PackedEmbedding):
            prefix = f"{name}." if name else ""
            state[f"{prefix}weight_scale"] = stored_scale(module.weight_scale)
            if bits == 1.6 and module.weight.dtype == torch.uint8 and not isinstance(module, PackedEmbedding):
                codes = module.codes()
                state[f"{prefix}weight"] = layout.pack_base3(codes.flatten(0, -2)).view(*codes.shape[:-1], -1)
    return state


def stored_scale(scale: Tensor) -> Tensor:
    """The float32 r with 1 / r == scale for every scale that was made as 1 / inv, as trained ones are.

    1 / (1 / (1 / inv)) == 1 / inv holds in IEEE arithmetic; the tests try every float32 of a binade.
    """
    return 1 / scale


class BitNetQuantizer(BitNetHfQuantizer):
    """transformers' hook into from_pretrained and save_pretrained, with our layers instead of its own."""

    quantization_config: BitNetConfig

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
        if embedding := self.quantization_config.embedding:
            # transformers ties Parameters while loading, and these are buffers: tied afterwards
            self.ties = {t: s for t, s in model.all_tied_weights_keys.items() if s == f"{embedding}.weight"}
            for target in self.ties:
                del model.all_tied_weights_keys[target]
            known = model._keys_to_ignore_on_load_missing or []
            model._keys_to_ignore_on_load_missing = [*known, *map(re.escape, self.ties)]
        files = [Path(file) for file in checkpoint_files or [] if file.endswith(".safetensors")]
        for file in files:
            if file.parent != files[0].parent or ".." in file.parts or not inside(file.parent, file):
                raise Damaged(file, "is no file of the checkpoint's folder, though the index names it")
        headers = read_headers(files)
        named = {name: headers[key] for key, name in model_names(model, headers).items()}
        swap_for_loading(model, self.quantization_config, named or None)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.quantization_config.embedding:
            model.all_tied_weights_keys |= self.ties
            model.tie_weights(recompute_mapping=False)
        finish_loading(model, self.quantization_config)
        attach(model)
        return model

    def get_weight_conversions(self) -> list[Any]:
        return []  # our layers' buffers have the names and the contents of the stored tensors

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor], dict[str, str]]:
        return stored_state(model, self.quantization_config.bits), {}

    @property
    def is_trainable(self) -> bool:
        return True  # adapters beside packed layers

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from ..swap.unpack import unpack

        unpack(model, dtype)
        return model


def _is_new(model: nn.Module, name: str, headers: Iterable[str]) -> bool:
    """Is it a head that a task adds to a checkpoint without one? It has to be trained, in float."""
    if f"{name}.weight" in headers or f"{name}.weight_scale" in headers:
        return False
    if isinstance(model, PreTrainedModel) and model.base_model is not model:
        return not name.startswith(f"{model.base_model_prefix}.")
    return bool(HEADS.intersection(name.split(".")))


def _swappable(model: nn.Module, linear_only: bool = False) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (swappable(module) and not linear_only)
    ]


def model_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """The names the model has for stored tensors, as from_pretrained finds them; what it drops is left out.

    Checkpoints of some families (ViT) keep older names, and some (gpt2, bloom) those of the base model, without its
    prefix; a task model's tensors have one that the base model lacks. Raises ValueError for two tensors of one name.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    state, modules = model.state_dict(), {name for name, _ in model.named_modules()}

    def fits(name: str) -> bool:  # a tensor of the model, or of what a module of it is once it is low-bit
        owner, _, leaf = name.rpartition(".")
        parts = leaf in ("weight_scale", "bias", "weight") and owner.rpartition(".")[2].startswith("packed_")
        return (
            name in state
            or (leaf == "weight_scale" and owner in modules)
            or (parts and owner.rpartition(".")[0] in modules)
        )

    names: dict[str, str] = {}
    prefix, dropped = f"{model.base_model_prefix}.", leftovers(model)
    for key in sorted(keys):
        name = key if fits(key) else rename_source_key(key, renamings, [])[0]
        if not fits(name) and prefix != ".":
            bare = name.removeprefix(prefix)
            name = bare if bare != name and fits(bare) else f"{prefix}{name}" if fits(f"{prefix}{name}") else name
        if name in state or dropped is None or not dropped.search(name):
            names[key] = name
    if len({*names.values()}) < len(names):
        name, _ = Counter(names.values()).most_common(1)[0]
        twins = [key for key in names if names[key] == name]
        raise ValueError(f"the checkpoint holds {' and '.join(twins)}, which are one tensor of the model")
    return names


def stored_name(model: PreTrainedModel, key: str) -> str:
    """The name that save_pretrained gives a tensor of the model: model_names the other way."""
    transforms = get_model_conversion_mapping(model, add_legacy=False)[::-1]
    renamings = [t for t in transforms if isinstance(t, WeightRenaming) and not isinstance(t, PrefixChange)]
    return rename_source_key(key, [transform.reverse_transform() for transform in renamings], [])[0]


def merged(model: nn.Module, headers: Iterable[str]) -> dict[str, list[str]]:
    """The parameters that transformers merges from several tensors (an expert each) on load, and those tensors."""
    found: dict[str, list[str]] = {}
    if isinstance(model, PreTrainedModel):
        converters = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightConverter)]
        for key in sorted(headers, key=dot_natural_key):  # expert 10 after expert 9
            target, pattern = rename_source_key(key, [], converters)
            if pattern is not None:
                found.setdefault(target, []).append(key)
    return found


def merge(model: PreTrainedModel, target: str, parts: dict[str, Callable[[], Tensor]]) -> Tensor:
    """One of the parameters that `merged` finds, made of its tensors as transformers does; parts: how to read them."""
    converters = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightConverter)]
    for converter in converters:
        for key, read in parts.items():
            name, pattern = rename_source_key(key, [], [converter])
            if pattern is not None:
                converter.add_tensor(name, key, pattern, read)
        if converter.collected_tensors:
            found = converter.convert(target, model=model, config=model.config)[target]
            return found[0] if isinstance(found, list) else found
    raise KeyError(target)


def module_config(file: Path, config: dict[str, Any]) -> BitNetConfig:
    """The layers of a plain module, by the config.json that bitnet.save wrote with it."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        raise ValueError(
            f"{file}: has no quantization_config, so no low-bit layers to put into the module; float weights load with "
            "torch's load_state_dict, and a Hugging Face model with bitnet.load(path)"
        )
    return BitNetConfig.from_dict(settings)


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
        stored = {name: (header.dtype, header.shape) for name, header in named.items()}
        if line := next(misfits(model, stored), None):
            raise ValueError(line)
        compare_merged(model, named)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def compare_merged(model: nn.Module, headers: dict[str, TensorHeader]) -> None:
    """Raise ValueError for a stack of experts that its stored parts, an expert each, do not make up."""
    state, found = model.state_dict(), merged(model, headers)
    for key, parts in found.items():
        if key in state and any(".experts." in part for part in parts):
            compare_parts(key, state[key], {part: headers[part] for part in parts})


def _with_fp32(model: nn.Module, patterns: list[str]) -> list[str]:
    return [*patterns, *(getattr(model, "_keep_in_fp32_modules", None) or [])]


def _skip_patterns(model: nn.Module, swapped: dict[str, Any]) -> list[str]:
    """modules_to_not_convert: few patterns, each anchored, that cover the kept layers and no swapped one."""
    patterns: list[str] = []
    for name, _ in _swappable(model):
        if name in swapped or not should_convert_module(name, patterns):
            continue
        exact = re.escape(name) + "$"
        for pattern in (name, re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", exact), exact):
            if "." in pattern.replace("\\.", "") or all(should_convert_module(other, [pattern]) for other in swapped):
                if pattern == name and "." in name:
                    continue  # a dotted name would be read as an unanchored regular expression
                patterns.append(pattern)
                break
    return patterns


def _compare(
    name: str,
    module: nn.Module,
    headers: dict[str, TensorHeader],
    merged: dict[str, list[str]] | None = None,
    tied: bool = False,
) -> None:
    dtypes = {torch.uint8: "U8", torch.int8: "I8"}
    for leaf, tensor in module.state_dict().items():
        stored = headers.get(f"{name}.{leaf}")
        if stored is None and (parts := (merged or {}).get(f"{name}.{leaf}")):
            compare_parts(f"{name}.{leaf}", tensor, {part: headers[part] for part in parts})
            continue
        if stored is None and tied and leaf == "weight":
            continue
        if stored is None:
            raise ValueError(
                f"config.json says {name} is {type(module).__name__}, but the checkpoint has no tensor {name}.{leaf}"
            )
        expected = dtypes.get(tensor.dtype)
        ok = stored.dtype == expected if expected else stored.dtype in ("F32", "BF16", "F16")
        if not ok or tuple(tensor.shape) != stored.shape:
            raise ValueError(
                f"{stored.file.name}: {name}.{leaf} is {stored.dtype} {list(stored.shape)}, but config.json says the "
                f"layer is {type(module).__name__}, which stores {expected or 'F32, BF16 or F16'} {list(tensor.shape)}"
            )


def _float_codes(weight: Tensor) -> Tensor:
    if not bool(((weight == 0) | (weight.abs() == 1)).all()):
        raise ValueError("quantization_mode is offline, but its weight holds values other than -1, 0, 1")
    return weight.to(torch.int8)


def compare_parts(name: str, stack: Tensor, parts: dict[str, TensorHeader]) -> None:
    """Do the tensors of single experts make up the stack? Those of one kind differ in the expert's number only."""
    kinds: dict[str, list[str]] = {}
    for part in parts:
        kinds.setdefault(re.sub(r"(?<=\.experts\.)\d+(?=\.)", "*", part), []).append(part)
    for kind, found in kinds.items():
        every = [kind.replace("*", str(expert)) for expert in range(len(stack))] if "*" in kind else []
        if missing := next((part for part in every if part not in parts), None):
            raise ValueError(f"the checkpoint has no tensor {missing}, a part of {name}")
        usual = Counter(parts[part].shape for part in found).most_common(1)[0][0]
        for part in found:
            dtype, shape, file, _ = parts[part]
            if dtype not in ("F32", "BF16", "F16") or shape != usual:
                raise ValueError(
                    f"{file.name}: {part} is {dtype} {list(shape)}, but as a part of {name} it must be F32, BF16 or "
                    f"F16 {list(usual)}"
                )
    if sum(prod(header.shape) for header in parts.values()) != stack.numel():
        raise ValueError(
            f"{name} is {list(stack.shape)}, which {', '.join(kinds)} in the checkpoint do not add up to: "
            f"{len(parts)} tensors of {', '.join(sorted({str(list(h.shape)) for h in parts.values()}))}"
        )


def _hub_from_base3(packed: Tensor, in_features: int) -> Tensor:
    """A stored base-3 weight [..., N, ceil(K/5)] in the Hub layout [..., ceil(N/4), K]."""
    if packed.ndim == 3:
        return torch.stack([_hub_from_base3(matrix, in_features) for matrix in packed])
    return layout.pack_ternary(layout.unpack_base3(packed, in_features))


def _pack_float_codes(name: str, layer: BitLinear) -> PackedBitLinear:
    try:
        codes = _float_codes(layer.weight.detach())
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    packed, scale = layout.pack_ternary(codes), layer.get_buffer("weight_scale").float()
    del layer.weight_scale
    return PackedBitLinear.from_bit_linear(layer, packed, scale)
