"""The native CPU kernels with scales of groups, with 16-bit activations and with binary weights at 1 bit, for every
instruction set this CPU can run."""

import ctypes
import random
from collections.abc import Iterator

import numpy as np
import oracle
import pytest
import torch
from oracle import DTYPES
from torch import Tensor

from bitnet.kernels import backends, proof, reference
from bitnet.kernels.cpu import latent as cpu_latent
from bitnet.kernels.cpu import library as cpu_library
from bitnet.kernels.cpu import linear as cpu_linear
from bitnet.kernels.layout import pack_int4, pack_ternary
from bitnet.kernels.reference import GROUP_SIZES, MAX_16

MISSING = cpu_library.missing(torch.device("cpu"))
pytestmark = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

FORMS = {
    "ternary": cpu_library.TWO_BITS,
    "base3": cpu_library.BASE3,
    "binary": cpu_library.ONE_BIT,
    "binary_tables": cpu_library.ONE_BIT_TABLES,
}
TARGETS = [] if MISSING else [(name, isa) for name, form in FORMS.items() for isa in cpu_library.isas(form)]
each_isa = pytest.mark.parametrize(("kind", "isa"), TARGETS, ids=[f"{name}-{isa}" for name, isa in TARGETS])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
each_width = pytest.mark.parametrize("bits", [8, 16])


def draw_codes(kind: str, n: int, k: int) -> Tensor:
    codes = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    return torch.where(codes == 0, 1, codes) if kind.startswith("binary") else codes


def bind(codes: Tensor, scale: Tensor, bias: Tensor | None, bits: int, kind: str, isa: str):
    n, k = codes.shape
    weight = cpu_linear.prepack(pack_ternary(codes), n, FORMS[kind])
    return cpu_linear.bind(weight, scale, bias, n, k, bits, FORMS[kind], isa)


def shapes(count: int) -> Iterator[tuple[int, int, int]]:
    """Random (M, N, K), small and awkward for the most part."""
    draw = random.Random(1)
    near = [1, 2, 3, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 128, 129, 200, 257, 300]
    for _ in range(count):
        yield draw.choice([0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 13, 17, 37]), draw.choice(near), draw.choice(near)
    yield from [(1, 70, 1024), (3, 33, 1056), (2, 5, 2100), (70, 40, 1250), (260, 3, 1025)]


