"""Batches of training text, each a function of its number, so that a run can go on at any step."""

from typing import Protocol

import torch
from torch import Tensor

from .stdlib import END as END
from .stdlib import VOCABULARY as VOCABULARY
from .stdlib import build_tokenizer as build_tokenizer
from .stdlib import corpus as corpus

IGNORED = -100  # the label of what is not to be predicted, as in transformers


class Batches(Protocol):
    """What a training loop reads: batch number `index`, with the arguments of the model and "labels" [B, L], where
    labels[:, t] is what follows input t (shifted already), or IGNORED. The same number gives the same batch."""

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


class Windows:
    """Stretches of a stream of tokens, drawn anywhere with replacement.

    tokens: integers [T]; each batch is [batch, context]
    """

    def __init__(self, tokens: Tensor, batch: int, context: int, seed: int = 0) -> None:
        self.tokens, self.batch, self.context, self.seed = tokens, batch, context, seed
        self._rewind()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index < self.drawn:
            self._rewind()
        while self.drawn <= index:  # one generator draws them in turn
            at = torch.randint(len(self.tokens) - self.context, (self.batch, 1), generator=self.generator)
            self.drawn += 1
        rows = self.tokens[at + torch.arange(self.context + 1)].long()
        return {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}

    def _rewind(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.drawn = 0


class PackedRows:
    """Documents one after the other, cut into rows of `context` tokens; each row once an epoch, in an order drawn anew.

    ids:      integers [T], a document's tokens together, in any order of documents
    starts:   int64 [D], where documents start, ascending, the first at 0
    separate: attention does not see other documents in a row, and positions start at 0 with each: given to the model as
              position_ids, from which transformers' attention derives its mask. Models without attention, and those
              that ignore position_ids, see across. Otherwise a row is one text
    A document's first token, the begin- or end-of-text token, is never a label.
    """

    def __init__(
        self, ids: Tensor, starts: Tensor, batch: int, context: int, seed: int = 0, *, separate: bool = True
    ) -> None:
        self.rows = (len(ids) - 1) // context
        if self.rows < 1:
            raise ValueError(
                f"the text has {len(ids):,} tokens, fewer than one row of context {context} and the token after it; "
                "give more text, or a smaller context"
            )
        self.ids, self.starts, self.separate = ids, starts, separate
        self.batch, self.context, self.seed = batch, context, seed
        self._order: tuple[int, Tensor] | None = None

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        numbers = range(index * self.batch, (index + 1) * self.batch)
        rows = [row_at(self.ids, self.starts, self._first(number), self.context) for number in numbers]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        # rows that are one document each need no positions, and their attention no mask
        if not self.separate or bool((batch["position_ids"][:, -1] == self.context - 1).all()):
            del batch["position_ids"]
        return batch

    def stretches(self, count: int) -> Tensor:
        """The ids [count, context] of the run's first rows, each as one text."""
        if count > self.rows:
            raise ValueError(f"the text has {self.rows:,} rows of context {self.context}, but {count:,} are asked for")
        firsts = torch.tensor([[self._first(number)] for number in range(count)])
        return self.ids[firsts + torch.arange(self.context)].long()

    def _first(self, number: int) -> int:
        return int(self._epoch(number // self.rows)[number % self.rows]) * self.context

    def _epoch(self, epoch: int) -> Tensor:
        if self._order is None or self._order[0] != epoch:
            draw = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
            self._order = epoch, torch.randperm(self.rows, generator=draw)
        return self._order[1]


def row_at(ids: Tensor, starts: Tensor, first: int, context: int) -> dict[str, Tensor]:
    """The row [context] of a run of documents that begins at token `first`, with its labels and positions."""
    tokens = ids[first : first + context + 1].long()
    near, far = torch.searchsorted(starts, torch.tensor([first, first + context])).tolist()
    new = starts[near : far + 1] - first  # documents that start in the row, or with the token after it
    new = new[new <= context]
    labels = tokens[1:].clone()
    labels[new[new > 0] - 1] = IGNORED
    begun = torch.zeros(context, dtype=torch.long)  # where each token's document, or the row, begins
    inside = new[new < context]
    begun[inside] = inside
    return {"input_ids": tokens[:-1], "labels": labels, "position_ids": torch.arange(context) - begun.cummax(0).values}
