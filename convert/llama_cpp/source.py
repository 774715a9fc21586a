"""A GGUF file as a Source: its tensors with the names, values and order of rows of transformers' model."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

from bitnet.experts import PackedExperts, stacks_of
from bitnet.kernels import layout
from bitnet.kernels.reference import size_of_groups
from bitnet.packing import to_packed
from bitnet.quantize import QuantSpec

from ..conversion.heads import module_name, pack_head
from ..files import ggml
from ..files.damaged import Damaged
from ..files.gguf import REMEDY, TensorInfo, map_tensor, read_header, read_tensor
from ..files.safetensors import DTYPES
from ..hub.models import skeleton
from ..hub.sentences import write_sentences
from ..rounding import Quantized
from ..source import Source, Weight, naming
from ..swap.kinds import to_training
from . import tokenizer as gguf_tokenizer
from .metadata import POOLINGS, config_of, without_drafts
from .places import INNER_NORM, Place, all_places, places
from .rotated import EMBEDDING, HEAD, rotation_of


class GgufSource(Source):
    """A GGUF file of one of FAMILIES' architectures.

    Its matrices of ternary and binary types are PackedBitLinear layers, stacks of experts whose matrices all have such
    types are PackedExperts; all other tensors count as floats, those of other quantized types as float32. The file does
    not say which activations the layers take: 8 bits, as llama.cpp. Matrices that were rotated (rotated.py) are layers
    with `hadamard` and its signs; floats that were are turned back, as float32. Beside such layers an output head in
    Q4_0 is a 4-bit one, and with it the embedding, if the two are one tensor.

    file:       the file
    dequantize: all tensors count as floats, the ternary ones, too, with the +2 that some of them have

    Tensors have the names, values and order of rows that transformers' model has; `weight` and `weight_scale` of a
    packed layer are those of its buffers.

    Raises ValueError naming the tensor, key or byte for a file that is damaged, or that says what is not known here.
    """

    def __init__(self, file: str | Path, *, dequantize: bool = False) -> None:
        self.path = Path(file)
        self.metadata, stored = read_header(self.path)
        shapes = {name: info.shape for name, info in stored.items()}
        self.rotation = rotation_of(self.path, self.metadata, shapes, EMBEDDING, HEAD)
        stored = without_drafts(self.metadata, stored)
        self.family, config = config_of(self.path, self.metadata, stored, lambda: self._vector(stored))
        model = skeleton(config, self.path, len(stored))
        super().__init__(self.path, json.loads(config.to_json_string()), model, report=None)
        inner = self._add_inner_norms(stored, config)
        shapes = {key: tuple(tensor.shape) for key, tensor in self.model.state_dict().items()}
        known = all_places(shapes.items(), config, self.family)
        for name, info in stored.items():
            if name == "rope_freqs.weight":
                continue
            if name not in known:
                raise ValueError(f"{self.path}: tensor {name} has no place in {type(self.model).__name__}")
            shape = known[name][1].shape
            if info.shape != shape:
                raise ValueError(f"{self.path}: tensor {name} is {list(info.shape)}, but by the metadata {list(shape)}")
            if info.kind not in ggml.FLOATS.values() and len(info.shape) < 2:
                raise Damaged(self.path, f"tensor {name} is no matrix, but {ggml.NAMES[info.kind]}", REMEDY)
            if info.kind not in ggml.FLOATS.values() and not _ternary(info):
                kind = gguf.GGMLQuantizationType(info.kind)
                try:
                    gguf.quants.dequantize(np.zeros((1, ggml.nbytes(info.kind, info.shape[-1:])), np.uint8), kind)
                except NotImplementedError:
                    raise ValueError(f"{self.path}: tensor {name} is {kind.name}, which is not read here") from None
        for name in self.rotation.names & known.keys():
            key, place = known[name]
            if place.columns is not None and not self.rotation.grouped:
                raise ValueError(f"{self.path}: {name} is rotated in an order of heads that is not known here")
            known[name] = key, place._replace(columns=None)
        self.shapes: dict[str, tuple[int, ...]] = {}  # of the model's tensors that are here
        self.homes: dict[str, list[tuple[Place, TensorInfo]]] = {}  # and where
        absent = {key for name, (key, _) in known.items() if name not in stored}
        for name, (key, place) in known.items():
            if key not in absent:
                self.shapes[key] = shapes[key]
                self.homes.setdefault(key, []).append((place, stored[name]))
        self.scales: dict[str, list[Tensor]] = {}  # of each matrix of a packed weight, by the model's tensor
        self.packed_keys: dict[str, str] = {}  # the module that holds a packed weight: the tensor of the float model
        self.tied_head = ""  # the name of a 4-bit head whose weight is the embedding's
        if not dequantize:
            self._pack()
        if floats := [name for name in inner if name not in self.packed_keys]:
            raise ValueError(
                f"{self.path}: {floats[0]} has an RMSNorm in front of it, which no plain model can express, and its "
                "weights are to be floats; read it packed, or the checkpoint that it was made from"
            )
        self._stored = self._described()
        self._weights = super().weights()

    def _add_inner_norms(self, stored: dict[str, TensorInfo], config: Any) -> list[str]:
        """Give the projections of the skeleton that have a norm in front of them here one; returns their names."""
        found = []
        for name, module in list(self.model.named_modules()):
            key = f"{name}{INNER_NORM}.weight"
            if isinstance(module, nn.Linear) and any(
                place.name in stored for place in places(key, (module.in_features,), config, self.family)
            ):
                module.rms_norm = nn.RMSNorm(module.in_features, config.rms_norm_eps, device="meta")
                found.append(name)
        return found

    def _pack(self) -> None:
        """Make layers of the skeleton packed; their scales are read now, for the layers' options depend on them."""
        for name, module in list(self.model.named_modules()):
            leaves = ["weight"] if isinstance(module, nn.Linear) else stacks_of(module)
            keys = [f"{name}.{leaf}" for leaf in leaves]
            if not keys or not all(_ternary(info) for key in keys for _, info in self.homes.get(key, [(None, None)])):
                continue
            found = [self._scales(key) for key in keys]
            spec, unified = alike(found, [self.shapes[key] for key in keys])
            if all(self._is_binary(key) for key in keys):
                spec = replace(spec, weights="binary", centered=False)
            if (norm := getattr(module, "rms_norm", None)) is not None:
                spec = replace(spec, rms_norm=True, rms_norm_eps=norm.eps)
            if self._rotated(keys[0]):
                signs = self.rotation.signs is not None
                spec = replace(spec, hadamard=self.rotation.block, hadamard_signs=signs)
            self.scales |= dict(zip(keys, unified, strict=True))
            layer = to_packed(to_training(module, spec))
            packed = [f"{name}.{m.packed}" for m in layer.stacks] if isinstance(layer, PackedExperts) else [name]
            self.packed_keys |= dict(zip(packed, keys, strict=True))
        if self.packed_keys:
            self._pack_head()

    def _pack_head(self) -> None:
        """Make an output head in Q4_0 a 4-bit one."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        name, tied = module_name(self.model, head), module_name(self.model, embedding)
        if f"{name}.weight" not in self.homes:
            name, self.tied_head = tied, name
        key = f"{name}.weight"
        ((_, info),) = self.homes[key]
        if info.kind != ggml.Q4_0 or self._rotated(key):
            self.tied_head = ""
            return
        with naming(f"{self.path}: {key}"):
            self.scales[key] = [ggml.scales_q4_0(map_tensor(self.path, info), info.shape[0])]
        self.packed_keys[name] = key
        pack_head(self.model, "int4")

    def _scales(self, key: str) -> list[list[Tensor]]:
        """The scales of a weight's matrices, expert by expert, of each of the file's tensors that make them up."""
        found: list[list[Tensor]] = []
        for place, info in self.homes[key]:
            with naming(f"{self.path}: tensor {place.name}"):
                each = _matrices(map_tensor(self.path, info), info)
                scales = [ggml.scales(ggml.NAMES[info.kind], data, info.shape[-2]) for data in each]
                found.append([place.restored_scale(scale, info.shape[-1]) for scale in scales])
        return [list(parts) for parts in zip(*found, strict=True)]

    def _is_binary(self, key: str) -> bool:
        """Whether all of a weight's matrices hold -1 and +1 only, by their types."""
        return all(
            ggml.is_binary(ggml.NAMES[info.kind], data, info.shape[-2])
            for _, info in self.homes[key]
            for data in _matrices(map_tensor(self.path, info), info)
        )

    def _rotated(self, key: str) -> bool:
        """Whether a tensor of the model is stored rotated. (Each such one is a matrix of its own in the file.)"""
        return any(place.name in self.rotation.names for place, _ in self.homes[key])

    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return self._stored

    def _described(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        packed = {key: name for name, key in self.packed_keys.items()}
        described = {}
        for key in self.homes:
            shape = self.shapes[key]
            if key in packed:
                scales, weights = self.scales[key], "int4" if self._is_head(key) else "ternary"
                stored = layout.stored_zeros(shape[-2], shape[-1], weights, "meta").shape
                described[f"{packed[key]}.weight"] = "U8", (*shape[:-2], *stored)
                scale = "F16" if scales[0].ndim > 1 else "F32", tuple(_stacked(scales, shape).shape)
                described[f"{packed[key]}.weight_scale"] = scale
                if self.tied_head and self._is_head(key):
                    described[f"{self.tied_head}.weight_scale"] = scale
                if self.rotation.signs is not None and self._rotated(key):
                    described[f"{packed[key]}.signs"] = "I8", shape[-1:]
            else:
                described[key] = self._kind(key), shape
        return described

    def _is_head(self, key: str) -> bool:
        """Whether a packed weight is that of a 4-bit head."""
        return self.homes[key][0][1].kind == ggml.Q4_0

    def tensor(self, key: str) -> Tensor:
        module, _, leaf = key.rpartition(".")
        if module == self.tied_head and leaf == "weight_scale":
            module = module_name(self.model, self.model.get_input_embeddings())
        if module in self.packed_keys and leaf == "weight_scale":
            return _stacked(self.scales[self.packed_keys[module]], self.shapes[self.packed_keys[module]])
        if module in self.packed_keys and leaf == "weight":
            packed = [found for found, _ in self.packed(self._weights[module])]
            return packed[0] if len(self.shapes[self.packed_keys[module]]) == 2 else torch.stack(packed)
        if module in self.packed_keys and leaf == "signs" and self.rotation.signs is not None:
            return self.rotation.signs[self.shapes[self.packed_keys[module]][-1]].clone()
        shape = self.shapes[key]
        floats = [(place, self.rotation.unrotated(place.name, self._floats(info))) for place, info in self.homes[key]]
        parts = [place.restored(values, shape) for place, values in floats]
        whole = parts[0] if len(parts) == 1 else torch.cat([part.float() for part in parts], dim=-2)
        return whole.to(DTYPES[self._kind(key)])

    def _kind(self, key: str) -> str:
        """The dtype of a float tensor, as safetensors spells it: the file's, and float32 for what is computed."""
        computed = self._rotated(key)
        kinds = {"F32" if place.values or computed else ggml.NAMES[info.kind] for place, info in self.homes[key]}
        return kinds.pop() if len(kinds) == 1 and kinds <= ggml.FLOATS.keys() else "F32"

    def _floats(self, info: TensorInfo) -> Tensor:
        """A tensor of the file as it is, of quantized types as float32."""
        data, name = read_tensor(self.path, info), ggml.NAMES[info.kind]
        if info.kind in ggml.FLOATS.values():
            return torch.from_numpy(data).view(DTYPES[name]).view(info.shape)
        if _ternary(info):
            return ggml.dequantize(name, data, math.prod(info.shape[:-1])).view(info.shape)
        rows = data.reshape(math.prod(info.shape[:-1]), -1)
        return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(info.kind))).view(info.shape)

    def weights(self) -> dict[str, Weight]:
        return self._weights

    def quantized(self, name: str) -> Quantized:
        return next(self.matrices(self._weights[name]))

    def matrices(self, weight: Weight) -> Iterator[Quantized]:
        key = self.packed_keys[weight.name]
        if self._is_head(key):
            ((_, info),) = self.homes[key]
            yield Quantized(ggml.unpack_q4_0(read_tensor(self.path, info), info.shape[0]), *self.scales[key])
            return
        homes = [(place, info, _matrices(read_tensor(self.path, info), info)) for place, info in self.homes[key]]
        for expert, scale in enumerate(self.scales[key]):
            parts = []
            for place, info, each in homes:
                with naming(weight.name if weight.experts is None else f"{weight.name}, expert {expert}"):
                    codes = ggml.unpack(ggml.NAMES[info.kind], each[expert], info.shape[-2])
                parts.append(place.restored(codes, tuple(codes.shape)))
            yield Quantized(parts[0] if len(parts) == 1 else torch.cat(parts), scale)

    def check_other_files(self, tokenizer: bool = True) -> None:
        if tokenizer:
            with naming(str(self.path)):
                gguf_tokenizer.tokenizer_of(self.metadata)

    def copy_other_files(self, folder: Path, tokenizer: bool = True) -> None:
        """Write the tokenizer, and what sentence-transformers reads of an embedding model, which is normalized at the
        end, as llama.cpp's commands do. Raises ValueError for a tokenizer that is not known here."""
        if tokenizer:
            with naming(str(self.path)):
                gguf_tokenizer.save_tokenizer(self.metadata, folder)
        if pooling := POOLINGS.get(self.metadata.get(f"{self.metadata['general.architecture']}.pooling_type", 0)):
            write_sentences(folder, pooling, self.model.config.hidden_size)

    def fingerprint(self) -> Any:
        stat = self.path.stat()
        return {str(self.path.resolve()): [stat.st_size, stat.st_mtime_ns]}

    def _vector(self, stored: dict[str, TensorInfo]) -> Tensor:
        """The factors of the rotary frequencies."""
        info = stored["rope_freqs.weight"]
        if info.kind != ggml.F32 or len(info.shape) != 1:
            raise Damaged(self.path, "its rope_freqs.weight is no vector of float32", REMEDY)
        return torch.from_numpy(read_tensor(self.path, info)).view(torch.float32)


