"""How the float weights of a checkpoint become codes: by the layers' own rule, unless they are codes * scale already.

Such floats are what --to bf16 writes, and what many models are published as. The mean of |W|, which scales fresh latent
weights, is smaller than their scale by their share of zeros, so rounding them again would shrink it.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitnet.kernels import rotation
from bitnet.kernels.reference import GROUP_SIZES, dequantize_weight, group_sizes, grouped, size_of_groups
from bitnet.packing import quantize_matrix
from bitnet.quantize import QuantSpec

PIECE = 1 << 18  # elements that are looked at in one go
# latent weights end at these multiples of the scale, at a distance from the threshold of 1/2, and differ by so much
INNER, OUTER, FLAT = 0.45, 0.55, 0.05


class Quantized(NamedTuple):
    """A low-bit matrix: weight ~ codes * scale."""

    codes: Tensor  # int8 [N, K]: -1, 0, 1 (wider ones where the layer's spec says int8 or int4)
    scale: Tensor  # float32 [1] or [N], or float16 [N, G]; multiplies


def spec_of(scale: Tensor, in_features: int, binary: bool = False) -> QuantSpec:
    """The options of a packed layer whose file has nothing but codes and a scale: Quantized's."""
    how: dict[str, Any] = {"weights": "binary", "centered": False} if binary else {}
    if scale.ndim > 1:
        return QuantSpec(group_size=size_of_groups(in_features, scale.shape[1]), **how)
    return QuantSpec(per_row=len(scale) > 1, **how)


def rounded(weight: Tensor, spec: QuantSpec) -> Quantized:
    """Codes and scale of a float matrix [N, K]. Raises ValueError for NaN or Inf."""
    found = exact(weight, spec)
    return found or Quantized(*quantize_matrix(weight, spec))


def rotated(x: Tensor, spec: QuantSpec, signs: Tensor | None) -> Tensor:
    """Floats [..., K] of a plain layer, its weight or input, in the basis of these options: themselves, or x S H."""
    return x if spec.hadamard is None else rotation.hadamard(x, spec.hadamard, signs)


def turned_back(codes: Tensor, scale: Tensor, block: int | None, signs: Tensor | None) -> Tensor:
    """codes * scale as float32 [..., N, K], out of the basis of hadamard=block, where the layer is in one."""
    floats = dequantize_weight(codes, scale)
    return floats if block is None else rotation.unrotate(floats, block, signs)


def latent_weight(codes: Tensor, scale: Tensor, like: Tensor | None = None, spec: QuantSpec | None = None) -> Tensor:
    """Float weights that plain rounding takes to these codes and, but for the last bits, this scale.

    codes: ternary [N, K]; scale: float32 [1] or [N], or float16 [N, G] of groups, which comes back bit for bit (but for
    groups of zeros alone, whose scale means nothing); returns float32 [N, K]
    like:  float [N, K]: where each weight is to lie within the bin of its code, as far as the mean of all sizes allows,
           which is the scale: those that were close to a threshold change first in training. Without it, and with
           centered binary weights, whose thresholds are their mean, zeros lie at 0, and all others are of one size
    spec:  says whether they are ternary, as without it, or binary
    """
    binary = spec is not None and spec.weights == "binary"
    outer = 0.0 if binary else OUTER
    if binary and spec is not None and spec.centered:
        like = None
    sign = codes.float()
    like = torch.zeros_like(sign) if like is None else like.float()
    if scale.ndim == 2:
        size = size_of_groups(codes.shape[1], scale.shape[1])
        sign, like = grouped(sign, size), grouped(like, size)
        count = group_sizes(codes.shape[1], size, codes.device)[:, None]
    elif len(scale) == 1:
        sign, like = sign.flatten()[None], like.flatten()[None]
        count = torch.tensor(codes.numel(), device=codes.device)
    else:
        count = torch.tensor(codes.shape[1], device=codes.device)
    s, used = scale.float()[..., None], sign.count_nonzero(-1)[..., None]
    zeros = torch.where((sign == 0) & (used > 0), torch.minimum(torch.maximum(like, -INNER * s), INNER * s), 0.0)
    above = sign.abs() * (torch.minimum(torch.maximum(sign * like - outer * s, FLAT * s), 2 * s))
    left = count * s.double() - zeros.abs().sum(-1, True, dtype=torch.float64) - outer * s.double() * used
    stretch = left / above.sum(-1, True, dtype=torch.float64).clamp(min=1e-30)
    latent = zeros + sign * (outer * s + (stretch * above).float())
    return latent.flatten(1)[:, : codes.shape[1]] if scale.ndim == 2 else latent.view(codes.shape)


def exact(weight: Tensor, spec: QuantSpec) -> Quantized | None:
    """Codes and scale of floats [N, K] that are codes * scale of these options exactly; else None."""
    if spec.wide:
        return None
    if spec.group_size is None:
        found = _exact(weight, spec.per_row)
    else:
        rows = grouped(weight, spec.group_size)
        found = _exact(rows.flatten(0, 1), per_row=True)
        if found is None or not bool((found.scale.half().float() == found.scale).all()):
            return None
        codes = found.codes.view(len(weight), -1)[:, : weight.shape[1]].contiguous()
        found = Quantized(codes, found.scale.half().view(rows.shape[:2]))
    if found is not None and spec.weights == "binary" and not bool(found.codes.all()):
        return None
    return found


def ternary_spec(rows: Tensor, spec: QuantSpec) -> QuantSpec | None:
    """The options, spec's otherwise, of which a few rows [R, K] of floats are codes * scale; None if there are none.

    The coarsest scales that do: of the tensor, of a row, of groups of 256, 128, 64 or 32 features. What holds
    one value only says nothing, so each row, and most groups, must have two.
    """
    sizes = [size for size in GROUP_SIZES[::-1] if size < rows.shape[1]]
    shapes: list[dict[str, Any]] = [{}, {"per_row": True}, *({"per_row": False, "group_size": size} for size in sizes)]
    for shape in [{}] if spec.group_size is not None else shapes:
        candidate = replace(spec, **shape)
        found = exact(rows, candidate)
        if found is not None:
            counts = grouped(found.codes, candidate.group_size or rows.shape[1]).count_nonzero(-1)
            if bool((counts >= 2).all() if candidate.group_size is None else (counts >= 2).float().mean() > 0.5):
                return candidate
    return None


def _exact(weight: Tensor, per_row: bool) -> Quantized | None:
    """Codes and scale of floats [N, K] that are all -s, 0 or s, each row with its own s if per_row; else None.

    Zeros alone have no scale, and the layers' own rule takes them. Floats that are not of this kind are mostly found
    out by their first row.
    """
    if not len(weight) or _tops(weight[:1]) is None:
        return None
    tops = []
    blocks = weight.split(max(1, PIECE // weight.shape[1]))
    for block in blocks:
        top = _tops(block)
        if top is None:
            return None
        tops.append(top)
    scale = torch.cat(tops).float()
    some = scale[scale > 0]
    if not len(some) or not bool(some.isfinite().all()) or (not per_row and not bool((some == some[0]).all())):
        return None
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for block, part in zip(blocks, codes.split(len(blocks[0])), strict=True):
        part.copy_(block.sign())
    return Quantized(codes, torch.where(scale > 0, scale, 1.0) if per_row else some[:1].clone())


def _tops(rows: Tensor) -> Tensor | None:
    """The s of each row [N] of floats that are -s, 0 or s; None if they are not."""
    sizes = rows.abs()
    top = sizes.amax(dim=1, keepdim=True)
    return top[:, 0] if bool(((sizes == top) | (sizes == 0)).all()) else None
