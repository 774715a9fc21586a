"""The public operations: argument checks, the way to a backend (backends.py), and registration with torch.

In eager inference a layer calls its bound function directly. Under autograd, torch.compile and torch.export the same
function runs as the registered operator `torch.ops.bitnet.ternary_linear`.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from . import backends, products, reference
from . import torch_int8 as int8
from .backends import Linear, choose_backend
from .cpu import latent as cpu_latent
from .cpu import library as cpu_library
from .layout import check_packed, check_stored, pack_ternary, packed_rows, validate_packed


def quantize_weight(weight: Tensor, *, kind: str = "ternary", per_row: bool = False) -> tuple[Tensor, Tensor]:
    """Codes and scale of a latent weight: reference.quantize_weight, which has the formulas, with checks.

    weight: floating [N, K]; kind: "ternary", "binary" or "int8"; returns int8 [N, K] and float32 [1] ([N] if per_row).
    Raises TypeError or ValueError for other dtypes and shapes, and for NaN or Inf (not looked for while tracing).
    """
    if not weight.is_floating_point():
        raise TypeError(f"quantize_weight: weight must be floating point, got {weight.dtype}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"quantize_weight: weight must be [N, K] and not empty, got {list(weight.shape)}")
    if kind not in ("ternary", "binary", "int8"):
        raise ValueError(f"quantize_weight: kind must be 'ternary', 'binary' or 'int8', got {kind!r}")
    if _native(weight, kind):
        codes, scale = quantize_latent(weight, kind, per_row)
        if bool(scale.isfinite().all()):  # as it is unless the weight holds NaN or Inf
            return codes, scale
    if not torch.compiler.is_compiling() and not weight.is_meta and not bool(weight.isfinite().all()):
        bad = int((~weight.isfinite()).count_nonzero())
        raise ValueError(f"quantize_weight: weight holds {bad} NaN or Inf values; the training run has diverged")
    return torch.ops.bitnet.quantize_weight(weight, kind, per_row)


# What a training step is made of: unchecked, and in fewer passes than the reference's where that is possible.


def quantize_latent(weight: Tensor, kind: str, per_row: bool) -> tuple[Tensor, Tensor]:
    """reference.quantize_weight for every step of training; never waits for a GPU."""
    gpu = kind == "ternary" and _on_triton(weight)
    if not gpu and not _native(weight, kind):
        codes, scale = reference.quantize_weight(weight, kind, per_row)
        return codes.contiguous(), scale  # also of a transposed view: the order of float sums depends on it
    inv = _inverse(torch.ops.bitnet.gpu_magnitudes(weight) if gpu else cpu_latent.magnitudes(weight), weight, per_row)
    codes = torch.ops.bitnet.gpu_ternary_codes(weight, inv) if gpu else cpu_latent.ternary_codes(weight, inv)
    return codes, (1 / inv).reshape(-1)


def quantize_tokens(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """reference.quantize_activation of x [M, K]."""
    if bits == 8 and _on_triton(x):
        return torch.ops.bitnet.quantize_activation(x, bits)
    return cpu_latent.quantize_tokens(x) if bits == 8 and _on_native(x) else reference.quantize_activation(x, bits)


def int_linear(
    q: Tensor,
    s: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    eight_bits: bool = False,
) -> Tensor:
    """Codes q int8 [M, K] times codes int8 [N, K], rescaled: reference.rescale(reference.int_matmul(q, codes), ...).

    eight_bits: whether codes may be others than -1, 0 and 1
    """
    if _on_triton(q):
        return torch.ops.bitnet.gpu_int_linear(q, s, codes, scale, bias, dtype)
    if q.is_cpu and _is_plain(q):
        run = torch.ops.bitnet.cpu_int_linear if is_observed() else _cpu_int_linear
        return run(q, s, codes, scale, bias, dtype, eight_bits)
    return reference.rescale(int8.int_matmul(q, codes), s, scale, bias, dtype)


def dequantize(q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """q / s in dtype, for codes q int8 [M, K]."""
    if _on_triton(q) and not torch.compiler.is_compiling():  # a compiler fuses it by itself
        return torch.ops.bitnet.gpu_dequantize(q, s, dtype)
    return q.float().div_(s).to(dtype)  # torch divides integers by floats forty times slower


def codes_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, activation_bits: int | None, eight_bits: bool = False
) -> Tensor:
    """reference.ternary_linear of x [M, K] and codes int8 [N, K] that are not packed."""
    if activation_bits is None:
        return reference.float_linear(x, codes, scale, bias)
    q, s = quantize_tokens(x, activation_bits)
    return int_linear(q, s, codes, scale, bias, x.dtype, eight_bits)


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter)


def _on_triton(t: Tensor) -> bool:
    return t.is_cuda and _is_plain(t) and _triton_is_chosen()


@torch.compiler.assume_constant_result
def _triton_is_chosen() -> bool:
    return choose_backend("auto", torch.device("cuda")) == "triton"


def pack_latent(weight: Tensor, *, per_row: bool = False) -> tuple[Tensor, Tensor]:
    """A latent weight in the Hub layout: pack_ternary of quantize_weight's ternary codes, in one pass if possible.

    weight: floating [N, K]; returns uint8 [ceil(N/4), K] and float32 [1] ([N] if per_row)
    Raises as quantize_weight does.
    """
    if not _native(weight, "ternary") or weight.ndim != 2 or 0 in weight.shape:
        codes, scale = quantize_weight(weight, per_row=per_row)
        return pack_ternary(codes), scale
    inv = _inverse(cpu_latent.magnitudes(weight), weight, per_row)
    scale = (1 / inv).reshape(-1)
    if not bool(scale.isfinite().all()):
        quantize_weight(weight)  # raises, and says how many values are NaN or Inf
    return cpu_latent.pack_ternary(weight, inv), scale


def _native(weight: Tensor, kind: str) -> bool:
    """Whether the CPU library can quantize this weight."""
    return kind == "ternary" and weight.is_contiguous() and _on_native(weight)


def _on_native(t: Tensor) -> bool:
    able = t.is_cpu and t.dtype in cpu_library.FLOATS and _is_plain(t)
    return able and not is_observed() and _native_is_chosen()


@torch.compiler.assume_constant_result
def _native_is_chosen() -> bool:
    return choose_backend("auto", torch.device("cpu")) == "cpu"


def _inverse(sums: Tensor, weight: Tensor, per_row: bool) -> Tensor:
    """reference.inverse_scale for ternary weights, from the sum of |weight| over each row."""
    return reference.inverse_of_mean(sums / weight.shape[1] if per_row else sums.sum() / weight.numel())


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
    if activation_bits not in (8, 4, None):
        raise ValueError(f"ternary_linear: activation_bits must be 8, 4 or None, got {activation_bits!r}")
    n = check_packed(packed, out_features)
    backend = choose_backend(backend, packed.device, activation_bits)
    weight = prepack(packed, n, backend=backend)
    if x.ndim == 0 or x.shape[-1] != packed.shape[1]:
        raise ValueError(f"ternary_linear: x is {list(x.shape)}, but the weight takes K = {packed.shape[1]} features")
    if scale.dtype != torch.float32 or scale.shape not in ((1,), (n,)):
        raise ValueError(f"ternary_linear: scale must be float32 [1] or [{n}], got {scale.dtype} {list(scale.shape)}")
    if bias is not None and (not bias.is_floating_point() or bias.shape != (n,)):
        raise ValueError(f"ternary_linear: bias must be floating [{n}], got {bias.dtype} {list(bias.shape)}")
    for name, tensor in (("packed", packed), ("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"ternary_linear: x is on {x.device}, but {name} is on {tensor.device}")
    return linear_prepacked(x, weight, scale, bias, n, activation_bits, backend)


def prepack(packed: Tensor, out_features: int | None = None, *, backend: str = "auto") -> Tensor:
    """A stored weight in the layout of `backend` (a name, or "auto") for the device it is on.

    packed: Hub bytes uint8 [ceil(N/4), K], or int8 [N, K] for 8-bit weights

    Raises ValueError for a wrong dtype or shape, or bytes that encode no ternary value (not looked for while tracing).
    """
    n = check_stored(packed, out_features)
    if 0 in packed.shape:
        raise ValueError(f"packed weight is empty: {list(packed.shape)}")
    if packed.dtype == torch.uint8 and not is_observed() and not packed.is_meta:
        validate_packed(packed)
    return backends.BACKENDS[choose_backend(backend, packed.device)].prepack(packed, n)


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


def is_observed() -> bool:
    """Whether something looks at the operations that run, and would not see a native kernel: a trace, a mode, forward
    differentiation, a functorch transform."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )


