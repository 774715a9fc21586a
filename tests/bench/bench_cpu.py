"""How fast the packed linear layer is on this CPU, against reading its bytes and against torch's own kernels.

    python tests/bench/bench_cpu.py [--quick] [--isa avx2] [--threads 1 2] [--only cpu read] [--csv FILE]

--cpu-time is for a core that other work shares: calls are timed by the processor time they take, in one thread.

llama.cpp takes part where llama-cpp-python is installed (pip install llama-cpp-python, which compiles for 10 minutes).
Every call goes through the public layer. Weights rotate through more than 200 MB, so none is in a cache when its turn
comes; candidates take turns within each round, so noise of the machine hits all of them; medians are compared. One row
a figure is appended to the CSV.
"""

import argparse
import ctypes
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ggml
import results
import torch
import torch.nn.functional as F
from torch import Tensor

from bitnet import PackedBitLinear
from bitnet.kernels.cpu import arena
from bitnet.kernels.cpu import library as cpu_library
from bitnet.kernels.cpu import linear as cpu_linear

SHAPES = [(2560, 2560), (6912, 2560), (4096, 4096), (14336, 4096)]  # (N, K)
HEAD = (128256, 2560)  # the output head of bitnet-b1.58-2B-4T, in 8 bits
TOKENS = [1, 4, 16, 64, 256, 1024]
ROTATE = 220e6  # bytes of weights

Run = Callable[[Tensor], object]


def ours(backend: str, **options: Any) -> Callable[[int, int], Iterator[tuple[Run, int]]]:
    def make(n: int, k: int) -> Iterator[tuple[Run, int]]:
        layer = PackedBitLinear(k, n, bias=False, backend=backend, **options)
        layer.weight.random_(0, 127).bitwise_and_(0xAA if layer.weight.dtype == torch.uint8 else -1)  # valid codes
        weight = layer.prepack()[0]
        while True:
            twin = PackedBitLinear(k, n, bias=False, backend=backend, device="meta", **options)
            twin.weight, twin.weight_scale = layer.weight, layer.weight_scale  # Hub bytes are not read in a call
            own = arena.arena.empty(*weight.shape).view(weight.dtype).copy_(weight)
            twin._prepacked = layer._prepacked._replace(weight=own)
            twin(torch.zeros(1, k))  # binds; scales of groups are copied then
            yield twin, weight.nbytes

    return make


def c_call(layer: Any) -> Run:
    """The C function that a layer's call comes to with one token, without the layer."""
    n, k, (weight, backend) = layer.out_features, layer.in_features, layer.prepack()
    form, bits, y = cpu_library.form_of_backend(backend), layer.activation_bits, torch.empty(layer.out_features)
    described = cpu_linear.prepared(weight, layer.weight_scale, None, n, k, form, activation_bits=bits)
    pointer, function, threads = ctypes.byref(described), cpu_library.native().bitnet_linear, torch.get_num_threads
    return lambda x: function(pointer, x.data_ptr(), 0, k, None, 1, y.data_ptr(), 0, threads())


def c_function(backend: str, **options: Any) -> Callable[[int, int], Iterator[tuple[Run, int]]]:
    return lambda n, k: ((c_call(twin), nbytes) for twin, nbytes in ours(backend, **options)(n, k))


def raw_read(bits: float) -> Callable[[int, int], Iterator[tuple[Run, int]]]:
    def make(n: int, k: int) -> Iterator[tuple[Run, int]]:
        while True:
            weight = arena.arena.empty(int(n * k * bits / 8)).fill_(1)
            yield (lambda x, w=weight: cpu_library.read(w)), weight.nbytes

    return make


def torch_linear(dtype: torch.dtype) -> Callable[[int, int], Iterator[tuple[Run, int]]]:
    def make(n: int, k: int) -> Iterator[tuple[Run, int]]:
        while True:
            w = torch.ones(n, k, dtype=dtype)
            yield (lambda x, w=w: F.linear(x.to(dtype), w)), w.nbytes

    return make


