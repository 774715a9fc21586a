"""The GGUF container read: its metadata, and where its tensors are, without touching them.

The `gguf` package's own reader knows only the types of its version and maps the whole file into memory.

    "GGUF", version 3, tensor count, entry count           uint32, uint32, uint64, uint64; all little-endian
    entries: key, type, value                              strings are a uint64 length and UTF-8
    tensors: name, dimensions (innermost first), type, offset from the start of the data
    zeros up to a multiple of the alignment, then the data, every tensor padded to it, one after the other
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from . import ggml
from .damaged import Damaged

ALIGNMENT = 32
MAX_ARRAY = 1 << 24  # elements; vocabularies have some hundred thousand
REMEDY = "copy or convert it again"

BOOL, UINT32, INT32, FLOAT32, STRING, ARRAY = 7, 4, 5, 6, 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", INT32: "i", FLOAT32: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}


class TensorInfo(NamedTuple):
    """Where a tensor stands and what it is."""

    kind: int  # ggml type
    shape: tuple[int, ...]  # outermost first, as torch has it
    offset: int  # of its first byte; in the file where it was read, in the data where it is to be written
    nbytes: int


def padded(size: int, alignment: int = ALIGNMENT) -> int:
    """size, rounded up to the alignment."""
    return -(-size // alignment) * alignment


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """A file's metadata and where its tensors are.

    Raises Damaged for a file that is no GGUF of version 2 or 3, damaged, cut short, or one part of several.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise Damaged(file, "is no GGUF file (it does not start with GGUF)", "give a GGUF file or a folder")
        reader = _Reader(file, stream, size)
        version = reader.number("I")
        if version not in (2, 3):
            raise Damaged(file, f"is GGUF version {version}; little-endian versions 2 and 3 are read here", REMEDY)
        count, entries = reader.number("Q"), reader.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = reader.string()
            if key in metadata:
                raise reader.damaged(f"has the key {key!r:.200} twice")
            metadata[key] = reader.value(reader.number("I"))
        described: dict[str, tuple[int, tuple[int, ...], int]] = {}
        for _ in range(count):
            name = reader.string()
            dimensions = reader.number("I")
            if not 1 <= dimensions <= 4 or name in described:
                twice = "is there twice" if name in described else f"has {dimensions} dimensions"
                raise reader.damaged(f"{name!r:.200} {twice}")
            shape = tuple(reversed(struct.unpack(f"<{dimensions}Q", reader.take(8 * dimensions))))
            described[name] = reader.number("I"), shape, reader.number("Q")
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise reader.damaged(f"general.alignment is {alignment!r:.80}, not a power of two")
        start = padded(stream.tell(), alignment)
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise Damaged(file, f"is one of {parts!r:.80} parts", "join them with llama-gguf-split --merge")
    kinds = _kinds(file, described, size - start, alignment)
    tensors, end = {}, 0
    for name, (_, shape, offset) in described.items():
        kind = kinds[name]
        try:
            nbytes = ggml.nbytes(kind, shape)
        except ValueError as error:
            raise Damaged(file, f"tensor {name}: {error}", REMEDY) from None
        if offset != end or start + offset + nbytes > size:
            raise Damaged(
                file,
                f"is {size:,} bytes, but tensor {name} stands at byte {start + offset:,} and takes {nbytes:,}, where "
                f"{start + end:,} is the next free; the file was cut short or is damaged",
                REMEDY,
            )
        tensors[name] = TensorInfo(kind, shape, start + offset, nbytes)
        end = padded(offset + nbytes, alignment)
    return metadata, tensors


def _kinds(
    file: Path, described: dict[str, tuple[int, tuple[int, ...], int]], size: int, alignment: int
) -> dict[str, int]:
    """The types of the tensors. One number has had three, which the room that each takes tells apart.

    size: of the data
    """
    kinds = {name: kind for name, (kind, _, _) in described.items()}
    ends = [*(offset for _, _, offset in described.values()), size][1:]
    spans = {}
    for (name, (kind, shape, offset)), end in zip(described.items(), ends, strict=False):
        if kind == ggml.TERNARY["Q2_0"].id:
            room = end - offset  # up to the next tensor, the padding included, or to the end of the file
            spans[name] = shape, range(room - alignment + 1, room + 1)
    try:
        return kinds | dict.fromkeys(spans, ggml.type_42(list(spans.values())))
    except ValueError as error:
        raise Damaged(file, f"tensor {next(iter(spans))}: {error}", "convert what it was made from") from None


def read_tensor(file: Path, info: TensorInfo) -> ggml.Bytes:
    """The bytes of one tensor, in memory of their own (a mapping would count, and stay, as memory)."""
    with file.open("rb", buffering=0) as stream:
        stream.seek(info.offset)
        data = np.fromfile(stream, np.uint8, info.nbytes)
    if len(data) != info.nbytes:
        raise OSError(f"{file}: ended {info.nbytes - len(data):,} bytes early while it was read")
    return data


def map_tensor(file: Path, info: TensorInfo) -> ggml.Bytes:
    """The same without reading them, for what looks at few; let go of it soon, for pages once seen count as memory."""
    return np.memmap(file, np.uint8, "r", info.offset, (info.nbytes,))


class _Reader:
    """Takes the header apart; whatever it is asked for must be there."""

    def __init__(self, file: Path, stream: BinaryIO, size: int) -> None:
        self.file, self.stream, self.size = file, stream, size

    def damaged(self, what: str) -> Damaged:
        """The error to raise."""
        return Damaged(self.file, f"{what}; it was cut short or is damaged", REMEDY)

    def take(self, count: int) -> bytes:
        at = self.stream.tell()
        data = self.stream.read(count) if count <= self.size - at else b""
        if len(data) != count:
            raise self.damaged(f"its header needs {count:,} bytes at byte {at:,}, but the file has {self.size:,}")
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            element, count = self.number("I"), self.number("Q")
            if count > MAX_ARRAY:
                raise self.damaged(f"has an array of {count:,} elements in its metadata")
            if element in _SCALARS:
                width = struct.calcsize(f"<{_SCALARS[element]}")
                return list(struct.unpack(f"<{count}{_SCALARS[element]}", self.take(width * count)))
            if element != STRING:
                raise self.damaged(f"has an array of type {element} at byte {self.stream.tell():,}")
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise self.damaged(f"metadata of type {kind} at byte {self.stream.tell():,}")
        value = self.number(_SCALARS[kind])
        return float(str(np.float32(value))) if kind == FLOAT32 else value  # 1e-6, not 9.99999997e-7
