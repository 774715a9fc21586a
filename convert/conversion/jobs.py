"""A conversion's pieces of work: which tensors each makes of what."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..files.safetensors import DTYPES

WIDTHS = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {"U32": 4}  # MLX's words


@dataclass
class Output:
    """One tensor of the output: name, dtype as safetensors spells it, shape; and, once planned, its file and place."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path | None = None
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return WIDTHS[self.dtype] * torch.Size(self.shape).numel()


@dataclass
class Job:
    """What is read and computed as one.

    run() returns the values of each of `outputs`: consecutive pieces of the flat tensor, made as they are written.
    """

    name: str
    outputs: list[Output]
    reads: int  # bytes
    memory: int  # bytes it holds while it runs, but for a few MB
    run: Callable[[], list[Iterable[Tensor]]]
