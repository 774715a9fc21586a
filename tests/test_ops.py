from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import DTYPES, grid
from shapes import AWKWARD, SHAPES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from bitnet.kernels import backends, layout, ops, reference
from bitnet.kernels import torch_int8 as int8

BACKENDS = [row.name for row in backends.backends("cpu") if row.ready and "binary" not in row.name]

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
each_bits = pytest.mark.parametrize("bits", [8, 4, None], ids=["a8", "a4", "float"])
each_shape = pytest.mark.parametrize(("m", "n", "k"), SHAPES)
each_matmul = pytest.mark.parametrize("matmul", [reference.int_matmul, int8.int_matmul], ids=["reference", "int8"])


def skip_if_refused(backend: str, bits: int | None) -> None:
    if why := backends.BACKENDS[backend].missing(torch.device("cpu"), bits, False):
        pytest.skip(why)


def ternary(n: int, k: int) -> Tensor:
    return torch.randint(-1, 2, (n, k), dtype=torch.int8)


def tokens(*shape: int, bits: int | None = 8) -> Tensor:
    return oracle.small_sums(*shape) if bits is None else grid(*shape)


def check(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int | None, backend: str) -> None:
    """ternary_linear gives the oracle's very bits."""
    skip_if_refused(backend, bits)
    packed = layout.pack_ternary(codes)
    y = ops.ternary_linear(x, packed, scale, bias, out_features=codes.shape[0], activation_bits=bits, backend=backend)
    expected = oracle.linear(x, codes.numpy().astype(np.int64), scale.numpy(), bias, bits)
    assert y.dtype == x.dtype
    assert torch.equal(y, expected)


# Accumulators


@each_matmul
@each_shape
def test_accumulator_is_exact(matmul: Callable[[Tensor, Tensor], Tensor], m: int, n: int, k: int) -> None:
    a, b = torch.randint(-128, 128, (m, k), dtype=torch.int8), ternary(n, k)
    acc = matmul(a, b)
    assert acc.dtype == torch.int32
    assert acc.tolist() == (a.numpy().astype(np.int64) @ b.numpy().T.astype(np.int64)).tolist()


@each_matmul
@pytest.mark.parametrize("k", [1, 1536, 131072, 131073, 300001])
def test_accumulator_is_exact_at_the_extremes(matmul: Callable[[Tensor, Tensor], Tensor], k: int) -> None:
    """Beyond 2^17 features of -128 the sum passes 2^24, and an odd one is no float32 any more."""
    a = torch.full((2, k), -128, dtype=torch.int8)
    a[:, 0] = -127
    b = torch.ones(3, k, dtype=torch.int8)
    b[1] = -1
    b[2, -1] = 0
    assert matmul(a, b).tolist() == [[-128 * k + 1, 128 * k - 1, (-128 * k + 129) * (k > 1)]] * 2


# Outputs


@each_backend
@each_dtype
@each_bits
@each_shape
def test_output_has_the_oracles_bits(
    backend: str, dtype: torch.dtype, bits: int | None, m: int, n: int, k: int
) -> None:
    x, codes = tokens(m, k, bits=bits).to(dtype), ternary(n, k)
    check(x, codes, torch.rand(1) + 0.1, None, bits, backend)
    check(x, codes, torch.rand(n) + 0.1, torch.randn(n).to(dtype), bits, backend)


@each_backend
@pytest.mark.parametrize("bits", [8, None], ids=["a8", "float"])
def test_bias_in_another_dtype_is_added_in_float32(backend: str, bits: int | None) -> None:
    x, codes = tokens(3, 40, bits=bits).bfloat16(), ternary(6, 40)
    check(x, codes, torch.rand(6) + 0.1, torch.randn(6), bits, backend)


STRIDED: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: grid(12, 6).T,
    "every_other_column": lambda: grid(6, 24)[:, ::2],
    "every_other_row": lambda: grid(12, 12)[::2],
    "expanded": lambda: grid(1, 12).expand(6, 12),
    "three_dims": lambda: grid(2, 3, 12),
    "three_dims_permuted": lambda: grid(3, 2, 12).transpose(0, 1),
    "no_rows_of_three": lambda: grid(2, 0, 12),
    "vector": lambda: grid(12),
}


