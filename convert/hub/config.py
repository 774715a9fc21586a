"""The Hugging Face `bitnet` checkpoint format: config, scale direction, quantizer. Every quirk lives here.

Three stock forms, all of `quant_method: bitnet`, read and (the first two) written:

    linear_class    quantization_mode   weight                   weight_scale          our layer
    bitlinear       -                   uint8 [N/4, K] packed    stored as 1 / scale   PackedBitLinear
    autobitlinear   online              float [N, K] latent      -                     BitLinear
    autobitlinear   offline             uint8 packed, or the     stored as scale       PackedBitLinear
                                        codes as floats

Models that stock transformers cannot express (scales of rows or of groups of features, other activation bits, binary
latent weights, N % 4 != 0, int8 and int4 heads, layers with different options, low-bit Conv1D or fused experts) carry
EXTENDED as linear_class: stock transformers refuses it with a message that names this package. Their options stand
under "bitnet_toolkit".
weight_scale is stored as 1 / scale there too, but that of groups, float16 [N, ceil(K / group_size)], as it is.
Those of 4 bits are uint8 [N, ceil(K/32), 16].
`"bits": 1.6` in that section means that packed weights are stored in the base-3 layout (kernels/layout.py), uint8
[N, ceil(K/5)]; in memory they are always in the Hub's.

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
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import BitNetQuantConfig

from bitnet.experts import PackedExperts
from bitnet.linear import BitLayer, BitLinear
from bitnet.packed import PackedBitLinear, PackedEmbedding
from bitnet.quantize import QuantSpec

from ..swap.kinds import swappable
from .options import check_options, check_section

EXTENDED = "bitnet_toolkit: this checkpoint needs `pip install bitnet-toolkit` and `import bitnet`"


class BitNetConfig(BitNetQuantConfig):
    """transformers' BitNetQuantConfig, and our options where linear_class is EXTENDED.

    bitnet_toolkit: {"packed": bool, "spec": QuantSpec fields, "overrides": {module name: the same two keys},
                     "bits": 2, 1.6 or 1, of packed weights in the files; 2 where it is missing,
                     "embedding": name of the packed embedding tied to the head, or null,
                     "embedding_spec": its QuantSpec fields, those of the head; int8 with a scale a row where missing}
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
    def weight_bits(self) -> float:
        """Bits a packed weight takes in the files."""
        return self.bitnet_toolkit.get("bits", 2) if self.linear_class == EXTENDED else 2

    @property
    def embedding(self) -> str | None:
        """The packed embedding tied to the head."""
        return self.bitnet_toolkit.get("embedding") if self.linear_class == EXTENDED else None

    @property
    def embedding_spec(self) -> QuantSpec:
        """Its options."""
        return QuantSpec(**self.bitnet_toolkit.get("embedding_spec", {"weights": "int8", "per_row": True}))

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


def config_of(model: nn.Module, weight_bits: float = 2) -> BitNetConfig | None:
    """The config that rebuilds a model's low-bit layers, in a stock form if there is one; None if it has none.

    weight_bits: what a packed weight takes in the files: 2; 1.6, or of binary layers 1, which only this package reads
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
        weight_bits == 2
        and not overrides
        and not ours_only
        and not spec.per_row
        and spec.group_size is None
        and spec.centered
        and spec.hadamard is None
        and spec.activation_bits == 8
        and (spec.weights == "ternary" or (packed and spec.weights == "binary"))
        and all(should_convert_module(name, with_fp32(model, skips)) for name in layers)
    )
    common: dict[str, Any] = {"modules_to_not_convert": skips}
    if stock:
        common |= {"use_rms_norm": spec.rms_norm, "rms_norm_eps": spec.rms_norm_eps}
        if packed:
            return BitNetConfig("bitlinear", **common)
        return BitNetConfig("autobitlinear", quantization_mode="online", **common)
    section: dict[str, Any] = {"packed": packed, "spec": asdict(spec), "bits": weight_bits}
    embeddings = {name: m for name, m in model.named_modules() if isinstance(m, PackedEmbedding)}
    section["embedding"] = next(iter(embeddings), None)
    if embeddings:
        section["embedding_spec"] = asdict(embeddings[section["embedding"]].spec)
    section["overrides"] = {name: {"packed": p, "spec": asdict(s)} for name, (p, s) in overrides.items()}
    return BitNetConfig(EXTENDED, bitnet_toolkit=section, **common)


def candidates(model: nn.Module, linear_only: bool = False) -> list[tuple[str, nn.Module]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (swappable(module) and not linear_only)
    ]


def module_config(file: Path, config: dict[str, Any]) -> BitNetConfig:
    """The layers of a plain module, by the config.json that bitnet.save wrote with it."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        raise ValueError(
            f"{file}: has no quantization_config, so no low-bit layers to put into the module; float weights load with "
            "torch's load_state_dict, and a Hugging Face model with bitnet.load(path)"
        )
    return BitNetConfig.from_dict(settings)


def with_fp32(model: nn.Module, patterns: Iterable[str] = ()) -> list[str]:
    """These patterns, and those of the modules that transformers keeps in float32 and does not quantize."""
    return [*patterns, *(getattr(model, "_keep_in_fp32_modules", None) or [])]


def _skip_patterns(model: nn.Module, swapped: dict[str, Any]) -> list[str]:
    """modules_to_not_convert: few patterns, each anchored, that cover the kept layers and no swapped one."""
    patterns: list[str] = []
    for name, _ in candidates(model):
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
