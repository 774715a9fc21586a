"""The native step behind a transformers model: generate() and every forward with a cache run on it.

What transformers does around the blocks stays its own: sampling, beams, streaming, stop strings, left padding, assisted
generation, the output head. The base model's forward is stood in for, on that one model object, by NativeForward, which
runs the blocks of a call that it can compute and hands every other call to transformers: of a family, module or weight
that plan.py does not know, without a cache passed in, with gradients, with attentions or hidden states asked for, or
under torch.compile. A cache that was begun natively is then turned into transformers' own. Where it is given a cache,
transformers' own forward runs lean (lean.py). On a GPU, single tokens replay a CUDA graph of it (captured.py). Of a
model that also sees, this is its language model, which is told whether there is text alone.
"""

import contextlib
import inspect
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..kernels import observed
from .captured import Captured
from .families import as_text, known, text_part
from .lean import prepare, restore, running
from .native import Cached, Hidden, embed, run
from .pieces import Unplanned
from .plan import Plan
from .rooms import left_of

# transformers 5.24 renamed what forwards and outputs call their cache
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
_KNOWN = {"input_ids", "attention_mask", "position_ids", "cache_position", "use_cache", "inputs_embeds", "return_dict"}
_KNOWN |= {"logits_to_keep"}  # which Gemma 4's head tells its base model: that may give the other states, too


def native_decoding(model: Any, cache_type: str | None = "auto") -> None:
    """Decode a packed causal language model natively, as bitnet.load and from_pretrained do; see the module.

    cache_type: of keys and values: "auto" is "float16" on a CPU; "float32", which does not round them; "int8", with a
        scale a position and head; None leaves all to transformers again. On a GPU they have the model's dtype
    Raises ValueError with the reason for a model that the native step does not compute, or a CUDA graph.
    """
    base = model.base_model
    on_gpu = model.device.type == "cuda"
    if on_gpu and cache_type not in ("auto", None):
        raise ValueError(f"native_decoding: cache_type={cache_type!r} is for CPUs; on a GPU leave it out")
    if cache_type == "auto":
        cache_type = "float16"
    if cache_type is not None and (why := why_not(model, cache_type)):
        raise ValueError(f"native_decoding: {why}")
    for module in (base, text_part(base)):
        vars(module).pop("forward", None)
    restore(base)
    if cache_type is not None:
        _attach(base, cache_type)


def attach_decoding(model: nn.Module) -> None:
    """The same for a model just loaded, and lean decoding for one of a family that the step does not know; whether it
    fits shows when it runs."""
    base = getattr(model, "base_model", model)
    devices = {p.device.type for p in model.parameters()}
    if base is not model and hasattr(model, "generate") and len(devices) == 1 and devices <= {"cpu", "cuda"}:
        _attach(base, "float16")


def _attach(base: Any, cache_type: str) -> None:
    text = text_part(base)
    vars(text)["forward"] = native = NativeForward(text, cache_type)
    if text is not base:
        vars(base)["forward"] = Seeing(base, native)


def why_not(model: Any, cache_type: str = "float16") -> str | None:
    """None if a model runs on the native step (as far as can be told before it runs, on a GPU), else the reason."""
    base = text_part(model.base_model)
    if model.device.type == "cuda":
        return Captured(base, CACHE).why()
    try:
        Plan(base, cache_type)
    except Unplanned as why:
        return str(why)
    return None


class _Forward:
    """What stands in for a base model's forward."""

    def __init__(self, base: Any) -> None:
        self._base = base

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._original)

    @property
    def _original(self) -> Any:
        return type(self._base).forward.__get__(self._base)


