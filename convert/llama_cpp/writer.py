"""GGUF files for llama.cpp and bitnet.cpp.

What differs there from the model that is written: activations are rounded to 8 bits in blocks of 256 (Q2_0, Q1_0: 32;
bitnet.cpp: per token, as here) instead of per token; all types but I2_S hold scales as float16; the key-value cache is
float16. What their graphs would compute otherwise is refused with the reason.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitnet.linear import BitLinear
from bitnet.packed import PackedBitLinear, PackedEmbedding
from bitnet.quantize import QuantSpec

from ..files import ggml
from ..files.gguf import TensorInfo, padded
from ..files.safetensors import DTYPES
from ..source import Source
from . import tokenizer as gguf_tokenizer
from .families import BITNET_CPP, FAMILIES, Family, head_dim_of, leaf_of, rope_factors, row_order, translate
from .header import Value, header_bytes
from .source import GgufSource

KINDS = {f"gguf-{name.lower()}": name for name in ("TQ1_0", "TQ2_0", "Q2_0", "Q1_0", "I2_S")}


class Entry(NamedTuple):
    """A tensor to be written."""

    kind: int
    shape: tuple[int, ...]
    read: Callable[[], ggml.Bytes]


Plan = tuple[dict[str, Value], dict[str, Entry]]  # metadata and tensors


def write_gguf(
    source: Source,
    file: str | Path,
    kind: str,
    *,
    progress: Callable[[int], None] | None = None,
    resume: bool = False,
    fingerprint: str = "",
    tokenizer: bool = True,
    planned: Plan | None = None,
) -> Path:
    """Write a model as GGUF, one tensor in memory at a time; returns the file.

    kind:        one of KINDS, the type of the ternary matrices. Everything else keeps its own float type, but norms and
                 biases, which are float32, and int8 heads and embeddings, which are Q8_0 (the same codes)
    progress:    called with the number of bytes that were just written
    resume:      go on with what an interrupted run left beside the file, and leave the like if this one is interrupted
    fingerprint: says which source this is; a run only goes on with tensors that were written under the same one
    tokenizer:   False leaves it out; llama.cpp then takes and gives numbers of tokens only
    planned:     what plan(source, kind, tokenizer) returned, where it was called before

    What the target cannot express is refused with a ValueError naming the reason before a byte is written, but for
    scales outside of float16's range, which are found when their tensor is read. The file gets its name when it is
    complete; until then an earlier one stays.
    """
    file = Path(file)
    metadata, entries = planned or plan(source, kind, tokenizer)
    infos, end = {}, 0
    for name, entry in entries.items():
        infos[name] = TensorInfo(entry.kind, entry.shape, end, ggml.nbytes(entry.kind, entry.shape))
        end += padded(infos[name].nbytes)
    header = header_bytes(metadata, infos)
    partial, note = (file.with_name(f".{file.name}.partial{suffix}") for suffix in ("", ".json"))
    ends = [len(header), *(len(header) + info.offset + padded(info.nbytes) for info in infos.values())]
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
                stream.write(bytes(padded(len(data)) - len(data)))
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


def plan(source: Source, kind: str, tokenizer: bool = True) -> Plan:
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
    head_dim = head_dim_of(config)
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
        factors = rope_factors(config)
        entries["rope_freqs.weight"] = Entry(ggml.F32, tuple(factors.shape), lambda: _bytes(factors, torch.float32))
    stored = source.stored()
    for key in [*(key for key in state if key in stored), *sorted(stored.keys() - state.keys())]:
        module, _, leaf = key.rpartition(".")
        if leaf == "weight_scale" or key in tied or key.endswith("rotary_emb.inv_freq"):
            continue
        name = translate(module, family.modules)
        known = leaf == "weight" or (leaf == "bias" and name is not None and leaf_of(name) in family.biases)
        if name is None or not known or key not in state:
            raise ValueError(f"the graph of `{family.arch}` has no place for {key}")
        rows = row_order(name, config, family)
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
    if ternary == "Q1_0" and spec.weights == "ternary":
        raise ValueError(f"{module} is ternary, and Q1_0 holds -1 and +1 only; take gguf-q2_0")
    if ternary == "I2_S" and (spec.per_row or spec.group_size is not None) and not int8:
        raise ValueError(f"{module} has a scale for each row, and I2_S has one for the matrix")
    if spec.group_size is not None and spec.group_size % ggml.TERNARY["Q2_0"].block:
        raise ValueError(
            f"{module} has scales of groups of {spec.group_size}, and no type of llama.cpp has such small ones"
        )
    block = ggml.TERNARY[ternary].block
    if spec.group_size is not None and ternary != "Q2_0" and spec.group_size % block:
        raise ValueError(
            f"{module} has scales of groups of {spec.group_size}, and {ternary} of {block}; take gguf-q2_0"
        )
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
    if dtype not in ggml.FLOATS:
        raise ValueError(f"{key} is stored as {dtype}; {', '.join(ggml.FLOATS)} is needed")

    def read() -> ggml.Bytes:
        tensor = source.tensor(key)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"is {list(tensor.shape)} in the checkpoint, but {list(shape)} in the model")
        return _bytes(tensor if rows is None else tensor[rows], DTYPES[dtype])

    return Entry(ggml.FLOATS[dtype], shape, read)


def _bytes(tensor: Tensor, dtype: torch.dtype) -> ggml.Bytes:
    return tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy()
