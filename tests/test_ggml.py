"""The ternary types of ggml against the gguf package, and against their descriptions spelt out weight by weight."""

import itertools
import struct

import ggml_blocks
import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.convert.files import ggml
from bitnet.kernels import reference

BLOCKED = ["TQ1_0", "TQ2_0", "Q2_0"]  # ternary ones that are written, with a scale in every block
WRITTEN = [*BLOCKED, "I2_S"]


def codes(n: int = 5, k: int = 512) -> Tensor:
    """Random codes, a row of zeros, and a block of zeros."""
    values = torch.randint(-1, 2, (n, k), dtype=torch.int8)
    values[1] = 0
    values[2, :256] = 0
    return values


SCALES = {"one": torch.tensor([0.0371]), "per row": torch.tensor([0.0371, 0.5, 1.25, 0.002, 3.0])}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_bytes_are_those_of_the_gguf_package(name: str, scale: Tensor) -> None:
    c, kind = codes(), gguf.GGMLQuantizationType[name]
    expected = gguf.quants.quantize((c * scale[:, None]).numpy(), kind)
    assert np.array_equal(ggml.pack(name, c, scale), expected.reshape(-1))
    values = gguf.quants.dequantize(expected, kind)
    assert np.array_equal(ggml.dequantize(name, expected.reshape(-1), 5).numpy(), values)


