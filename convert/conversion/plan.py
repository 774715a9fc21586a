"""What a conversion writes: its tensors, the jobs that make them, and the config of the result.

All of it is known from headers alone, before a tensor is read.
"""

import copy
from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

from bitnet.experts import BitExperts, PackedExperts
from bitnet.kernels import layout
from bitnet.kernels.reference import dequantize_weight
from bitnet.linear import BitLayer
from bitnet.packed import PackedBitLinear
from bitnet.packing import to_packed

from ..files.safetensors import DTYPES
from ..hub.config import config_of
from ..hub.values import stored_scale
from ..llama_cpp import writer
from ..rounding import exact, latent_weight, rotated, turned_back
from ..source import Source, Weight
from ..swap.pack import HEADS
from .heads import head_job, pack_head
from .jobs import Job, Output

TARGETS = ("hub", "base3", "binary", "latent", "bf16", "mlx", *writer.KINDS)
BITS = {"base3": 1.6, "binary": 1}  # of a weight in the files, where it is not 2


Plan = tuple[dict[str, Any], list[Job]]  # the config.json of the result, and the jobs that make its tensors


def plan(source: Source, to: str, calibrated: bool = False, head: str | None = None) -> Plan:
    """What is to be written, in the order in which the source has it.

    calibrated: float weights will be rounded to codes that are not known yet (source.round_to); head: as pack's
    """
    if head is not None and (head not in HEADS or to not in ("hub", *BITS)):
        kinds, forms = ", ".join(map(repr, HEADS)), ", ".join(("hub", *BITS))
        raise ValueError(f"convert: head must be None, or in packed forms ({forms}) one of {kinds}")
    heads = dict([head_job(source, head, BITS.get(to, 2))]) if head else {}
    weights = source.weights()
    if to == "binary" and not any(weight.spec.weights == "binary" for weight in weights.values()):
        raise ValueError(
            f"convert: {source.path} has no binary layers, which 1 bit a weight is for; choose hub or base3 (weights="
            "'binary' makes such layers of a float model)"
        )
    if to == "latent" and (packed := [weight.name for weight in weights.values() if not weight.latent]):
        raise ValueError(
            f"convert: {source.path} holds codes, and the float weights they were made from (of {packed[0]}, say) are "
            "gone; to='bf16' gives codes x scale"
        )
    if to == "bf16" and (normed := [weight.name for weight in weights.values() if weight.spec.rms_norm]):
        raise ValueError(f"convert: {normed[0]} has an RMSNorm inside, which no plain model can express")
    if not weights and (source.plain or to != "bf16"):
        raise ValueError(f"convert: {source.path} has no layer that can be low-bit, so there is nothing to convert")
    consumed = {part for weight in weights.values() for part in source.parts(weight.key)}
    consumed |= {f"{weight.name}.weight_scale" for weight in weights.values()}
    if to == "bf16":  # a tied head has a scale, but its weight is the embedding's
        consumed |= {f"{weight.name}.signs" for weight in weights.values()} | {
            f"{name}.weight_scale" for name, m in source.model.named_modules() if isinstance(m, PackedBitLinear)
        }
    names = {} if to == "latent" else _bias_names(source, to)
    starts = {source.parts(weight.key)[0]: weight for weight in weights.values()}
    jobs = []
    for key, (dtype, shape) in source.stored().items():
        weight = starts.get(key)
        whole = weight is not None and weight.key == key and weight.experts is None
        rotates = source.plain and weight is not None and weight.spec.hadamard is not None
        if to == "latent" and weight and whole and (calibrated or rotates or weight.name in source.ternary):
            jobs.append(_latent(source, weight))
        elif key in heads:
            jobs.append(heads.pop(key))
        elif key not in consumed or to == "latent":
            floats = to == "bf16" and DTYPES[dtype].is_floating_point
            jobs.append(copy_tensor(source, key, "BF16" if floats else dtype, shape, names.get(key)))
        elif weight:
            jobs.append(_weight(source, weight, to))
    return _config(source, to, head), jobs


def _config(source: Source, to: str, head: str | None = None) -> dict[str, Any]:
    config = dict(source.config)
    config.pop("quantization_config", None)
    config.pop("transformers_weights", None)  # where the source has its weights
    if to == "bf16":
        config["dtype"] = "bfloat16"
        config.pop("torch_dtype", None)
        return config
    model = copy.deepcopy(source.model)
    for module in list(model.modules()):
        if isinstance(module, BitLayer) and to != "latent":
            if hasattr(module, "weight_scale"):  # its codes are stored as floats
                del module.weight_scale
            to_packed(module)
    if head:
        pack_head(model, head)
    settings = config_of(model, BITS.get(to, 2))
    assert settings is not None
    if to == "hub" and source.multiplies:
        settings.linear_class, settings.quantization_mode = "autobitlinear", "offline"
    config["quantization_config"] = settings.to_dict()
    return config


def _bias_names(source: Source, to: str) -> dict[str, str]:
    """The names that the biases of fused experts get, which stay beside their stacks."""
    names: dict[str, str] = {}
    for name, module in source.model.named_modules():
        if isinstance(module, BitExperts | PackedExperts):
            for m in module.stacks:
                floating, packed = f"{name}.{m.parameter}_bias", f"{name}.{m.packed}.bias"
                names |= {packed: floating} if to == "bf16" else {floating: packed}
    return names


