"""The `triton` backends without Triton: where they run and why not, and layers bound to their kernels."""

from collections.abc import Callable
from functools import lru_cache
from importlib import metadata

import torch
from torch import Tensor

from ..layout import check_rows
from .layout import BASE3, TWO_BITS, own_shape, planes_of


def missing(
    device: torch.device, activation_bits: int | None = 8, groups: bool = False, planes: int = TWO_BITS
) -> str | None:
    """None if the triton backends can run layers with these activations there, else why not and what to do."""
    if device.type != "cuda":
        return f"it runs on CUDA and ROCm GPUs; on {device.type} choose 'auto'"
    if groups and planes == BASE3:  # a block of 160 features has no whole groups of 64, 128 or 256
        return "its blocks of five weights a byte hold no whole groups; choose weight_bits=2"
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
    needed = own_shape(n, k, planes_of(weight, planes))
    if tuple(weight.shape) != needed:
        raise ValueError(
            f"triton kernel: weight is prepacked as {list(weight.shape)}, but {n} x {k} needs {list(needed)}"
        )
    check_rows(scale, bias, n)


def bind(
    weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, k: int, activation_bits: int | None, planes: int
) -> Callable[[Tensor], Tensor]:
    """A function x [..., K] -> [..., N]; the first one made imports Triton.

    weight: prepacked; scale: float32 [1] or [N], or float16 [N, G]; bias: floating [N] or None. The function keeps the
    tensors alive and sees what is later written into them.
    """
    check(weight, scale, bias, n, k, planes)
    if weight.is_meta:
        return lambda x: x.new_empty(*x.shape[:-1], n)
    planes = planes_of(weight, planes)
    from . import floats, groups, linear
    from .parts import PreparedWeight, bind

    bias = None if bias is None else bias.contiguous()
    layer = PreparedWeight(weight.flatten(1), scale.contiguous(), bias, n, k, planes)
    if activation_bits is None:
        return bind(layer, floats.bound(layer))
    bound = groups.bound if scale.dtype == torch.float16 else linear.bound
    return bind(layer, bound(layer, activation_bits))


def bind_stack(
    weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, k: int, activation_bits: int | None, planes: int
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """A function of x [M, K] and layers of a stack, int64 [P], P / M a token: each by its token, [P, N]; see bind.

    weight: prepacked ones [E, ...]; scale: float32 [E, 1] or [E, N], or float16 [E, N, G]; bias: floating [E, N] or
    None. None where there is no such kernel: for activations of 4 bits, and rows that are long.
    """
    if activation_bits == 4 or weight.is_meta:
        return None
    for layer, one, shift in zip(weight, scale, [None] * len(weight) if bias is None else bias, strict=True):
        check(layer, one, shift, n, k, planes)
    from . import floats, groups, linear
    from .parts import FLOATS, PreparedWeight

    bias = None if bias is None else bias.contiguous()
    stack = PreparedWeight(weight.flatten(2).contiguous(), scale.contiguous(), bias, n, k, planes_of(weight[0], planes))
    if activation_bits is None:
        run: Callable[[Tensor, Tensor], Tensor] | None = floats.choosing(stack)
    else:
        run = (groups if scale.dtype == torch.float16 else linear).choosing(stack, activation_bits)
    return None if run is None else lambda x, chosen: run(x if x.dtype in FLOATS else x.float(), chosen).to(x.dtype)
