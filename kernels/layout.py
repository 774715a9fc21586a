"""The packed layouts, bit by bit.

Hub layout (transformers `bitnet`, every 1.58-bit checkpoint on the Hub): 2 bits a weight, four *rows* to a
byte. With R = ceil(N/4) packed rows, byte [r, k] holds

    bits   7 6        5 4        3 2        1 0
    row    r + 3R     r + 2R     r + R      r         each as code + 1, so 0 = -1, 1 = 0, 2 = +1

Field value 3 never occurs in a valid tensor. Transformers itself only knows N % 4 == 0; other N are padded
with rows of zeros at the end, and readers cut them off again.
"""

import torch
from torch import Tensor

ZEROS = 0b01010101  # the byte that holds four codes of 0


def packed_rows(out_features: int) -> int:
    """Rows of the packed tensor that holds `out_features` rows of codes: ceil(N / 4)."""
    return -(-out_features // 4)


def pack_ternary(codes: Tensor) -> Tensor:
    """Pack ternary codes four to a byte, in the Hub's layout.

    codes:   int8 [N, K], values -1, 0, 1. Left unchanged.
    returns: uint8 [ceil(N/4), K]; row i + j*ceil(N/4) is bits 2j..2j+1 of row i, as code + 1.
    Raises ValueError for other dtypes, shapes or codes. unpack_ternary inverts it exactly.
    """
    if codes.dtype != torch.int8 or codes.ndim != 2:
        raise ValueError(f"pack_ternary: codes must be int8 [N, K], got {_describe(codes)}")
    if codes.numel() and (int(codes.min()) < -1 or int(codes.max()) > 1):
        raise ValueError(
            f"pack_ternary: codes must be -1, 0 or 1, got values from {int(codes.min())} to {int(codes.max())}; "
            "quantize the weight first (quantize_weight)"
        )
    n, k = codes.shape
    fields = torch.ones(4 * packed_rows(n), k, dtype=torch.uint8, device=codes.device)
    fields[:n] = (codes + 1).to(torch.uint8)
    low, second, third, high = fields.view(4, packed_rows(n), k)
    return low | second << 2 | third << 4 | high << 6


def unpack_ternary(packed: Tensor, out_features: int | None = None) -> Tensor:
    """The inverse of pack_ternary.

    packed:       uint8 [ceil(N/4), K]
    out_features: N; default 4 * rows. Rows beyond it are padding and dropped.
    returns:      int8 [N, K], values -1, 0, 1 (a field of 3, which validate_packed finds, comes out as 2)
    """
    n = check_packed(packed, out_features)
    fields = torch.cat([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    return fields[:n].to(torch.int8) - 1


def check_packed(packed: Tensor, out_features: int | None = None) -> int:
    """Check dtype and shape of a Hub-layout tensor and return N; raises ValueError. Looks at no value."""
    if packed.dtype != torch.uint8 or packed.ndim != 2:
        raise ValueError(f"packed weight must be uint8 [ceil(N/4), K], got {_describe(packed)}")
    n = 4 * packed.shape[0] if out_features is None else out_features
    if packed_rows(n) != packed.shape[0]:
        raise ValueError(
            f"packed weight has {packed.shape[0]} rows, but out_features={n} needs ceil({n}/4) = {packed_rows(n)}"
        )
    return n


def validate_packed(packed: Tensor) -> None:
    """Raise ValueError if any field of a Hub-layout tensor holds 3, which encodes no ternary value."""
    bad = packed & packed >> 1 & 0b01010101
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise ValueError(
            f"packed weight is corrupt: {int(bad.count_nonzero())} bytes hold the code 3, the first at "
            f"[{row}, {column}] (byte 0x{int(packed[row, column]):02x}); valid fields are 0, 1, 2. "
            "Fetch or convert the checkpoint again."
        )


def _describe(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}"
