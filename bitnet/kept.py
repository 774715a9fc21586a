"""What packed modules have in common: scales that keep their dtype, and weights that need not be in memory as they are
stored."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import backends, layout
from .kernels.cpu.linear import unprepack_rows


class Kept:
    """A weight of which the form of the backend `cpu` is all there is in memory, until someone asks for it: that of a
    packed layer, and of the embedding that shares it, [N, K], of a kind of QuantSpec.weights.

    Whoever looks at the weight of one of the modules gives it back to all of them: what is then written to it is seen.
    """

    def __init__(self, modules: Iterable[Any], prepacked: Tensor, n: int, k: int, kind: str) -> None:
        self._modules = [weakref.ref(module) for module in modules]
        self._prepacked, self._n, self._k, self._kind = prepacked, n, k, kind

    def rows(self, ids: Tensor) -> Tensor:
        """Some rows of the codes, int8 [..., K] for ids [...]."""
        return unprepack_rows(self._prepacked, ids, self._k)

    def give_back(self) -> None:
        """Make the stored weight again, bit for bit."""
        with torch.inference_mode(False):
            codes = backends.BACKENDS["cpu"].unprepack(self._prepacked, self._n, self._k)
            weight = layout.pack_codes(codes, self._kind)
        for module in filter(None, (reference() for reference in self._modules)):
            module.take_back(weight)


class Packed(nn.Module):
    """A module whose weight_scale keeps its dtype under .to(bfloat16), .half(): the scale is exact or it is wrong.

    Its weight need not be in memory as it is stored: see packed.keep_prepacked.
    """

    weight_scale: Tensor
    _kept: Kept | None = None

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._kept is not None:
            self._kept.give_back()
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        self._give_back()
        return vars(self)

    def _give_back(self) -> None:
        if self._kept is not None:
            self._kept.give_back()

    def take_back(self, weight: Tensor) -> None:
        """What give_back calls."""
        self._buffers["weight"] = weight
        del self._kept

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._give_back()
        super()._save_to_state_dict(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._give_back()
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != scale.dtype:
            self.weight_scale = scale.to(self.weight_scale.device)
        self._drop_derived()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._give_back()
        self._drop_derived()
        dtype = self.weight_scale.dtype
        super()._load_from_state_dict(*args, **kwargs)
        self.weight_scale = self.weight_scale.to(dtype)  # assign=True may have put another dtype there

    def _drop_derived(self) -> None:
        """Forget what was made from the buffers; the next call makes it again."""
