"""What this machine owes its tests, and how to make less of it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from bitnet.kernels import backends
from bitnet.kernels.cpu import library as cpu_library


def hold(isa: str) -> None:
    """Hold the native kernels to an instruction set, as on a CPU that has no better one, for the rest of the process.

    Raises ValueError if this CPU does not have it.
    """
    every = cpu_library.isas
    if isa not in every():
        raise ValueError(f"this CPU has {', '.join(every())}, but not {isa}")

    def isas(layout: int = cpu_library.TWO_BITS) -> list[str]:
        names = every(layout)
        return names[names.index(isa) :] if isa in names else []

    cpu_library.isas = isas


def said(bits: float) -> AbstractContextManager[Any]:
    """Expects the warning for layers of 1.6 bits a weight where no kernel has them, and none elsewhere."""
    if bits != 1.6 or backends.BACKENDS["cpu-base3"].missing(torch.device("cpu"), 8) is None:
        return nullcontext()
    return pytest.warns(UserWarning, match=r"weight_bits=1\.6: .*; weights keep the form of backend")