class NativeForward(_Forward):
    """A base model's forward: see the module."""

    def __init__(self, base: Any, cache_type: str) -> None:
        super().__init__(base)
        self._cache_type = cache_type
        self._plan: Plan | None = None
        self._captured: Captured | None = None
        self._prepared = self._convolves = False  # to run lean
        self.told = _Told()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_plan": None, "_captured": None, "_prepared": False, "told": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, told=_Told())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get(CACHE)
        if type(cache) is not DynamicCache:
            return self._original(*args, **kwargs)
        named = dict(zip(("input_ids",), args, strict=False)) | kwargs  # of all families the first that is not named
        if self.told.text is not None:
            named = self.told.text
        plain = len(args) < 2 and self._is_plain(named)
        if plain and self._captures(named):
            if self._captured is None:
                self._captured = Captured(self._base, CACHE)
            output = self._captured.step(cache, named, lambda: self._original(*args, **kwargs))
            return self._original(*args, **kwargs) if output is None else output
        rows = _rows(cache)
        hidden = None
        if plain and known(self._base) and isinstance(ids := named.get("input_ids"), Tensor) and ids.is_cpu:
            with contextlib.suppress(Unplanned):
                hidden = self._run(cache, rows, named)
        if hidden is None:
            if rows is not None:
                rows.give_back(cache, self._base.dtype)
            ids = args[0] if args else kwargs.get("input_ids")
            given = kwargs.get("inputs_embeds") if ids is None else ids
            if _is_observed() or type(given) is not Tensor or not given.is_cpu:
                return self._original(*args, **kwargs)
            if not self._prepared:
                self._convolves, self._prepared = prepare(self._base), True
            with running(cache, given.shape[1], self._convolves):
                return self._original(*args, **kwargs)
        return Hidden(last_hidden_state=hidden, **{CACHE: cache})

    def _captures(self, kwargs: dict[str, Any]) -> bool:
        return any(getattr(kwargs.get(name), "is_cuda", False) for name in ("input_ids", "inputs_embeds"))

    def _is_plain(self, kwargs: dict[str, Any]) -> bool:
        """Whether a call asks for nothing but the last hidden states of tokens, and nobody looks on."""
        if self._base.training or _is_observed():
            return False
        config = self._base.config
        if config.output_attentions or config.output_hidden_states or kwargs.get("return_dict") is False:
            return False
        if getattr(config, "output_router_logits", False):
            return False
        others = [value for name, value in kwargs.items() if name not in _KNOWN and name != CACHE]
        return not any(isinstance(value, Tensor) or value for value in others)

    def _run(self, cache: Cache, rows: "_Rows | None", kwargs: dict[str, Any]) -> Tensor | None:
        """The last hidden states [B, T, hidden], or None for a call that is not the step's."""
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        if ids.ndim != 2 or kwargs.get("inputs_embeds") is not None:
            return None
        if rows is None and (cache.get_seq_length() > 0 or any(getattr(x, "record_past", False) for x in cache.layers)):
            return None  # begun by transformers, or to be cut where it cannot be
        if self._plan is None or not self._plan.current():
            self._plan = None  # should the next line raise
            self._plan = Plan(self._base, self._cache_type)
        plan = self._plan
        if rows is None:
            if plan.kept.windows is not None and not cache.layers:
                return None  # transformers could not go on with it
            rows = _Rows([Cached(plan) for _ in ids], cache.layers, plan)
        if len(rows.cached) != len(ids) or rows.cached[0].store.dtype != plan.cache_type:
            return None
        past = rows.seen.shape[1]
        if mask is None:
            new = torch.ones_like(ids, dtype=torch.bool)
            if not bool(rows.seen.all()):
                return None
        elif isinstance(mask, Tensor) and mask.shape == (len(ids), past + ids.shape[1]):
            mask = mask.bool()
            new = mask[:, past:]
            if not torch.equal(mask[:, :past], rows.seen):
                return None
        else:
            return None
        counts = new.sum(1).tolist()
        starts = torch.tensor([[cached.length] for cached in rows.cached])
        expected = (new.cumsum(1) - 1 + starts)[new]
        positions = kwargs.get("position_ids")
        if positions is not None:
            planes = positions if positions.ndim == 3 else [positions]  # of time, height and width, or the one there is
            if not all(torch.equal(plane.expand_as(new)[new], expected) for plane in planes):
                return None
        if (
            sum(counts) == 0
            or max(cached.length + n for cached, n in zip(rows.cached, counts, strict=True)) > plan.positions
        ):
            return None
        embedded, per_layer = embed(self._base, ids[new])
        work = [(cached, n) for cached, n in zip(rows.cached, counts, strict=True) if n]
        x = run(plan, embedded, work, per_layer).to(embedded.dtype)
        if not bool(new.all()):
            full = x.new_zeros(*new.shape, x.shape[-1])
            full[new] = x
            x = full
        rows.seen = torch.cat([rows.seen, new], dim=1)
        rows.take(cache)
        return x.view(*ids.shape, -1)


class _Told(threading.local):
    text: dict[str, Any] | None = None  # what the model around was called with, if it is text alone


