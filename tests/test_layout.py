from collections.abc import Callable

import pytest
import torch
from shapes import SHAPES
from torch import Tensor
from transformers.integrations.bitnet import pack_weights

from bitnet.kernels import layout
from bitnet.kernels.layout import (
    check_packed,
    concat_packed,
    pack_base3,
    pack_ternary,
    packed_rows,
    slice_packed,
    unpack_base3,
    unpack_ternary,
    validate_packed,
)

MATRICES = sorted({(n, k) for _, n, k in SHAPES} | {(2, 3), (3, 2), (7, 9)})
each_matrix = pytest.mark.parametrize(("n", "k"), MATRICES)


def ternary(n: int, k: int) -> Tensor:
    return torch.randint(-1, 2, (n, k), dtype=torch.int8)


@each_matrix
def test_round_trip_returns_the_codes(n: int, k: int) -> None:
    codes = ternary(n, k)
    before = codes.clone()
    packed = pack_ternary(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_rows(n), k)
    unpacked = unpack_ternary(packed, n)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, codes)
    assert torch.equal(codes, before), "the input was changed"


@pytest.mark.parametrize(("n", "k"), [(n, k) for n, k in MATRICES if n * k < 5000])
def test_every_bit_is_where_the_layout_says(n: int, k: int) -> None:
    codes, rows = ternary(n, k), (n + 3) // 4
    expected = [[0] * k for _ in range(rows)]
    for row in range(4 * rows):
        for column in range(k):
            code = int(codes[row, column]) if row < n else 0
            expected[row % rows][column] += (code + 1) * 4 ** (row // rows)
    assert pack_ternary(codes).tolist() == expected


@pytest.mark.parametrize(("n", "k"), [(n, k) for n, k in MATRICES if n % 4 == 0])
def test_bytes_are_those_of_transformers(n: int, k: int) -> None:
    codes = ternary(n, k)
    assert torch.equal(pack_ternary(codes), pack_weights(codes.clone()))  # theirs overwrites its argument


def test_all_81_bytes_of_valid_fields_unpack_and_no_other_validates() -> None:
    digits = torch.cartesian_prod(*[torch.arange(3)] * 4)  # fields, high to low
    valid = (digits * torch.tensor([64, 16, 4, 1])).sum(1)
    codes = unpack_ternary(valid.to(torch.uint8)[None])
    assert torch.equal(codes, digits.flip(1).T.to(torch.int8) - 1)
    for byte in range(256):
        packed = torch.tensor([[85, byte]], dtype=torch.uint8)
        if byte in valid:
            validate_packed(packed)
        else:
            with pytest.raises(
                ValueError, match=rf"1 bytes hold the code 3, the first at \[0, 1\] \(byte 0x{byte:02x}"
            ):
                validate_packed(packed)


def test_strided_codes_and_bytes_are_read_by_value() -> None:
    codes = ternary(8, 6)
    assert torch.equal(pack_ternary(codes.T), pack_ternary(codes.T.contiguous()))
    packed = pack_ternary(ternary(8, 12))[:, ::2]
    assert torch.equal(unpack_ternary(packed), unpack_ternary(packed.contiguous()))


each_pack = pytest.mark.parametrize("pack", [pack_ternary, pack_base3])


@each_pack
@pytest.mark.parametrize("bad", [-128, -2, 2, 127])
def test_a_code_that_is_not_ternary_is_refused(pack: Callable[[Tensor], Tensor], bad: int) -> None:
    codes = ternary(5, 7)
    codes[4, 6] = bad
    with pytest.raises(ValueError, match=rf"{pack.__name__}: codes must be .* got values from .*{bad}.*quantize"):
        pack(codes)


@each_pack
@pytest.mark.parametrize(
    "codes",
    [torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.int32), torch.zeros(4, dtype=torch.int8)],
    ids=["float", "int32", "vector"],
)
def test_codes_of_the_wrong_kind_are_refused(pack: Callable[[Tensor], Tensor], codes: Tensor) -> None:
    with pytest.raises(ValueError, match=r"codes must be int8 \[N, K\], got"):
        pack(codes)


