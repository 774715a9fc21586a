"""A checkpoint folder for MLX: ternary matrices in its affine form of 2 bits, everything else as it is.

All of it is exact: scales of groups are float16, as here, and those of matrices and rows float32, repeated for each
group (MLX then computes in float32). MLX does not round activations.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from bitnet.packed import PackedEmbedding

from ..conversion.jobs import Job, Output
from ..conversion.plan import Plan, copy_tensor
from ..files import mlx
from ..source import Source, Weight

BITS = 2
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # whose tensors have the same names and meaning in mlx-lm


def plan(source: Source) -> Plan:
    """The config.json and the jobs of a folder. Raises ValueError with the reason for what MLX cannot express."""
    kind, weights = source.model.config.model_type, source.weights()
    if kind not in FAMILIES:
        raise ValueError(f"convert: mlx is written for {', '.join(FAMILIES)}; {source.path} is a {kind}")
    if not weights:
        raise ValueError(f"convert: {source.path} has no layer that can be low-bit, so there is nothing to convert")
    if name := next((name for name, m in source.model.named_modules() if isinstance(m, PackedEmbedding)), None):
        raise ValueError(f"convert: {source.path}: {name} is packed with the output head, which is not written for mlx")
    sizes = {weight.name: _group_size(source, weight) for weight in weights.values()}
    jobs = []
    starts = {weight.key: weight for weight in weights.values()}
    scales = {f"{name}.weight_scale" for name in weights}
    for key, (dtype, shape) in source.stored().items():
        if weight := starts.get(key):
            jobs.append(_quantized(source, weight, sizes[weight.name]))
        elif key not in scales:
            jobs.append(copy_tensor(source, key, dtype, shape))
    return _config(source, sizes), jobs


def _group_size(source: Source, weight: Weight) -> int:
    """The largest of MLX's groups in which the scale does not change."""
    spec, where = weight.spec, f"convert: {source.path}: {weight.name}"
    if spec.wide:
        raise ValueError(f"{where} has {spec.weights[3:]}-bit codes, which are not written for mlx")
    if spec.hadamard is not None:
        raise ValueError(f"{where} rotates its activations (hadamard), which mlx's layers do not; take bf16")
    if spec.rms_norm or weight.experts is not None or weight.transposed:
        raise ValueError(f"{where} has a norm inside, or is no plain linear layer, which mlx cannot express")
    for size in mlx.GROUP_SIZES:
        if weight.in_features % size == 0 and (spec.group_size or size) % size == 0:
            return size
    raise ValueError(f"{where} has rows of {weight.in_features} weights, which are no whole number of groups of 32")


def _quantized(source: Source, weight: Weight, size: int) -> Job:
    n, k = weight.out_features, weight.in_features
    key = source.file_key(f"{weight.name}.weight")
    grid, kind = (n, k // size), "F32" if weight.spec.group_size is None else "F16"
    outputs = [Output(key, "U32", (n, k * BITS // 32))]
    outputs += [Output(f"{key.removesuffix('.weight')}.{leaf}", kind, grid) for leaf in ("scales", "biases")]

    def make() -> list[Iterable[Tensor]]:
        codes, scale = next(source.matrices(weight))
        each = mlx.spread(scale, n, k, size)
        return [[mlx.pack(codes)], [each], [-each]]

    reads = source.nbytes(weight.key)
    return Job(weight.name, outputs, reads, reads + 4 * n * k, make)


def _config(source: Source, sizes: dict[str, int]) -> dict[str, Any]:
    (default, _), *_ = Counter(sizes.values()).most_common(1)
    section: dict[str, Any] = {"group_size": default, "bits": BITS, "mode": "affine"}
    for name, size in sizes.items():
        if size != default:
            module = source.file_key(f"{name}.weight").removesuffix(".weight")
            section[module] = {"group_size": size, "bits": BITS, "mode": "affine"}
    config = {key: value for key, value in source.config.items() if key != "transformers_weights"}
    return config | {"quantization": section, "quantization_config": section}  # as mlx-lm writes it
