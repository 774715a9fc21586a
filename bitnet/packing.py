"""From a layer in training to its packed form: the same weight quantizer, then bytes."""

import torch
from torch import Tensor

from .experts import BitExperts, PackedExperts
from .kernels import layout, ops
from .linear import BitConv1D, BitLayer, BitLinear, LatentWeight
from .packed import PackedBitLinear
from .quantize import QuantSpec


def pack_layer(layer: BitLayer) -> list[tuple[Tensor, Tensor]]:
    """The latent weights of a layer as they are stored: of each of latent_weights() the packed bytes and the scale.

    A stack's are [E, ceil(N/4), K] and float32 [E] ([E, N] with per_row). Raises ValueError for NaN or Inf weights.
    """
    return [pack_parameter(layer.get_parameter(m.parameter), m, layer.spec) for m in layer.latent_weights()]


def pack_parameter(values: Tensor, m: LatentWeight, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """One parameter of pack_layer, from its values."""
    pairs = []
    for e, matrix in enumerate(m.views(values)):
        try:
            pairs.append(pack_matrix(matrix, spec))
        except ValueError as error:
            raise ValueError(f"{m.parameter}, expert {e}: {error}" if m.experts is not None else str(error)) from None
    if m.experts is None:
        return pairs[0]
    packed, scales = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    return packed, scales if spec.per_row or spec.group_size is not None else scales.squeeze(-1)


def to_packed(
    layer: BitLayer, packed: list[tuple[Tensor, Tensor]] | None = None, backend: str = "auto"
) -> PackedBitLinear | PackedExperts:
    """Turn any layer in training into its packed form, in place; without `packed` it holds zeros, to be loaded."""
    if isinstance(layer, BitExperts):
        return PackedExperts.from_bit_experts(layer, packed, backend)
    assert isinstance(layer, BitLinear | BitConv1D)
    weight, scale = packed[0] if packed else (None, None)
    return PackedBitLinear.from_bit_linear(layer, weight, scale, backend)


def pack_matrix(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """A latent weight [N, K] as it is stored (see PackedBitLinear), and its scale.

    Raises ValueError for NaN or Inf weights.
    """
    if spec.weights == "ternary" and spec.group_size is None:
        return ops.pack_latent(weight.detach(), per_row=spec.per_row)
    codes, scale = quantize_matrix(weight.detach(), spec)
    return layout.pack_codes(codes, spec.weights), scale


def quantize_packed(layer: BitLinear | BitConv1D) -> tuple[Tensor, Tensor]:
    """pack_matrix for the weight of a layer."""
    (weight,) = layer.latent_weights()[0].views(layer.weight)
    return pack_matrix(weight, layer.spec)


def quantize_matrix(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The codes int8 [N, K] and the scale of a latent weight. Raises ValueError for NaN or Inf weights."""
    return ops.quantize_weight(
        weight, kind=spec.weights, per_row=spec.per_row, group_size=spec.group_size, centered=spec.centered
    )
