"""Keys and values that stay where they are, so that a step of single tokens can be a CUDA graph.

From Python the thousand kernels of a token take ten times as long to launch as to run. Rooms hold a batch of sequences
at fixed addresses, with what a step reads beside them (tokens, positions, columns, what is padding), and run
transformers' own forward on those. A GPU captures it once for each number of rows and replays it for every token.
"""

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

ROOM = 256  # columns at first; they double
FILL = 100.0  # in columns not written yet: what a mask forgets shows
_ATTENDING, _RECURRENT = {"full_attention", "sliding_attention"}, {"linear_attention", "conv"}
_KEEPING_NOTHING = {"mlp", "moe"}


class Unfit(Exception):
    """Why a model's steps do not run in rooms."""


class Windows:
    """How far a model's layers see, and the masks that its forward wants.

    attends, recurs: of each layer, whether it keeps keys and values, or a state; one that shares another's does neither
    Raises Unfit for caches and attention of other kinds.
    """

    def __init__(self, config: Any) -> None:
        text = config.get_text_config(decoder=True)
        kinds = set(getattr(text, "layer_types", None) or ())
        if others := kinds - _ATTENDING - _RECURRENT - _KEEPING_NOTHING:
            raise Unfit(f"it has layers of type {', '.join(sorted(others))}")
        if (kind := text._attn_implementation) not in ("sdpa", "eager"):
            raise Unfit(f"its attention is {kind!r}")
        self._adds, self._stateful = kind == "eager", sorted(kinds & _RECURRENT)
        layers = DynamicCache(config=config).layers
        self.recurs = [type(layer) is LinearAttentionLayer for layer in layers]
        self.attends = [type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers]
        for layer, attends, recurs in zip(layers, self.attends, self.recurs, strict=True):
            if not attends and not recurs and type(layer).__name__ != "DummyLayer":
                raise Unfit(f"its cache has a {type(layer).__name__}")
        attending = [layer for layer, attends in zip(layers, self.attends, strict=True) if attends]
        self._seen = {getattr(layer, "sliding_window", None) for layer in attending}
        if not attending or len(self._seen - {None}) > 1:
            raise Unfit("its layers have windows of different lengths" if attending else "it has no attention")

    def masks(self, columns: Tensor, padding: Tensor, dtype: torch.dtype) -> Any:
        """What single tokens at columns [R, 1] see, where padding is bool [R, C]."""
        at = torch.arange(padding.shape[1], device=padding.device)
        masks: dict[str, Tensor | None] = dict.fromkeys(self._stateful)  # a single token is no padding
        for window in self._seen:
            mask = (at <= columns) & ~padding
            if window is not None:
                mask &= at > columns - window
            mask = mask[:, None, None]
            kind = "full_attention" if window is None else "sliding_attention"
            masks[kind] = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype) if self._adds else mask
        return masks if len(masks) > 1 else next(iter(masks.values()))


