"""Codes chosen one after the other within a block of columns: csrc/choose.h; convert/calibration has the definition."""

import ctypes

import torch
from torch import Tensor

from .library import check, isa_index, native


class _Columns(ctypes.Structure):  # as in csrc/bitnet_cpu.h
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("part", "corner", "scale", "codes", "moved")),
        *(
            (name, ctypes.c_int64)
            for name in ("n", "count", "part_stride", "scale_row", "scale_column", "codes_stride")
        ),
        *((name, ctypes.c_int32) for name in ("descend", "binary", "isa")),
    )


def choose(part: Tensor, corner: Tensor, scale: Tensor, codes: Tensor, binary: bool, descend: bool) -> Tensor:
    """gptq.feed, or with `descend` gptq.descend: fills codes, spoils part, returns what is moved on; float32 [N, J].

    corner: [J, J]; part and codes have contiguous rows, scale any strides
    """
    n, count = part.shape
    if part.stride(1) != 1 or codes.stride(1) != 1 or corner.shape != (count, count) or scale.shape != codes.shape:
        raise ValueError("choose: rows must be contiguous, and shapes must fit")
    corner, moved = corner.contiguous(), part.new_empty(n, count)
    tensors = (part, corner, scale, codes, moved)
    if any(tensor.dtype != torch.float32 or not tensor.is_cpu for tensor in tensors):
        raise ValueError("choose: tensors must be float32, on the CPU")
    sizes = (n, count, part.stride(0), *scale.stride(), codes.stride(0))
    columns = _Columns(*(tensor.data_ptr() for tensor in tensors), *sizes, descend, binary, isa_index())
    check(native().bitnet_choose(ctypes.byref(columns), torch.get_num_threads()))
    return moved
