"""What decodes: sequences of tokens in slots, which continuous batching extends together."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Sequences(Protocol):
    """A causal language model and the keys and values of up to `slots` sequences."""

    vocabulary: int
    context: int  # tokens that one sequence may hold
    slots: int
    cuts: bool  # whether a slot's first tokens can be had without those after them: not of a recurrent state
    marks: bool  # whether it needs to remember, and can
    chunk: int  # tokens of prompts that are best computed at once

    def length(self, slot: int) -> int:
        """How many tokens a slot holds."""

    def mark(self, slot: int) -> None:
        """Remember a slot as it is, in place of what it remembered before. Called where `marks`."""

    def truncate(self, slot: int, tokens: int) -> None:
        """Forget all but the first `tokens`: unless it cuts those that were marked, all or 0.

        With 0 the slot's memory is given back, too.
        """

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Make one slot the first `tokens` of another: unless it cuts those that were marked, or all."""

    def extend(self, work: Sequence[tuple[int, Tensor]]) -> Tensor:
        """Append each (slot, ids int64 [T]) to its slot; logits after the last of each, float32 [len(work), V].

        No slot comes twice. Raises ValueError for a sequence beyond `context`.
        """


def positions(config: Any) -> int | None:
    """How many tokens a model of a transformers config is made for; None without a limit, which XLNet calls -1."""
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found if found and found > 0 else None


def context_of(config: Any, context: int | None) -> int:
    """How many tokens a sequence may hold: as many as are asked for, and no more than the model is made for."""
    most = positions(config) or 1 << 30
    return min(context or most, most)


def check_room(sequences: Sequences, work: Sequence[tuple[int, Tensor]]) -> None:
    """Raise ValueError if that would make a sequence too long."""
    for slot, ids in work:
        if (tokens := sequences.length(slot) + len(ids)) > sequences.context:
            raise ValueError(f"{tokens} tokens, but a sequence holds {sequences.context}")
