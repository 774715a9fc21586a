"""Pages that need not be in memory: of files that are mapped into it, as a checkpoint's are, which count as memory once
they have been read, and of what was freed."""

import ctypes
import mmap
import sys

import torch
from torch import Tensor

_FILE, _SWAPPED, _PRESENT = 61, 62, 63  # bits of an entry of /proc/self/pagemap; _FILE: no copy was written to


def drop(tensor: Tensor) -> int:
    """Let go of the memory of a contiguous tensor that is a mapped file's, where it has not been written to.

    Its values stay what they are: who looks at one has its page read again, from the file or the system's cache of it.
    Returns how many bytes that may save, whole pages; 0 for a tensor in memory of its own, and where the system does
    not tell (only Linux does).
    """
    first, last = -(-tensor.data_ptr() // mmap.PAGESIZE), (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE
    if last <= first or not sys.platform.startswith("linux"):
        return 0
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as table:
            table.seek(8 * first)
            entries = torch.frombuffer(bytearray(table.read(8 * (last - first))), dtype=torch.int64)
    except (OSError, ValueError):  # no such file, or nothing in it
        return 0
    there = (entries >> _PRESENT | entries >> _SWAPPED) & 1
    if len(entries) < last - first or bool((there & ~(entries >> _FILE)).any()):
        return 0
    start, size = first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE
    failed = ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
    return 0 if failed else size


def trim() -> None:
    """Give the system what was freed, where the C library keeps it for later (glibc does): what a tokenizer of 128,256
    entries takes only while it is read is 80 MB, for example."""
    if sys.platform.startswith("linux") and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)