def test_q2_0_bytes_follow_the_description() -> None:
    c, scale, expected = codes(), SCALES["per row"], b""
    for row, s in zip(c.tolist(), scale.tolist(), strict=True):
        for start in range(0, 512, 64):
            block = row[start : start + 64]
            packed = [0] * 16
            for j, code in enumerate(block):
                packed[j // 4] |= (code + 1) << 2 * (j % 4)
            expected += struct.pack("<e", s if any(block) else 0) + bytes(packed)
    assert ggml.pack("Q2_0", c, scale).tobytes() == expected


def test_i2_s_bytes_follow_the_description() -> None:
    c, scale, expected = codes(), SCALES["one"], b""
    for row in c.tolist():
        for start in range(0, 512, 128):
            packed = [0] * 32
            for j, code in enumerate(row[start : start + 128]):
                packed[j % 32] |= (code + 1) << (6 - 2 * (j // 32))
            expected += bytes(packed)
    expected += struct.pack("<f", scale.item()) + bytes(28)
    assert ggml.pack("I2_S", c, scale).tobytes() == expected


@pytest.mark.parametrize(("name", "rows"), [*itertools.product(BLOCKED, SCALES), ("I2_S", "one")])
def test_codes_and_scales_come_back(name: str, rows: str) -> None:
    c, scale = codes(), SCALES[rows]
    data = ggml.pack(name, c, scale)
    assert len(data) == ggml.nbytes(ggml.TERNARY[name].id, (5, 512))
    assert torch.equal(ggml.unpack(name, data, 5), c)
    expected = scale if name == "I2_S" else scale.half().float()
    if len(scale) > 1:
        expected[1] = 1  # the row of zeros, of whose scale nothing is stored
    assert torch.equal(ggml.scales(name, data, 5), expected)


def test_a_matrix_of_zeros_has_some_scale() -> None:
    data = ggml.pack("TQ2_0", torch.zeros(2, 256, dtype=torch.int8), torch.tensor([0.1]))
    assert ggml.scales("TQ2_0", data, 2).item() > 0


@pytest.mark.parametrize("name", BLOCKED)
def test_codes_under_a_scale_of_zero_are_zeros(name: str) -> None:
    data = ggml.pack(name, torch.ones(1, 512, dtype=torch.int8), torch.tensor([0.5]))
    first = data.reshape(-1, ggml.TERNARY[name].bytes)[0]
    first[slice(0, 2) if name == "Q2_0" else slice(-2, None)] = 0
    block = ggml.TERNARY[name].block
    assert ggml.unpack(name, data, 1)[0].tolist() == [0] * block + [1] * (512 - block)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0", "I2_S"])
def test_bytes_that_encode_nothing_are_refused(name: str) -> None:
    data = ggml.pack(name, codes(), SCALES["one"])
    data[5] = 1 if name == "TQ1_0" else 0xFF  # 1: between the bytes of 0 and of 1
    with pytest.raises(ValueError, match="corrupt"):
        ggml.unpack(name, data, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", WRITTEN)
def test_scales_that_are_none_are_refused(name: str, value: float) -> None:
    data = ggml.pack(name, codes(), SCALES["one"])
    if name == "I2_S":
        data[-32:-28] = list(struct.pack("<f", value))
    else:
        block = data.reshape(-1, ggml.TERNARY[name].bytes)[1]
        block[slice(0, 2) if name == "Q2_0" else slice(-2, None)] = list(struct.pack("<e", value))
    with pytest.raises(ValueError, match="scale that is negative, infinite or NaN"):
        ggml.scales(name, data, 5)


@pytest.mark.parametrize("name", BLOCKED)
def test_scales_that_differ_within_a_row_are_those_of_groups(name: str) -> None:
    """Files by the gguf package's own quantizer, whose blocks have a scale each."""
    if name not in gguf.GGMLQuantizationType.__members__:
        pytest.skip(f"the gguf package has no quantizer for {name}")
    kind = gguf.GGMLQuantizationType[name]
    data = gguf.quants.quantize(torch.randn(2, 512).numpy(), kind).reshape(-1)
    scale = ggml.scales(name, data, 2)
    assert (scale.dtype, scale.shape) == (torch.float16, (2, 512 // ggml.TERNARY[name].block))
    codes = ggml.unpack(name, data, 2)
    expected = gguf.quants.dequantize(data.reshape(2, -1), kind)
    assert torch.equal(reference.dequantize_weight(codes, scale), torch.from_numpy(expected))
    assert np.array_equal(ggml.pack(name, codes, scale), data)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_groups_come_back_as_large_as_they_were(size: int) -> None:
    codes = torch.randint(-1, 2, (3, 768), dtype=torch.int8)
    codes[0, :64] = 0  # takes any scale
    scale = (torch.rand(3, 768 // size) + 0.1).half()
    data = ggml.pack("Q2_0", codes, scale)
    found = ggml.scales("Q2_0", data, 3)
    assert torch.equal(found[1:], scale[1:])
    assert torch.equal(
        reference.dequantize_weight(ggml.unpack("Q2_0", data, 3), found), reference.dequantize_weight(codes, scale)
    )
    if size < 256:
        with pytest.raises(
            ValueError, match=f"it has a scale for {size} features, and this type one for 256; take gguf-q2_0"
        ):
            ggml.pack("TQ2_0", codes, scale)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("name", BLOCKED)
def test_scales_that_float16_would_spoil_are_refused(name: str, scale: float) -> None:
    with pytest.raises(ValueError, match="float16"):
        ggml.pack(name, codes(), torch.tensor([scale]))
    ggml.pack(name, torch.zeros(1, 512, dtype=torch.int8), torch.tensor([scale]))  # zeros need none


def test_8_bit_codes_stay_the_same() -> None:
    c, scale = torch.randint(-127, 128, (3, 64), dtype=torch.int8), torch.tensor([0.01, 0.5, 0.002])
    data = ggml.pack_q8_0(c, scale).reshape(3, -1)
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(values, (c * scale.half().float()[:, None]).numpy())


# The types of forks, and Q1_0, from bytes written weight by weight


def stored(name: str, n: int = 8, k: int = 512, seed: int = 0) -> tuple[Tensor, Tensor, ggml.Bytes]:
    """Codes, scales [N, G], and the bytes that hold them."""
    c, scale = ggml_blocks.matrix(name, n, k, np.random.default_rng(seed))
    data = np.frombuffer(ggml_blocks.PACKERS[name](c, scale), np.uint8)
    return torch.from_numpy(c), torch.from_numpy(scale), data.copy()


@pytest.mark.parametrize("name", ggml_blocks.PACKERS)
def test_codes_and_scales_are_those_that_were_stored(name: str) -> None:
    c, scale, data = stored(name)
    assert ggml.TERNARY[name].id == ggml_blocks.IDS[name]
    assert len(data) == ggml.nbytes(ggml.TERNARY[name].id, (8, 512))
    assert torch.equal(ggml.unpack(name, data, 8), c)
    expected = torch.where(scale > 0, scale, 1)  # what is all zeros takes any
    expected = expected.half() if name in ggml_blocks.GROUPS else expected[:, 0]
    found = ggml.scales(name, data, 8)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    floats = reference.dequantize_weight(c, expected)
    assert torch.equal(ggml.dequantize(name, data, 8), floats)


@pytest.mark.parametrize("name", ["Q1_0", "Q2_0"])
def test_what_is_written_has_the_bytes_of_the_description(name: str) -> None:
    c, scale, data = stored(name)
    assert np.array_equal(ggml.pack(name, c, scale.half()), data)
    rows = torch.arange(1, 9) / 8
    expected = ggml_blocks.PACKERS[name](c.numpy(), (rows[:, None] * (c != 0).any(1, keepdim=True)).numpy())
    if name == "Q1_0":
        assert ggml.pack(name, c, rows).tobytes() == expected


def test_q1_0_is_that_of_the_gguf_package() -> None:
    c, scale, data = stored("Q1_0")
    kind = gguf.GGMLQuantizationType["Q1_0"]
    assert gguf.GGML_QUANT_SIZES[kind] == (128, 18)
    try:
        values = gguf.quants.dequantize(data.reshape(8, -1), kind)
    except NotImplementedError:
        pytest.skip("the gguf package knows Q1_0 by its size only")
    assert np.array_equal(values, (c.view(8, 4, 128) * scale[..., None]).view(8, 512).numpy())


def test_a_block_of_q1_0_without_a_scale_holds_zeros() -> None:
    c, scale, data = stored("Q1_0")
    assert ggml.is_binary("Q1_0", data, 8)
    data[:2] = 0
    c[0, :128] = 0
    assert not ggml.is_binary("Q1_0", data, 8)
    assert torch.equal(ggml.unpack("Q1_0", data, 8), c)
    assert ggml.scales("Q1_0", data, 8)[0, 0] == 1
    packed = ggml.pack("Q1_0", c, scale.half())
    assert torch.equal(ggml.unpack("Q1_0", packed, 8), c)
    c[1, 5] = 0
    with pytest.raises(ValueError, match="has zeros, and Q1_0 only -1 and"):
        ggml.pack("Q1_0", c, scale.half())


@pytest.mark.parametrize("name", ["Q2_0", "PQ2_0"])
def test_weights_of_2_are_counted_and_kept_as_floats(name: str) -> None:
    c, scale = ggml_blocks.matrix(name, 4, 512, np.random.default_rng(1))
    c[0, 3], c[3, 500], c[3, 511] = 2, 2, 2
    data = np.frombuffer(ggml_blocks.PACKERS[name](c, scale), np.uint8)
    with pytest.raises(ValueError, match=r"holds 3 weights \(0\.15 %\) of \+2, so it is not ternary.*--to bf16"):
        ggml.unpack(name, data, 4)
    floats = c.reshape(4, scale.shape[1], -1) * scale[..., None]
    assert np.array_equal(ggml.dequantize(name, data, 4).numpy(), floats.reshape(4, 512))
    c[3], scale[3] = 2, 0  # whatever stands under a scale of zero is zero
    c[0, 3] = 1
    data = np.frombuffer(ggml_blocks.PACKERS[name](c, scale), np.uint8)
    assert ggml.unpack(name, data, 4)[3].count_nonzero() == 0


@pytest.mark.parametrize(
    ("name", "at", "byte"),
    [
        ("PTQ1_0", 3, 1),  # between the bytes of 0 and of 1
        ("PTQ1_0", 25, 1),
        ("IQ1_BN", 2, 1),
        ("IQ1_BN", 2 + 12, 255),  # 242: the fifth digit, which is no weight's, is 2
        ("IQ2_BN", 4, 0xFF),
        ("IQ2_BN_R4", 16, 0xC0),
    ],
)
def test_bytes_of_forks_that_encode_nothing_are_refused(name: str, at: int, byte: int) -> None:
    _, _, data = stored(name)
    data[at] = byte
    with pytest.raises(ValueError, match="corrupt"):
        ggml.unpack(name, data, 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ggml_blocks.PACKERS)
def test_scales_of_forks_that_are_none_are_refused(name: str, value: float) -> None:
    c, scale, _ = stored(name)
    scale[5, 0] = value
    data = np.frombuffer(ggml_blocks.PACKERS[name](c.numpy(), scale.numpy()), np.uint8)
    with pytest.raises(ValueError, match="scale that is negative, infinite or NaN"):
        ggml.scales(name, data, 8)


def test_shapes_and_types_that_there_are_not_are_refused() -> None:
    for kind, shape, reason in (
        (335, (6, 64), "its 6 rows are no multiple of 4, as IQ2_BN_R4 stores them"),
        (41, (4, 64), r"no whole number of Q1_0 blocks \(128\)"),
        (43, (4, 64), "type 43 is FV5"),
        (44, (4, 64), "type 44 is FV5"),
        (4096, (4, 64), "type 4096 is unknown here"),
    ):
        with pytest.raises(ValueError, match=reason):
            ggml.nbytes(kind, shape)
