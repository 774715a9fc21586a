"""In training -> packed, in place."""

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bitnet.experts import PackedExperts
from bitnet.kernels import backends, layout
from bitnet.kernels.cpu import linear as cpu_linear
from bitnet.kernels.cpu import pages
from bitnet.kernels.reference import dequantize_weight
from bitnet.linear import BitLayer, BitLinear
from bitnet.packed import PackedBitLinear, PackedEmbedding, packed_zeros
from bitnet.packing import pack_layer, quantize_matrix, to_packed
from bitnet.quantize import QuantSpec, is_sharded

from ..hub import quantizer, wrappers
from .report import Report, report_on
from .safety import judge

HEADS = ("int8", "int4", "ternary")


def head_spec(model: nn.Module, kind: str) -> QuantSpec:
    """The options of an output head of a kind of HEADS: a ternary one has scales of groups if most layers do."""
    if kind == "int8":
        return QuantSpec("int8", per_row=True)
    if kind == "int4":
        return QuantSpec("int4", group_size=layout.BLOCK)
    packed = (BitLayer, PackedBitLinear, PackedExperts)
    sizes = Counter(module.spec.group_size for module in model.modules() if isinstance(module, packed))
    size = sizes.most_common(1)[0][0] if sizes else None
    return QuantSpec(group_size=size, per_row=size is None)


def pack(model: nn.Module, *, backend: str = "auto", head: str | None = None) -> Report:
    """Turn every BitLinear and BitConv1D into PackedBitLinear and BitExperts into PackedExperts, in place.

    Two bits a weight, the same outputs.

    head: stores the output head of a Hugging Face model, and the input embedding if the two are tied, in fewer bits:
          "int8" with a scale a row, "int4" with a scale for each group of 32 features of a row (4.5 bits a weight), or
          "ternary", for models trained so, with scales of the layers' groups or of rows. Not exact, int8 nearly: the
          report says how far the weights move. In large vocabularies the head costs more time than all ternary
          layers. The checkpoint then needs this package. Works on a packed model, too.

    The latent weights are gone afterwards; keep a copy (copy.deepcopy, or a save) to train on. All weights are
    checked before the first layer changes. Raises ValueError if there is no BitLinear or a weight holds NaN.
    """
    packed = pack_quickly(model, backend, head, measured=True)
    costs = {} if packed is None else {packed.name: f"its weights move by {100 * packed.change:.2g} % (rms)"}
    return report_on(model, costs, others="not a BitLinear, so not packed")


class Head(NamedTuple):
    """An output head that was packed."""

    name: str
    change: float  # how far its weights moved (rms, relative), if that was measured
    layer: PackedBitLinear
    tied: list[PackedEmbedding]  # to it: none or one
    prepacked: Tensor | None  # see pack_quickly


def pack_quickly(
    model: nn.Module,
    backend: str = "auto",
    head: str | None = None,
    *,
    measured: bool = False,
    weight_bits: float | None = None,
) -> Head | None:
    """pack without its report, of which the head's measure takes most of the time; returns the head.

    weight_bits: if the head is to run with so many, and this is on the backend `cpu`, it is made in the form of that
                 alone; the modules have no weight before packed.keep_prepacked
    """
    if head is not None and head not in HEADS:
        raise ValueError(f"pack: head must be None or one of {', '.join(map(repr, HEADS))}, got {head!r}")
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(f"pack: {name} is sharded; pack what bitnet.gather(model) gives the first process")
    found = None
    if head:
        found = find_head(model, head)
        if found[1].weight.is_meta:
            raise ValueError("pack: the output head holds nothing yet, on the meta device; load the weights first")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, BitLayer)}
    if not layers and not head:
        raise ValueError(
            "pack: the model has no BitLinear layers; call bitnet.replace_linear(model) first (if it swapped none, its "
            "report says why)"
        )
    packed = {}
    for name, layer in layers.items():
        for leaf in (m.parameter for m in layer.latent_weights()):
            values = layer.get_parameter(leaf)
            if type(values.data) is not torch.Tensor:
                raise ValueError(
                    f"pack: {name}.{leaf} is a {type(values.data).__name__}; only plain tensors are packed"
                )
            if values.is_meta:
                raise ValueError(f"pack: {name}.{leaf} is on the meta device and has no values; load the weights first")
        try:
            packed[name] = pack_layer(layer)
        except ValueError as error:
            raise ValueError(f"pack: {name}: {error}") from None
    made = None
    if found and head:
        name, linear, embedding = found
        spec, weight = head_spec(model, head), linear.weight.detach()
        groups = spec.group_size is not None
        lean = (
            weight_bits is not None
            and backends.choose_backend(backend, weight.device, spec.activation_bits, weight_bits, groups) == "cpu"
        )
        try:
            stored, scale, change, prepacked = _packed_rows(weight, spec, measured, lean)
        except ValueError as error:
            raise ValueError(f"pack: the output head, {name}: {error}") from None
        layers[name] = BitLinear.from_linear(linear, spec)
        packed[name] = [(stored, scale)]
        tied = [] if embedding is None else [PackedEmbedding.from_embedding(embedding, spec, stored, scale)]
        made = Head(name, change, linear, tied, prepacked)  # type: ignore[arg-type]  # which linear becomes, in place
    for name, layer in layers.items():
        to_packed(layer, packed.pop(name), backend)
    quantizer.attach(model)
    return made


