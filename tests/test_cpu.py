"""The native CPU kernels: every instruction set this CPU can run, threads, forks, memory. test_ops.py and
test_packed.py run on this backend as well."""

import copy
import ctypes
import gc
import json
import mmap
import os
import platform
import random
import shlex
import shutil
import subprocess
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from oracle import DTYPES, grid
from torch import Tensor, nn

import bitnet
from bitnet import PackedBitLinear
from bitnet.kernels import backends, layout, ops, quantizers, reference
from bitnet.kernels.cpu import arena
from bitnet.kernels.cpu import latent as cpu_latent
from bitnet.kernels.cpu import library as cpu_library
from bitnet.kernels.cpu import linear as cpu_linear
from bitnet.kernels.layout import pack_ternary

MISSING = cpu_library.missing(torch.device("cpu"))
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

TARGETS = (
    []
    if MISSING
    else [(form, isa) for form in (cpu_library.TWO_BITS, cpu_library.BASE3) for isa in cpu_library.isas(form)]
)
each_isa = pytest.mark.parametrize(("form", "isa"), TARGETS, ids=[isa for _, isa in TARGETS])
FORMS = sorted({form for form, _ in TARGETS})
each_form = pytest.mark.parametrize("form", FORMS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


def ternary(n: int, k: int) -> Tensor:
    return torch.randint(-1, 2, (n, k), dtype=torch.int8)


def prepack(codes: Tensor, form: int = cpu_library.TWO_BITS) -> Tensor:
    return cpu_linear.prepack(pack_ternary(codes), len(codes), form)


@pytest.mark.parametrize("threads", [1, 3])
def test_hub_bytes_are_prepacked_as_their_codes_are(threads: int) -> None:
    """To the byte, padding included: the two go different ways."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for n in (1, 2, 3, 4, 5, 7, 31, 32, 33, 66, 97, 130):
            for k in (1, 8, 15, 16, 17, 33, 128):
                codes = ternary(n, k)
                assert prepack(codes).equal(cpu_linear.prepack_codes(codes, False)), (n, k)
    finally:
        torch.set_num_threads(before)


def product(q: Tensor, codes: Tensor) -> Tensor:
    return (q.double() @ codes.double().T).int()  # exact: sums stay far below 2^53


def shapes(count: int) -> list[tuple[int, int, int]]:
    """Random (M, N, K), small and awkward for the most part."""
    draw = random.Random(0)
    near = [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128, 129, 200, 257]
    return [
        (draw.choice([0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 17, 37]), draw.choice(near), draw.choice(near))
        for _ in range(count)
    ]


@each_isa
def test_accumulators_are_exact(form: int, isa: str) -> None:
    """Fails for a wrong tail, tile, panel or field at any shape."""
    for m, n, k in [*shapes(400), (300, 70, 40), (1, 3, 5000), (5, 2, 5000), (257, 33, 17), (600, 1, 1)]:
        q, codes = torch.randint(-128, 128, (m, k), dtype=torch.int8), ternary(n, k)
        assert torch.equal(cpu_linear.int_matmul(q, prepack(codes, form), n, form, isa), product(q, codes)), (
            m,
            n,
            k,
        )


@pytest.mark.parametrize("isa", [] if MISSING else cpu_library.isas(cpu_library.EIGHT_BITS))
def test_8_bit_accumulators_are_exact(isa: str) -> None:
    for m, n, k in [*shapes(150), (300, 70, 40), (1, 3, 5000), (2, 3, 65536)]:
        q, codes = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((m, k), (n, k)))
        assert torch.equal(
            cpu_linear.int_matmul(q, ops.prepack(codes, backend="cpu"), n, isa=isa), product(q, codes)
        ), (
            m,
            n,
            k,
        )


@each_isa
@pytest.mark.parametrize("m", [1, 2, 9])
@pytest.mark.parametrize("k", [16384, 600_001])
def test_accumulators_are_exact_at_the_extremes(form: int, isa: str, m: int, k: int) -> None:
    """Fails if 16 bits overflow or saturate, or 32 bits do because the partial sums of large K are never reduced."""
    codes = torch.ones(3, k, dtype=torch.int8)
    codes[1] = -1
    codes[2, ::2] = 0
    for value in (-128, 127):
        q = torch.full((m, k), value, dtype=torch.int8)
        assert torch.equal(cpu_linear.int_matmul(q, prepack(codes, form), 3, form, isa), product(q, codes))


@each_isa
@each_dtype
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("bias_dtype", [None, *DTYPES, torch.float64], ids=["no_bias", "fp32", "bf16", "fp16", "fp64"])
def test_output_has_the_oracles_bits(
    form: int, isa: str, dtype: torch.dtype, per_row: bool, bias_dtype: torch.dtype | None
) -> None:
    """Fails for a fused multiply-add, a second rounding, an approximate division, or ties rounded away from zero."""
    for m, n, k in shapes(40):
        x, codes, scale = torch.randn(m, k).to(dtype), ternary(n, k), torch.rand(n if per_row else 1) + 0.1
        bias = None if bias_dtype is None else torch.randn(n, dtype=torch.float64).to(bias_dtype)
        y = cpu_linear.bind(prepack(codes, form), scale, bias, n, k, 8, form, isa)(x)
        assert y.dtype == dtype
        assert torch.equal(y, oracle.linear(x, codes.numpy().astype(np.int64), scale.numpy(), bias, 8)), (m, n, k)


@each_isa
@each_dtype
def test_outputs_of_every_size_round_like_torch(form: int, isa: str, dtype: torch.dtype) -> None:
    """Fails for wrong subnormals, overflow to Inf or ties of float16 and bfloat16."""
    n, x = 4096, torch.ones(1, 1).to(dtype)
    scale = torch.cat([torch.logspace(-46, 38, n // 2, base=10), torch.logspace(-9, 5, n // 2, base=10)])
    scale[:64] = (torch.arange(64) + 0.5) * 2.0**-24  # ties among float16's subnormals
    scale[64:70] = torch.tensor([65504.0, 65519.99, 65520.0, 65536.0, 2.0**-14, 2.0**-14 - 2.0**-25])
    codes = ternary(n, 1)
    y = cpu_linear.bind(prepack(codes, form), scale, None, n, 1, 8, form, isa)(x)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = oracle.linear(x, codes.numpy().astype(np.int64), scale.numpy(), None, 8)
    assert torch.equal(y, expected)


@each_isa
@each_dtype
def test_every_bit_pattern_of_an_activation_has_the_references_code(form: int, isa: str, dtype: torch.dtype) -> None:
    """Fails for subnormals, NaN, Inf, or values where the order of operations of the scale shows."""
    size = torch.finfo(dtype).bits
    if size == 16:
        patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    else:
        patterns = torch.randint(-(2**31), 2**31 - 1, (1 << 16,)).to(torch.int32).view(dtype)
    x = torch.stack([patterns, patterns.roll(1), torch.zeros_like(patterns)], 1)  # tokens of 3
    codes, scale = torch.eye(3, dtype=torch.int8), torch.ones(1)
    y = cpu_linear.bind(prepack(codes, form), scale, None, 3, 3, 8, form, isa)(x)
    expected = ops.ternary_linear(x, pack_ternary(codes), scale, out_features=3, backend="reference")
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[~y.isnan()], expected[~y.isnan()])


@each_isa
@pytest.mark.parametrize("m", [1, 7])
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[:, 3:43],
        lambda t: t[::2, :40][: len(t) // 2],
        lambda t: t[:1, :40].expand(5, 40),
        lambda t: t.T[:40].T,
    ],
    ids=["columns", "every_other_row", "expanded", "transposed"],
)
def test_strided_x_is_read_where_it_is(form: int, isa: str, m: int, view: Callable[[Tensor], Tensor]) -> None:
    """Fails if a row stride is ignored or taken in the wrong unit."""
    for dtype in DTYPES:
        x, codes = view(grid(2 * m, 50).to(dtype)), ternary(5, 40)
        y = cpu_linear.bind(prepack(codes, form), torch.ones(1), None, 5, 40, 8, form, isa)(x)
        assert torch.equal(y, oracle.linear(x, codes.numpy().astype(np.int64), np.ones(1, np.float32), None, 8))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("m", [1, 2, 40, 513])
def test_any_number_of_threads_gives_the_same(threads: int, m: int) -> None:
    """Fails if threads overlap, leave rows or tokens out, or read codes before they are written."""
    before = torch.get_num_threads()
    codes, q = ternary(1000, 1100), torch.randint(-128, 128, (m, 1100), dtype=torch.int8)
    try:
        torch.set_num_threads(threads)
        for _ in range(5):
            assert torch.equal(cpu_linear.int_matmul(q, prepack(codes), 1000), product(q, codes))
    finally:
        torch.set_num_threads(before)


def test_python_threads_do_not_share_scratch() -> None:
    """Fails if two calls at once write their codes into the same memory."""
    codes = ternary(640, 2000)
    weight = prepack(codes)
    inputs = [torch.randint(-128, 128, (m, 2000), dtype=torch.int8) for m in (1, 2, 7, 30)]
    expected = [product(q, codes) for q in inputs]

    def work(seed: int) -> bool:
        draw = random.Random(seed)
        picks = [draw.randrange(len(inputs)) for _ in range(50)]
        return all(torch.equal(cpu_linear.int_matmul(inputs[i], weight, 640), expected[i]) for i in picks)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(8)))


def test_models_may_die_while_others_run() -> None:
    """Fails if the memory of a dropped layer is unmapped although another layer lives in it."""
    codes = ternary(256, 512)
    q = torch.randint(-128, 128, (3, 512), dtype=torch.int8)
    weight, expected, stop = prepack(codes), product(q, codes), threading.Event()

    def churn() -> None:
        while not stop.is_set():
            prepack(codes)

    other = threading.Thread(target=churn)
    other.start()
    try:
        assert all(torch.equal(cpu_linear.int_matmul(q, weight, 256), expected) for _ in range(300))
    finally:
        stop.set()
        other.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")
@pytest.mark.parametrize("m", [1, 40])
def test_a_forked_child_computes_and_does_not_wait_for_lost_threads(m: int) -> None:
    codes, q = ternary(1024, 1100), torch.randint(-128, 128, (m, 1100), dtype=torch.int8)
    weight, expected = prepack(codes), product(q, codes)
    assert torch.equal(cpu_linear.int_matmul(q, weight, 1024), expected)  # the pool exists now
    child = os.fork()
    if child == 0:
        signal_after = threading.Timer(20, lambda: os._exit(2))
        signal_after.start()
        y = cpu_linear.int_matmul(q, weight, 1024)
        honest = torch.get_num_threads() == 1 or "1 thread, not" in cpu_library.description()
        os._exit(0 if honest and y.flatten().tolist() == expected.flatten().tolist() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")
def test_a_fork_while_another_thread_allocates_does_not_lock_the_child_out() -> None:
    with arena.arena._lock:
        child = os.fork()
        if child == 0:
            threading.Timer(20, lambda: os._exit(2)).start()
            codes = ternary(64, 64)
            os._exit(0 if torch.equal(cpu_linear.unprepack(prepack(codes), 64, 64), codes) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# Memory


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc/self/statm")
def test_loading_and_dropping_a_model_leaves_no_memory_behind() -> None:
    def load_and_drop() -> None:
        layers = [PackedBitLinear(2048, 4096, backend="cpu") for _ in range(3)]
        for layer in layers:
            layer(torch.randn(1, 2048))

    for _ in range(3):
        load_and_drop()
    gc.collect()
    before = resident()
    for _ in range(50):
        load_and_drop()
    gc.collect()
    assert resident() - before < 250e6  # fifty models are 630 MB; malloc's own heap comes and goes by 100


def test_a_kernel_without_large_pages_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, option: int, *args: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(arena.mmap, "mmap", Refusing)
    tensor = arena._Arena().empty(5, 7).fill_(3)
    assert tensor.shape == (5, 7)
    assert bool((tensor == 3).all())


def test_prepacked_weights_do_not_overlap_and_die_one_by_one() -> None:
    """Fails if a tensor overlaps its neighbour, or if a chunk dies before its last tensor or survives it."""
    memory = arena._Arena()
    tensors = [memory.empty(size) for size in (1, 100, 5 << 20, 70 << 20, 3, 9)]
    for i, t in enumerate(tensors):
        t.fill_(i)
    assert all(bool((t == i).all()) for i, t in enumerate(tensors))
    del tensors[:5], t
    gc.collect()
    assert tensors[0].tolist() == [5] * 9
    chunk = memory._chunk
    assert chunk() is not None
    tensors.clear()
    gc.collect()
    assert chunk() is None


def test_a_bound_layer_follows_its_buffers() -> None:
    """Fails if cached pointers survive a new bias, a new scale, a move or a state_dict, or miss a write."""
    layer, x = PackedBitLinear(40, 6, backend="cpu"), grid(2, 40)
    assert torch.equal(layer(x), torch.zeros(2, 6))
    assert layer.bias is not None
    layer.bias.fill_(3)
    assert torch.equal(layer(x), torch.full((2, 6), 3.0))
    layer.bias = torch.full((6,), 4.0)
    assert torch.equal(layer(x), torch.full((2, 6), 4.0))
    layer.bias = None
    layer.weight.fill_(0b10101010)
    layer.to(torch.bfloat16).float()
    ones = layer(x)
    layer.weight_scale = torch.full((1,), 2.0)
    assert torch.equal(layer(x), 2 * ones)
    layer.weight_scale.fill_(4)
    assert torch.equal(layer(x), 4 * ones)


def test_a_default_device_does_not_move_what_the_kernels_write() -> None:
    """Fails with a crash if results are allocated wherever torch.device says."""
    layer, weight = PackedBitLinear(40, 6, backend="cpu", activation_bits=4), torch.randn(6, 40)
    x, expected = torch.randn(3, 40), bitnet.BitLinear(40, 6)
    with torch.device("meta"):
        assert layer(x).device.type == "cpu"
        packed, scale = ops.pack_latent(weight)
        codes = cpu_linear.unprepack(cpu_linear.prepack(packed, 6), 6, 40)
        expected(x).sum().backward()
    assert torch.equal(codes * scale, torch.mul(*ops.quantize_weight(weight)))


def test_layers_without_a_plain_tensor_go_through_the_operator() -> None:
    """Fails if a traced or fake call reaches the C function, whose result no graph would see."""
    layer, x = PackedBitLinear(40, 6, backend="cpu"), grid(2, 40)
    layer.weight.fill_(0b10101010)
    expected = layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of every shape that Python looks at
        traced = torch.jit.trace(layer, (torch.zeros(2, 40),), check_trace=False)
    assert torch.equal(traced(x), expected)
    exported = torch.export.export(layer, (torch.zeros(2, 40),))
    assert torch.equal(exported.module()(x), expected)


@each_form
def test_unpacking_inverts_prepacking_at_any_shape(form: int) -> None:
    for _, n, k in shapes(100):
        codes = ternary(n, k)
        assert torch.equal(cpu_linear.unprepack(prepack(codes, form), n, k, form), codes)


# Refusals


def test_float_activations_are_refused_with_the_remedy() -> None:
    with pytest.raises(RuntimeError, match="activation_bits=None keeps activations float; choose 'auto' or 'torch'"):
        backends.choose_backend("cpu", torch.device("cpu"), None)
    layer = PackedBitLinear(8, 4, backend="cpu", activation_bits=None)
    assert layer.activation_bits == 16  # whose error is stated
    layer.set_backend("cpu", activation_bits=None)
    with pytest.raises(RuntimeError, match="activation_bits=None keeps activations float; choose 'auto' or 'torch'"):
        layer(torch.ones(1, 8))
    layer.set_backend(activation_bits=None)
    assert layer.prepack()[1] == "torch"


@pytest.mark.skipif(not MISSING and not cpu_library.isas(cpu_library.BASE3), reason="this CPU has no AVX512-VBMI")
def test_1_6_bits_take_the_base3_kernel_and_give_the_same(tmp_path: Path) -> None:
    layer, x = PackedBitLinear(100, 64, weight_bits=1.6), grid(3, 100)
    layer.weight.copy_(pack_ternary(ternary(64, 100)))
    assert layer.prepack()[1] == "cpu-base3"
    expected = PackedBitLinear(100, 64)
    expected.load_state_dict(layer.state_dict())
    assert expected.prepack()[1] == "cpu"
    assert torch.equal(layer(x), expected(x))
    expected.set_backend(weight_bits=1.6)
    assert expected.prepack()[1] == "cpu-base3"
    assert torch.equal(copy.deepcopy(layer)(x), expected(x))
    bitnet.save(nn.Sequential(layer), tmp_path)
    loaded = bitnet.load(tmp_path, nn.Sequential(nn.Linear(100, 64)), weight_bits=1.6)
    assert loaded[0].prepack()[1] == "cpu-base3"
    assert torch.equal(loaded(x), expected(x))


def test_1_6_bits_that_cannot_be_had_are_said_and_done_in_another_form(monkeypatch: pytest.MonkeyPatch) -> None:
    isas = cpu_library.isas
    monkeypatch.setattr(cpu_library, "isas", lambda form=0: [] if form == cpu_library.BASE3 else isas(form))
    layer = PackedBitLinear(8, 4, weight_bits=1.6)
    with pytest.warns(
        UserWarning, match="weight_bits=1.6: this CPU has no AVX512-VBMI; weights keep the form of backend 'cpu'"
    ):
        assert layer.prepack()[1] == "cpu"
    layer.set_backend("torch", weight_bits=1.6)
    with pytest.warns(UserWarning, match="weights keep the form of backend 'torch'"):
        assert layer.prepack()[1] == "torch"
    with pytest.raises(ValueError, match=r"weight_bits must be 2, 1\.6 or 1, got 1\.5"):
        layer.set_backend(weight_bits=1.5)


def test_a_cuda_device_is_refused_with_the_remedy() -> None:
    with pytest.raises(RuntimeError, match="'cpu' cannot run on cuda: it runs on CPU tensors; on cuda choose 'auto'"):
        backends.choose_backend("cpu", torch.device("cuda"))


@pytest.mark.parametrize("form", [cpu_library.TWO_BITS, cpu_library.EIGHT_BITS])
@pytest.mark.parametrize(("n", "k"), [(65, 40), (64, 60), (4096, 40)], ids=["row_more", "group_more", "rows_more"])
def test_a_layer_larger_than_its_weight_is_refused_before_memory_is_read(form: int, n: int, k: int) -> None:
    codes = ternary(64, 40)
    weight = ops.prepack(codes if form == cpu_library.EIGHT_BITS else pack_ternary(codes), backend="cpu")
    with pytest.raises(ValueError, match=rf"weight is prepacked as \[2, .*\], but {n} x {k} needs"):
        cpu_linear.bind(weight, torch.ones(1), None, n, k, 8)
    for scale, bias in ((torch.ones(2), None), (torch.ones(1), torch.ones(63))):
        with pytest.raises(ValueError, match=r"scale and bias of sizes \[.*\] do not fit 64 rows"):
            cpu_linear.bind(weight, scale, bias, 64, 40, 8)


def test_bad_arguments_come_back_as_errors_not_crashes() -> None:
    weight, x, y = prepack(ternary(4, 8)), torch.zeros(1, 8), torch.zeros(1, 4)
    layer = cpu_linear.prepared(weight, torch.ones(1), None, 4, 8)

    def status(m: int = 1, x_type: int = 0, y_type: int = 0) -> int:
        args = (ctypes.byref(layer), x.data_ptr(), x_type, 8, None, m, y.data_ptr(), y_type, 1)
        return cpu_library.native().bitnet_linear(*args)

    assert (status(), status(m=0), status(m=-1), status(x_type=9), status(y_type=1)) == (0, 0, 2, 1, 1)
    assert status(x_type=3) == 1, "codes without scales"
    layer.isa = 99
    assert status() == 3
    layer.isa, layer.k = -1, 1 << 24
    assert status() == 2
    with pytest.raises(RuntimeError, match="native CPU kernel: unsupported shape"):
        cpu_library.check(2)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder without a library, and no installation."""

    def none(name: str) -> metadata.Distribution:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr("bitnet.__path__", [str(tmp_path)])
    monkeypatch.setattr(metadata, "distribution", none)
    for cache in (cpu_library.load, backends._choose):
        cache.cache_clear()
    yield tmp_path
    for cache in (cpu_library.load, backends._choose):
        cache.cache_clear()


def reason() -> str:
    cpu_library.load.cache_clear()
    row = backends.backends()[0]
    assert (row.name, row.ready) == ("cpu", False)
    return row.detail


def test_a_missing_library_says_why_and_what_to_do(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "it was never built" in reason()
    assert "pip install -e" in reason()
    with pytest.raises(RuntimeError, match="'cpu' cannot run on cpu: it was never built"):
        PackedBitLinear(8, 4, backend="cpu")(torch.ones(1, 8))
    assert PackedBitLinear(8, 4).prepack()[1] == "torch"

    class Installed:
        def locate_file(self, name: str) -> Path:
            return elsewhere / "site-packages" / name

    monkeypatch.setattr(metadata, "distribution", lambda name: Installed())
    assert "it was never built" in reason()
    native = elsewhere / "site-packages" / "bitnet" / "_native"
    native.mkdir(parents=True)
    (native / "libbitnet_cpu.so").touch()
    assert "was installed beside another copy" in reason()

    (elsewhere / "_native").mkdir()
    (elsewhere / "_native" / "why.txt").write_text("no C++ compiler; install g++\n")
    assert reason().startswith("no C++ compiler; install g++, then: pip install -e ")
    (elsewhere / "_native" / "libbitnet_cpu.so").write_bytes(b"not a library")
    assert "does not load" in reason()


def test_a_library_from_other_sources_is_refused(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(cpu_library, "_ABI", -1)
    assert "was built from other sources; build it again: pip install -e" in reason()


# The library built for other CPUs and with a sanitizer: csrc/selfcheck.cpp compares every instruction set

SOURCES = Path(__file__).parent.parent / "kernels" / "csrc"


def build_selfcheck(folder: Path, *options: str) -> Path:
    subprocess.run(["cmake", "-S", SOURCES, "-B", folder, "-DBITNET_SELFCHECK=ON", *options], check=True)
    subprocess.run(["cmake", "--build", folder, "--parallel"], check=True)
    return folder / "selfcheck"


def needs(*tools: str) -> pytest.MarkDecorator:
    absent = [tool for tool in tools if shutil.which(tool) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}")


@needs("cmake", "c++")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86-64")
def test_loops_that_clamp_or_take_exponentials_are_vectors_where_these_have_no_masks(tmp_path: Path) -> None:
    """gcc tells which loops it leaves to take one value at a time, because of branches in them."""
    options = ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON", "-DCMAKE_BUILD_TYPE=Release"]
    subprocess.run(["cmake", "-S", SOURCES, "-B", tmp_path, *options], check=True)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    source, program = str(SOURCES / "avx2.cpp"), tmp_path / "loops.cpp"
    program.write_text(
        """#include "quantize.h"
        #include "attention.h"
        extern const void* const used[] = {(void*)ternary_codes, (void*)quantize, (void*)apply_gate, (void*)softmax};"""
    )
    words = next(shlex.split(each["command"]) for each in commands if Path(each["file"]).samefile(source))
    if "Free Software Foundation" not in subprocess.run([words[0], "--version"], capture_output=True, text=True).stdout:
        pytest.skip("only gcc says which loops it does not turn into vectors")
    words = [str(program) if word == source else word for word in words]
    done = subprocess.run([*words, "-fopt-info-vec-all"], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert "loop vectorized using 32 byte vectors" in done.stderr
    assert [line for line in done.stderr.splitlines() if "not vectorized: control flow in loop" in line] == []


@pytest.mark.slow
@needs("cmake", "c++")
def test_no_access_outside_of_any_buffer(tmp_path: Path) -> None:
    """Fails if any kernel reads or writes beyond its operands, or relies on undefined behaviour."""
    flags = "-O1 -fsanitize=address,undefined -fno-sanitize-recover"  # a minute to compile; with -O3 it would be ten
    names = {name for form in range(6) for name in cpu_library.isas(form)}
    files = ";".join("neondot" if name == "neon-dotprod" else name.replace("-", "") for name in names)
    options = "-DCMAKE_BUILD_TYPE=Sanitized", f"-DCMAKE_CXX_FLAGS={flags}", f"-DBITNET_ISAS={files}"
    program = build_selfcheck(tmp_path, *options)
    output = subprocess.run([program], check=True, capture_output=True, text=True).stdout
    alone = (cpu_library.EIGHT_BITS, cpu_library.ONE_BIT, cpu_library.FOUR_BITS, cpu_library.ONE_BIT_TABLES)
    others = [isa for form in alone for isa in cpu_library.isas(form)]
    assert output.split() == [*(isa for _, isa in TARGETS), *others, "agree"]


@pytest.mark.slow
@needs("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64-static")
def test_neon_agrees_with_plain_loops(tmp_path: Path) -> None:
    compiler = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64"]
    program = build_selfcheck(tmp_path, *compiler, "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++")
    emulator = ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu"]
    output = subprocess.run([*emulator, program], check=True, capture_output=True, text=True).stdout
    assert output.split() == [*4 * ["neon-dotprod", "neon", "scalar"], "agree"]  # ternary, 8 bits, binary, 4 bits


@pytest.fixture(scope="module")
def selfcheck(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program around the library that is installed."""
    library, program = Path(cpu_library.native()._name).resolve(), tmp_path_factory.mktemp("selfcheck") / "selfcheck"
    source = ["c++", "-O1", "-std=gnu++17", "-ffp-contract=off", SOURCES / "selfcheck.cpp", library]
    subprocess.run([*source, f"-Wl,-rpath,{library.parent}", "-o", program], check=True)
    return program


@pytest.mark.slow
@needs("c++", "qemu-x86_64-static")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="builds for x86-64")
@pytest.mark.parametrize(
    ("model", "expected"),
    [("Nehalem", 4 * ["scalar"]), ("max", [*2 * ["avx2", "scalar"], "scalar", "avx2", "scalar", "avx2"])],
    ids=["scalar", "avx2"],
)
def test_older_cpus_run_what_they_can(selfcheck: Path, model: str, expected: list[str]) -> None:
    """Fails with an illegal instruction if code meant for all CPUs was compiled for a newer one."""
    emulator = ["qemu-x86_64-static", "-cpu", model]
    output = subprocess.run([*emulator, selfcheck], check=True, capture_output=True, text=True).stdout
    assert output.split() == [*expected, "agree"]  # ternary, 8 bits, binary, 4 bits, binary by tables


# Training


@each_dtype
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
def test_codes_of_a_latent_weight_are_the_references(dtype: torch.dtype, per_row: bool) -> None:
    """Fails if ties, values far outside [-1, 1], the tail of a row, or a row's own scale are treated otherwise."""
    for n, k in [(1, 1), (3, 7), (64, 33), (700, 700)]:
        w = torch.randn(n, k)
        w[0, 0] = 1e30 if dtype != torch.float16 else 6e4
        for weight in (w.to(dtype), (grid(n, k) + 0.5).to(dtype), torch.full((n, k), 0.5, dtype=dtype)):
            codes, scale = quantizers.quantize_latent(weight, "ternary", per_row)
            expected_codes, expected_scale = reference.quantize_weight(weight, "ternary", per_row)
            assert codes.dtype == torch.int8
            assert torch.equal(codes, expected_codes)
            assert torch.equal(scale, expected_scale)
    ties = torch.tensor([[0.5, -0.5, 1.5, -1.5, 0.75, -0.25, 2.5, 0.0]])
    assert cpu_latent.ternary_codes(ties, torch.ones(1, 1)).tolist() == [[0, 0, 1, -1, 1, 0, 1, 0]]


@pytest.mark.parametrize("kind", ["int8", "int4", "ternary"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (33, 7), (100, 130), (64, 2560)])
def test_rows_are_taken_out_of_what_is_prepacked(kind: str, n: int, k: int) -> None:
    """Fails if a row's lane, the bits of its bytes or the end of its last step are others than unprepack's."""
    low, high = {"int8": (-128, 128), "int4": (-8, 8), "ternary": (-1, 2)}[kind]
    codes = torch.randint(low, high, (n, k), dtype=torch.int8)
    weight = cpu_linear.prepack(layout.pack_codes(codes, kind), n, k=k)
    for rows in (torch.arange(n), torch.randint(n, (2, 3)), torch.zeros(1, 0, dtype=torch.int64)):
        assert torch.equal(cpu_linear.unprepack_rows(weight, rows, k), codes[rows])


@each_dtype
def test_8_bit_codes_of_rows_are_the_references(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a row of zeros, a tie or the largest value is rounded otherwise than in weights, or NaN goes unseen."""
    for n, k in [(1, 1), (3, 7), (64, 33), (500, 700)]:
        weight = (torch.randn(n, k) * 10 ** torch.randn(n, 1)).to(dtype)
        weight[n // 2] = 0
        weight[0] = grid(1, k).to(dtype)
        expected_codes, expected_scale = reference.quantize_weight(weight, "int8", per_row=True)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "quantize_weight", None)
            codes, scale = ops.quantize_weight(weight, kind="int8", per_row=True)
        assert torch.equal(codes, expected_codes)
        assert torch.equal(scale, expected_scale)
        for bad in (float("nan"), float("-inf")):
            weight[n - 1, k - 1] = bad
            with pytest.raises(ValueError, match="1 NaN or Inf"):
                ops.quantize_weight(weight, kind="int8", per_row=True)


@each_dtype
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
def test_a_latent_weight_is_packed_in_one_pass_as_in_two(dtype: torch.dtype, per_row: bool) -> None:
    """Fails if rows beyond N, the ends of steps and lanes, or a row's own scale go wrong in the fused pass."""
    for n, k in [(1, 1), (3, 7), (6, 512), (9, 530), (700, 1100)]:
        weight = torch.randn(n, k).to(dtype)
        codes, scale = reference.quantize_weight(weight, "ternary", per_row)
        packed, packed_scale = ops.pack_latent(weight, per_row=per_row)
        assert torch.equal(packed, pack_ternary(codes))
        assert torch.equal(packed_scale, scale)


@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_diverged_is_refused_by_the_fused_pass(dtype: torch.dtype, bad: float) -> None:
    weight = torch.randn(5, 40).to(dtype)
    weight[3, 33] = bad
    for per_row in (False, True):
        for quantize in (ops.pack_latent, ops.quantize_weight):
            with pytest.raises(ValueError, match="1 NaN or Inf"):
                quantize(weight, per_row=per_row)


def test_the_mean_does_not_depend_on_the_number_of_threads_or_the_order() -> None:
    weight, before = torch.randn(1000, 1000), torch.get_num_threads()
    scales = set()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            scales |= {ops.pack_latent(w)[1].item() for w in (weight, weight.flip(0), weight.T.contiguous())}
            scales |= {reference.quantize_weight(w)[1].item() for w in (weight, weight.T)}
    finally:
        torch.set_num_threads(before)
    assert len(scales) == 1


def test_a_training_step_takes_the_native_codes_and_strided_weights_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    native = cpu_latent.ternary_codes
    layer = bitnet.BitLinear(8, 6)
    layer(torch.randn(2, 8))  # the first call in a process proves the kernels
    monkeypatch.setattr(cpu_latent, "ternary_codes", lambda *args: calls.append(args) or native(*args))
    layer(torch.randn(2, 8)).sum().backward()
    assert len(calls) == 1
    quantizers.quantize_latent(torch.randn(6, 8).T, "ternary", False)
    quantizers.quantize_latent(torch.randn(6, 8), "binary", False)
    quantizers.quantize_latent(torch.randn(6, 8, device="meta"), "ternary", False)
    assert len(calls) == 1
