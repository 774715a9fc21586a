"""The safetensors container: what its header says, checked as strictly as safetensors itself does, and tensors.

length of the header        uint64, little-endian
header                      JSON: name -> dtype, shape, data_offsets [begin, end) in the data
data                        every byte of it belongs to exactly one tensor
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .damaged import Damaged
from .json_object import parse_json

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# Others that safetensors has, and the bits of each; they are found by name, and no form here holds them.
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U16": 16, "U32": 32, "U64": 64, "C64": 64}
_BITS |= dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
_BITS |= {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # safetensors' own limit
MAX_DIMENSIONS = 16
PIECE = 1 << 24  # bytes


class TensorHeader(NamedTuple):
    """What a safetensors file says about a tensor without reading it."""

    dtype: str  # as safetensors spells it: "BF16", "U8"
    shape: tuple[int, ...]
    file: Path
    offset: int  # of its first byte in the file

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _BITS[self.dtype] // 8


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorHeader]:
    """Names, dtypes and shapes in safetensors files, in the order of the files and of the bytes in each.

    Raises Damaged naming the file for one that is cut short, is another kind, holds bytes of two tensors or of none,
    or holds a tensor that an earlier file has with another value.
    """
    headers: dict[str, TensorHeader] = {}
    for file in map(Path, files):
        described = _read_header(file)
        for name in headers.keys() & described.keys():
            if not _equal(headers[name], described[name]):
                raise Damaged(
                    file,
                    f"holds another {name} than {headers[name].file.name}, and nothing says which is right",
                    "delete the file that does not belong there, or download both again",
                )
        headers |= described
    return headers


def _read_header(file: Path) -> dict[str, TensorHeader]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > size - 8:
            raise Damaged(file, f"not a complete safetensors file ({size:,} bytes)")
        if length > MAX_HEADER:
            raise Damaged(file, f"its safetensors header is damaged: it would be {length:,} bytes long")
        entries = parse_json(file, stream.read(length), "its safetensors header is damaged:")
    start = 8 + length
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise Damaged(file, "its safetensors header is damaged: __metadata__ holds more than texts")
    found = [(*_entry(file, name, entry), name) for name, entry in entries.items()]
    found.sort()
    at = 0
    for begin, end, _, _, name in found:
        if begin != at:
            other = "bytes that belong to no tensor" if begin > at else "another tensor's"
            raise Damaged(file, f"its safetensors header is damaged: {name} begins at byte {begin:,} of the data, but "
                          f"{at:,} is the next that is free, so it would take {other}")  # fmt: skip
        at = end
    if size != start + at:
        words = "it was cut short" if size < start + at else "something was added to it"
        raise Damaged(file, f"is {size:,} bytes, but its header describes {start + at:,}; {words}")
    return {name: TensorHeader(dtype, shape, file, start + begin) for begin, _, dtype, shape, name in found}


def _entry(file: Path, name: str, entry: Any) -> tuple[int, int, str, tuple[int, ...]]:
    """Begin, end, dtype and shape of a tensor."""
    where = f"its safetensors header is damaged: {name!r:.200}"
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise Damaged(file, f"{where} has no dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise Damaged(file, f"{where} is of the dtype {dtype!r:.80}, which there is not")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2 or len(shape) > MAX_DIMENSIONS:
        raise Damaged(file, f"{where} has shape {shape!r:.80} and data_offsets {offsets!r:.80}")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise Damaged(
            file, f"{where} takes {bits / 8:,.10g} bytes as {dtype} {shape}, but has {offsets[1] - offsets[0]:,}"
        )
    if not name.isprintable():
        raise Damaged(file, f"{where} is no name")
    return offsets[0], offsets[1], dtype, tuple(shape)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def _equal(a: TensorHeader, b: TensorHeader) -> bool:
    """Do two entries describe the same values, bit for bit?"""
    if a[:2] != b[:2]:
        return False
    with a.file.open("rb") as one, b.file.open("rb") as other:
        one.seek(a.offset)
        other.seek(b.offset)
        left = a.nbytes
        while left:
            pieces = one.read(min(left, PIECE)), other.read(min(left, PIECE))
            if pieces[0] != pieces[1] or not pieces[0]:
                return False
            left -= len(pieces[0])
    return True


def read_into(tensor: Tensor, file: Path, offset: int) -> Tensor:
    """Fill a contiguous tensor with bytes of a file. (A mapping of the file would count, and stay, as memory.)"""
    if tensor.numel():
        view = tensor.view(-1).view(torch.uint8).numpy().data
        with file.open("rb", buffering=0) as stream:
            stream.seek(offset)
            while view:
                count = stream.readinto(view)
                if not count:
                    raise OSError(f"{file}: ended {len(view):,} bytes early while it was read")
                view = view[count:]
    return tensor
