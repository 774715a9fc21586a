"""MLX's affine quantization: what config.json says of it, and a matrix's words as codes and scales, and back.

    config.json   quantization: {group_size, bits, mode}; in it, by the name of a module, the same of that one, or false
    P.weight      uint32 [N, K bits / 32]: a row is a stream of bits, those of feature k from bit k * bits on, low first
    P.scales      float16, bfloat16 or float32 [N, K / group_size]
    P.biases      the same; a weight is scale * q + bias, with q unsigned

Ternary are those of 2 bits whose bias is -scale, and whose q are 0, 1 and 2; binary those of 1 bit whose scale is 2 s
and whose bias is -s. Everything else is affine only, and no packed layer.

Source: mlx_lm/utils.py of mlx-lm; mlx/backend/cpu/quantized.cpp of mlx.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bitnet.kernels.reference import size_of_groups

from .damaged import Damaged
from .scales import coarsest

GROUP_SIZES = (128, 64, 32)
BITS = (1, 2, 3, 4, 5, 6, 8)
KINDS = ("F16", "BF16", "F32")  # of scales and biases, as safetensors spells them
PIECE = 1 << 22  # weights whose bits are taken apart in one go


class Affine(NamedTuple):
    """How a matrix is stored."""

    group_size: int
    bits: int

    def shapes(self, n: int, k: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Those of the words and of the scales of a matrix [N, K]; raises ValueError where there are none."""
        if k % self.group_size or k * self.bits % 32:
            raise ValueError(f"rows of {k} weights are no whole number of groups of {self.group_size}")
        return (n, k * self.bits // 32), (n, k // self.group_size)


class Scheme(NamedTuple):
    """What a config.json says: of all modules, and of some; None of those that are floats."""

    default: Affine
    own: dict[str, Affine | None]

    def of(self, module: str) -> Affine | None:
        return self.own.get(module, self.default)


def is_mlx(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a checkpoint which MLX quantized."""
    return _section(config) is not None


def scheme(file: Path, config: dict[str, Any]) -> Scheme:
    """How the matrices are stored. Raises Damaged, or ValueError for what is not affine."""
    section = _section(config)
    assert section is not None
    default = _affine(file, "", section)
    modules = {name: value for name, value in section.items() if isinstance(value, dict | bool)}
    own = {name: _affine(file, name, section | value) for name, value in modules.items() if isinstance(value, dict)}
    return Scheme(default, own | {name: None for name, value in modules.items() if value is False})


def without(config: dict[str, Any]) -> dict[str, Any]:
    """The config.json of the float model."""
    return {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}


def _section(config: dict[str, Any]) -> dict[str, Any] | None:
    section = config.get("quantization")
    if isinstance(section, dict):
        return section
    section = config.get("quantization_config")
    ours = isinstance(section, dict) and "quant_method" not in section and {"group_size", "bits"} <= section.keys()
    return section if ours else None


def _affine(file: Path, name: str, section: dict[str, Any]) -> Affine:
    what = f"its quantization of {name}" if name else "its quantization"
    size, bits, mode = section.get("group_size"), section.get("bits"), section.get("mode", "affine")
    if mode != "affine":
        raise ValueError(f"{file}: {what} is of the mode {mode!r:.80}; affine is read here")
    if type(size) is not int or type(bits) is not int or size not in GROUP_SIZES or bits not in BITS:
        raise Damaged(file, f"{what} is in groups of {size!r:.80} and {bits!r:.80} bits, which MLX does not have")
    return Affine(size, bits)


def scale_of(scales: Tensor, biases: Tensor, affine: Affine) -> tuple[Tensor, bool]:
    """The scale of a ternary or binary matrix, and whether it is binary.

    scales, biases: floating [N, G]
    returns:        float32 [1] or [N], or float16 [N, G'], as coarse as it can be
    Raises ValueError for matrices that are neither, and scales there cannot be.
    """
    d = _scales(scales, biases, affine.bits)
    return coarsest(d, affine.group_size), affine.bits == 1 and bool(d.all())


def codes_of(words: Tensor, scales: Tensor, biases: Tensor, affine: Affine) -> Tensor:
    """The int8 codes [N, K] of a ternary or binary matrix, 0 in groups whose scale is 0.

    words: 32-bit integers [N, W]
    Raises ValueError for matrices that are neither.
    """
    q = unpack(words, affine.bits)
    d = np.repeat(_scales(scales, biases, affine.bits), affine.group_size, axis=1)
    if affine.bits == 1:
        codes = q.view(np.int8) * np.int8(2) - np.int8(1)
    else:
        codes = q.view(np.int8) - np.int8(1)
        if threes := int(((q == 3) & (d != 0)).sum()):
            raise ValueError(
                f"holds {threes:,} weights ({100 * threes / q.size:.2g} %) of +2, so it is not ternary, and no packed "
                "layer can hold it; --to bf16 (open_source(floats=True)) reads it as floats"
            )
    if not d.all():
        codes *= d != 0
    return torch.from_numpy(codes)


def dequantize(words: Tensor, scales: Tensor, biases: Tensor, affine: Affine) -> Tensor:
    """A matrix as float32 [N, K]: scale * q + bias, in float32. Raises ValueError for NaN and Inf."""
    if not bool(scales.isfinite().all() and biases.isfinite().all()):
        raise ValueError("has a scale or bias that is infinite or NaN; it is corrupt, so fetch it again")
    weight = torch.empty(len(words), scales.shape[1] * affine.group_size)
    step = max(1, PIECE // weight.shape[1])
    parts = zip(weight.split(step), words.split(step), scales.split(step), biases.split(step), strict=True)
    for out, part, scale, bias in parts:
        q = torch.from_numpy(unpack(part, affine.bits)).view(*scale.shape, -1)
        out.copy_((q * scale.float()[..., None] + bias.float()[..., None]).flatten(1))
    return weight


def unpack(words: Tensor, bits: int) -> Any:
    """The fields of 32-bit words [N, W]: uint8 [N, 32 W / bits]."""
    data = words.contiguous().view(torch.uint8).numpy()
    if 8 % bits == 0:
        each = 8 // bits
        fields = np.empty((len(data), data.shape[1] * each), np.uint8)
        for i in range(each):
            fields[:, i::each] = data >> bits * i & (1 << bits) - 1
        return fields
    stream = np.unpackbits(data, axis=1, bitorder="little").reshape(len(data), -1, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(2, dtype=np.uint8)


def pack(codes: Tensor) -> Tensor:
    """Ternary codes int8 [N, K] as words of 2 bits: uint32 [N, K / 16]; K a multiple of 16."""
    fields = (codes.numpy() + np.int8(1)).view(np.uint8)
    data = fields[:, ::4] | fields[:, 1::4] << 2 | fields[:, 2::4] << 4 | fields[:, 3::4] << 6
    return torch.from_numpy(np.ascontiguousarray(data).view(np.uint32))


def spread(scale: Tensor, n: int, k: int, group_size: int) -> Tensor:
    """A packed layer's scale, one for each of MLX's groups: [N, K / group_size], in its own dtype."""
    if scale.ndim == 1:
        return scale[:, None].expand(n, k // group_size).contiguous()
    return scale.repeat_interleave(size_of_groups(k, scale.shape[1]) // group_size, dim=1)[:, : k // group_size]


def _scales(scales: Tensor, biases: Tensor, bits: int) -> Any:
    """The s of each group, float32 [N, G], of which the weights are -s, 0 (where they are ternary) and s."""
    s, b = scales.float().numpy(), biases.float().numpy()
    if not (np.isfinite(s) & np.isfinite(b)).all():
        raise ValueError("has a scale or bias that is infinite or NaN; it is corrupt, so fetch it again")
    if not (s >= 0).all() or not (s == (-b if bits == 2 else -2 * b)).all():
        raise ValueError(
            f"holds {bits}-bit weights that are not {'ternary' if bits == 2 else 'binary'}: its scales and biases are "
            "those of other values; --to bf16 (open_source(floats=True)) reads it as floats"
        )
    return -b
