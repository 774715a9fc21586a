"""Sequences on transformers' own forward, for models that the native step does not compute; one after the other."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from .attach import CACHE
from .sequences import positions


class EagerSequences:
    """bitnet.decode.sequences.Sequences for any causal language model of transformers.

    Each slot has its own cache. What cannot be cut out of a cache (a recurrent state, a full window) is computed again
    from the tokens, which are kept.
    """

    def __init__(self, model: Any, slots: int = 8, context: int | None = None) -> None:
        self._model, self.slots, self.vocabulary = model, slots, model.config.get_text_config().vocab_size
        most = positions(model.config) or 1 << 30
        self.context = min(context or most, most)
        self._ids: list[list[int]] = [[] for _ in range(slots)]
        self._caches: list[Cache | None] = [None] * slots

    def length(self, slot: int) -> int:
        """See Sequences."""
        return len(self._ids[slot])

    def truncate(self, slot: int, tokens: int) -> None:
        """See Sequences."""
        if tokens > self.length(slot):
            raise ValueError(f"slot {slot} holds {self.length(slot)} tokens, not {tokens}")
        if tokens < self.length(slot):
            del self._ids[slot][tokens:]
            self._caches[slot] = None  # computed again when it is needed

    def copy(self, source: int, target: int, tokens: int) -> None:
        """See Sequences."""
        self._ids[target] = self._ids[source][:tokens]
        whole = tokens == self.length(source)
        self._caches[target] = copy.deepcopy(self._caches[source]) if whole else None

    @torch.inference_mode()
    def extend(self, work: Sequence[tuple[int, Tensor]]) -> Tensor:
        """See Sequences."""
        for slot, ids in work:
            if self.length(slot) + len(ids) > self.context:
                raise ValueError(f"{self.length(slot) + len(ids)} tokens, but a sequence holds {self.context}")
        return torch.cat([self._extend(slot, ids) for slot, ids in work])

    def _extend(self, slot: int, ids: Tensor) -> Tensor:
        cache = self._caches[slot]
        if cache is None:
            ids = torch.cat([torch.tensor(self._ids[slot], dtype=torch.int64), ids])
            self._ids[slot] = []
        self._caches[slot] = None  # should this fail, nothing is believed of it
        inputs = {"input_ids": ids[None].to(self._model.device), "use_cache": True, "logits_to_keep": 1}
        if cache is not None:
            inputs[CACHE] = cache
        try:
            output = self._model(**inputs)
        except TypeError:  # a model without logits_to_keep
            del inputs["logits_to_keep"]
            output = self._model(**inputs)
        self._ids[slot] += ids.tolist()
        self._caches[slot] = getattr(output, CACHE, None)
        return output.logits[:, -1].float().cpu()