def torch_int8(n: int, k: int) -> Iterator[tuple[Run, int]]:
    """The product alone: quantizing and rescaling are not counted."""
    while True:
        w = torch.ones(n, k, dtype=torch.int8)
        yield (lambda x, w=w: torch._int_mm(x.to(torch.int8), w.t())), w.nbytes


def torch_int4(n: int, k: int) -> Iterator[tuple[Run, int]]:
    while True:
        w = torch._convert_weight_to_int4pack_for_cpu(torch.ones(n, k, dtype=torch.int32), 1)
        scales = torch.ones(k // 128, n, 2, dtype=torch.bfloat16)
        yield (lambda x, w=w, s=scales: torch._weight_int4pack_mm_for_cpu(x.bfloat16(), w, 128, s)), w.nbytes


def llama_cpp(kind: str) -> Callable[[int, int], Iterator[tuple[Run, int]]]:
    def make(n: int, k: int) -> Iterator[tuple[Run, int]]:
        data = ggml.quantize(torch.randint(-1, 2, (n, k)).float(), kind)
        while True:
            yield ggml.linear(data, n, k, kind), data.nbytes

    return make


Candidates = dict[str, tuple[Callable[[int, int], Iterator[tuple[Run, int]]], str]]
CANDIDATES: Candidates = {
    "read": (raw_read(2), "2 bit"),
    "cpu": (ours("cpu"), "2 bit"),
    "cpu-base3": (ours("cpu-base3"), "1.6 bit"),
    "cpu, 16-bit activations": (ours("cpu", activation_bits=16), "2 bit"),
    "read, groups of 128": (raw_read(2.125), "2 bit"),
    "cpu, groups of 128": (ours("cpu", group_size=128), "2 bit"),
    "cpu, groups of 128, 16-bit activations": (ours("cpu", group_size=128, activation_bits=16), "2 bit"),
    "read, 1 bit, groups of 128": (raw_read(1.125), "1 bit"),
    "cpu-binary, groups of 128": (ours("cpu-binary", weights="binary", group_size=128), "1 bit"),
    "torch int4": (torch_int4, "4 bit"),
    "torch int8": (torch_int8, "int8"),
    "torch bf16": (torch_linear(torch.bfloat16), "bf16"),
    "torch fp32": (torch_linear(torch.float32), "fp32"),
}
HEAD_CANDIDATES: Candidates = {
    "read": (raw_read(8), "int8"),
    "cpu": (ours("cpu", weights="int8", per_row=True), "int8"),
    "torch int8": (torch_int8, "int8"),
    "torch bf16": (torch_linear(torch.bfloat16), "bf16"),
}
FUNCTIONS: Candidates = {  # for one token
    "cpu, C function": (c_function("cpu"), "2 bit"),
    "cpu, 16-bit activations, C function": (c_function("cpu", activation_bits=16), "2 bit"),
    "cpu, groups of 128, C function": (c_function("cpu", group_size=128), "2 bit"),
    "cpu-binary, groups of 128, C function": (c_function("cpu-binary", weights="binary", group_size=128), "1 bit"),
}
CANDIDATES |= FUNCTIONS
if ggml.version():
    CANDIDATES |= {f"llama.cpp {kind}": (llama_cpp(kind), kind) for kind in ggml.TYPES}


def rotation(make: Callable[[int, int], Iterator[tuple[Run, int]]], n: int, k: int) -> list[Run]:
    """Enough layers of their own memory to fill ROTATE bytes."""
    runs: list[Run] = []
    total = 0
    for run, nbytes in make(n, k):
        runs.append(run)
        total += nbytes
        if total > ROTATE:
            return runs
    raise AssertionError("candidates do not end")


def measure(
    candidates: dict[str, list[Run]], x: Tensor, seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Tensor]:
    """Seconds a call, one figure a round: float64 [rounds] for each candidate."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    calls = {}
    for name, runs in candidates.items():  # warm up, and fit each candidate's share of a round to 5 ms
        runs[0](x)
        start = clock()
        runs[-1](x)
        ggml.rest()
        calls[name] = max(1, min(len(runs), int(5e-3 / (clock() - start))))
    turn, end = 0, time.perf_counter() + seconds
    while turn < 3 or time.perf_counter() < end:
        for name, runs in candidates.items():
            batch = [runs[(turn * calls[name] + i) % len(runs)] for i in range(calls[name])]
            start = clock()
            for run in batch:
                run(x)
            times[name].append((clock() - start) / len(batch))
            ggml.rest()
        turn += 1
    return {name: torch.tensor(t, dtype=torch.float64) for name, t in times.items()}


def calls(clock: Callable[[], float]) -> dict[str, Tensor]:
    """A tiny layer's call, and the C function in it alone, as measure returns them."""
    layer = PackedBitLinear(64, 64, bias=False, backend="cpu")
    return measure({"cpu": 1000 * [layer], "C function": 1000 * [c_call(layer)]}, torch.randn(1, 64), 0.5, clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes, fewer tokens, under 50 seconds")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", help="candidates whose names begin so; cpu must be among them")
    parser.add_argument("--cpu-time", action="store_true", help="processor time of one thread, on a shared core")
    parser.add_argument("--csv", type=Path, default=results.FILE)
    results.add_isa(parser)
    args = parser.parse_args()
    if args.cpu_time and args.threads != [1]:
        parser.error("--cpu-time is that of the calling thread; add --threads 1")
    clock = time.thread_time if args.cpu_time else time.perf_counter
    results.hold(args.isa)
    if not cpu_library.isas(cpu_library.BASE3):
        del CANDIDATES["cpu-base3"]
    for name in list(CANDIDATES) if args.only else []:
        if not name.startswith(tuple(args.only)):
            del CANDIDATES[name]
    shapes, tokens, seconds = (SHAPES[:2], [1, 16, 64, 256], 0.8) if args.quick else (SHAPES, TOKENS, 3.0)
    work = [("ternary_linear", n, k, tokens, CANDIDATES) for n, k in shapes]
    work += [] if args.quick else [("int8_linear", *HEAD, [1, 4], HEAD_CANDIDATES)]

    common = results.conditions()
    if args.cpu_time:
        common["hardware"] += ", CPU time"
    print(f"{common['hardware']}; {common['versions']}; µs a call, and how many times as long as ours the others take")
    rows = []
    with torch.no_grad():
        times = calls(clock)
    above = 1e6 * (times["cpu"].median() - times["C function"].median())
    print(f"a layer's call takes {above:.1f} µs more than the C function in it", flush=True)
    for name, t in times.items():
        what = {"op": "call", "m": 1, "n": 64, "k": 64, "dtype": "2 bit", "backend": name, "threads": 1}
        rows.append(results.row(what, t, None, common))
    for op, n, k, tokens, makers in work:
        candidates = {name: rotation(make, n, k) for name, (make, _) in makers.items()}
        for threads in args.threads:
            torch.set_num_threads(threads)
            for m in tokens:
                here = {name: runs for name, runs in candidates.items() if m == 1 or name not in FUNCTIONS}
                with torch.no_grad():
                    times = measure(here, torch.randn(m, k), seconds, clock)
                mine = times["cpu"].median()
                words = [f"N {n:>5} K {k:>4} M {m:>4} threads {threads}: {1e6 * mine:9.0f} µs"]
                words += [f"{name} {t.median() / mine:.2f}" for name, t in times.items() if name != "cpu"]
                print(", ".join([*words, f"{2e-9 * m * n * k / mine:.0f} GOP/s"]), flush=True)
                for name, t in times.items():
                    kind = makers[name][1]
                    size = {"2 bit": n * k / 4, "int8": n * k, "bf16": 2 * n * k, "fp32": 4 * n * k}.get(kind)
                    what = {"op": op, "m": m, "n": n, "k": k, "dtype": kind, "backend": name, "threads": threads}
                    rows.append(results.row(what, t, size, common))
    results.append(rows, args.csv)


if __name__ == "__main__":
    main()
