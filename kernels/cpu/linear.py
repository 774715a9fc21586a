"""The `cpu` backend: weights in its own forms, and products with them.

The forms, of 2, of 1.6 ("base3"), of 1 ("binary", two of them), of 8 and of 4 bits a weight, are described in
csrc/bitnet_cpu.h.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from ..layout import BLOCK, check_rows, check_stored, validate_packed
from ..reference import MOST_16, size_of_groups
from . import pages
from .arena import arena
from .library import (
    BAD_CODE,
    BASE3,
    EIGHT_BITS,
    FLOATS,
    FOUR_BITS,
    ONE_BIT,
    ONE_BIT_TABLES,
    TWO_BITS,
    TYPES,
    check,
    isa_index,
    native,
)


class PreparedWeight(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("per_row", ctypes.c_int32),
        ("bias_type", ctypes.c_int32),
        ("form", ctypes.c_int32),
        ("activation_bits", ctypes.c_int32),
        ("isa", ctypes.c_int32),
    )


ROWS = 32  # of a block
_PIECE = 8 << 20  # bytes
_ZEROS = "1 bit a weight holds the codes -1 and 1 only, and this weight has zeros: store it in 2 bits"
# features of 32 bits
_STEPS = {TWO_BITS: 16, BASE3: 20, ONE_BIT: 32, ONE_BIT_TABLES: 32, EIGHT_BITS: 4, FOUR_BITS: 8}


def form_shape(n: int, k: int, form: int = TWO_BITS) -> tuple[int, int, int]:
    """Shape of the tensor that holds n x k prepacked codes, 128 bytes, or 32 lanes, for 32 rows and some features."""
    return -(-n // ROWS), -(-k // _STEPS[form]), 32 if form == FOUR_BITS else 128


def form_dtype(form: int) -> torch.dtype:
    """And its dtype."""
    return {EIGHT_BITS: torch.int8, FOUR_BITS: torch.int32}.get(form, torch.uint8)


def form_of(weight: Tensor, form: int) -> int:
    """The form of a weight, stored or prepacked: 8-bit and 4-bit ones have their own, others the given one."""
    if weight.dtype == torch.uint8 and weight.ndim == 3 and weight.shape[2] == BLOCK // 2:
        return FOUR_BITS
    return {torch.int8: EIGHT_BITS, torch.int32: FOUR_BITS}.get(weight.dtype, form)


def prepack(packed: Tensor, n: int, form: int = TWO_BITS, k: int | None = None) -> Tensor:
    """A stored weight (Hub bytes uint8 [ceil(N/4), K], int8 [N, K], uint8 [N, ceil(K/32), 16]) to form_shape(N, K),
    exactly and for any N and K.

    k: where 4-bit weights' is not a multiple of 32
    Of a stored weight in a mapped file no page stays in memory (see pages.drop), and of 8 or 4 bits, where it can be a
    large head, few are meanwhile.
    Raises ValueError for bytes that encode no ternary value, and for the forms of 1 bit if a code is 0.
    """
    form = form_of(packed, form)
    _, features = check_stored(packed, n, k)
    weight = empty(n, features, form)
    pieces = [packed]
    if form in (EIGHT_BITS, FOUR_BITS):  # whose rows are in order in both
        pieces = list(packed.split(max(1, _PIECE // (ROWS * packed[0].nbytes)) * ROWS))
    at = 0
    for piece in pieces:
        count = n if len(pieces) == 1 else len(piece)
        if _prepack(piece, False, count, features, form, weight[at // ROWS :]):
            validate_packed(packed)
            raise ValueError(_ZEROS)
        if piece.is_contiguous():
            pages.drop(piece)
        at += count
    return weight


def empty(n: int, k: int, form: int) -> Tensor:
    """Room for n x k prepacked codes."""
    shape = form_shape(n, k, form)
    return arena.empty(*shape[:2], 128).view(form_dtype(form))


def put_codes(weight: Tensor, at: int, codes: Tensor) -> None:
    """Fill the rows from `at` on, a multiple of ROWS, of a weight of 2, 4 or 8 bits with codes int8 [R, K]; R is such a
    multiple, too, but for the last ones."""
    n, k = codes.shape
    _prepack(codes, True, n, k, form_of(weight, TWO_BITS), weight[at // ROWS :])


def prepack_codes(codes: Tensor, eight_bits: bool, form: int = TWO_BITS) -> Tensor:
    """Codes int8 [N, K] that the form holds, or eight_bits, for a few products: the same, in memory that goes and comes
    quickly."""
    form = EIGHT_BITS if eight_bits else form
    n, k = codes.shape
    weight = codes.new_empty(form_shape(n, k, form), dtype=form_dtype(form))
    if _prepack(codes, True, n, k, form, weight):
        raise ValueError(_ZEROS)
    return weight


def _prepack(source: Tensor, from_codes: bool, n: int, k: int, form: int, weight: Tensor) -> bool:
    """Fill `weight`; returns whether the form does not hold some of the codes."""
    source = source.contiguous()
    args = (source.data_ptr(), from_codes, n, k, weight.data_ptr(), form)
    status = native().bitnet_prepack(*args, torch.get_num_threads())
    if status != BAD_CODE:
        check(status)
    return bool(status)


def unprepack(weight: Tensor, n: int, k: int, form: int = TWO_BITS) -> Tensor:
    """The inverse, as codes int8 [N, K]."""
    codes, form = weight.new_empty(n, k, dtype=torch.int8), form_of(weight, form)
    check(native().bitnet_unprepack(weight.data_ptr(), n, k, codes.data_ptr(), form, torch.get_num_threads()))
    return codes


def unprepack_rows(weight: Tensor, rows: Tensor, k: int) -> Tensor:
    """Some rows of unprepack(weight, n, k), of 2, 4 or 8 bits a weight: int8 [..., K] for rows [...]."""
    lanes = weight.view(torch.int32)[rows // ROWS, :, rows % ROWS]  # of each step the 32 bits that are a row's
    data = lanes.contiguous().view(torch.uint8).unflatten(-1, (-1, 1, 4))
    if (form := form_of(weight, TWO_BITS)) == EIGHT_BITS:
        codes = (data ^ 128).view(torch.int8)
    else:
        bits, zero = (4, 8) if form == FOUR_BITS else (2, 1)
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)[:, None]
        codes = (data >> shifts & 2**bits - 1).view(torch.int8) - zero
    return codes.flatten(-3)[..., :k]


def check_prepacked(
    weight: Tensor, scale: Tensor | None, bias: Tensor | None, n: int, k: int, form: int = TWO_BITS
) -> None:
    """Raise ValueError unless the tensors are those of a layer of N x K: C would read beyond them."""
    needed = form_shape(n, k, form_of(weight, form))
    if tuple(weight.shape) != needed:
        found = list(weight.shape)
        raise ValueError(f"native CPU kernel: weight is prepacked as {found}, but {n} x {k} needs {list(needed)}")
    check_rows(scale, bias, n)
    if scale is not None and scale.dtype == torch.float16:
        size_of_groups(k, scale.shape[1])


def _check_product(form: int, activation_bits: int, group_size: int, k: int) -> None:
    if form == EIGHT_BITS and (group_size or activation_bits == 16):
        raise ValueError("8-bit weights take neither scales of groups nor 16-bit activations; choose backend 'torch'")
    if form == FOUR_BITS and (group_size != BLOCK or activation_bits == 16):
        raise ValueError("4-bit weights take scales of groups of 32 features, and no 16-bit activations")
    if activation_bits == 16 and not group_size and k > MOST_16:
        raise ValueError(
            f"16-bit activations and a scale of a tensor or row take up to {MOST_16} features, not {k}; "
            "choose scales of groups, or activation_bits=8"
        )


def blocks_of_scales(scale: Tensor) -> Tensor:
    """float16 [N, G] as the kernels read it, [ceil(N/32), G, 32]."""
    n, groups = scale.shape
    return torch.nn.functional.pad(scale, (0, 0, 0, -n % 32)).view(-1, 32, groups).transpose(1, 2).contiguous()


def prepared(
    weight: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    n: int,
    k: int,
    form: int = TWO_BITS,
    isa: str | None = None,
    activation_bits: int = 8,
) -> ctypes.Structure:
    """The C description of a layer. It holds the tensors it points to; of a bias in a rare dtype, a float32 copy.

    Scales of groups are copied, too, to the kernels' order.
    """
    form, group_size = form_of(weight, form), 0
    check_prepacked(weight, scale, bias, n, k, form)
    if scale is not None and scale.dtype == torch.float16:
        group_size, scale = size_of_groups(k, scale.shape[1]), blocks_of_scales(scale)
    _check_product(form, activation_bits, group_size, k)
    if bias is not None:
        bias = (bias if bias.dtype in FLOATS else bias.float()).contiguous()
    scale = None if scale is None else scale.contiguous()
    layer = PreparedWeight(
        weight.data_ptr(),
        None if scale is None else scale.data_ptr(),
        None if bias is None else bias.data_ptr(),
        n,
        k,
        group_size,
        scale is not None and not group_size and scale.numel() > 1,
        0 if bias is None else TYPES[bias.dtype],
        form,
        activation_bits,
        isa_index(form, isa),
    )
    layer.alive = (weight, scale, bias)
    return layer


def _multiply(layer: ctypes.Structure, q: Tensor, s: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes q int8 or int16 [M, K] with scales s float32 [M, 1] times a layer, as dtype [M, N]."""
    q = q.contiguous()
    s = None if s is None else s.contiguous()
    y = q.new_empty(len(q), layer.n, dtype=dtype)
    pointer = None if s is None else s.data_ptr()
    args = (q.data_ptr(), TYPES[q.dtype], layer.k, pointer, len(q), y.data_ptr(), TYPES[dtype])
    check(native().bitnet_linear(ctypes.byref(layer), *args, torch.get_num_threads()))
    return y