class Rooms:
    """Keys and values of some sequences, a row each, in columns; a column holds a token or padding.

    forward:  forward(cache, **inputs) -> last hidden states, transformers' own of a base model
    windows:  of that model
    like:     layers of a cache that has tokens, whose sizes and dtypes these have
    rows:     how many sequences
    captures: whether steps are CUDA graphs; elsewhere they simply run
    """

    def __init__(self, forward: Callable[..., Tensor], windows: Windows, like: list[Any], rows: int) -> None:
        self._forward, self._windows, self.rows, self.capacity = forward, windows, rows, 0
        self._like = [None if attends else layer for layer, attends in zip(like, windows.attends, strict=True)]
        first = next(layer for layer, attends in zip(like, windows.attends, strict=True) if attends)
        self.device, self.dtype = first.keys.device, first.keys.dtype
        self.captures = self.device.type == "cuda"
        self.recurrent = {i: copy.copy(like[i]) for i, recurs in enumerate(windows.recurs) if recurs}
        self.lengths = [0] * rows  # what prompts go on from
        self._row: int | None = None  # the one that a prompt is of
        self._single: tuple[Tensor, Tensor] | None = None  # rows and columns of single tokens
        with torch.inference_mode(False):
            self.held = [
                [t.new_empty(rows, t.shape[1], 0, t.shape[3]) for t in (layer.keys, layer.values)] if attends else []
                for layer, attends in zip(like, windows.attends, strict=True)
            ]
            for layer in self.recurrent.values():
                _change(layer, lambda t: t.new_zeros(rows, *t.shape[1:]))
            self.columns = torch.zeros(rows, 1, dtype=torch.int64, device=self.device)
            self._rows = torch.arange(rows, device=self.device)[:, None]
            self.padding = torch.zeros(rows, 0, dtype=torch.bool, device=self.device)
        self.active: Tensor | None = None  # bool [R]: which rows' states a step changes; None is all
        self._states = [found for layer in self.recurrent.values() for found in _states(layer)]
        self.states = [state for _, _, state in self._states]  # of a row each
        self._inputs: dict[str, Tensor] = {}
        self._graphs: dict[int, tuple[Any, Tensor]] = {}
        self._version = 0
        self.reserve(1)

    def reserve(self, columns: int) -> None:
        """Make room for so many columns, and one more."""
        if columns < self.capacity:
            return
        self.forget()
        past, capacity = self.capacity, max(ROOM, 1 << columns.bit_length())
        with torch.inference_mode(False):
            held = [[t.new_full((*t.shape[:2], capacity, t.shape[3]), FILL) for t in both] for both in self.held]
            padding = torch.zeros(self.rows, capacity, dtype=torch.bool, device=self.device)
        padding[:, :past] = self.padding
        for before, after in zip(self.held, held, strict=True):
            for old, new in zip(before, after, strict=True):
                new[:, :, :past] = old
        self.held, self.padding, self.capacity = held, padding, capacity

    def forget(self) -> None:
        """Capture anew from now on."""
        self._graphs.clear()

    def stand(self, version: int) -> None:
        """Say which version of the model runs now: of another, nothing captured holds."""
        if version != self._version:
            self.forget()
            self._version = version

    def take(self, layers: list[Any], length: int) -> None:
        """Copy what a cache of so many columns holds; its windows hold the last of them."""
        self.reserve(length)
        for i, (both, layer) in enumerate(zip(self.held, layers, strict=True)):
            if i in self.recurrent:
                for (_, _, mine), (_, _, new) in zip(_states(self.recurrent[i]), _states(layer), strict=True):
                    mine.copy_(new)
            elif both:
                for mine, new in zip(both, (layer.keys, layer.values), strict=True):
                    mine[:, :, length - new.shape[2] : length] = new

    def are_of(self, layers: list[Any], length: int) -> bool:
        """Whether these are the layers of a cache in these rooms, with so many columns."""
        for i, layer in enumerate(layers):
            if i in self.recurrent:
                if layer is not self.recurrent[i]:
                    return False
            elif self.held[i] and not (isinstance(layer, RoomLayer) and layer.rooms is self and layer.length == length):
                return False
        return True

    def settle(self) -> None:
        """Have states that were replaced, as for beams, where they were."""
        for states, n, fixed in self._states:
            if states[n] is not fixed:
                fixed.copy_(states[n])
                states[n] = fixed

    def write(self, layer: int, new: tuple[Tensor, Tensor], row: int | None, past: int) -> tuple[Tensor, Tensor]:
        """Put keys and values [R, H, T, D] of all rows or one behind so many columns, and return all up to them."""
        to = past + new[0].shape[2]
        self.reserve(to)
        first, last = (0, self.rows) if row is None else (row, row + 1)
        keys, values = self.held[layer]
        keys[first:last, :, past:to], values[first:last, :, past:to] = new
        return keys[first:last, :, :to], values[first:last, :, :to]

    def give(self, **inputs: Tensor) -> None:
        """The inputs of the next step, where it reads them; of others than before it is captured anew."""
        if {name: t.shape for name, t in inputs.items()} != {name: t.shape for name, t in self._inputs.items()}:
            self.forget()
            with torch.inference_mode(False):
                self._inputs = {name: torch.empty_like(t, device=self.device) for name, t in inputs.items()}
        for name, tensor in inputs.items():
            self._inputs[name].copy_(tensor)

    def step(self, rows: int | None = None) -> Tensor:
        """The last hidden states [R, 1, hidden] of one token in each of the first rows; valid until the next step.

        Raises Unfit where it cannot be captured.
        """
        rows = self.rows if rows is None else rows
        if not self.captures:
            return self._run(rows)
        if rows not in self._graphs:
            self._graphs[rows] = self._capture(rows)
        graph, hidden = self._graphs[rows]
        graph.replay()
        return hidden

    def prompt(self, row: int, **inputs: Tensor) -> Tensor:
        """The last hidden states [1, T, hidden] of tokens that go on a row."""
        self._row = row
        try:
            return self._forward(self._cache(row, row + 1), **inputs)
        finally:
            self._row = None

    def _run(self, rows: int) -> Tensor:
        columns = self.columns[:rows]
        self._single = self._rows[:rows], columns
        before = [] if self.active is None else [state[:rows].clone() for state in self.states]
        try:
            mask = self._windows.masks(columns, self.padding[:rows], self.dtype)
            inputs = {
                name: t[..., :rows, :] if name == "position_ids" else t[:rows] for name, t in self._inputs.items()
            }
            return self._forward(self._cache(0, rows), attention_mask=mask, **inputs)
        finally:
            self._single = None
            for state, was in zip(self.states, before, strict=bool(before)):
                changes = self.active[:rows].view(-1, *[1] * (state.ndim - 1))  # type: ignore[index]
                state[:rows] = torch.where(changes, state[:rows], was)

    def _cache(self, first: int, last: int) -> DynamicCache:
        """What the forward of these rows writes to."""
        cache = DynamicCache()
        for i in range(len(self.held)):
            layer: Any = _Within(self, i) if self.held[i] else self._like[i]
            if i in self.recurrent:
                layer = copy.copy(self.recurrent[i])
                _change(layer, lambda t: t[first:last])
            cache.layers.append(layer)
        return cache

    def _capture(self, rows: int) -> tuple[Any, Tensor]:
        with torch.cuda.device(self.device):
            current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                self._rehearse(rows)
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                hidden = self._run(rows)
        return graph, hidden

    def _rehearse(self, rows: int) -> None:
        """Have kernels compiled and proven; Unfit if something waits. States are as before, keys are written again."""
        before = [state.clone() for state in self.states]
        try:
            self._run(rows)
            with _synchronizing_raises():
                self._run(rows)
        finally:
            for state, was in zip(self.states, before, strict=True):
                state.copy_(was)


