"""GGUF files for llama.cpp, PrismML's fork of it, and bitnet.cpp.

What differs there from the model that is written: activations are rounded to 8 bits in blocks of 256 (Q2_0, Q1_0: 32;
bitnet.cpp: per token, as here) instead of per token; all types but I2_S hold scales as float16; the key-value cache is
float16. What their graphs would compute otherwise is refused with the reason.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files import ggml
from ..files.gguf import TensorInfo, padded
from ..files.safetensors import DTYPES
from ..rounding import Quantized, turned_back
from ..source import Source, Weight
from . import rotated
from . import tokenizer as gguf_tokenizer
from .families import FAMILIES, Family, rope_factors
from .header import Value, header_bytes
from .metadata import described
from .places import Place, group_order, places
from .source import GgufSource

KINDS = {f"gguf-{name.lower()}": name for name in ("TQ1_0", "TQ2_0", "Q2_0", "Q1_0", "I2_S", *rotated.TYPES)}
KINDS["gguf-bf16"] = "BF16"  # codes * scale, for whatever takes no ternary type


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

    kind:        one of KINDS, the type of the low-bit matrices. Everything else keeps its own float type, but norms and
                 biases, which are float32, and int8 and int4 heads and embeddings, which are Q8_0 and Q4_0 (the same
                 codes)
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
    """The metadata and tensors of a GGUF file, without reading a tensor but the signs of rotated layers.

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
        metadata = described(config, family, ternary)
        entries, contract = _entries(source, family, ternary)
    except ValueError as error:
        raise ValueError(f"{source.path}: {kind} cannot hold this model: {error}") from None
    metadata |= contract
    metadata["general.name"] = source.path.resolve().name.removesuffix(".gguf")
    if not tokenizer:
        return metadata | gguf_tokenizer.NO_TOKENIZER, entries
    if isinstance(source, GgufSource):
        return metadata | {key: v for key, v in source.metadata.items() if key.startswith("tokenizer.")}, entries
    return metadata | gguf_tokenizer.metadata_of(source.path, config), entries


def readers(planned: Plan, kind: str) -> list[str]:
    """A sentence on who reads a file, where that is not stock llama.cpp."""
    if KINDS[kind] not in rotated.TYPES:
        return []
    turned = any(key.startswith(rotated.PREFIX) for key in planned[0])
    what = f", and applies the rotation that its {rotated.PREFIX}* keys describe" * turned
    return [f"PrismML's llama.cpp reads {KINDS[kind]}{what}; stock llama.cpp does not know the type and refuses it"]


def _entries(source: Source, family: Family, ternary: str) -> tuple[dict[str, Entry], dict[str, Value]]:
    """The tensors, and the metadata that say which of them are rotated."""
    model, config = source.model, source.model.config
    weights, state = source.weights(), model.state_dict()
    tied = model.all_tied_weights_keys
    if mismatches := source.mismatches():
        raise ValueError(mismatches[0])
    if inside := [weight.name for weight in weights.values() if weight.spec.rms_norm]:
        raise ValueError(f"{inside[0]} has an RMSNorm inside the layer")
    turned = [weight for weight in weights.values() if weight.spec.hadamard is not None]
    if turned and ternary not in (*rotated.TYPES, "BF16"):
        raise ValueError(
            f"{turned[0].name} rotates its activations (hadamard), which llama.cpp's graphs do not, and would misread "
            f"in {ternary}; take gguf-pq2_0, which PrismML's llama.cpp reads, or gguf-bf16, turned back"
        )
    if wide := [weight for weight in turned if weight.spec.wide]:
        kind = wide[0].spec.weights
        raise ValueError(f"{wide[0].name} rotates its activations (hadamard) and has {kind} weights; take --to bf16")
    entries = {}
    folded: dict[str, rotated.Folded] = {}
    grouped = False
    if config.rope_parameters.get("rope_type") == "llama3":
        factors = rope_factors(config)
        entries["rope_freqs.weight"] = Entry(ggml.F32, tuple(factors.shape), lambda: _bytes(factors, torch.float32))
    low_bit = {weight.key: weight for weight in weights.values()}
    known = [key for key in state if source.parts(key)]
    parts = {part for key in known for part in source.parts(key)}
    for key in [*known, *sorted(source.stored().keys() - parts)]:
        if key.endswith((".weight_scale", ".signs")) or key in tied or key.endswith("rotary_emb.inv_freq"):
            continue
        weight = low_bit.get(key)
        shape = tuple(state[key].shape) if key in state else ()
        found = [] if key not in state else places(*_float(key, shape, weight), config, family)
        if not found:
            raise ValueError(f"the graph of `{family.arch}` has no place for {key}")
        for place in found:
            if weight is not None and weight.spec.hadamard is not None and ternary != "BF16":
                signs = source.signs(weight.name, weight.in_features, weight.spec)
                folded[place.name] = rotated.Folded(weight.name, weight.in_features, weight.spec.hadamard, signs)
                grouped |= place.columns is not None
                place = place._replace(columns=None)  # a transform cannot be undone by another order of its features
            if weight is not None:
                entries[place.name] = _quantized_entry(source, weight, ternary, place)
            else:
                entries[place.name] = _float_entry(source, key, shape, place)
    return entries, rotated.contract(family.arch, folded, grouped)


