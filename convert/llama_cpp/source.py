"""GGUF: models written for llama.cpp and bitnet.cpp, and read back.

What llama.cpp computes is decided by `general.architecture` and the tensors that are there; most of a config it takes
on trust. So a model is written only where the graph of its architecture is known to compute the same (FAMILIES), and
refused with the reason otherwise. What differs even then: activations are rounded to 8 bits in blocks of 256 (Q2_0:
32; bitnet.cpp: per token, as here) instead of per token; TQ1_0, TQ2_0 and Q2_0 hold scales as float16; the
key-value cache is float16.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bitnet.kernels import layout
from bitnet.linear import BitLinear
from bitnet.packed import PackedBitLinear, PackedEmbedding
from bitnet.quantize import QuantSpec

from ..files.damaged import Damaged
from ..files.gguf import REMEDY
from ..hub.models import refusals, skeleton
from ..source import DTYPES, Quantized, Source, naming
from . import file as gguf_file
from . import tensor_types as ggml
from . import tokenizer as gguf_tokenizer
from .file import TensorInfo, Value

KINDS = {"gguf-tq1_0": "TQ1_0", "gguf-tq2_0": "TQ2_0", "gguf-q2_0": "Q2_0", "gguf-i2_s": "I2_S"}

FLOATS = {"F32": ggml.F32, "F16": ggml.F16, "BF16": ggml.BF16}


class Family(NamedTuple):
    """A model type of transformers, and the architecture of llama.cpp that computes the same."""

    arch: str
    model: str  # class in transformers
    modules: dict[str, str]  # name in transformers: in GGUF; {} is the layer's number
    biases: tuple[str, ...] = ()  # matrices in a layer whose bias the graph adds
    activations: tuple[str, ...] = ("silu",)
    rope: tuple[str, ...] = ("default", "linear")
    permuted: bool = False  # rows of q and k: llama's rotary embedding pairs neighbours there


_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_SUB_NORMS = {"self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"}
_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


def _modules(block: dict[str, str]) -> dict[str, str]:
    names = {f"model.layers.{{}}.{ours}": f"blk.{{}}.{theirs}" for ours, theirs in block.items()}
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"} | names


FAMILIES = {
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        _modules(_BLOCK),
        ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
        rope=("default", "linear", "llama3"),
        permuted=True,
    ),
    "mistral": Family("llama", "MistralForCausalLM", _modules(_BLOCK), permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _modules(_BLOCK), ("attn_q", "attn_k", "attn_v")),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _modules(_BLOCK | _QK_NORMS)),
    "bitnet": Family(
        "bitnet",
        "BitNetForCausalLM",
        _modules(_BLOCK | _SUB_NORMS),
        activations=("silu", "relu2"),
        rope=("default",),
    ),
}
BITNET_CPP = {"relu2": "bitnet-b1.58", "silu": "bitnet"}  # the two graphs bitnet.cpp has for sub-layer norms
LLAMA3_ROPE = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))  # of Llama 3.1 and 3.2: GGUF keeps only what they yield


class Entry(NamedTuple):
    """A tensor to be written."""

    kind: int
    shape: tuple[int, ...]
    read: Callable[[], ggml.Bytes]


def write_gguf(
    source: Source,
    file: str | Path,
    kind: str,
    *,
    progress: Callable[[int], None] | None = None,
    resume: bool = False,
    fingerprint: str = "",
    tokenizer: bool = True,
) -> Path:
    """Write a model as GGUF, one tensor in memory at a time; returns the file.

    kind:        one of KINDS, the type of the ternary matrices. Everything else keeps its own float type, but norms and
                 biases, which are float32, and int8 heads and embeddings, which are Q8_0 (the same codes)
    progress:    called with the number of bytes that were just written
    resume:      go on with what an interrupted run left beside the file, and leave the like if this one is interrupted
    fingerprint: says which source this is; a run only goes on with tensors that were written under the same one
    tokenizer:   False leaves it out; llama.cpp then takes and gives numbers of tokens only

    What the target cannot express is refused with a ValueError naming the reason before a byte is written, but for
    scales outside of float16's range, which are found when their tensor is read. The file gets its name when it is
    complete; until then an earlier one stays.
    """
    file = Path(file)
    metadata, entries = plan(source, kind, tokenizer)
    infos, end = {}, 0
    for name, entry in entries.items():
        infos[name] = TensorInfo(entry.kind, entry.shape, end, ggml.nbytes(entry.kind, entry.shape))
        end += gguf_file.padded(infos[name].nbytes)
    header = gguf_file.header_bytes(metadata, infos)
    partial, note = (file.with_name(f".{file.name}.partial{suffix}") for suffix in ("", ".json"))
    ends = [len(header), *(len(header) + info.offset + gguf_file.padded(info.nbytes) for info in infos.values())]
    done = _complete_part(partial, note, header, ends, fingerprint) if resume else 0
    try:
        if not done:
            note.write_text(json.dumps({"fingerprint": fingerprint}))
        with partial.open("r+b" if done else "wb") as stream:
            stream.truncate(done)
            stream.seek(done)
            if not done:
                stream.write(header)
            for (name, entry), end in zip(entries.items(), ends[1:], strict=True):
                if end <= done:
                    continue
                try:
                    data = entry.read()
                except ValueError as error:
                    raise ValueError(f"{source.path}: {name}: {error}") from None
                assert len(data) == infos[name].nbytes, name
                stream.write(data.data)
                stream.write(bytes(gguf_file.padded(len(data)) - len(data)))
                if progress is not None:
                    progress(len(data))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, file)
        note.unlink(missing_ok=True)
    except BaseException:
        if not resume:
            partial.unlink(missing_ok=True)
            note.unlink(missing_ok=True)
        raise
    return file


def _complete_part(partial: Path, note: Path, header: bytes, ends: list[int], fingerprint: str) -> int:
    """Bytes of an interrupted run's file up to its last complete tensor; 0 if there is nothing to go on with.

    ends: where the header and each tensor end
    Raises ValueError if the file is not the beginning of the one to be written.
    """
    if not partial.exists() or not note.exists() or partial.stat().st_size < len(header):
        return 0
    with partial.open("rb") as stream:
        same = stream.read(len(header)) == header
    if not same or json.loads(note.read_text()) != {"fingerprint": fingerprint}:
        raise ValueError(
            f"{partial}: was left by a run with another source or other options; delete it, or convert without resuming"
        )
    size = partial.stat().st_size
    return max(end for end in ends if end <= size)


def plan(source: Source, kind: str, tokenizer: bool = True) -> tuple[dict[str, Value], dict[str, Entry]]:
    """The metadata and tensors of a GGUF file, without reading a tensor.

    Raises ValueError with the reason for what the target cannot express.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    model, config, ternary = source.model, source.model.config, KINDS[kind]
    family = FAMILIES.get(config.model_type)
    if family is None or type(model).__name__ != family.model:
        names = ", ".join(family.model for family in FAMILIES.values())
        raise ValueError(f"{source.path}: {kind} is written for {names}; this is a {type(model).__name__}")
    try:
        metadata = _described(config, family, ternary)
        entries = _entries(source, family, ternary)
    except ValueError as error:
        raise ValueError(f"{source.path}: {kind} cannot hold this model: {error}") from None
    metadata["general.name"] = source.path.resolve().name.removesuffix(".gguf")
    if not tokenizer:
        return metadata | gguf_tokenizer.NO_TOKENIZER, entries
    if isinstance(source, GgufSource):
        return metadata | {key: v for key, v in source.metadata.items() if key.startswith("tokenizer.")}, entries
    return metadata | gguf_tokenizer.metadata_of(source.path, config), entries