def _ternary(info: TensorInfo | None) -> bool:
    return info is not None and ggml.NAMES[info.kind] in ggml.TERNARY


def _matrices(data: ggml.Bytes, info: TensorInfo) -> list[ggml.Bytes]:
    """The bytes of each matrix of a stack; of a matrix, its own."""
    return np.split(data, math.prod(info.shape[:-2]))


def _stacked(scales: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The scales of a weight as its layer holds them."""
    if len(shape) == 2:
        return scales[0]
    return torch.stack(scales) if len(scales[0]) > 1 or scales[0].ndim > 1 else torch.cat(scales)


def alike(found: list[list[list[Tensor]]], shapes: list[tuple[int, ...]]) -> tuple[QuantSpec, list[list[Tensor]]]:
    """The options that can hold all scales of a layer's weights, and those scales in the form they ask for.

    found:  of each weight, of each of its matrices: the scales of its parts, [1], [N] or groups' [N, G]
    shapes: of the weights
    """
    parts = [(part, shape[-1]) for weight, shape in zip(found, shapes, strict=True) for m in weight for part in m]
    sizes = [size_of_groups(k, part.shape[1]) for part, k in parts if part.ndim > 1]
    per_row = any(len(part) > 1 for part, _ in parts)
    per_row |= any(not torch.equal(part, m[0]) for weight in found for m in weight for part in m)
    size = min(sizes, default=None)

    def form(part: Tensor, rows: int, k: int) -> Tensor:
        if size is not None and part.ndim == 1:
            return part.half().expand(rows)[:, None].repeat(1, -(-k // size))
        if size is not None:
            return part.repeat_interleave(size_of_groups(k, part.shape[1]) // size, dim=1)[:, : -(-k // size)]
        return part.expand(rows) if per_row else part

    unified = []
    for weight, shape in zip(found, shapes, strict=True):
        rows = [shape[-2] // len(m) for m in weight]
        each = [[form(part, n, shape[-1]) for part in m] for m, n in zip(weight, rows, strict=True)]
        joined = size is not None or per_row
        unified.append([torch.cat(m).contiguous() if joined else m[0] for m in each])
    return QuantSpec(group_size=size) if size is not None else QuantSpec(per_row=per_row), unified
