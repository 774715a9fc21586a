"""Memory of prepacked weights."""

import mmap
import os
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor


class _Arena:
    """Bump allocation from large chunks backed by 2 MB pages, which make M = 1 about a quarter faster.

    Every tensor keeps its chunk's mapping alive, and the arena itself holds only a weak reference: a chunk is
    unmapped when the last tensor in it dies.
    """

    CHUNK, PAGE, ALIGN = 64 << 20, 2 << 20, 256

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: Callable[[], mmap.mmap | None] = lambda: None
        self._next = 0
        if hasattr(os, "register_at_fork"):  # another thread may hold the lock when this one forks
            os.register_at_fork(after_in_child=lambda: setattr(self, "_lock", threading.Lock()))

    def empty(self, *shape: int) -> Tensor:
        """An uninitialized uint8 tensor."""
        size = torch.Size(shape).numel()
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=torch.uint8, device="cpu")
        with self._lock:
            chunk = self._chunk()
            if chunk is None or self._next + size > len(chunk):
                # room to start on a page boundary: only aligned 2 MB become a large page
                chunk = mmap.mmap(-1, max(self.CHUNK, size) + self.PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                with suppress(OSError):  # a kernel built without large pages
                    chunk.madvise(mmap.MADV_HUGEPAGE)
                self._next = -torch.frombuffer(chunk, dtype=torch.uint8, count=1).data_ptr() % self.PAGE
                self._chunk = weakref.ref(chunk)
            tensor = torch.frombuffer(chunk, dtype=torch.uint8, count=size, offset=self._next).view(shape)
            self._next += -(-size // self.ALIGN) * self.ALIGN
        return tensor


arena = _Arena()


def mapped(*shape: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized tensor; if it is large in memory of its own, of 2 MB pages where there are such."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if size < 2 * _Arena.PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, size + _Arena.PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8, count=1).data_ptr() % _Arena.PAGE
    return torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=start).view(dtype).view(shape)
