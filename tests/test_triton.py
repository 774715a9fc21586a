"""The Triton kernels run: on a GPU where there is one, and in Triton's interpreter, on the CPU, everywhere else.

Triton decides at import which of the two it does. So where there is no GPU the tests below skip, and one test runs this
file again in a process whose TRITON_INTERPRET is set. Against two oracles: kernels/reference.py and tests/oracle.py.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import DTYPES, grid
from shapes import AWKWARD, REAL, SHAPES
from torch import Tensor

from bitnet import BitLinear, PackedBitLinear
from bitnet.kernels import backends, layout, proof, quantizers, reference
from bitnet.kernels.gpu import backend as gpu_backend
from bitnet.kernels.gpu import layout as gpu_layout
from bitnet.kernels.gpu.layout import BASE3, FOUR_BITS, INT8, TWO_BITS

triton = pytest.importorskip("triton", reason="triton is not installed")
from bitnet.kernels.gpu import configs as configs  # noqa: E402
from bitnet.kernels.gpu import floats as floats  # noqa: E402
from bitnet.kernels.gpu import groups as groups  # noqa: E402
from bitnet.kernels.gpu import linear as linear  # noqa: E402
from bitnet.kernels.gpu import quantize as quantize  # noqa: E402
from bitnet.kernels.gpu.parts import PreparedWeight  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NO_GPU = not INTERPRETED and backends.BACKENDS["triton"].missing(torch.device("cuda"), 8, False)
DEVICE = "cpu" if INTERPRETED else "cuda"


def runs(test: Callable) -> Callable:
    """For tests of kernels: on a GPU, or interpreted."""
    marked = pytest.mark.skipif(bool(NO_GPU), reason=f"{NO_GPU}; test_everything_in_the_interpreter runs this")(test)
    return marked if INTERPRETED else pytest.mark.gpu(marked)


def on_gpu(test: Callable) -> Callable:
    """For tests of what only a GPU has."""
    why = "needs a GPU; this is the interpreter" if INTERPRETED else f"needs a GPU ({NO_GPU})"
    return pytest.mark.gpu(pytest.mark.skipif(INTERPRETED or bool(NO_GPU), reason=why)(test))


each_planes = pytest.mark.parametrize("planes", [TWO_BITS, BASE3, INT8], ids=["2_bits", "base3", "int8"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
each_bits = pytest.mark.parametrize("bits", [16, 8, 4], ids=["a16", "a8", "a4"])

REALLY_ON_TRITON = quantizers.on_triton
SMALL_GPU = configs.Gpu("the interpreter", "sm_80", 2)
DOTS = [configs.Dot(64, 16, 512, 4, 2), configs.Dot(64, 32, 256, 4, 2, split=3)]


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if INTERPRETED:
        for module in (linear, groups, floats):
            monkeypatch.setattr(module, "gpu_of", lambda device: SMALL_GPU)
        monkeypatch.setattr(quantizers, "on_triton", lambda t: True)
        from triton.runtime import interpreter

        convert = interpreter._convert_float

        def rounded(data: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
            """The interpreter cuts bits off where hardware (cvt.rn, see test_triton_aot.py) rounds to nearest even."""
            if (source, target) != (triton.language.float32, triton.language.bfloat16):
                return convert(data, source, target, mode)
            return torch.from_numpy(data).bfloat16().view(torch.uint16).numpy()

        monkeypatch.setattr(interpreter, "_convert_float", rounded)
        dot = interpreter.InterpreterBuilder.create_dot

        def widened(self: Any, a: Any, b: Any, *others: Any) -> Any:
            """The interpreter multiplies bfloat16's bits, as integers; its products are those of float32."""
            if a.dtype.scalar == triton.language.bfloat16:
                wide = [(operand.data.astype(np.uint32) << 16).view(np.float32) for operand in (a, b)]
                a, b = (interpreter.TensorHandle(data, triton.language.float32) for data in wide)
            return dot(self, a, b, *others)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", widened)
    with np.errstate(all="ignore"):  # the interpreter computes in numpy, which has opinions on NaN and Inf
        yield


def weights(n: int, k: int, planes: int) -> Tensor:
    """Codes of a weight for this layout, int8 [N, K]."""
    low, high = {INT8: (-127, 128), FOUR_BITS: (-8, 8)}.get(planes, (-1, 2))
    return torch.randint(low, high, (n, k), dtype=torch.int8)


def stored(codes: Tensor, planes: int) -> Tensor:
    return layout.pack_codes(codes, {INT8: "int8", FOUR_BITS: "int4"}.get(planes, "ternary"))


def prepack(codes: Tensor, planes: int) -> Tensor:
    return gpu_layout.prepack(stored(codes, planes).to(DEVICE), len(codes), planes)