@each_backend
@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED.keys())
def test_strides_and_leading_dims_do_not_matter(backend: str, make: Callable[[], Tensor]) -> None:
    x = make()
    check(x, ternary(5, 12), torch.rand(5) + 0.1, torch.randn(5), 8, backend)
    q, s = ops.quantize_activation(x)
    expected_q, expected_s = oracle.activation(x, 8)
    assert q.tolist() == expected_q.tolist()
    assert s.tolist() == expected_s.tolist()


@each_backend
@each_bits
def test_zero_and_tiny_tokens_are_finite(backend: str, bits: int | None) -> None:
    """Below max|x| = 1e-5 (mean for 4 bits) the clamp holds the scale: no division by zero, codes shrink to 0."""
    x = torch.stack([torch.zeros(8), torch.full((8,), 2.0**-17), torch.full((8,), 2.0**-30), torch.ones(8)])
    codes = torch.ones(4, 8, dtype=torch.int8)
    check(x, codes, torch.ones(1), None, bits, backend)
    if bits == 8:
        assert ops.quantize_activation(x)[0][:, 0].tolist() == [0, 97, 0, 127]  # 2^-17 * 127 / 1e-5 = 96.9


@each_backend
@each_bits
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_or_inf_stays_in_its_token(backend: str, bits: int | None, bad: float) -> None:
    skip_if_refused(backend, bits)
    x, codes, scale = tokens(5, 12, bits=bits), ternary(6, 12), torch.ones(1)
    codes[:, 7] = 1  # with float activations Inf times 0 is NaN, but Inf times 1 is Inf
    x[2, 7] = bad
    y = ops.ternary_linear(x, layout.pack_ternary(codes), scale, out_features=6, activation_bits=bits, backend=backend)
    if bits is None:
        assert not y[2].isfinite().any()
    else:
        assert y[2].isnan().all()
    others = [0, 1, 3, 4]
    expected = oracle.linear(x[others], codes.numpy().astype(np.int64), scale.numpy(), None, bits)
    assert torch.equal(y[others], expected)


@each_backend
def test_a_large_token_does_not_disturb_the_others(backend: str) -> None:
    x = grid(4, 16)
    x[1] *= 2.0**100
    check(x, ternary(4, 16), torch.rand(1) + 0.1, None, 8, backend)


# Quantizers


@pytest.mark.parametrize("kind", ["ternary", "binary"])
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize(("n", "k"), sorted({(n, k) for _, n, k in SHAPES}))
@each_dtype
def test_weight_codes_and_scale_are_the_papers(kind: str, per_row: bool, n: int, k: int, dtype: torch.dtype) -> None:
    w = grid(n, k).to(dtype)
    codes, scale = ops.quantize_weight(w, kind=kind, per_row=per_row)
    expected_codes, expected_scale = oracle.weight(w, kind, per_row)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert codes.tolist() == expected_codes.tolist()
    assert scale.tolist() == expected_scale.tolist()


@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
def test_scale_of_an_arbitrary_weight_is_its_absolute_mean(per_row: bool) -> None:
    w = torch.randn(40, 70)
    scale = ops.quantize_weight(w, per_row=per_row)[1].double()
    mean = w.double().abs().mean(*([1] if per_row else []))
    # a float32 sum of n positive terms is off by at most n * 2^-24 of itself, in any order; mean, 1 / mean and
    # 1 / inv round once each
    n = 70 if per_row else 70 * 40
    assert torch.all((scale - mean).abs() <= (n + 3) * 2.0**-24 * mean)


def test_scale_survives_being_stored_as_its_inverse() -> None:
    scale = ops.quantize_weight(torch.randn(500, 30), per_row=True)[1]
    assert torch.equal(1 / (1 / scale), scale)


