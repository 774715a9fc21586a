"""The Walsh-Hadamard transform of activations, wherever they are, with its gradient."""

import importlib
from typing import Any

import torch
from torch import Tensor

from . import reference
from .cpu import latent as cpu_latent
from .observed import is_observed
from .quantizers import on_native, on_triton

MAX_BLOCK = 8192  # features; what the kernels hold


def check_block(block: int) -> None:
    """Raise ValueError unless blocks of so many features can be transformed."""
    if type(block) is not int or not 2 <= block <= MAX_BLOCK or block & (block - 1):
        raise ValueError(f"a Hadamard block must be a power of two from 2 to {MAX_BLOCK} features, got {block!r}")


def hadamard(x: Tensor, block: int, signs: Tensor | None = None) -> Tensor:
    """H (signs x) in blocks of features: reference.hadamard, which has the formula, differentiable in x.

    x: floating [..., K], K a multiple of block; block: a power of two up to MAX_BLOCK; signs: int8 [K], each 1 or -1
    returns: x.dtype [..., K]
    Raises TypeError or ValueError for other dtypes, shapes and blocks.
    """
    check_block(block)
    if not x.is_floating_point():
        raise TypeError(f"hadamard: x must be floating point, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0 or x.shape[-1] % block:
        raise ValueError(f"hadamard: x is {list(x.shape)}, whose features are no multiple of the block of {block}")
    if signs is not None and (signs.dtype != torch.int8 or signs.shape != x.shape[-1:]):
        raise ValueError(f"hadamard: signs must be int8 [{x.shape[-1]}], got {signs.dtype} {list(signs.shape)}")
    if is_observed() or type(x) is not Tensor or (torch.is_grad_enabled() and x.requires_grad):
        return torch.ops.bitnet.hadamard(x, block, signs)
    return _hadamard(x, block, signs)


def unrotate(y: Tensor, block: int, signs: Tensor | None = None) -> Tensor:
    """The inverse of reference.hadamard: signs (H y)."""
    x = reference.hadamard(y, block)
    return x if signs is None else x * signs


_LIBRARY = torch.library.Library("bitnet", "FRAGMENT")
_LIBRARY.define("hadamard(Tensor x, int block, Tensor? signs) -> Tensor")


def _hadamard(x: Tensor, block: int, signs: Tensor | None) -> Tensor:
    if on_triton(x):
        return importlib.import_module(f"{__package__}.gpu.rotate").hadamard(x, block, signs)
    run = cpu_latent.hadamard if on_native(x) else reference.hadamard
    return run(x, block, signs)


_LIBRARY.impl("hadamard", _hadamard, "CompositeExplicitAutograd")


@torch.library.register_fake("bitnet::hadamard", lib=_LIBRARY)
def _(x: Tensor, block: int, signs: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.block, signs = inputs
    ctx.save_for_backward(signs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (signs,) = ctx.saved_tensors
    grad_x = torch.ops.bitnet.hadamard(grad.contiguous(), ctx.block, None)  # H is its own transpose
    return grad_x if signs is None else grad_x * signs, None, None


torch.library.register_autograd("bitnet::hadamard", _backward, setup_context=_keep, lib=_LIBRARY)
