"""Tokens are drawn as often as the definitions say, and none that cannot be."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet.decode.sampling import Sampler, Sampling

LOGITS = torch.tensor([1.0, -0.5, 2.0, 0.0, -math.inf, 1.5, -3.0])
DRAWS = 3000


def softmax(logits: list[float]) -> list[float]:
    terms = [math.exp(x) for x in logits]
    return [x / sum(terms) for x in terms]


def kept(probabilities: list[float], tokens: list[int]) -> list[float]:
    total = sum(probabilities[t] for t in tokens)
    return [p / total if t in tokens else 0 for t, p in enumerate(probabilities)]


PLAIN = softmax(LOGITS.tolist())  # .17, .04, .46, .06, 0, .28, .003
WARM = softmax((LOGITS / 2).tolist())
CASES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "as the model says": ({}, PLAIN),
    "a temperature": ({"temperature": 2.0}, WARM),
    "the likeliest": ({"temperature": 0.0}, [0, 0, 1, 0, 0, 0, 0]),
    "top_k": ({"top_k": 3}, kept(PLAIN, [0, 2, 5])),
    "top_k beyond all": ({"top_k": 100}, PLAIN),
    "top_p within the second": ({"top_p": 0.5}, kept(PLAIN, [2, 5])),
    "top_p within the first": ({"top_p": 0.01}, kept(PLAIN, [2])),
    "top_p of what top_k leaves": ({"top_k": 3, "top_p": 0.7}, kept(PLAIN, [2, 5])),
    "min_p": ({"min_p": 0.2}, kept(PLAIN, [0, 2, 5])),
    "a bias": ({"logit_bias": {6: 5.0, 2: -1.0}}, softmax([1, -0.5, 1, 0, -math.inf, 1.5, 2])),
}


@pytest.mark.parametrize(("options", "expected"), CASES.values(), ids=CASES)
def test_tokens_come_as_often_as_they_should(options: dict[str, Any], expected: list[float]) -> None:
    sampler = Sampler(Sampling(**options, seed=3), [])
    counts = [0] * len(LOGITS)
    for _ in range(DRAWS):
        token, ended = sampler(LOGITS)
        assert not ended
        counts[token.id] += 1
    for count, p in zip(counts, expected, strict=True):
        assert abs(count - DRAWS * p) <= 4 * math.sqrt(DRAWS * p * (1 - p))  # nothing where p is 0


def test_penalties_are_the_definitions() -> None:
    prompt, logits = [1, 5], torch.tensor([0.1, 2.0, 0.3, 0.4, 0.5, -1.0])
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=1.6), prompt)
    assert [sampler(logits)[0].id for _ in range(3)] == [1, 1, 1]  # 2 / 1.6 still is the largest
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=5.0), prompt)
    assert [sampler(logits)[0].id for _ in range(5)] == [4, 1, 1, 1, 1]  # 0.5, then 2 / 5 against 0.5 / 5 and 0.4
    sampler = Sampler(Sampling(temperature=0, presence_penalty=1.55), prompt)
    assert [sampler(logits)[0].id for _ in range(4)] == [1, 4, 1, 1]  # 2, then 0.45 against 0.5, then 0.45
    sampler = Sampler(Sampling(temperature=0, frequency_penalty=0.78), prompt)
    assert [sampler(logits)[0].id for _ in range(4)] == [1, 1, 4, 1]  # 2, 1.22, 0.44 against 0.5, then 0.44 against 0.4


@pytest.mark.parametrize(("drawn", "token"), [(0.0, 1), (1 - 2**-53, 4), (1.0, 4)])
def test_what_is_impossible_is_never_drawn(drawn: float, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the ends, too, and where the sum rounds to more than 1."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, drawn, dtype=torch.float64))
    logits = torch.tensor([-math.inf, 0.3, -math.inf, 0.1, 0.2, -math.inf])
    assert Sampler(Sampling(), [])(logits)[0].id == token


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others() -> None:
    logits = torch.randn(20, 128_256, generator=torch.Generator().manual_seed(0))

    def drawn(seed: int) -> list[int]:
        sampler = Sampler(Sampling(seed=seed), [])
        return [sampler(row)[0].id for row in logits]

    assert drawn(1) == drawn(1)
    assert len(set(drawn(1)) & set(drawn(2))) < 3


@pytest.mark.parametrize("bad", [torch.full((5,), math.nan), torch.full((5,), -math.inf)])
def test_logits_that_are_no_numbers_are_an_error(bad: Tensor) -> None:
    with pytest.raises(ValueError, match="logits are not numbers"):
        Sampler(Sampling(), [])(bad)


def test_logprobs_are_the_models_own() -> None:
    token, _ = Sampler(Sampling(temperature=0, logprobs=2, logit_bias={6: 9.0}), [])(LOGITS)
    assert token.id == 6
    assert math.isclose(token.logprob, math.log(PLAIN[6]), rel_tol=1e-5)
    assert [t for t, _ in token.top] == [2, 5]
    assert math.isclose(token.top[1][1], math.log(PLAIN[5]), rel_tol=1e-5)
