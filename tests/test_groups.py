"""Scales of groups of features, 16-bit activations and the Hadamard transform: definition, layers, files.

The oracles here are numpy, in float64 and integers, and know nothing of the code under test.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import IDS, Mlp, llama
from torch import Tensor

import bitnet
from bitnet import BitLinear, PackedBitLinear
from bitnet.convert.rounding import exact, ternary_spec
from bitnet.kernels import backends, layout, ops, reference
from bitnet.quantize import QuantSpec

SIZES = reference.GROUP_SIZES
FEATURES = (1, 31, 64, 70, 300, 1100, 2048 + 33)  # no group, one that is shorter, several spans


def oracle_codes(w: Tensor, size: int, binary: bool, centered: bool) -> tuple[np.ndarray, np.ndarray]:
    """Group by group, as the papers have it."""
    w64 = w.double().numpy()
    codes, scales = np.zeros(w64.shape, np.int8), []
    for at in range(0, w64.shape[1], size):
        group = w64[:, at : at + size]
        scale = np.maximum(np.abs(group).mean(1).astype(np.float32), np.float32(1e-5)).astype(np.float16)
        scales.append(scale)
        inverse = np.float32(1) / scale.astype(np.float32)
        if binary:
            middle = group.mean(1, keepdims=True).astype(np.float32) if centered else np.float32(0)
            codes[:, at : at + size] = np.where(group.astype(np.float32) > middle, 1, -1)
        else:
            scaled = group.astype(np.float32) * inverse[:, None]
            codes[:, at : at + size] = np.clip(np.rint(scaled), -1, 1)
    return codes, np.stack(scales, 1)


def oracle_linear(q: np.ndarray, s: np.ndarray, codes: np.ndarray, scale: np.ndarray, size: int) -> np.ndarray:
    """The stated order of float32 sums, one output at a time in plain loops."""
    y = np.zeros((len(q), len(codes)), np.float32)
    for m in range(len(q)):
        for n in range(len(codes)):
            total = np.float32(0)
            for span in range(0, q.shape[1], 1024):
                part = np.float32(0)
                for at in range(span, min(span + 1024, q.shape[1]), size):
                    acc = int(q[m, at : at + size].astype(np.int64) @ codes[n, at : at + size].astype(np.int64))
                    part = np.float32(part + np.float32(np.float32(acc) * np.float32(scale[n, at // size])))
                total = np.float32(total + part)
            y[m, n] = total * np.float32(np.float32(1) / s[m, 0])
    return y


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", [("ternary", True), ("binary", True), ("binary", False)], ids=str)
def test_codes_and_scales_are_the_definitions(size: int, kind: tuple[str, bool]) -> None:
    for k in FEATURES:
        w = torch.randn(5, k, generator=torch.Generator().manual_seed(k)) * 0.02
        codes, scale = ops.quantize_weight(w, kind=kind[0], group_size=size, centered=kind[1])
        expected, scales = oracle_codes(w, size, kind[0] == "binary", kind[1])
        assert scale.dtype == torch.float16
        assert np.array_equal(scale.numpy(), scales)
        assert np.array_equal(codes.numpy(), expected)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("size", SIZES)
def test_sums_have_the_stated_order(size: int, bits: int) -> None:
    for k in FEATURES:
        codes = torch.randint(-1, 2, (3, k), dtype=torch.int8)
        scale = (torch.rand(3, -(-k // size)) + 0.01).half()
        q, s = reference.quantize_activation(torch.randn(2, k), bits)
        y = reference.group_linear(q, s, codes, scale, None, torch.float32)
        assert np.array_equal(y.numpy(), oracle_linear(q.numpy(), s.numpy(), codes.numpy(), scale.numpy(), size))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("groups", [None, 32, 256])
def test_nothing_overflows_at_the_extremes(groups: int | None, bits: int) -> None:
    """Fails if an accumulator of the largest codes wraps around or is no exact float32."""
    k, top = 32768, reference.MAX_16 if bits == 16 else 127
    codes = torch.ones(2, k, dtype=torch.int8)
    codes[1] = -1
    scale = torch.ones(1) if groups is None else torch.ones(2, k // groups, dtype=torch.float16)
    y = reference.ternary_linear(torch.full((1, k), 3.0), codes, scale, None, bits)
    s = np.float32(top) * (np.float32(1) / np.float32(3))
    expected = np.float32(np.float32(k * top) * (np.float32(1) / s))
    assert y.tolist() == [[pytest.approx(expected, rel=2**-22), pytest.approx(-expected, rel=2**-22)]]


def test_16_bits_are_closer_to_floats_than_bfloat16_is() -> None:
    x, w = torch.randn(64, 512), torch.randint(-1, 2, (64, 512), dtype=torch.int8)
    exactly = x.double() @ w.double().T
    ours = (reference.ternary_linear(x, w, torch.ones(1), None, 16) - exactly).norm()
    theirs = ((x.bfloat16().double() @ w.double().T) - exactly).norm()
    assert ours < theirs / 20
    q, _ = reference.quantize_activation(x, 16)
    high, low = reference.limbs(q)
    assert torch.equal(256 * high.int() + low.int(), q.int())


@pytest.mark.parametrize("block", [1, 2, 64, 1024])
def test_the_hadamard_transform_is_sylvesters_and_its_own_inverse(block: int) -> None:
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    x, signs = torch.randn(3, 2 * block), torch.randint(0, 2, (2 * block,), dtype=torch.int8) * 2 - 1
    y = reference.hadamard(x, block, signs)
    expected = (x * signs).double().numpy().reshape(3, 2, block) @ matrix.T / block**0.5
    assert torch.allclose(y.double(), torch.from_numpy(expected).view(3, -1), atol=1e-5)
    assert torch.allclose(reference.hadamard(y, block) * signs, x, atol=1e-5)


@pytest.mark.parametrize("k", [1, 7, 8, 70])
def test_binary_codes_take_a_bit_each(k: int) -> None:
    codes = torch.randint(0, 2, (5, k), dtype=torch.int8) * 2 - 1
    packed = layout.pack_binary(codes)
    assert packed.shape == (5, -(-k // 8))
    assert np.array_equal(packed.numpy(), np.packbits(codes.numpy() > 0, axis=1, bitorder="little"))
    assert torch.equal(layout.unpack_binary(packed, k), codes)
    codes[0, 0] = 0
    with pytest.raises(ValueError, match="codes must be -1 or 1, got 1 zeros"):
        layout.pack_binary(codes)


OPTIONS: list[dict[str, Any]] = [
    *({"group_size": size} for size in SIZES),
    {"group_size": 64, "weights": "binary"},
    {"group_size": 128, "weights": "binary", "centered": False, "activation_bits": 16},
    {"group_size": 64, "activation_bits": 16},
    {"group_size": 64, "activation_bits": 4},
    {"group_size": 32, "activation_bits": None},
    {"activation_bits": 16},
    {"activation_bits": 16, "per_row": True},
    {"weights": "binary", "centered": False},
]


def native(options: dict[str, Any]) -> list[str]:
    """The native backends that can run such layers here."""
    bits, groups = options.get("activation_bits", 8), "group_size" in options
    names = [row.name for row in backends.backends("cpu", bits, groups) if row.ready and row.name.startswith("cpu")]
    return [name for name in names if "binary" not in name or options.get("weights") == "binary"]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trained_is_packed_is_saved_is_loaded(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(300, 20), torch.nn.Linear(20, 7)).to(dtype)
    bitnet.replace_linear(model, **options)
    x = torch.randn(4, 300).to(dtype).requires_grad_()
    trained = model.train()(x)
    trained.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert x.grad is not None
    x = x.detach()
    bitnet.pack(model)
    for layer in model:
        layer.set_backend(activation_bits=None)  # float ones stay float
    with torch.no_grad():
        assert torch.equal(model(x), trained)
        for backend in ("reference", "torch", *native(options)):
            for layer in model:
                layer.set_backend(backend, activation_bits=None)
            assert torch.equal(model(x), trained)
    for weight_bits in (2, 1.6):
        bitnet.save(model, tmp_path / "out", weight_bits=weight_bits)
        fresh = torch.nn.Sequential(torch.nn.Linear(300, 20), torch.nn.Linear(20, 7)).to(dtype)
        loaded = bitnet.load(tmp_path / "out", fresh)
        for layer in loaded:
            layer.set_backend(activation_bits=None)
        with torch.no_grad():
            assert torch.equal(loaded(x), trained)
        assert loaded[0].spec == QuantSpec(**options)
    assert loaded.half()[0].weight_scale.dtype == model[0].weight_scale.dtype


@pytest.mark.parametrize("options", [{"group_size": 32}, {"group_size": 32, "weights": "binary"}], ids=str)
def test_a_hugging_face_model_comes_back_and_converts(options: dict[str, Any], tmp_path: Path) -> None:
    model = llama()
    bitnet.replace_linear(model, **options)
    expected = model.eval()(IDS).logits
    bitnet.save(model, tmp_path / "latent")
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "hub")
    assert torch.equal(bitnet.load(tmp_path / "hub")(IDS).logits, expected)
    for source, to in (("latent", "hub"), ("hub", "base3"), ("base3", "hub"), ("hub", "bf16")):
        target = tmp_path / f"{source} to {to}"
        bitnet.convert_checkpoint(tmp_path / source, target, to, console=Console(quiet=True))
        if to != "bf16":
            assert torch.equal(bitnet.load(target)(IDS).logits, expected)
        if to == "base3":
            target.rename(tmp_path / "base3")
    assert not bitnet.diff_checkpoints(tmp_path / "hub", tmp_path / "base3 to hub", Console(quiet=True)).differences
    found = str(bitnet.inspect_checkpoint(tmp_path / "hub"))
    assert "groups of 32" in found


def test_floats_that_are_codes_times_scales_of_groups_are_found_and_kept(tmp_path: Path) -> None:
    """Fails if they are rounded again, which would shrink every scale by its group's share of zeros."""
    model = llama(hidden_size=128, intermediate_size=256)
    bitnet.replace_linear(model, group_size=64, activation_bits=None)
    bitnet.pack(model)
    floats = bitnet.save(model, tmp_path / "packed")
    codes = {name: (m.codes(), m.weight_scale) for name, m in model.named_modules() if isinstance(m, PackedBitLinear)}
    bitnet.unpack(model)
    model.save_pretrained(tmp_path / "float")
    bitnet.convert_checkpoint(tmp_path / "float", tmp_path / "again", "hub", console=Console(quiet=True))
    again = bitnet.load(tmp_path / "again")
    for name, module in again.named_modules():
        if isinstance(module, PackedBitLinear):
            assert module.spec.group_size == 64
            assert torch.equal(module.codes(), codes[name][0])
            used = reference.grouped(module.codes(), 64).any(-1)  # a group of zeros takes any scale
            assert torch.equal(module.weight_scale[used], codes[name][1][used])
    assert floats.exists()