class Seeing(_Forward):
    """The forward of a base model around a language model: transformers' own, but that one is told of text alone."""

    def __init__(self, base: Any, native: NativeForward) -> None:
        super().__init__(base)
        self._native = native

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        told = self._native.told
        named = dict(zip(("input_ids",), args, strict=False)) | kwargs
        if len(args) < 2 and not any(_is_given(name, value) for name, value in named.items() if name not in _KNOWN):
            told.text = {name: value for name, value in named.items() if name in _KNOWN}
            if isinstance(ids := named.get("input_ids"), Tensor):
                told.text["input_ids"] = as_text(self._base, ids)
        try:
            return self._original(*args, **kwargs)
        finally:
            told.text = None


def _is_given(name: str, value: Any) -> bool:
    """Whether an argument says more than that there is text."""
    if name == CACHE or name.startswith("vision_feature_"):  # how images would be seen
        return False
    if not isinstance(value, Tensor):
        return bool(value)
    return not name.endswith("token_type_ids") or bool(value.any())


def _is_observed() -> bool:
    autocast = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return torch.is_grad_enabled() or autocast or observed.is_observed()


class _Rows:
    """What a transformers cache holds when the native step fills it."""

    def __init__(self, cached: list[Cached], layers: list[Any], plan: Plan) -> None:
        self.cached, self.blocks = cached, plan.blocks
        self._attending, self._recurring = plan.attending, plan.recurring
        self.seen = torch.zeros(len(cached), 0, dtype=torch.bool)  # [B, columns]: which are tokens, not padding
        self._layers = layers  # transformers' own, empty

    def take(self, cache: Cache) -> None:
        """Stand in the cache, if that is not so yet."""
        if not (cache.layers and isinstance(cache.layers[0], _NativeLayer)):
            cache.layers = [_NativeLayer(self, first=i == 0) for i in range(self.blocks)]

    def give_back(self, cache: Cache, dtype: torch.dtype) -> None:
        """Turn the cache into what transformers' own forward would have filled, with zeros for padding."""
        blocks = [cached.store.blocks() for cached in self.cached]
        cache.layers = self._layers
        recurrents = [cached.store.recurrent for cached in self.cached]
        turned = self.cached[0].store.kept.transposed
        for place, i in enumerate(self._attending):
            rows = []
            for cached, parts, seen in zip(self.cached, blocks, self.seen, strict=True):
                held = parts[place].floats(cached.length)
                rows.append([t.new_zeros(len(t), len(seen), t.shape[-1]) for t in held])
                for full, part in zip(rows[-1], held, strict=True):
                    full[:, seen] = part
            keys, values = (torch.stack(both).to(dtype) for both in zip(*rows, strict=True))
            cache.update(keys, values, i)
        for place, i in enumerate(self._recurring):
            *states, window = (torch.stack([t[place] for t in kept]) for kept in zip(*recurrents, strict=True))
            cache.update_conv_state(window.mT.to(dtype), i, conv_kernel_size=window.shape[1] + 1)
            for state in states:
                cache.update_recurrent_state(state.mT.contiguous() if turned else state, i)

    def crop(self, columns: int) -> None:
        self.seen = self.seen[:, :columns]
        for cached, seen in zip(self.cached, self.seen, strict=True):
            cached.cut(int(seen.sum()))

    def select(self, indices: list[int]) -> None:
        """Make row i a copy of row indices[i]."""
        used: set[int] = set()
        chosen = []
        for index in indices:
            chosen.append(self.cached[index].copy() if index in used else self.cached[index])
            used.add(index)
        self.cached, self.seen = chosen, self.seen[indices]


class _NativeLayer(DynamicLayer):
    """A layer of a transformers cache whose keys and values the native step holds; the first acts for all."""

    def __init__(self, rows: _Rows, first: bool) -> None:
        super().__init__()
        self.rows, self.first, self.is_initialized = rows, first, True

    @property
    def is_croppable(self) -> bool:
        return not self.rows.cached[0].store.recurrent

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise RuntimeError("this cache belongs to the native step; pass it to the model that made it")

    def get_seq_length(self, *args: Any) -> int:
        return self.rows.seen.shape[1]

    def reset(self) -> None:
        if self.first:
            self.rows.crop(0)

    def crop(self, tokens_to_remove: int) -> None:
        if self.first:
            self.rows.crop(left_of(self.get_seq_length(), tokens_to_remove))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if self.first:
            self.rows.select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.first:
            self.rows.select([row for row in range(len(self.rows.cached)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.first:
            self.rows.select(torch.arange(len(self.rows.cached))[indices].tolist())


def _rows(cache: Cache) -> _Rows | None:
    first = cache.layers[0] if cache.layers else None
    return first.rows if isinstance(first, _NativeLayer) else None
