"""A checkpoint read one tensor at a time: what conversion, calibration and inspection start from."""

import re
import shutil
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitnet.experts import PackedExperts
from bitnet.kernels import layout, ops
from bitnet.linear import BitLayer, BitLinear
from bitnet.packed import PackedBitLinear
from bitnet.quantize import QuantSpec

from .files.damaged import Damaged
from .files.folder import CONFIG, weight_files
from .files.json_object import read_json
from .files.safetensors import DTYPES, read_headers, read_into
from .hub import match, tokenizers
from .hub.compare import compare_merged
from .hub.config import BitNetConfig
from .hub.legacy import modernize
from .hub.loading import swap_for_loading
from .hub.models import model_config, skeleton
from .hub.names import merge, merged, model_names, stored_name
from .hub.values import stored_codes
from .rounding import Quantized, exact, rounded
from .swap.replace import replace_linear
from .swap.report import Report

# Of a checkpoint folder, what is not weights goes along, but for these.
NOT_COPIED = re.compile(
    r"\..*|config\.json|.*\.(safetensors|bin|pt|pth|ckpt|gguf|onnx|h5|msgpack)|.*\.index\.(.*\.)?json"
)

PIECE = 1 << 22  # elements


class Weight(NamedTuple):
    """A low-bit weight of a checkpoint: one matrix [N, K], or a stack of one per expert."""

    name: str  # of the module that holds it once packed: its weight and weight_scale are <name>.weight, ...
    key: str  # the tensor that holds it here: float weights, or codes
    out_features: int  # N
    in_features: int  # K
    spec: QuantSpec
    latent: bool  # the tensor holds float weights
    experts: int | None = None  # the length of a stack
    transposed: bool = False  # the float weights are [K, N]
    float_key: str = ""  # the tensor that holds them in the float model

    @property
    def shape(self) -> tuple[int, ...]:
        """[N, K] or [E, N, K]."""
        stack = () if self.experts is None else (self.experts,)
        return (*stack, self.out_features, self.in_features)


class Source:
    """A checkpoint whose tensors are read when they are asked for, and a skeleton of its model.

    path:  the folder or file
    model: on the meta device, without values; its low-bit layers are BitLinear where the checkpoint holds float
           weights for them and PackedBitLinear where it holds codes. model.config says what the model is.
    """

    path: Path
    model: PreTrainedModel
    config: dict[str, Any]  # as in config.json
    plain: bool  # nothing in it is low-bit yet: layers() are those that the swap would take, as `report` says
    report: Report | None
    multiplies: bool = False  # it is of transformers' form whose scales are stored as they are, not as 1 / scale
    calibrated: dict[str, Callable[[], Quantized]]  # by layer, what to take instead of rounding its float weight
    problems: list[str]  # what looked wrong in the codes that were read so far
    ternary: Set[str] = frozenset()  # layers of a plain source whose floats seem to be codes * scale already
    scale_ranges: dict[str, tuple[float, float]]  # their least and greatest scales, by matrix

    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every stored tensor in the order of the files: dtype as safetensors spells it, and shape.

        Names are those of the model's state_dict; file_key has the ones in the files.
        """
        raise NotImplementedError

    def tensor(self, key: str) -> Tensor:
        """A stored tensor as it is, or one that is stored in parts()."""
        raise NotImplementedError

    def pieces(self, key: str) -> Iterator[Tensor]:
        """The same, flat and piece by piece."""
        yield from self.tensor(key).view(-1).split(PIECE)

    def quantized(self, name: str) -> Quantized:
        """Codes and scale of the low-bit layer `name`: those stored, or those its float weight is rounded to.

        Raises ValueError naming the layer for NaN or Inf, or bytes that encode no weight.
        """
        raise NotImplementedError

    def check_other_files(self) -> None:
        """Raise ValueError if copy_other_files could not write the tokenizer."""

    def copy_other_files(self, folder: Path, tokenizer: bool = True) -> None:
        """Write what belongs to the model besides config and weights, the tokenizer perhaps, to a folder."""
        raise NotImplementedError

    def fingerprint(self) -> Any:
        """What tells this source from another, or from a later state of itself; JSON."""
        raise NotImplementedError

    def matrices(self, weight: Weight) -> Iterator[Quantized]:
        """Codes and scale of each matrix of a weight, expert by expert."""
        yield self.quantized(weight.name)

    def packed(self, weight: Weight) -> Iterator[tuple[Tensor, Tensor]]:
        """The same in the Hub layout, uint8 [ceil(N/4), K]; 8-bit codes as they are."""
        for codes, scale in self.matrices(weight):
            yield codes if weight.spec.weights == "int8" else layout.pack_ternary(codes), scale

    def file_key(self, key: str) -> str:
        """The name that a tensor has in files of this model: some families keep older ones than state_dict's."""
        return key

    def layers(self) -> dict[str, BitLinear | PackedBitLinear]:
        """The low-bit layers of the skeleton by name, but for those tied to another tensor, which have none stored."""
        stored = self.stored()
        modules = self.model.named_modules()
        layers = {name: module for name, module in modules if isinstance(module, BitLinear | PackedBitLinear)}
        return {name: layer for name, layer in layers.items() if f"{name}.weight" in stored}

    def weights(self) -> dict[str, Weight]:
        """All low-bit weights, those of Conv1D layers and fused experts too, by name; tied ones without layers()'s."""
        found = []
        for name, module in self.model.named_modules():
            if isinstance(module, BitLayer):
                latent = f"{name}.weight_scale" not in self.stored()  # else the codes are stored as floats
                for m in module.matrices():
                    key, packed = f"{name}.{m.parameter}", f"{name}.{m.packed}" if m.packed else name
                    shape = m.out_features, m.in_features
                    found.append(Weight(packed, key, *shape, module.spec, latent, m.experts, m.transposed, key))
            elif isinstance(module, PackedBitLinear):
                key, shape = f"{name}.weight", (module.out_features, module.in_features)
                found.append(Weight(name, key, *shape, module.spec, False, None, module.transposed, key))
            elif isinstance(module, PackedExperts):
                for m in module.stacks:
                    packed, shape = f"{name}.{m.packed}", (m.out_features, m.in_features)
                    key, float_key = f"{packed}.weight", f"{name}.{m.parameter}"
                    found.append(Weight(packed, key, *shape, module.spec, False, m.experts, m.transposed, float_key))
        return {weight.name: weight for weight in found if self.parts(weight.key)}

    def parts(self, key: str) -> list[str]:
        """The stored tensors that make up a tensor of the model: itself, or one for each expert, or none."""
        return [key] if key in self.stored() else []

    def missing(self) -> list[str]:
        """What the model needs and the checkpoint lacks, a line each."""
        tied = self.model.all_tied_weights_keys
        needed = [key for key in self.model.state_dict() if key not in tied and not self.parts(key)]
        return [f"there is no tensor {key}" for key in needed if not match.computed(self.model, key)]

    def mismatches(self) -> list[str]:
        """missing(), and what the checkpoint has in another shape or kind of number."""
        return [*self.missing(), *match.misfits(self.model, self.stored())]

    def nbytes(self, key: str) -> int:
        """Size of a tensor of the model as it is stored."""
        entries = [self.stored()[part] for part in self.parts(key)]
        return sum(DTYPES[dtype].itemsize * torch.Size(shape).numel() for dtype, shape in entries)


