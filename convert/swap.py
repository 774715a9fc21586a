"""Surgery on modules in memory: float -> in training -> packed, in place, and a report of it. kinds.py lists which.

What is left alone, and why, is decided here in one order: safety first (weights that something else uses too,
which nothing overrides), then the user's `skip`, then `include`, then the defaults for heads and routers.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bitnet.experts import BitExperts, PackedExperts, pack_layer, stacks_of, to_packed
from bitnet.kernels import layout
from bitnet.linear import BitLayer, BitLinear, Matrices, become
from bitnet.packed import PackedBitLinear, PackedEmbedding, quantize_packed
from bitnet.quantize import QuantSpec

from .kinds import swappable, to_training

Pattern = str | re.Pattern[str] | Callable[[str, nn.Module], bool]
Patterns = Pattern | Iterable[Pattern]

# Last name components that are kept by default, whole (so "gate" is not "gate_proj"): what decides between
# classes, tokens or experts is small and does not survive 1.58 bits.
HEADS = {"lm_head", "embed_out", "head", "classifier", "score", "qa_outputs", "proj_out", "pooler"}
ROUTERS = {"router", "gate"}


@dataclass(frozen=True)
class Row:
    """One weight matrix of a model and what became of it."""

    name: str
    kind: str  # class of the module, or "parameter of <class>"
    shape: tuple[int, ...]
    weights: int
    bytes: int
    action: str  # "ternary", "binary", "packed", "int8", "float" or "kept"
    reason: str  # why it was kept, or what int8 cost; empty otherwise
    packed_bytes: int = 0  # of a low-bit matrix: what it takes on disk once packed, two bits a weight


@dataclass
class Report:
    """What happened to every weight matrix of a model; print it for a table.

    rows: one Row for each module or parameter that holds a matrix (norms and biases only count in the totals)
    """

    rows: list[Row] = field(default_factory=list)
    other_bytes: int = 0  # norms, biases and other vectors

    @property
    def low_bit_weights(self) -> int:
        """Weights that are ternary or binary now."""
        return sum(row.weights for row in self.rows if row.action in ("ternary", "binary", "packed"))

    @property
    def weights(self) -> int:
        """All weights in matrices."""
        return sum(row.weights for row in self.rows)

    @property
    def packed_bytes(self) -> int:
        """What the low-bit weights take on disk once packed: two bits each."""
        return sum(row.packed_bytes for row in self.rows)

    @property
    def kept_bytes(self) -> int:
        """What everything else takes, in its present dtype."""
        return self.other_bytes + sum(row.bytes for row in self.rows if row.action in ("kept", "float", "int8"))

    def __str__(self) -> str:
        groups: dict[tuple[Any, ...], int] = {}
        for row in self.rows:
            name = re.sub(r"(?<![^.])\d+(?=\.|$)", "*", row.name)
            key = (name, row.kind, "x".join(map(str, row.shape)), row.action, row.reason)
            groups[key] = groups.get(key, 0) + 1
        lines = [("weight matrix", "kind", "shape", "count", "now", "why")]
        lines += [(name, kind, shape, str(n), now, why) for (name, kind, shape, now, why), n in groups.items()]
        widths = [max(len(line[i]) for line in lines) for i in range(6)]
        table = "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
        share = 100 * self.low_bit_weights / max(self.weights, 1)
        return (
            f"{table}\n"
            f"{self.low_bit_weights:,} of {self.weights:,} weights ({share:.1f} %) are low-bit; packed they take "
            f"{self.packed_bytes / 1e6:,.2f} MB, the rest {self.kept_bytes / 1e6:,.2f} MB"
        )


def replace_linear(
    model: nn.Module, *, skip: Patterns | None = None, include: Patterns | None = None, **options: Any
) -> Report:
    """Turn the linear layers of any model into BitLinear, in place, keeping the trained weights.

    So are GPT-2's Conv1D (BitConv1D) and the fused experts of a mixture, which a pattern names by their module,
    "mlp.experts" (BitExperts).

    model:   all of it, not an inner part such as model.model: a Hugging Face model's config, which the whole model
             shares, is written for the names inside what is passed
    skip:    what to leave alone besides the defaults (output embeddings, task heads, routers)
    include: swap only what matches; being named here overrides those defaults
    options: those of bitnet.QuantSpec: weights, per_row, activation_bits, rms_norm, rms_norm_eps

    A pattern is a regular expression that must match the whole module name or its last dotted parts ("fc1" hits
    "layers.0.fc1", not "xfc1"), or a predicate (name, module) -> bool; give one or several. One that matches no
    layer raises ValueError, since a misspelt name would otherwise quantize what was to be kept.

    Layers whose weight is used by other code too (tied to an embedding, read by the parent's forward, patched by
    tensor parallelism) are never swapped. Everything kept is listed in the report with the reason. Layers that were
    swapped already keep their options.
    """
    if isinstance(model, type) or not isinstance(model, nn.Module):
        raise TypeError(f"replace_linear: model must be a torch.nn.Module, got {model!r:.80}")
    spec = QuantSpec(**options)
    skips, includes = _compile(skip), _compile(include)
    layers: dict[nn.Module, list[str]] = {}  # and all names of each
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BitLayer) or swappable(module):
            layers.setdefault(module, []).append(name)
    for which, patterns in (("skip", skips), ("include", includes)):
        for pattern, matches in patterns:
            if not any(matches(name, module) for module, names in layers.items() for name in names):
                raise ValueError(
                    f"replace_linear: {which}={pattern!r} matches none of the {len(layers)} linear layers; "
                    f"names look like {', '.join(repr(names[0]) for names in list(layers.values())[:3])}"
                )
    tied: dict[int, str] = {}  # id of each parameter that a module other than these layers holds, and that module
    for name, owner in model.named_modules():
        if owner not in layers:
            holder = f"the embedding {name}" if isinstance(owner, nn.Embedding) else name or type(owner).__name__
            for parameter in owner.parameters(recurse=False):
                tied.setdefault(id(parameter), holder)
    reasons = {}
    for module, names in layers.items():
        if isinstance(module, BitLayer):
            continue
        reason = _unsafe(model, names, module, tied)
        if not reason and spec.rms_norm and stacks_of(module):
            reason = "an RMSNorm inside fused experts is not supported"
        if not reason and any(matches(name, module) for _, matches in skips for name in names):
            reason = "skipped by request"
        if not reason and include is not None:
            reason = "" if any(matches(name, module) for _, matches in includes for name in names) else "not included"
        elif not reason:
            reason = _default_skip(model, names[0])
        if reason:
            reasons[names[0]] = reason
        else:
            to_training(module, spec)
    if isinstance(model, PreTrainedModel):
        from . import hf

        hf.attach(model)
    return _report(model, reasons)


def pack(model: nn.Module, *, backend: str = "auto", head: str | None = None) -> Report:
    """Turn every BitLinear and BitConv1D into PackedBitLinear and BitExperts into PackedExperts, in place.

    Two bits a weight, the same outputs.

    head: "int8" stores the output head of a Hugging Face model, and the input embedding if the two are tied, in 8 bits
          with a scale a row. Not exact, though nearly: the report says how far the weights move. In large
          vocabularies the head costs more time than all ternary layers. The checkpoint then needs this package. Works
          on a packed model, too.

    The latent weights are gone afterwards; keep a copy (copy.deepcopy, or a save) to train on. All weights are
    checked before the first layer changes. Raises ValueError if there is no BitLinear or a weight holds NaN.
    """
    if head not in (None, "int8"):
        raise ValueError(f"pack: head must be None or 'int8', got {head!r}")
    found = _head(model) if head else None
    layers = {name: module for name, module in _unique_modules(model) if isinstance(module, BitLayer)}
    if not layers and not head:
        raise ValueError("pack: the model has no BitLinear layers; call bitnet.replace_linear(model) first")
    packed = {}
    for name, layer in layers.items():
        for leaf in (m.parameter for m in layer.matrices()):
            values = layer.get_parameter(leaf)
            if type(values.data) is not torch.Tensor:
                raise ValueError(
                    f"pack: {name}.{leaf} is sharded ({type(values.data).__name__}); gather the model first"
                )
            if values.is_meta:
                raise ValueError(f"pack: {name}.{leaf} is on the meta device and has no values; load the weights first")
        try:
            packed[name] = pack_layer(layer)
        except ValueError as error:
            raise ValueError(f"pack: {name}: {error}") from None
    costs = {}
    if found:
        name, linear, embedding = found
        layers[name] = bit_head = BitLinear.from_linear(linear, QuantSpec("int8", per_row=True))
        codes, scale = quantize_packed(bit_head)
        packed[name] = [(codes, scale)]
        change = (codes * scale[:, None] - bit_head.weight).norm() / bit_head.weight.norm()
        costs[name] = f"its weights move by {100 * change.item():.2g} % (rms)"
        if embedding is not None:
            PackedEmbedding.from_embedding(embedding, codes, scale)
    for name, layer in layers.items():
        to_packed(layer, packed.pop(name), backend)
    if isinstance(model, PreTrainedModel):
        from . import hf

        hf.attach(model)
    return _report(model, costs, others="not a BitLinear, so not packed")


def _head(model: nn.Module) -> tuple[str, nn.Linear, nn.Embedding | None]:
    """The output head that can become int8, its name, and the input embedding tied to it."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    if type(head) is not nn.Linear:
        raise ValueError(
            "pack: head='int8' needs a Hugging Face model with an nn.Linear output head that is still float, but found "
            f"{type(head).__name__}; for other layers: replace_linear(model, include=..., weights='int8', per_row=True)"
        )
    others = _other_holders(model, head, head.weight)
    if len(others) > 1 or not all(type(other) is nn.Embedding or _scaled(other) for other in others):
        kinds = ", ".join(type(module).__name__ for module in others)
        raise ValueError(
            f"pack: the output head is tied to {kinds}; head='int8' can follow one nn.Embedding, plain or scaled, only"
        )
    if _other_holders(model, head, head.bias):
        raise ValueError("pack: the output head must stay float: its bias is tied to another module's")
    if head.weight.is_meta or not bool(head.weight.isfinite().all()):
        raise ValueError("pack: the output head holds NaN or Inf (or nothing yet, on the meta device)")
    names = {module: name for name, module in _unique_modules(model)}
    name = names[head]
    why = _unsafe(model, [name], head, {}) or next(filter(None, (_used_directly(model, names[m]) for m in others)), "")
    if why:
        raise ValueError(f"pack: the output head must stay float: {why}")
    return name, head, others[0] if others else None  # type: ignore[return-value]


