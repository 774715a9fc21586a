"""A few tokens through transformers' own forward, without most of its costs, where the native step does not run.

Of the time of a token on a CPU, torch's attention, the concatenation of keys and values, and norms of six operations
each take as long as all packed layers. In calls of transformers' own forward that are given a DynamicCache, `running`
has the cache's layers grow into room of their own (Growing) instead of being copied for each token, and for up to
MOST_TOKENS new tokens puts three more things in their places, in any architecture:

- transformers' attention registry has our function as "sdpa", which computes what it can natively and hands all else to
  the original,
- modules that prove to be an RMSNorm run in one native call (LeanNorm),
- convolutions of each channel by itself, in bfloat16 and float16, are a product and a sum (depthwise): where oneDNN
  lacks the dtype, torch calls a matrix product for each channel.

On a GPU, where a step is a graph (captured.py), `norms` has torch's one kernel for an RMSNorm run in place of eight.

Nothing is rounded that was not: keys and values stay in the model's dtype, sums are of float32. They have another order
than torch's, and a norm in bfloat16 is rounded once, where some models round it twice; a value may then round to the
next code, as in the native step. Everywhere else the modules and the registry do what they did.
"""

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels import reference
from ..kernels.cpu import library
from ..kernels.cpu.attention import attention, bind_rms_norm
from ..kernels.cpu.library import FLOATS
from .native import ROOM
from .pieces import eps_of

_NARROW = torch.bfloat16, torch.float16
MOST_TOKENS = 8  # beyond these torch's matrix products are as fast


class _Here(threading.local):
    running = norms = False


_here = _Here()


@contextlib.contextmanager
def running(cache: DynamicCache, tokens: int, convolves: bool = False) -> Iterator[None]:
    """Inside, a model's own forward, given the cache and so many tokens, runs lean in this thread; see the module.

    convolves: whether it has convolutions, what `prepare` said
    """
    for layer in cache.layers:
        if type(layer) is DynamicLayer:
            layer.__class__ = Growing
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = Growing
    before, _here.running = _here.running, tokens <= MOST_TOKENS
    try:
        with _Convolutions() if convolves and _here.running else contextlib.nullcontext():
            yield
    finally:
        _here.running = before


def prepare(base: nn.Module) -> bool:
    """Make a base model's forward one that can run lean; whether it has convolutions."""
    convolves = any(isinstance(module, nn.Conv1d) for module in base.modules())
    if isinstance(library.load(), str):
        return convolves
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if not isinstance(original, _Attention):
        ALL_ATTENTION_FUNCTIONS["sdpa"] = _Attention(original)
    prepare_norms(base)
    return convolves


def prepare_norms(base: nn.Module) -> None:
    """Make a base model's RMSNorms ones that can run lean."""
    for module in base.modules():
        if "forward" not in vars(module) and (kind := _rms_norm(module)) is not None:
            vars(module)["forward"] = LeanNorm(module, *kind)


@contextlib.contextmanager
def norms() -> Iterator[None]:
    """Inside, on a GPU, RMSNorms that were prepared are one kernel each in this thread."""
    before, _here.norms = _here.norms, True
    try:
        yield
    finally:
        _here.norms = before


def restore(base: nn.Module) -> None:
    """Undo it; the registry's function stays, and does nothing of its own."""
    for module in base.modules():
        if isinstance(vars(module).get("forward"), LeanNorm):
            del vars(module)["forward"]


