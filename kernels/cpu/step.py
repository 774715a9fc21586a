"""The decoder blocks of a model over some tokens, in one native call: csrc/step.h.

The structures are those of csrc/bitnet_cpu.h, field by field.
"""

import ctypes
import math
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
PAIRS = {"halves": 0, "neighbours": 1, "neighbours to halves": 2}
PARTS = {"four layers": 0, "by key head": 1, "six layers": 2, "state space": 3}
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
        ("bias", _pointer),
        ("skip", _pointer),
        ("speed", _pointer),
        ("shift", _pointer),
        ("norm", Norm),
        ("norm_size", _int64),
        ("kernel", _int64),
        ("channels", _int64),
        ("key_heads", _int64),
        ("value_heads", _int64),
        ("key_dim", _int64),
        ("value_dim", _int64),
        ("most", ctypes.c_float),
        ("shortest", ctypes.c_float),
        ("parts", _int32),
    )


class Mixture(ctypes.Structure):
    _fields_ = (
        ("norm", Norm),
        ("router_norm", Norm),
        ("after", Norm),
        ("beside", Norm),
        ("router", _pointer),
        ("bias", _pointer),
        ("correction", _pointer),
        ("experts", _int64),
        ("chosen", _int64),
        ("groups", _int64),
        ("groups_chosen", _int64),
        ("group_best", _int64),
        ("inner", _int64),
        ("first", _pointer),
        ("second", _pointer),
        ("added", ctypes.c_float),
        ("least", ctypes.c_float),
        ("factor", ctypes.c_float),
        ("factors", _pointer),
        ("score", _int32),
        ("normalized", _int32),
        ("router_type", _int32),
        ("shared_gate", _int32),
    )


class HeadShape(ctypes.Structure):
    _fields_ = (("heads", _int64), ("kv_heads", _int64), ("key_dim", _int64), ("value_dim", _int64))


class CachePlace(ctypes.Structure):
    _fields_ = (("keys", _int64), ("values", _int64), ("scales", _int64), ("latents", _int64))


class Latent(ctypes.Structure):
    _fields_ = (
        ("query", Product),
        ("expand", Product),
        ("norm", Norm),
        ("rank", _int64),
        ("query_rank", _int64),
    )


class PerLayer(ctypes.Structure):
    _fields_ = (("gate", Product), ("projection", Product), ("after", Norm))


class Block(ctypes.Structure):
    _fields_ = (
        ("into", Product * 4),
        ("gate", Product * 2),
        ("out", Product),
        ("down", Product),
        ("query", Norm),
        ("key", Norm),
        ("value", Norm),
        ("after_attention", Norm),
        ("after_mlp", Norm),
        ("recurrence", ctypes.POINTER(Recurrence)),
        ("mixture", ctypes.POINTER(Mixture)),
        ("latent", ctypes.POINTER(Latent)),
        ("per_layer", ctypes.POINTER(PerLayer)),
        ("sinks", _pointer),
        ("heads", HeadShape),
        ("cache", CachePlace),
        ("state", _int64),
        ("inner", _int64),
        ("window", _int64),
        ("in_count", _int32),
        ("gate_count", _int32),
        ("rope", _int32),
        ("whole", _int32),
        ("parallel", _int32),
        ("turned", _int32),
        ("keys_only", _int32),
        ("reads", _int32),
        ("scalar", ctypes.c_float),
        ("bend", ctypes.c_float * 4),
    )


class Rope(ctypes.Structure):
    _fields_ = (("cosine", _pointer), ("sine", _pointer), ("half", _int64))


class Plan(ctypes.Structure):
    _fields_ = (
        ("blocks", _pointer),
        ("count", _int64),
        ("hidden", _int64),
        ("per_layer", _int64),
        ("positions", _int64),
        ("ropes", Rope * 2),
        ("position_scales", _pointer),
        ("final", Norm),
        ("scaling", ctypes.c_float),
        ("cap", ctypes.c_float),
        ("residual", ctypes.c_float),
        ("clip", ctypes.c_float),
        ("pairs", _int32),
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
        ("latents", _pointer),
        ("states", _pointer),
        ("windows", _pointer),
        ("capacity", _int64),
    )


