"""The scale of a low-bit matrix from those of its blocks, as files have them: as few as say the same."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitnet.kernels.reference import GROUP_SIZES


def coarsest(d: Any, block: int) -> Tensor:
    """One scale if all rows have the same: float32 [1]; one a row: [N]; else those of the largest groups of features
    that share one: float16 [N, G]. What is all zeros takes any: 1.

    d: float32 [N, blocks a row], finite and 0 where a block is all zeros; block: features
    Raises ValueError for negative ones, and for scales of groups that no float16 is.
    """
    if not ((d >= 0) & np.isfinite(d)).all():
        raise ValueError("has a scale that is negative, infinite or NaN; it is corrupt, so convert or fetch it again")
    row = d.max(axis=1)
    if not ((d == row[:, None]) | (d == 0)).all():
        return _groups(d, block)
    known = row[row > 0]
    if not len(known):
        return torch.ones(1)
    if (known == known[0]).all():
        return torch.from_numpy(known[:1].copy())
    return torch.from_numpy(np.where(row > 0, row, np.float32(1)))


def _groups(d: Any, block: int) -> Tensor:
    with np.errstate(over="ignore"):
        if not (d.astype(np.float16) == d).all():
            raise ValueError("has scales of groups that float16, in which packed layers keep them, does not hold")
    while block < GROUP_SIZES[-1] and d.shape[1] % 2 == 0:
        first, second = d[:, ::2], d[:, 1::2]
        if not ((first == second) | (first == 0) | (second == 0)).all():
            break
        d, block = np.maximum(first, second), 2 * block
    return torch.from_numpy(np.where(d > 0, d, np.float32(1))).half()
