"""How well models predict text: perplexity and bits per byte, and how far two models are apart.

Models are measured in evaluation mode, which always quantizes fully, also in the middle of a ramp.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import IGNORED, row_at
from .processes import Processes

ROWS = 32  # that go through a model together, fewer if they have more logits than
LOGITS = 1 << 28
POSITIONS = 256  # whose logits exist in float32, beside the model's own


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; each model's mode is as it was afterwards."""
    before = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for model, training in zip(models, before, strict=True):
            model.train(training)


def spread_loss(
    model: Any,
    tokens: Tensor,
    context: int,
    scored: int = 64 * 1024,
    starts: Tensor | None = None,
    processes: Processes = Processes(),  # noqa: B008 (frozen)
) -> float:
    """Mean -ln p(next token), in nats, over stretches spread evenly through a stream: a quick look.

    tokens: integers [T], T > context
    scored: about how many tokens count
    starts: where documents start, if attention is not to see across; see train.data.PackedRows
    processes: that share the work, each with the model
    Each stretch is half a context long and follows half a context that is not scored, so that every scored token
    is predicted from that much text at least, where its document has.
    """
    half = context // 2
    stretches = max(1, min((len(tokens) - 1) // context, scored // half))
    firsts = torch.linspace(0, len(tokens) - 1 - context, stretches).long()
    firsts = firsts[processes.rank :: processes.world]
    total, count, device = 0.0, 0, next(model.parameters()).device
    with evaluating(model):
        for some in firsts.split(_rows(model, context)) if len(firsts) else ():
            if starts is None:
                rows = tokens[some[:, None] + torch.arange(context + 1)].long()
                batch = {"input_ids": rows[:, :-1], "labels": rows[:, 1:]}
            else:
                found = [row_at(tokens, starts, first, context) for first in some.tolist()]
                batch = {key: torch.stack([row[key] for row in found]) for key in found[0]}
            labels = batch.pop("labels")[:, half:].flatten().to(device)
            batch = {key: value.to(device) for key, value in batch.items()}
            logits = model(**batch, use_cache=False).logits[:, half:].float()
            total += F.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum").item()
            count += int((labels != IGNORED).sum())
    total, count = processes.sum(torch.tensor([total, count], dtype=torch.float64)).tolist()
    return total / count


def windows(ids: Tensor, context: int, stride: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels [W, L], L <= context, that score every token of a text but the first, once.

    The first window scores all of its tokens, each later one begins `stride` tokens after it and scores what is new.
    The last ends with the text. So a scored token has context - stride tokens before it at least, where the text has.
    """
    if not 1 <= stride <= context:
        raise ValueError(f"stride must lie between 1 and the context, {context}; got {stride}")
    length = len(ids) - 1
    if length < 1:
        raise ValueError("a text of one token has nothing to score")
    size = min(context, length)
    begins = [*range(0, length - size, stride), length - size]
    rows = ids[torch.tensor(begins)[:, None] + torch.arange(size + 1)].long()
    inputs, labels = rows[:, :-1], rows[:, 1:].clone()
    for row, (before, begin) in enumerate(pairwise(begins), 1):
        labels[row, : before + size - begin] = IGNORED
    return inputs, labels


@dataclass
class Scores:
    """What `score` found. The nats are summed over all scored tokens.

    tokens:     scored: all of the texts, but for the first of each where the tokenizer has no token to begin with
    text_bytes: UTF-8 bytes of the texts
    nats:       -ln p of them, by model
    kl:         mean over tokens of KL(second model || first), in nats; None with one model
    agreement:  share of tokens for which both models' likeliest next token is the same
    """

    tokens: int
    text_bytes: int
    nats: list[float]
    kl: float | None = None
    agreement: float | None = None

    def perplexity(self, model: int = 0) -> float:
        """exp of the mean -ln p of a token: depends on the tokenizer."""
        return math.exp(min(self.nats[model] / self.tokens, 700))

    def bits_per_byte(self, model: int = 0) -> float:
        """-log2 p of the texts by their UTF-8 bytes: comparable between tokenizers."""
        return self.nats[model] / math.log(2) / self.text_bytes


def score(
    models: Sequence[Any],
    texts: Iterable[tuple[Tensor, int]],
    context: int,
    stride: int,
    advance: Callable[[int], None] = lambda tokens: None,
) -> Scores:
    """Score texts with one model, or with two of one vocabulary and compare them.

    texts:   the tokens [T] of each, from the one to begin with, and its UTF-8 bytes; each is scored by itself
    advance: is told how many tokens have been scored since
    """
    tokens = text_bytes = same = 0
    nats, kl = [0.0] * len(models), 0.0
    devices = [next(model.parameters()).device for model in models]
    with evaluating(*models):
        for ids, size in texts:
            text_bytes += size
            inputs, labels = windows(ids, context, stride)
            together = min(_rows(model, context) for model in models)
            for rows, targets in zip(inputs.split(together), labels.split(together), strict=True):
                at = targets != IGNORED
                outputs = [
                    model(input_ids=rows.to(device), use_cache=False).logits[at.to(device)]
                    for model, device in zip(models, devices, strict=True)
                ]
                targets = targets[at]
                for piece, *logits in zip(
                    targets.split(POSITIONS), *(y.split(POSITIONS) for y in outputs), strict=True
                ):
                    logs = [y.float().log_softmax(-1) for y in logits]
                    for index, log in enumerate(logs):
                        nats[index] -= log.gather(1, piece.to(log.device)[:, None]).sum(dtype=torch.float64).item()
                    if len(logs) == 2:
                        model, other = logs[0], logs[1].to(logs[0].device)
                        kl += F.kl_div(model, other, log_target=True, reduction="sum").item()
                        same += int((model.argmax(-1) == other.argmax(-1)).sum())
                tokens += len(targets)
                advance(len(targets))
    if not tokens:
        raise ValueError("there is no text to score")
    pair = len(models) == 2
    return Scores(tokens, text_bytes, nats, kl / tokens if pair else None, same / tokens if pair else None)


def _rows(model: Any, context: int) -> int:
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or 1
    return max(1, min(ROWS, LOGITS // (context * vocabulary)))
