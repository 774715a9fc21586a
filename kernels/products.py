"""The exact product of int8 codes on a CPU: several ways to one result, of which the fastest here is taken.

What a CPU does well depends on its instruction set: without VNNI torch's int8 product runs at a fortieth of the rate
of its float32 product, with VNNI at nine times. Names do not tell (a hypervisor or ONEDNN_MAX_CPU_ISA may hide what the
CPU has), so the ways are timed once in a process, on a small product. All give the same bits.

    native   the weight's codes in the `cpu` backend's layout, made for this one call, and its kernels
    int8     torch._int_mm
    float32  reference.int_matmul: float32 products of spans of K whose sums are exact

Two faults of torch 2.13's int8 product on CPUs are known. For K = 1 it is wrong. Where oneDNN multiplies with AVX2
alone, sums of two products saturate at 16 bits: so it takes part only if it is exact for the largest codes.
"""

import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from . import reference
from .cpu import linear as cpu_linear
from .cpu.library import FOUR_BITS, TWO_BITS
from .proof import aside

_FEW = 8  # tokens; for fewer, getting at the weight takes longer than the product
_NATIVE_FEATURES = 1 << 16  # that the native kernels take whatever the codes are


def rates(m: int, native: bool) -> dict[str, float]:
    """GOP/s of each way on this machine, fastest first, for m tokens; native: whether the native kernels take part."""
    return _rates(m < _FEW, native, torch.get_num_threads())


def fastest(m: int, native: bool) -> str:
    """The first of rates."""
    return next(iter(rates(m, native)))


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """reference.int_matmul(a, b) on a CPU, by torch's own operations: int8 [M, K] and [N, K] to int32 [M, N]."""
    return _by_int8(a, b) if fastest(len(a), native=False) == "int8" else reference.int_matmul(a, b)


def linear(
    q: Tensor,
    s: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    wide: bool,
    native: bool,
) -> Tensor:
    """reference.rescale(reference.int_matmul(q, codes), s, scale, bias, dtype) on a CPU, by the fastest way;
    with scales of groups reference.group_linear.

    q: int8 or int16 [M, K]; s: float32 [M, 1]; codes: int8 [N, K], ternary, or if wide of 8 bits, with scales of groups
    of 4; scale: float32 [1] or [N], or float16 [N, G]
    native: whether the native kernels may take part
    """
    groups = scale.dtype == torch.float16
    native &= codes.shape[1] <= _NATIVE_FEATURES
    if native and (groups or q.dtype == torch.int16):  # torch has no product of these
        return _by_native(q, s, codes, scale, bias, dtype, wide)
    if groups:
        return reference.group_linear(q, s, codes, scale, bias, dtype)
    if q.dtype == torch.int16:
        return reference.rescale(reference.int_matmul(q, codes), s, scale, bias, dtype)
    if native and fastest(len(q), native) == "native":
        return _by_native(q, s, codes, scale, bias, dtype, wide)
    return reference.rescale(int_matmul(q, codes), s, scale, bias, dtype)


def _by_int8(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[1] == 1:
        return a.int() * b.int().T
    return torch._int_mm(a, b.t())


@lru_cache
def _int8_is_exact() -> bool:
    with aside():
        sizes = ((1, 7, 70), (5, 64, 256), (67, 33, 130))
        pairs = [
            (torch.full((m, k), x, dtype=torch.int8), torch.full((n, k), w, dtype=torch.int8))
            for m, n, k in sizes
            for x in (-128, 127)
            for w in (-127, 127)
        ]
        return all(torch.equal(_by_int8(a, b), reference.int_matmul(a, b)) for a, b in pairs)


def _by_native(
    q: Tensor, s: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype, wide: bool
) -> Tensor:
    groups = scale.dtype == torch.float16
    weight = cpu_linear.prepack_codes(codes, wide and not groups, FOUR_BITS if wide and groups else TWO_BITS)
    return cpu_linear.codes_linear(q, s, weight, scale, bias, len(codes), dtype)


@lru_cache
def _rates(few: bool, native: bool, threads: int) -> dict[str, float]:
    m, n, k = (1, 1024, 768) if few else (128, 256, 768)
    with aside():
        q, codes = torch.full((m, k), 3, dtype=torch.int8), torch.ones(n, k, dtype=torch.int8)
        s, scale = torch.ones(m, 1), torch.ones(1)
        ways: dict[str, Callable[[], Tensor]] = {
            "float32": lambda: reference.rescale(reference.int_matmul(q, codes), s, scale, None, torch.float32)
        }
        if _int8_is_exact():
            ways["int8"] = lambda: reference.rescale(_by_int8(q, codes), s, scale, None, torch.float32)
        if native:
            ways["native"] = lambda: _by_native(q, s, codes, scale, None, torch.float32, False)
        seconds = {name: _seconds(way) for name, way in ways.items()}
    return {name: 2e-9 * m * n * k / seconds[name] for name in sorted(seconds, key=lambda name: seconds[name])}


def _seconds(run: Callable[[], Tensor]) -> float:
    """The shortest of some calls: others wake threads, or lose a core for a while."""
    times: list[float] = []
    while len(times) < 3 or (len(times) < 20 and sum(times) < 0.1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)