def _change(layer: LinearAttentionLayer, change: Callable[[Tensor], Tensor]) -> None:
    """Give a recurrent layer other tensors, made of its own, in dictionaries of its own."""
    for name in ("conv_states", "recurrent_states"):
        states = getattr(layer, name)
        setattr(layer, name, {n: None if tensor is None else change(tensor) for n, tensor in states.items()})


def _states(layer: LinearAttentionLayer) -> list[tuple[dict[int, Any], int, Tensor]]:
    """The tensors of a recurrent layer, and where it has each."""
    both = (layer.conv_states, layer.recurrent_states)
    return [(states, n, tensor) for states in both for n, tensor in states.items() if tensor is not None]


@contextlib.contextmanager
def _synchronizing_raises() -> Iterator[None]:
    """A capture that fails leaves torch's allocator unable to give memory back, so it is found out before.

    The mode is the process's: for so long, what waits in other threads raises, too.
    """
    mode = torch.cuda.get_sync_debug_mode()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this is a prototype
            torch.cuda.set_sync_debug_mode("error")
        yield
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        raise Unfit("its forward waits for the GPU") from None
    finally:
        torch.cuda.set_sync_debug_mode(mode)


class _Within(DynamicLayer):
    """A layer of rooms as a forward sees it that they run: it writes where they say."""

    def __init__(self, rooms: Rooms, index: int) -> None:
        self._rooms, self._index, self.is_initialized = rooms, index, True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rooms = self._rooms
        if rooms._single is None:
            return rooms.write(self._index, (key_states, value_states), rooms._row, self.get_seq_length())
        rows, columns = rooms._single
        keys, values = rooms.held[self._index]
        keys[rows, :, columns] = key_states.transpose(1, 2)
        values[rows, :, columns] = value_states.transpose(1, 2)
        return keys[: len(rows)], values[: len(rows)]

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self._rooms._row is None else self._rooms.lengths[self._rooms._row]


class RoomLayer(DynamicLayer):
    """A layer of a user's cache whose keys and values are in rooms.

    What transformers does with it that rooms do not do makes it a DynamicLayer of tensors of its own.
    """

    def __init__(self, rooms: Rooms, index: int, length: int) -> None:
        self.rooms, self.index, self.length = rooms, index, length
        self.is_initialized, self.device, self.dtype = True, rooms.device, rooms.dtype

    @property
    def keys(self) -> Tensor:
        return self.rooms.held[self.index][0][:, :, : self.length]

    @keys.setter
    def keys(self, value: Any) -> None:
        self._leave(value, self.values.clone())

    @property
    def values(self) -> Tensor:
        return self.rooms.held[self.index][1][:, :, : self.length]

    @values.setter
    def values(self, value: Any) -> None:
        self._leave(self.keys.clone(), value)

    def _leave(self, keys: Any, values: Any) -> None:
        self.__class__ = DynamicLayer
        self.__dict__ = vars(_plain(keys, values))

    def __reduce__(self) -> Any:
        return _plain, (self.keys.clone(), self.values.clone())

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            self._leave(self.keys.clone(), self.values.clone())
            return self.update(key_states, value_states, *args, **kwargs)
        past, self.length = self.length, self.length + key_states.shape[2]
        return self.rooms.write(self.index, (key_states, value_states), None, past)

    def get_seq_length(self, *args: Any) -> int:
        return self.length

    def reset(self) -> None:
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        self.length = left_of(self.length, tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for held in (self.keys, self.values):
            held.copy_(held.index_select(0, beam_idx.to(held.device)))


def left_of(columns: int, tokens_to_remove: int) -> int:
    """How many columns a cache's crop leaves; before transformers 5.24 a positive number is what is left."""
    left = columns + tokens_to_remove if tokens_to_remove <= 0 else min(tokens_to_remove, columns)
    return max(0, left)


def _plain(keys: Any, values: Any) -> DynamicLayer:
    layer = DynamicLayer()
    if isinstance(keys, Tensor):
        layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
    return layer
