"""The public operations: argument checks, the way to a backend (backends.py), and registration with torch.

In eager inference a layer calls its bound function directly. Under autograd, torch.compile and torch.export the same
function runs as the registered operator `torch.ops.bitnet.ternary_linear`.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from bitnet.deprecated import renamed

from . import backends, reference
from .backends import Linear, choose_backend
from .cpu import latent as cpu_latent
from .layout import BLOCK, check_packed, check_stored, pack_ternary, validate_packed
from .observed import is_observed, needs_operator
from .quantizers import (
    inverse_of_sums,
    is_native,
    quantize_latent,
)


def quantize_weight(
    weight: Tensor,
    *,
    kind: str = "ternary",
    per_row: bool = False,
    group_size: int | None = None,
    centered: bool = True,
) -> tuple[Tensor, Tensor]:
    """Codes and scale of a latent weight: reference.quantize_weight, which has the formulas, with checks.

    weight: floating [N, K]; kind: "ternary", "binary", "int8", or with a group_size of 32 "int4"
    returns: int8 [N, K] and float32 [1] ([N] if per_row), or with a group_size float16 [N, ceil(K / group_size)]
    Raises TypeError or ValueError for other dtypes and shapes, and for NaN or Inf (not looked for while tracing).
    """
    if not weight.is_floating_point():
        raise TypeError(f"quantize_weight: weight must be floating point, got {weight.dtype}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"quantize_weight: weight must be [N, K] and not empty, got {list(weight.shape)}")
    if kind not in ("ternary", "binary", "int8", "int4"):
        raise ValueError(f"quantize_weight: kind must be 'ternary', 'binary', 'int8' or 'int4', got {kind!r}")
    if kind == "int4" and (group_size != BLOCK or per_row):
        raise ValueError(f"quantize_weight: kind 'int4' needs group_size={BLOCK}, without per_row; got {group_size!r}")
    if group_size is not None and (group_size not in reference.GROUP_SIZES or per_row or kind == "int8"):
        sizes = f"one of {reference.GROUP_SIZES}, without per_row and not for int8"
        raise ValueError(f"quantize_weight: group_size must be {sizes}; got {group_size!r}, {per_row=}, {kind=}")
    if group_size is None and is_native(weight, kind, per_row):
        codes, scale = quantize_latent(weight, kind, per_row)
        if bool(scale.isfinite().all()):  # as it is unless the weight holds NaN or Inf
            return codes, scale
    if not torch.compiler.is_compiling() and not weight.is_meta and not all_finite(weight):
        bad = int((~weight.isfinite()).count_nonzero())
        raise ValueError(f"quantize_weight: weight holds {bad} NaN or Inf values; the training run has diverged")
    codes, scale = torch.ops.bitnet.quantize_weight(weight, kind, per_row, group_size, centered)
    if group_size is not None and not is_observed() and not scale.is_meta and not bool(scale.isfinite().all()):
        what = "largest value of a group is above 524032" if kind == "int4" else "mean of a group is above 65504"
        raise ValueError(f"quantize_weight: the {what}, which its scale, a float16, cannot hold")
    return codes, scale


def all_finite(weight: Tensor) -> bool:
    """One pass without a tensor in between; weight.isfinite().all() takes twenty times as long."""
    if not weight.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(weight.detach()))  # NaN is both extremes then


def pack_latent(weight: Tensor, *, per_row: bool = False) -> tuple[Tensor, Tensor]:
    """A latent weight in the Hub layout: pack_ternary of quantize_weight's ternary codes, in one pass if possible.

    weight: floating [N, K]; returns uint8 [ceil(N/4), K] and float32 [1] ([N] if per_row)
    Raises as quantize_weight does.
    """
    if not is_native(weight, "ternary", per_row) or weight.ndim != 2 or 0 in weight.shape:
        codes, scale = quantize_weight(weight, per_row=per_row)
        return pack_ternary(codes), scale
    inv = inverse_of_sums(cpu_latent.magnitudes(weight), weight, per_row)
    scale = (1 / inv).reshape(-1)
    if not bool(scale.isfinite().all()):
        quantize_weight(weight)  # raises, and says how many values are NaN or Inf
    return cpu_latent.pack_ternary(weight, inv), scale


@renamed(bits="activation_bits")
def quantize_activation(x: Tensor, activation_bits: int = 8) -> tuple[Tensor, Tensor]:
    """Per-token codes int8 (int16) [..., K] and s float32 [..., 1]: reference.quantize_activation, with checks."""
    if not x.is_floating_point():
        raise TypeError(f"quantize_activation: x must be floating point, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"quantize_activation: x must be [..., K] with K > 0, got {list(x.shape)}")
    if activation_bits not in (16, 8, 4):
        raise ValueError(f"quantize_activation: activation_bits must be 16, 8 or 4, got {activation_bits!r}")
    return torch.ops.bitnet.quantize_activation(x, activation_bits)


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
    scale:           multiplies: float32 [1] or [N], or float16 [N, G] for G groups of features (reference.group_linear)
    bias:            floating [N] or None
    out_features:    N, where it is not a multiple of 4
    activation_bits: 16, 8, 4, or None for float activations
    backend:         "auto", or a name from backends(), which runs or raises
    returns:         x.dtype [..., N]

    Prepacks the weight on every call. Layers (bitnet.PackedBitLinear) call prepack once and then linear_prepacked.
    Raises TypeError or ValueError naming the argument that does not fit.
    """
    if activation_bits not in (16, 8, 4, None):
        raise ValueError(f"ternary_linear: activation_bits must be 16, 8, 4 or None, got {activation_bits!r}")
    n = check_packed(packed, out_features)
    groups = scale.dtype == torch.float16
    backend = choose_backend(backend, packed.device, activation_bits, groups=groups)
    weight = prepack(packed, n, backend=backend)
    if x.ndim == 0 or x.shape[-1] != packed.shape[1]:
        raise ValueError(f"ternary_linear: x is {list(x.shape)}, but the weight takes K = {packed.shape[1]} features")
    if groups and scale.ndim == 2 and len(scale) == n:
        reference.size_of_groups(packed.shape[1], scale.shape[1])  # raises for a number of groups there is not
    elif scale.dtype != torch.float32 or scale.shape not in ((1,), (n,)):
        expected = f"float32 [1] or [{n}], or float16 [{n}, G]"
        raise ValueError(f"ternary_linear: scale must be {expected}, got {scale.dtype} {list(scale.shape)}")
    if bias is not None and (not bias.is_floating_point() or bias.shape != (n,)):
        raise ValueError(f"ternary_linear: bias must be floating [{n}], got {bias.dtype} {list(bias.shape)}")
    for name, tensor in (("packed", packed), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"ternary_linear: x is on {x.device}, but {name} is on {tensor.device}")
    return linear_prepacked(x, weight, scale, bias, n, activation_bits, backend)