def needs_operator(x: Tensor, scale: Tensor, bias: Tensor | None) -> bool:
    """Whether a call must run as the registered operator: it is observed, or x is no plain float tensor."""
    return (
        type(x) is not Tensor
        or not x.is_floating_point()
        or is_observed()
        or (
            torch.is_grad_enabled()
            and (x.requires_grad or scale.requires_grad or (bias is not None and bias.requires_grad))
        )
    )


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


# Registration with torch: schemas, kernels, fakes (shapes without data) and the gradient.

_LIBRARY = torch.library.Library("bitnet", "FRAGMENT")
_LIBRARY.define("quantize_weight(Tensor weight, str kind, bool per_row) -> (Tensor, Tensor)")
_LIBRARY.define("quantize_activation(Tensor x, int bits) -> (Tensor, Tensor)")
_LIBRARY.define(
    "ternary_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias, SymInt out_features, int? activation_bits,"
    " str backend) -> Tensor"
)
_LIBRARY.define("gpu_magnitudes(Tensor weight) -> Tensor")
_LIBRARY.define("gpu_ternary_codes(Tensor weight, Tensor inv) -> Tensor")
_LIBRARY.define(
    "gpu_int_linear(Tensor q, Tensor s, Tensor codes, Tensor scale, Tensor? bias, ScalarType dtype) -> Tensor"
)
_LIBRARY.define(
    "cpu_int_linear(Tensor q, Tensor s, Tensor codes, Tensor scale, Tensor? bias, ScalarType dtype, bool eight_bits)"
    " -> Tensor"
)
_LIBRARY.define("gpu_dequantize(Tensor q, Tensor s, ScalarType dtype) -> Tensor")


