"""The decoder blocks of a model over some tokens, in one native call: csrc/step.h.

The structures are those of csrc/bitnet_cpu.h, field by field.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .arena import mapped
from .library import TYPES, check, isa_index, native
from .linear import PreparedWeight

MOST_TOKENS = 256  # of one call
COLUMNS = 32  # features of a recurrence's values that are summed at once
RUN = 16  # positions of a cache that lie side by side; a head's features are a multiple of it
GATES = {"silu": 0, "relu2": 1, "gelu_tanh": 2, "gelu": 3, "relu": 4, "xielu": 5, "clamped_swiglu": 6}
PARTS = {"four layers": 0, "by key head": 1, "six layers": 2}
SCORES = {"softmax": 0, "sigmoid": 1, "softmax of chosen": 2}
CACHE_TYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}

_pointer, _int32, _int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class Norm(ctypes.Structure):
    _fields_ = (("weight", _pointer), ("bias", _pointer), ("eps", ctypes.c_float), ("centered", _int32))


class Product(ctypes.Structure):
    _fields_ = (
        ("norms", Norm * 2),
        ("signs", _pointer),
        ("hadamard", _int64),
        ("count", _int64),
        ("layers", ctypes.POINTER(PreparedWeight) * 6),
    )


class Recurrence(ctypes.Structure):
    _fields_ = (
        ("convolution", _pointer),
        ("speed", _pointer),
        ("shift", _pointer),
        ("norm", Norm),
        ("kernel", _int64),
        ("channels", _int64),
        ("key_heads", _int64),
        ("value_heads", _int64),
        ("key_dim", _int64),
        ("value_dim", _int64),
        ("most", ctypes.c_float),
        ("parts", _int32),
    )


class Mixture(ctypes.Structure):
    _fields_ = (
        ("norm", Norm),
        ("router", _pointer),
        ("bias", _pointer),
        ("correction", _pointer),
        ("experts", _int64),
        ("chosen", _int64),
        ("groups", _int64),
        ("groups_chosen", _int64),
        ("inner", _int64),
        ("first", _pointer),
        ("second", _pointer),
        ("added", ctypes.c_float),
        ("least", ctypes.c_float),
        ("factor", ctypes.c_float),
        ("score", _int32),
        ("normalized", _int32),
        ("router_type", _int32),
        ("shared_gate", _int32),
    )


class Block(ctypes.Structure):
    _fields_ = (
        ("into", Product * 4),
        ("gate", Product * 2),
        ("out", Product),
        ("down", Product),
        ("query", Norm),
        ("key", Norm),
        ("after_attention", Norm),
        ("after_mlp", Norm),
        ("recurrence", ctypes.POINTER(Recurrence)),
        ("mixture", ctypes.POINTER(Mixture)),
        ("sinks", _pointer),
        ("place", _int64),
        ("inner", _int64),
        ("window", _int64),
        ("in_count", _int32),
        ("gate_count", _int32),
        ("rope", _int32),
        ("whole", _int32),
        ("parallel", _int32),
        ("turned", _int32),
        ("shape", ctypes.c_float * 4),
    )


class Plan(ctypes.Structure):
    _fields_ = (
        ("blocks", _pointer),
        ("count", _int64),
        ("hidden", _int64),
        ("heads", _int64),
        ("kv_heads", _int64),
        ("head_dim", _int64),
        ("half", _int64),
        ("positions", _int64),
        ("ropes", _pointer * 2 * 2),
        ("position_scales", _pointer),
        ("final", Norm),
        ("scaling", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("residual", ctypes.c_float),
        ("clip", ctypes.c_float),
        ("interleaved", _int32),
        ("by_head", _int32),
        ("query_gate", _int32),
        ("gate", _int32),
        ("gated", _int32),
        ("cache_type", _int32),
        ("isa", _int32),
    )


class _Sequence(ctypes.Structure):
    _fields_ = (
        ("keys", _pointer),
        ("values", _pointer),
        ("key_scales", _pointer),
        ("value_scales", _pointer),
        ("states", _pointer),
        ("windows", _pointer),
        ("capacity", _int64),
    )


class Kept(NamedTuple):
    """Shapes of what a sequence keeps: keys and values of `blocks` blocks with attention, a recurrence's of others.

    A short convolution has windows alone.
    """

    blocks: int
    kv_heads: int
    head_dim: int
    states: tuple[int, ...] | None = None  # [blocks, value_heads, key_dim, value_dim]
    windows: tuple[int, ...] | None = None  # [blocks, kernel - 1, channels]


@dataclass
class KeyValues:
    """The cache of one sequence, as csrc/bitnet_cpu.h describes it; what is beyond its length is not initialized.

    keys: [blocks, kv_heads, capacity / 16, head_dim, 16]; values: [blocks, kv_heads, capacity, head_dim]; float32,
    float16 or int8, of which each position and head has a scale: float32 [blocks, kv_heads, capacity]; states and
    windows, float32: of a recurrence
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    states: Tensor | None = None
    windows: Tensor | None = None

    @staticmethod
    def empty(kept: Kept, capacity: int, dtype: torch.dtype) -> "KeyValues":
        """Room for that many positions, a multiple of 16."""
        cache = KeyValues._room(*kept[:3], capacity, dtype)
        cache.states, cache.windows = (None if s is None else torch.zeros(s) for s in (kept.states, kept.windows))
        return cache

    @staticmethod
    def _room(blocks: int, kv_heads: int, head_dim: int, capacity: int, dtype: torch.dtype) -> "KeyValues":
        keys = mapped(blocks, kv_heads, capacity // RUN, head_dim, RUN, dtype=dtype)
        values = mapped(blocks, kv_heads, capacity, head_dim, dtype=dtype)
        if dtype != torch.int8:
            return KeyValues(keys, values)
        return KeyValues(keys, values, *(torch.empty(blocks, kv_heads, capacity) for _ in range(2)))

    @property
    def capacity(self) -> int:
        return self.values.shape[2]

    @property
    def recurrent(self) -> list[Tensor]:
        """What is there once, and not for each position."""
        return [tensor for tensor in (self.states, self.windows) if tensor is not None]

    def resized(self, capacity: int, length: int) -> "KeyValues":
        """A copy of the first `length` positions with room for another number of them; states stay those of all."""
        blocks, kv_heads, _, head_dim = self.values.shape
        copy = KeyValues._room(blocks, kv_heads, head_dim, capacity, self.values.dtype)
        for name in ("states", "windows"):
            if (state := getattr(self, name)) is not None:
                setattr(copy, name, state.clone())
        runs = -(-length // RUN)
        copy.keys[:, :, :runs] = self.keys[:, :, :runs]
        copy.values[:, :, :length] = self.values[:, :, :length]
        for name in ("key_scales", "value_scales"):
            if (scales := getattr(self, name)) is not None:
                getattr(copy, name)[:, :, :length] = scales[:, :, :length]
        return copy

    def floats(self, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `length` positions, float32 [blocks, kv_heads, length, head_dim]."""
        keys = self.keys.transpose(-1, -2).flatten(2, 3)[:, :, :length].float()
        values = self.values[:, :, :length].float()
        if self.key_scales is not None and self.value_scales is not None:
            keys = keys * self.key_scales[:, :, :length, None]
            values = values * self.value_scales[:, :, :length, None]
        return keys, values

    def _described(self) -> _Sequence:
        rest = (self.key_scales, self.value_scales, self.states, self.windows)
        pointers = (None if t is None else t.data_ptr() for t in rest)
        return _Sequence(self.keys.data_ptr(), self.values.data_ptr(), *pointers, self.capacity)


def step(plan: Plan, x: Tensor, caches: Sequence[KeyValues], sequence: Sequence[int], position: Sequence[int]) -> None:
    """Run the blocks of a plan on x float32 [M, hidden], M <= MOST_TOKENS, in place.

    Token i stands at position[i] of caches[sequence[i]]; see bitnet_step in csrc/bitnet_cpu.h. Raises ValueError for a
    token beyond a cache's room or the plan's positions.
    """
    m = len(x)
    rows, at = (_int64 * m)(*sequence), (_int64 * m)(*position)
    if max(position) >= plan.positions or any(p >= caches[s].capacity for s, p in zip(sequence, position, strict=True)):
        raise ValueError(f"a token at position {max(position)} has no room: there are {plan.positions} positions")
    kept = (_Sequence * len(caches))(*(cache._described() for cache in caches))
    check(native().bitnet_step(ctypes.byref(plan), x.data_ptr(), m, kept, rows, at, torch.get_num_threads()))


def isa(name: str | None = None) -> int:
    """By which a plan knows an instruction set; by default the best."""
    return isa_index(isa=name)


def cache_type(name: str) -> int:
    """By which a plan knows the numbers of its caches."""
    return TYPES[CACHE_TYPES[name]]
