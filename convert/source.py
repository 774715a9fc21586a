"""A checkpoint read one tensor at a time: what conversion, calibration and inspection start from."""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitnet.experts import PackedExperts
from bitnet.kernels import layout
from bitnet.linear import BitLayer, BitLinear, random_signs
from bitnet.packed import PackedBitLinear, PackedEmbedding
from bitnet.quantize import QuantSpec

from .files.safetensors import DTYPES
from .hub import match
from .rounding import Quantized
from .swap.report import Report

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

    path:   the folder or file
    config: as in config.json
    model:  on the meta device, without values; its low-bit layers are BitLinear where the checkpoint holds float
            weights for them and PackedBitLinear where it holds codes. model.config says what the model is.
    report: of a float checkpoint, what the swap would take: these are its layers()
    """

    multiplies: bool = False  # it is of transformers' form whose scales are stored as they are, not as 1 / scale
    ternary: Set[str] = frozenset()  # layers of a plain source whose floats seem to be codes * scale already
    notes: Sequence[str] = ()  # what of it is not read, in sentences
    signs_seed = 0  # of a plain source, what the signs of layers with hadamard_signs are drawn from

    def __init__(self, path: Path, config: dict[str, Any], model: PreTrainedModel, report: Report | None) -> None:
        self.path, self.config, self.model, self.report = path, config, model, report
        self.calibrated: dict[str, Callable[[], Quantized]] = {}
        self.problems: list[str] = []  # what looked wrong in the codes that were read so far
        self.scale_ranges: dict[str, tuple[float, float]] = {}  # their least and greatest scales, by matrix

    @property
    def plain(self) -> bool:
        """Whether nothing in it is low-bit yet."""
        return self.report is not None

    def round_to(self, codes: dict[str, Callable[[], Quantized]]) -> None:
        """From now on take these, by layer, instead of rounding its float weight."""
        self.calibrated = codes

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

    def signs(self, name: str, in_features: int, spec: QuantSpec) -> Tensor | None:
        """The signs int8 [K] of a layer, stored or, of a plain source, to be; None where its options ask for none."""
        if not spec.hadamard_signs:
            return None
        return random_signs(in_features, spec, "cpu", self.signs_seed) if self.plain else self.tensor(f"{name}.signs")

    def check_other_files(self, tokenizer: bool = True) -> None:
        """Raise ValueError if copy_other_files could not do what it is to."""

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
        """The same as they are stored: ternary codes in the Hub layout, uint8 [ceil(N/4), K]."""
        for codes, scale in self.matrices(weight):
            yield layout.pack_codes(codes, weight.spec.weights), scale

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
        """All low-bit weights, those of Conv1D layers, fused experts and embeddings too, by name, a tied one once."""
        found = []
        for name, module in self.model.named_modules():
            if isinstance(module, BitLayer):
                latent = f"{name}.weight_scale" not in self.stored()  # else the codes are stored as floats
                for m in module.latent_weights():
                    key, packed = f"{name}.{m.parameter}", f"{name}.{m.packed}" if m.packed else name
                    shape = m.out_features, m.in_features
                    found.append(Weight(packed, key, *shape, module.spec, latent, m.experts, m.transposed, key))
            elif isinstance(module, PackedBitLinear | PackedEmbedding):
                key, shape = f"{name}.weight", (module.out_features, module.in_features)
                found.append(
                    Weight(name, key, *shape, module.spec, False, None, getattr(module, "transposed", False), key)
                )
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
        absent = set(self.model.all_tied_weights_keys)
        if self.plain:  # whose signs are drawn
            absent |= {f"{name}.signs" for name, m in self.model.named_modules() if isinstance(m, BitLayer)}
        needed = [key for key in self.model.state_dict() if key not in absent and not self.parts(key)]
        return [f"there is no tensor {key}" for key in needed if not match.computed(self.model, key)]

    def mismatches(self) -> list[str]:
        """missing(), and what the checkpoint has in another shape or kind of number."""
        return [*self.missing(), *match.misfits(self.model, self.stored())]

    def nbytes(self, key: str) -> int:
        """Size of a tensor of the model as it is stored."""
        entries = [self.stored()[part] for part in self.parts(key)]
        return sum(DTYPES[dtype].itemsize * torch.Size(shape).numel() for dtype, shape in entries)


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