def int_matmul(q: Tensor, weight: Tensor, n: int, form: int = TWO_BITS, isa: str | None = None) -> Tensor:
    """reference.int_matmul of codes q int8 or int16 [M, K] and prepacked ones: int32 [M, N]; isa: from isas(form)."""
    layer = prepared(weight, None, None, n, q.shape[1], form, isa, _bits_of(q))
    return _multiply(layer, q, None, torch.int32)


def _bits_of(q: Tensor) -> int:
    return 16 if q.dtype == torch.int16 else 8


def codes_linear(
    q: Tensor, s: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, dtype: torch.dtype
) -> Tensor:
    """reference.rescale of int_matmul(q, weight, n), or with scales of groups reference.group_linear: dtype [M, N]."""
    layer = prepared(weight, scale, bias, n, q.shape[1], activation_bits=_bits_of(q))
    return _multiply(layer, q, s, dtype if dtype in FLOATS else torch.float32).to(dtype)


def bind(
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    n: int,
    k: int,
    activation_bits: int | None,
    form: int = TWO_BITS,
    isa: str | None = None,
) -> Callable[[Tensor], Tensor]:
    """A function x [..., K] -> [..., N] with everything about the layer looked up beforehand.

    weight: prepacked; scale: float32 [1] or [N], or float16 [N, G]; bias: floating [N] or None; isa: a name from
    isas(form), by default the best. The function keeps the tensors alive and sees what is later written into them, but
    for scales of groups, of which it has a copy.
    """
    if weight.is_meta:
        check_prepacked(weight, scale, bias, n, k, form)
        size = size_of_groups(k, scale.shape[1]) if scale.dtype == torch.float16 else 0
        _check_product(form_of(weight, form), activation_bits or 8, size, k)
        return lambda x: x.new_empty(*x.shape[:-1], n)
    layer = prepared(weight, scale, bias, n, k, form, isa, activation_bits or 8)
    run, pointer, types, threads = native().bitnet_linear, ctypes.byref(layer), TYPES, torch.get_num_threads

    def linear(x: Tensor) -> Tensor:
        kind = types.get(x.dtype)
        if kind is None:  # float64 and exotic ones: the definition computes in float32, too
            return linear(x.float()).to(x.dtype)
        if not x.is_cpu:
            raise ValueError(f"x is on {x.device}, but this layer is on cpu; move one of them")
        y = x.new_empty(*x.shape[:-1], n)
        stride = k
        if not x.is_contiguous():
            if x.ndim == 2 and x.stride(1) == 1:
                stride = x.stride(0)
            else:
                x = x.contiguous()
        status = run(pointer, x.data_ptr(), kind, stride, None, x.numel() // k, y.data_ptr(), kind, threads())
        if status:
            check(status)
        return y

    return linear
