"""The GGUF container: its header written and read, without touching the tensors.

The `gguf` package's own writer and reader know only the types of their version, cannot say at which byte a tensor
will stand, and map the whole file into memory; here a header is bytes, and a tensor is an offset.

    "GGUF", version 3, tensor count, entry count           uint32, uint32, uint64, uint64; all little-endian
    entries: key, type, value                              strings are a uint64 length and UTF-8
    tensors: name, dimensions (innermost first), type, offset from the start of the data
    zeros up to a multiple of the alignment, then the data, every tensor padded to it
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from . import ggml

ALIGNMENT = 32
Value = bool | int | float | str | list[int] | list[float] | list[str]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_BOOL, _UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 7, 4, 5, 6, 8, 9


class TensorInfo(NamedTuple):
    """Where a tensor stands and what it is."""

    kind: int  # ggml type
    shape: tuple[int, ...]  # outermost first, as torch has it
    offset: int  # of its first byte; in the file where it was read, in the data where it is to be written
    nbytes: int


def padded(size: int, alignment: int = ALIGNMENT) -> int:
    """size, rounded up to the alignment."""
    return -(-size // alignment) * alignment


def header_bytes(metadata: dict[str, Value], tensors: dict[str, TensorInfo]) -> bytes:
    """Everything in front of the tensors. Integers become uint32 (in arrays int32), floats float32."""
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    parts += [_string(key) + _value(value) for key, value in metadata.items()]
    for name, info in tensors.items():
        dimensions = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
        parts.append(_string(name) + dimensions + struct.pack("<IQ", info.kind, info.offset))
    header = b"".join(parts)
    return header.ljust(padded(len(header)), b"\0")


def read_header(file: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """A file's metadata and where its tensors are.

    Raises ValueError for a file that is no GGUF of version 2 or 3, damaged, cut short, or one part of several.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ValueError(f"{file}: is no GGUF file (it does not start with GGUF)")
        reader = _Reader(file, stream, size)
        version = reader.number("I")
        if version not in (2, 3):
            raise ValueError(f"{file}: is GGUF version {version}; little-endian versions 2 and 3 are read here")
        count, entries = reader.number("Q"), reader.number("Q")
        metadata = {}
        for _ in range(entries):
            key = reader.string()
            metadata[key] = reader.value(reader.number("I"))
        described = []
        for _ in range(count):
            name = reader.string()
            dimensions = reader.number("I")
            if not 1 <= dimensions <= 4:
                raise ValueError(f"{file}: is damaged: {name!r} has {dimensions} dimensions")
            shape = tuple(reversed(struct.unpack(f"<{dimensions}Q", reader.take(8 * dimensions))))
            described.append((name, reader.number("I"), shape, reader.number("Q")))
        start = padded(stream.tell(), alignment := metadata.get("general.alignment", ALIGNMENT))
    if metadata.get("split.count", 0) > 1:
        raise ValueError(f"{file}: is one of {metadata['split.count']} parts; join them with llama-gguf-split --merge")
    tensors = {}
    for name, kind, shape, offset in described:
        try:
            nbytes = ggml.nbytes(kind, shape)
        except ValueError as error:
            raise ValueError(f"{file}: tensor {name}: {error}") from None
        if offset % alignment or start + offset + nbytes > size:
            raise ValueError(
                f"{file}: is {size:,} bytes, but tensor {name} stands at byte {start + offset:,} and takes {nbytes:,}; "
                "the file was cut short or is damaged, so copy or convert it again"
            )
        tensors[name] = TensorInfo(kind, shape, start + offset, nbytes)
    return metadata, tensors


def read_tensor(file: Path, info: TensorInfo) -> ggml.Bytes:
    """The bytes of one tensor, in memory of their own (a mapping would count, and stay, as memory)."""
    with file.open("rb", buffering=0) as stream:
        stream.seek(info.offset)
        data = np.fromfile(stream, np.uint8, info.nbytes)
    if len(data) != info.nbytes:
        raise OSError(f"{file}: ended {info.nbytes - len(data):,} bytes early while it was read")
    return data


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", _UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", _FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    if value and isinstance(value[0], int):
        return struct.pack(f"<IIQ{len(value)}i", _ARRAY, _INT32, len(value), *value)
    if value and isinstance(value[0], float):
        return struct.pack(f"<IIQ{len(value)}f", _ARRAY, _FLOAT32, len(value), *value)
    return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_string, value))  # type: ignore[arg-type]


class _Reader:
    """Takes the header apart; whatever it is asked for must be there."""

    def __init__(self, file: Path, stream: BinaryIO, size: int) -> None:
        self.file, self.stream, self.size = file, stream, size

    def take(self, count: int) -> bytes:
        at = self.stream.tell()
        data = self.stream.read(count) if count <= self.size - at else b""
        if len(data) != count:
            raise ValueError(
                f"{self.file}: its header needs {count:,} bytes at byte {at:,}, but the file has {self.size:,}; it "
                "was cut short or is damaged, so copy or convert it again"
            )
        return data

    def number(self, form: str) -> Any:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.number("I"), self.number("Q")
            if element in _SCALARS:
                width = struct.calcsize(f"<{_SCALARS[element]}")
                return list(struct.unpack(f"<{count}{_SCALARS[element]}", self.take(width * count)))
            if count > self.size:
                self.take(count)
            return [self.value(element) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"{self.file}: is damaged: metadata of type {kind} at byte {self.stream.tell():,}")
        value = self.number(_SCALARS[kind])
        return float(str(np.float32(value))) if kind == _FLOAT32 else value  # 1e-6, not 9.99999997e-7