@pytest.mark.parametrize(("kind", "code"), [("ternary", 0), ("binary", -1)])
def test_an_all_zero_weight_has_a_finite_scale(kind: str, code: int) -> None:
    codes, scale = ops.quantize_weight(torch.zeros(4, 8), kind=kind)
    assert torch.equal(codes, torch.full((4, 8), code, dtype=torch.int8))
    assert torch.equal(scale, 1 / (1 / torch.tensor([1e-5])))


def test_weight_ties_round_to_even() -> None:
    w = torch.tensor([[0.5, -0.5, 1.5, -1.5, 1.0, -1.0, 2.0, 0.0]])  # mean|W| = 1: codes are round(W)
    assert ops.quantize_weight(w)[0].tolist() == [[0, 0, 1, -1, 1, -1, 1, 0]]


def test_activation_ties_round_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 126.5]])  # s = 1 exactly
    codes, s = ops.quantize_activation(x)
    assert s.item() == 1
    assert codes.tolist() == [[127, 0, 0, 2, -2, 2, -2, 126]]


def test_four_bit_codes_saturate_at_their_range() -> None:
    x = torch.zeros(2, 64)
    x[0, 0], x[1, 0] = 8.0, -8.0  # mean|x| = 1/8, so s * x = 64 sqrt(7)
    assert ops.quantize_activation(x, 4)[0][:, 0].tolist() == [7, -8]


# Registration


@pytest.mark.parametrize("strides", ["transposed", "expanded", "three_dims_permuted", "no_rows_of_three"])
def test_quantize_ops_agree_with_their_fakes(strides: str) -> None:
    x = STRIDED[strides]().bfloat16()
    torch.library.opcheck(torch.ops.bitnet.quantize_activation, (x, 8))
    if x.ndim == 2:
        torch.library.opcheck(torch.ops.bitnet.quantize_weight, (x, "ternary", True))
        torch.library.opcheck(torch.ops.bitnet.quantize_weight, (x, "binary", False))


