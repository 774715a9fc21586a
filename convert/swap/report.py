"""What became of every weight matrix of a model, as a table."""

import re
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitnet import tables
from bitnet.experts import BitExperts, PackedExperts, stacks_of
from bitnet.kernels import layout
from bitnet.kernels.layout import WIDE
from bitnet.linear import BitLayer, LatentWeight
from bitnet.packed import PackedBitLinear

from .kinds import ROUTERS, swappable


@dataclass(frozen=True)
class Row:
    """One weight matrix of a model and what became of it."""

    name: str
    kind: str  # class of the module, or "parameter of <class>"
    shape: tuple[int, ...]
    weights: int
    bytes: int
    action: str  # "ternary", "binary", "packed", "int8", "int4", "float" or "kept"
    reason: str  # why it was kept, or what a packed head cost; empty otherwise
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
        return self.other_bytes + sum(row.bytes for row in self.rows if row.action in ("kept", "float", *WIDE))

    def __str__(self) -> str:
        groups: dict[tuple[Any, ...], int] = {}
        for row in self.rows:
            name = re.sub(r"(?<![^.])\d+(?=\.|$)", "*", row.name)
            reason = re.sub(r"(?<=\.)\d+(?=\.)", "*", row.reason)
            key = (name, row.kind, "x".join(map(str, row.shape)), row.action, reason)
            groups[key] = groups.get(key, 0) + 1
        lines = [("weight matrix", "kind", "shape", "count", "now", "why")]
        lines += [(name, kind, shape, str(n), now, why) for (name, kind, shape, now, why), n in groups.items()]
        share = 100 * self.low_bit_weights / max(self.weights, 1)
        return (
            f"{tables.text(lines)}\n"
            f"{self.low_bit_weights:,} of {self.weights:,} weights ({share:.1f} %) are low-bit; packed they take "
            f"{self.packed_bytes / 1e6:,.2f} MB, the rest {self.kept_bytes / 1e6:,.2f} MB"
        )


def report_on(model: nn.Module, reasons: dict[str, str] | None = None, others: str = "") -> Report:
    """reasons: for some layers, by name; others: why every other layer that could be swapped was kept, if it was"""
    reasons = reasons or {}
    report = Report()
    seen: set[int] = set()

    def add(
        name: str, kind: str, tensor: torch.Tensor, action: str, reason: str = "", m: LatentWeight | None = None
    ) -> None:
        lazy = isinstance(tensor, nn.parameter.UninitializedParameter)
        shape = m.shape if m else () if lazy else tuple(tensor.shape)
        size = 0 if lazy else tensor.numel() * tensor.element_size()
        packed = 0
        if m and action not in WIDE:
            packed = (m.experts or 1) * layout.packed_rows(m.out_features) * m.in_features
        seen.add(id(tensor))
        report.rows.append(Row(name, kind, shape, 0 if lazy else prod(shape), size, action, reason, packed))

    def count(*tensors: torch.Tensor | None) -> None:
        report.other_bytes += sum(t.numel() * t.element_size() for t in tensors if t is not None)

    for name, module in model.named_modules():
        if isinstance(module, PackedBitLinear):
            action = module.spec.weights if module.spec.wide else "packed"
            m = LatentWeight("weight", module.out_features, module.in_features, module.transposed)
            add(name, "PackedBitLinear", module.weight, action, reasons.get(name, ""), m)
            count(module.weight_scale, module.bias)
        elif isinstance(module, PackedExperts):
            for m in module.stacks:
                stack = module.stack(m)
                action = module.spec.weights if module.spec.wide else "packed"
                add(f"{name}.{m.parameter}".lstrip("."), "PackedExperts", stack.weight, action, m=m)
                count(stack.weight_scale, stack.bias)
        elif isinstance(module, BitLayer):
            for m in module.latent_weights():
                row = name if m.parameter == "weight" else f"{name}.{m.parameter}".lstrip(".")
                add(row, type(module).__name__, module.get_parameter(m.parameter), module.spec.weights, m=m)
        elif isinstance(module, nn.Linear | Conv1D) and name in reasons and id(module.weight) not in seen:
            add(name, type(module).__name__, module.weight, "kept", reasons[name])
    for owner_name, owner in model.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(parameter, nn.parameter.UninitializedParameter):
                continue  # a bias that is as lazy as its weight
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
    if isinstance(owner, nn.MultiheadAttention):
        how = "q, k, v and output as nn.Linear around F.scaled_dot_product_attention can be low-bit"
        return f"parameter of {kind}", f"torch's attention multiplies by its weights itself; {how}"
    if "router" in kind.lower() or leaf in ROUTERS:
        return f"parameter of {kind}", "router"
    if owner._parameters[leaf].ndim == 3 and re.search("expert|moe", kind, re.I):  # type: ignore[union-attr]
        return f"parameter of {kind}", "fused experts that do not follow transformers' experts interface"
    return f"parameter of {kind}", "not an nn.Linear"
