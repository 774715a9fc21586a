"""A GGUF file as a Source: its tensors with the names, values and order of rows of transformers' model."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from torch import Tensor, nn

from bitnet.kernels import layout
from bitnet.linear import BitLinear
from bitnet.packed import PackedBitLinear

from ..files import ggml
from ..files.damaged import Damaged
from ..files.gguf import REMEDY, TensorInfo, map_tensor, read_header, read_tensor
from ..files.safetensors import DTYPES
from ..hub.models import refusals, skeleton
from ..rounding import Quantized, spec_of
from ..source import Source, naming
from . import tokenizer as gguf_tokenizer
from .families import BITNET_CPP, FAMILIES, LLAMA3_ROPE, Family, rope_factors, row_order, translate


class GgufSource(Source):
    """A GGUF file of one of FAMILIES' architectures.

    Its matrices of ternary and binary types are PackedBitLinear layers; all other tensors count as floats, those of
    other quantized types as float32. The file does not say which activations the layers take: 8 bits, as llama.cpp.

    file:       the file
    dequantize: all tensors count as floats, the ternary ones, too, with the +2 that some of them have

    Tensors have the names, values and order of rows that transformers' model has; `weight` and `weight_scale` of a
    packed layer are those of its buffers.

    Raises ValueError naming the tensor, key or byte for a file that is damaged, or that says what is not known here.
    """

    def __init__(self, file: str | Path, *, dequantize: bool = False) -> None:
        self.path = Path(file)
        self.metadata, stored = read_header(self.path)
        self.family, config = self._config(stored)
        model = skeleton(config, self.path, len(stored))
        super().__init__(self.path, json.loads(config.to_json_string()), model, report=None)
        inverse = {theirs: ours for ours, theirs in self.family.modules.items()}
        self.infos: dict[str, TensorInfo] = {}
        self.rows: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        state = self.model.state_dict()
        for name, info in stored.items():
            module, _, leaf = name.rpartition(".")
            if name == "rope_freqs.weight":
                continue
            key = f"{translate(module, inverse)}.{leaf}"
            if key not in state:
                raise ValueError(f"{self.path}: tensor {name} has no place in {type(self.model).__name__}")
            if info.shape != tuple(state[key].shape):
                raise ValueError(
                    f"{self.path}: tensor {name} is {list(info.shape)}, but by the metadata {list(state[key].shape)}"
                )
            if info.kind not in ggml.FLOATS.values() and not self._ternary(info):
                kind = gguf.GGMLQuantizationType(info.kind)
                try:
                    gguf.quants.dequantize(np.zeros((1, ggml.nbytes(info.kind, info.shape[-1:])), np.uint8), kind)
                except NotImplementedError:
                    raise ValueError(f"{self.path}: tensor {name} is {kind.name}, which is not read here") from None
            if info.kind not in ggml.FLOATS.values() and len(info.shape) != 2:
                raise Damaged(self.path, f"tensor {name} is no matrix, but {ggml.NAMES[info.kind]}", REMEDY)
            self.infos[key] = info
            if (rows := row_order(module, config, self.family)) is not None:
                self.rows[key] = rows.argsort()
            if not dequantize and self._ternary(info):
                self._pack(name, key)

    def _ternary(self, info: TensorInfo) -> bool:
        return ggml.NAMES[info.kind] in ggml.TERNARY

    def _pack(self, name: str, key: str) -> None:
        """Make a layer of the skeleton packed; its scale is read now, for the layer's options depend on it."""
        module, info = key.removesuffix(".weight"), self.infos[key]
        linear = self.model.get_submodule(module)
        if not isinstance(linear, nn.Linear):
            return  # an embedding: a float tensor
        with naming(f"{self.path}: tensor {name}"):
            stored = ggml.NAMES[info.kind], map_tensor(self.path, info), info.shape[0]
            scale, binary = ggml.scales(*stored), ggml.is_binary(*stored)
            del stored
        self.scales[module] = scale[self.rows[key]] if key in self.rows and len(scale) > 1 else scale
        spec = spec_of(scale, info.shape[1], binary)
        PackedBitLinear.from_bit_linear(BitLinear.from_linear(linear, spec))

    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        floats = {kind: name for name, kind in ggml.FLOATS.items()}
        described = {}
        for key, info in self.infos.items():
            module = key.removesuffix(".weight")
            described[key] = floats.get(info.kind, "F32"), info.shape
            if module in self.scales:
                described[key] = "U8", (layout.packed_rows(info.shape[0]), info.shape[1])
                scale = self.scales[module]
                kind = "F16" if scale.ndim > 1 else "F32"
                described[f"{module}.weight_scale"] = kind, tuple(scale.shape)
        return described

    def tensor(self, key: str) -> Tensor:
        module, _, leaf = key.rpartition(".")
        if module in self.scales and leaf == "weight_scale":
            return self.scales[module]
        if module in self.scales and leaf == "weight":
            return layout.pack_ternary(self.quantized(module).codes)
        info = self.infos[key]
        data = read_tensor(self.path, info)
        if info.kind in ggml.FLOATS.values():
            values = torch.from_numpy(data).view(DTYPES[self.stored()[key][0]]).view(info.shape)
        elif self._ternary(info):
            values = ggml.dequantize(ggml.NAMES[info.kind], data, info.shape[0])
        else:
            kind = gguf.GGMLQuantizationType(info.kind)
            values = torch.from_numpy(gguf.quants.dequantize(data.reshape(info.shape[0], -1), kind)).view(info.shape)
        return values[self.rows[key]] if key in self.rows else values

    def quantized(self, name: str) -> Quantized:
        key = f"{name}.weight"
        info = self.infos[key]
        data = read_tensor(self.path, info)
        with naming(name):
            codes = ggml.unpack(ggml.NAMES[info.kind], data, info.shape[0])
        return Quantized(codes[self.rows[key]] if key in self.rows else codes, self.scales[name])

    def check_other_files(self) -> None:
        with naming(str(self.path)):
            gguf_tokenizer.tokenizer_of(self.metadata)

    def copy_other_files(self, folder: Path, tokenizer: bool = True) -> None:
        """Write the tokenizer; raises ValueError for one that is not known here."""
        if tokenizer:
            with naming(str(self.path)):
                gguf_tokenizer.save_tokenizer(self.metadata, folder)

    def fingerprint(self) -> Any:
        stat = self.path.stat()
        return {str(self.path.resolve()): [stat.st_size, stat.st_mtime_ns]}

    def _config(self, stored: dict[str, TensorInfo]) -> tuple[Family, Any]:
        """The family and the transformers config that the metadata describes."""
        if rotated := next((key for key in self.metadata if key.startswith("prism.hadamard.")), None):
            raise ValueError(f"{self.path}: its weights are rotated ({rotated}), which is not read here")
        arch = self.metadata.get("general.architecture")
        names = {family.arch: family for family in reversed(FAMILIES.values())}
        names |= dict.fromkeys((*BITNET_CPP.values(), "bitnet-25"), FAMILIES["bitnet"])
        if not isinstance(arch, str) or arch not in names:
            raise ValueError(f"{self.path}: its architecture is {arch!r:.80}; read here are {', '.join(names)}")
        family = names[arch]
        own = {k.removeprefix(f"{arch}."): v for k, v in self.metadata.items() if k.startswith(f"{arch}.")}

        def take(key: str, default: Any = None, kind: Any = int) -> Any:
            value: Any = own.pop(key, default)
            if value is None or isinstance(value, list):
                raise ValueError(f"{self.path}: {arch}.{key} is {'missing' if value is None else 'one for each layer'}")
            if type(value) is not kind or (kind is not str and not 0 < value < 1 << 31):
                raise Damaged(self.path, f"{arch}.{key} is {value!r:.80}, which cannot be", REMEDY)
            return value

        if "token_embd.weight" not in stored:
            raise ValueError(f"{self.path}: has no tensor token_embd.weight; is it a model?")
        embedding = stored["token_embd.weight"]
        heads, width = take("attention.head_count"), take("embedding_length")
        kv, head_dim = take("attention.head_count_kv", heads), take("attention.key_length", width // heads)
        rope = {"rope_type": "default", "rope_theta": take("rope.freq_base", 10000.0, float)}
        scaling, factor = take("rope.scaling.type", "linear", str), take("rope.scaling.factor", 1.0, float)
        if scaling != "none" and (scaling != "linear" or factor != 1):
            rope |= {"rope_type": scaling, "factor": factor}
        if scaling == "yarn" and factor > 1 and "rope.scaling.original_context_length" in own:
            rope["original_max_position_embeddings"] = take("rope.scaling.original_context_length")
        known = family.rope + (family.rope_read if "original_max_position_embeddings" in rope else ())
        same = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "vocab_size": embedding.shape[0]}
        wrong = [key for key, value in same.items() if take(key, value) != value]
        special = {
            name: self.metadata.get(f"tokenizer.ggml.{word}_token_id") for word, name in gguf_tokenizer.SPECIAL.items()
        }
        options: dict[str, Any] = {
            "hidden_size": width,
            "num_hidden_layers": take("block_count"),
            "intermediate_size": take("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv,
            "head_dim": head_dim,
            "rms_norm_eps": take("attention.layer_norm_rms_epsilon", kind=float),
            "max_position_embeddings": take("context_length"),
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": "output.weight" not in stored,
            "rope_parameters": rope,
            "dtype": next((DTYPES[n] for n, kind in ggml.FLOATS.items() if kind == embedding.kind), torch.float32),
            "architectures": [family.model],
            **{f"{name}_token_id": special[name] for name in ("bos", "eos", "pad")},
        }
        if family.arch == "bitnet":
            options["hidden_act"] = "silu" if arch == "bitnet" else "relu2"
        if family.arch == "llama":
            options["attention_bias"] = "blk.0.attn_q.bias" in stored
            options["mlp_bias"] = "blk.0.ffn_up.bias" in stored
        wrong += [key for key, value in own.items() if value]
        if rope["rope_type"] not in known or wrong:
            raise ValueError(
                f"{self.path}: says what is not understood here: "
                f"{', '.join(f'{arch}.{key}' for key in wrong) or rope}; the model would compute something else"
            )
        if (layers := options["num_hidden_layers"]) > len(stored):
            raise Damaged(self.path, f"{arch}.block_count is {layers:,}, for {len(stored)} tensors", REMEDY)
        config_class = getattr(transformers, family.model).config_class
        with refusals(self.path):
            config = config_class(**options)
        if freqs := stored.get("rope_freqs.weight"):
            config = self._llama3(freqs, config_class, options)
        return family, config

    def _llama3(self, info: TensorInfo, config_class: Any, options: dict[str, Any]) -> Any:
        """The config whose rotary embedding yields the factors in the file."""
        if info.kind != ggml.F32 or len(info.shape) != 1:
            raise Damaged(self.path, "its rope_freqs.weight is no vector of float32", REMEDY)
        factors = torch.from_numpy(read_tensor(self.path, info)).view(torch.float32)
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        for known in LLAMA3_ROPE:
            scaling = {"rope_type": "llama3", **dict(zip(names, known, strict=True))}
            config = config_class(**options | {"rope_parameters": options["rope_parameters"] | scaling})
            known_factors = rope_factors(config)
            if known_factors.shape == factors.shape and torch.allclose(known_factors, factors, rtol=1e-5):
                return config
        raise ValueError(
            f"{self.path}: its rope_freqs.weight is not that of Llama 3.1 or 3.2, and so not understood here"
        )
