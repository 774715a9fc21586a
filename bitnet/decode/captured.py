"""Single tokens on a GPU: transformers' own forward of a base model as a CUDA graph, behind generate() and the server.

It is for any model, not for known ones: of each, the first token shows whether what the graph computes is what
transformers computes. What differs, waits for the GPU in the middle (experts that are chosen on the CPU), has a state
or attention of other kinds, hooks, or adapters, is left to transformers, and why() says so.
"""

import inspect
import threading
import weakref
from collections.abc import Callable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from ..kept import Packed
from .families import text_part
from .lean import norms, prepare_norms
from .native import head, odd_head
from .rooms import RoomLayer, Rooms, Unfit, Windows
from .sequences import check_room, context_of

CLOSE = 0.1  # of the norm: sums in another order move hidden states by 0.01, a wrong mask or position by 0.3 and more
TRIES = 3  # a near-tie between experts may fall otherwise once


class Captured:
    """The steps of a base model: its own forward, in rooms.

    cache_name: what that forward calls its cache
    """

    def __init__(self, base: Any, cache_name: str) -> None:
        self._base, self._cache_name = base, cache_name
        self.has_positions = "position_ids" in inspect.signature(type(base).forward).parameters
        self._lock = threading.Lock()
        self._pool: list[tuple[Rooms, weakref.ref[RoomLayer]]] = []
        self.version = 0  # of the model: its modules and tensors
        self._begin()

    def _begin(self) -> None:
        self.version += 1
        self._unfit: str | None = None
        self._tries, self._prepared = 0, False
        self._output: Any = None  # the class of its forward's, once that has been seen to be right
        self._pool = []
        modules = list(self._base.modules())
        parts = [(m._parameters, m._buffers, m._modules) for m in modules]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._parts: list[dict[str, Any]] = list(chain.from_iterable(parts))
        self._found = list(chain.from_iterable(map(dict.values, self._parts)))
        packed = [t for m in modules if isinstance(m, Packed) for t in m._buffers.values() if t is not None]
        self._packed = [t for t in packed if not t.is_inference()]  # backends have copies of these
        self._versions = [t._version for t in self._packed]
        try:
            self.windows = Windows(self._base.config)
            if any(kind.__module__.startswith("peft.") for m in modules for kind in type(m).__mro__):
                raise Unfit("it has adapters, which may be switched")
            if len({p.device for p in self._base.parameters()}) > 1:
                raise Unfit("it is spread over devices")
        except Unfit as why:
            self._unfit = str(why)

    def why(self) -> str | None:
        """Why steps are left to transformers, or None as far as is known."""
        self._refresh()
        return "it has hooks" if any(self._hooks) else self._unfit

    def _refresh(self) -> None:
        found = chain.from_iterable(map(dict.values, self._parts))
        same = sum(map(len, self._parts)) == len(self._found) and all(map(is_, found, self._found))
        if not same or [t._version for t in self._packed] != self._versions:
            with self._lock:
                self._begin()

    def hidden(self, cache: Any, **inputs: Any) -> Tensor:
        """Last hidden states by transformers' forward."""
        options = {self._cache_name: cache, "use_cache": True}
        hidden: Tensor = type(self._base).forward(self._base, **options, **inputs).last_hidden_state
        return hidden

    def in_place(self, cache: Any, **inputs: Any) -> Tensor:
        """The same in rooms, with fewer kernels."""
        if not self._prepared:
            prepare_norms(self._base)
            self._prepared = True
        with norms():
            return self.hidden(cache, **inputs)

    def step(self, cache: DynamicCache, inputs: dict[str, Any], original: Callable[[], Any]) -> Any:
        """The output of a call with one token a row and a cache that has some, or None if it is not to be had here.

        inputs:   of the base model's forward, by name
        original: that call by transformers
        """
        if self.why() or not cache.layers:
            return None
        past = cache.get_seq_length()
        tokens = {name: inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None}
        if len(tokens) != 1 or past == 0 or (given := next(iter(tokens.values()))).shape[1] != 1:
            return None
        if (places := self._positions(inputs, past, len(given))) is None:
            return None
        mask = inputs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != (len(given), past + 1)):
            return None
        try:
            if (rooms := self._rooms(cache, past, len(given))) is None:
                return None
            rooms.stand(self.version)
            rooms.reserve(past + 1)
        except torch.OutOfMemoryError as error:
            self._unfit, self._pool = str(error).partition(".")[0], []
            return None
        rooms.columns.fill_(past)
        seen = rooms.padding[:, : past + 1]
        if mask is None:
            seen.zero_()
        else:
            torch.eq(mask, 0, out=seen)
        rooms.give(**tokens, **places)
        if self._output is None:
            output = original()  # the cache still is transformers'
            if why := _differs(rooms.step, output.last_hidden_state):
                self._tries += 1
                self._unfit = why if self._tries == TRIES else None
                return output
            self._output, hidden = type(output), output.last_hidden_state
        else:
            try:
                hidden = rooms.step().clone()
            except (Unfit, torch.OutOfMemoryError) as why:
                self._unfit = str(why).partition(".")[0]
                return None
        self._move(cache, rooms, past + 1)
        return self._output(last_hidden_state=hidden, **{self._cache_name: cache})

    def _rooms(self, cache: DynamicCache, past: int, rows: int) -> Rooms | None:
        """Rooms that hold what a cache does: its own if it has some."""
        layers, attends = cache.layers, self.windows.attends
        if len(layers) != len(attends) or any(getattr(layer, "record_past", False) for layer in layers):
            return None
        attending = [layer for layer, keeps in zip(layers, attends, strict=True) if keeps]
        rooms = attending[0].rooms if isinstance(attending[0], RoomLayer) else None
        if rooms is not None and rooms.rows == rows and rooms.are_of(layers, past):
            rooms.settle()
            return rooms
        for layer in attending:
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, RoomLayer) or not layer.is_initialized:
                return None
            if layer.get_seq_length() != past or len(layer.keys) != rows:
                return None
        states = [layer for layer, state in zip(layers, self.windows.recurs, strict=True) if state]
        if not all(type(layer) is LinearAttentionLayer and all(layer.has_previous_state.values()) for layer in states):
            return None
        with self._lock:
            free = [rooms for rooms, user in self._pool if user() is None]
            self._pool = [(rooms, user) for rooms, user in self._pool if user() is not None]
            found = next((rooms for rooms in free if rooms.rows == rows), None)
            found = found or Rooms(self.in_place, self.windows, layers, rows)
        found.take(layers, past)
        return found

    def _move(self, cache: DynamicCache, rooms: Rooms, length: int) -> None:
        """Have a cache be in rooms, with so many columns."""
        keeps = self.windows.attends
        attending = [layer for layer, attends in zip(cache.layers, keeps, strict=True) if attends]
        if not (isinstance(attending[0], RoomLayer) and attending[0].rooms is rooms):
            layers = [rooms.recurrent.get(i) or layer for i, layer in enumerate(cache.layers)]
            cache.layers = [RoomLayer(rooms, i, length) if keeps[i] else layer for i, layer in enumerate(layers)]
            with self._lock:
                user = next(layer for layer in cache.layers if isinstance(layer, RoomLayer))
                self._pool.append((rooms, weakref.ref(user)))
        for layer in cache.layers:
            if isinstance(layer, RoomLayer):
                layer.length = length

    def _positions(self, inputs: dict[str, Any], past: int, rows: int) -> dict[str, Tensor] | None:
        given = inputs.get("position_ids")
        if not self.has_positions:
            return {} if given is None else None
        if given is None:
            if inputs.get("attention_mask") is not None:
                return None  # some count what is not padding
            given = torch.full((rows, 1), past, device=self._base.device)
        return {"position_ids": given.expand(*given.shape[:-2], rows, 1)}


