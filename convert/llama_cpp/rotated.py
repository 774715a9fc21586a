"""Matrices that PrismML rotated before they were quantized (Bonsai 2), as a GGUF file's metadata describe them.

A folded matrix is one of transformed features, y = W (H S x): S are signs, H is the normalized Walsh-Hadamard transform
in Sylvester's order, in blocks of features. Layers with hadamard=BLOCK compute that. What is no packed layer is turned
back when it is read. Keys, all of them behind `prism.hadamard.`:

    version                   1, or 2 with tied_output
    block_size                features of a block
    transform, axis           TRANSFORM and AXIS
    sign_mode                 "identity", or "explicit" with
    sign_widths, sign_values  for each number of features of folded matrices, as many values of 1 and -1
    weight_names              the folded matrices
    inverse_weight_names      the embedding, where its rows are rotated: a token's is S H z
    tied_output               these rows are the output head's, too
    gdn_v_grouped             features of a folded ssm_out stand in transformers' order of heads, not in ggml's

Written is version 1, with embeddings as they are: `contract`. PrismML's llama.cpp, the fork that these keys are of,
applies it to the architectures and matrices that READERS and MATRICES list, and refuses others. Stock llama.cpp does
not know the keys, and would compute with rotated matrices as if they were not; so they are written in the fork's own
types only (TYPES), which stock refuses to load.

Source: PrismML-Eng/llama.cpp, pull requests 120 and 121.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bitnet.kernels import rotation

from ..files.damaged import Damaged
from ..files.gguf import REMEDY
from .header import Value

PREFIX = "prism.hadamard."
TRANSFORM, AXIS = "normalized-sylvester-walsh-hadamard", "input-last-dimension"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
TYPES = ("PQ2_0", "PTQ1_0")
READERS = ("llama", "qwen3", "qwen3moe", "qwen35")
MATRICES: tuple[str, ...] = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_qkv", "attn_gate", "ssm_out")
MATRICES += ("ffn_gate", "ffn_up", "ffn_down", "output")


class Rotation(NamedTuple):
    """Which tensors of a file are rotated, and how."""

    block: int
    signs: dict[int, Tensor] | None  # int8, by number of features; None: none
    names: frozenset[str]  # of the matrices and of the embedding
    grouped: bool  # gdn_v_grouped

    def unrotated(self, name: str, values: Tensor) -> Tensor:
        """The values [N, K] of a tensor, as float32, as they were before they were rotated, if they were."""
        if name not in self.names:
            return values
        signs = None if self.signs is None else self.signs[values.shape[-1]]
        return rotation.unrotate(values.float(), self.block, signs)


class Folded(NamedTuple):
    """A rotated matrix that is to be written."""

    layer: str  # its name in the model
    features: int
    block: int
    signs: Tensor | None


def contract(arch: str, folded: dict[str, Folded], grouped: bool) -> dict[str, Value]:
    """The keys that describe rotated matrices, by their names in the file; {} where there are none.

    grouped: features of ssm_out stand in transformers' order of heads
    Raises ValueError naming the layer for what the keys cannot express, or PrismML's llama.cpp does not apply.
    """
    if not folded:
        return {}
    first = next(iter(folded.values()))
    if arch not in READERS:
        raise ValueError(
            f"{first.layer} rotates its activations (hadamard), and PrismML's llama.cpp applies that to "
            f"{', '.join(READERS)} only, not to {arch}; take gguf-bf16"
        )
    signs: dict[int, Folded] = {}  # the first layer of each number of features
    for name, matrix in folded.items():
        other = signs.setdefault(matrix.features, matrix)
        what = ""
        if name.split(".")[-2] not in MATRICES:
            what = f"is {name} there, whose input PrismML's llama.cpp does not rotate (skip leaves a layer float)"
        elif matrix.block != first.block:
            what = f"rotates in blocks of {matrix.block} and {first.layer} of {first.block}, where one size is for all"
        elif (matrix.signs is None) != (first.signs is None):
            what = f"has {'no signs' if matrix.signs is None else 'signs'}, unlike {first.layer}"
        elif matrix.signs is not None and other.signs is not None and not torch.equal(matrix.signs, other.signs):
            what = f"has other signs than {other.layer}, where they go by the number of features ({matrix.features})"
        if what:
            raise ValueError(f"{matrix.layer} {what}; take gguf-bf16")
    keys: dict[str, Value] = {
        "version": 1,
        "block_size": first.block,
        "transform": TRANSFORM,
        "axis": AXIS,
        "sign_mode": "identity" if first.signs is None else "explicit",
        "weight_names": list(folded),
    }
    if grouped:
        keys["gdn_v_grouped"] = True
    if first.signs is not None:
        values = [matrix.signs for matrix in signs.values() if matrix.signs is not None]
        keys |= {"sign_widths": list(signs), "sign_values": torch.cat(values).tolist()}
    return {f"{PREFIX}{key}": value for key, value in keys.items()}


def rotation_of(
    path: Path, metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]], embedding: str, head: str
) -> Rotation:
    """What a file's metadata say; nothing is rotated where they say nothing.

    shapes: of its tensors, by their names, [N, K]; embedding, head: two of the names
    Raises ValueError naming the key for what is not known here, and Damaged for what contradicts itself.
    """
    own: dict[str, Any] = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    if not own:
        return Rotation(1, None, frozenset(), False)
    tied, grouped = own.pop("tied_output", False), own.pop("gdn_v_grouped", False)
    for key, known in {
        "version": (2,) if tied else (1,),
        "transform": (TRANSFORM,),
        "axis": (AXIS,),
        "sign_mode": ("identity", "explicit"),
    }.items():
        if own.get(key) not in known:
            raise ValueError(
                f"{path}: its weights are rotated, and {PREFIX}{key} is {own.get(key, 'missing')!r:.80}"
                f"{' with tied_output' * (key == 'version' and bool(tied))}; known here: {', '.join(map(str, known))}"
            )
    block: Any = own.get("block_size")
    explicit = own["sign_mode"] == "explicit"
    try:
        rotation.check_block(block)
    except ValueError as error:
        raise ValueError(f"{path}: {PREFIX}block_size: {error}") from None
    names, inverse = (own.get(key, []) for key in ("weight_names", "inverse_weight_names"))
    lists = [own.get(key, []) for key in ("sign_widths", "sign_values")]
    if not names or not all(map(_is_plain, (names, inverse, *lists))):
        raise Damaged(path, f"{PREFIX}weight_names, or another list beside it, is none", REMEDY)
    used = {"version", "transform", "axis", "sign_mode", "block_size", "weight_names", "inverse_weight_names"}
    used |= {"sign_widths", "sign_values"} if explicit else set()
    if unknown := sorted(own.keys() - used):
        raise ValueError(f"{path}: its weights are rotated, and {PREFIX}{unknown[0]} is not known here")
    if not set(inverse) <= {embedding} or embedding in names:
        raise ValueError(f"{path}: {PREFIX}inverse_weight_names are {inverse!r:.80}; {embedding} alone is known here")
    if bool(tied) != (embedding in inverse and head not in shapes):
        raise Damaged(
            path, f"{PREFIX}tied_output is {tied}, which its tensors and inverse_weight_names are not", REMEDY
        )
    signs = _signs(path, *lists) if explicit else None
    for name in (*names, *inverse):
        shape = shapes.get(name, ())
        if len(shape) != 2:
            raise Damaged(path, f"{PREFIX}weight_names have {name}, which is no matrix of the file", REMEDY)
        if shape[1] % block or (signs is not None and shape[1] not in signs):
            what = f"block_size is {block}" if shape[1] % block else "sign_widths lack that"
            raise Damaged(path, f"{name} has {shape[1]} features, but {PREFIX}{what}", REMEDY)
    return Rotation(block, signs, frozenset((*names, *inverse)), bool(grouped))


def _is_plain(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(item, list | dict) for item in value)


def _signs(path: Path, widths: list[int], values: list[int]) -> dict[int, Tensor]:
    if not all(type(width) is int and width > 0 for width in widths) or sum(widths) != len(values):
        raise Damaged(path, f"{PREFIX}sign_values are {len(values):,}, but sign_widths {widths!r:.80}", REMEDY)
    if len(set(widths)) != len(widths) or not set(values) <= {1, -1}:
        what = "values, others than 1 and -1" if len(set(widths)) == len(widths) else "widths, one of them twice"
        raise Damaged(path, f"has {PREFIX}sign_{what}", REMEDY)
    parts = torch.tensor(values, dtype=torch.int8).split(widths)
    return dict(zip(widths, parts, strict=True))
