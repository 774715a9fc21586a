"""The training product as a function, for models that keep their weights themselves.

from bitnet.functional import bit_linear

y = bit_linear(x, weight)   # where the model has F.linear(x, weight)
"""

from typing import Any

from torch import Tensor

from . import quantize
from .kernels.rotation import hadamard
from .linear import cast_for_autocast
from .quantize import QuantSpec


def bit_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, strength: float | Tensor = 1.0, **options: Any
) -> Tensor:
    """F.linear on quantized weights and activations: what a BitLinear layer with this weight returns in training.

    x:        floating [..., K]; under autocast it is cast first, as a layer's is
    weight:   floating [N, K], the latent weight: quantized in every call, and it gets a straight-through gradient, as
              x does (BitNet, arXiv 2310.11453, sec. 2.2)
    bias:     floating [N] or None
    strength: how far both are quantized, from 0 (F.linear) to 1; a 0-d tensor is one graph for a compiler
    options:  those of QuantSpec but the RMSNorm's and hadamard_signs: weights, per_row, activation_bits, ...
    returns:  [..., N] in x's dtype

    Raises TypeError or ValueError naming the argument that does not fit. NaN and Inf spread as they do in F.linear.
    """
    spec = QuantSpec(**options)
    if spec.rms_norm:
        raise ValueError(
            "bit_linear: an RMSNorm has a weight of its own; normalize x before, or take a BitLinear layer"
        )
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"bit_linear: {name} must be floating point, got {tensor.dtype}")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"bit_linear: weight must be [N, K] and not empty, got {list(weight.shape)}")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"bit_linear: x is {list(x.shape)}, but the weight takes K = {weight.shape[1]} features")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bit_linear: bias must be [{len(weight)}], got {list(bias.shape)}")
    if spec.hadamard_signs:
        raise ValueError("bit_linear: signs are a layer's own; multiply x by them before, or take a BitLinear layer")
    if spec.hadamard is not None:
        x = hadamard(cast_for_autocast(x), spec.hadamard)
    return quantize.bit_linear(cast_for_autocast(x), weight, bias, spec, strength)
