"""Continuous batching: requests join and leave at every step, one worker thread runs the model.

A step gives each running sequence its next token, and what room is left goes to prompts, in chunks, so that a long one
does not hold up the others. A slot remembers its tokens: a request whose prompt begins alike takes over what was
computed. Where a sequence cannot be cut, as of a recurrent model, it is remembered shortly before a prompt's end: the
next prompt of a conversation begins alike up to there, though the last answer may read otherwise in it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from .sampling import Sampler, Token
from .sequences import Sequences

TAIL = 16  # tokens of a prompt after those that are remembered: a chat template ends with some for the answer alone


class Busy(Exception):
    """The queue is full, or the scheduler is stopping."""


@dataclass
class Request:
    """One sequence to generate. The functions are called on the worker's thread and must not block.

    on_token: gets each token, and says whether to stop; on_end: "stop", "length", "cancelled" or an exception, once
    """

    prompt: list[int]
    sampler: Sampler
    max_tokens: int
    stop_ids: frozenset[int]
    on_token: Callable[[Token], bool]
    on_end: Callable[[str | Exception], None]
    cancelled: bool = False
    arrived: float = field(default_factory=time.monotonic)
    generated: int = 0
    cached: int = 0  # tokens of the prompt that did not have to be computed


class _Slot:
    def __init__(self) -> None:
        self.tokens: list[int] = []  # what the sequence holds
        self.marked = 0  # so many of them can be gone back to
        self.request: Request | None = None
        self.pending: list[int] = []  # tokens to append: of the prompt, or the last one generated
        self.used = 0.0


class Scheduler:
    """Requests on one model; see the module. Raises Busy from submit() where more than `queue` wait."""

    def __init__(self, sequences: Sequences, queue: int = 64) -> None:
        self._sequences, self._queue = sequences, queue
        self._slots = [_Slot() for _ in range(sequences.slots)]
        self._waiting: deque[Request] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self.steps = 0
        self._thread = threading.Thread(target=self._run, name="bitnet-decode", daemon=True)
        self._thread.start()

    @property
    def context(self) -> int:
        """Tokens that a sequence may hold, prompt and answer together."""
        return self._sequences.context

    def submit(self, *requests: Request) -> None:
        """Queue requests, all or none."""
        with self._wake:
            if self._stopping:
                raise Busy("the server is shutting down")
            if len(self._waiting) + len(requests) > self._queue:
                raise Busy(f"{len(self._waiting)} requests are waiting already")
            self._waiting.extend(requests)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """Stop a request at the next step; it ends with "cancelled"."""
        with self._wake:
            request.cancelled = True
            self._wake.notify()

    def counts(self) -> tuple[int, int]:
        """How many requests run, and how many wait."""
        return sum(slot.request is not None for slot in self._slots), len(self._waiting)

    def drain(self, seconds: float) -> None:
        """Take no more requests, and wait for those there are, for so long; then cancel them."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join(seconds)
        if self._thread.is_alive():
            with self._wake:
                for request in [*self._waiting, *(slot.request for slot in self._slots)]:
                    if request is not None:
                        request.cancelled = True
            self._thread.join(10)

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not any(slot.request for slot in self._slots):
                    if self._stopping:
                        return
                    self._wake.wait()
            self._leave()
            self._admit()
            self._step()

    def _leave(self) -> None:
        """End what was cancelled."""
        for slot in self._slots:
            if slot.request is not None and slot.request.cancelled:
                self._end(slot, "cancelled")
        with self._wake:
            gone = [request for request in self._waiting if request.cancelled]
            for request in gone:
                self._waiting.remove(request)
        for request in gone:
            request.on_end("cancelled")

    def _admit(self) -> None:
        """Give waiting requests the free slots, each the one that knows most of its prompt."""
        while free := [slot for slot in self._slots if slot.request is None]:
            with self._wake:
                if not self._waiting:
                    return
                request = self._waiting[0]
                # the last token is always computed: its logits are what the answer starts from
                known = [(self._usable(slot, request.prompt[:-1]), slot) for slot in self._slots]
                running = [slot for slot in self._slots if slot.request and self._sequences.cuts]
                coming = max((_common(s.tokens + s.pending, request.prompt[:-1]) for s in running), default=0)
                if coming > max(count for count, _ in known) + 16:
                    return  # the same prompt is being computed: the next steps make it a copy
                self._waiting.popleft()
            slot = max(free, key=lambda s: (self._usable(s, request.prompt[:-1]), -s.used))
            most, source = max(known, key=lambda pair: pair[0])
            own = self._usable(slot, request.prompt[:-1])
            at = self._slots.index(slot)
            if most > own:
                self._sequences.copy(self._slots.index(source), at, most)
                own, slot.marked = most, source.marked
            else:
                self._sequences.truncate(at, own)
            if slot.marked > own:
                slot.marked = 0
            slot.tokens, slot.pending, slot.request = request.prompt[:own], request.prompt[own:], request
            request.cached = own

    def _usable(self, slot: _Slot, prompt: list[int]) -> int:
        """How many tokens of a prompt a slot has computed, and can be asked for."""
        common = _common(slot.tokens, prompt)
        if self._sequences.cuts or common == len(slot.tokens):
            return common
        return slot.marked if slot.marked <= common else 0

    def _step(self) -> None:
        work: list[tuple[_Slot, int]] = [(s, 1) for s in self._slots if s.request and len(s.pending) == 1]
        room = self._sequences.chunk
        prompts = [(s.request.arrived, i) for i, s in enumerate(self._slots) if s.request and len(s.pending) > 1]
        for slot in (self._slots[i] for _, i in sorted(prompts)):
            left = TAIL if self._sequences.marks and len(slot.pending) > TAIL else 0
            if count := min(room, len(slot.pending) - left):
                work.append((slot, count))
                room -= count
        if not work:
            return
        try:
            parts = [(self._slots.index(s), torch.tensor(s.pending[:n], dtype=torch.int64)) for s, n in work]
            logits = self._sequences.extend(parts)
        except Exception as error:
            for slot, _ in work:
                self._end(slot, error, keep=False)
            return
        self.steps += 1
        for (slot, count), row in zip(work, logits, strict=True):
            slot.tokens += slot.pending[:count]
            del slot.pending[:count]
            if self._sequences.marks and len(slot.pending) == TAIL:
                self._sequences.mark(self._slots.index(slot))
                slot.marked = len(slot.tokens)
            if not slot.pending:
                self._sample(slot, row)

    def _sample(self, slot: _Slot, logits: torch.Tensor) -> None:
        request = slot.request
        assert request is not None
        try:
            token, ended = request.sampler(logits)
            request.generated += 1
            if token.id in request.stop_ids:
                return self._end(slot, "stop")
            if request.on_token(token) or ended:
                return self._end(slot, "stop")
        except Exception as error:
            return self._end(slot, error)
        if request.generated >= request.max_tokens or len(slot.tokens) >= self._sequences.context:
            return self._end(slot, "length")
        slot.pending = [token.id]

    def _end(self, slot: _Slot, how: "str | Exception", keep: bool = True) -> None:
        request, slot.request, slot.pending, slot.used = slot.request, None, [], time.monotonic()
        if not keep:
            slot.tokens, slot.marked = [], 0
            self._sequences.truncate(self._slots.index(slot), 0)
        assert request is not None
        request.on_end(how)


def _common(a: list[int], b: list[int]) -> int:
    """How many tokens two sequences begin with alike."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    low, high = 0, n  # the first `low` are alike, the first `high` are not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if a[:middle] == b[:middle] else (low, middle)
    return low
