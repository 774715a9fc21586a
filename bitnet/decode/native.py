"""Sequences of tokens on the native step: prompts, single tokens and many sequences at once, each with its cache."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..kernels.cpu import step as native
from ..packed import PackedBitLinear
from .families import FAMILIES, Family, as_text, text_part
from .pieces import Unplanned
from .plan import Plan
from .sequences import check_room

ROOM = 256  # positions a cache has room for at first; it doubles


class Cached:
    """One sequence: its tokens' keys and values, and how many there are."""

    def __init__(self, plan: Plan) -> None:
        self.store = native.KeyValues(plan.kept, ROOM, plan.cache_type)
        self.length = 0
        self.marked: tuple[int, list[Tensor]] | None = None  # a length, and a recurrence's tensors then

    def mark(self) -> None:
        """Remember what a recurrence is now: that much can be cut to."""
        self.marked = self.length, [tensor.clone() for tensor in self.store.recurrent]

    def cut(self, tokens: int) -> None:
        """Forget all but the first `tokens`.

        Raises ValueError where there are not so many, or where a recurrence has gone on that was not marked there.
        """
        if tokens > self.length:
            raise ValueError(f"a sequence of {self.length} tokens cannot be cut to {tokens}")
        if recurrent := self.store.recurrent:
            if self.marked is not None and tokens == self.marked[0]:
                for tensor, then in zip(recurrent, self.marked[1], strict=True):
                    tensor.copy_(then)
            elif tokens == 0:  # also of no tokens: what failed may have left something
                for tensor in recurrent:
                    tensor.zero_()
            elif tokens < self.length:
                raise ValueError(f"of a recurrent model's {self.length} tokens, the first {tokens} cannot be had alone")
        if self.marked is not None and tokens < self.marked[0]:
            self.marked = None
        self.length = tokens

    def reserve(self, tokens: int) -> None:
        """Make room for as many tokens in all."""
        capacity = self.store.capacity
        if tokens > capacity:
            while capacity < tokens:
                capacity *= 2
            self.store = self.store.resized(capacity, self.length)

    def copy(self, length: int | None = None) -> "Cached":
        """An independent copy of the first `length` tokens, by default of all; see cut."""
        copy = Cached.__new__(Cached)
        copy.length, copy.marked = self.length, self.marked
        copy.store = self.store.resized(self.store.capacity, self.length if length is None else length)
        copy.cut(self.length if length is None else length)
        return copy


def run(plan: Plan, embedded: Tensor, work: Sequence[tuple[Cached, int]], per_layer: Tensor | None = None) -> Tensor:
    """Append tokens to sequences; the last hidden states after the final norm, float32 [M, hidden].

    embedded, per_layer: what `embed` made of the first sequence's tokens, then of the second's, ...; work: each
    sequence and how many of the tokens are its own. No sequence may come twice.
    """
    caches = [cached for cached, _ in work]
    sequence: list[int] = []
    position: list[int] = []
    for i, (cached, count) in enumerate(work):
        sequence += [i] * count
        position += range(cached.length, cached.length + count)
    plan.reach(max(position) + 1)
    if plan.learned is not None:
        embedded = embedded + plan.learned.weight[[at + plan.family.learned_offset for at in position]]
    x = embedded.to(torch.float32, copy=True).contiguous()
    for cached, count in work:
        cached.reserve(cached.length + count)
    stores = [cached.store for cached in caches]
    identities = None if per_layer is None else per_layer.float().contiguous()
    for at in range(0, len(x), native.MOST_TOKENS):
        to = at + native.MOST_TOKENS
        part = None if identities is None else identities[at:to]
        native.step(plan.native, x[at:to], stores, sequence[at:to], position[at:to], part)
    for cached, count in work:
        cached.length += count
    return x


