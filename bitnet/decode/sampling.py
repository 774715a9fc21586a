"""From logits to a token, the way one request asks for."""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor


class Grammar(Protocol):
    """What may follow: see bitnet/serving/grammar.py."""

    def mask(self, logits: Tensor) -> None:
        """Make -inf what must not come next."""

    def accept(self, token: int) -> bool:
        """Take a token; whether nothing may follow it."""


@dataclass(frozen=True)
class Sampling:
    """How one sequence is sampled; the defaults are the model's own distribution.

    temperature: 0 takes the likeliest token; min_p: least share of the likeliest's probability; presence and frequency
    penalties: subtracted once, and for each time that a token was generated; repetition_penalty: of tokens in the
    prompt, too, as transformers has it (arXiv 1909.05858, section 4.1); logit_bias: added; logprobs: how many to
    report, -1: none
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int = -1


@dataclass(frozen=True)
class Token:
    """One that was sampled. logprob and top: of the model's own distribution, if they were asked for."""

    id: int
    logprob: float = 0.0
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """The state of one sequence's sampling."""

    def __init__(self, options: Sampling, prompt: list[int], grammar: Grammar | None = None) -> None:
        self._options, self._grammar = options, grammar
        self._generator = torch.Generator()
        if options.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(options.seed & (1 << 63) - 1)
        self._counts: Counter[int] = Counter()
        self._seen = set(prompt) if options.repetition_penalty != 1 else set()

    def __call__(self, logits: Tensor) -> tuple[Token, bool]:
        """The next token after logits float32 [V], and whether the grammar ends with it."""
        options = self._options
        scores = self._penalized(logits.clone())
        if self._grammar is not None:
            self._grammar.mask(scores)
        token = int(scores.argmax()) if options.temperature == 0 else self._sample(scores / options.temperature)
        self._counts[token] += 1
        self._seen.add(token)
        ended = self._grammar is not None and self._grammar.accept(token)
        if options.logprobs < 0:
            return Token(token), ended
        logprobs = logits.log_softmax(0)
        values, ids = logprobs.topk(min(options.logprobs, len(logits)))
        return Token(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))), ended

    def _penalized(self, scores: Tensor) -> Tensor:
        options = self._options
        if options.repetition_penalty != 1 and self._seen:
            ids = torch.tensor(sorted(self._seen))
            old = scores[ids]
            scores[ids] = torch.where(old > 0, old / options.repetition_penalty, old * options.repetition_penalty)
        if self._counts and (options.presence_penalty or options.frequency_penalty):
            ids, counts = torch.tensor(list(self._counts)), torch.tensor(list(self._counts.values()))
            scores[ids] -= options.presence_penalty + options.frequency_penalty * counts
        if options.logit_bias:
            scores[torch.tensor(list(options.logit_bias))] += torch.tensor(list(options.logit_bias.values()))
        return scores

    def _sample(self, scores: Tensor) -> int:
        options = self._options
        ids: Tensor | None = None
        if options.top_k:
            scores, ids = scores.topk(min(options.top_k, len(scores)))
        probabilities = scores.softmax(0)
        if options.top_p < 1:
            # what is needed is nearly always among the first thousand, and sorting those is all that takes long
            for count in (1024, len(probabilities)):
                values, order = probabilities.topk(min(count, len(probabilities)))
                sums = values.cumsum(0)
                if sums[-1] >= options.top_p or len(values) == len(probabilities):
                    break
            kept = int((sums - values < options.top_p).sum())
            probabilities, order = values[: max(1, kept)], order[: max(1, kept)]
            ids = order if ids is None else ids[order]
        if options.min_p > 0:
            probabilities = probabilities.where(probabilities >= options.min_p * probabilities.max(), 0)
        # one random number, and where it falls; torch.multinomial draws one for each token of the vocabulary
        sums = probabilities.cumsum(0, dtype=torch.float64)
        if not math.isfinite(total := float(sums[-1])):
            raise ValueError("the model's logits are not numbers")
        fallen = total * torch.rand(1, generator=self._generator, dtype=torch.float64)
        chosen = int(torch.searchsorted(sums, fallen.clamp(max=math.nextafter(total, 0)), right=True))
        return chosen if ids is None else int(ids[chosen])
