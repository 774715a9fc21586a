"""What the files hold for a packed layer, and what we hold: the direction of scales, dense layouts, codes as floats."""

import torch
from torch import Tensor, nn

from bitnet.experts import PackedStack
from bitnet.kernels import layout
from bitnet.packed import PackedBitLinear, PackedEmbedding

from .config import BitNetConfig


def stored_codes(
    weight: Tensor, scale: Tensor, in_features: int, out_features: int, kind: str, config: BitNetConfig
) -> tuple[Tensor, Tensor]:
    """What the files hold for a packed layer of a kind ("ternary", ...), as int8 codes [N, K] and the float32 scale
    that multiplies.

    Raises ValueError for a scale that is not positive and finite, and for bytes or floats that encode no code.
    """
    scale = loaded_scale(scale, kind, config)
    if weight.is_floating_point():
        return float_codes(weight), scale
    if (dense := layout.dense(config.weight_bits, kind)) is not None:
        return dense.unpack(weight, in_features), scale
    if kind not in layout.WIDE:
        layout.validate_packed(weight)
    return layout.codes_of(weight, out_features, in_features), scale


def loaded_weight(weight: Tensor, in_features: int, out_features: int, kind: str, config: BitNetConfig) -> Tensor:
    """What the files hold for the weight of a packed layer, as the layer holds it: Hub bytes, or int8 [N, K].

    Raises ValueError for another shape, and for bytes or floats that encode no code.
    """
    if weight.is_floating_point():
        weight = layout.pack_ternary(float_codes(weight))
    elif (dense := layout.dense(config.weight_bits, kind)) is not None:
        weight = dense.to_hub(weight, in_features)
    expected = torch.int8 if kind == "int8" else torch.uint8
    if weight.dtype != expected:
        raise ValueError(f"the weight is {weight.dtype}, but should be {expected}; config.json or the file is wrong")
    layout.check_stored(weight, out_features, in_features)
    if kind not in layout.WIDE:
        layout.validate_packed(weight)
    return weight


def loaded_scale(scale: Tensor, kind: str, config: BitNetConfig) -> Tensor:
    """The scale that multiplies: float32 [1] or [N], or float16 [N, G] of groups.

    Raises ValueError for one that is not finite or, but for 4-bit weights, not positive.
    """
    if scale.dtype != torch.float16 or scale.ndim != 2:  # else it is one of groups
        scale = scale.float().reshape(-1)
        scale = scale if config.linear_class == "autobitlinear" else 1 / scale
    if not layout.are_scales(scale, kind):
        raise ValueError("weight_scale must be positive and finite; the checkpoint is corrupt or incomplete")
    return scale


def stored_state(model: nn.Module, weight_bits: float = 2) -> dict[str, Tensor]:
    """model.state_dict() as it goes to disk: packed scales as 1 / scale, packed weights in `weight_bits` bits."""
    state, made = model.state_dict(), dict[int, Tensor]()  # tied weights stay one
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedBitLinear | PackedStack | PackedEmbedding):
            prefix = f"{name}." if name else ""
            state[f"{prefix}weight_scale"] = stored_scale(module.weight_scale)
            if (dense := layout.dense(weight_bits, module.spec.weights)) is not None:
                if id(module.weight) not in made:
                    codes = module.codes()
                    made[id(module.weight)] = dense.pack(codes.flatten(0, -2)).view(*codes.shape[:-1], -1)
                state[f"{prefix}weight"] = made[id(module.weight)]
    return state


def stored_scale(scale: Tensor) -> Tensor:
    """The float32 r with 1 / r == scale for every scale that was made as 1 / inv, as trained ones are; float16 ones, of
    groups, are stored as they are.

    1 / (1 / (1 / inv)) == 1 / inv holds in IEEE arithmetic; the tests try every float32 of a binade.
    """
    return scale if scale.dtype == torch.float16 else 1 / scale


def float_codes(weight: Tensor) -> Tensor:
    if not bool(((weight == 0) | (weight.abs() == 1)).all()):
        raise ValueError("quantization_mode is offline, but its weight holds values other than -1, 0, 1")
    return weight.to(torch.int8)