def _scaled(module: nn.Module) -> bool:
    """Is it an embedding like Gemma 3's, whose forward only multiplies the rows by a constant?"""
    cls: Any = type(module)
    scales = _source(cls).endswith("return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)")
    return cls.__bases__ == (nn.Embedding,) and hasattr(module, "scalar_embed_scale") and scales


def _other_holders(model: nn.Module, module: nn.Module, parameter: torch.Tensor | None) -> list[nn.Module]:
    """The modules besides `module` that hold a parameter of it."""
    return [m for m in model.modules() if m is not module and any(p is parameter for p in m.parameters(recurse=False))]


def unpack(model: nn.Module, dtype: torch.dtype | None = None) -> Report:
    """Turn every packed layer back into what it was before replace_linear, in place: weights are exactly codes * scale.

    dtype: of the new weights; default that of the bias, else of the model's first parameter. The result runs anywhere,
    at full size and with float activations, so its outputs differ from the packed model's by the activation
    rounding. Raises ValueError for layers with an RMSNorm inside, which no nn.Linear can express.
    """
    layers = {
        name: module for name, module in _unique_modules(model) if isinstance(module, PackedBitLinear | PackedExperts)
    }
    if not layers:
        raise ValueError("unpack: the model has no PackedBitLinear layers")
    if normed := [name for name, layer in layers.items() if getattr(layer, "rms_norm", None) is not None]:
        raise ValueError(f"unpack: {normed[0]} has an RMSNorm inside, which an nn.Linear cannot express")
    floats = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    default = next(floats, torch.get_default_dtype())
    for layer in layers.values():
        if isinstance(layer, PackedExperts):
            biases = layer.stack(layer.stacks[0]).bias
            layer.to_experts(dtype or (default if biases is None else biases.dtype))
            continue
        bias, training, transposed = layer.bias, layer.training, layer.transposed
        as_dtype = dtype or (bias.dtype if bias is not None else default)
        weight = (layer.codes() * layer.weight_scale[:, None]).to(as_dtype)
        del (
            layer.weight,
            layer.weight_scale,
            layer.bias,
            layer.rms_norm,
            layer.spec,
            layer.backend,
            layer.bits,
            layer._prepacked,
            layer._bound,
        )
        if transposed:
            del layer.in_features, layer.out_features, layer.transposed
        linear = become(layer, Conv1D if transposed else nn.Linear)
        linear.weight = nn.Parameter(weight.T.contiguous() if transposed else weight)
        linear.bias = None if bias is None else nn.Parameter(bias.to(as_dtype))
        linear.train(training)
    for module in model.modules():
        if isinstance(module, PackedEmbedding):
            module.to_embedding(dtype)
            assert isinstance(model, PreTrainedModel)
            model.tie_weights()
    if isinstance(model, PreTrainedModel):
        from . import hf

        hf.attach(model)
    return _report(model)


