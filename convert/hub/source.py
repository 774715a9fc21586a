"""A Hugging Face checkpoint folder as a Source."""

import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitnet.kernels import layout
from bitnet.linear import BitLinear
from bitnet.packed import PackedBitLinear
from bitnet.packing import pack_matrix, quantize_matrix
from bitnet.quantize import QuantSpec

from ..files.damaged import Damaged
from ..files.folder import CONFIG, inside, weight_files
from ..files.json_object import read_json
from ..files.safetensors import DTYPES, TensorHeader, read_headers, read_into
from ..rounding import Quantized, exact, rotated, rounded, ternary_spec
from ..source import PIECE, Source, Weight, naming, uniform
from ..swap.replace import replace_linear
from . import tokenizers
from .compare import compare_merged
from .config import BitNetConfig
from .legacy import modernize
from .loading import swap_for_loading
from .models import model_config, skeleton
from .names import merge, merged, model_names, stored_name
from .sentences import module_folders
from .values import stored_codes

# Of a checkpoint folder, what is not weights goes along, but for these.
NOT_COPIED = re.compile(
    r"\..*|config\.json|.*\.(safetensors|bin|pt|pth|ckpt|gguf|onnx|h5|msgpack)|.*\.index\.(.*\.)?json"
)


class FolderSource(Source):
    """A Hugging Face checkpoint directory: float, or `bitnet` in any of the forms that config.py lists.

    skip, include, signs_seed, options: those of replace_linear, for a float checkpoint; they decide which layers become
        low-bit, and how.

    Raises FileNotFoundError or ValueError naming the file or tensor that is missing, damaged or contradicts the config.
    """

    def __init__(
        self, path: str | Path, *, skip: Any = None, include: Any = None, signs_seed: int = 0, **options: Any
    ) -> None:
        headers = read_headers(weight_files(path))
        file = Path(path) / CONFIG
        stored_config, renamed = modernize(read_json(file), headers)
        headers = {name: headers[key] for key, name in renamed.items()}
        for key, header in headers.items():
            if header.dtype not in DTYPES:
                raise Damaged(header.file, f"{key} is stored as {header.dtype}", f"store it as {', '.join(DTYPES)}")
        config = model_config(file, stored_config, len(headers))
        settings = getattr(config, "quantization_config", None)
        model = skeleton(config, file, len(headers))
        with naming(str(path)):
            names = model_names(model, headers)
        self.headers = {names[key]: header for key, header in headers.items() if key in names}
        self.file_keys = {name: key for key, name in names.items()}
        self.settings: BitNetConfig | None = None
        report = None
        if settings is None:
            report = replace_linear(model, skip=skip, include=include, signs_seed=signs_seed, **options)
            self.signs_seed = signs_seed
        else:
            if not isinstance(settings, dict):
                settings = settings.to_dict()
            if settings.get("quant_method") != "bitnet":
                method = settings.get("quant_method")
                raise ValueError(f"{path}: is quantized by {method!r}; a float or a `bitnet` checkpoint is needed")
            self.settings = BitNetConfig.from_dict(settings)
            with naming(str(path)):
                swap_for_loading(model, self.settings, self.headers)
        super().__init__(Path(path), stored_config, model, report)
        if self.settings is not None and self.settings.linear_class == "autobitlinear":
            self.multiplies = self.settings.quantization_mode == "offline"
        self.merged = merged(self.model, self.headers)
        self._stored = self._apart()
        self._layers, self._weights = super().layers(), super().weights()
        spec = next(iter(self._weights.values())).spec if self.plain and self._weights else None
        if spec is not None and spec.weights == "ternary" and spec.hadamard is None:
            self.ternary = self._probe()
            self._weights = super().weights()  # with the options that were found
        self.problems += [f"{line}; it will be random" for line in super().missing() if "pooler." in line]

    def _apart(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """stored(), with what transformers makes of a stored tensor (q, k and v, or it transposed) in its place."""
        state = self.model.state_dict()
        made: dict[str, list[str]] = {}
        for name, parts in self.merged.items():
            if len(parts) == 1:
                made.setdefault(parts[0], []).append(name)
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for key, header in self.headers.items():
            names = made.get(key, [])
            if names and state.keys() >= {*names}:
                found |= {name: (header.dtype, tuple(state[name].shape)) for name in names}
            else:
                found[key] = header.dtype, header.shape
        return found

    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return self._stored

    def file_key(self, key: str) -> str:
        return self.file_keys.get(key) or stored_name(self.model, key)

    def layers(self) -> dict[str, BitLinear | PackedBitLinear]:
        return self._layers

    def tensor(self, key: str) -> Tensor:
        if key in self.merged:
            return merge(self.model, key, {part: partial(self._read, part) for part in self.merged[key]})
        return self._read(key)

    def _read(self, key: str) -> Tensor:
        header = self.headers[key]
        return read_into(torch.empty(header.shape, dtype=DTYPES[header.dtype]), header.file, header.offset)

    def pieces(self, key: str) -> Iterator[Tensor]:
        if key in self.merged:
            yield from super().pieces(key)
            return
        header, dtype = self.headers[key], DTYPES[self.headers[key].dtype]
        count = torch.Size(header.shape).numel()
        for start in range(0, count, PIECE):
            piece = torch.empty(min(PIECE, count - start), dtype=dtype)
            yield read_into(piece, header.file, header.offset + start * dtype.itemsize)

    def weights(self) -> dict[str, Weight]:
        return self._weights

    def missing(self) -> list[str]:
        # models without a use for the pooler are stored without it
        return [line for line in super().missing() if "pooler." not in line]

    def mismatches(self) -> list[str]:
        lines = super().mismatches()
        try:
            compare_merged(self.model, self.headers, self.merged)
        except ValueError as error:
            lines.append(str(error))
        return lines

    def parts(self, key: str) -> list[str]:
        return [key] if key in self._stored else self.merged.get(key, [])

    def quantized(self, name: str) -> Quantized:
        return next(self.matrices(self._weights[name]))

    def matrices(self, weight: Weight) -> Iterator[Quantized]:
        if weight.name in self.calibrated:
            yield self.calibrated[weight.name]()
            return
        spec = weight.spec
        for where, matrix, scale in self._each(weight):
            with naming(where):
                if scale is None:
                    yield self._rounded(matrix, spec)
                else:
                    assert self.settings is not None
                    shape = weight.in_features, weight.out_features, spec.weights
                    found = Quantized(*stored_codes(matrix, scale, *shape, self.settings))
                    if not spec.wide:
                        self._note(where, found)
                    yield found

    def packed(self, weight: Weight) -> Iterator[tuple[Tensor, Tensor]]:
        if not weight.latent or weight.spec.weights != "ternary" or weight.name in self.calibrated:
            yield from super().packed(weight)
            return
        for where, matrix, _ in self._each(weight):
            with naming(where):
                found = exact(matrix, weight.spec) if self.plain else None
                if found:
                    yield layout.pack_ternary(found.codes), found.scale
                else:
                    yield pack_matrix(matrix, weight.spec)

    def _rounded(self, matrix: Tensor, spec: QuantSpec) -> Quantized:
        if self.plain:
            return rounded(matrix, spec)
        return Quantized(*quantize_matrix(matrix, spec))  # as the layer does

    def _probe(self) -> set[str]:
        """The layers whose float weights seem to be codes * scale, by three of their rows, and how the scales lie."""
        found = set()
        for weight in self._weights.values():
            n, k, header = weight.out_features, weight.in_features, self.headers.get(weight.key)
            module = self.model.get_submodule(weight.name.rpartition(".packed_")[0] or weight.name)
            if not isinstance(module, BitLinear) or header is None or header.shape != (n, k):
                continue
            rows = torch.empty(3, k, dtype=DTYPES[header.dtype])
            for values, row in zip(rows, (0, n // 2, n - 1), strict=True):
                read_into(values, header.file, header.offset + row * values.nbytes)
            if (spec := ternary_spec(rows, module.spec)) is not None:
                found.add(weight.name)
                module.spec = spec
        return found

    def _note(self, where: str, found: Quantized) -> None:
        self.problems += uniform(where, found.codes)
        self.scale_ranges[where] = float(found.scale.min()), float(found.scale.max())

    def _each(self, weight: Weight) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        """Name, values and stored scale (None where the values are float weights) of each matrix of a weight."""
        values = self.tensor(weight.key)
        scale = None if weight.latent else self.tensor(f"{weight.name}.weight_scale")
        if weight.latent and weight.transposed:
            values = values.mT
        if weight.experts is None:
            values = values.contiguous()
            if self.plain:
                values = rotated(values, weight.spec, self.signs(weight.name, weight.in_features, weight.spec))
            yield weight.name, values, scale
            return
        for expert in range(weight.experts):
            part = None if scale is None else scale[expert]
            yield f"{weight.name}, expert {expert}", values[expert].contiguous(), part

    def check_other_files(self, tokenizer: bool = True) -> None:
        for module in module_folders(self.path):
            for path in module.rglob("*"):
                if not inside(self.path, path):
                    raise Damaged(
                        self.path, f"holds {path.relative_to(self.path)}, a link that leads out of the folder"
                    )

    def copy_other_files(self, folder: Path, tokenizer: bool = True) -> None:
        copy_files(self.path, folder, tokenizer)
        for module in module_folders(self.path):  # sentence-transformers': pooling, layers with weights of their own
            for path in sorted(module.rglob("*")) if module.is_dir() else []:
                if path.is_file() and not path.name.startswith("."):
                    copy = folder / path.relative_to(self.path)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, copy)

    def fingerprint(self) -> Any:
        return stats(self.headers.values())


def copy_files(source: Path, folder: Path, tokenizer: bool, but: Collection[str] = ()) -> None:
    """Copy what of a checkpoint folder is no weights and no config.json, nor named in `but`; the tokenizer perhaps."""
    for path in sorted(source.iterdir()):
        wanted = not NOT_COPIED.fullmatch(path.name) and (tokenizer or not tokenizers.FILES.fullmatch(path.name))
        wanted = wanted and path.name not in but
        if path.is_file() and wanted:
            shutil.copyfile(path, folder / path.name)


def stats(headers: Iterable[TensorHeader]) -> dict[str, list[int]]:
    """What tells the files of some tensors from others, or from a later state of themselves."""
    found = {path: path.stat() for path in sorted({header.file for header in headers})}
    return {str(path.resolve()): [stat.st_size, stat.st_mtime_ns] for path, stat in found.items()}
