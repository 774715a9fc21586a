"""What is done to activations and latent weights, in one pass over them: quantizers, and the rotation before."""

import torch
from torch import Tensor

from .library import TYPES, check, isa_index, native


def quantize_tokens(x: Tensor, activation_bits: int) -> tuple[Tensor, Tensor]:
    """reference.quantize_activation of float32, bfloat16 or float16 x [M, K].

    returns: int8 (16 bits: int16) [M, K] and float32 [M, 1]
    """
    if x.stride(1) != 1:
        x = x.contiguous()
    m, k = x.shape
    codes = torch.int16 if activation_bits == 16 else torch.int8
    q, s = x.new_empty(m, k, dtype=codes), x.new_empty(m, 1, dtype=torch.float32)
    args = (x.data_ptr(), TYPES[x.dtype], x.stride(0), m, k, activation_bits, q.data_ptr(), s.data_ptr(), isa_index())
    check(native().bitnet_quantize(*args, torch.get_num_threads()))
    return q, s


def hadamard(x: Tensor, block: int, signs: Tensor | None = None) -> Tensor:
    """reference.hadamard of float32, bfloat16 or float16 x [..., K]."""
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    signs = None if signs is None else signs.contiguous()
    y = x.new_empty(x.shape)
    where = (rows.data_ptr(), TYPES[x.dtype], rows.stride(0), len(rows), k, block)
    args = (*where, None if signs is None else signs.data_ptr(), block**-0.5, y.data_ptr(), isa_index())
    check(native().bitnet_hadamard(*args, torch.get_num_threads()))
    return y


def ternary_codes(weight: Tensor, inv: Tensor) -> Tensor:
    """clamp(round(weight * inv), -1, 1) as int8 [N, K], in one pass over a float32, bfloat16 or float16 weight.

    weight: contiguous [N, K]; inv: float32 [1] or [N, 1]
    """
    codes = weight.new_empty(weight.shape, dtype=torch.int8)
    n, k = weight.shape
    args = (
        weight.data_ptr(),
        TYPES[weight.dtype],
        n,
        k,
        inv.data_ptr(),
        inv.numel() > 1,
        codes.data_ptr(),
        isa_index(),
    )
    check(native().bitnet_ternary_codes(*args, torch.get_num_threads()))
    return codes


def pack_ternary(weight: Tensor, inv: Tensor) -> Tensor:
    """layout.pack_ternary(ternary_codes(weight, inv)), uint8 [ceil(N/4), K], in one pass."""
    n, k = weight.shape
    packed = weight.new_empty(-(-n // 4), k, dtype=torch.uint8)
    args = (
        weight.data_ptr(),
        TYPES[weight.dtype],
        n,
        k,
        inv.data_ptr(),
        inv.numel() > 1,
        packed.data_ptr(),
        isa_index(),
    )
    check(native().bitnet_pack_ternary(*args, torch.get_num_threads()))
    return packed


def magnitudes(weight: Tensor) -> Tensor:
    """The sum of |W| over each row of a contiguous float32, bfloat16 or float16 weight: float64 [N].

    The order of summation depends on nothing but K. Not finite where the row is not.
    """
    n, k = weight.shape
    sums = weight.new_empty(n, dtype=torch.float64)
    args = (weight.data_ptr(), TYPES[weight.dtype], n, k, sums.data_ptr(), isa_index())
    check(native().bitnet_magnitudes(*args, torch.get_num_threads()))
    return sums
