"""The `torch` backend: int8 codes kept in memory, multiplied by torch's own int8 matmul.

Runs wherever torch runs. One byte a weight instead of a quarter, unpacked once when the layer is prepacked and
never per call. Where torch has no int8 matmul for a device, the same integers go through float32, exactly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference


def linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, activation_bits: int | None) -> Tensor:
    """reference.ternary_linear on x [M, K] and codes [N, K], with the integer product by torch's int8 matmul."""
    if activation_bits is None:
        return reference.float_linear(x, codes, scale, bias)
    q, s = reference.quantize_activation(x, activation_bits)
    return reference.rescale(int_matmul(q, codes), s, scale, bias, x.dtype)


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """reference.int_matmul by torch._int_mm, padded to the shapes it takes."""
    m, k = a.shape
    n = b.shape[0]
    if a.device.type not in ("cpu", "cuda"):  # elsewhere torch has no int8 matmul
        return reference.int_matmul(a, b)
    if a.is_cuda:  # cuBLASLt wants M > 16 and K, N multiples of 8
        rows, pad_k, pad_n = max(m, 17) - m, -k % 8, -n % 8
        a = F.pad(a, (0, pad_k, 0, rows)) if rows or pad_k else a
        b = F.pad(b, (0, pad_k, 0, pad_n)) if pad_k or pad_n else b
    elif k == 1:  # torch 2.13 on CPU returns wrong products for K = 1
        return a.int() * b.int().T
    return torch._int_mm(a, b.t())[:m, :n]