def _described(config: Any, family: Family, ternary: str) -> dict[str, Value]:
    """general.* and the architecture's own metadata; raises ValueError for what its graph would compute otherwise."""
    arch, act = family.arch, config.hidden_act
    heads, width = config.num_attention_heads, config.hidden_size
    head_dim = _head_dim(config)
    if act not in family.activations:
        raise ValueError(f"llama.cpp's `{arch}` runs {' or '.join(family.activations)}, not {act}")
    if ternary == "I2_S":
        if arch not in ("llama", "bitnet"):
            raise ValueError(f"bitnet.cpp, which alone reads I2_S, is not known to run `{arch}`; take gguf-tq2_0")
        arch = BITNET_CPP[act] if arch == "bitnet" else arch
    elif act == "relu2":
        raise ValueError("llama.cpp's `bitnet` runs silu, not relu2, which only bitnet.cpp does; take gguf-i2_s")
    if family.arch == "bitnet" and head_dim * heads != width:
        raise ValueError(f"`{arch}` has heads of hidden_size / heads = {width / heads:g} values, not {head_dim}")
    if family.arch == "bitnet" and not config.tie_word_embeddings:
        raise ValueError("`bitnet` uses the input embedding as output head, and this model has a head of its own")
    window = getattr(config, "sliding_window", None)
    slides = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ["all"])
    if slides and window is not None and window < config.max_position_embeddings:
        raise ValueError(f"`{arch}` attends to the whole context, not to a sliding window of {window}")
    metadata: dict[str, Value] = {"general.architecture": arch, "general.quantization_version": 2}
    metadata["general.file_type"] = ggml.TERNARY[ternary].file_type
    rope = config.rope_parameters
    if rope["rope_type"] not in family.rope or rope.get("partial_rotary_factor", 1) != 1:
        raise ValueError(f"`{arch}` has rotary embeddings of type {' or '.join(family.rope)}, not {rope}")
    own: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": width,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return metadata | {f"{arch}.{key}": value for key, value in own.items()}