def _float(key: str, shape: tuple[int, ...], weight: Weight | None) -> tuple[str, tuple[int, ...]]:
    """The name and shape that a tensor has in the float model."""
    return (key, shape) if weight is None else (weight.float_key, weight.shape)


def _quantized_entry(source: Source, weight: Weight, ternary: str, place: Place) -> Entry:
    spec, name = weight.spec, weight.name
    if ternary == "BF16" and not spec.wide:

        def floats() -> ggml.Bytes:
            signs = source.signs(name, weight.in_features, spec)
            matrices = (turned_back(*found, spec.hadamard, signs) for found in source.matrices(weight))
            return np.concatenate([_bytes(place.stored_rows(matrix), torch.bfloat16) for matrix in matrices])

        return Entry(ggml.BF16, place.shape, floats)
    if spec.activation_bits != 8 and ternary != "BF16":
        bits = "float" if spec.activation_bits is None else f"{spec.activation_bits}-bit"
        raise ValueError(f"{name} takes {bits} activations, and every ggml kernel rounds them to 8 bits")
    wide = ggml.WIDE.get(spec.weights)  # such a head stays what it is, also among floats
    if ternary == "Q1_0" and spec.weights == "ternary":
        raise ValueError(f"{name} is ternary, and Q1_0 holds -1 and +1 only; take gguf-q2_0")
    if ternary == "I2_S" and (spec.per_row or spec.group_size is not None) and not wide:
        raise ValueError(f"{name} has a scale for each row, and I2_S has one for the matrix")
    if spec.group_size is not None and spec.group_size % ggml.TERNARY["Q2_0"].block and not wide:
        raise ValueError(
            f"{name} has scales of groups of {spec.group_size}, and no type of llama.cpp has such small ones"
        )
    block = ggml.TERNARY[ternary].block if ternary != "BF16" else 1
    if spec.group_size is not None and ternary != "Q2_0" and spec.group_size % block and not wide:
        raise ValueError(f"{name} has scales of groups of {spec.group_size}, and {ternary} of {block}; take gguf-q2_0")
    kind = wide[0] if wide else ggml.TERNARY[ternary].id
    columns = place.columns
    if columns is not None and spec.group_size is not None:
        columns = group_order(columns, spec.group_size)
        if columns is None:
            raise ValueError(
                f"{name} has scales of groups of {spec.group_size} features, which llama.cpp's order of heads cuts"
            )
    try:
        ggml.nbytes(kind, place.shape)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None

    def one(found: Quantized) -> ggml.Bytes:
        codes = place.stored_rows(found.codes)
        scale = found.scale
        if len(scale) > 1 or scale.ndim > 1:
            scale = scale[place.part] if place.rows is None else scale[place.part][place.rows]
        if columns is not None and scale.ndim > 1:
            scale = scale[:, columns]
        return wide[1](codes, scale) if wide else ggml.pack(ternary, codes, scale)

    return Entry(kind, place.shape, lambda: np.concatenate([one(found) for found in source.matrices(weight)]))


def _float_entry(source: Source, key: str, shape: tuple[int, ...], place: Place) -> Entry:
    kinds = {source.stored()[part][0] for part in source.parts(key)}
    dtype = "F32" if len(place.shape) == 1 or place.float32 else max(kinds, key=lambda kind: (kind == "F32", kind))
    if other := kinds - ggml.FLOATS.keys():
        raise ValueError(f"{key} is stored as {min(other)}; {', '.join(ggml.FLOATS)} is needed")

    def read() -> ggml.Bytes:
        tensor = source.tensor(key)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"is {list(tensor.shape)} in the checkpoint, but {list(shape)} in the model")
        return _bytes(place.stored(tensor), DTYPES[dtype])

    return Entry(ggml.FLOATS[dtype], place.shape, read)


def _bytes(tensor: Tensor, dtype: torch.dtype) -> ggml.Bytes:
    return tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy()
