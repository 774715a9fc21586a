"""The Triton kernels for scales of groups, for 16-bit and for float activations: on a GPU, or interpreted.

As in test_triton.py, which has the harness. Bits are compared with tests/oracle.py and kernels/reference.py; float
activations with the exact product in float64, within the bound that kernels/gpu/floats.py states.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import test_triton as harness
import torch
from oracle import DTYPES, grid
from shapes import AWKWARD
from torch import Tensor

from bitnet import BitLinear, PackedBitLinear
from bitnet.kernels import backends, layout, proof, quantizers, reference
from bitnet.kernels.gpu import backend as gpu_backend
from bitnet.kernels.gpu.layout import BASE3, FOUR_BITS, INT8, TWO_BITS

triton = pytest.importorskip("triton", reason="triton is not installed")
from test_triton import DEVICE, INTERPRETED, _interpreter, each_dtype, on_device, on_gpu, prepack, runs  # noqa: E402

from bitnet.kernels.gpu import configs as configs  # noqa: E402
from bitnet.kernels.gpu import floats as floats  # noqa: E402
from bitnet.kernels.gpu import groups as groups  # noqa: E402
from bitnet.kernels.gpu import quantize as quantize  # noqa: E402
from bitnet.kernels.gpu.parts import PreparedWeight  # noqa: E402

__all__ = ["_interpreter"]  # a fixture of all tests here

SIZES = reference.GROUP_SIZES
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
# one group that is shorter, several, a block and a span of features begun, two spans and a bit
WIDE = [(m, n, k) for m, n, k in AWKWARD if m] + [(2, 6, 300), (1, 3, 1100), (4, 5, 2081)]
KINDS = ("ternary", "binary")

each_size = pytest.mark.parametrize("size", SIZES)
each_kind = pytest.mark.parametrize("kind", KINDS)


def codes_of(kind: str, n: int, k: int) -> Tensor:
    """int8 [N, K]"""
    return torch.randint(0, 2, (n, k), dtype=torch.int8) * 2 - 1 if kind == "binary" else torch.randint(
        -1, 2, (n, k), dtype=torch.int8
    )  # fmt: skip


def scales_of(n: int, k: int, size: int | str | None) -> Tensor:
    """float16 [N, G] for a size of groups; float32 [N] for "row", [1] for None."""
    if isinstance(size, int):
        return (torch.rand(n, -(-k // size)) + 0.01).half()
    return torch.rand(n if size == "row" else 1) + 0.1


def bound(codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int | None, planes: int = TWO_BITS) -> Callable:
    n, k = codes.shape
    args = prepack(codes, planes), scale.to(DEVICE), on_device(bias), n, k, bits, planes
    return gpu_backend.bind(*args)


@pytest.mark.slow  # minutes
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_everything_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr


# Integers: the very bits


@runs
@each_size
@each_kind
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_groups_have_the_oracles_bits(size: int, kind: str, bits: int) -> None:
    for i, (m, n, k) in enumerate(WIDE):
        dtype = DTYPES[i % 3]
        x, codes, scale = torch.randn(m, k).to(dtype), codes_of(kind, n, k), scales_of(n, k, size)
        size_of = reference.size_of_groups(k, scale.shape[1])  # of one group all sizes are the same
        bias = torch.randn(n).to(dtype) if i % 2 else None
        if bits == 4:
            x = grid(m, k).to(dtype)  # whose mean is exact
        y = bound(codes, scale, bias, bits)(x.to(DEVICE))
        assert y.dtype == dtype
        assert torch.equal(
            y.cpu(), oracle.grouped(x, codes.numpy().astype(np.int64), scale.numpy(), size_of, bias, bits)
        )


@runs
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_4_bit_weights_have_the_oracles_bits(bits: int) -> None:
    for i, (m, n, k) in enumerate(WIDE):
        dtype, scale = DTYPES[i % 3], scales_of(n, k, 32) * (1 - 2 * (i % 2))  # scales of Q4_0 may be negative
        x, codes = torch.randn(m, k).to(dtype), torch.randint(-8, 8, (n, k), dtype=torch.int8)
        bias = torch.randn(n).to(dtype) if i % 2 else None
        if bits == 4:
            x = grid(m, k).to(dtype)
        y = bound(codes, scale, bias, bits, FOUR_BITS)(x.to(DEVICE))
        assert torch.equal(y.cpu(), oracle.grouped(x, codes.numpy().astype(np.int64), scale.numpy(), 32, bias, bits))


@runs
@pytest.mark.parametrize(
    ("planes", "bits", "size", "n", "k", "dtype"),
    [
        (TWO_BITS, 8, 128, 70, 300, torch.bfloat16),
        (TWO_BITS, 16, 32, 6, 2100, torch.float32),
        (TWO_BITS, None, None, 70, 1500, torch.bfloat16),
        (BASE3, None, "row", 5, 170, torch.float16),
        (INT8, None, "row", 66, 40, torch.float32),
        (TWO_BITS, None, 64, 3, 2100, torch.float32),
    ],
)
def test_layers_chosen_from_a_stack_are_those_layers(
    planes: int, bits: int | None, size: Any, n: int, k: int, dtype: torch.dtype
) -> None:
    """Integers to the bit, floats within the stated bound."""
    codes = [codes_of("ternary", n, k) for _ in range(3)]
    if isinstance(size, int):
        scale = torch.stack([scales_of(n, k, size) for _ in codes])
    else:
        scale = torch.rand(3, 1 if size is None else n) + 0.1
    stack = torch.stack([prepack(each, planes) for each in codes])
    x, chosen, bias = torch.randn(2, k + 3)[:, :k].to(dtype), [2, 0, 2, 1], torch.randn(3, n)
    for shifts in (None, bias):
        on_device = None if shifts is None else shifts.to(DEVICE)
        run = gpu_backend.bind_stack(stack, scale.to(DEVICE), on_device, n, k, bits, planes)
        assert run is not None
        y = run(x.to(DEVICE), torch.tensor(chosen, device=DEVICE)).cpu()
        assert y.dtype == dtype
        for i, e in enumerate(chosen):
            one, shift = x[i // 2][None], None if shifts is None else shifts[e]
            if bits is not None:
                expected = reference.ternary_linear(one, codes[e], scale[e], shift, bits)
                assert torch.equal(y[i], expected[0])
            else:
                weight = reference.dequantize_weight(codes[e], scale[e]).double()
                exact = torch.nn.functional.linear(one.double(), weight, None if shift is None else shift.double())
                sizes = one.double().abs() @ weight.abs().T + (0 if shift is None else shift.double().abs())
                allowed = 2 * ROUNDING[dtype] * exact.abs() + (k + 2) * 2**-22 * sizes  # see the tests of floats below
                assert ((y[i].double() - exact[0]).abs() <= allowed[0]).all()


@runs
@pytest.mark.parametrize("limbs", [1, 2])
@pytest.mark.parametrize(
    ("planes", "size"), [(FOUR_BITS, 32), *((planes, size) for planes in (TWO_BITS, INT8) for size in SIZES)]
)
def test_any_number_of_programs_adds_spans_in_the_same_order(size: int, limbs: int, planes: int) -> None:
    """Fails if a span is stored where another belongs, or added in the order of arrival."""
    m, n, k = 3, 40, 4 * 1024 + 70
    codes, scale, x = codes_of("ternary", n, k), scales_of(n, k, size), torch.randn(m, k)
    layer = PreparedWeight(prepack(codes, planes).flatten(1), scale.to(DEVICE), None, n, k, planes)
    expected = reference.ternary_linear(x, codes, scale, None, 8 * limbs)
    for split in (1, 2, 3, 5):
        config = configs.Dot(32, 16, size, 4, 2, split=split)
        for _ in range(1 if INTERPRETED else 3):
            y = torch.empty(m, n, device=DEVICE)
            groups.multiply(config, layer, x.to(DEVICE), None, y, limbs)
            assert torch.equal(y.cpu(), expected), split


@runs
@pytest.mark.parametrize("planes", [TWO_BITS, BASE3], ids=["2_bits", "base3"])
@pytest.mark.parametrize("size", [None, "row"])
@each_kind
def test_16_bits_have_the_oracles_bits(planes: int, size: str | None, kind: str) -> None:
    for i, (m, n, k) in enumerate(WIDE):
        dtype = DTYPES[i % 3]
        x, codes, scale, bias = torch.randn(m, k).to(dtype), codes_of(kind, n, k), scales_of(n, k, size), torch.randn(n)
        y = bound(codes, scale, bias, 16, planes)(x.to(DEVICE)).cpu()
        assert torch.equal(y, oracle.linear(x, codes.numpy().astype(np.int64), scale.numpy(), bias, 16))


@runs
@pytest.mark.parametrize("m", [1, 3], ids=["gemv", "dot"])
@pytest.mark.parametrize("size", [None, 32, 128, 256])
def test_the_largest_codes_do_not_overflow(size: int | None, m: int) -> None:
    """Sums of 256 codes of 16 bits, or of 32 times weights of 4, are beyond 2^22: no floats round these for free."""
    k = 4096
    codes = torch.ones(2, k, dtype=torch.int8)
    codes[1] = -1
    scale = scales_of(2, k, size)
    for planes in (TWO_BITS, *[FOUR_BITS] * (size == 32)):
        codes = codes * (8 if planes == FOUR_BITS else 1)
        codes.clamp_(max=7)
        for sign in (3.0, -3.0):
            x = torch.full((m, k), sign)
            for bits in (8, 16):
                y = bound(codes, scale, None, bits, planes)(x.to(DEVICE)).cpu()
                assert torch.equal(y, reference.ternary_linear(x, codes, scale, None, bits))


@runs
@pytest.mark.parametrize("m", [2, 5])
@pytest.mark.parametrize(("size", "bits"), [(64, 8), (64, 16), (None, 16), (64, None), (None, None)])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_or_inf_stays_in_its_token(bad: float, size: int | None, bits: int | None, m: int) -> None:
    x, codes, scale = torch.randn(m, 140), codes_of("binary", 6, 140), scales_of(6, 140, size)
    run = bound(codes, scale, None, bits)
    good = run(x.to(DEVICE)).cpu()
    x[1, 70] = bad
    y = run(x.to(DEVICE)).cpu()
    assert not y[1].isfinite().any()
    others = [i for i in range(m) if i != 1]
    assert torch.equal(y[others], good[others])


@runs
@each_dtype
def test_16_bit_codes_of_every_bit_pattern_are_the_references(dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        x = torch.randint(-(2**31), 2**31 - 1, (64, 200), dtype=torch.int32).view(torch.float32)
        x[32:] *= 1e-30  # large values hide what becomes of small ones
    else:
        x = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    q, s = quantize.quantize_activation(x.to(DEVICE), 16)
    expected_q, expected_s = reference.quantize_activation(x, 16)
    assert torch.equal(s.cpu().nan_to_num(-1), expected_s.nan_to_num(-1))
    assert q.dtype == torch.int16
    assert torch.equal(q.cpu(), expected_q)
    halves = [half.int() for half in reference.limbs(expected_q)]
    for given in (x, expected_q):  # from floats and from codes
        q, _, sums = quantize.quantize(given.to(DEVICE), True, aligned=True, limbs=2, size=64)
        assert torch.equal(q.cpu().int(), torch.cat(halves))
        assert sums is not None
        assert torch.equal(sums.cpu().view(-1, len(x)).T, reference.grouped(expected_q.int(), 64).sum(-1).int())


# Floats: exact where every sum is, and within the stated bound of the exact product elsewhere


@runs
@each_kind
@each_dtype
@pytest.mark.parametrize("size", [None, "row", *SIZES])
def test_float_products_are_within_the_stated_bound(size: Any, dtype: torch.dtype, kind: str) -> None:
    for i, (m, n, k) in enumerate(WIDE):
        x, codes, scale = torch.randn(m, k).to(dtype), codes_of(kind, n, k), scales_of(n, k, size)
        bias = torch.randn(n).to(dtype) if i % 2 else None
        if scale.dtype == torch.float16:
            spread = reference.grouped(codes, reference.size_of_groups(k, scale.shape[1])).double()
            weight = (spread * scale.double()[..., None]).flatten(1)[:, :k]
        else:
            weight = codes.double() * scale.double()[:, None]
        offset = 0 if bias is None else bias.double()
        exact = x.double() @ weight.T + offset
        sizes = x.double().abs() @ weight.abs().T + abs(offset)
        others = (FOUR_BITS,) * (size == 32) if isinstance(size, int) else (BASE3,)
        for planes in (TWO_BITS, INT8, *others):
            y = bound(codes, scale, bias, None, planes)(x.to(DEVICE)).cpu()
            assert y.dtype == dtype
            # the bound of y, not of the exact value: hence twice
            allowed = 2 * ROUNDING[dtype] * exact.abs() if dtype == torch.float32 else ROUNDING[dtype] * exact.abs()
            allowed = allowed + (k + 2) * 2**-22 * sizes
            assert ((y.double() - exact).abs() <= allowed).all(), (m, n, k, planes)


@runs
@each_dtype
@pytest.mark.parametrize("size", [None, "row"])
@pytest.mark.parametrize("planes", [TWO_BITS, BASE3, INT8], ids=["2_bits", "base3", "int8"])
def test_small_sums_of_floats_are_exact(planes: int, size: str | None, dtype: torch.dtype) -> None:
    for m, n, k in WIDE:
        x, codes, scale = oracle.small_sums(m, k).to(dtype), codes_of("ternary", n, k), scales_of(n, k, size)
        y = bound(codes, scale, torch.ones(n), None, planes)(x.to(DEVICE)).cpu()
        assert torch.equal(y, oracle.linear(x, codes.numpy().astype(np.int64), scale.numpy(), torch.ones(n), None))


@runs
def test_three_bfloat16s_are_the_float32_they_come_from() -> None:
    x = torch.randn(5, 70) * 10 ** torch.randint(-20, 20, (5, 70)).float()
    x[0, :4] = torch.tensor([3.4e38, -3.4e38, 0, 1 + 2**-23])
    x[1, :2] = torch.tensor([float("inf"), 0x7F800001]).where(torch.tensor([True, False]), torch.tensor(float("nan")))
    parts = floats.three_bfloat16s(x.to(DEVICE)).cpu().double().view(3, 5, 70)
    assert torch.equal(parts.sum(0).nan_to_num(-1), x.double().nan_to_num(-1))
    assert parts[1:].isfinite().all()


@runs
@pytest.mark.parametrize("size", [None, 32, 128])
def test_programs_that_share_a_tile_of_floats_give_the_same_bits_again(size: int | None) -> None:
    m, n, k = 3, 40, 1030
    codes, scale, x = codes_of("ternary", n, k), scales_of(n, k, size), oracle.small_sums(m, k)
    layer = PreparedWeight(prepack(codes, TWO_BITS), scale.to(DEVICE), None, n, k, TWO_BITS)
    expected = reference.ternary_linear(x, codes, scale, None, None)  # exact: scales have 11 bits, sums 10
    for split in (1, 2, 4):
        for _ in range(1 if INTERPRETED else 3):
            y = torch.empty(m, n, device=DEVICE)
            floats.multiply(configs.Dot(32, 16, 128, 4, 2, split=split), layer, x.to(DEVICE), y)
            assert torch.equal(y.cpu(), expected), split


# Training


@runs
@each_dtype
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("size", [None, "row", *SIZES])
def test_the_training_product_has_the_references_bits(size: Any, bits: int, dtype: torch.dtype) -> None:
    n, k = 30, 1100
    for m in (0, 1, 7):
        q, s = reference.quantize_activation(torch.randn(m, k), bits)
        codes, scale = codes_of("ternary", n, k), scales_of(n, k, size)
        for bias in (None, torch.randn(n)):
            y = torch.ops.bitnet.gpu_int_linear(*map(on_device, (q, s, codes, scale, bias)), dtype)
            if isinstance(size, int):
                expected = reference.group_linear(q, s, codes, scale, bias, dtype)
            else:
                expected = reference.rescale(reference.int_matmul(q, codes), s, scale, bias, dtype)
            assert torch.equal(y.cpu(), expected)


@runs
@pytest.mark.parametrize("options", [{"group_size": 64}, {"group_size": 32, "weights": "binary"}, {"per_row": True}])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_training_step_equals_the_reference_path(
    options: dict[str, Any], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = BitLinear(140, 24, device=DEVICE, dtype=torch.bfloat16, activation_bits=bits, **options)
    x, gy = grid(2, 9, 140).to(DEVICE, torch.bfloat16), grid(2, 9, 24).to(DEVICE, torch.bfloat16)
    called = []
    monkeypatch.setattr(groups, "multiply", lambda *args, run=groups.multiply: called.append(1) or run(*args))

    def step() -> list[Tensor]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(gy)
        return [y.detach(), *(t.grad for t in (leaf, layer.weight, layer.bias))]

    mine = step()
    assert called or "group_size" not in options
    monkeypatch.setattr(quantizers, "on_triton", lambda t: False)
    for found, expected in zip(mine, step(), strict=True):
        assert torch.equal(found, expected)


# Choosing


@runs
@pytest.mark.parametrize("module", [groups, floats], ids=["groups", "floats"])
def test_a_wrong_kernel_is_found_out(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = module.multiply

    def wrong(config: Any, layer: Any, x: Tensor, *args: Any) -> None:
        multiply(config, layer, x, *args)
        y = next(arg for arg in reversed(args) if isinstance(arg, Tensor))
        y.view(-1)[-1] += 1

    monkeypatch.setattr(module, "multiply", wrong)
    assert "1 of 70 values differ" in str(harness.proof_of(TWO_BITS))
    if module is groups:
        assert "codes in groups of 32 times 8-bit codes" in str(
            proof.fault(backends._triton_quantizers, torch.device(DEVICE))
        )


def test_base3_refuses_groups_in_words() -> None:
    cuda = torch.device("cuda")
    refused = backends.BACKENDS["triton-base3"].missing(cuda, 8, True)
    assert refused == "its blocks of five weights a byte hold no whole groups; choose weight_bits=2"
    assert backends.BACKENDS["triton"].missing(cuda, 8, True) == backends.BACKENDS["triton"].missing(cuda, 8, False)


# What only a GPU has

REAL_SHAPES = [
    (1, 4096, 14336),
    (2, 2560, 2560),
    (4, 2560, 2560),
    (16, 14336, 4096),
    (64, 4096, 4096),
    (300, 6912, 2560),
]
OPTIONS: list[dict[str, Any]] = [
    *({"group_size": size, "activation_bits": bits} for size in SIZES for bits in (8, 16)),
    {"activation_bits": 16},
    {"activation_bits": 16, "weight_bits": 1.6, "per_row": True},
]


def packed_layer(n: int, k: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> PackedBitLinear:
    layer = PackedBitLinear(k, n, device="cuda", dtype=dtype, **options)
    layer.weight.copy_(layout.pack_ternary(torch.randint(-1, 2, (n, k), dtype=torch.int8, device="cuda")))
    layer.weight_scale.uniform_(0.1, 1)
    layer.bias.normal_()
    return layer


@on_gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("m", "n", "k"), REAL_SHAPES)
def test_real_layers_have_the_references_bits_twice(m: int, n: int, k: int, options: dict[str, Any]) -> None:
    layer = packed_layer(n, k, **options)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    bits = options["activation_bits"]
    with torch.no_grad():
        y = layer(x)
        assert layer.prepack()[1] == ("triton-base3" if "weight_bits" in options else "triton")
        assert torch.equal(y, reference.ternary_linear(x, layer.codes(), layer.weight_scale, layer.bias, bits))
        for _ in range(3):
            assert torch.equal(y, layer(x))


@on_gpu
@each_dtype
@pytest.mark.parametrize("options", [{}, {"weight_bits": 1.6}, *({"group_size": size} for size in SIZES)], ids=str)
@pytest.mark.parametrize(("m", "n", "k"), REAL_SHAPES)
def test_real_layers_of_floats_are_within_the_stated_bound_and_the_same_again(
    m: int, n: int, k: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    layer = packed_layer(n, k, dtype, activation_bits=None, **options)
    x = torch.randn(m, k, device="cuda", dtype=dtype)
    weight = reference.dequantize_weight(layer.codes(), layer.weight_scale, torch.float32).double()  # exact
    with torch.no_grad():
        y = layer(x)
        assert layer.prepack()[1] == ("triton-base3" if "weight_bits" in options else "triton")
        exact = x.double() @ weight.T + layer.bias.double()
        sizes = x.double().abs() @ weight.abs().T + layer.bias.double().abs()
        allowed = 2 * ROUNDING[dtype] * exact.abs() + (k + 2) * 2**-22 * sizes
        assert ((y.double() - exact).abs() <= allowed).all()
        for _ in range(3):
            assert torch.equal(y, layer(x))


@on_gpu
@pytest.mark.parametrize("m", [1, 16, 300])
@pytest.mark.parametrize(
    "options", [{"group_size": 128}, {"activation_bits": 16}, {"activation_bits": None}], ids=str
)  # fmt: skip
def test_a_captured_layer_follows_its_input(m: int, options: dict[str, Any]) -> None:
    layer = packed_layer(1024, 4096, **options)
    x = torch.randn(m, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(y, layer(x))


@on_gpu
@pytest.mark.parametrize("options", [{"group_size": 128}, {"activation_bits": 16}], ids=str)
def test_training_steps_equal_the_reference_path_at_size(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = BitLinear(2560, 1024, device="cuda", dtype=torch.bfloat16, **options)
    x = torch.randn(512, 2560, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        y = layer(x)
        monkeypatch.setattr(quantizers, "on_triton", lambda t: False)
        assert torch.equal(y, layer(x))