class NativeSequences:
    """bitnet.decode.sequences.Sequences on the native step, for a causal language model that has a plan."""

    chunk = 256

    def __init__(self, model: Any, slots: int = 8, cache_type: str = "float16", context: int | None = None) -> None:
        """Raises Unplanned, with the reason, for a model that the step does not compute."""
        self._model, self._cache_type = model, cache_type
        self._base = text_part(model.base_model)
        self._plan = Plan(self._base, cache_type)
        if why := odd_head(model, self._plan.hidden):
            raise Unplanned(why)
        self._caches = [Cached(self._plan) for _ in range(slots)]
        self.marks = self._plan.kept.windows is not None
        self.cuts = not self.marks
        self.slots, self.vocabulary = slots, model.config.get_text_config().vocab_size
        self.context = min(context or self._plan.positions, self._plan.positions)

    def length(self, slot: int) -> int:
        """How many tokens a slot holds."""
        return self._caches[slot].length

    def mark(self, slot: int) -> None:
        """See Sequences."""
        self._caches[slot].mark()

    def truncate(self, slot: int, tokens: int) -> None:
        """See Sequences."""
        if tokens == 0 and self._caches[slot].store.capacity > ROOM:
            self._caches[slot] = Cached(self._plan)
        else:
            self._caches[slot].cut(tokens)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """See Sequences."""
        self._caches[target] = self._caches[source].copy(tokens)

    @torch.inference_mode()
    def extend(self, work: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Append each (slot, ids int64 [T]) to its slot; logits after the last of each, float32 [len(work), V]."""
        if not self._plan.current():
            self._plan = Plan(self._base, self._cache_type)
        check_room(self, work)
        ids = as_text(self._model.base_model, torch.cat([ids for _, ids in work]))
        embedded, per_layer = embed(self._base, ids)
        hidden = run(self._plan, embedded, [(self._caches[slot], len(ids)) for slot, ids in work], per_layer)
        last = torch.tensor([len(ids) for _, ids in work]).cumsum(0) - 1
        return head(self._model, hidden[last])


def embed(base: Any, ids: Tensor) -> tuple[Tensor, Tensor | None]:
    """What the blocks of a base model begin with, [M, hidden] for ids [M], and if there is such what ids are to each
    block, [M, blocks, per_layer]."""
    rows: Tensor = base.get_input_embeddings()(ids)
    family = FAMILIES[type(base).__name__]
    multiplier = family.multiplier(base.config)  # Gemma's embedding does it itself
    rows = rows if multiplier == 1 else rows * multiplier
    if family.per_layer and base.hidden_size_per_layer_input:
        identities: Tensor = base.project_per_layer_inputs(rows[None], base.get_per_layer_inputs(ids[None], rows[None]))
        return rows, identities[0]
    return base.norm(rows) if family.normed else rows, None


class Hidden(BaseModelOutputWithPast):
    """What a base model returns, with None for what else its head may look for: attentions, routers' outputs, ..."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


@torch.inference_mode()
def odd_head(model: Any, hidden: int) -> str | None:
    """Why a model's own logits of a last hidden state of so many features are not those of `head`, if they are not."""
    base = text_part(model.base_model)
    last = torch.randn(1, 1, hidden, generator=torch.Generator().manual_seed(0)).to(base.device, base.dtype)
    token = torch.zeros(1, 1, dtype=torch.int64, device=base.device)
    before = vars(base).get("forward")
    vars(base)["forward"] = lambda *_, **__: Hidden(last_hidden_state=last)
    try:
        own = model(input_ids=token, use_cache=False).logits[0].float()
    except Exception as error:
        return f"its head could not be seen alone: {type(error).__name__}: {error}"
    finally:
        if before is None:
            del vars(base)["forward"]
        else:
            vars(base)["forward"] = before
    found = head(model, last[0])
    alike = found.shape == own.shape and bool(((found - own).norm() <= 0.02 * own.norm()).all())
    return None if alike else f"the logits of a {type(model).__name__} are not those of its output layer"


def head(model: Any, hidden: Tensor) -> Tensor:
    """Logits float32 [M, V] of last hidden states [M, hidden]."""
    lm_head = model.get_output_embeddings()
    packed = isinstance(lm_head, PackedBitLinear)
    logits: Tensor = lm_head(hidden if packed else hidden.to(lm_head.weight.dtype)).float()
    config = model.config  # not its text part's: what is around that, in models that also see, has none of these
    family = FAMILIES.get(type(text_part(model.base_model)).__name__, Family())
    factor = family.logits(config)
    if factor != 1:  # a vocabulary is long: nothing is done in vain
        logits = logits * factor
    capping = config.get_text_config() if family.caps else config
    cap = getattr(capping, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap
