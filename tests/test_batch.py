"""Continuous batching: fair to short requests, frugal with what is known, and sure to end each request once."""

import threading
import time
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bitnet.decode.batch import TAIL, Busy, Request, Scheduler
from bitnet.decode.sampling import Sampler, Sampling, Token

VOCABULARY = 50


class Counting:
    """A "model" whose next token is a function of all tokens before; it checks how it is used."""

    vocabulary, context, chunk = VOCABULARY, 1000, 256

    def __init__(self, slots: int, cuts: bool = True, marks: bool = False) -> None:
        self.slots, self.held, self.cuts, self.marks = slots, [[] for _ in range(slots)], cuts, marks
        self.marked: list[list[int]] = [[] for _ in range(slots)]
        self.steps: list[list[int]] = []  # tokens of each sequence in each step
        self.gate = threading.Semaphore(10**6)

    def length(self, slot: int) -> int:
        return len(self.held[slot])

    def mark(self, slot: int) -> None:
        assert self.marks
        self.marked[slot] = list(self.held[slot])

    def truncate(self, slot: int, tokens: int) -> None:
        self.copy(slot, slot, tokens)

    def copy(self, source: int, target: int, tokens: int) -> None:
        held, marked = self.held[source], self.marked[source]
        assert tokens <= len(held) if self.cuts else tokens in (0, len(marked), len(held))
        self.held[target] = held[:tokens] if self.cuts or tokens == len(held) else marked[:tokens]
        self.marked[target] = list(marked) if len(marked) <= tokens else []

    def extend(self, work: Sequence[tuple[int, Tensor]]) -> Tensor:
        self.gate.acquire()
        assert len({slot for slot, _ in work}) == len(work)
        self.steps.append([len(ids) for _, ids in work])
        rows = []
        for slot, ids in work:
            self.held[slot] += ids.tolist()
            assert len(self.held[slot]) <= self.context
            row = torch.zeros(VOCABULARY)
            row[following(self.held[slot])] = 1
            rows.append(row)
        return torch.stack(rows)


def following(tokens: list[int]) -> int:
    return (sum(i * t for i, t in enumerate(tokens, 1)) + 7) % VOCABULARY


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(following(tokens))
    return tokens[len(prompt) :]


class Asked:
    def __init__(self, prompt: list[int], count: int = 10, stop_ids: frozenset[int] = frozenset()) -> None:
        self.tokens: list[int] = []
        self.ends: list[str | Exception] = []
        self.done = threading.Event()
        sampler = Sampler(Sampling(temperature=0), prompt)
        self.request = Request(prompt, sampler, count, stop_ids, self.token, self.end)

    def token(self, token: Token) -> bool:
        self.tokens.append(token.id)
        return False

    def end(self, how: str | Exception) -> None:
        self.ends.append(how)
        self.done.set()

    def wait(self) -> "Asked":
        assert self.done.wait(20)
        time.sleep(0.01)
        assert len(self.ends) == 1
        return self


def test_every_request_gets_its_own_tokens() -> None:
    model = Counting(3)
    scheduler = Scheduler(model)
    asked = [Asked([i % 5, 3, i % 7] * (1 + i % 4), 5 + i) for i in range(20)]
    for each in asked:
        scheduler.submit(each.request)
    for i, each in enumerate(asked):
        assert each.wait().tokens == expected(each.request.prompt, 5 + i)
        assert each.ends == ["length"]
    assert max(map(len, model.steps)) == 3


def test_a_long_prompt_does_not_hold_up_the_others() -> None:
    model = Counting(2)
    model.gate = threading.Semaphore(0)
    scheduler = Scheduler(model)
    short, long = Asked([1, 2], 40), Asked([3] * 900, 2)
    scheduler.submit(short.request)
    scheduler.submit(long.request)
    model.gate.release(1000)
    assert long.wait().tokens == expected([3] * 900, 2)
    short.wait()
    mixed = [step for step in model.steps if len(step) == 2]
    assert all(254 <= max(step) <= 256 for step in mixed[:3])
    assert all(min(step) <= 2 for step in mixed[:3])


def test_what_is_known_of_a_prompt_is_not_computed_again() -> None:
    model = Counting(3)
    scheduler = Scheduler(model)
    prompt = list(range(40)) * 3
    first = Asked(prompt, 4)
    scheduler.submit(first.request)
    first.wait()
    model.steps.clear()
    again, longer = Asked(prompt, 4), Asked([*prompt, *expected(prompt, 3), 9], 4)
    scheduler.submit(again.request)
    again.wait()
    scheduler.submit(longer.request)
    assert longer.wait().tokens == expected(longer.request.prompt, 4)
    assert again.tokens == first.tokens
    assert (again.request.cached, longer.request.cached) == (119, 123)
    assert sum(map(sum, model.steps)) == 4 + 4
    twins = [Asked([7] * 300, 3) for _ in range(3)]
    model.steps.clear()
    scheduler.submit(*(twin.request for twin in twins))
    for twin in twins:
        assert twin.wait().tokens == expected([7] * 300, 3)
    assert sum(map(sum, model.steps)) < 2 * 300  # one of them computes the prompt, the others copy it


def test_what_cannot_be_cut_is_used_whole() -> None:
    """Of a recurrent model a slot's tokens are the beginning of a prompt, all of them, or of no use."""
    model = Counting(2, cuts=False)
    scheduler = Scheduler(model)
    prompt = list(range(40)) * 3
    for asked, cached in (
        (Asked(prompt, 4), 0),
        (Asked([*prompt, *expected(prompt, 3), 9], 4), 123),
        (Asked(prompt, 4), 0),
        (Asked([5], 4), 0),
    ):
        scheduler.submit(asked.request)
        assert asked.wait().tokens == expected(asked.request.prompt, 4)
        assert asked.request.cached == cached
    twins = [Asked([7] * 300, 3) for _ in range(3)]
    scheduler.submit(*(twin.request for twin in twins))
    for twin in twins:
        assert twin.wait().tokens == expected([7] * 300, 3)


def test_stops_cancels_and_failures_end_a_request_once() -> None:
    model = Counting(2)
    scheduler = Scheduler(model, queue=3)
    answer = expected([1, 2, 3], 10)
    stopped = Asked([1, 2, 3], 10, frozenset([answer[4]]))
    scheduler.submit(stopped.request)
    assert stopped.wait().tokens == answer[: answer.index(answer[4])]
    assert stopped.ends == ["stop"]
    model.gate = threading.Semaphore(0)
    running, waiting = [Asked([i], 500) for i in range(2)], [Asked([i, i], 5) for i in range(3)]
    scheduler.submit(*(each.request for each in running))
    while scheduler.counts() != (2, 0):
        time.sleep(0.001)
    scheduler.submit(*(each.request for each in waiting))
    with pytest.raises(Busy, match="3 requests are waiting already"):
        scheduler.submit(Asked([1]).request)
    scheduler.cancel(waiting[1].request)
    scheduler.cancel(running[0].request)
    model.gate.release(10**6)
    for each in (waiting[1], running[0]):
        assert each.wait().ends == ["cancelled"]
    assert waiting[0].wait().tokens == expected([0, 0], 5)
    running[1].wait()
    waiting[2].wait()

    def broken(work: object) -> Tensor:
        raise RuntimeError("no")

    good, model.extend = model.extend, broken  # type: ignore[method-assign]
    failed = Asked([4, 5])
    scheduler.submit(failed.request)
    assert isinstance(failed.wait().ends[0], RuntimeError)
    model.extend = good  # type: ignore[method-assign]
    after = Asked([4, 5], 3)
    scheduler.submit(after.request)
    assert after.wait().tokens == expected([4, 5], 3)


def test_the_context_ends_an_answer() -> None:
    scheduler = Scheduler(Counting(1))
    asked = Asked([1] * 990, 500)
    scheduler.submit(asked.request)
    assert len(asked.wait().tokens) == 11  # the last one needs no room
    assert asked.ends == ["length"]


def test_draining_finishes_what_there_is_and_takes_no_more() -> None:
    scheduler = Scheduler(Counting(1))
    asked = [Asked([i], 20) for i in range(3)]
    scheduler.submit(*(each.request for each in asked))
    scheduler.drain(20)
    assert [each.wait().ends for each in asked] == [["length"]] * 3
    with pytest.raises(Busy, match="shutting down"):
        scheduler.submit(Asked([1]).request)
    slow = Counting(1)
    slow.gate = threading.Semaphore(0)
    scheduler = Scheduler(slow)
    endless = Asked([1], 900)
    scheduler.submit(endless.request)
    threading.Timer(0.3, lambda: slow.gate.release(10**6)).start()
    scheduler.drain(0.1)
    assert endless.wait().ends[0] in ("cancelled", "length")


def test_a_conversation_goes_on_from_what_was_marked() -> None:
    """Though its template leaves out of an earlier answer what the model thought."""
    model = Counting(2, cuts=False, marks=True)
    scheduler = Scheduler(model)
    first = [*range(40), 3, 4, 5]
    talks = [
        (first, 0),
        ([*first[:-2], 9, 9, 9, *range(20)], len(first) - TAIL),  # goes on from the mark, and marks anew
        ([*first[:-2], 9, 9, 9, *range(30)], len(first) - 2 + 3 + 20 - TAIL),
        (first, 0),  # before the mark: of no use
        (first, len(first) - TAIL),
        ([8] * 5, 0),
    ]
    for prompt, cached in talks:
        asked = Asked(prompt, 6)
        scheduler.submit(asked.request)
        assert asked.wait().tokens == expected(prompt, 6)
        assert asked.request.cached == cached
    before = model.steps.copy()
    both = [Asked([*first, *[i] * 30], 6) for i in (1, 2)]
    scheduler.submit(*(each.request for each in both))
    for each in both:
        assert each.wait().tokens == expected(each.request.prompt, 6)
    assert len(model.steps) > len(before)


@pytest.mark.parametrize("family", ["llama", "qwen3_5", "lfm2"])
def test_marked_states_are_gone_back_to(family: str) -> None:
    from decode_models import packed, stepwise

    from bitnet.decode.native import NativeSequences
    from bitnet.kernels.cpu import library

    if isinstance(library.load(), str):
        pytest.skip("there is no native library")
    sequences = NativeSequences(packed(family, head="int8"), 3)
    ids = torch.randint(3, 200, (40,), generator=torch.Generator().manual_seed(0))
    whole = stepwise(sequences, ids)
    sequences.truncate(0, 0)
    sequences.extend([(0, ids[:20])])
    sequences.mark(0)
    sequences.extend([(0, ids[5:30])])
    sequences.copy(0, 1, 20)
    sequences.truncate(0, 20)
    for slot in (0, 1, 0):  # the last time from the same mark
        assert torch.equal(sequences.extend([(slot, ids[20:])])[0], whole[-1])
        sequences.truncate(slot, 20)
    sequences.copy(0, 2, 20)
    sequences.extend([(0, ids[:3])])
    sequences.truncate(0, 0)
    assert torch.equal(sequences.extend([(2, ids[20:])])[0], whole[-1])


def test_a_step_that_failed_leaves_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    from decode_models import packed

    from bitnet.decode.native import NativeSequences
    from bitnet.kernels.cpu import library, step

    if isinstance(library.load(), str):
        pytest.skip("there is no native library")
    sequences = NativeSequences(packed("qwen3_5", head="int8"), 1)
    ids = torch.randint(3, 200, (40,), generator=torch.Generator().manual_seed(0))
    whole = sequences.extend([(0, ids)])
    sequences.truncate(0, 0)
    original, calls = step.step, []

    def failing(*args: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(step, "MOST_TOKENS", 16)
        patch.setattr(step, "step", failing)
        with pytest.raises(MemoryError):
            sequences.extend([(0, ids)])
    sequences.truncate(0, 0)
    assert torch.equal(sequences.extend([(0, ids)]), whole)


@pytest.mark.parametrize("family", ["llama", "qwen3_5"])
def test_eager_sequences_are_those_of_the_model(family: str) -> None:
    from decode_models import packed

    import bitnet
    from bitnet.decode.eager import EagerSequences
    from bitnet.decode.native import NativeSequences
    from bitnet.kernels.cpu import library

    if isinstance(library.load(), str):
        pytest.skip("there is no native library")
    model = packed(family, head="int8")
    bitnet.native_decoding(model, None)
    eager, native = EagerSequences(model, 3), NativeSequences(model, 3, "float32")
    ids = torch.randint(3, 200, (40,), generator=torch.Generator().manual_seed(0))
    for sequences in (eager, native):
        sequences.extend([(0, ids[:20]), (2, ids[5:30])])
        sequences.copy(0, 1, 20)
        sequences.truncate(2, 0)
    assert (eager.cuts, native.cuts) == (False, family == "llama")
    work = [(1, ids[12:15]), (2, ids[12:13]), (0, ids[20:21])]
    found, wanted = eager.extend(work), native.extend(work)
    assert [eager.length(slot) for slot in range(3)] == [native.length(slot) for slot in range(3)] == [21, 23, 1]
    for sequences in [eager] if native.cuts else [eager, native]:
        for cut in (lambda s: s.truncate(0, 7), lambda s: s.copy(0, 1, 7), lambda s: s.truncate(0, 40)):
            with pytest.raises(ValueError, match=r"21 tokens"):
                cut(sequences)
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()
    with pytest.raises(ValueError, match="a sequence holds 512"):
        eager.extend([(0, ids.repeat(20))])


def test_a_model_without_a_limit_of_positions_has_none() -> None:
    from transformers import Gemma3Config, XLNetConfig, XLNetLMHeadModel

    from bitnet.decode.eager import EagerSequences
    from bitnet.decode.sequences import positions

    parts = {"text_config": {"max_position_embeddings": 123}}
    assert positions(Gemma3Config(**parts)) == 123  # of the language model in it
    config = XLNetConfig(vocab_size=30, d_model=16, n_layer=1, n_head=2, d_inner=16)
    assert config.max_position_embeddings == -1
    assert positions(config) is None
    sequences = EagerSequences(XLNetLMHeadModel(config).eval(), 1)
    assert sequences.extend([(0, torch.arange(9))]).shape == (1, 30)
