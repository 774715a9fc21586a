"""The public operations: argument checks, backend choice, and registration with torch.

Every backend keeps a layer's weight in a layout of its own, made once from the Hub bytes by `prepack` and never
saved, and implements one function: `linear(x, weight, scale, bias, activation_bits)`. The plain-torch
definitions in reference.py say what that function must return.

In eager inference the backend is called directly. Under autograd, torch.compile and torch.export the same
function runs as the registered operator `torch.ops.bitnet.ternary_linear`.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from . import int8, reference
from .layout import check_packed, packed_rows, unpack_ternary, validate_packed


class Backend(NamedTuple):
    """How one backend does the job. `missing` returns None where it can run, else why not and what to do."""

    description: str
    missing: Callable[[torch.device], str | None]
    prepack: Callable[[Tensor, int], Tensor]  # (Hub bytes, N) -> the backend's own layout, one tensor
    unprepack: Callable[[Tensor, int], Tensor]  # (own layout, N) -> int8 codes [N, K]
    linear: Callable[[Tensor, Tensor, Tensor, Tensor | None, int, int | None], Tensor]
    # linear(x [M, K], own layout, scale, bias, N, activation_bits) -> [M, N]


def _torch_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, n: int, bits: int | None) -> Tensor:
    return int8.linear(x, codes, scale, bias, bits)


def _reference_linear(
    x: Tensor, packed: Tensor, scale: Tensor, bias: Tensor | None, n: int, bits: int | None
) -> Tensor:
    return reference.ternary_linear(x, unpack_ternary(packed, n), scale, bias, bits)


# In the order in which "auto" prefers them.
_BACKENDS = {
    "torch": Backend(
        "int8 codes kept in memory, torch's int8 matmul",
        missing=lambda device: None,
        prepack=unpack_ternary,
        unprepack=lambda codes, n: codes,
        linear=_torch_linear,
    ),
    "reference": Backend(
        "the plain-torch definition; unpacks on every call",
        missing=lambda device: None,
        prepack=lambda packed, n: packed,
        unprepack=unpack_ternary,
        linear=_reference_linear,
    ),
}


class BackendStatus(NamedTuple):
    """One row of backends()."""

    name: str
    ready: bool
    detail: str  # what it is, or why it is not ready and what to do


def backends(device: str | torch.device = "cpu") -> list[BackendStatus]:
    """Which backends can run on `device`, best first, and for the others why not and what to do."""
    device = torch.device(device)
    rows = []
    for name, backend in _BACKENDS.items():
        missing = backend.missing(device)
        rows.append(BackendStatus(name, missing is None, missing or backend.description))
    return rows


def check_backend(backend: str) -> None:
    """Raise ValueError unless `backend` is "auto" or the name of a backend, whether or not that one can run here."""
    if backend != "auto" and backend not in _BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose 'auto' or one of {', '.join(map(repr, _BACKENDS))}")


@torch.compiler.assume_constant_result  # run it while tracing, do not trace into it
def choose_backend(backend: str, device: torch.device) -> str:
    """The backend to use on `device`: the named one, or for "auto" the first that is ready.

    Raises ValueError for an unknown name and RuntimeError, with the remedy, for one that cannot run here.
    """
    return _choose(backend, device.type)


@lru_cache
def _choose(backend: str, device_type: str) -> str:
    device = torch.device(device_type)
    check_backend(backend)
    if backend == "auto":
        return next(row.name for row in backends(device) if row.ready)
    if missing := _BACKENDS[backend].missing(device):
        raise RuntimeError(f"backend {backend!r} cannot run on {device_type}: {missing}")
    return backend


def quantize_weight(weight: Tensor, *, kind: str = "ternary", per_row: bool = False) -> tuple[Tensor, Tensor]:
    """Codes and scale of a latent weight: reference.quantize_weight, which has the formulas, with checks.

    weight: floating [N, K]; kind: "ternary" or "binary"; returns int8 [N, K] and float32 [1] ([N] if per_row).
    Raises TypeError or ValueError for other dtypes and shapes, and for NaN or Inf (not looked for while tracing).
    """
    if not weight.is_floating_point():
        raise TypeError(f"quantize_weight: weight must be floating point, got {weight.dtype}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"quantize_weight: weight must be [N, K] and not empty, got {list(weight.shape)}")
    if kind not in ("ternary", "binary"):
        raise ValueError(f"quantize_weight: kind must be 'ternary' or 'binary', got {kind!r}")
    if not torch.compiler.is_compiling() and not weight.is_meta and not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).count_nonzero())
        raise ValueError(f"quantize_weight: weight holds {bad} NaN or Inf values; the training run has diverged")
    return torch.ops.bitnet.quantize_weight(weight, kind, per_row)


def quantize_activation(x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Per-token codes int8 [..., K] and s float32 [..., 1]: reference.quantize_activation, with checks."""
    if not x.is_floating_point():
        raise TypeError(f"quantize_activation: x must be floating point, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"quantize_activation: x must be [..., K] with K > 0, got {list(x.shape)}")
    if bits not in (8, 4):
        raise ValueError(f"quantize_activation: bits must be 8 or 4, got {bits!r}")
    return torch.ops.bitnet.quantize_activation(x, bits)


def ternary_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    out_features: int | None = None,
    activation_bits: int | None = 8,
    backend: str = "auto",
) -> Tensor:
    """x times a packed ternary weight, activations quantized per token: the definition is reference.ternary_linear.

    x:               float32, bfloat16 or float16 [..., K]; any strides; zero tokens are fine
    packed:          uint8 [ceil(N/4), K] in the Hub layout
    scale:           float32 [1] or [N]; multiplies
    bias:            floating [N] or None
    out_features:    N, where it is not a multiple of 4
    activation_bits: 8, 4, or None for float activations
    backend:         "auto", or a name from backends(), which runs or raises
    returns:         x.dtype [..., N]

    Prepacks the weight on every call. Layers (bitnet.PackedBitLinear) call prepack once and then linear_prepacked.
    Raises TypeError or ValueError naming the argument that does not fit.
    """
    weight = prepack(packed, out_features, backend=backend)
    n = 4 * packed.shape[0] if out_features is None else out_features
    if x.ndim == 0 or x.shape[-1] != packed.shape[1]:
        raise ValueError(f"ternary_linear: x is {list(x.shape)}, but the weight takes K = {packed.shape[1]} features")
    if scale.dtype != torch.float32 or scale.shape not in ((1,), (n,)):
        raise ValueError(f"ternary_linear: scale must be float32 [1] or [{n}], got {scale.dtype} {list(scale.shape)}")
    if bias is not None and (not bias.is_floating_point() or bias.shape != (n,)):
        raise ValueError(f"ternary_linear: bias must be floating [{n}], got {bias.dtype} {list(bias.shape)}")
    if activation_bits not in (8, 4, None):
        raise ValueError(f"ternary_linear: activation_bits must be 8, 4 or None, got {activation_bits!r}")
    for name, tensor in (("packed", packed), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"ternary_linear: x is on {x.device}, but {name} is on {tensor.device}")
    return linear_prepacked(x, weight, scale, bias, n, activation_bits, choose_backend(backend, x.device))


