"""Quantization in training: what to quantize, and straight-through gradients around the reference formulas.

The forward pass at full strength is the integer product that serving computes, so a trained layer and its
packed form agree bit for bit in the accumulator. The backward pass treats rounding and clamping as the
identity (straight-through estimator, arXiv 2310.11453, sec. 2.2) and uses the *quantized* operands:

    dX = dY Wq        dW = dY^T Xq        with Wq = codes * scale, Xq = q / s
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kernels import layout, quantizers, reference, rotation


@dataclass(frozen=True)
class QuantSpec:
    """The options of a BitLinear layer; they decide what is computed, so they travel with checkpoints.

    weights:         "ternary" (b1.58: absmean, -1/0/1), "binary" (b1: sign around the mean, -1/1), "int8"
                     (absmax; with per_row it is what output heads bear), or with group_size=32 "int4", -8 to 7
    per_row:         one scale per output row instead of one per tensor
    group_size:      one scale, a float16, per output row and group of so many features: 32, 64, 128 or 256. The last
                     group may be shorter
    centered:        of "binary": whether the mean is taken off first
    hadamard:        features, a power of two: activations pass through a Walsh-Hadamard transform in blocks of so many
                     before they are quantized, which spreads outliers (BitNet v2, arXiv 2504.18415), and the weight is
                     one of transformed features: y = Q(H x) Q(W H)
    hadamard_signs:  of `hadamard`: features are multiplied by fixed signs first, y = Q(H S x) Q(W S H); the layer's
                     buffer `signs`
    activation_bits: 16, 8, 4, or None for float activations
    rms_norm:        an RMSNorm with learnable weight inside the layer, before the activation quantizer
    rms_norm_eps:    its epsilon
    """

    weights: Literal["ternary", "binary", "int8", "int4"] = "ternary"
    per_row: bool = False
    activation_bits: int | None = 8
    rms_norm: bool = False
    rms_norm_eps: float = 1e-6
    group_size: int | None = None
    centered: bool = True
    hadamard: int | None = None
    hadamard_signs: bool = False

    def __post_init__(self) -> None:
        if self.weights not in ("ternary", "binary", "int8", "int4"):
            raise ValueError(f"weights must be 'ternary', 'binary', 'int8' or 'int4', got {self.weights!r}")
        if self.activation_bits not in (16, 8, 4, None):
            raise ValueError(f"activation_bits must be 16, 8, 4 or None, got {self.activation_bits!r}")
        if self.group_size is not None and self.group_size not in reference.GROUP_SIZES:
            raise ValueError(f"group_size must be one of {reference.GROUP_SIZES} or None, got {self.group_size!r}")
        if self.group_size is not None and (self.per_row or self.weights == "int8"):
            what = "per_row" if self.per_row else "8-bit weights"
            raise ValueError(f"group_size={self.group_size} has a scale a row and group, which {what} cannot have")
        if self.weights == "int4" and self.group_size != layout.BLOCK:
            raise ValueError(f"4-bit weights have scales of groups of 32: group_size=32, got {self.group_size!r}")
        if self.activation_bits == 16 and self.wide:
            raise ValueError(f"activation_bits=16 is for ternary and binary weights, not for {self.weights} ones")
        if not self.centered and self.weights != "binary":
            raise ValueError(f"centered=False is an option of binary weights, not of {self.weights} ones")
        if self.hadamard is not None:
            rotation.check_block(self.hadamard)
        elif self.hadamard_signs:
            raise ValueError("hadamard_signs=True is an option of hadamard=BLOCK, which is missing")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"rms_norm_eps must be positive, got {self.rms_norm_eps!r}")

    @property
    def wide(self) -> bool:
        """Whether codes may be others than -1, 0 and 1."""
        return self.weights in layout.WIDE


def is_sharded(t: Tensor) -> bool:
    """Whether this process holds a part of a tensor alone: a DTensor, whose import takes long."""
    return hasattr(t, "device_mesh")


def check_whole(weight: Tensor) -> None:
    """Raise ValueError for a sharded weight: the scale of a part is not the matrix's."""
    if is_sharded(weight):
        raise ValueError(
            "a low-bit layer was given a part of its weight (a DTensor, as tensor parallelism makes them), and its "
            "scale is that of the whole; use DistributedDataParallel or fully_shard, and call the module that "
            "fully_shard wraps, not a layer in it; outside of training: bitnet.gather(model)"
        )


def quantize_latent(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The codes and the scale of a latent weight [N, K]; raises ValueError for a sharded one."""
    check_whole(weight)
    return quantizers.quantize_latent(weight, spec.weights, spec.per_row, spec.group_size, spec.centered)


def bit_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, spec: QuantSpec, strength: float | Tensor = 1.0
) -> Tensor:
    """The training forward: x [..., K] times the quantized latent weight [N, K], differentiable in all three.

    strength 1 is the exact quantized product; 0 is F.linear. Anything else, or a 0-d tensor, blends both operands,
    v + strength * (quantize(v) - v), for a gradual start (Hugging Face's 1.58-bit fine-tuning recipe).
    Raises ValueError for a sharded weight.
    """
    check_whole(weight)
    if not isinstance(strength, Tensor) and strength == 1:
        x2 = x.reshape(-1, x.shape[-1])
        y = _QuantizedLinear.apply(x2, weight, bias, spec)
        return y.reshape(*x.shape[:-1], y.shape[-1])  # a view made in the function could not be written to in place
    w = weight
    if isinstance(strength, Tensor) or strength != 0:
        codes, scale = quantize_latent(weight.detach(), spec)
        w = _blend(weight, reference.dequantize_weight(codes, scale), strength)
        if spec.activation_bits is not None:
            q, s = quantizers.quantize_tokens(x.detach().reshape(-1, x.shape[-1]), spec.activation_bits)
            x = _blend(x, quantizers.dequantize(q, s, torch.float32).view(x.shape), strength)
    return F.linear(x, w.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _blend(v: Tensor, quantized: Tensor, strength: float | Tensor) -> Tensor:
    """v + strength * (quantized - v) whose gradient is that of v (quantized is float32, the result has v's dtype)."""
    return _Become.apply(v, torch.lerp(v.detach().float(), quantized, strength).to(v.dtype))


class _Become(torch.autograd.Function):
    """Another value with v's gradient."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, value: Tensor) -> Tensor:
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x2: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        spec: QuantSpec,
    ) -> Tensor:
        codes, scale = quantize_latent(weight, spec)
        if spec.activation_bits is None:
            ctx.save_for_backward(x2, None, codes, scale)
            y = reference.float_linear(x2, codes, scale, bias)
        else:
            q, s = quantizers.quantize_tokens(x2, spec.activation_bits)
            ctx.save_for_backward(q, s, codes, scale)  # one byte a value, not four
            y = quantizers.int_linear(q, s, codes, scale, bias, x2.dtype, spec.wide)
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        # torch 2.11's compiler drops the gradient of a result that its last operation returned unchanged, as y += bias
        # and y.to(y.dtype) do. A view would do as well, but could not be written to in place.
        return y.clone() if torch.compiler.is_compiling() else y

    @staticmethod
    @once_differentiable  # what it saved are integers, through which a second derivative would silently not go
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        q, s, codes, scale = ctx.saved_tensors
        grad_x = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_x = reference.grad_input(gy, codes, scale)
        if ctx.needs_input_grad[1]:
            xq = q if s is None else quantizers.dequantize(q, s, gy.dtype)
            grad_w = (gy.T @ xq).to(ctx.weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_b = gy.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_w, grad_b, None