def _ternary_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, bits: int | None, backend: str
) -> Tensor:
    return bind(weight, scale, bias, n, x.shape[-1], bits, backend)(x)


def _quantize_activation(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    if bits != 8 or not _on_triton(x):
        return reference.quantize_activation(x, bits)
    from .gpu.quantize import quantize_activation

    return quantize_activation(x)


def _gpu_magnitudes(weight: Tensor) -> Tensor:
    from .gpu.quantize import magnitudes

    return magnitudes(weight)


def _gpu_ternary_codes(weight: Tensor, inv: Tensor) -> Tensor:
    from .gpu.quantize import ternary_codes

    return ternary_codes(weight, inv)


def _gpu_int_linear(
    q: Tensor, s: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    from .gpu.linear import int_linear

    return int_linear(q, s, codes, scale, bias, dtype)


def _cpu_int_linear(
    q: Tensor, s: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, eight_bits: bool
) -> Tensor:
    return products.linear(q, s, codes, scale, bias, dtype, eight_bits, native=_native_is_chosen())


def _gpu_dequantize(q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    from .gpu.quantize import dequantize

    return dequantize(q, s, dtype)


def _contiguous(quantize: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The outputs with the strides that the fakes promise, whatever the strides of the input."""

    def run(*args: object) -> tuple[Tensor, Tensor]:
        codes, scale = quantize(*args)
        return codes.contiguous(), scale.contiguous()

    return run


_LIBRARY.impl("quantize_weight", _contiguous(reference.quantize_weight), "CompositeExplicitAutograd")
_LIBRARY.impl("quantize_activation", _contiguous(_quantize_activation), "CompositeExplicitAutograd")
_LIBRARY.impl("ternary_linear", _ternary_linear, "CompositeExplicitAutograd")
# for CUDA; also on the CPU, where Triton's interpreter runs them in tests
_LIBRARY.impl("gpu_magnitudes", _gpu_magnitudes, "CompositeExplicitAutograd")
_LIBRARY.impl("gpu_ternary_codes", _gpu_ternary_codes, "CompositeExplicitAutograd")
_LIBRARY.impl("gpu_int_linear", _gpu_int_linear, "CompositeExplicitAutograd")
_LIBRARY.impl("gpu_dequantize", _gpu_dequantize, "CompositeExplicitAutograd")
_LIBRARY.impl("cpu_int_linear", _cpu_int_linear, "CPU")


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


@torch.library.register_fake("bitnet::gpu_magnitudes", lib=_LIBRARY)
def _(weight: Tensor) -> Tensor:
    return weight.new_empty(weight.shape[0], dtype=torch.float64)


@torch.library.register_fake("bitnet::gpu_ternary_codes", lib=_LIBRARY)
def _(weight: Tensor, inv: Tensor) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.int8)


@torch.library.register_fake("bitnet::gpu_int_linear", lib=_LIBRARY)
def _(q: Tensor, s: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape[0], codes.shape[0], dtype=dtype)


@torch.library.register_fake("bitnet::cpu_int_linear", lib=_LIBRARY)
def _(
    q: Tensor, s: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, eight_bits: bool
) -> Tensor:
    return q.new_empty(q.shape[0], codes.shape[0], dtype=dtype)


@torch.library.register_fake("bitnet::gpu_dequantize", lib=_LIBRARY)
def _(q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape, dtype=dtype)


@register_flop_formula(torch.ops.bitnet.ternary_linear)
def _(x_shape: torch.Size, *args: object, out_shape: torch.Size, **options: object) -> int:
    return 2 * out_shape.numel() * x_shape[-1]


@register_flop_formula([torch.ops.bitnet.cpu_int_linear, torch.ops.bitnet.gpu_int_linear])
def _(q_shape: torch.Size, *args: object, out_shape: torch.Size, **options: object) -> int:
    return 2 * out_shape.numel() * q_shape[-1]


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

__all__ = [
    "bind",
    "codes_linear",
    "dequantize",
    "int_linear",
    "linear_prepacked",
    "needs_operator",
    "pack_latent",
    "packed_rows",
    "prepack",
    "quantize_activation",
    "quantize_latent",
    "quantize_tokens",
    "quantize_weight",
    "ternary_linear",
]
