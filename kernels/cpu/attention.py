"""Attention and norms of a few tokens, on tensors as torch holds them: csrc/rows.h.

The structures are those of csrc/bitnet_cpu.h, field by field. What they compute is in kernels/reference.py; sums are of
float32, in another order than torch's.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from .library import FLOATS, TYPES, check, isa_index, native
from .step import RUN, Norm

_pointer, _int32, _int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Attention(ctypes.Structure):
    _fields_ = (
        ("q", _pointer),
        ("k", _pointer),
        ("v", _pointer),
        ("mask", _pointer),
        ("out", _pointer),
        ("batch", _int64),
        ("heads", _int64),
        ("kv_heads", _int64),
        ("queries", _int64),
        ("positions", _int64),
        ("dim", _int64),
        ("value_dim", _int64),
        ("q_strides", _int64 * 3),
        ("k_strides", _int64 * 3),
        ("v_strides", _int64 * 3),
        ("mask_strides", _int64 * 3),
        ("scaling", ctypes.c_float),
        ("type", _int32),
        ("isa", _int32),
    )


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, isa: str | None = None
) -> Tensor | None:
    """reference.attention, or None for shapes, types and strides that the kernel does not take.

    q: floating [B, H, T, D]; k: [B, G, P, D]; v: [B, G, P, E]; mask: bool, broadcast to [B, H, T, P], or None
    returns: [B, T, H, E], contiguous
    """
    batch, heads, queries, dim = q.shape
    _, kv_heads, positions, value_dim = v.shape
    if dim % RUN or value_dim % RUN or heads % kv_heads or not q.dtype == k.dtype == v.dtype or q.dtype not in FLOATS:
        return None
    if not (q.is_cpu and k.is_cpu and v.is_cpu):
        return None
    if k.shape != (batch, kv_heads, positions, dim) or v.shape[0] != batch or positions == 0:
        return None
    strides = [t.stride() for t in (q, k, v)]
    if mask is not None:
        if mask.dtype != torch.bool:
            return None
        mask = mask.expand(batch, heads, queries, positions)
        strides.append(mask.stride())
    if any(stride[3] != 1 for stride in strides):
        return None
    out = q.new_empty(batch, queries, heads, value_dim)
    call = _Attention(
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        None if mask is None else mask.data_ptr(),
        out.data_ptr(),
        batch,
        heads,
        kv_heads,
        queries,
        positions,
        dim,
        value_dim,
        *(stride[:3] for stride in strides),
    )
    call.scaling, call.type, call.isa = scaling, TYPES[q.dtype], isa_index(isa=isa)
    check(native().bitnet_attention(ctypes.byref(call), torch.get_num_threads()))
    return out


def bind_rms_norm(weight: Tensor, eps: float, isa: str | None = None) -> Callable[[Tensor], Tensor]:
    """reference.rms_norm as a function of contiguous x [..., K] in float32, bfloat16 or float16.

    weight: float32 [K], contiguous; it is kept alive
    """
    norm = Norm(weight.data_ptr(), None, eps, False)
    norm.alive = weight
    run, pointer, k, index = native().bitnet_norm, ctypes.byref(norm), len(weight), isa_index(isa=isa)

    def rms_norm(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        if status := run(pointer, x.data_ptr(), TYPES[x.dtype], x.numel() // k, k, y.data_ptr(), index):
            check(status)
        return y

    return rms_norm
