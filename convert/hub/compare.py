"""Does a checkpoint hold what its config says the model needs? One ValueError names the tensor that differs."""

import re
from collections import Counter
from math import prod

import torch
from torch import Tensor, nn

from ..files.safetensors import TensorHeader


def compare_merged(model: nn.Module, headers: dict[str, TensorHeader], merged: dict[str, list[str]]) -> None:
    """Raise ValueError for a stack of experts that its stored parts, an expert each, do not make up, and for tensors
    that are no parts of a stored one; merged: see names.py."""
    state = model.state_dict()
    together: dict[tuple[str, ...], list[str]] = {}
    for key, parts in merged.items():
        together.setdefault((*parts,), []).append(key)
    for stored_keys, keys in together.items():
        stored = {key: headers[key] for key in stored_keys}
        if len(keys) > 1:
            compare_whole({key: state[key] for key in keys if key in state}, stored)
        elif keys[0] in state and any(".experts." in part for part in stored):
            compare_parts(keys[0], state[keys[0]], stored)


def compare_layer(
    name: str,
    module: nn.Module,
    headers: dict[str, TensorHeader],
    merged: dict[str, list[str]] | None = None,
    tied: bool = False,
) -> None:
    dtypes = {torch.uint8: "U8", torch.int8: "I8"}
    for leaf, tensor in module.state_dict().items():
        stored = headers.get(f"{name}.{leaf}")
        parts = (merged or {}).get(f"{name}.{leaf}", [])
        if parts and (stored is None or parts == [f"{name}.{leaf}"]):  # or transposed, under the same name
            if sum(theirs == parts for theirs in (merged or {}).values()) > 1:
                continue  # one of several parts of a stored one: compare_merged knows the others
            compare_parts(f"{name}.{leaf}", tensor, {part: headers[part] for part in parts})
            continue
        if stored is None and tied and leaf == "weight":
            continue
        if stored is None:
            raise ValueError(
                f"config.json says {name} is {type(module).__name__}, but the checkpoint has no tensor {name}.{leaf}"
            )
        expected = dtypes.get(tensor.dtype)
        ok = stored.dtype == expected if expected else stored.dtype in ("F32", "BF16", "F16")
        if not ok or tuple(tensor.shape) != stored.shape:
            raise ValueError(
                f"{stored.file.name}: {name}.{leaf} is {stored.dtype} {list(stored.shape)}, but config.json says the "
                f"layer is {type(module).__name__}, which stores {expected or 'F32, BF16 or F16'} {list(tensor.shape)}"
            )


def compare_whole(parts: dict[str, Tensor], stored: dict[str, TensorHeader]) -> None:
    """Do these tensors add up to what is stored as one?"""
    for key, (dtype, shape, file, _) in stored.items():
        if dtype not in ("F32", "BF16", "F16") or prod(shape) != sum(part.numel() for part in parts.values()):
            sizes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in parts.items())
            raise ValueError(f"{file.name}: {key} is {dtype} {list(shape)}, but has to be F32, BF16 or F16 and {sizes}")


def compare_parts(name: str, stack: Tensor, parts: dict[str, TensorHeader]) -> None:
    """Do the tensors of single experts make up the stack? Those of one kind differ in the expert's number only."""
    kinds: dict[str, list[str]] = {}
    for part in parts:
        kinds.setdefault(re.sub(r"(?<=\.experts\.)\d+(?=\.)", "*", part), []).append(part)
    for kind, found in kinds.items():
        every = [kind.replace("*", str(expert)) for expert in range(len(stack))] if "*" in kind else []
        if missing := next((part for part in every if part not in parts), None):
            raise ValueError(f"the checkpoint has no tensor {missing}, a part of {name}")
        usual = Counter(parts[part].shape for part in found).most_common(1)[0][0]
        for part in found:
            dtype, shape, file, _ = parts[part]
            if dtype not in ("F32", "BF16", "F16") or shape != usual:
                raise ValueError(
                    f"{file.name}: {part} is {dtype} {list(shape)}, but as a part of {name} it must be F32, BF16 or "
                    f"F16 {list(usual)}"
                )
    if sum(prod(header.shape) for header in parts.values()) != stack.numel():
        raise ValueError(
            f"{name} is {list(stack.shape)}, which {', '.join(kinds)} in the checkpoint do not add up to: "
            f"{len(parts)} tensors of {', '.join(sorted({str(list(h.shape)) for h in parts.values()}))}"
        )