def _compile(patterns: Patterns | None) -> list[tuple[Any, Callable[[str, nn.Module], bool]]]:
    if patterns is None:
        return []
    if isinstance(patterns, str | re.Pattern) or callable(patterns):
        patterns = [patterns]
    compiled: list[tuple[Any, Callable[[str, nn.Module], bool]]] = []
    for pattern in patterns:
        if isinstance(pattern, str | re.Pattern):
            text = pattern if isinstance(pattern, str) else pattern.pattern
            regex = re.compile(rf"(?:.*\.)?(?:{text})", 0 if isinstance(pattern, str) else pattern.flags)
            compiled.append((text, lambda name, module, regex=regex: regex.fullmatch(name) is not None))  # type: ignore[misc]
        elif callable(pattern):
            compiled.append((pattern, pattern))
        else:
            raise TypeError(f"a pattern must be a regular expression or a predicate, got {pattern!r}")
    return compiled


def _unique_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return iter(list(model.named_modules()))  # a module under several names comes once


def _unsafe(model: nn.Module, names: list[str], module: nn.Module, tied: dict[int, str]) -> str:
    """Why swapping this layer would be wrong whatever the user wants; "" if it is safe."""
    if not stacks_of(module) and type(module) not in (nn.Linear, Conv1D):
        kind = "nn.Linear" if isinstance(module, nn.Linear) else "Conv1D"
        return f"a subclass of {kind} ({type(module).__name__}) with behaviour of its own"
    if "forward" in vars(module) and "_old_forward" not in vars(module):
        return "its forward is patched on the instance (tensor parallelism?)"
    if getattr(module, "_is_expert_parallel", False):
        return "its experts are spread over devices (expert parallelism)"
    leaves = stacks_of(module) or ["weight"]
    for leaf in leaves:
        if leaf not in module._parameters:
            return f"its {leaf} is computed before each call (weight or spectral norm, pruning)"
        values = module.get_parameter(leaf)
        if type(values.data) is not torch.Tensor:
            return f"its {leaf} is a {type(values.data).__name__} (sharded or quantized already)"
        if not values.is_floating_point():
            return f"its {leaf} is {values.dtype}"
        if 0 in values.shape:
            return f"its {leaf} is empty"
        if id(values) in tied:
            return f"tied to {tied[id(values)]}"
    return next(filter(None, (_used_directly(model, name, (*leaves, "bias")) for name in names)), "")


