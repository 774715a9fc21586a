"""A checkpoint folder that MLX quantized, as a Source."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitnet.kernels import layout
from bitnet.linear import BitLinear
from bitnet.packed import PackedBitLinear

from ..files import mlx
from ..files.damaged import Damaged
from ..files.folder import CONFIG, weight_files
from ..files.json_object import read_json
from ..files.safetensors import DTYPES, TensorHeader, read_headers, read_into
from ..hub.models import model_config, skeleton
from ..hub.names import model_names, stored_name
from ..hub.source import copy_files, stats
from ..rounding import Quantized, spec_of
from ..source import Source, naming
from . import prism


class MlxSource(Source):
    """A folder of MLX's affine quantization whose model transformers knows by the same names.

    Its ternary and binary linear layers are PackedBitLinear layers; all other tensors count as floats, embeddings and
    what has more bits as float32. The file does not say which activations the layers take (MLX's are floats): 8 bits.
    Of PrismML's packs (prism.py), rotated layers have `hadamard` and its signs, and floats that were are turned back.

    path:       the folder
    dequantize: all tensors count as floats, the ternary ones, too, and those of 1 and 2 bits that are none

    Raises FileNotFoundError or ValueError naming the file or tensor that is missing, damaged or contradicts the config,
    and matrices of 1 and 2 bits that are not ternary or binary.
    """

    def __init__(self, path: str | Path, *, dequantize: bool = False) -> None:
        path, file = Path(path), Path(path) / CONFIG
        headers = read_headers(weight_files(path))
        stored_config = read_json(file)
        scheme, config = mlx.scheme(file, stored_config), mlx.without(stored_config)
        self.pack = prism.pack_of(file, config, headers)
        if self.pack:
            config, headers = self.pack.config, self.pack.headers
            if self.pack.vision:
                self.notes = [f"{path}: its vision tower ({self.pack.vision} tensors) is left out"]
        elif rotated := next((key for key in config if "hadamard" in key), None):
            raise ValueError(f"{file}: its weights are rotated ({rotated}), which is not read here")
        described = model_config(file, config, len(headers))
        super().__init__(path, config, skeleton(described, file, len(headers)), report=None)
        quantized = {key.removesuffix(".scales") for key in headers if key.endswith(".scales")}
        leaves = ("scales", "biases", "signs") if self.pack else ("scales", "biases")
        parts = {f"{name}.{leaf}" for name in quantized for leaf in leaves}
        with naming(str(path)):
            names = model_names(self.model, [key for key in headers if key not in parts])
        state = self.model.state_dict()
        self.headers: dict[str, TensorHeader] = {}  # by the names of the model; of the words where it is quantized
        self.file_keys = {name: key for key, name in names.items()}
        self.affine: dict[str, mlx.Affine] = {}  # by the name of the tensor in the model
        self.grids: dict[str, tuple[TensorHeader, TensorHeader]] = {}  # scales and biases
        self.scales: dict[str, Tensor] = {}
        for module in quantized:
            if not {f"{module}.weight", f"{module}.biases"} <= headers.keys():
                raise Damaged(headers[f"{module}.scales"].file, f"has {module}.scales without its weight or its biases")
        for key, header in headers.items():
            if (name := names.get(key)) is None:
                continue
            if name not in state:
                raise ValueError(f"{path}: tensor {key} has no place in {type(self.model).__name__}")
            self.headers[name] = header
            module = key.removesuffix(".weight")
            if key != module and module in quantized:
                self.grids[name] = headers[f"{module}.scales"], headers[f"{module}.biases"]
                self._quantized(key, name, scheme.of(module), tuple(state[name].shape), dequantize)
            elif header.dtype not in DTYPES:
                raise Damaged(header.file, f"{key} is stored as {header.dtype}, and has no scales")
            if self._rotated(name) and not self._has_signs(tuple(state[name].shape), headers.get(f"{module}.signs")):
                raise Damaged(header.file, f"the signs of {key} are not those of {prism.MANIFEST}")

    def _quantized(
        self,
        key: str,
        name: str,
        affine: mlx.Affine | None,
        shape: tuple[int, ...],
        dequantize: bool,
    ) -> None:
        """Note how a matrix is stored, and make its layer of the skeleton packed if it is ternary or binary.

        shape: that of the float matrix
        """
        header, grids = self.headers[name], self.grids[name]
        if affine is None:
            raise Damaged(header.file, f"{key} is quantized, but {CONFIG} says that it is not")
        if len(shape) != 2:
            raise Damaged(header.file, f"{key} is quantized, but is no matrix")
        try:
            words, groups = affine.shapes(*shape)
        except ValueError as error:
            raise Damaged(header.file, f"{key}: {error}") from None
        kinds = {header.dtype for header in grids}
        if header.dtype != "U32" or header.shape != words or {g.shape for g in grids} != {groups} or len(kinds) > 1:
            raise Damaged(
                header.file,
                f"{key} is {header.dtype} {list(header.shape)} with scales and biases {list(grids[0].shape)} and "
                f"{list(grids[1].shape)}, but {CONFIG} means U32 {list(words)} with {list(groups)}",
            )
        if not kinds <= {*mlx.KINDS}:
            raise Damaged(header.file, f"the scales of {key} are {kinds.pop()}, not {', '.join(mlx.KINDS)}")
        self.affine[name] = affine
        module = name.removesuffix(".weight")
        linear = self.model.get_submodule(module)
        if dequantize or affine.bits > 2 or not isinstance(linear, nn.Linear):
            return
        with naming(f"{self.path}: tensor {key}"):
            scale, binary = mlx.scale_of(_read(grids[0]), _read(grids[1]), affine)
        self.scales[module] = scale
        spec = spec_of(scale, shape[1], binary)
        if self.pack and self._rotated(name):
            spec = replace(spec, hadamard=self.pack.rotation.block, hadamard_signs=True)
        PackedBitLinear.from_bit_linear(BitLinear.from_linear(linear, spec))

    def _rotated(self, name: str) -> bool:
        return self.pack is not None and name in self.pack.rotation.names

    def _has_signs(self, shape: tuple[int, ...], stored: TensorHeader | None) -> bool:
        """Whether a rotated module's own signs, stored beside it, are those of its number of features."""
        expected = self.pack.signs.get(shape[-1]) if self.pack else None
        if expected is None or stored is None or stored.dtype not in DTYPES or stored.shape != shape[-1:]:
            return False
        return torch.equal(_read(stored).float(), expected.float())

    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        described: dict[str, tuple[str, tuple[int, ...]]] = {}
        for name, header in self.headers.items():
            described[name] = header.dtype, header.shape
            if name not in self.affine:
                described[name] = self.pack.described(name, header) if self.pack else described[name]
                continue
            n, groups = self.grids[name][0].shape
            k = groups * self.affine[name].group_size
            described[name] = "F32", (n, k)
            if (scale := self.scales.get(name.removesuffix(".weight"))) is not None:
                described[name] = "U8", (layout.packed_rows(n), k)
                described[f"{name}_scale"] = "F16" if scale.ndim > 1 else "F32", tuple(scale.shape)
                if self._rotated(name):
                    described[f"{name.removesuffix('.weight')}.signs"] = "I8", (k,)
        return described

    def tensor(self, key: str) -> Tensor:
        module, _, leaf = key.rpartition(".")
        if module in self.scales and leaf == "weight_scale":
            return self.scales[module]
        if module in self.scales and leaf == "weight":
            return layout.pack_ternary(self.quantized(module).codes)
        if module in self.scales and leaf == "signs" and self.pack:
            return self.pack.signs[self.stored()[f"{module}.weight"][1][1]].clone()
        if key not in self.affine:
            return self.pack.restored(key, _read(self.headers[key])) if self.pack else _read(self.headers[key])
        with naming(f"{self.path}: {key}"):
            values = mlx.dequantize(*self._parts(key), self.affine[key])
        return self.pack.rotation.unrotated(key, values) if self.pack else values

    def quantized(self, name: str) -> Quantized:
        key = f"{name}.weight"
        with naming(name):
            return Quantized(mlx.codes_of(*self._parts(key), self.affine[key]), self.scales[name])

    def _parts(self, key: str) -> tuple[Tensor, Tensor, Tensor]:
        scales, biases = self.grids[key]
        return _read(self.headers[key]), _read(scales), _read(biases)

    def file_key(self, key: str) -> str:
        return self.file_keys.get(key) or stored_name(self.model, key)

    def copy_other_files(self, folder: Path, tokenizer: bool = True) -> None:
        copy_files(self.path, folder, tokenizer, but=prism.FILES if self.pack else ())

    def fingerprint(self) -> Any:
        return stats(self.headers.values())


def _read(header: TensorHeader) -> Tensor:
    """A stored tensor; words as int32, of which torch has more operations than of uint32."""
    dtype = torch.int32 if header.dtype == "U32" else DTYPES[header.dtype]
    return read_into(torch.empty(header.shape, dtype=dtype), header.file, header.offset)