def _entries(source: Source, family: Family, ternary: str) -> dict[str, Entry]:
    model, config = source.model, source.model.config
    layers, state = source.layers(), model.state_dict()
    tied = model.all_tied_weights_keys
    if mismatches := source.mismatches():
        raise ValueError(mismatches[0])
    if inside := [module for module, layer in layers.items() if layer.spec.rms_norm]:
        raise ValueError(f"{inside[0]} has an RMSNorm inside the layer")
    entries = {}
    if config.rope_parameters["rope_type"] == "llama3":
        factors = _rope_factors(config)
        entries["rope_freqs.weight"] = Entry(ggml.F32, tuple(factors.shape), lambda: _bytes(factors, torch.float32))
    stored = source.stored()
    for key in [*(key for key in state if key in stored), *sorted(stored.keys() - state.keys())]:
        module, _, leaf = key.rpartition(".")
        if leaf == "weight_scale" or key in tied or key.endswith("rotary_emb.inv_freq"):
            continue
        name = _translate(module, family.modules)
        known = leaf == "weight" or (leaf == "bias" and name is not None and _leaf(name) in family.biases)
        if name is None or not known or key not in state:
            raise ValueError(f"the graph of `{family.arch}` has no place for {key}")
        rows = _row_order(name, config, family)
        if leaf == "weight" and (module in layers or isinstance(model.get_submodule(module), PackedEmbedding)):
            entries[f"{name}.weight"] = _quantized_entry(source, module, ternary, rows)
        else:
            entries[f"{name}.{leaf}"] = _float_entry(source, key, tuple(state[key].shape), rows)
    return entries


