"""The ternary types of ggml against the gguf package, and against their descriptions spelt out weight by weight."""

import itertools
import struct

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from bitnet.convert.files import ggml

BLOCKED = ["TQ1_0", "TQ2_0", "Q2_0"]  # those with a scale in every block


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


@pytest.mark.parametrize("name", ggml.TERNARY)
def test_bytes_that_encode_nothing_are_refused(name: str) -> None:
    data = ggml.pack(name, codes(), SCALES["one"])
    data[5] = 1 if name == "TQ1_0" else 0xFF  # 1: between the bytes of 0 and of 1
    with pytest.raises(ValueError, match="corrupt"):
        ggml.unpack(name, data, 5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ggml.TERNARY)
def test_scales_that_are_none_are_refused(name: str, value: float) -> None:
    data = ggml.pack(name, codes(), SCALES["one"])
    if name == "I2_S":
        data[-32:-28] = list(struct.pack("<f", value))
    else:
        block = data.reshape(-1, ggml.TERNARY[name].bytes)[1]
        block[slice(0, 2) if name == "Q2_0" else slice(-2, None)] = list(struct.pack("<e", value))
    with pytest.raises(ValueError, match="scale that is negative, infinite or NaN"):
        ggml.scales(name, data, 5)


def test_scales_that_differ_within_a_row_are_refused() -> None:
    data = gguf.quants.quantize(torch.randn(2, 512).numpy(), gguf.GGMLQuantizationType.TQ2_0).reshape(-1)
    with pytest.raises(ValueError, match=r"differ within a row.*--to bf16"):
        ggml.scales("TQ2_0", data, 2)


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
