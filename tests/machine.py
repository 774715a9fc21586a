"""What this machine owes its tests."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

from bitnet.kernels import backends


def said(bits: float) -> AbstractContextManager[Any]:
    """Expects the warning for layers of 1.6 bits a weight where no kernel has them, and none elsewhere."""
    if bits != 1.6 or backends.BACKENDS["cpu-base3"].missing(torch.device("cpu"), 8) is None:
        return nullcontext()
    return pytest.warns(UserWarning, match=r"bits=1\.6: .*; weights keep the form of backend")
