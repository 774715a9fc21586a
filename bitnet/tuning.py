"""What `bitnet tune` does: measure a handful of kernel configurations a shape on this GPU and keep the fastest."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from torch import Tensor

from .kernels import backends
from .kernels import torch_int8 as int8
from .kernels.gpu.layout import BASE3, INT8, TWO_BITS, prepack, unprepack
from .kernels.layout import ZEROS, packed_rows
from .progress import Progress

if TYPE_CHECKING:
    from .kernels.gpu.configs import Config


def tune(targets: Sequence[str], tokens: Sequence[int], base3: bool = False, device: str = "cuda") -> Path:
    """Tune the shapes in `targets` for each number of tokens; prints a line each and returns the file written.

    targets: checkpoint directories with packed layers, or shapes as "14336x4096", out_features x in_features
    base3:   tune the 1.6-bit form instead of the 2-bit one

    Raises RuntimeError without a GPU that the triton backend can use, ValueError for other targets.
    """
    if bad := [m for m in tokens if m < 1]:
        raise ValueError(f"--tokens must be at least 1, got {bad[0]}")
    planes = BASE3 if base3 else TWO_BITS
    shapes = [shape for target in targets for shape in shapes_of(target, planes)]
    if missing := backends.BACKENDS["triton"].missing(torch.device(device), 8, False):
        raise RuntimeError(f"there is nothing to tune here: {missing}")
    from .kernels.gpu import configs as configs

    gpu = configs.gpu_of(torch.device(device))
    buckets = sorted({configs.bucket(m) for m in tokens})
    work = [(m, *shape) for shape in dict.fromkeys(shapes) for m in buckets]
    total = sum(len(configs.candidates(gpu, *key)) for key in work)
    console = Console()
    with Progress("tuning", total, "configurations", console) as progress:
        for m, n, k, kind in work:
            times = measure(configs.candidates(gpu, m, n, k, kind), m, n, k, kind, device, progress.advance)
            best = min(times, key=lambda config: times[config])
            path = configs.save(gpu.name, {(m, n, k, kind): best})
            first = times.get(configs.heuristic(gpu, m, n, k, kind))
            gain = "" if first is None else f", {first / times[best]:.2f} times as fast as untuned"
            console.print(f"{n} x {k}, up to {m} tokens: {1e6 * times[best]:.1f} µs{gain}; {best}")
    print(f"kept in {path}, which programs read when they start")
    return path


def shapes_of(target: str, planes: int) -> list[tuple[int, int, int]]:
    """(N, K, planes) of the packed layers and experts in a checkpoint directory, or of "NxK"."""
    if found := re.fullmatch(r"(\d+)[x×](\d+)", target):
        n, k = map(int, found.groups())
        if not n or not k:
            raise ValueError(f"{target}: an empty shape")
        return [(n, k, planes)]
    from .convert.files.folder import CONFIG, weight_files
    from .convert.files.json_object import read_json
    from .convert.folders import find_folder
    from .convert.opening import open_source
    from .experts import PackedStack
    from .packed import PackedBitLinear

    target = str(find_folder(target))
    weight_files(target)  # a clear error before the model is built
    modules = []
    config = read_json(Path(target) / CONFIG)
    if "model_type" in config:  # a file of packed bytes does not tell N
        modules = [m for m in open_source(target).model.modules() if isinstance(m, PackedBitLinear | PackedStack)]
    if not modules or '"bits": 1' in json.dumps(config):
        raise ValueError(
            f"{target}: not a Hugging Face model with layers packed with 2 bits; give the shapes instead, "
            "out_features x in_features: bitnet tune 14336x4096"
        )
    modules = [module for module in modules if module.spec.weights != "int4"]  # for which there are no kernels
    kinds = [INT8 if module.spec.weights == "int8" else planes for module in modules]
    shapes = [(m.out_features, m.in_features, kind) for m, kind in zip(modules, kinds, strict=True)]
    return list(dict.fromkeys(shapes))


def measure(
    found: "Sequence[Config]", m: int, n: int, k: int, planes: int, device: str, done: Callable[[], object]
) -> "dict[Config, float]":
    """Median seconds of every configuration that this GPU can run, checked against torch's int8 product."""
    from triton.runtime.errors import OutOfResources, PTXASError

    from .kernels.gpu import linear as linear
    from .kernels.gpu.parts import PreparedWeight

    weights = rotation(n, k, planes, device)
    x = torch.randn(m, k, device=device, dtype=torch.bfloat16)
    scale = torch.ones(1, device=device)
    expected = int8.linear(x, unprepack(weights[0], n, k, planes), scale, None, 8)
    y = torch.empty_like(expected)
    layers = [PreparedWeight(weight, scale, None, n, k, planes) for weight in weights]
    times: dict[Config, float] = {}
    for config in found:
        try:
            linear.multiply(config, layers[0], x, None, y)
        except (OutOfResources, PTXASError):  # more registers or shared memory than this GPU has
            done()
            continue
        if not torch.equal(y, expected):
            raise RuntimeError(f"{config} gives wrong results for {m} tokens and {n} x {k} weights; please report this")
        calls = [(lambda layer=layer, config=config: linear.multiply(config, layer, x, None, y)) for layer in layers]
        times[config] = graph_seconds(calls, 10).median().item()
        done()
    if not times:
        raise RuntimeError(
            f"no configuration runs on this GPU for {m} tokens and {n} x {k} weights; please report this"
        )
    return times


def rotation(n: int, k: int, planes: int, device: str) -> list[Tensor]:
    """Prepacked random weights, together three times the GPU's L2 cache, so that none is in it when its turn comes."""
    if planes == INT8:
        stored = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    else:
        stored = torch.full((packed_rows(n), k), ZEROS, dtype=torch.uint8, device=device)
        stored = stored.random_(0, 256)
        stored &= ~(stored & stored >> 1 & ZEROS)  # of the code 3, which is none, the code 2
    first = prepack(stored, n, planes)
    copies = 3 * torch.cuda.get_device_properties(device).L2_cache_size // first.nbytes + 2
    return [first, *(first.clone() for _ in range(copies - 1))]


def graph_seconds(calls: Sequence[Callable[[], object]], rounds: int) -> Tensor:
    """Seconds a call, one figure a round: float64 [rounds]. A round replays one CUDA graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()  # compile and allocate before the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    repeat = max(1, 100 // len(calls))
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeat):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / repeat / len(calls))
    return torch.tensor(times, dtype=torch.float64)
