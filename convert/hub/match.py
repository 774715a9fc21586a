"""Does a checkpoint hold what its model needs?"""

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # whose import imports hf.py, which needs this file
    from transformers import PreTrainedModel

FLOATS = ("F64", "F32", "F16", "BF16")
_BYTES = {torch.uint8: "U8", torch.int8: "I8"}


def suits(dtype: str, tensor: Tensor) -> bool:
    """Whether values stored as `dtype` (safetensors' spelling) can be those of a tensor: floats only for floats."""
    if tensor.is_floating_point() or tensor.is_complex():
        return dtype in FLOATS
    return dtype == _BYTES.get(tensor.dtype, dtype) and dtype not in FLOATS


def misfits(
    model: torch.nn.Module, stored: Mapping[str, tuple[str, tuple[int, ...]]], shapes: bool = True
) -> Iterator[str]:
    """A line for each tensor of the model that is stored as something else: another kind of number, or shape.

    stored: dtype and shape by the model's names
    """
    state = model.state_dict()
    for key in stored:  # layers beyond the last one, and no other strangers, which from_pretrained drops, too
        if key not in state and any(twin in state for twin in _neighbours(key)):
            yield f"{key} is of a layer that the model does not have"
    for key, tensor in state.items():
        if key not in stored:
            continue
        dtype, shape = stored[key]
        if not suits(dtype, tensor) or (shapes and shape != tuple(tensor.shape)):
            needed = "F32, BF16 or F16" if tensor.is_floating_point() else _BYTES.get(tensor.dtype, "integers")
            yield f"{key} is {dtype} {list(shape)}, but the model's is {needed} {list(tensor.shape)}"


def _neighbours(key: str) -> Iterator[str]:
    """The names of the same tensor in the first of its layers."""
    parts = key.split(".")
    for index, part in enumerate(parts):
        if part.isdecimal() and part != "0":
            yield ".".join([*parts[:index], "0", *parts[index + 1 :]])


def computed(model: "PreTrainedModel", key: str) -> bool:
    """Whether transformers makes a parameter itself where it is not stored: sinusoidal positions, say."""
    if any(re.search(pattern, key) for pattern in model._keys_to_ignore_on_load_missing or ()):
        return True
    return "Sinusoidal" in type(model.get_submodule(key.rpartition(".")[0])).__name__


def leftovers(model: "PreTrainedModel") -> re.Pattern[str] | None:
    """What matches the stored tensors that transformers drops without a word, as older versions stored them.

    Causal masks and rotary frequencies, say.
    """
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ())]
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None