def copy_tensor(source: Source, key: str, dtype: str, shape: tuple[int, ...], name: str | None = None) -> Job:
    """A tensor as it is, but for the dtype, under its name in the files or another."""
    output = Output(source.file_key(name or key), dtype, shape)
    return Job(key, [output], source.nbytes(key), 0, lambda: [(p.to(DTYPES[dtype]) for p in source.pieces(key))])


def _latent(source: Source, weight: Weight) -> Job:
    """Float weights that round to codes which were calibrated, or which the floats are times a scale; or rotated."""
    dtype, shape = source.stored()[weight.key]
    signs = source.signs(weight.name, weight.in_features, weight.spec) if source.plain else None

    def make() -> list[Iterable[Tensor]]:
        return [latent(), *([[signs]] if signs is not None else [])]

    def latent() -> Iterable[Tensor]:
        floats = source.tensor(weight.key)
        if source.plain and weight.spec.hadamard is not None:
            floats = rotated(floats.mT.contiguous() if weight.transposed else floats, weight.spec, signs)
            floats = floats.mT if weight.transposed else floats
        if weight.name in source.calibrated:
            matrices = source.matrices(weight)
            return (latent_weight(*matrix, floats, weight.spec).to(DTYPES[dtype]) for matrix in matrices)
        found = exact(floats, weight.spec) if weight.name in source.ternary else None
        return [latent_weight(*found).to(DTYPES[dtype]) if found else floats]

    outputs = [Output(source.file_key(weight.key), dtype, shape), *_signs(source, weight)]
    return Job(weight.name, outputs, source.nbytes(weight.key), 30 * prod(shape), make)


def _signs(source: Source, weight: Weight) -> list[Output]:
    """The signs that a layer of a plain source gets, if its options ask for any; others have theirs stored."""
    wanted = source.plain and weight.spec.hadamard_signs
    return [Output(source.file_key(f"{weight.name}.signs"), "I8", (weight.in_features,))] if wanted else []


def _weight(source: Source, weight: Weight, to: str) -> Job:
    n, k, spec = weight.out_features, weight.in_features, weight.spec
    reads, stack = source.nbytes(weight.key), () if weight.experts is None else (weight.experts,)
    copies = 3 if len(source.parts(weight.key)) > 1 else 1  # experts that are stored one by one are merged first
    memory = copies * reads + 2 * n * k
    if to == "bf16":
        shape = (k, n) if weight.transposed else (n, k)
        output = Output(source.file_key(weight.float_key), "BF16", (*stack, *shape))
        return Job(weight.name, [output], reads, memory, lambda: [_floats(source, weight)])
    key = source.file_key(f"{weight.name}.weight")
    dense = layout.dense(BITS.get(to, 2), spec.weights)
    stored = layout.stored_zeros(n, k, spec.weights, "meta")
    dtype = "I8" if stored.dtype == torch.int8 else "U8"
    size = (n, -(-k // dense.per_byte)) if dense else tuple(stored.shape)
    scale: tuple[int, ...] = (*stack, n) if spec.per_row else stack or (1,)
    if spec.group_size is not None:
        scale = (*stack, n, -(-k // spec.group_size))
    kind = "F32" if spec.group_size is None else "F16"
    scale_key = source.file_key(f"{weight.name}.weight_scale")
    outputs = [Output(key, dtype, (*stack, *size)), Output(scale_key, kind, scale)]
    if multiplies := to == "hub" and source.multiplies:  # not every float32 is the reciprocal of one
        outputs[1] = Output(scale_key, *source.stored()[f"{weight.name}.weight_scale"])
    outputs += (drawn := _signs(source, weight))

    def pack() -> list[Iterable[Tensor]]:
        scales: list[Tensor] = []  # known once the codes have been made, which are written first

        def codes() -> Iterator[Tensor]:
            for matrix, scale in source.matrices(weight) if dense else source.packed(weight):
                scales.append(stored_scale(scale))
                yield from map(dense.pack, _blocks(matrix)) if dense else [matrix]

        scaling = [source.tensor(f"{weight.name}.weight_scale")] if multiplies else (s for s in scales)
        signs = source.signs(weight.name, k, spec)
        return [codes(), scaling, *([[signs]] if drawn and signs is not None else [])]

    return Job(weight.name, outputs, reads, memory, pack)


def _floats(source: Source, weight: Weight) -> Iterator[Tensor]:
    """A low-bit weight as floats in bfloat16, out of the basis that its activations were transformed to."""
    if weight.spec.hadamard is None:
        yield from _bfloat16(source.matrices(weight), weight.transposed)
        return
    signs = source.signs(weight.name, weight.in_features, weight.spec)
    for codes, scale in source.matrices(weight):
        floats = turned_back(codes, scale, weight.spec.hadamard, signs).bfloat16()
        yield floats.T if weight.transposed else floats


def _blocks(codes: Tensor) -> tuple[Tensor, ...]:
    """Blocks of rows small enough for a processor's cache."""
    return codes.split(max(1, (1 << 18) // codes.shape[1]))


def _bfloat16(matrices: Iterable[tuple[Tensor, Tensor]], transposed: bool = False) -> Iterator[Tensor]:
    """codes * scale of each, rounded once."""
    for codes, scale in matrices:
        if transposed:
            yield dequantize_weight(codes, scale, torch.bfloat16).T
            continue
        blocks = _blocks(codes)
        scales = scale if scale.ndim > 1 else scale.expand(len(codes))
        for block, part in zip(blocks, scales.split(len(blocks[0])), strict=True):
            yield dequantize_weight(block, part, torch.bfloat16)
