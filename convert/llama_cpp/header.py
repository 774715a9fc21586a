"""The GGUF container written: a header is bytes, and a tensor is an offset. files/gguf.py reads it.

The `gguf` package's own writer knows only the types of its version and cannot say at which byte a tensor will stand.
"""

import struct

from ..files.gguf import ARRAY, BOOL, FLOAT32, INT32, STRING, UINT32, TensorInfo, padded

Value = bool | int | float | str | list[bool] | list[int] | list[float] | list[str]


def header_bytes(metadata: dict[str, Value], tensors: dict[str, TensorInfo]) -> bytes:
    """Everything in front of the tensors. Integers become uint32 (in arrays int32), floats float32."""
    parts = [struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))]
    for key, value in metadata.items():
        try:
            parts.append(_string(key) + _value(value))
        except (ValueError, struct.error) as error:
            raise ValueError(f"{key}: {error}") from None
    for name, info in tensors.items():
        dimensions = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
        parts.append(_string(name) + dimensions + struct.pack("<IQ", info.kind, info.offset))
    header = b"".join(parts)
    return header.ljust(padded(len(header)), b"\0")


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        if not 0 <= value < 1 << 32:
            raise ValueError(f"{value} is no number that GGUF's metadata hold (uint32)")
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if value and isinstance(value[0], bool):
        return struct.pack(f"<IIQ{len(value)}?", ARRAY, BOOL, len(value), *value)
    if value and isinstance(value[0], int):
        return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)
    if value and isinstance(value[0], float):
        return struct.pack(f"<IIQ{len(value)}f", ARRAY, FLOAT32, len(value), *value)
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))  # type: ignore[arg-type]