def _differs(step: Callable[[], Tensor], expected: Tensor) -> str | None:
    """Why a step is not to be used: what it raises, or that its hidden states are others."""
    try:
        found = step().float()
    except Exception as error:
        return str(error) if isinstance(error, Unfit) else f"{type(error).__name__}: {error}"
    distance = ((found - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)).max()
    return None if distance <= CLOSE else f"in place, hidden states come out {100 * distance.item():.0f} % different"


class RoomSequences:
    """bitnet.decode.sequences.Sequences in rooms, single tokens of all slots in one step."""

    chunk = 2048

    def __init__(self, model: Any, cache_name: str, slots: int = 8, context: int | None = None) -> None:
        """Raises Unfit, with the reason, for a model whose steps do not run so, as a few tokens show."""
        self._model, self.slots, self.vocabulary = model, slots, model.config.get_text_config().vocab_size
        base = text_part(model.base_model)
        self.context = context_of(model.config, context)
        self._captured = Captured(base, cache_name)
        if why := self._captured.why() or odd_head(model, model.config.get_text_config().hidden_size):
            raise Unfit(why)
        self.marks = any(self._captured.windows.recurs)
        self.cuts = not self.marks
        self._marked: dict[int, tuple[int, list[Tensor]]] = {}  # by slot, how long it was, and its states
        self._device = model.device
        try:
            why = self._begin(base.config)
        except Unfit:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
        if why:
            raise Unfit(why)

    @torch.inference_mode()
    def _begin(self, config: Any) -> str | None:
        """Begin, and say how the hidden states of a few tokens differ from transformers', if they do."""
        ids, last = torch.arange(1, 7, device=self._device)[None], self.slots - 1
        cache = DynamicCache(config=config)
        hidden = self._captured.hidden(cache, input_ids=ids[:, :5])
        self._rooms = Rooms(self._captured.in_place, self._captured.windows, cache.layers, self.slots)
        if self.marks:
            self._rooms.active = torch.zeros(self.slots, dtype=torch.bool, device=self._device)
        why = _differs(lambda: self._prompt(last, ids[0, :5]), hidden)
        hidden = self._captured.hidden(cache, input_ids=ids[:, 5:])
        try:
            found = self._singles([(last, 6)])
        except Unfit:  # not as a graph, then; all rows in one step still are faster
            self._rooms.captures = False
            found = self._singles([(last, 6)])
        self.truncate(last, 0)
        return why or _differs(lambda: found[:, None], hidden)

    @property
    def is_captured(self) -> bool:
        """Whether steps are CUDA graphs."""
        return self._rooms.captures

    def length(self, slot: int) -> int:
        """See Sequences."""
        return self._rooms.lengths[slot]

    def mark(self, slot: int) -> None:
        """See Sequences."""
        self._marked[slot] = self.length(slot), [state[slot].clone() for state in self._rooms.states]

    def truncate(self, slot: int, tokens: int) -> None:
        """See Sequences."""
        self._put(slot, self._states_at(slot, tokens))
        if slot in self._marked and tokens < self._marked[slot][0]:
            del self._marked[slot]
        self._rooms.lengths[slot] = tokens

    def copy(self, source: int, target: int, tokens: int) -> None:
        """See Sequences."""
        self._put(target, self._states_at(source, tokens))
        for both in self._rooms.held:
            for held in both:
                held[target, :, :tokens] = held[source, :, :tokens]
        self._marked.pop(target, None)
        if source in self._marked and self._marked[source][0] <= tokens:
            self._marked[target] = self._marked[source]
        self._rooms.lengths[target] = tokens

    def _states_at(self, slot: int, tokens: int) -> list[Tensor]:
        """The states of a slot's first tokens. Raises ValueError for those that are not to be had."""
        if tokens > self.length(slot):
            raise ValueError(f"a sequence of {self.length(slot)} tokens cannot be cut to {tokens}")
        now = [state[slot] for state in self._rooms.states]
        if tokens == 0:
            return [torch.zeros_like(state) for state in now]
        if slot in self._marked and tokens == self._marked[slot][0]:
            return self._marked[slot][1]
        if now and tokens < self.length(slot):
            raise ValueError(
                f"of a recurrent model's {self.length(slot)} tokens, the first {tokens} cannot be had alone"
            )
        return now

    def _put(self, slot: int, states: list[Tensor]) -> None:
        for state, new in zip(self._rooms.states, states, strict=True):
            state[slot] = new

    @torch.inference_mode()
    def extend(self, work: Sequence[tuple[int, Tensor]]) -> Tensor:
        """See Sequences."""
        check_room(self, work)
        self._captured.why()
        self._rooms.stand(self._captured.version)
        singles = [(slot, int(ids[0])) for slot, ids in work if len(ids) == 1]
        found = dict(zip((slot for slot, _ in singles), self._singles(singles), strict=True)) if singles else {}
        for slot, ids in work:
            if len(ids) > 1:
                found[slot] = self._prompt(slot, ids.to(self._device))[0, -1]
        return head(self._model, torch.stack([found[slot] for slot, _ in work])).cpu()

    def _prompt(self, slot: int, ids: Tensor) -> Tensor:
        past = self.length(slot)
        places = torch.arange(past, past + len(ids), device=self._device)[None]
        options = {"position_ids": places} if self._captured.has_positions else {}
        hidden = self._rooms.prompt(slot, input_ids=ids[None], **options)
        self._rooms.lengths[slot] += len(ids)
        return hidden

    def _singles(self, tokens: list[tuple[int, int]]) -> Tensor:
        """The last hidden states [len(tokens), hidden] of a token in each of these slots.

        Rows beside them, too, compute a token in the column after their last, which nothing sees.
        """
        rooms, at = self._rooms, [slot for slot, _ in tokens]
        rooms.reserve(max(rooms.lengths) + 1)
        ids = torch.zeros(self.slots, 1, dtype=torch.int64)
        for slot, token in tokens:
            ids[slot] = token
        rooms.columns.copy_(torch.tensor(rooms.lengths)[:, None])
        if rooms.active is not None:
            rooms.active.copy_(torch.tensor([slot in at for slot in range(self.slots)]))
        options = {"position_ids": rooms.columns} if self._captured.has_positions else {}
        rooms.give(input_ids=ids, **options)
        hidden = rooms.step(min(self.slots, 1 << max(at).bit_length()))[at, 0]
        for slot in at:
            rooms.lengths[slot] += 1
        return hidden
