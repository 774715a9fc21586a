"""A stored weight that only the form of the backend `cpu` is in memory of, until someone asks for it."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .kernels import backends, layout


class Kept:
    """The weight of a packed layer, and of the embedding that shares it: [N, K], of a kind of QuantSpec.weights.

    Whoever looks at the weight of one of the modules gives it back to all of them: what is then written to it is seen.
    """

    def __init__(self, modules: Iterable[Any], prepacked: Tensor, n: int, k: int, kind: str) -> None:
        self._modules = [weakref.ref(module) for module in modules]
        self._prepacked, self._n, self._k, self._kind = prepacked, n, k, kind

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of the codes, int8 [..., K] for ids [...], by way of the 32 around each, which are in one block."""
        found = []
        for some in ids.flatten().split(64):
            codes = self._codes(self._prepacked[some // 32], 32 * len(some))
            found.append(codes.view(-1, 32, self._k)[torch.arange(len(some)), some % 32])
        return torch.cat(found).view(*ids.shape, self._k)

    def give_back(self) -> None:
        """Make the stored weight again, bit for bit."""
        with torch.inference_mode(False):
            weight = layout.pack_codes(self._codes(self._prepacked, self._n), self._kind)
        for module in filter(None, (reference() for reference in self._modules)):
            module.take_back(weight)

    def _codes(self, prepacked: Tensor, n: int) -> Tensor:
        return backends.BACKENDS["cpu"].unprepack(prepacked, n, self._k)