class Cache(NamedTuple):
    """The shape of what a block with attention keeps: keys and values, and of latent attention what they come from.

    rank: features of a latent; turned: features of the common part of keys
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    rank: int = 0
    turned: int = 0

    def before(self, place: CachePlace) -> CachePlace:
        """Where the next block's is, if this one's is here."""
        keys, values = self.kv_heads * self.key_dim, self.kv_heads * self.value_dim
        return CachePlace(
            place.keys + keys, place.values + values, place.scales + self.kv_heads, place.latents + self.rank
        )


class Kept(NamedTuple):
    """Shapes of what a sequence keeps: caches of blocks with attention, and what is kept of recurrences.

    A short convolution has windows alone. transposed: transformers keeps states as [.., value_dim, key_dim]
    """

    caches: tuple[Cache, ...]
    states: tuple[int, ...] | None = None  # [blocks, value_heads, key_dim, value_dim]
    windows: tuple[int, ...] | None = None  # [blocks, kernel - 1, channels]
    transposed: bool = False


@dataclass
class BlockCache:
    """One block's part of a sequence's cache.

    keys: [kv_heads, capacity / 16, key_dim, 16]; values: [kv_heads, capacity, value_dim]; float32, float16 or int8, of
    which each position and head has a scale: float32 [kv_heads, capacity]; latents, float32 or float16 [capacity, rank]
    """

    keys: Tensor
    values: Tensor
    latents: Tensor
    turned: int
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    def floats(self, length: int) -> tuple[Tensor, Tensor]:
        """What transformers keeps of the first `length` positions, float32 [kv_heads, length, dim] each.

        That is keys and values, or if there are latents these, of one head, and the common part of keys.
        """
        keys = self.keys.transpose(-1, -2).flatten(1, 2)[:, :length].float()
        values = self.values[:, :length].float()
        if self.key_scales is not None and self.value_scales is not None:
            keys, values = keys * self.key_scales[:, :length, None], values * self.value_scales[:, :length, None]
        if self.latents.shape[-1]:
            return self.latents[None, :length].float(), keys[:1, :, keys.shape[-1] - self.turned :]
        return keys, values

    def copy_(self, other: "BlockCache", length: int) -> None:
        """Make the first `length` positions those of another."""
        runs = -(-length // RUN)
        self.keys[:, :runs], self.values[:, :length] = other.keys[:, :runs], other.values[:, :length]
        self.latents[:length] = other.latents[:length]
        for mine, its in ((self.key_scales, other.key_scales), (self.value_scales, other.value_scales)):
            if mine is not None and its is not None:
                mine[:, :length] = its[:, :length]


class KeyValues:
    """The cache of one sequence, as csrc/bitnet_cpu.h describes it; what is beyond its length is not initialized.

    keys, values, key_scales, value_scales, latents: those of all blocks; states, windows: float32, of recurrences
    """

    def __init__(self, kept: Kept, capacity: int, dtype: torch.dtype) -> None:
        """Room for that many positions, a multiple of 16."""
        self.kept, self.capacity, self.dtype = kept, capacity, dtype
        end = CachePlace()
        for cache in kept.caches:
            end = cache.before(end)
        self.keys, self.values = (mapped(n * capacity, dtype=dtype) for n in (end.keys, end.values))
        scales = end.scales * capacity if dtype == torch.int8 else 0
        self.key_scales, self.value_scales = (torch.empty(scales) if scales else None for _ in range(2))
        self.latents = torch.empty(end.latents * capacity, dtype=dtype if dtype.is_floating_point else torch.float16)
        self.states, self.windows = (None if s is None else torch.zeros(s) for s in (kept.states, kept.windows))

    def blocks(self) -> list[BlockCache]:
        """Of each block with attention its part."""
        at, room, parts = CachePlace(), self.capacity, []

        def part(tensor: Tensor, first: int, *shape: int) -> Tensor:
            return tensor.narrow(0, first * room, math.prod(shape)).view(shape)

        for cache in self.kept.caches:
            heads, keys, values, rank, turned = cache
            block = BlockCache(
                part(self.keys, at.keys, heads, room // RUN, keys, RUN),
                part(self.values, at.values, heads, room, values),
                part(self.latents, at.latents, room, rank),
                turned,
            )
            if self.key_scales is not None and self.value_scales is not None:
                block.key_scales = part(self.key_scales, at.scales, heads, room)
                block.value_scales = part(self.value_scales, at.scales, heads, room)
            parts.append(block)
            at = cache.before(at)
        return parts

    @property
    def recurrent(self) -> list[Tensor]:
        """What is there once, and not for each position."""
        return [tensor for tensor in (self.states, self.windows) if tensor is not None]

    def resized(self, capacity: int, length: int) -> "KeyValues":
        """A copy of the first `length` positions with room for another number of them; states stay those of all."""
        copy = KeyValues(self.kept, capacity, self.dtype)
        for tensor, mine in zip(copy.recurrent, self.recurrent, strict=True):
            tensor.copy_(mine)
        for part, mine_part in zip(copy.blocks(), self.blocks(), strict=True):
            part.copy_(mine_part, length)
        return copy

    def _described(self) -> _Sequence:
        rest = (self.key_scales, self.value_scales, self.latents, self.states, self.windows)
        pointers = (None if t is None else t.data_ptr() for t in rest)
        return _Sequence(self.keys.data_ptr(), self.values.data_ptr(), *pointers, self.capacity)


def step(
    plan: Plan,
    x: Tensor,
    caches: Sequence[KeyValues],
    sequence: Sequence[int],
    position: Sequence[int],
    per_layer: Tensor | None = None,
) -> None:
    """Run the blocks of a plan on x float32 [M, hidden], M <= MOST_TOKENS, in place.

    Token i stands at position[i] of caches[sequence[i]]; per_layer: what tokens' identities are to each block, float32
    [M, blocks, plan.per_layer]; see bitnet_step in csrc/bitnet_cpu.h. Raises ValueError for a token beyond a cache's
    room or the plan's positions.
    """
    m = len(x)
    rows, at = (_int64 * m)(*sequence), (_int64 * m)(*position)
    if max(position) >= plan.positions or any(p >= caches[s].capacity for s, p in zip(sequence, position, strict=True)):
        raise ValueError(f"a token at position {max(position)} has no room: there are {plan.positions} positions")
    identities = None if per_layer is None else per_layer.data_ptr()
    kept = (_Sequence * len(caches))(*(cache._described() for cache in caches))
    threads = torch.get_num_threads()
    check(native().bitnet_step(ctypes.byref(plan), x.data_ptr(), identities, m, kept, rows, at, threads))


def isa(name: str | None = None) -> int:
    """By which a plan knows an instruction set; by default the best."""
    return isa_index(isa=name)


def cache_type(name: str) -> int:
    """By which a plan knows the numbers of its caches."""
    return TYPES[CACHE_TYPES[name]]
