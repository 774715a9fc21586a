"""How the float weights of a checkpoint become codes: by the layers' own rule, unless they are codes * scale already.

Such floats are what --to bf16 writes, and what many models are published as. The mean of |W|, which scales fresh latent
weights, is smaller than their scale by their share of zeros, so rounding them again would shrink it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from bitnet.kernels import ops
from bitnet.quantize import QuantSpec

PIECE = 1 << 18  # elements that are looked at in one go


class Quantized(NamedTuple):
    """A low-bit matrix: weight ~ codes * scale[:, None]."""

    codes: Tensor  # int8 [N, K]: -1, 0, 1 (8-bit codes where the layer's spec says int8)
    scale: Tensor  # float32 [1] or [N]; multiplies


def rounded(weight: Tensor, spec: QuantSpec) -> Quantized:
    """Codes and scale of a float matrix [N, K]. Raises ValueError for NaN or Inf."""
    found = exact(weight, spec.per_row) if spec.weights == "ternary" else None
    return found or Quantized(*ops.quantize_weight(weight, kind=spec.weights, per_row=spec.per_row))


def exact(weight: Tensor, per_row: bool) -> Quantized | None:
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
