"""What is in a checkpoint: its layers, what their codes look like, what is wrong, and how it differs from another."""

import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from bitnet import tables
from bitnet.linear import describe
from bitnet.packed import PackedBitLinear
from bitnet.progress import track
from bitnet.quantize import QuantSpec

from .files.safetensors import DTYPES
from .hub.sentences import read_sentences
from .opening import open_source
from .rounding import turned_back
from .source import Source, Weight, uniform


@dataclass(frozen=True)
class MatrixReport:
    """One low-bit layer, or one other tensor."""

    name: str
    kind: str  # "packed", "latent", "float" or "integer"
    shape: tuple[int, ...]
    weight_bits: float  # a weight takes in the files, its scale included
    what: str  # the layer's options, or the tensor's dtype
    scale: tuple[float, float] | None = None  # least and greatest
    shares: tuple[float, float, float] | None = None  # of -1, 0 and +1, where codes are ternary

    @property
    def entropy(self) -> float | None:
        """Bits a weight would take in an ideal code that treats every weight alike (Shannon): -sum p log2 p."""
        return None if self.shares is None else -sum(p * math.log2(p) for p in self.shares if p)


@dataclass
class Inspection:
    """What inspect_checkpoint found; print it for a table."""

    path: Path
    matrices: list[MatrixReport] = field(default_factory=list)
    other_bytes: int = 0  # norms, biases and other vectors
    problems: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)  # how each kind of low-bit layer runs on this machine
    sentences: str = ""  # what makes embeddings of it, in words, where the folder says it
    notes: list[str] = field(default_factory=list)  # what of it is not read

    def __str__(self) -> str:
        lines: list[tuple[str, ...]] = [
            ("name", "kind", "shape", "bits", "scale", "-1", "0", "+1", "entropy", "options")
        ]
        for m in self.matrices:
            low, high = m.scale or (0, 0)
            scale = "" if not m.scale else f"{low:.4g}" if low == high else f"{low:.3g} .. {high:.3g}"
            shares = [f"{100 * p:.1f} %" for p in m.shares] if m.shares else ["", "", ""]
            entropy = "" if m.entropy is None else f"{m.entropy:.3f}"
            shape = "x".join(map(str, m.shape))
            lines.append((m.name, m.kind, shape, f"{m.weight_bits:.3g}", scale, *shares, entropy, m.what))
        return "\n".join([tables.text(lines, right=range(3, 9)), self.totals(), *self.runs, self.verdict()])

    def totals(self) -> str:
        """Weights and bytes by kind, in a line each."""
        lines = []
        for kind in ("packed", "latent", "float", "integer"):
            some = [m for m in self.matrices if m.kind == kind]
            weights = sum(math.prod(m.shape) for m in some)
            size = sum(math.prod(m.shape) * m.weight_bits / 8 for m in some)
            if some:
                lines.append(f"{kind}: {len(some)} matrices, {weights:,} weights, {size / 1e6:,.2f} MB")
        lines.append(f"norms, biases and other vectors: {self.other_bytes / 1e6:,.2f} MB")
        return "\n".join([*lines, *([self.sentences] if self.sentences else []), *self.notes])

    def verdict(self) -> str:
        """The problems, or that there are none."""
        if not self.problems:
            return "no problems found"
        return "\n".join([f"{len(self.problems)} problems found:", *(f"  {problem}" for problem in self.problems)])

    def plot(self, file: str | Path) -> None:
        """Share of zeros, entropy and scale of every ternary layer by depth, one line a kind of layer, as a picture."""
        from matplotlib.figure import Figure

        groups: dict[str, list[tuple[int, MatrixReport]]] = {}
        for m in self.matrices:
            depth = re.search(r"(?<![^.])\d+(?=\.)", m.name)
            if m.shares:
                groups.setdefault(m.name.rpartition(".")[2], []).append((int(depth[0]) if depth else 0, m))
        if not groups:
            raise ValueError(f"{self.path}: no ternary layers to plot")
        figure = Figure(figsize=(8, 8), layout="constrained")
        axes = figure.subplots(3, sharex=True)
        for name, rows in groups.items():
            depths = [depth for depth, _ in rows]
            axes[0].plot(depths, [100 * m.shares[1] for _, m in rows if m.shares], ".-", label=name)
            axes[1].plot(depths, [m.entropy for _, m in rows], ".-")
            axes[2].plot(depths, [m.scale[1] for _, m in rows if m.scale], ".-")
        axes[0].set(ylabel="weights that are 0, %", title=str(self.path))
        axes[1].axhline(math.log2(3), color="gray", linewidth=0.8)
        axes[1].set(ylabel="entropy, bits a weight")
        axes[2].set(ylabel="scale", yscale="log", xlabel="block")
        axes[2].xaxis.get_major_locator().set_params(integer=True)
        figure.legend(loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(file, dpi=120)


def inspect_checkpoint(path: str | Path, console: Console | None = None) -> Inspection:
    """Read a checkpoint folder or GGUF file once and describe every matrix in it.

    Layers that hold float weights to be rounded (latent) are described by the codes they round to. What is wrong with
    a tensor is noted in `problems` and does not stop the reading; a file that is cut short raises ValueError.
    """
    source = open_source(path)
    found = Inspection(Path(path))
    weights = {} if source.plain else source.weights()
    starts = {source.parts(weight.key)[0]: weight for weight in weights.values()}
    inner = {part for weight in weights.values() for part in source.parts(weight.key)}
    inner |= {f"{name}.weight_scale" for name in weights}
    stored = source.stored()
    found.problems += [*source.problems, *source.mismatches()]
    found.runs, found.notes = runs_here(weights.values()), list(source.notes)
    try:
        found.sentences = str(read_sentences(source.path) or "")
    except (ValueError, OSError) as error:
        found.problems.append(str(error))
    for key, (dtype, shape) in track(stored.items(), "reading", "tensors", console or Console(stderr=True)):
        try:
            if key in starts:
                found.matrices.append(_matrix(source, starts[key], found.problems))
            if key in inner:
                continue
            if DTYPES[dtype].is_floating_point:
                _check_floats(source, key, found.problems)
            if len(shape) > 1 and not key.endswith(".weight_scale"):  # a tied head has scales of its own
                kind = "float" if DTYPES[dtype].is_floating_point else "integer"
                found.matrices.append(MatrixReport(key, kind, shape, 8 * DTYPES[dtype].itemsize, dtype))
            else:
                found.other_bytes += source.nbytes(key)
        except ValueError as error:
            found.problems.append(str(error))
    packed = [m for m in found.matrices if m.kind == "packed" and m.shares]
    found.problems += scale_problems({m.name: m.scale for m in packed if m.scale})
    return found


def runs_here(weights: Iterable[Weight]) -> list[str]:
    """Which backend multiplies by low-bit weights of each kind on this machine, once packed, and how activations run.

    Nothing is read for it: a layer with a few rows of zeros is asked.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds: dict[QuantSpec, list[Weight]] = {}
    for weight in weights:
        kinds.setdefault(weight.spec, []).append(weight)
    lines = []
    for spec, some in kinds.items():
        layer = PackedBitLinear(max(weight.in_features for weight in some), 4, False, device, **asdict(spec))
        count = sum(weight.experts or 1 for weight in some)
        where = f"{count:,} {'matrices run' if count > 1 else 'matrix runs'} on {device}, backend {layer.prepack()[1]}"
        lines.append(f"{where}: {layer.options()}")
    return lines


def _matrix(source: Source, weight: Weight, problems: list[str]) -> MatrixReport:
    size = weight.out_features * weight.in_features
    total, counts, scales = 0, [0, 0, 0], []
    for expert, (codes, scale) in enumerate(source.matrices(weight)):
        plus, used = int((codes > 0).count_nonzero()), int(codes.count_nonzero())
        here = used - plus, size - used, plus
        if not weight.spec.wide:
            problems += uniform(weight.name if weight.experts is None else f"{weight.name}, expert {expert}", codes)
        counts = [a + b for a, b in zip(counts, here, strict=True)]
        scales.append(scale)
        total += size
    scale = torch.cat([scale.view(-1) for scale in scales])
    stored = source.nbytes(weight.key) + (0 if weight.latent else scale.nbytes)
    kind, limits = "latent" if weight.latent else "packed", (float(scale.min()), float(scale.max()))
    shares = None if weight.spec.wide else (counts[0] / total, counts[1] / total, counts[2] / total)
    return MatrixReport(weight.name, kind, weight.shape, 8 * stored / total, describe(weight.spec), limits, shares)


def _check_floats(source: Source, key: str, problems: list[str]) -> None:
    bad = nonzero = 0
    for piece in source.pieces(key):
        bad += int((~piece.isfinite()).count_nonzero())
        nonzero += int(piece.count_nonzero())
    if bad:
        problems.append(f"{key}: {bad:,} values are NaN or Inf")
    if not nonzero and key.endswith("weight"):
        problems.append(f"{key}: every value is zero")


def scale_problems(scales: dict[str, tuple[float, float]]) -> list[str]:
    """Scales that are far from those of the other layers, or all so large that they were probably meant to divide.

    scales: of ternary layers by name, the least and the greatest
    """
    if not scales:
        return []
    middle = sorted(high for _, high in scales.values())[len(scales) // 2]
    if middle > 1:
        return [
            f"half of the scales are above {middle:.3g}, so their weights would be that large: the scales are probably "
            "the reciprocals of what config.json says (linear_class and quantization_mode decide)"
        ]
    return [
        f"{name}: its scale of {low:.3g} to {high:.3g} is far from {middle:.3g}, the middle of all layers"
        for name, (low, high) in scales.items()
        if not middle / 100 < low <= high < middle * 100
    ]


@dataclass(frozen=True)
class Comparison:
    """What diff_checkpoints found; print it for a table."""

    equal: int  # tensors and layers
    differences: dict[str, str]  # by name

    def __str__(self) -> str:
        lines = [tables.text(self.differences.items())] if self.differences else []
        return "\n".join([*lines, f"{self.equal} equal, {len(self.differences)} different"])


def diff_checkpoints(one: str | Path, other: str | Path, console: Console | None = None) -> Comparison:
    """Compare two checkpoints, in whatever forms, tensor by tensor.

    Layers that are low-bit in both, and rotated alike, are compared as codes and scales, all else as numbers: a packed
    layer equals its float twin if that holds codes * scale, turned back if it rotates, in the precision that it has.
    """
    a, b = open_source(one), open_source(other)
    names = list(dict.fromkeys([*_named(a), *_named(b)]))
    low_bit = [{w.float_key: w for w in s.weights().values()} if not s.plain else {} for s in (a, b)]
    differences = {}
    for name in track(names, "comparing", "tensors", console or Console(stderr=True)):
        x, y = _values(a, low_bit[0], name), _values(b, low_bit[1], name)
        if what := _difference(x, y):
            differences[name] = what
    return Comparison(len(names) - len(differences), differences)


def _named(source: Source) -> list[str]:
    """All tensors, those that make up a low-bit weight as one, under the name that it has in the float model."""
    weights = [] if source.plain else list(source.weights().values())
    names = {part: weight.float_key for weight in weights for part in source.parts(weight.key)}
    names |= {f"{weight.name}.bias": f"{weight.float_key}_bias" for weight in weights if weight.experts is not None}
    inner = {f"{weight.name}.{part}" for weight in weights for part in ("weight_scale", "signs")}
    return [names.get(key, key) for key in source.stored() if key not in inner]


class _LowBit(NamedTuple):
    """A low-bit weight: codes [..., N, K], scale [..., 1], [..., N] or [..., N, G], and how its features are turned."""

    codes: Tensor
    scale: Tensor
    block: int | None
    signs: Tensor | None
    transposed: bool

    def floats(self) -> Tensor:
        """What the float model has for it."""
        floats = turned_back(self.codes, self.scale, self.block, self.signs)
        return floats.mT if self.transposed else floats

    def comparable(self, other: "_LowBit") -> bool:
        """Whether both are rotated alike, and scales stand for the same groups, or one is of all the other's are of."""
        a, b = self.scale, other.scale
        alike = a.dtype == b.dtype and (a.dtype != torch.float16 or a.shape == b.shape)
        signs = (self.signs is None and other.signs is None) or (
            self.signs is not None and other.signs is not None and torch.equal(self.signs, other.signs)
        )
        return alike and self.block == other.block and signs


def _values(source: Source, weights: dict[str, Weight], key: str) -> _LowBit | Tensor | None:
    """A low-bit weight, or another tensor as it is.

    weights: the source's low-bit ones, by the names they have in the float model
    """
    if weight := weights.get(key):
        codes, scales = (torch.stack(each) for each in zip(*source.matrices(weight), strict=True))
        if weight.experts is None:
            codes, scales = codes[0], scales[0]
        signs = source.signs(weight.name, weight.in_features, weight.spec)
        return _LowBit(codes, scales, weight.spec.hadamard, signs, weight.transposed)
    if (stack := weights.get(key.removesuffix("_bias"))) and not source.parts(key):
        key = f"{stack.name}.bias"
    return source.tensor(key) if source.parts(key) else None


def _difference(a: _LowBit | Tensor | None, b: _LowBit | Tensor | None) -> str:
    """How two tensors differ, in words; empty if they do not."""
    if a is None or b is None:
        return f"only in the {'second' if a is None else 'first'}"
    if isinstance(a, _LowBit) and isinstance(b, _LowBit) and a.comparable(b):
        if a.codes.shape != b.codes.shape:
            return f"shape {list(a.codes.shape)} against {list(b.codes.shape)}"
        words = []
        if changed := int((a.codes != b.codes).count_nonzero()):
            words.append(f"{changed:,} of {a.codes.numel():,} codes ({100 * changed / a.codes.numel():.2g} %)")
        if float(change := torch.where(a.scale == b.scale, 0, a.scale / b.scale - 1).abs().max()):
            words.append(f"scale by up to {100 * change:.2g} %")
        return ", ".join(words)
    kept = next((t.dtype for t in (a, b) if isinstance(t, Tensor)), torch.float32)  # how precise a float twin is
    x, y = (t.floats().to(kept).float() if isinstance(t, _LowBit) else t.float() for t in (a, b))
    if x.shape != y.shape:
        return f"shape {list(x.shape)} against {list(y.shape)}"
    if torch.equal(x, y):
        return ""
    return f"values by {100 * float((x - y).norm() / y.norm()):.2g} % (rms), at most {float((x - y).abs().max()):.3g}"