class _Attention:
    """transformers' attention of torch, but native while a model runs lean."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if (
            not torch.compiler.is_compiling()
            and _here.running
            and (query.shape[2] == 1 or attention_mask is not None)
            and not dropout
            and not any(kwargs.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
        ):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            if (found := attention(query, key, value, attention_mask, scale)) is not None:
                return found, None
        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        result: tuple[Tensor, Tensor | None] = self._original(
            module, query, key, value, attention_mask, **options, **kwargs
        )
        return result


class _Convolutions(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv1d and (found := depthwise(*args, **kwargs)) is not None:
            return found
        return func(*args, **kwargs)


def depthwise(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    """torch.conv1d of input [B, C, T] by weight [C, 1, K], bfloat16 or float16, summed in float32; None for others."""
    padding = padding[0] if isinstance(padding, tuple) and len(padding) == 1 else padding
    ones = (1, (1,), [1])
    if not (weight.is_cpu and weight.dtype in _NARROW and input.dtype == weight.dtype and input.ndim == 3):
        return None
    if weight.shape[:2] != (groups, 1) or input.shape[1] != groups or not isinstance(padding, int):
        return None
    if stride not in ones or dilation not in ones or torch.is_grad_enabled():
        return None
    windows = nn.functional.pad(input, (padding, padding)).float().unfold(-1, weight.shape[-1], 1)
    y = (windows * weight.float()).sum(-1)
    return (y if bias is None else y + bias.float()[:, None]).to(input.dtype)


class Growing(DynamicLayer):
    """transformers' layer of a cache, whose keys and values are the beginning of larger tensors.

    What transformers does with them (beams, cropping, copies) it does with `keys` and `values`, as ever; when these no
    longer are where they grew, they get room anew.
    """

    keys: Any
    values: Any
    _rooms: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held = (self.keys, self.values) if self.get_seq_length() else (None, None)
        new = key_states, value_states
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or not all(map(_follows, new, held)):
            self._rooms = None, None
            result: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            return result
        key_room, self.keys = _append(self._rooms[0], held[0], key_states)
        value_room, self.values = _append(self._rooms[1], held[1], value_states)
        self._rooms = key_room, value_room
        return self.keys, self.values


def _follows(new: Tensor, held: Tensor | None) -> bool:
    """Whether transformers would put them together as they are."""
    if held is None:
        return new.ndim == 4
    same = new.dtype == held.dtype and new.device == held.device
    return same and new.shape[:2] == held.shape[:2] and new.shape[3:] == held.shape[3:]


def _append(room: Tensor | None, held: Tensor | None, new: Tensor) -> tuple[Tensor, Tensor]:
    """A room that begins with what is held and what is new, the same one if it can be, and that beginning of it."""
    past, tokens = 0 if held is None else held.shape[2], new.shape[2]
    if room is None or not _fits(room, held, past + tokens):
        room = new.new_empty(*new.shape[:2], max(ROOM, 1 << (past + tokens).bit_length()), new.shape[3])
        if held is not None:
            room.narrow(2, 0, past).copy_(held)
    room.narrow(2, past, tokens).copy_(new)
    return room, room.narrow(2, 0, past + tokens)


def _fits(room: Tensor, held: Tensor | None, length: int) -> bool:
    if room.shape[2] < length or (room.is_inference() and not torch.is_inference_mode_enabled()):
        return False  # there is no place behind what is held, or it could not be written to
    if held is None:
        return False
    return held.data_ptr() == room.data_ptr() and held.stride() == room.stride() and held.shape[0] == room.shape[0]


def _rms_norm(module: nn.Module) -> tuple[float, bool] | None:
    """eps of a module that is an RMSNorm, and whether it multiplies by 1 + weight; None for any other.

    Told by what it computes, with random weights, large and tiny inputs: names are not to be trusted.
    """
    weight, eps = module._parameters.get("weight"), eps_of(module)
    if "RMSNorm" not in type(module).__name__ or weight is None or weight.ndim != 1 or not isinstance(eps, float):
        return None
    if len(module._parameters) > 1 or module._buffers or module._modules or weight.is_meta:
        return None
    dice = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.inference_mode(False):
        probe = copy.copy(module)
        values = torch.randn(len(weight), generator=dice)  # on the CPU, wherever the module is
        probe._parameters = {"weight": nn.Parameter(values)}
        x = torch.randn(3, len(weight), generator=dice) * torch.tensor([[1.0], [eps**0.5], [100.0]])
        try:
            found = type(module).forward(probe, x)
        except Exception:  # it takes something else
            return None
        for plus_one in (False, True):
            expected = reference.rms_norm(x, values + plus_one, eps)
            if isinstance(found, Tensor) and found.shape == x.shape and torch.allclose(found, expected, 1e-5, 1e-6):
                return eps, plus_one
    return None


class LeanNorm:
    """The forward of a module that is an RMSNorm: native while a model runs lean, torch's kernel within `norms`."""

    def __init__(self, module: nn.Module, eps: float, plus_one: bool) -> None:
        self._module, self._eps, self._plus_one = module, eps, plus_one
        self._made: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_made": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not (_here.running or _here.norms) or len(args) != 1 or kwargs:
            return self._original(*args, **kwargs)
        x, weight = args[0], self._module._parameters["weight"]
        if _here.norms:
            if weight is None or self._plus_one or x.dtype != weight.dtype or x.shape[-1] != len(weight):
                return self._original(x)
            return nn.functional.rms_norm(x, weight.shape, weight, self._eps)
        if not (
            isinstance(x, Tensor)
            and weight is not None
            and x.is_cpu
            and x.dtype == weight.dtype
            and x.dtype in FLOATS
            and x.is_contiguous()
            and x.shape[-1] == len(weight)
        ):
            return self._original(x)
        version = -1 if weight.is_inference() else weight._version
        if self._made is None or self._made[0] is not weight or self._made[1] != version:
            values = (weight.detach().float() + self._plus_one).contiguous()
            self._made = weight, version, bind_rms_norm(values, self._eps)
        return self._made[2](x)

    @property
    def _original(self) -> Any:
        return type(self._module).forward.__get__(self._module)