@pytest.mark.parametrize(
    "packed",
    [torch.zeros(4, 4, dtype=torch.int8), torch.zeros(4, 4), torch.zeros(4, dtype=torch.uint8)],
    ids=["int8", "float", "vector"],
)
def test_bytes_of_the_wrong_kind_are_refused(packed: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[ceil\(N/4\), K\], got"):
        unpack_ternary(packed)


@pytest.mark.parametrize("n", [4, 9, 12])
def test_rows_that_do_not_fit_out_features_are_refused(n: int) -> None:
    packed = torch.full((2, 3), 85, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"2 rows, but out_features={n} needs"):
        unpack_ternary(packed, n)
    assert [check_packed(packed, n) for n in (5, 6, 7, 8)] == [5, 6, 7, 8]
    assert check_packed(packed) == 8


@pytest.mark.parametrize(("n", "k"), [*MATRICES, (3, 4), (3, 5), (3, 6), (2, 10)])
def test_base3_round_trip_returns_the_codes(n: int, k: int) -> None:
    codes = ternary(n, k)
    before = codes.clone()
    packed = pack_base3(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (n, (k + 4) // 5)
    unpacked = unpack_base3(packed, k)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, codes)
    assert torch.equal(codes, before), "the input was changed"


def test_every_base3_digit_is_where_the_layout_says() -> None:
    codes = ternary(3, 12)
    for row, packed in zip(codes.tolist(), pack_base3(codes).tolist(), strict=True):
        digits = [code + 1 for code in row] + [1, 1, 1]
        assert packed == [sum(digits[5 * b + i] * 3**i for i in range(5)) for b in range(3)]


def test_base3_bytes_that_encode_nothing_are_refused_and_all_others_read() -> None:
    assert pack_base3(unpack_base3(torch.arange(243, dtype=torch.uint8)[None], 1215)).tolist() == [[*range(243)]]
    for byte in range(243, 256):
        with pytest.raises(ValueError, match=rf"1 bytes are above 242, the first at \[0, 1\] \({byte}\)"):
            unpack_base3(torch.tensor([[0, byte]], dtype=torch.uint8), 10)


@pytest.mark.parametrize(
    ("packed", "k"),
    [(torch.zeros(4, 2, dtype=torch.int8), 10), (torch.zeros(2, dtype=torch.uint8), 10)]
    + [(torch.zeros(4, 2, dtype=torch.uint8), k) for k in (5, 11)],
    ids=["int8", "vector", "too_wide", "too_narrow"],
)
def test_base3_tensors_of_the_wrong_kind_are_refused(packed: Tensor, k: int) -> None:
    with pytest.raises(ValueError, match=rf"must be uint8 \[N, ceil\({k}/5\)\], got"):
        unpack_base3(packed, k)


@each_matrix
def test_a_slice_of_bytes_holds_the_slice_of_the_codes(n: int, k: int) -> None:
    codes = ternary(n, k)
    packed = pack_ternary(codes)
    for rows in (slice(0, n), slice(0, n // 2), slice(n // 2, n), slice(n // 3, n // 3 + 1)):
        for columns in (slice(None), slice(k // 3, k), slice(0, 1)):
            part = slice_packed(packed, n, rows, columns)
            assert torch.equal(part, pack_ternary(codes[rows, columns])), (rows, columns)


@each_matrix
def test_concatenated_bytes_hold_the_concatenated_codes(n: int, k: int) -> None:
    """Fails if quarters of rows are stacked as they are, or a part's padding ends up between its rows and the next."""
    parts = [ternary(rows, k) for rows in (n, 1, 2 * n + 3)]
    joined = concat_packed([pack_ternary(part) for part in parts], [len(part) for part in parts])
    assert torch.equal(joined, pack_ternary(torch.cat(parts)))
    assert torch.equal(slice_packed(joined, 3 * n + 4, slice(n, n + 1)), pack_ternary(parts[1]))


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"different numbers of features: \[3, 4\]"):
        concat_packed([pack_ternary(ternary(4, 3)), pack_ternary(ternary(4, 4))], [4, 4])
    with pytest.raises(ValueError, match="1 rows, but out_features=5 needs"):
        slice_packed(pack_ternary(ternary(4, 3)), 5, slice(0, 1))
    with pytest.raises(ValueError, match="codes must be -1, 0 or 1"):
        slice_packed(torch.tensor([[255]], dtype=torch.uint8), 4, slice(0, 1))


# Rows of a stored weight


@pytest.mark.parametrize("kind", ["ternary", "int8", "int4"])
@pytest.mark.parametrize("n", [1, 3, 4, 10, 13])
def test_rows_are_written_and_read_without_the_others(kind: str, n: int) -> None:
    """Fails if a row goes to, or comes from, another's place or field of a byte."""
    low, high = {"ternary": (-1, 1), "int8": (-128, 127), "int4": (-8, 7)}[kind]
    codes = torch.randint(low, high + 1, (n, 37), dtype=torch.int8)
    stored, at = layout.stored_zeros(n, 37, kind), 0
    assert not layout.codes_of(stored, n, 37).any()
    for part in codes.split(2):
        layout.put_rows(stored, at, part)
        at += len(part)
    assert torch.equal(stored, layout.pack_codes(codes, kind))
    assert torch.equal(layout.codes_of(stored, n, 37), codes)
    rows = torch.randint(0, n, (2, 5))
    assert torch.equal(layout.codes_of_rows(stored, rows, 37), codes[rows])


def test_4_bit_codes_lie_as_in_q4_0() -> None:
    codes = torch.arange(40).remainder(16).sub(8).to(torch.int8)[None]
    packed = layout.pack_int4(codes)
    assert (packed.dtype, packed.shape) == (torch.uint8, (1, 2, 16))
    assert packed[0, 0].tolist() == [17 * i for i in range(16)]  # features i and 16 + i
    assert packed[0, 1].tolist() == [0x80 + i for i in range(8)] + 8 * [0x88]
    for bad in (codes.int(), codes + 1, codes[0]):
        with pytest.raises(ValueError, match="pack_int4: codes must be"):
            layout.pack_int4(bad)
    with pytest.raises(ValueError, match="4-bit weight has 1 rows, but out_features=2"):
        layout.check_stored(packed, 2)
    with pytest.raises(ValueError, match="packed weight has 2 blocks of features, not 65"):
        layout.check_stored(packed, 1, 65)