def prepack(packed: Tensor, out_features: int | None = None, *, backend: str = "auto") -> Tensor:
    """The Hub bytes [ceil(N/4), K] in the layout of `backend` (a name, or "auto") for the device they are on.

    Raises ValueError for a wrong dtype or shape, or bytes that encode no ternary value (not looked for while tracing).
    """
    n = check_packed(packed, out_features)
    if 0 in packed.shape:
        raise ValueError(f"packed weight is empty: {list(packed.shape)}")
    if not torch.compiler.is_compiling() and not packed.is_meta:
        validate_packed(packed)
    return _BACKENDS[choose_backend(backend, packed.device)].prepack(packed, n)


def linear_prepacked(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation_bits: int | None,
    backend: str,
) -> Tensor:
    """ternary_linear for a weight from prepack(..., backend=backend); the shapes are the caller's to check."""
    if not x.is_floating_point():
        raise TypeError(f"ternary_linear: x must be floating point, got {x.dtype}")
    wants_grad = x.requires_grad or scale.requires_grad or (bias is not None and bias.requires_grad)
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and wants_grad):
        return torch.ops.bitnet.ternary_linear(x, weight, scale, bias, out_features, activation_bits, backend)
    return _ternary_linear(x, weight, scale, bias, out_features, activation_bits, backend)


# Registration with torch: schemas, kernels, fakes (shapes without data) and the gradient.

_LIBRARY = torch.library.Library("bitnet", "DEF")
_LIBRARY.define("quantize_weight(Tensor weight, str kind, bool per_row) -> (Tensor, Tensor)")
_LIBRARY.define("quantize_activation(Tensor x, int bits) -> (Tensor, Tensor)")
_LIBRARY.define(
    "ternary_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, SymInt out_features, int? activation_bits,"
    " str backend) -> Tensor"
)


def _ternary_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, bits: int | None, backend: str
) -> Tensor:
    y = _BACKENDS[backend].linear(x.reshape(-1, x.shape[-1]), weight, scale, bias, n, bits)
    return y.reshape(*x.shape[:-1], n)


def _contiguous(quantize: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The outputs with the strides that the fakes promise, whatever the strides of the input."""

    def run(*args: object) -> tuple[Tensor, Tensor]:
        codes, scale = quantize(*args)
        return codes.contiguous(), scale.contiguous()

    return run


_LIBRARY.impl("quantize_weight", _contiguous(reference.quantize_weight), "CompositeExplicitAutograd")
_LIBRARY.impl("quantize_activation", _contiguous(reference.quantize_activation), "CompositeExplicitAutograd")
_LIBRARY.impl("ternary_linear", _ternary_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("bitnet::quantize_weight", lib=_LIBRARY)
def _(weight: Tensor, kind: str, per_row: bool) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    return weight.new_empty(n, k, dtype=torch.int8), weight.new_empty(n if per_row else 1, dtype=torch.float32)


@torch.library.register_fake("bitnet::quantize_activation", lib=_LIBRARY)
def _(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@torch.library.register_fake("bitnet::ternary_linear", lib=_LIBRARY)
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, bits: int | None, backend: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], n)


def _save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    _, weight, scale, _, ctx.n, _, ctx.backend = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(weight, scale)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[1:4]):  # type: ignore[attr-defined]
        raise RuntimeError(
            "packed weights cannot be trained: train bitnet.BitLinear layers and pack them afterwards, "
            "or attach adapters (LoRA) beside the packed layers"
        )
    weight, scale = ctx.saved_tensors  # type: ignore[attr-defined]
    codes = _BACKENDS[ctx.backend].unprepack(weight, ctx.n)  # type: ignore[attr-defined]
    grad_x = reference.grad_input(grad_y.reshape(-1, codes.shape[0]), codes, scale)
    return grad_x.reshape(*grad_y.shape[:-1], codes.shape[1]), None, None, None, None, None, None


torch.library.register_autograd("bitnet::ternary_linear", _backward, setup_context=_save_for_backward, lib=_LIBRARY)

__all__ = [
    "BackendStatus",
    "backends",
    "check_backend",
    "choose_backend",
    "linear_prepacked",
    "packed_rows",
    "prepack",
    "quantize_activation",
    "quantize_weight",
    "ternary_linear",
]