def prepack(
    packed: Tensor, out_features: int | None = None, *, in_features: int | None = None, backend: str = "auto"
) -> Tensor:
    """A stored weight in the form of `backend` (a name, or "auto") for the device it is on.

    packed: Hub bytes uint8 [ceil(N/4), K], or int8 [N, K] for 8-bit weights, uint8 [N, ceil(K/32), 16] for 4-bit ones
    in_features: K, where 4-bit weights' is not a multiple of 32

    Raises ValueError for a wrong dtype or shape, or bytes that encode no ternary value (not looked for while tracing).
    """
    n, k = check_stored(packed, out_features, in_features)
    four_bits = packed.ndim == 3
    if 0 in packed.shape:
        raise ValueError(f"packed weight is empty: {list(packed.shape)}")
    chosen = backends.BACKENDS[choose_backend(backend, packed.device)]
    ternary = packed.dtype == torch.uint8 and not four_bits
    if ternary and not chosen.strict and not is_observed() and not packed.is_meta:
        validate_packed(packed)
    return chosen.prepack(packed, n, k)


def linear_prepacked(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    activation_bits: int | None,
    backend: str,
) -> Tensor:
    """ternary_linear for a weight from prepack(..., backend=backend); the shapes are the caller's to check.

    Called again and again with the same weight, bind is faster.
    """
    if not x.is_floating_point():
        raise TypeError(f"ternary_linear: x must be floating point, got {x.dtype}")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise NotImplementedError("packed layers have no forward-mode derivative; use reverse mode, or torch.func.vjp")
    run = torch.ops.bitnet.ternary_linear if needs_operator(x, scale, bias) else _ternary_linear
    return run(x, weight, scale, bias, out_features, activation_bits, backend)


def bind(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
    activation_bits: int | None,
    backend: str,
) -> Linear:
    """linear_prepacked as a function of x alone, for calls that pass not needs_operator(x, scale, bias).

    It keeps the tensors and sees what is written into them; for other tensors bind again.
    """
    detached = None if bias is None else bias.detach()
    return backends.BACKENDS[backend].bind(weight, scale.detach(), detached, out_features, in_features, activation_bits)


# Registration with torch: schema, kernel, fake and gradient.

_LIBRARY = torch.library.Library("bitnet", "FRAGMENT")
_LIBRARY.define(
    "ternary_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, SymInt out_features, int? activation_bits,"
    " str backend) -> Tensor"
)


def _ternary_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, activation_bits: int | None, backend: str
) -> Tensor:
    return bind(weight, scale, bias, n, x.shape[-1], activation_bits, backend)(x)


_LIBRARY.impl("ternary_linear", _ternary_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("bitnet::ternary_linear", lib=_LIBRARY)
def _(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, activation_bits: int | None, backend: str
) -> Tensor:
    backends.BACKENDS[backend].check(weight, scale, bias, n, x.shape[-1])
    return x.new_empty(*x.shape[:-1], n)


@register_flop_formula(torch.ops.bitnet.ternary_linear)
def _(x_shape: torch.Size, *args: object, out_shape: torch.Size, **options: object) -> int:
    return 2 * out_shape.numel() * x_shape[-1]


def _save_for_backward(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    x, weight, scale, _, ctx.n, _, ctx.backend = inputs  # type: ignore[attr-defined]
    ctx.k = x.shape[-1]  # type: ignore[attr-defined]
    ctx.save_for_backward(weight, scale)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[1:4]):  # type: ignore[attr-defined]
        raise RuntimeError(
            "packed weights cannot be trained: train bitnet.BitLinear layers and pack them afterwards, "
            "or attach adapters (LoRA) beside the packed layers"
        )
    weight, scale = ctx.saved_tensors  # type: ignore[attr-defined]
    codes = backends.BACKENDS[ctx.backend].unprepack(weight, ctx.n, ctx.k)  # type: ignore[attr-defined]
    grad_x = reference.grad_input(grad_y.reshape(-1, codes.shape[0]), codes, scale)
    return grad_x.reshape(*grad_y.shape[:-1], codes.shape[1]), None, None, None, None, None, None


torch.library.register_autograd("bitnet::ternary_linear", _backward, setup_context=_save_for_backward, lib=_LIBRARY)