def _used_directly(model: nn.Module, name: str, leaves: tuple[str, ...] = ("weight", "bias")) -> str:
    """Which class around the module `name` reads these parameters without calling it; "" if none does."""
    parts = name.split(".")
    for depth in range(len(parts)):
        owner: Any = type(model.get_submodule(".".join(parts[:depth])))
        if _reads(owner, ".".join(parts[depth:]), leaves):
            return f"{owner.__name__} uses {'.'.join(parts[depth:])}.{leaves[0]} directly"
    return ""


@lru_cache(maxsize=4096)
def _reads(owner: Any, path: str, leaves: tuple[str, ...]) -> bool:
    """Does the source of a module class touch self.<path>.weight itself, so that a swapped forward is bypassed?"""
    pattern = re.compile(rf"self\.{re.escape(path)}\.({'|'.join(leaves)})\b")
    return any(pattern.search(_source(cls)) for cls in owner.__mro__ if cls not in nn.Module.__mro__)


@lru_cache
def _source(cls: type) -> str:
    """The source of a class without the methods that only initialise, which may well set weights themselves."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError):  # built without source, or defined in an interactive session
        return ""
    assert isinstance(tree, ast.ClassDef)
    initialisers = ("__init__", "_init_weights", "init_weights", "reset_parameters", "_reset_parameters")
    return "\n".join(ast.unparse(node) for node in tree.body if getattr(node, "name", "") not in initialisers)


def _default_skip(model: nn.Module, name: str) -> str:
    """Why this layer is kept unless the user includes it; "" if it is not."""
    last = name.rpartition(".")[2]
    if isinstance(model, PreTrainedModel):
        if model.get_submodule(name) is model.get_output_embeddings():
            return "output embedding"
        prefix = model.base_model_prefix
        if model.base_model is not model and not name.startswith(f"{prefix}."):
            return f"task head (outside {prefix})"
    if last in ROUTERS:
        return "router"
    if last in HEADS or HEADS.intersection(name.split(".")[:-1]):
        return "task head"
    return ""


def _report(model: nn.Module, reasons: dict[str, str] | None = None, others: str = "") -> Report:
    """reasons: for some layers, by name; others: why every other layer that could be swapped was kept, if it was"""
    reasons = reasons or {}
    report = Report()
    seen: set[int] = set()

    def add(
        name: str, kind: str, tensor: torch.Tensor, action: str, reason: str = "", m: Matrices | None = None
    ) -> None:
        shape = m.shape if m else tuple(tensor.shape)
        size = tensor.numel() * tensor.element_size()
        packed = 0
        if m and action != "int8":
            packed = (m.experts or 1) * layout.packed_rows(m.out_features) * m.in_features
        seen.add(id(tensor))
        report.rows.append(Row(name, kind, shape, prod(shape), size, action, reason, packed))

    def count(*tensors: torch.Tensor | None) -> None:
        report.other_bytes += sum(t.numel() * t.element_size() for t in tensors if t is not None)

    for name, module in _unique_modules(model):
        if isinstance(module, PackedBitLinear):
            action = "int8" if module.spec.weights == "int8" else "packed"
            m = Matrices("weight", module.out_features, module.in_features, module.transposed)
            add(name, "PackedBitLinear", module.weight, action, reasons.get(name, ""), m)
            count(module.weight_scale, module.bias)
        elif isinstance(module, PackedExperts):
            for m in module.stacks:
                stack = module.stack(m)
                action = "int8" if module.spec.weights == "int8" else "packed"
                add(f"{name}.{m.parameter}".lstrip("."), "PackedExperts", stack.weight, action, m=m)
                count(stack.weight_scale, stack.bias)
        elif isinstance(module, BitLayer):
            for m in module.matrices():
                row = name if m.parameter == "weight" else f"{name}.{m.parameter}".lstrip(".")
                add(row, type(module).__name__, module.get_parameter(m.parameter), module.spec.weights, m=m)
        elif isinstance(module, nn.Linear | Conv1D) and name in reasons and id(module.weight) not in seen:
            add(name, type(module).__name__, module.weight, "kept", reasons[name])
    for owner_name, owner in _unique_modules(model):
        for leaf, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            of_experts = isinstance(owner, BitExperts) or bool(stacks_of(owner))
            if parameter.ndim < 2 or (of_experts and leaf.endswith("_bias")):  # a stack of experts has a row each
                count(parameter)
                continue
            kind, reason = _kind(owner, leaf)
            if swappable(owner):
                reason = reasons.get(owner_name, others)
            alone = leaf == "weight" and kind == type(owner).__name__
            name = owner_name if alone else f"{owner_name}.{leaf}".lstrip(".")
            add(name, kind, parameter, "kept" if reason else "float", reason)
    return report


def _kind(owner: nn.Module, leaf: str) -> tuple[str, str]:
    """What a matrix outside the swapped layers is, and why it is not low-bit."""
    kind = type(owner).__name__
    if isinstance(owner, nn.Linear | Conv1D):
        return kind, ""
    if isinstance(owner, nn.Embedding):
        return kind, "a lookup, not a matrix product"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return kind, "a convolution"
    if "router" in kind.lower() or leaf in ROUTERS:
        return f"parameter of {kind}", "router"
    if owner._parameters[leaf].ndim == 3 and re.search("expert|moe", kind, re.I):  # type: ignore[union-attr]
        return f"parameter of {kind}", "fused experts that do not follow transformers' experts interface"
    return f"parameter of {kind}", "not an nn.Linear"