class FolderSource(Source):
    """A Hugging Face checkpoint directory: float, or `bitnet` in any of the forms that hf.py lists.

    skip, include, options: those of replace_linear, for a float checkpoint; they decide which layers become low-bit.

    Raises FileNotFoundError or ValueError naming the file or tensor that is missing, damaged or contradicts the config.
    """

    def __init__(self, path: str | Path, *, skip: Any = None, include: Any = None, **options: Any) -> None:
        self.path = Path(path)
        headers = read_headers(weight_files(path))
        file = self.path / CONFIG
        self.config, renamed = modernize(read_json(file), headers)
        headers = {name: headers[key] for key, name in renamed.items()}
        for key, header in headers.items():
            if header.dtype not in DTYPES:
                raise Damaged(header.file, f"{key} is stored as {header.dtype}", f"store it as {', '.join(DTYPES)}")
        config = model_config(file, self.config, len(headers))
        settings = getattr(config, "quantization_config", None)
        self.model = skeleton(config, file, len(headers))
        with naming(str(path)):
            names = model_names(self.model, headers)
        self.headers = {names[key]: header for key, header in headers.items() if key in names}
        self.file_keys = {name: key for key, name in names.items()}
        self._stored = {name: (header.dtype, header.shape) for name, header in self.headers.items()}
        self.settings: BitNetConfig | None = None
        self.report = None
        if settings is None:
            self.report = replace_linear(self.model, skip=skip, include=include, **options)
        else:
            if not isinstance(settings, dict):
                settings = settings.to_dict()
            if settings.get("quant_method") != "bitnet":
                method = settings.get("quant_method")
                raise ValueError(f"{path}: is quantized by {method!r}; a float or a `bitnet` checkpoint is needed")
            self.settings = BitNetConfig.from_dict(settings)
            with naming(str(path)):
                swap_for_loading(self.model, self.settings, self.headers)
        self.plain, self.calibrated, self.problems, self.scale_ranges = settings is None, {}, [], {}
        if self.settings is not None and self.settings.linear_class == "autobitlinear":
            self.multiplies = self.settings.quantization_mode == "offline"
        self.merged = merged(self.model, self.headers)
        self._layers, self._weights = super().layers(), super().weights()
        if self.plain and self._weights and next(iter(self._weights.values())).spec.weights == "ternary":
            self.ternary = self._probe()
            self._weights = super().weights()  # with the options that were found
        self.problems += [f"{line}; it will be random" for line in super().missing() if "pooler." in line]

    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return self._stored

    def file_key(self, key: str) -> str:
        return self.file_keys.get(key) or stored_name(self.model, key)

    def layers(self) -> dict[str, BitLinear | PackedBitLinear]:
        return self._layers

    def tensor(self, key: str) -> Tensor:
        if key in self.merged:
            return merge(self.model, key, {part: partial(self.tensor, part) for part in self.merged[key]})
        header = self.headers[key]
        return read_into(torch.empty(header.shape, dtype=DTYPES[header.dtype]), header.file, header.offset)

    def pieces(self, key: str) -> Iterator[Tensor]:
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
            compare_merged(self.model, self.headers)
        except ValueError as error:
            lines.append(str(error))
        return lines

    def parts(self, key: str) -> list[str]:
        return [key] if key in self.headers else self.merged.get(key, [])

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
                    shape = weight.in_features, weight.out_features
                    found = Quantized(*stored_codes(matrix, scale, *shape, self.settings))
                    if spec.weights != "int8":
                        self._note(where, found)
                    yield found

    def packed(self, weight: Weight) -> Iterator[tuple[Tensor, Tensor]]:
        if not weight.latent or weight.spec.weights != "ternary" or weight.name in self.calibrated:
            yield from super().packed(weight)
            return
        for where, matrix, _ in self._each(weight):
            with naming(where):
                found = exact(matrix, weight.spec.per_row) if self.plain else None
                if found:
                    yield layout.pack_ternary(found.codes), found.scale
                else:
                    yield ops.pack_latent(matrix, per_row=weight.spec.per_row)

    def _rounded(self, matrix: Tensor, spec: QuantSpec) -> Quantized:
        if self.plain:
            return rounded(matrix, spec)
        return Quantized(*ops.quantize_weight(matrix, kind=spec.weights, per_row=spec.per_row))  # as the layer does

    def _probe(self) -> set[str]:
        """The layers whose float weights seem to be ternary, by three of their rows; row by row, if these say so."""
        found = set()
        for weight in self._weights.values():
            n, k, header = weight.out_features, weight.in_features, self.headers.get(weight.key)
            module = self.model.get_submodule(weight.name.rpartition(".packed_")[0] or weight.name)
            if not isinstance(module, BitLinear) or header is None or header.shape != (n, k):
                continue
            tops = set()
            for row in (0, n // 2, n - 1):
                values = torch.empty(1, k, dtype=DTYPES[header.dtype])
                read_into(values, header.file, header.offset + row * values.nbytes)
                one = exact(values, per_row=True)
                if one is None or int(one.codes.count_nonzero()) < 2:
                    break
                tops.add(float(one.scale))
            else:
                found.add(weight.name)
                if len(tops) > 1:
                    module.spec = replace(module.spec, per_row=True)
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
            yield weight.name, values.contiguous(), scale
            return
        for expert in range(weight.experts):
            part = None if scale is None else scale[expert]
            yield f"{weight.name}, expert {expert}", values[expert].contiguous(), part

    def copy_other_files(self, folder: Path, tokenizer: bool = True) -> None:
        for path in sorted(self.path.iterdir()):
            wanted = not NOT_COPIED.fullmatch(path.name) and (tokenizer or not tokenizers.FILES.fullmatch(path.name))
            if path.is_file() and wanted:
                shutil.copyfile(path, folder / path.name)

    def fingerprint(self) -> Any:
        stats = {path: path.stat() for path in sorted({header.file for header in self.headers.values()})}
        return {str(path.resolve()): [stat.st_size, stat.st_mtime_ns] for path, stat in stats.items()}


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors about values say which layer they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def uniform(where: str, codes: Tensor) -> list[str]:
    """The problem, in words, of a matrix whose ternary codes are all the same; none if they are not."""
    flat = codes.reshape(-1)
    if not bool((flat[:64] == flat[0]).all()) or not bool((flat == flat[0]).all()):
        return []
    value = ("-1", "0", "+1")[int(flat[0]) + 1]
    return [f"{where}: every weight is {value}; the checkpoint is probably damaged (some uploads are)"]


def open_source(path: str | Path, *, floats: bool = False, **swap: Any) -> Source:
    """A checkpoint folder, or a GGUF file, as a Source.

    floats: of a GGUF file all matrices count as floats, also those whose scales no packed layer can hold
    swap:   skip, include and options, for a float checkpoint
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such folder or file")
    if Path(path).is_file():
        from .llama_cpp.source import GgufSource

        return GgufSource(path, dequantize=floats)
    return FolderSource(path, **swap)
