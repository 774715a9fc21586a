"""The `torch` backend: int8 codes kept in memory, multiplied by torch's own operations.

Runs wherever torch runs. One byte a weight instead of a quarter, unpacked once when the layer is prepacked and
never per call. On CUDA the product is torch's int8 one, on a CPU the faster of that and float32 (products.py),
elsewhere float32: the same integers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import products, reference


def linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, activation_bits: int | None) -> Tensor:
    """reference.ternary_linear on x [M, K] and codes [N, K]."""
    if activation_bits is None:
        return reference.float_linear(x, codes, scale, bias)
    q, s = reference.quantize_activation(x, activation_bits)
    return reference.rescale(int_matmul(q, codes), s, scale, bias, x.dtype)


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """reference.int_matmul, by the fastest of torch's own products on this device."""
    if a.is_cuda:  # cuBLASLt wants M > 16 and K, N multiples of 8
        m, n = len(a), len(b)
        rows, pad_k, pad_n = max(m, 17) - m, -a.shape[1] % 8, -n % 8
        a = F.pad(a, (0, pad_k, 0, rows)) if rows or pad_k else a
        b = F.pad(b, (0, pad_k, 0, pad_n)) if pad_k or pad_n else b
        return torch._int_mm(a, b.t())[:m, :n]
    return products.int_matmul(a, b) if a.is_cpu else reference.int_matmul(a, b)