def _quantized_entry(source: Source, module: str, ternary: str, rows: Tensor | None) -> Entry:
    layer = source.model.get_submodule(module)
    if isinstance(layer, PackedEmbedding):
        spec, shape = QuantSpec("int8", per_row=True), tuple(layer.weight.shape)
    else:
        assert isinstance(layer, BitLinear | PackedBitLinear)
        spec, shape = layer.spec, (layer.out_features, layer.in_features)
    if spec.activation_bits != 8:
        bits = "float" if spec.activation_bits is None else f"{spec.activation_bits}-bit"
        raise ValueError(f"{module} takes {bits} activations, and every ggml kernel rounds them to 8 bits")
    int8 = spec.weights == "int8"
    if ternary == "I2_S" and spec.per_row and not int8:
        raise ValueError(f"{module} has a scale for each row, and I2_S has one for the matrix")
    name = "Q8_0" if int8 else ternary
    kind = ggml.Q8_0 if int8 else ggml.TERNARY[ternary].id
    try:
        ggml.nbytes(kind, shape)
    except ValueError as error:
        raise ValueError(f"{module}: {error}") from None

    def read() -> ggml.Bytes:
        if isinstance(layer, PackedEmbedding):
            weight, inverse = (source.tensor(f"{module}.{leaf}") for leaf in ("weight", "weight_scale"))
            return ggml.pack_q8_0(weight, 1 / inverse.float())
        codes, scale = source.quantized(module)
        if rows is not None:
            codes, scale = codes[rows], scale[rows] if len(scale) > 1 else scale
        return ggml.pack_q8_0(codes, scale) if int8 else ggml.pack(name, codes, scale)

    return Entry(kind, shape, read)


def _float_entry(source: Source, key: str, shape: tuple[int, ...], rows: Tensor | None) -> Entry:
    dtype = "F32" if len(shape) == 1 else source.stored()[key][0]
    if dtype not in FLOATS:
        raise ValueError(f"{key} is stored as {dtype}; {', '.join(FLOATS)} is needed")

    def read() -> ggml.Bytes:
        tensor = source.tensor(key)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"is {list(tensor.shape)} in the checkpoint, but {list(shape)} in the model")
        return _bytes(tensor if rows is None else tensor[rows], DTYPES[dtype])

    return Entry(FLOATS[dtype], shape, read)


def _bytes(tensor: Tensor, dtype: torch.dtype) -> ggml.Bytes:
    return tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy()


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _translate(module: str, names: dict[str, str]) -> str | None:
    """A module's name in the other world, or None."""
    parts = module.split(".")
    number = next((part for part in parts if part.isdecimal()), "")
    name = names.get(".".join("{}" if part.isdecimal() else part for part in parts))
    return None if name is None else name.format(number)


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _row_order(name: str, config: Any, family: Family) -> Tensor | None:
    """Which row of transformers' matrix stands in each row of GGUF's; None where it is the same."""
    leaf = _leaf(name)
    if family.permuted and leaf in ("attn_q", "attn_k"):
        # transformers rotates value i of a head with value i + d/2, llama.cpp with i + 1: the halves are interleaved
        count = config.num_attention_heads if leaf == "attn_q" else config.num_key_value_heads
        return torch.arange(count * _head_dim(config)).view(count, 2, -1).transpose(1, 2).reshape(-1)
    return None


def _rope_factors(config: Any) -> Tensor:
    """What llama.cpp divides the rotary frequencies by, float32 [head_dim / 2], for the type llama3."""
    head_dim = _head_dim(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    return plain / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]


