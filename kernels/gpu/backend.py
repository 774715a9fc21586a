"""The `triton` backends without Triton: where they run and why not, and layers bound to their kernels."""

from collections.abc import Callable
from functools import lru_cache
from importlib import metadata

import torch
from torch import Tensor

from ..layout import check_rows
from .layout import BASE3, planes_of, row_bytes


def missing(device: torch.device, activation_bits: int | None = 8, groups: bool = False) -> str | None:
    """None if the triton backends can run layers with these activations there, else why not and what to do."""
    if device.type != "cuda":
        return f"it runs on CUDA and ROCm GPUs; on {device.type} choose 'auto'"
    if activation_bits is None:
        return "it multiplies integers, but activation_bits=None keeps activations float; choose 'auto' or 'torch'"
    if groups:
        return "it has no kernel for scales of groups; choose 'auto' or 'torch'"
    if not torch.cuda.is_available():
        return "torch sees no GPU; install a torch built for yours (bitnet info shows which this is)"
    if _triton_version() is None:
        return "triton is not installed; pip install triton"
    if torch.version.hip is None and (found := torch.cuda.get_device_capability(device)) < (8, 0):
        return f"Triton needs compute capability 8.0 (Ampere), this GPU has {found[0]}.{found[1]}; choose 'torch'"
    return None


def hardware(device: torch.device) -> str:
    """What the kernels are compiled for and by, in words."""
    return f"{torch.cuda.get_device_name(device)}, triton {_triton_version()}"


def description(planes: int) -> str:
    """What runs here, in words."""
    bits = "1.6 bits" if planes == BASE3 else "2 bits"
    return f"Triton kernels, {bits} a weight (triton {_triton_version()})"


@lru_cache
def _triton_version() -> str | None:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def check(weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, k: int, planes: int) -> None:
    """Raise ValueError unless the tensors are those of a layer of N x K: the kernels would read beyond them."""
    needed = n, row_bytes(k, planes_of(weight, planes))
    if tuple(weight.shape) != needed:
        raise ValueError(
            f"triton kernel: weight is prepacked as {list(weight.shape)}, but {n} x {k} needs {list(needed)}"
        )
    check_rows(scale, bias, n)


def bind(
    weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, k: int, activation_bits: int | None, planes: int
) -> Callable[[Tensor], Tensor]:
    """A function x [..., K] -> [..., N]; the first one made imports Triton.

    weight: prepacked; scale: float32 [1] or [N]; bias: floating [N] or None. The function keeps the tensors alive and
    sees what is later written into them.
    """
    check(weight, scale, bias, n, k, planes)
    if weight.is_meta:
        return lambda x: x.new_empty(*x.shape[:-1], n)
    planes = planes_of(weight, planes)
    from .linear import bound
    from .parts import PreparedWeight, bind

    assert activation_bits is not None
    bias = None if bias is None else bias.contiguous()
    layer = PreparedWeight(weight, scale.contiguous(), bias, n, k, planes)
    return bind(layer, bound(layer, activation_bits))