def test_the_coarsest_structure_is_found() -> None:
    codes = torch.randint(-1, 2, (3, 512), dtype=torch.int8)
    for spec in (QuantSpec(), QuantSpec(per_row=True), *(QuantSpec(group_size=size) for size in SIZES)):
        shape = (3, 512 // spec.group_size) if spec.group_size else (3,) if spec.per_row else (1,)
        scale = torch.rand(shape) + 0.5
        weight = reference.dequantize_weight(codes, scale.half() if spec.group_size else scale)
        assert ternary_spec(weight, QuantSpec()) == spec
        found = exact(weight, spec)
        assert found is not None
        assert torch.equal(found.codes, codes)
    assert ternary_spec(torch.randn(3, 512), QuantSpec()) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 48}, r"group_size must be one of \(32, 64, 128, 256\) or None, got 48"),
        ({"group_size": 64, "per_row": True}, "group_size=64 has a scale a row and group, which per_row cannot have"),
        ({"group_size": 64, "weights": "int8"}, "which 8-bit weights cannot have"),
        ({"centered": False}, "centered=False is an option of binary weights, not of ternary ones"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BitLinear(64, 4, **options)


def test_damaged_scales_are_one_clear_error(tmp_path: Path) -> None:
    model = Mlp()
    bitnet.replace_linear(model, group_size=32)
    bitnet.pack(model)
    layer = next(m for m in model.modules() if isinstance(m, PackedBitLinear))
    layer.weight_scale[0, 0] = torch.nan
    with pytest.raises(ValueError, match="weight_scale must be positive and finite"):
        layer.check()
    layer.weight_scale = torch.ones(layer.out_features, 9, dtype=torch.float16)
    with pytest.raises(ValueError, match=r"weight_scale is torch.float16 \[\d+, 9\], but these options need"):
        layer.check()
    with pytest.raises(ValueError, match="the mean of a group is above 65504"):
        ops.quantize_weight(torch.full((2, 64), 1e6), group_size=32)


def test_a_backend_without_such_kernels_says_so() -> None:
    for row in backends.backends("cpu", 8, groups=True):
        assert row.ready or row.detail
    assert backends.choose_backend("auto", torch.device("cpu"), 8, groups=True)


@pytest.mark.parametrize("backend", [name for name in backends.BACKENDS if name.startswith("cpu")])
@pytest.mark.parametrize("size", [None, "row", *SIZES])
@pytest.mark.parametrize("bits", [8, 16])
def test_native_kernels_have_the_definitions_bits(backend: str, size: Any, bits: int) -> None:
    """Over shapes that divide nothing, kinds of weights, dtypes, biases and numbers of tokens."""
    groups = isinstance(size, int)
    if obstacle := backends.BACKENDS[backend].missing(torch.device("cpu"), bits, groups):
        pytest.skip(obstacle)
    draw = torch.Generator().manual_seed(0)
    kinds = ("binary",) if "binary" in backend else ("ternary", "binary")
    for kind in kinds:
        for n, k in ((1, 1), (33, 31), (70, 300), (65, 1100), (40, 2048 + 33)):
            codes = torch.randint(-1, 2, (n, k), dtype=torch.int8, generator=draw)
            if kind == "binary":
                codes[codes == 0] = -1
            scale = (torch.rand(n, -(-k // size), generator=draw) + 0.01).half() if groups else None
            if scale is None:
                scale = torch.rand(n if size else 1, generator=draw) + 0.01
            for m, dtype in ((1, torch.float32), (2, torch.bfloat16), (7, torch.float16), (33, torch.float32)):
                x = torch.randn(m, k, generator=draw).to(dtype)
                bias = torch.randn(n, generator=draw).to(dtype) if m % 2 else None
                expected = reference.ternary_linear(x, codes, scale, bias, bits)
                options = {"out_features": n, "activation_bits": bits, "backend": backend}
                y = ops.ternary_linear(x, layout.pack_ternary(codes), scale, bias, **options)
                assert torch.equal(y, expected), f"{kind} {n} x {k}, {m} tokens of {dtype}"


@pytest.mark.parametrize("size", [32, 256])
def test_native_sums_do_not_overflow_at_the_extremes(size: int) -> None:
    if obstacle := backends.BACKENDS["cpu"].missing(torch.device("cpu"), 16, True):
        pytest.skip(obstacle)
    k = 32768
    for fill in (1, -1):
        codes = torch.full((33, k), fill, dtype=torch.int8)
        scale = torch.ones(33, k // size, dtype=torch.float16)
        for bits in (8, 16):
            for sign in (3.0, -3.0):
                x = torch.full((6, k), sign)
                expected = reference.ternary_linear(x, codes, scale, None, bits)
                y = ops.ternary_linear(
                    x, layout.pack_ternary(codes), scale, activation_bits=bits, backend="cpu", out_features=33
                )
                assert torch.equal(y, expected)


def test_a_bound_layer_notices_new_scales_of_groups() -> None:
    """Fails if the backend's copy of them outlives what it was made from."""
    layer, x = PackedBitLinear(64, 4, bias=False, group_size=32), torch.randn(2, 64)
    layer.weight.copy_(layout.pack_ternary(torch.ones(4, 64, dtype=torch.int8)))
    with torch.no_grad():
        first = layer(x)
        layer.weight_scale.mul_(2)
        assert torch.equal(layer(x), 2 * first)
        layer.weight_scale = layer.weight_scale * 2
        assert torch.equal(layer(x), 4 * first)
