"""Sequences on transformers' own forward, for models that the native step does not compute; one after the other."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .attach import CACHE
from .sequences import check_room, context_of


class EagerSequences:
    """bitnet.decode.sequences.Sequences for any causal language model of transformers.

    Each slot has its own cache, which is not cut: a recurrent state and a full window could not be.
    """

    cuts = marks = False
    chunk = 256

    def __init__(self, model: Any, slots: int = 8, context: int | None = None) -> None:
        self._model, self.slots, self.vocabulary = model, slots, model.config.get_text_config().vocab_size
        self.context = context_of(model.config, context)
        self._lengths = [0] * slots
        self._caches: list[Cache | None] = [None] * slots

    def length(self, slot: int) -> int:
        """See Sequences."""
        return self._lengths[slot]

    def mark(self, slot: int) -> None:
        """See Sequences."""
        raise NotImplementedError

    def truncate(self, slot: int, tokens: int) -> None:
        """See Sequences."""
        if tokens not in (0, self.length(slot)):
            raise ValueError(
                f"slot {slot} holds {self.length(slot)} tokens, of which the first {tokens} cannot be had alone"
            )
        if tokens == 0:
            self._caches[slot], self._lengths[slot] = None, 0

    def copy(self, source: int, target: int, tokens: int) -> None:
        """See Sequences."""
        if tokens != self.length(source):
            raise ValueError(f"slot {source} holds {self.length(source)} tokens, which are copied together")
        self._caches[target], self._lengths[target] = copy.deepcopy(self._caches[source]), tokens

    @torch.inference_mode()
    def extend(self, work: Sequence[tuple[int, Tensor]]) -> Tensor:
        """See Sequences."""
        check_room(self, work)
        return torch.cat([self._extend(slot, ids) for slot, ids in work])

    def _extend(self, slot: int, ids: Tensor) -> Tensor:
        cache = self._caches[slot]
        inputs = {"input_ids": ids[None].to(self._model.device), "use_cache": True, "logits_to_keep": 1}
        if cache is not None:
            inputs[CACHE] = cache
        try:
            output = self._model(**inputs)
        except TypeError:  # a model without logits_to_keep
            del inputs["logits_to_keep"]
            output = self._model(**inputs)
        self._lengths[slot] += len(ids)
        self._caches[slot] = getattr(output, CACHE, None)
        return output.logits[:, -1].float().cpu()