class GgufSource(Source):
    """A GGUF file of one of FAMILIES' architectures.

    Its matrices of ternary types are PackedBitLinear layers; all other tensors count as floats, those of other
    quantized types as float32.

    file:       the file
    dequantize: all tensors count as floats, the ternary ones, too

    Tensors have the names, values and order of rows that transformers' model has; `weight` and `weight_scale` of a
    packed layer are those of its buffers.

    Raises ValueError naming the tensor, key or byte for a file that is damaged, or that says what is not known here.
    """

    def __init__(self, file: str | Path, *, dequantize: bool = False) -> None:
        self.path = Path(file)
        self.metadata, stored = gguf_file.read_header(self.path)
        self.family, config = self._config(stored)
        self.config = json.loads(config.to_json_string())
        self.model = skeleton(config, self.path, len(stored))
        self.plain, self.report, self.calibrated, self.problems, self.scale_ranges = False, None, {}, [], {}
        inverse = {theirs: ours for ours, theirs in self.family.modules.items()}
        self.infos: dict[str, TensorInfo] = {}
        self.rows: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}
        state = self.model.state_dict()
        for name, info in stored.items():
            module, _, leaf = name.rpartition(".")
            if name == "rope_freqs.weight":
                continue
            key = f"{_translate(module, inverse)}.{leaf}"
            if key not in state:
                raise ValueError(f"{self.path}: tensor {name} has no place in {type(self.model).__name__}")
            if info.shape != tuple(state[key].shape):
                raise ValueError(
                    f"{self.path}: tensor {name} is {list(info.shape)}, but by the metadata {list(state[key].shape)}"
                )
            if info.kind not in FLOATS.values() and not self._ternary(info):
                kind = gguf.GGMLQuantizationType(info.kind)
                try:
                    gguf.quants.dequantize(np.zeros((1, ggml.nbytes(info.kind, info.shape[-1:])), np.uint8), kind)
                except NotImplementedError:
                    raise ValueError(f"{self.path}: tensor {name} is {kind.name}, which is not read here") from None
            self.infos[key] = info
            if (rows := _row_order(module, config, self.family)) is not None:
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
            scale = ggml.scales(ggml.NAMES[info.kind], gguf_file.read_tensor(self.path, info), info.shape[0])
        self.scales[module] = scale[self.rows[key]] if key in self.rows and len(scale) > 1 else scale
        PackedBitLinear.from_bit_linear(BitLinear.from_linear(linear, QuantSpec(per_row=len(scale) > 1)))

    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        floats = {kind: name for name, kind in FLOATS.items()}
        described = {}
        for key, info in self.infos.items():
            module = key.removesuffix(".weight")
            described[key] = floats.get(info.kind, "F32"), info.shape
            if module in self.scales:
                described[key] = "U8", (layout.packed_rows(info.shape[0]), info.shape[1])
                described[f"{module}.weight_scale"] = "F32", tuple(self.scales[module].shape)
        return described

    def tensor(self, key: str) -> Tensor:
        module, _, leaf = key.rpartition(".")
        if module in self.scales and leaf == "weight_scale":
            return self.scales[module]
        if module in self.scales and leaf == "weight":
            return layout.pack_ternary(self.quantized(module).codes)
        info = self.infos[key]
        data = gguf_file.read_tensor(self.path, info)
        if info.kind in FLOATS.values():
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
        data = gguf_file.read_tensor(self.path, info)
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
            "dtype": next((DTYPES[name] for name, kind in FLOATS.items() if kind == embedding.kind), torch.float32),
            "architectures": [family.model],
            **{f"{name}_token_id": special[name] for name in ("bos", "eos", "pad")},
        }
        if family.arch == "bitnet":
            options["hidden_act"] = "silu" if arch == "bitnet" else "relu2"
        if family.arch == "llama":
            options["attention_bias"] = "blk.0.attn_q.bias" in stored
            options["mlp_bias"] = "blk.0.ffn_up.bias" in stored
        wrong += [key for key, value in own.items() if value]
        if rope["rope_type"] not in family.rope or wrong:
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
        factors = torch.from_numpy(gguf_file.read_tensor(self.path, info)).view(torch.float32)
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        for known in LLAMA3_ROPE:
            scaling = {"rope_type": "llama3", **dict(zip(names, known, strict=True))}
            config = config_class(**options | {"rope_parameters": options["rope_parameters"] | scaling})
            known_factors = _rope_factors(config)
            if known_factors.shape == factors.shape and torch.allclose(known_factors, factors, rtol=1e-5):
                return config
        raise ValueError(
            f"{self.path}: its rope_freqs.weight is not that of Llama 3.1 or 3.2, and so not understood here"
        )