@each_isa
@each_dtype
@each_width
@pytest.mark.parametrize("size", GROUP_SIZES)
def test_scales_of_groups_give_the_oracles_bits(kind: str, isa: str, dtype: torch.dtype, bits: int, size: int) -> None:
    """Fails for another order of sums, a fused multiply-add, a span that ends late, or a last group that is short."""
    for m, n, k in shapes(25):
        groups = -(-k // size)
        x, codes, scale = torch.randn(m, k).to(dtype), draw_codes(kind, n, k), torch.randn(n, groups).half()
        bias = None if n % 2 else torch.randn(n).to(dtype)
        y = bind(codes, scale, bias, bits, kind, isa)(x)
        expected = oracle.grouped(x, codes.numpy().astype(np.int64), scale.numpy(), size, bias, bits)
        assert torch.equal(y, expected), (m, n, k)
        assert torch.equal(y, reference.ternary_linear(x, codes, scale, bias, bits)), (m, n, k)


@each_isa
@each_dtype
@each_width
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
def test_other_scales_give_the_oracles_bits(kind: str, isa: str, dtype: torch.dtype, bits: int, per_row: bool) -> None:
    for m, n, k in shapes(40):
        x, codes, scale = torch.randn(m, k).to(dtype), draw_codes(kind, n, k), torch.rand(n if per_row else 1) + 0.1
        y = bind(codes, scale, None, bits, kind, isa)(x)
        assert torch.equal(y, oracle.linear(x, codes.numpy().astype(np.int64), scale.numpy(), None, bits)), (m, n, k)


@each_isa
@pytest.mark.parametrize("m", [1, 2, 9])
def test_nothing_overflows_at_the_extremes(kind: str, isa: str, m: int) -> None:
    """Fails if 16 bits overflow or saturate, or the sums of two limbs do not wrap back."""
    for k in (32_768, 65_536):
        codes = torch.ones(3, k, dtype=torch.int8)
        codes[1] = -1
        codes[2, ::2] = -1
        weight = cpu_linear.prepack(pack_ternary(codes), 3, FORMS[kind])
        for value, dtype in ((-128, torch.int8), (127, torch.int8), (MAX_16, torch.int16), (-MAX_16, torch.int16)):
            q = torch.full((m, k), value, dtype=dtype)
            product = (q.double() @ codes.double().T).int()
            assert torch.equal(cpu_linear.int_matmul(q, weight, 3, FORMS[kind], isa), product), (k, value)
        for bits, size in ((8, 32), (8, 256), (16, 32), (16, 128), (16, 256)):
            x, scale = torch.ones(m, k), torch.rand(3, k // size).half()
            x[0] = -1
            y = bind(codes, scale, None, bits, kind, isa)(x)
            assert torch.equal(y, oracle.grouped(x, codes.numpy().astype(np.int64), scale.numpy(), size, None, bits))
        q, s, scale = torch.full((m, k), -128, dtype=torch.int8), torch.ones(m, 1), torch.ones(3, k // 256).half()
        layer = cpu_linear.prepared(weight, scale, None, 3, k, FORMS[kind], isa)
        expected = reference.group_linear(q, s, codes, scale, None, torch.float32)
        assert torch.equal(cpu_linear._multiply(layer, q, s, torch.float32), expected)


@each_isa
def test_very_long_rows(kind: str, isa: str) -> None:
    """Fails if groups fall back on what holds a whole row: 16-bit activations of more than 65,536 features."""
    k = 600_001
    codes, x, scale = draw_codes(kind, 2, k), torch.randn(1, k), torch.rand(2, -(-k // 256)).half()
    for bits in (8, 16):
        y = bind(codes, scale, None, bits, kind, isa)(x)
        assert torch.equal(y, oracle.grouped(x, codes.numpy().astype(np.int64), scale.numpy(), 256, None, bits))


@each_isa
@pytest.mark.parametrize("m", [1, 3])
def test_every_float16_is_a_scale(kind: str, isa: str, m: int) -> None:
    """Fails for subnormal, negative, infinite or NaN scales of one instruction set."""
    scale = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)[:, None]
    codes, x = torch.ones(len(scale), 1, dtype=torch.int8), torch.full((m, 1), 2.0)
    y = bind(codes, scale, None, 8, kind, isa)(x)
    expected = reference.ternary_linear(x, codes, scale)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y[~y.isnan()], expected[~y.isnan()])


@each_isa
@each_dtype
def test_tokens_with_nan_or_inf_are_nan_and_others_are_not_affected(kind: str, isa: str, dtype: torch.dtype) -> None:
    codes, scale = draw_codes(kind, 5, 100), torch.rand(5, 4).half()
    for bits in (8, 16):
        x = torch.randn(4, 100).to(dtype)
        x[1, 7], x[2, 99] = float("nan"), float("-inf")
        y = bind(codes, scale, None, bits, kind, isa)(x)
        expected = reference.ternary_linear(x, codes, scale, None, bits)
        assert y.isnan().any(1).tolist() == [False, True, True, False]
        assert torch.equal(y[::3], expected[::3])


@each_dtype
def test_16_bit_codes_are_the_references_for_every_bit_pattern(dtype: torch.dtype) -> None:
    if torch.finfo(dtype).bits == 16:
        patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    else:
        patterns = torch.randint(-(2**31), 2**31 - 1, (1 << 16,)).to(torch.int32).view(dtype)
    x = torch.stack([patterns, patterns.roll(1), torch.zeros_like(patterns)], 1)
    (q, s), (expected_q, expected_s) = cpu_latent.quantize_tokens(x, 16), reference.quantize_activation(x, 16)
    assert torch.equal(q, expected_q)
    assert torch.equal(s.isnan(), expected_s.isnan())
    assert torch.equal(s[~s.isnan()], expected_s[~s.isnan()])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("m", [1, 2, 40, 300])
def test_any_number_of_threads_gives_the_same(threads: int, m: int) -> None:
    before = torch.get_num_threads()
    x, codes, scale = torch.randn(m, 1100), draw_codes("binary", 1000, 1100), torch.rand(1000, 9).half()
    try:
        torch.set_num_threads(threads)
        for kind, isa in dict(reversed(TARGETS)).items():  # the best of each
            y = bind(codes, scale, None, 16, kind, isa)(x)
            assert torch.equal(y, reference.ternary_linear(x, codes, scale, None, 16))
    finally:
        torch.set_num_threads(before)


# Forms


each_binary = pytest.mark.parametrize("form", [cpu_library.ONE_BIT, cpu_library.ONE_BIT_TABLES])


@each_binary
@pytest.mark.parametrize("from_codes", [False, True])
def test_unpacking_inverts_prepacking_of_binary_weights(form: int, from_codes: bool) -> None:
    for _, n, k in shapes(60):
        codes = draw_codes("binary", n, k)
        if from_codes:
            weight = cpu_linear.prepack_codes(codes, False, form)
        else:
            weight = cpu_linear.prepack(pack_ternary(codes), n, form)
        assert weight.shape == (-(-n // 32), -(-k // 32), 128)
        assert torch.equal(cpu_linear.unprepack(weight, n, k, form), codes)


@each_binary
@pytest.mark.parametrize("place", [(0, 0), (69, 99), (35, 31), (35, 96)])
def test_a_zero_among_binary_weights_is_refused(form: int, place: tuple[int, int]) -> None:
    """Wherever it is: Hub bytes pad rows with zeros, which are none of the weight's."""
    codes = draw_codes("binary", 70, 100)
    codes[place] = 0
    with pytest.raises(ValueError, match="1 bit a weight holds the codes -1 and 1 only, and this weight has zeros"):
        cpu_linear.prepack(pack_ternary(codes), 70, form)
    with pytest.raises(ValueError, match="store it in 2 bits"):
        cpu_linear.prepack_codes(codes, False, form)


@pytest.mark.parametrize("form", [cpu_library.TWO_BITS, cpu_library.BASE3])
@pytest.mark.parametrize(("row", "column", "field"), [(0, 0, 0), (0, 15, 3), (17, 99, 0), (17, 96, 1), (9, 64, 2)])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_byte_that_encodes_no_ternary_value_is_refused(
    form: int, row: int, column: int, field: int, threads: int
) -> None:
    """Wherever it is, the rows that pad the weight included."""
    packed = pack_ternary(draw_codes("ternary", 70, 100))
    packed[row, column] |= 3 << 2 * field
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pytest.raises(ValueError, match=rf"1 bytes hold the code 3, the first at \[{row}, {column}\]"):
            cpu_linear.prepack(packed, 70, form)
    finally:
        torch.set_num_threads(before)


def test_fakes_have_the_shapes_of_forms() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    packed = pack_ternary(draw_codes("binary", 70, 100))
    for form in (cpu_library.TWO_BITS, cpu_library.ONE_BIT, cpu_library.ONE_BIT_TABLES):
        weight = torch.ops.bitnet.cpu_prepack(packed, 70, form)
        with FakeTensorMode() as mode:
            fake = torch.ops.bitnet.cpu_prepack(mode.from_tensor(packed), 70, form)
            back = torch.ops.bitnet.cpu_unprepack(fake, 70, 100, form)
        assert (fake.shape, fake.dtype) == (weight.shape, weight.dtype)
        assert (back.shape, back.dtype) == ((70, 100), torch.int8)
        meta = cpu_linear.bind(weight.to("meta"), torch.ones(70, 4).half(), None, 70, 100, 16, form)
        assert meta(torch.empty(2, 100, device="meta")).shape == (2, 70)


# The backend


def test_binary_weights_at_1_bit_are_a_backend_taken_by_name() -> None:
    cpu = torch.device("cpu")
    assert backends.choose_backend("cpu", cpu, weight_bits=1) == "cpu-binary"
    assert backends.choose_backend("auto", cpu) == "cpu"
    assert backends.choose_backend("cpu-binary", cpu, 16) == "cpu-binary"
    row = {row.name: row for row in backends.backends()}["cpu-binary"]
    assert row.ready
    assert row.detail.startswith("native kernels, 1 bit a weight (")
    with pytest.warns(UserWarning, match="weight_bits=1: that backend has no such form; weights keep the form of"):
        assert backends.choose_backend("torch", cpu, weight_bits=1) == "torch"


@pytest.mark.parametrize("name", ["cpu", "cpu-binary"])
def test_the_proof_sees_a_wrong_scale_of_groups_and_a_wrong_limb(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = backends.BACKENDS[name]

    def fault() -> str | None:
        results = proof.layers(backend.prepack, backend.bind, backend.weights, backend.groups, backend.widths)
        return proof.fault(results, torch.device("cpu"))

    assert fault() is None
    rolled = cpu_linear.blocks_of_scales
    monkeypatch.setattr(cpu_linear, "blocks_of_scales", lambda scale: rolled(scale.roll(1, 1)))
    assert "scales times 1 8-bit tokens" in str(fault())
    monkeypatch.undo()
    prepared = cpu_linear.prepared
    monkeypatch.setattr(cpu_linear, "prepared", lambda *args: prepared(*args[:-1], min(args[-1], 8)))
    assert "16-bit tokens" in str(fault())


def test_scales_that_fit_no_groups_are_refused() -> None:
    codes = draw_codes("ternary", 6, 100)
    weight = cpu_linear.prepack(pack_ternary(codes), 6)
    with pytest.raises(ValueError, match="3 scales a row fit no groups of"):
        cpu_linear.bind(weight, torch.ones(6, 3).half(), None, 6, 100, 8)
    for scale in (torch.ones(5, 4).half(), torch.ones(6).half(), torch.ones(1).half()):
        with pytest.raises(ValueError, match=r"scale and bias of sizes \[.*\] do not fit 6 rows"):
            cpu_linear.bind(weight, scale, None, 6, 100, 8)


def test_what_8_bit_weights_and_long_rows_cannot_have_is_refused_with_the_remedy() -> None:
    codes = draw_codes("ternary", 4, 40)
    weight = cpu_linear.prepack(codes, 4)
    for scale, bits in ((torch.ones(1), 16), (torch.ones(4, 2).half(), 8)):
        with pytest.raises(ValueError, match=r"8-bit weights take neither .* choose backend 'torch'"):
            cpu_linear.bind(weight, scale, None, 4, 40, bits)
    k = 65_537
    weight = cpu_linear.prepack(pack_ternary(draw_codes("ternary", 1, k)), 1)
    with pytest.raises(ValueError, match="take up to 65536 features, not 65537; choose scales of groups"):
        cpu_linear.bind(weight, torch.ones(1), None, 1, k, 16)


def test_bad_arguments_come_back_as_errors_not_crashes() -> None:
    weight = cpu_linear.prepack(pack_ternary(draw_codes("ternary", 4, 64)), 4)
    x, y = torch.zeros(1, 64), torch.zeros(1, 4)
    layer = cpu_linear.prepared(weight, torch.ones(4, 2).half(), None, 4, 64)

    def status(x_type: int = 0, y_type: int = 0) -> int:
        args = (ctypes.byref(layer), x.data_ptr(), x_type, 64, None, 1, y.data_ptr(), y_type, 1)
        return cpu_library.native().bitnet_linear(*args)

    assert (status(), status(3, 4), status(5, 0), status(5, 4)) == (0, 1, 1, 1)  # bare sums of groups there are none
    for size in (16, 48, 2048, -32):
        layer.group_size = size
        assert status() == 2
    layer.group_size, layer.activation_bits = 0, 12
    assert status() == 1
    layer.activation_bits, layer.k = 16, 1 << 17
    assert status() == 2


# 4-bit weights

FOUR_BITS = [] if MISSING else cpu_library.isas(cpu_library.FOUR_BITS)
each_four = pytest.mark.parametrize("isa", FOUR_BITS)


@each_four
@each_dtype
def test_4_bit_weights_give_the_oracles_bits(isa: str, dtype: torch.dtype) -> None:
    for m, n, k in shapes(40):
        x, codes = torch.randn(m, k).to(dtype), torch.randint(-8, 8, (n, k), dtype=torch.int8)
        scale, bias = torch.randn(n, -(-k // 32)).half(), None if n % 2 else torch.randn(n).to(dtype)
        weight = cpu_linear.prepack(pack_int4(codes), n, k=k)
        assert torch.equal(weight, cpu_linear.prepack_codes(codes, False, cpu_library.FOUR_BITS))
        assert torch.equal(cpu_linear.unprepack(weight, n, k), codes)
        y = cpu_linear.bind(weight, scale, bias, n, k, 8, isa=isa)(x)
        assert torch.equal(y, oracle.grouped(x, codes.numpy().astype(np.int64), scale.numpy(), 32, bias, 8)), (m, n, k)


@each_four
@pytest.mark.parametrize("m", [1, 3, 17])
def test_4_bit_sums_do_not_saturate(isa: str, m: int) -> None:
    """Fails if the sum of a group of codes of 15 (before 8 comes off) and activations of -128 leaves 16 bits."""
    codes = torch.full((35, 32_768), -8, dtype=torch.int8)
    codes[::2] = 7
    weight, scale = cpu_linear.prepack(pack_int4(codes), 35), torch.ones(35, 1024).half()
    for value in (-128, -127, 127):
        q, s = torch.full((m, 32_768), value, dtype=torch.int8), torch.ones(m, 1)
        y = cpu_linear._multiply(cpu_linear.prepared(weight, scale, None, 35, 32_768, isa=isa), q, s, torch.float32)
        assert torch.equal(y, reference.group_linear(q, s, codes, scale, None, torch.float32))


def test_what_4_bit_weights_cannot_have_is_refused() -> None:
    weight = cpu_linear.prepack(pack_int4(torch.zeros(4, 64, dtype=torch.int8)), 4)
    for scale, bits in ((torch.ones(4), 8), (torch.ones(4, 1).half(), 8), (torch.ones(4, 2).half(), 16)):
        with pytest.raises(ValueError, match="4-bit weights take scales of groups of 32 features"):
            cpu_linear.bind(weight, scale, None, 4, 64, bits)
    layer = cpu_linear.prepared(weight, torch.ones(4, 2).half(), None, 4, 64)
    x, y = torch.zeros(1, 64), torch.zeros(1, 4)
    args = (x.data_ptr(), 0, 64, None, 1, y.data_ptr(), 0, 1)
    assert cpu_library.native().bitnet_linear(ctypes.byref(layer), *args) == 0
    layer.group_size = 64
    assert cpu_library.native().bitnet_linear(ctypes.byref(layer), *args) == 1