def on_device(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(DEVICE)


def check(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int, planes: int) -> None:
    """The bound layer gives the oracle's very bits."""
    n, k = codes.shape
    run = gpu_backend.bind(prepack(codes, planes), scale.to(DEVICE), on_device(bias), n, k, bits, planes)
    y = run(x.to(DEVICE))
    assert y.dtype == x.dtype
    assert torch.equal(y.cpu(), oracle.linear(x, codes.numpy().astype(np.int64), scale.numpy(), bias, bits))


# The whole of this file, without a GPU


@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_everything_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr


# Layouts: plain torch, anywhere


@pytest.mark.parametrize("planes", [TWO_BITS, BASE3, INT8, FOUR_BITS], ids=["2_bits", "base3", "int8", "int4"])
@pytest.mark.parametrize(("n", "k"), sorted({(n, k) for _, n, k in SHAPES}))
def test_prepacked_bytes_are_where_the_layout_says_and_come_back(planes: int, n: int, k: int) -> None:
    codes = weights(n, k, planes)
    packed = gpu_layout.prepack(stored(codes, planes), n, planes)
    assert tuple(packed.shape) == gpu_layout.own_shape(n, k, planes)
    assert torch.equal(gpu_layout.unprepack(packed, n, k, planes), codes)
    packed = packed.flatten(1)
    assert packed.shape[1] == gpu_layout.row_bytes(k, planes)
    for feature in {0, k // 2, k - 1}:
        block, plane, j = feature // (32 * planes), feature // 32 % planes, feature % 32
        byte = packed[:, 32 * block + j].int()
        digit = {
            INT8: byte,
            TWO_BITS: (byte >> 2 * plane & 3) - 1,
            FOUR_BITS: (byte >> 4 * plane & 15) - 8,
            BASE3: (byte * 3**plane % 256 * 3 >> 8) - 1,  # the next digit of a fraction of 256
        }[planes]
        assert digit.tolist() == codes[:, feature].tolist()


# Products


@runs
@each_planes
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_accumulators_are_exact_and_the_same_again(planes: int, m: int, n: int, k: int) -> None:
    """In one program a tile and in three, whatever order these arrive in."""
    q, codes = torch.randint(-128, 128, (m, k), dtype=torch.int8), weights(n, k, planes)
    packed = prepack(codes, planes)
    for config in DOTS:
        for _ in range(1 if INTERPRETED else 3):
            found = linear.int_matmul(q.to(DEVICE), packed, n, planes, config)
            assert found.dtype == torch.int32
            assert torch.equal(found.cpu(), reference.int_matmul(q, codes))


@runs
@pytest.mark.parametrize("planes", [TWO_BITS, INT8], ids=["2_bits", "int8"])
def test_accumulators_are_exact_at_the_extremes(planes: int) -> None:
    """Sums beyond 2^24, where float32 stops counting, and a token's sum of codes as large as it gets."""
    k = 70_001
    q = torch.full((2, k), -128, dtype=torch.int8)
    q[1, ::2] = 127
    codes = torch.ones(3, k, dtype=torch.int8)
    codes[1] = -1
    codes[2, 5] = 0
    config = configs.Dot(32, 16, 1024, 4, 2, split=2)
    found = linear.int_matmul(q.to(DEVICE), prepack(codes, planes), 3, planes, config)
    assert found.tolist() == (q.long() @ codes.long().T).tolist()


@runs
@each_planes
@each_bits
@each_dtype
@pytest.mark.parametrize(("m", "n", "k"), AWKWARD[1:5])
def test_output_has_the_oracles_bits(planes: int, bits: int, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, codes = grid(m, k).to(dtype), weights(n, k, planes)
    check(x, codes, torch.rand(n) + 0.1, torch.randn(n).to(dtype), bits, planes)


@runs
@each_planes
@pytest.mark.parametrize(("m", "n", "k"), [AWKWARD[0], *AWKWARD[5:], REAL])
def test_output_has_the_oracles_bits_at_larger_shapes(planes: int, m: int, n: int, k: int) -> None:
    check(grid(m, k).bfloat16(), weights(n, k, planes), torch.rand(1) + 0.1, None, 8, planes)


@runs
@each_planes
@pytest.mark.parametrize("tokens", [1, 2, 3, 4])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_few_tokens_take_the_integer_units_exactly(planes: int, tokens: int, quantized: bool) -> None:
    """The GEMV with more rows and tokens than there are, from floats and from codes."""
    n, k = 11, 200
    codes, x, scale = weights(n, k, planes), torch.randn(tokens, k), torch.rand(n) + 0.1
    layer = PreparedWeight(prepack(codes, planes), scale.to(DEVICE), None, n, k, planes)
    y = torch.empty(tokens, n, device=DEVICE)
    q, s = reference.quantize_activation(x)
    given = (q.to(DEVICE), s.to(DEVICE)) if quantized else (x.to(DEVICE), None)
    linear.multiply(configs.Gemv(4, 2, 4), layer, *given, y)
    assert torch.equal(y.cpu(), reference.ternary_linear(x, codes, scale))


@runs
@pytest.mark.parametrize(
    ("planes", "bits", "share", "n", "k", "per_row", "dtype"),
    [
        (TWO_BITS, 8, 3, 11, 200, True, torch.bfloat16),
        (TWO_BITS, 16, 2, 5, 330, False, torch.float32),
        (BASE3, 8, 1, 6, 170, False, torch.float64),
        (INT8, 8, 2, 70, 40, True, torch.float16),
    ],
)
def test_layers_chosen_from_a_stack_are_those_layers(
    planes: int, bits: int, share: int, n: int, k: int, per_row: bool, dtype: torch.dtype
) -> None:
    codes = [weights(n, k, planes) for _ in range(3)]
    scale, bias = torch.rand(3, n if per_row else 1) + 0.1, torch.randn(3, n)
    x, chosen = torch.randn(2, k + 8)[:, :k].to(dtype), torch.tensor([2, 0, 2, 1, 0, 2])[: 2 * share]
    stack = torch.stack([prepack(each, planes) for each in codes])
    for shifts in (None, bias):
        run = gpu_backend.bind_stack(stack, scale.to(DEVICE), on_device(shifts), n, k, bits, planes)
        assert run is not None
        y = run(x.to(DEVICE), chosen.to(DEVICE)).cpu()
        assert y.dtype == dtype
        for i, e in enumerate(chosen):
            one = x[i // share][None]
            one = one.float() if dtype == torch.float64 else one
            shift = None if shifts is None else shifts[e]
            assert torch.equal(y[i], reference.ternary_linear(one, codes[e], scale[e], shift, bits)[0].to(dtype))


def test_a_stack_without_such_a_kernel_is_left_alone() -> None:
    weight = torch.zeros(2, 5, 32, dtype=torch.uint8)
    assert gpu_backend.bind_stack(weight, torch.ones(2, 1), None, 5, 40, 4, TWO_BITS) is None
    with pytest.raises(ValueError, match="5 x 300 needs"):
        gpu_backend.bind_stack(weight, torch.ones(2, 1), None, 5, 300, 8, TWO_BITS)


@runs
def test_rows_too_long_for_the_registers_are_not_chosen_from_a_stack() -> None:
    stack = torch.zeros(1, 3, gpu_layout.row_bytes(40_000, TWO_BITS), dtype=torch.uint8, device=DEVICE)
    assert gpu_backend.bind_stack(stack, torch.ones(1, 1, device=DEVICE), None, 3, 40_000, 8, TWO_BITS) is None


@runs
@pytest.mark.parametrize("planes", [TWO_BITS, BASE3], ids=["2_bits", "base3"])
def test_unpacking_first_changes_nothing(planes: int) -> None:
    n, k = 37, 330
    codes, x, scale = weights(n, k, planes), torch.randn(5, k), torch.rand(1) + 0.1
    layer = PreparedWeight(prepack(codes, planes), scale.to(DEVICE), None, n, k, planes)
    assert torch.equal(linear.unpack(layer).cpu(), codes)
    y = torch.empty(5, n, device=DEVICE)
    linear.multiply(configs.Dot(32, 16, 128, 4, 2, dense=True), layer, x.to(DEVICE), None, y)
    assert torch.equal(y.cpu(), reference.ternary_linear(x, codes, scale))


STRIDED: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: grid(12, 6).T,
    "every_other_column": lambda: grid(6, 24)[:, ::2],
    "every_other_row": lambda: grid(12, 12)[::2],
    "expanded": lambda: grid(1, 12).expand(6, 12),
    "three_dims_permuted": lambda: grid(3, 2, 12).transpose(0, 1),
    "no_rows_of_three": lambda: grid(2, 0, 12),
    "vector": lambda: grid(12),
    "float64": lambda: grid(2, 12).double(),
}


@runs
@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED.keys())
def test_strides_and_leading_dims_do_not_matter(make: Callable[[], Tensor]) -> None:
    check(make(), weights(5, 12, TWO_BITS), torch.rand(5) + 0.1, torch.randn(5), 8, TWO_BITS)


@runs
@pytest.mark.parametrize("m", [2, 5], ids=["gemv", "dot"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_or_inf_stays_in_its_token(bad: float, m: int) -> None:
    x, codes, scale = grid(m, 12), weights(6, 12, TWO_BITS), torch.ones(1)
    x[1, 7] = bad
    run = gpu_backend.bind(prepack(codes, TWO_BITS), scale.to(DEVICE), None, 6, 12, 8, TWO_BITS)
    y = run(x.to(DEVICE)).cpu()
    assert y[1].isnan().all()
    others = [i for i in range(m) if i != 1]
    assert torch.equal(y[others], oracle.linear(x[others], codes.numpy().astype(np.int64), scale.numpy(), None, 8))


# Quantizers


@runs
@each_dtype
def test_every_bit_pattern_of_an_activation_has_the_references_code(dtype: torch.dtype) -> None:
    """Subnormal numbers, NaN, Inf and the largest included, each beside tokens of all sizes; of float32 a sample."""
    if dtype == torch.float32:
        x = torch.randint(-(2**31), 2**31 - 1, (64, 200), dtype=torch.int32).view(torch.float32)
        x[32:] *= 1e-30  # large values hide what becomes of small ones
        x[:8, 0], x[:8, 1:] = torch.tensor(3e38), x[:8, 1:].nan_to_num(0, 0, 0)
    else:
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    q, s, sums = quantize.quantize(x.to(DEVICE), sums=True)
    expected_q, expected_s = reference.quantize_activation(x)
    assert s is not None
    assert sums is not None
    assert torch.equal(s.cpu().view(torch.int32), expected_s.view(torch.int32)) or torch.equal(
        s.cpu().nan_to_num(-1), expected_s.nan_to_num(-1)
    )
    assert torch.equal(q.cpu(), expected_q)
    assert sums.tolist() == expected_q.sum(1).tolist()


@runs
def test_activation_ties_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 126.5]])  # s = 1 exactly
    assert quantize.quantize_activation(x.to(DEVICE))[0].tolist() == [[127, 0, 0, 2, -2, 2, -2, 126]]


@runs
def test_rows_longer_than_a_block_are_quantized_whole() -> None:
    x = torch.randn(2, 9000)
    x[0, -1], x[1, 4096] = 9, -9
    q, s = quantize.quantize_activation(x.to(DEVICE))
    for found, expected in zip((q, s), reference.quantize_activation(x), strict=True):
        assert torch.equal(found.cpu(), expected)
    found = quantize.dequantize(q, s, torch.bfloat16)
    assert torch.equal(found.cpu(), (q.cpu() / s.cpu()).bfloat16())


@runs
@each_dtype
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
def test_codes_of_a_latent_weight_are_the_references(dtype: torch.dtype, per_row: bool) -> None:
    w = grid(33, 130).to(dtype)  # sums of these are exact in any order, so that the means agree
    w[:, :8] = torch.tensor([0.5, -0.5, 1.5, -1.5, 3e4, -3e4, 2.0**-14, 0]).to(dtype)
    for view in (w, w[::2], w[:, ::3], w.T):
        inv = reference.inverse_scale(view, "ternary", per_row)
        sums = quantize.magnitudes(view.to(DEVICE)).cpu()
        means = sums / view.shape[1] if per_row else sums.sum() / view.numel()
        assert torch.equal(reference.inverse_of_mean(means), inv)
        found = quantize.ternary_codes(view.to(DEVICE), inv.to(DEVICE))
        assert torch.equal(found.cpu(), reference.quantize_weight(view, "ternary", per_row)[0])


# Training


@runs
@each_dtype
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("m", [0, 7])
def test_the_training_product_has_the_references_bits(dtype: torch.dtype, per_row: bool, m: int) -> None:
    n, k = 30, 130
    q, codes = torch.randint(-128, 128, (m, k), dtype=torch.int8), weights(n, k, TWO_BITS)
    s, scale = torch.rand(m, 1) + 0.1, torch.rand(n if per_row else 1) + 0.1
    for bias in (None, torch.randn(n)):
        args = (q, s, codes, scale, bias)
        y = torch.ops.bitnet.gpu_int_linear(*map(on_device, args), dtype)
        assert torch.equal(y.cpu(), reference.rescale(reference.int_matmul(q, codes), s, scale, bias, dtype))


@runs
@each_dtype
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
def test_a_training_step_equals_the_reference_path(
    dtype: torch.dtype, per_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients, bit for bit: the same float products on the same operands."""
    layer = BitLinear(40, 24, device=DEVICE, dtype=dtype, per_row=per_row)
    x, gy = grid(2, 9, 40).to(DEVICE, dtype), grid(2, 9, 24).to(DEVICE, dtype)
    called = []
    multiply = linear._launch_dot
    monkeypatch.setattr(linear, "_launch_dot", lambda *args: called.append(1) or multiply(*args))

    def step() -> list[Tensor]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(gy)
        return [y.detach(), *(t.grad for t in (leaf, layer.weight, layer.bias))]

    mine = step()
    assert called
    monkeypatch.setattr(quantizers, "on_triton", lambda t: False)
    for found, expected in zip(mine, step(), strict=True):
        assert torch.equal(found, expected)


SAMPLES: dict[str, Callable[[], tuple]] = {
    "gpu_magnitudes": lambda: (torch.randn(6, 40),),
    "gpu_ternary_codes": lambda: (torch.randn(6, 40), torch.ones(6, 1)),
    "gpu_dequantize": lambda: (weights(3, 40, INT8), torch.ones(3, 1), torch.bfloat16),
    "gpu_int_linear": lambda: (
        weights(3, 40, INT8), torch.ones(3, 1), weights(6, 40, INT8), torch.ones(6), torch.ones(6), torch.float16,
    ),
    "quantize_activation": lambda: (torch.randn(3, 40), 8),
    "ternary_linear": lambda: (
        torch.randn(3, 40), prepack(weights(6, 40, TWO_BITS), TWO_BITS), torch.ones(1), None, 6, 8, "triton",
    ),
}  # fmt: skip


@runs
@pytest.mark.parametrize("name", SAMPLES)
def test_operators_keep_torchs_rules(name: str) -> None:
    args = [on_device(value) if isinstance(value, Tensor) else value for value in SAMPLES[name]()]
    torch.library.opcheck(getattr(torch.ops.bitnet, name).default, args)


@pytest.mark.parametrize("name", SAMPLES)
def test_operators_know_their_shapes_without_data_on_cuda(name: str) -> None:
    """What torch.compile sees: fake tensors on a GPU that need not exist."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    args = [value.cpu() if isinstance(value, Tensor) else value for value in FAKE_SAMPLES[name]]
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [torch.empty_like(a, device="cuda") if isinstance(a, Tensor) else a for a in args]
        found = getattr(torch.ops.bitnet, name)(*fakes)
    for one, shape in zip(found if isinstance(found, tuple) else [found], OUTPUTS[name], strict=True):
        assert one.is_cuda
        assert (list(one.shape), one.dtype) == shape


PACKED = torch.zeros(6, 32, dtype=torch.uint8)
FAKE_SAMPLES: dict[str, tuple] = {
    name: make() for name, make in SAMPLES.items() if name != "ternary_linear"
} | {"ternary_linear": (torch.randn(3, 40), PACKED, torch.ones(1), None, 6, 8, "triton")}  # fmt: skip
OUTPUTS: dict[str, list[tuple[list[int], torch.dtype]]] = {
    "gpu_magnitudes": [([6], torch.float64)],
    "gpu_ternary_codes": [([6, 40], torch.int8)],
    "gpu_dequantize": [([3, 40], torch.bfloat16)],
    "gpu_int_linear": [([3, 6], torch.float16)],
    "quantize_activation": [([3, 40], torch.int8), ([3, 1], torch.float32)],
    "ternary_linear": [([3, 6], torch.float32)],
}


def test_the_training_forward_on_cuda_compiles_without_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced whole, on fake tensors of a GPU that need not exist, through our operators. Gradients need a real one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(quantizers, "_triton_is_chosen", lambda: True)
    monkeypatch.setattr(quantizers, "on_triton", REALLY_ON_TRITON)
    seen: set[str] = set()

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        parts = [part for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
        seen.update(str(node.target) for part in parts for node in part.graph.nodes)
        return lambda *inputs: [torch.empty(3, 24, device="cuda", dtype=torch.bfloat16)]

    torch._dynamo.reset()
    with FakeTensorMode(), torch.no_grad():
        layer = BitLinear(40, 24, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(torch.empty(24, 40, device="cuda", dtype=torch.bfloat16))
        x = torch.empty(3, 40, device="cuda", dtype=torch.bfloat16)
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        y = compiled(x)
        assert (y.is_cuda, y.dtype, list(y.shape)) == (True, torch.bfloat16, [3, 24])
    torch._dynamo.reset()
    assert {f"bitnet.{name}" for name in ("gpu_magnitudes", "gpu_ternary_codes", "gpu_int_linear")} <= seen


# Choosing


def proof_of(planes: int) -> str | None:
    like = backends.BACKENDS["triton-base3" if planes == BASE3 else "triton"]
    bind = partial(gpu_backend.bind, planes=planes)
    return proof.fault(
        proof.layers(
            lambda packed, n, k: gpu_layout.prepack(packed, n, planes),
            bind,
            like.weights,
            like.groups,
            like.widths,
            partial(gpu_backend.bind_stack, planes=planes),
        ),
        torch.device(DEVICE),
    )


@runs
@pytest.mark.parametrize(
    "planes",
    [
        pytest.param(TWO_BITS, marks=[pytest.mark.slow] if INTERPRETED else [], id="2_bits"),  # a minute
        pytest.param(BASE3, id="base3"),
    ],
)
def test_right_kernels_are_proved(planes: int) -> None:
    assert proof_of(planes) is None
    assert proof.fault(backends._triton_quantizers, torch.device(DEVICE)) is None


@runs
@pytest.mark.parametrize("kernel", ["_launch_gemv", "_launch_dot"])
def test_a_wrong_kernel_is_found_out(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the kernel of one token, or that of many, goes without proof."""
    launch = getattr(linear, kernel)

    def wrong(*args: Any) -> None:
        launch(*args)
        y = next(arg for arg in reversed(args) if isinstance(arg, Tensor) and arg.is_floating_point())
        y.view(-1)[-1] += 1

    monkeypatch.setattr(linear, kernel, wrong)
    assert "1 of 70 values differ" in str(proof_of(TWO_BITS)) if kernel == "_launch_gemv" else proof_of(TWO_BITS)


@runs
def test_a_wrong_choice_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    choosing = linear.choosing

    def wrong(*args: Any) -> Any:
        run = choosing(*args)
        return lambda x, chosen: run(x, chosen.flip(0))

    def fault() -> str | None:
        bind_stack = partial(gpu_backend.bind_stack, planes=TWO_BITS)

        def prepacked(packed: Tensor, n: int, k: int) -> Tensor:
            return gpu_layout.prepack(packed, n, TWO_BITS)

        results = proof.layers(prepacked, gpu_backend.bind, ("ternary",), (False,), (8,), bind_stack)
        return proof.fault(results, torch.device(DEVICE))

    monkeypatch.setattr(proof, "TOKENS", ())
    assert fault() is None
    monkeypatch.setattr(linear, "choosing", wrong)
    assert "ternary weights with [70] scales chosen from a stack times 8-bit tokens" in str(fault())


@runs
@pytest.mark.parametrize("name", ["quantize_activation", "magnitudes", "ternary_codes", "dequantize"])
def test_a_wrong_quantizer_is_found_out(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(quantize, name)

    def wrong(*args: Any) -> Any:
        result = right(*args)
        (result[0] if isinstance(result, tuple) else result)[-1] += 1
        return result

    monkeypatch.setattr(quantize, name, wrong)
    assert "differ from the definition" in str(proof.fault(backends._triton_quantizers, torch.device(DEVICE)))


def test_auto_takes_triton_on_cuda_and_never_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    backends._choose.cache_clear()
    monkeypatch.setattr(backends, "_fault", lambda *asked: None)
    cuda = torch.device("cuda")
    assert "triton" not in backends.choose_backend("auto", torch.device("cpu"))
    with pytest.raises(RuntimeError, match="cannot run on cpu: it runs on CUDA and ROCm GPUs; on cpu choose 'auto'"):
        backends.choose_backend("triton", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert backends.choose_backend("auto", cuda) == "triton"
    assert backends.choose_backend("auto", cuda, weight_bits=1.6) == "triton-base3"
    for bits in (16, 8, 4, None):
        assert backends.choose_backend("auto", cuda, activation_bits=bits) == "triton"
        assert backends.choose_backend("auto", cuda, activation_bits=bits, groups=True) == "triton"
        assert backends.choose_backend("auto", cuda, activation_bits=bits, weight_bits=1.6) == "triton-base3"
    with pytest.raises(RuntimeError, match="hold no whole groups; choose weight_bits=2"):
        backends.choose_backend("triton-base3", cuda, groups=True)
    with pytest.warns(UserWarning, match="hold no whole groups; weights keep the form of backend 'triton'"):
        assert backends.choose_backend("auto", cuda, weight_bits=1.6, groups=True) == "triton"
    for name in ("get_device_capability", "is_available"):
        backends._choose.cache_clear()
        monkeypatch.setattr(torch.cuda, name, {"is_available": lambda: False}.get(name, lambda device=None: (7, 5)))
        why = "torch sees no GPU" if name == "is_available" else "needs compute capability 8.0.*this GPU has 7.5"
        with pytest.raises(RuntimeError, match=why):
            backends.choose_backend("triton", cuda)
        assert backends.choose_backend("auto", cuda) == "torch"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_backend, "_triton_version", lambda: None)
    backends._choose.cache_clear()
    with pytest.raises(RuntimeError, match="triton is not installed; pip install triton"):
        backends.choose_backend("triton", cuda)
    monkeypatch.undo()
    backends._choose.cache_clear()


@pytest.mark.parametrize(("n", "k"), [(65, 40), (64, 600), (63, 40)], ids=["row_more", "block_more", "row_less"])
@each_planes
def test_a_layer_of_another_size_than_its_weight_is_refused(planes: int, n: int, k: int) -> None:
    codes = weights(64, 40, planes)
    weight = gpu_layout.prepack(codes if planes == INT8 else layout.pack_ternary(codes), 64, planes)
    with pytest.raises(ValueError, match="weight is prepacked as"):
        gpu_backend.bind(weight, torch.ones(1), None, n, k, 8, planes)
    for scale, bias in [(torch.ones(63), None), (torch.ones(1), torch.ones(65))]:
        with pytest.raises(ValueError, match="do not fit 64 rows"):
            gpu_backend.bind(weight, scale, bias, 64, 40, 8, planes)


@runs
def test_x_on_another_device_is_refused() -> None:
    run = gpu_backend.bind(prepack(weights(4, 8, TWO_BITS), TWO_BITS), torch.ones(1, device=DEVICE), None, 4, 8, 8, 4)
    with pytest.raises(ValueError, match=r"x is on meta, but this layer is on .*move one of them"):
        run(torch.empty(2, 8, device="meta"))


# What only a GPU has

REAL_SHAPES = [
    (1, 4096, 14336),
    (4, 2560, 2560),
    (16, 14336, 4096),
    (64, 4096, 4096),
    (300, 6912, 2560),
    (4096, 4096, 4096),
]


def packed_layer(n: int, k: int, **options: Any) -> PackedBitLinear:
    """A layer with random weights on the GPU."""
    layer = PackedBitLinear(k, n, device="cuda", dtype=torch.bfloat16, **options)
    if layer.weight.dtype == torch.int8:
        layer.weight.random_(-127, 128)
    else:
        layer.weight.copy_(layout.pack_ternary(torch.randint(-1, 2, (n, k), dtype=torch.int8, device="cuda")))
    layer.weight_scale.uniform_(0.1, 1)
    layer.bias.normal_()
    return layer


@on_gpu
@pytest.mark.parametrize("options", [{}, {"weight_bits": 1.6}, {"weights": "int8", "per_row": True}], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), REAL_SHAPES)
def test_real_layers_have_the_references_bits_twice(m: int, n: int, k: int, options: dict[str, Any]) -> None:
    layer = packed_layer(n, k, **options)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y = layer(x)
        assert layer.prepack()[1] == ("triton-base3" if "weight_bits" in options else "triton")
        assert torch.equal(y, reference.ternary_linear(x, layer.codes(), layer.weight_scale, layer.bias))
        for _ in range(3):
            assert torch.equal(y, layer(x))


@on_gpu
def test_every_candidate_configuration_is_exact() -> None:
    gpu, planes = configs.gpu_of(torch.device("cuda")), TWO_BITS
    n, k = 1000, 4160
    codes = weights(n, k, planes)
    layer = PreparedWeight(prepack(codes, planes), torch.rand(n, device="cuda") + 0.1, None, n, k, planes)
    for m in (1, 16, 700):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        expected = reference.ternary_linear(x, codes.cuda(), layer.scale)
        for config in configs.candidates(gpu, m, n, k, planes):
            y = torch.empty_like(expected)
            try:
                linear.multiply(config, layer, x, None, y)
            except triton.runtime.errors.OutOfResources:
                continue
            assert torch.equal(y, expected), config


@on_gpu
@pytest.mark.parametrize("m", [1, 16, 300])
def test_a_captured_layer_follows_its_input(m: int) -> None:
    layer = packed_layer(1024, 4096)
    x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(y, reference.ternary_linear(x, layer.codes(), layer.weight_scale, layer.bias))


@on_gpu
def test_streams_do_not_share_scratch() -> None:
    layer = packed_layer(512, 8192)
    xs = [torch.randn(16, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    streams = [torch.cuda.Stream() for _ in xs]
    with torch.no_grad():
        expected = [layer(x) for x in xs]
        torch.cuda.synchronize()
        found: list[list[Tensor]] = [[] for _ in xs]
        for _ in range(50):
            for stream, x, ys in zip(streams, xs, found, strict=True):
                with torch.cuda.stream(stream):
                    ys.append(layer(x))
        torch.cuda.synchronize()
    for ys, want in zip(found, expected, strict=True):
        assert all(torch.equal(y, want) for y in ys)


@on_gpu
@pytest.mark.parametrize("m", [1, 16])
def test_a_compiled_layer_is_one_graph_and_equals_eager(m: int) -> None:
    layer = packed_layer(512, 1024)
    x = torch.randn(m, 1024, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))
    torch._dynamo.reset()


@on_gpu
def test_training_is_captured_and_compiled() -> None:
    """No host synchronisation in a step (a capture would fail), and inductor keeps the accumulators."""
    layer = BitLinear(512, 256, device="cuda", dtype=torch.bfloat16)
    layer.weight.data.copy_(grid(256, 512))  # sums are exact: a compiler may reorder them
    x, gy = torch.randn(64, 512, device="cuda").bfloat16(), torch.randn(64, 256, device="cuda").bfloat16()

    def step(layer: Callable) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        return [y.detach(), *torch.autograd.grad(y, (leaf, weight), gy)]

    weight = layer.weight
    expected = step(layer)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step(layer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(layer)
    graph.replay()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    torch._dynamo.reset()
    compiled = step(torch.compile(layer, fullgraph=True))
    assert torch.equal(compiled[0], expected[0])
    for one, other in zip(compiled[1:], expected[1:], strict=True):
        assert (one - other).float().norm() <= 2**-7 * other.float().norm()  # bf16 products of other tilings
    torch._dynamo.reset()


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("m", [1, 16])
def test_a_layer_on_the_second_gpu_runs_there(m: int) -> None:
    layer = packed_layer(512, 1024).to("cuda:1")
    x = torch.randn(m, 1024, device="cuda:1", dtype=torch.bfloat16)
    with torch.no_grad():
        y = layer(x)
    assert y.device == torch.device("cuda:1")
    assert torch.equal(y, reference.ternary_linear(x, layer.codes(), layer.weight_scale, layer.bias))


@on_gpu
@pytest.mark.parametrize("m", [1, 16])
def test_offsets_beyond_two_billion_bytes_are_not_cut(m: int) -> None:
    """int8 [300000, 8192]: 2.46e9 bytes. The last rows differ from what 32-bit offsets would read."""
    n, k = 300_000, 8192
    codes = torch.zeros(n, k, dtype=torch.int8, device="cuda")
    codes[-3:] = torch.randint(-127, 128, (3, k), dtype=torch.int8, device="cuda")
    run = gpu_backend.bind(codes, torch.ones(1, device="cuda"), None, n, k, 8, INT8)
    x = torch.randn(m, k, device="cuda")
    y = run(x)
    assert torch.equal(y[:, -3:], reference.ternary_linear(x, codes[-3:], torch.ones(1, device="cuda")))
    assert not y[:, :-3].any()


# Tuning


@pytest.mark.skipif(not INTERPRETED, reason="test_everything_in_the_interpreter runs this")
def test_tuning_measures_checks_and_keeps_the_fastest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitnet import tuning as tune

    def seconds(calls: list[Callable], rounds: int) -> Tensor:
        calls[0]()
        timed.append(len(calls))
        return torch.full((3,), 1e-3 / len(timed), dtype=torch.float64)  # later candidates are faster

    timed: list[int] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gpu_backend, "_triton_version", lambda: None)
    with pytest.raises(RuntimeError, match="there is nothing to tune here"):
        tune.tune(["12x40"], [1], device="cpu")
    cache = type("properties", (), {"L2_cache_size": 100})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: cache)
    monkeypatch.setattr(
        backends, "BACKENDS", {"triton": backends.BACKENDS["triton"]._replace(missing=lambda *args: None)}
    )
    monkeypatch.setattr(configs, "gpu_of", lambda device: SMALL_GPU)
    monkeypatch.setattr(tune, "graph_seconds", seconds)
    configs.tuned.cache_clear()
    path = tune.tune(["12x40", "12x40"], [1, 9, 16], device="cpu")
    assert path == tmp_path / "bitnet" / "triton.json"
    for m in (1, 16):
        best = configs.candidates(SMALL_GPU, m, 12, 40, TWO_BITS)[-1]
        assert configs.choose(SMALL_GPU, m, 12, 40, TWO_BITS) == best
        assert f"12 x 40, up to {m} tokens" in capsys.readouterr().out or m > 1
    multiply = linear.multiply
    monkeypatch.setattr(linear, "multiply", lambda c, layer, x, s, y: (multiply(c, layer, x, s, y), y.add_(1)))
    with pytest.raises(RuntimeError, match="gives wrong results for 1 tokens and 12 x 40 weights"):
        tune.tune(["12x40"], [1], device="cpu")
    configs.tuned.cache_clear()


@runs
@each_dtype
@pytest.mark.parametrize(("k", "block"), [(6, 2), (96, 32), (8192, 8192), (3 * 128, 128)])
def test_the_hadamard_transform_has_the_definitions_bits(dtype: torch.dtype, k: int, block: int) -> None:
    from bitnet.kernels.gpu import rotate

    x = torch.randn(2, 3, k).to(DEVICE, dtype)
    signs = (torch.randint(0, 2, (k,), dtype=torch.int8) * 2 - 1).to(DEVICE)
    for view in (x, x.transpose(0, 1), x[:0]):
        for s in (None, signs):
            assert torch.equal(rotate.hadamard(view, block, s), reference.hadamard(view, block, s))
