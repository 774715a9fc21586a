"""The Walsh-Hadamard transform of activations in Triton: the butterflies of reference.hadamard, in registers.

Hardware: run on an H100 (sm_90) and in Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_FEATURES = 4096  # of a program, or one block if that is longer


@triton.jit
def _hadamard(
    x, signs, y, blocks, features, factor,
    BLOCK: tl.constexpr, LOG: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`blocks` blocks of a contiguous x; features: K, after which the signs begin again."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (rows < blocks)[:, None]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if signs is not None:
        v *= tl.load(signs + at % features, mask=inside, other=1).to(tl.float32)
    for i in tl.static_range(LOG):
        a, b = tl.split(v.reshape(ROWS, BLOCK // (2 << i), 2, 1 << i).permute(0, 1, 3, 2))
        v = tl.join(a + b, a - b).permute(0, 1, 3, 2).reshape(ROWS, BLOCK)
    tl.store(y + at, (v * factor).to(y.dtype.element_ty), mask=inside)


def hadamard(x: Tensor, block: int, signs: Tensor | None = None) -> Tensor:
    """reference.hadamard of float32, bfloat16 or float16 x [..., K]; other floats are transformed in float32."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return hadamard(x.float(), block, signs).to(x.dtype)
    x = x.contiguous()
    y = torch.empty_like(x)
    blocks, rows = x.numel() // block, max(1, _FEATURES // block)
    if blocks:
        grid = (triton.cdiv(blocks, rows),)
        with torch.cuda.device_of(x):
            _hadamard[grid](
                x, signs, y, blocks, x.shape[-1], block**-0.5,
                BLOCK=block, LOG=block.bit_length() - 1, ROWS=rows, enable_fp_fusion=False,
            )  # fmt: skip
    return y