def _packed_rows(
    weight: Tensor, spec: QuantSpec, measured: bool = True, lean: bool = False
) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """The stored weight and the scale of a head, and by how much it moves (rms, relative), if that is measured.

    lean: the weight is stored on the meta device; what comes last is its form on the backend `cpu`
    A few rows at a time: a head can be the largest matrix of a model.
    """
    n, k = weight.shape
    stored, scale = packed_zeros(k, n, spec, "meta" if lean else weight.device)
    prepacked = None
    if lean:
        scale = torch.empty_like(scale, device=weight.device)
        prepacked = cpu_linear.empty(n, k, cpu_linear.form_of(stored, cpu_linear.TWO_BITS))
    moved, size, at = 0.0, 0.0, 0
    for rows in _rows(weight):
        codes, found = quantize_matrix(rows, spec)
        if prepacked is None:
            layout.put_rows(stored, at, codes)
        else:
            cpu_linear.put_codes(prepacked, at, codes)
        scale[at : at + len(rows)] = found
        if measured:
            moved += _squares(dequantize_weight(codes, found) - rows)
            size += _squares(rows)
        at += len(rows)
    return stored, scale, (moved / max(size, 1e-300)) ** 0.5, prepacked


def _squares(rows: Tensor) -> float:
    return torch.linalg.vector_norm(rows, dtype=torch.float64).item() ** 2


def _rows(matrix: Tensor) -> Iterator[Tensor]:
    """Of about a million values each, in 32s. Of a matrix in a mapped file only those in use stay in memory."""
    for rows in matrix.split(max(1, (1 << 20) // (32 * matrix.shape[1])) * 32):
        yield rows
        if rows.is_cpu and rows.is_contiguous():
            pages.drop(rows)


# A row of the table, for padding among embeddings that are then not looked at; of 8 bits it has their shape.
UNUSED = {f"Gemma4Model uses {name}.weight directly" for name in ("lm_head", "language_model.embed_tokens")}


def find_head(model: nn.Module, kind: str) -> tuple[str, nn.Linear, nn.Embedding | None]:
    """The output head that can become int8 or another kind of HEADS, its name, and the input embedding tied to it."""
    inner = list(wrappers.outermost(model).values())
    head = inner[0].get_output_embeddings() if len(inner) == 1 else None
    if type(head) is not nn.Linear:
        raise ValueError(
            f"pack: head={kind!r} needs a Hugging Face model with an nn.Linear output head that is still float, but "
            f"found {type(head).__name__}; for other layers: replace_linear(model, include=..., weights='int8', "
            "per_row=True)"
        )
    others = _other_holders(model, head, head.weight)
    if len(others) > 1 or not all(type(other) is nn.Embedding or _scaled(other) for other in others):
        kinds = ", ".join(type(module).__name__ for module in others)
        follows = f"head={kind!r} can follow one nn.Embedding, plain or scaled, only"
        raise ValueError(f"pack: the output head is tied to {kinds}; {follows}")
    if _other_holders(model, head, head.bias):
        raise ValueError("pack: the output head must stay float: its bias is tied to another module's")
    names = {module: name for name, module in model.named_modules()}
    name = names[head]
    verdicts = judge(model, {module: [names[module]] for module in (head, *others)})
    whys = [verdict.certain or verdict.possible for verdict in verdicts.values()]
    if why := next((why for why in whys if why and not (kind == "int8" and why in UNUSED)), ""):
        raise ValueError(f"pack: the output head must stay float: {why}")
    return name, head, others[0] if others else None  # type: ignore[return-value]


def _scaled(module: nn.Module) -> bool:
    """Is it an embedding like Gemma 3's, whose forward only multiplies the rows by a constant?"""
    cls: Any = type(module)
    if cls.__bases__ != (nn.Embedding,) or not hasattr(module, "scalar_embed_scale"):
        return False
    try:
        source = inspect.getsource(cls.forward).rstrip()
    except (OSError, TypeError):
        return False
    return source.endswith("return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)")


def _other_holders(model: nn.Module, module: nn.Module, parameter: torch.Tensor | None) -> list[nn.Module]:
    """The modules besides `module` that hold a parameter of it."""
    return [m for m in model.modules() if m is not module and any(p is parameter for p in m.parameters(recurse=False))]
