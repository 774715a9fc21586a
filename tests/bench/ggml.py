"""llama.cpp's matrix products, through the libggml that the PyPI package llama-cpp-python builds; for bench_cpu.py.

ggml's own C API on its own tensors: no llama.cpp model, and no cost but ggml's. W is its [N, K] (ne = K, N), x float32.
"""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_bool, c_char, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

TYPES = {"TQ2_0": 35, "TQ1_0": 34, "Q4_0": 2, "Q1_0": 41, "Q2_0": 42}  # enum ggml_type


class _InitParams(Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Plan(Structure):  # struct ggml_cplan
    _fields_ = (
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    )


class _PoolParams(Structure):  # struct ggml_threadpool_params; GGML_MAX_N_THREADS is 512
    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


@lru_cache(1)
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    try:
        folder = Path(str(metadata.distribution("llama-cpp-python").locate_file("llama_cpp/lib")))
        base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
    except (metadata.PackageNotFoundError, OSError):
        return None
    for name, result, arguments in (
        ("ggml_init", c_void_p, [_InitParams]),
        ("ggml_free", None, [c_void_p]),
        ("ggml_new_tensor_2d", c_void_p, [c_void_p, c_int, c_int64, c_int64]),
        ("ggml_mul_mat", c_void_p, [c_void_p, c_void_p, c_void_p]),
        ("ggml_new_graph", c_void_p, [c_void_p]),
        ("ggml_build_forward_expand", None, [c_void_p, c_void_p]),
        ("ggml_get_data", c_void_p, [c_void_p]),
        ("ggml_row_size", c_size_t, [c_int, c_int64]),
        ("ggml_quantize_chunk", c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
        ("ggml_threadpool_params_default", _PoolParams, [c_int]),
    ):
        function = getattr(base, name)
        function.restype, function.argtypes = result, arguments
    cpu.ggml_graph_plan.restype, cpu.ggml_graph_plan.argtypes = _Plan, [c_void_p, c_int, c_void_p]
    cpu.ggml_graph_compute.argtypes = [c_void_p, POINTER(_Plan)]
    cpu.ggml_threadpool_new.restype, cpu.ggml_threadpool_new.argtypes = c_void_p, [POINTER(_PoolParams)]
    cpu.ggml_threadpool_pause.argtypes = [c_void_p]
    cpu.ggml_cpu_init()
    return base, cpu


def _both() -> tuple[ctypes.CDLL, ctypes.CDLL]:
    libraries = _libraries()
    assert libraries is not None, "llama-cpp-python is not installed"
    return libraries


def version() -> str | None:
    """Version of llama-cpp-python, or None where its library is not there."""
    return metadata.version("llama-cpp-python") if _libraries() else None


_pools: dict[int, int] = {}


def _pool(threads: int) -> int:
    base, cpu = _both()
    if threads not in _pools:
        _pools[threads] = cpu.ggml_threadpool_new(byref(base.ggml_threadpool_params_default(threads)))
    return _pools[threads]


def rest() -> None:
    """Put ggml's threads to sleep: they would spin on the cores of whatever runs next. The next call wakes them."""
    for pool in _pools.values():
        _both()[1].ggml_threadpool_pause(pool)


def quantize(weight: Tensor, kind: str) -> Tensor:
    """float32 [N, K] as the bytes of a ggml tensor of that kind, uint8."""
    base, _ = _both()
    n, k = weight.shape
    data = torch.empty(base.ggml_row_size(TYPES[kind], k) * n, dtype=torch.uint8)
    base.ggml_quantize_chunk(TYPES[kind], weight.contiguous().data_ptr(), data.data_ptr(), 0, n, k, None)
    return data


def linear(data: Tensor, n: int, k: int, kind: str) -> Callable[[Tensor], Tensor]:
    """x float32 [M, K] -> [M, N] by ggml's mul_mat with a copy of the bytes from quantize."""
    base, cpu = _both()
    context = base.ggml_init(_InitParams(len(data) + (1 << 16), None, False))
    w = base.ggml_new_tensor_2d(context, TYPES[kind], k, n)
    ctypes.memmove(base.ggml_get_data(w), data.data_ptr(), len(data))
    graphs: dict[tuple[int, int], tuple] = {}

    def prepare(m: int, threads: int) -> tuple:
        inner = base.ggml_init(_InitParams(4 * m * (n + k) + (1 << 20), None, False))
        x = base.ggml_new_tensor_2d(inner, 0, k, m)
        y = base.ggml_mul_mat(inner, w, x)
        graph = base.ggml_new_graph(inner)
        base.ggml_build_forward_expand(graph, y)
        plan = cpu.ggml_graph_plan(graph, threads, _pool(threads))
        work = (c_char * plan.work_size)()
        plan.work_data = ctypes.addressof(work)
        out = torch.frombuffer((c_float * (m * n)).from_address(base.ggml_get_data(y)), dtype=torch.float32).view(m, n)
        return inner, base.ggml_get_data(x), graph, plan, work, out

    def run(x: Tensor) -> Tensor:
        key = len(x), torch.get_num_threads()
        if key not in graphs:
            for inner, *_ in graphs.values():
                base.ggml_free(inner)
            graphs.clear()
            graphs[key] = prepare(*key)
        _, at, graph, plan, _, out = graphs[key]
        ctypes.memmove(at, x.data_ptr(), 4 * x.numel())
        cpu.ggml_graph_compute(graph, byref(plan))
        return out

    return run
