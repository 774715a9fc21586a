"""Where each tensor of a model stands in a GGUF file: its name there, and what becomes of its rows and values.

    all            norms that multiply by 1 + weight in transformers are stored as that sum
    llama          rows of q and k in the order of llama.cpp's rotary embedding
    mixtures       gate and up, one stack in transformers, are two tensors; the router is float32
    BitNet-embedding   the norm in front of a projection has the projection's name and _norm_in
    qwen35         -exp(A_log) instead of A_log; no middle dimension in conv1d; value heads in the order in which ggml
                   repeats key heads: those of the first value head of every key head, then of the second, ...

One description serves both ways: the writer takes `stored`, the reader `restored`.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitnet.kernels.reference import size_of_groups

from .families import Family, head_dim_of

FLOAT32 = ("ffn_gate_inp", "ssm_conv1d")  # as llama.cpp's own files have them, whatever the model's dtype

INNER_NORM = ".rms_norm"  # of our layers

SMALLEST_BLOCK = 64  # features with a scale of their own, in any ternary type


class Place(NamedTuple):
    """A tensor of a GGUF file, and how it is made of one of the model's."""

    name: str
    shape: tuple[int, ...]
    part: slice = slice(None)  # the rows it has of the model's tensor
    rows: Tensor | None = None  # which row of these stands in each of its own
    columns: Tensor | None = None
    values: str = ""  # "centered" or "decay", see above
    float32: bool = False

    def stored(self, tensor: Tensor) -> Tensor:
        """What the file holds for the model's tensor."""
        tensor = self.stored_rows(tensor)
        if self.values == "centered":
            tensor = 1 + tensor.float()
        elif self.values == "decay":
            tensor = -tensor.float().exp()
        return tensor.reshape(self.shape)

    def stored_rows(self, tensor: Tensor) -> Tensor:
        """The same but for the values: of a matrix, or of a stack of them."""
        tensor = tensor if self.part == slice(None) else tensor[..., self.part, :]
        return _take(tensor, self.rows, self.columns)

    def restored(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The model's tensor, or the part of it that is here, for what the file holds.

        shape: of the whole
        """
        if self.values == "centered":
            tensor = tensor.float() - 1
        elif self.values == "decay":
            tensor = (-tensor.float()).log()
        if self.part == slice(None):
            tensor = tensor.reshape(shape)
        inverse = [None if order is None else order.argsort() for order in (self.rows, self.columns)]
        return _take(tensor, *inverse)

    def restored_scale(self, scale: Tensor, k: int) -> Tensor:
        """The scale of the model's matrix for that of the file's: [1], [N] or groups' [N, G]."""
        if len(scale) > 1 and self.rows is not None:
            scale = scale[self.rows.argsort()]
        if scale.ndim == 1 or self.columns is None:
            return scale
        order, size = self.columns.argsort(), size_of_groups(k, scale.shape[1])
        while size >= SMALLEST_BLOCK:
            if (groups := group_order(order, size)) is not None:
                return scale[:, groups]
            scale, size = scale.repeat_interleave(2, dim=1), size // 2
        raise ValueError("has scales of groups that the order of heads cuts; convert the file to bf16")


def _take(tensor: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    tensor = tensor if rows is None else tensor[rows]
    return tensor if columns is None else tensor[:, columns]


def places(key: str, shape: tuple[int, ...], config: Any, family: Family) -> list[Place]:
    """Where a tensor of transformers' model stands, in order of its rows; [] if the graph has no place for it.

    key: its name in the float model's state_dict
    """
    number = next((part for part in key.split(".") if part.isdecimal()), "")
    pattern = ".".join("{}" if part.isdecimal() else part for part in key.split("."))
    if names := (family.parameters or {}).get(pattern):
        size = shape[-2] // len(names) if len(names) > 1 else 0
        parts = [slice(i * size, (i + 1) * size) if size else slice(None) for i in range(len(names))]
        kept = (*shape[:-2], size, *shape[-1:]) if size else shape
        values = "decay" if pattern.endswith(".A_log") else ""
        rows = _value_heads(pattern, shape, config) if "linear_attn" in pattern else None
        return [
            Place(name.format(number), kept, part, rows, values=values) for name, part in zip(names, parts, strict=True)
        ]
    module, _, leaf = pattern.rpartition(".")
    name = family.modules.get(module.removesuffix(INNER_NORM))
    if name is not None and module.endswith(INNER_NORM):
        return [Place(f"{name.format(number)}_norm_in.weight", shape)]
    if name is None or not (leaf == "weight" or (leaf == "bias" and name.rpartition(".")[2] in family.biases)):
        return []
    theirs = name.rpartition(".")[2]
    rows = columns = None
    if family.permuted and theirs in ("attn_q", "attn_k"):
        # transformers rotates value i of a head with value i + d/2, llama.cpp with i + 1: the halves are interleaved
        count = config.num_attention_heads if theirs == "attn_q" else config.num_key_value_heads
        rows = torch.arange(count * head_dim_of(config)).view(count, 2, -1).transpose(1, 2).reshape(-1)
    elif theirs == "ssm_out":
        columns = _value_heads(pattern, shape[1:], config)
    elif "linear_attn" in pattern and theirs != "ssm_norm":
        rows = _value_heads(pattern, shape, config)
    values = "centered" if family.centered and theirs.endswith("norm") and theirs != "ssm_norm" else ""
    kept = (shape[0], shape[2]) if theirs == "ssm_conv1d" else shape
    return [Place(f"{name.format(number)}.{leaf}", kept, slice(None), rows, columns, values, theirs in FLOAT32)]


def all_places(
    keys: Iterable[tuple[str, tuple[int, ...]]], config: Any, family: Family
) -> dict[str, tuple[str, Place]]:
    """The tensors that a file of a model can hold, by name, each with the key of the model's tensor it is of.

    keys: names and shapes of the model's tensors
    """
    return {place.name: (key, place) for key, shape in keys for place in places(key, shape, config, family)}


def _value_heads(pattern: str, shape: tuple[int, ...], config: Any) -> Tensor | None:
    """The order of the rows of what has some for each value head, behind those of queries and keys where it has any."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    if keys == values:
        return None
    first = 2 * keys * config.linear_key_head_dim if pattern.endswith(("in_proj_qkv.weight", "conv1d.weight")) else 0
    heads = torch.arange(first, shape[0]).view(keys, values // keys, -1).transpose(0, 1).reshape(-1)
    return torch.cat([torch.arange(first), heads])


def group_order(columns: Tensor, size: int) -> Tensor | None:
    """The order of groups of `size` features that an order of features makes; None if it cuts any."""
    if len(columns) % size:
        return None
    groups = columns.view(-1, size)
    whole = (groups == groups[:, :1] + torch.arange(size)).all() and (groups[:, 0] % size == 0).all()
    return groups[:, 0] // size if whole else None
