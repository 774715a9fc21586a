"""What a training step is made of: unchecked, and in fewer passes than the reference's where that is possible.

Each takes the fastest of the backends that can, and gives the definition's bits.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import products, reference
from . import torch_int8 as int8
from .backends import choose_backend
from .cpu import latent as cpu_latent
from .cpu import library as cpu_library
from .layout import check_rows
from .observed import is_observed


def quantize_latent(
    weight: Tensor, kind: str, per_row: bool, group_size: int | None = None, centered: bool = True
) -> tuple[Tensor, Tensor]:
    """reference.quantize_weight for every step of training; never waits for a GPU."""
    gpu = kind == "ternary" and group_size is None and on_triton(weight)
    if not gpu and not (group_size is None and is_native(weight, kind, per_row)):
        codes, scale = reference.quantize_weight(weight, kind, per_row, group_size, centered)
        return codes.contiguous(), scale  # also of a transposed view: the order of float sums depends on it
    if kind == "int8":  # rows as tokens are quantized, whose s divides
        codes, s = cpu_latent.quantize_tokens(weight, 8)
        return codes, (1 / s).reshape(-1)
    inv = inverse_of_sums(
        torch.ops.bitnet.gpu_magnitudes(weight) if gpu else cpu_latent.magnitudes(weight), weight, per_row
    )
    codes = torch.ops.bitnet.gpu_ternary_codes(weight, inv) if gpu else cpu_latent.ternary_codes(weight, inv)
    return codes, (1 / inv).reshape(-1)


def quantize_tokens(x: Tensor, activation_bits: int) -> tuple[Tensor, Tensor]:
    """reference.quantize_activation of x [M, K]."""
    if on_triton(x):
        return torch.ops.bitnet.quantize_activation(x, activation_bits)
    run = cpu_latent.quantize_tokens if on_native(x) else reference.quantize_activation
    return run(x, activation_bits)


def int_linear(
    q: Tensor,
    s: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    wide: bool = False,
) -> Tensor:
    """Codes q int8 or int16 [M, K] times codes int8 [N, K], rescaled: the product of reference.ternary_linear.

    wide: whether codes may be others than -1, 0 and 1: 8-bit ones, with scales of groups 4-bit ones
    """
    if on_triton(q) and not (wide and scale.dtype == torch.float16):
        return torch.ops.bitnet.gpu_int_linear(q, s, codes, scale, bias, dtype)
    if q.is_cpu and _is_plain(q):
        run = torch.ops.bitnet.cpu_int_linear if is_observed() else _cpu_int_linear
        return run(q, s, codes, scale, bias, dtype, wide)
    if scale.dtype == torch.float16:
        return reference.group_linear(q, s, codes, scale, bias, dtype)
    if q.dtype == torch.int16:
        return reference.rescale(reference.int_matmul(q, codes), s, scale, bias, dtype)
    return reference.rescale(int8.int_matmul(q, codes), s, scale, bias, dtype)


def dequantize(q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """q / s in dtype, for codes q int8 [M, K]."""
    if on_triton(q) and not torch.compiler.is_compiling():  # a compiler fuses it by itself
        return torch.ops.bitnet.gpu_dequantize(q, s, dtype)
    return q.float().div_(s).to(dtype)  # torch divides integers by floats forty times slower


def codes_linear(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, activation_bits: int | None, wide: bool = False
) -> Tensor:
    """reference.ternary_linear of x [M, K] and codes int8 [N, K] that are not packed."""
    if activation_bits is None:
        return reference.float_linear(x, codes, scale, bias)
    q, s = quantize_tokens(x, activation_bits)
    return int_linear(q, s, codes, scale, bias, x.dtype, wide)


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter)


def on_triton(t: Tensor) -> bool:
    return t.is_cuda and _is_plain(t) and _triton_is_chosen()


@torch.compiler.assume_constant_result
def _triton_is_chosen() -> bool:
    return choose_backend("auto", torch.device("cuda"), trains=True) == "triton"


def is_native(weight: Tensor, kind: str, per_row: bool) -> bool:
    """Whether the CPU library can quantize this weight."""
    able = kind == "ternary" or (kind == "int8" and per_row and weight.ndim == 2)
    return able and weight.is_contiguous() and on_native(weight)


def on_native(t: Tensor) -> bool:
    able = t.is_cpu and t.dtype in cpu_library.FLOATS and _is_plain(t)
    return able and not is_observed() and _native_is_chosen()


@torch.compiler.assume_constant_result
def _native_is_chosen() -> bool:
    return choose_backend("auto", torch.device("cpu")) == "cpu"


def inverse_of_sums(sums: Tensor, weight: Tensor, per_row: bool) -> Tensor:
    """reference.inverse_scale for ternary weights, from the sum of |weight| over each row."""
    return reference.inverse_of_mean(sums / weight.shape[1] if per_row else sums.sum() / weight.numel())


# Registration with torch: schemas, kernels, and fakes, which check what the kernels would.

_LIBRARY = torch.library.Library("bitnet", "FRAGMENT")
_LIBRARY.define(
    "quantize_weight(Tensor weight, str kind, bool per_row, int? group_size=None, bool centered=True)"
    " -> (Tensor, Tensor)"
)
_LIBRARY.define("quantize_activation(Tensor x, int activation_bits) -> (Tensor, Tensor)")
_LIBRARY.define("gpu_magnitudes(Tensor weight) -> Tensor")
_LIBRARY.define("gpu_ternary_codes(Tensor weight, Tensor inv) -> Tensor")
_LIBRARY.define("gpu_dequantize(Tensor q, Tensor s, ScalarType dtype) -> Tensor")
_PRODUCT = "(Tensor q, Tensor s, Tensor codes, Tensor scale, Tensor? bias, ScalarType dtype{}) -> Tensor"
_LIBRARY.define("gpu_int_linear" + _PRODUCT.format(""))
_LIBRARY.define("cpu_int_linear" + _PRODUCT.format(", bool eight_bits"))


def _of_gpu(module: str, name: str) -> Callable[..., Any]:
    """A function of kernels/gpu, imported at its first call."""
    return lambda *args: getattr(importlib.import_module(f"{__package__}.gpu.{module}"), name)(*args)


def _quantize_activation(x: Tensor, activation_bits: int) -> tuple[Tensor, Tensor]:
    run = _of_gpu("quantize", "quantize_activation") if on_triton(x) else reference.quantize_activation
    return run(x, activation_bits)


def _gpu_int_linear(
    q: Tensor, s: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    module = "groups" if scale.dtype == torch.float16 else "linear"
    return _of_gpu(module, "int_linear")(q, s, codes, scale, bias, dtype)


def _cpu_int_linear(
    q: Tensor, s: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, eight_bits: bool
) -> Tensor:
    return products.linear(q, s, codes, scale, bias, dtype, eight_bits, native=_native_is_chosen())


def _contiguous(quantize: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """The outputs with the strides that the fakes promise, whatever the strides of the input."""

    def run(*args: object) -> tuple[Tensor, Tensor]:
        codes, scale = quantize(*args)
        return codes.contiguous(), scale.contiguous()

    return run


# those of GPUs also on the CPU, where Triton's interpreter runs them in tests
_EVERYWHERE = "CompositeExplicitAutograd"
_LIBRARY.impl("quantize_weight", _contiguous(reference.quantize_weight), _EVERYWHERE)
_LIBRARY.impl("quantize_activation", _contiguous(_quantize_activation), _EVERYWHERE)
_LIBRARY.impl("gpu_magnitudes", _of_gpu("quantize", "magnitudes"), _EVERYWHERE)
_LIBRARY.impl("gpu_ternary_codes", _of_gpu("quantize", "ternary_codes"), _EVERYWHERE)
_LIBRARY.impl("gpu_dequantize", _of_gpu("quantize", "dequantize"), _EVERYWHERE)
_LIBRARY.impl("gpu_int_linear", _gpu_int_linear, _EVERYWHERE)
_LIBRARY.impl("cpu_int_linear", _cpu_int_linear, "CPU")


@torch.library.register_fake("bitnet::quantize_weight", lib=_LIBRARY)
def _(
    weight: Tensor, kind: str, per_row: bool, group_size: int | None = None, centered: bool = True
) -> tuple[Tensor, Tensor]:
    n, k = weight.shape
    codes = weight.new_empty(n, k, dtype=torch.int8)
    if group_size is not None:
        return codes, weight.new_empty(n, -(-k // group_size), dtype=torch.float16)
    return codes, weight.new_empty(n if per_row else 1, dtype=torch.float32)


@torch.library.register_fake("bitnet::quantize_activation", lib=_LIBRARY)
def _(x: Tensor, activation_bits: int) -> tuple[Tensor, Tensor]:
    dtype = torch.int16 if activation_bits == 16 else torch.int8
    return x.new_empty(x.shape, dtype=dtype), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


@torch.library.register_fake("bitnet::gpu_magnitudes", lib=_LIBRARY)
def _(weight: Tensor) -> Tensor:
    n, _ = weight.shape
    return weight.new_empty(n, dtype=torch.float64)


@torch.library.register_fake("bitnet::gpu_ternary_codes", lib=_LIBRARY)
def _(weight: Tensor, inv: Tensor) -> Tensor:
    torch._check(inv.numel() in (1, len(weight)), lambda: f"inv has {inv.numel()} values for {len(weight)} rows")
    return weight.new_empty(weight.shape, dtype=torch.int8)


@torch.library.register_fake("bitnet::gpu_dequantize", lib=_LIBRARY)
def _(q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    torch._check(s.numel() == len(q), lambda: f"{s.numel()} scales for {len(q)} tokens")
    return q.new_empty(q.shape, dtype=dtype)


def _product(
    q: Tensor, s: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, *others: object
) -> Tensor:
    (m, k), n = q.shape, len(codes)
    torch._check(k == codes.shape[1], lambda: f"tokens have {k} features, the weight {codes.shape[1]}")
    torch._check(s.numel() == m, lambda: f"{s.numel()} scales for {m} tokens")
    check_rows(scale, bias, n)
    return q.new_empty(m, n, dtype=dtype)


torch.library.register_fake("bitnet::gpu_int_linear", _product, lib=_LIBRARY)
torch.library.register_fake("bitnet::cpu_int_linear", _product, lib=_LIBRARY)


@register_flop_formula([torch.ops.bitnet.cpu_int_linear, torch.ops.bitnet.gpu_int_linear])
def _(q_shape: torch.Size, *args: object, out_shape: torch.Size, **options: object) -> int:
    return 2 * out_shape.numel() * q_shape[-1]
