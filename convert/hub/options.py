"""The options in config.json that say which layers are low-bit and how: checked, since wrong ones change results."""

import re
from typing import Any

from bitnet.quantize import QuantSpec

LINEAR_CLASSES = ("bitlinear", "autobitlinear")
MODES = ("online", "offline")
KINDS = {
    "weights": str,
    "per_row": bool,
    "group_size": int,
    "centered": bool,
    "activation_bits": int,
    "rms_norm": bool,
    "rms_norm_eps": float,
    "hadamard": int,
    "hadamard_signs": bool,
}
NONE = {"group_size", "activation_bits", "hadamard"}  # may be null
MAX_PATTERN = 1000  # characters


def check_options(
    linear_class: Any,
    quantization_mode: Any = "offline",
    modules_to_not_convert: Any = None,
    use_rms_norm: Any = False,
    rms_norm_eps: Any = 1e-6,
    **others: Any,
) -> None:
    """Raise ValueError for options of `quantization_config` that say nothing that can be done."""
    known = isinstance(linear_class, str) and (linear_class in LINEAR_CLASSES or linear_class[:14] == "bitnet_toolkit")
    if not known:
        raise _error(f"linear_class is {linear_class!r:.80}, which is none of {', '.join(LINEAR_CLASSES)}")
    if quantization_mode not in MODES:
        raise _error(f"quantization_mode is {quantization_mode!r:.80}, which is none of {', '.join(MODES)}")
    if not isinstance(use_rms_norm, bool | None):
        raise _error(f"use_rms_norm is {use_rms_norm!r:.80}, not true or false")
    if (use_rms_norm or rms_norm_eps is not None) and (not _is(rms_norm_eps, float) or not 0 < rms_norm_eps < 1):
        raise _error(f"rms_norm_eps is {rms_norm_eps!r:.80}, not a small number")
    if modules_to_not_convert is not None:
        if not isinstance(modules_to_not_convert, list | tuple | set):
            raise _error(f"modules_to_not_convert is {modules_to_not_convert!r:.80}, not a list of names")
        for pattern in modules_to_not_convert:
            try:
                if not isinstance(pattern, str) or len(pattern) > MAX_PATTERN:
                    raise _error(f"modules_to_not_convert holds {pattern!r:.80}, which is no name")
                re.compile(pattern)
            except re.error as error:
                raise _error(f"modules_to_not_convert holds {pattern!r:.80}, which is no pattern ({error})") from None


def check_section(section: Any) -> None:
    """Raise ValueError for a `bitnet_toolkit` section (hf.BitNetConfig says what it is) that is not one."""
    if not isinstance(section, dict):
        raise _section_error(f"it is {section!r:.80}")
    overrides = section.get("overrides")
    if not isinstance(overrides, dict):
        raise _section_error(f"overrides is {overrides!r:.80}, not an object")
    for name, layer in [("the layers", section), *overrides.items()]:
        if not isinstance(layer, dict) or not isinstance(layer.get("packed"), bool):
            raise _section_error(f"{name} must say whether they are packed, true or false")
    specs = {name: layer.get("spec") for name, layer in [("the layers", section), *overrides.items()]}
    if "embedding_spec" in section:
        specs["the embedding"] = section["embedding_spec"]
    for name, spec in specs.items():
        if not isinstance(spec, dict) or not spec.keys() <= KINDS.keys():
            raise _section_error(f"{name}: spec is {spec!r:.200}, not an object of {', '.join(KINDS)}")
        for key, value in spec.items():
            if not _is(value, KINDS[key]) and not (key in NONE and value is None):
                raise _section_error(f"{name}: {key} is {value!r:.80}, not of type {KINDS[key].__name__}")
        try:
            QuantSpec(**spec)
        except ValueError as error:
            raise _section_error(f"{name}: {error}") from None
    weight_bits, embedding = section.get("bits", 2), section.get("embedding")
    if type(weight_bits) is bool or weight_bits not in (2, 1.6, 1):
        raise _section_error(f"bits is {weight_bits!r:.80}")
    if not isinstance(embedding, str | None):
        raise _section_error(f"embedding is {embedding!r:.80}, not a name")


def _section_error(what: str) -> ValueError:
    return _error(f"the `bitnet_toolkit` section is missing or damaged ({what})")


def _is(value: Any, kind: type) -> bool:
    """Whether a JSON value is of a type; whole numbers are floats, too, and true is no number."""
    return type(value) is kind or (kind is float and type(value) is int)


def _error(what: str) -> ValueError:
    return ValueError(f"config.json: {what}; copy or download it again")