@each_backend
@pytest.mark.parametrize("bits", [8, None], ids=["a8", "float"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_ternary_linear_agrees_with_its_fake(backend: str, bits: int | None, grad: bool) -> None:
    skip_if_refused(backend, bits)
    x = STRIDED["three_dims_permuted"]().bfloat16().requires_grad_(grad)
    weight = ops.prepack(layout.pack_ternary(ternary(5, 12)), 5, backend=backend)
    args = (x, weight, torch.rand(5), torch.rand(5), 5, bits, backend)
    torch.library.opcheck(torch.ops.bitnet.ternary_linear, args)


@each_backend
def test_ternary_linear_takes_no_8_bit_codes_for_packed_bytes(backend: str) -> None:
    """Fails if int8 codes [N, K] pass as Hub bytes of 4 N rows."""
    with pytest.raises(ValueError, match=r"packed weight must be uint8 \[ceil\(N/4\), K\], got int8 \[4, 8\]"):
        ops.ternary_linear(torch.ones(1, 8), ternary(4, 8), torch.ones(1), backend=backend)
    with pytest.raises(ValueError, match="8-bit weight has 4 rows, but out_features=16"):
        ops.prepack(ternary(4, 8), 16, backend=backend)


@each_backend
def test_every_layout_can_be_undone(backend: str) -> None:
    for _, n, k in AWKWARD:
        codes = ternary(n, k)
        weight = ops.prepack(layout.pack_ternary(codes), n, backend=backend)
        assert torch.equal(backends.BACKENDS[backend].unprepack(weight, n, k), codes)


@each_backend
def test_meta_tensors_give_shapes(backend: str) -> None:
    x = torch.empty(2, 3, 12, device="meta", dtype=torch.bfloat16)
    packed = torch.empty(2, 12, device="meta", dtype=torch.uint8)
    y = ops.ternary_linear(x, packed, torch.empty(1, device="meta"), out_features=7, backend=backend)
    assert (y.shape, y.dtype, y.device.type) == ((2, 3, 7), torch.bfloat16, "meta")


# Backends


def test_backends_lists_every_backend_with_a_reason() -> None:
    rows = backends.backends()
    assert {row.name for row in rows} >= {"torch", "reference"}
    assert all(row.detail for row in rows)
    assert rows[-1].name == "reference", "the slowest comes last"
    assert backends.choose_backend("auto", torch.device("cpu")) == next(row.name for row in rows if row.ready)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a backend, first in line, that cannot run."""
    missing = backends.BACKENDS["torch"]._replace(
        missing=lambda device, activation_bits, groups: f"not for {device}; buy another"
    )
    monkeypatch.setattr(backends, "BACKENDS", {"broken": missing, **backends.BACKENDS})
    backends._choose.cache_clear()
    return "broken"


def test_an_explicit_backend_never_falls_back(broken: str) -> None:
    row = backends.backends()[0]
    assert row == (broken, False, "not for cpu; buy another")
    with pytest.raises(RuntimeError, match="'broken' cannot run on cpu: not for cpu; buy another"):
        backends.choose_backend(broken, torch.device("cpu"))
    assert backends.choose_backend("auto", torch.device("cpu")) != broken


def test_an_unknown_backend_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match=r"unknown backend 'fast'; choose 'auto' or one of .*'torch', 'reference'"):
        ops.prepack(torch.full((1, 4), 85, dtype=torch.uint8), backend="fast")


# Errors of arguments

GOOD = {
    "x": torch.zeros(2, 8),
    "packed": torch.full((2, 8), 85, dtype=torch.uint8),
    "scale": torch.ones(1),
    "bias": torch.zeros(7),
    "out_features": 7,
}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int8)}, TypeError, "x must be floating point, got torch.int8"),
        ({"x": torch.zeros(2, 7)}, ValueError, r"x is \[2, 7\], but the weight takes K = 8"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x is \[\], but the weight takes K = 8"),
        ({"packed": torch.zeros(2, 8)}, ValueError, r"packed weight must be uint8 .* got float32 \[2, 8\]"),
        (
            {"packed": torch.zeros(16, dtype=torch.uint8)},
            ValueError,
            r"packed weight must be uint8 .* got uint8 \[16\]",
        ),
        ({"packed": torch.full((2, 8), 87, dtype=torch.uint8)}, ValueError, "packed weight is corrupt"),
        ({"packed": torch.zeros(2, 0, dtype=torch.uint8), "x": torch.zeros(2, 0)}, ValueError, "weight is empty"),
        ({"packed": torch.zeros(0, 8, dtype=torch.uint8), "out_features": 0}, ValueError, "weight is empty"),
        ({"out_features": 9}, ValueError, "out_features=9 needs"),
        (
            {"scale": torch.ones(2)},
            ValueError,
            r"scale must be float32 .*, got torch.float32 \[2\]",
        ),
        (
            {"scale": torch.tensor(1.0)},
            ValueError,
            r"scale must be float32 .*, got torch.float32 \[\]",
        ),
        (
            {"scale": torch.ones(7, 1)},
            ValueError,
            r"scale must be float32 .*, got torch.float32 \[7, 1\]",
        ),
        ({"scale": torch.ones(1).bfloat16()}, ValueError, r"scale must be float32 .* got torch.bfloat16"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias must be floating \[7\], got torch.float32 \[8\]"),
        ({"bias": torch.zeros(7, dtype=torch.int32)}, ValueError, r"bias must be floating \[7\], got torch.int32"),
        ({"activation_bits": 2}, ValueError, "activation_bits must be 16, 8, 4 or None, got 2"),
        ({"backend": "fast"}, ValueError, "unknown backend 'fast'"),
        ({"x": torch.zeros(2, 8, device="meta")}, ValueError, "x is on meta, but packed is on cpu"),
        ({"scale": torch.ones(1, device="meta")}, ValueError, "x is on cpu, but scale is on meta"),
        ({"bias": torch.zeros(7, device="meta")}, ValueError, "x is on cpu, but bias is on meta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_argument_of_ternary_linear_gets_its_own_error(
    bad: dict[str, object], error: type[Exception], message: str
) -> None:
    ops.ternary_linear(**GOOD)  # type: ignore[arg-type]
    with pytest.raises(error, match=message):
        ops.ternary_linear(**{**GOOD, **bad})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weight", "options", "error", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int8), {}, TypeError, "weight must be floating point, got torch.int8"),
        (torch.zeros(2), {}, ValueError, r"weight must be \[N, K\] and not empty, got \[2\]"),
        (torch.zeros(0, 2), {}, ValueError, r"not empty, got \[0, 2\]"),
        (torch.zeros(2, 0), {}, ValueError, r"not empty, got \[2, 0\]"),
        (
            torch.ones(2, 2),
            {"kind": "quinary"},
            ValueError,
            "kind must be 'ternary', 'binary', 'int8' or 'int4', got 'quinary'",
        ),
        (torch.tensor([[1.0, float("nan")]]), {}, ValueError, "weight holds 1 NaN or Inf values"),
        (torch.tensor([[float("inf"), -float("inf")]]), {}, ValueError, "weight holds 2 NaN or Inf values"),
    ],
    ids=["dtype", "vector", "no_rows", "no_columns", "kind", "nan", "inf"],
)
def test_a_bad_argument_of_quantize_weight_gets_its_own_error(
    weight: Tensor, options: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.quantize_weight(weight, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("x", "bits", "error", "message"),
    [
        (torch.zeros(2, 2, dtype=torch.int32), 8, TypeError, "x must be floating point, got torch.int32"),
        (torch.tensor(1.0), 8, ValueError, r"x must be \[..., K\] with K > 0, got \[\]"),
        (torch.zeros(2, 0), 8, ValueError, r"with K > 0, got \[2, 0\]"),
        (torch.zeros(2, 2), 2, ValueError, "activation_bits must be 16, 8 or 4, got 2"),
        (torch.zeros(2, 2), None, ValueError, "activation_bits must be 16, 8 or 4, got None"),
    ],
    ids=["dtype", "scalar", "no_columns", "bits", "no_bits"],
)
def test_a_bad_argument_of_quantize_activation_gets_its_own_error(
    x: Tensor, bits: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ops.quantize_activation(x, bits)


def test_unknown_options_of_the_reference_raise_too() -> None:
    with pytest.raises(ValueError, match="kind must be"):
        reference.quantize_weight(torch.ones(2, 2), "quinary")
    with pytest.raises(ValueError, match="bits must be"):
        reference.quantize_activation(torch.ones(2, 2), 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "change",
    [
        lambda x, weight, scale, bias: (x[:, :20], weight, scale, bias),
        lambda x, weight, scale, bias: (x, weight[..., :1], scale, bias),
        lambda x, weight, scale, bias: (x, weight, scale[:2], bias),
        lambda x, weight, scale, bias: (x, weight, scale, bias[1:]),
    ],
    ids=["features", "weight", "scale", "bias"],
)
def test_a_shape_that_is_refused_is_refused_while_tracing(backend: str, change: Any) -> None:
    """Fails if a fake allocates an output for tensors that the kernel would refuse: errors would come at run time."""
    weight = ops.prepack(layout.pack_ternary(ternary(6, 40)), 6, backend=backend)
    arguments = change(torch.randn(3, 40), weight, torch.rand(6) + 0.1, torch.randn(6))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in arguments]
        with pytest.raises(
            (ValueError, RuntimeError), match=r"features|prepacked as|do not fit|codes are|packed weight"
        ):
            torch.ops.bitnet.ternary_linear(*fakes, 6, 8, backend)


@pytest.mark.parametrize(
    ("q", "s", "scale", "message"),
    [
        ((3, 7), (3, 1), (1,), "features"),
        ((3, 8), (2, 1), (1,), "scales for 3 tokens"),
        ((3, 8), (3, 1), (3,), "not fit"),
    ],
)
def test_the_training_products_fake_checks_its_shapes(
    q: tuple[int, ...], s: tuple[int, ...], scale: tuple[int, ...], message: str
) -> None:
    meta = [torch.empty(shape, device="meta") for shape in (q, s, (4, 8), scale)]
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.bitnet.cpu_int_linear(*meta, None, torch.float32, False)
