"""Matrices in ggml's ternary and binary types, weight by weight from the formats' descriptions; none of our packers.

Every function takes codes int8 [N, K] and scales [N, G] (float16 values, or those of rows) as numpy arrays, and returns
bytes.
"""

import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bitnet.convert.files.gguf import TensorInfo, padded, read_header, read_tensor
from bitnet.convert.llama_cpp.header import header_bytes


def half(value: float) -> bytes:
    return struct.pack("<e", value)


def base3(digits: Iterable[int]) -> int:
    """The byte whose digits, the first one highest of five, are read by multiplying and taking what overflows."""
    value = 0
    for digit in [*digits, 0, 0, 0, 0][:5]:
        value = 3 * value + int(digit)
    return -(-value * 256 // 243)


def blocks(codes: Any, scales: Any, size: int) -> Iterable[tuple[list[int], float]]:
    """The weights of each block, and its scale."""
    for row, own in zip(codes, scales, strict=True):
        for start in range(0, len(row), size):
            yield row[start : start + size].tolist(), float(own[start * len(own) // len(row)])


def q1_0(codes: Any, scales: Any) -> bytes:
    data = b""
    for block, d in blocks(codes, scales, 128):
        packed = bytearray(16)
        for i, code in enumerate(block):
            packed[i // 8] |= (code == 1) << i % 8
        data += half(d) + bytes(packed)
    return data


def _q2_0(codes: Any, scales: Any, size: int) -> bytes:
    data = b""
    for block, d in blocks(codes, scales, size):
        packed = bytearray(size // 4)
        for i, code in enumerate(block):
            packed[i // 4] |= (code + 1) << 2 * (i % 4)
        data += half(d) + bytes(packed)
    return data


def q2_0(codes: Any, scales: Any) -> bytes:
    return _q2_0(codes, scales, 64)


def pq2_0(codes: Any, scales: Any) -> bytes:
    return _q2_0(codes, scales, 128)


def ptq1_0(codes: Any, scales: Any) -> bytes:
    data = b""
    for block, d in blocks(codes, scales, 128):
        digits: dict[int, list[int]] = {byte: [] for byte in range(26)}
        for e, code in enumerate(block):  # ascending, so the highest digit of each byte comes first
            byte = e % 16 if e < 80 else 16 + (e - 80) % 8 if e < 120 else 24 + e % 2
            digits[byte].append(code + 1)
        data += bytes(base3(digits[byte]) for byte in range(26)) + half(d)
    return data


def iq1_bn(codes: Any, scales: Any) -> bytes:
    data = b""
    for row, own in zip(codes, scales, strict=True):
        data += half(own[0])
        for start in range(0, len(row), 64):
            fields = (row[start : start + 64] + 1).reshape(4, 16)
            data += bytes(base3(part[::-1]) for sixteen in fields for part in sixteen[:15].reshape(3, 5))
            data += bytes([base3([0, *fields[::-1, 15]])])
    return data


def iq2_bn(codes: Any, scales: Any) -> bytes:
    data = b""
    for row, own in zip(codes, scales, strict=True):
        data += struct.pack("<f", own[0])
        for start in range(0, len(row), 64):
            packed = bytearray(16)
            for i, code in enumerate(row[start : start + 64].tolist()):
                packed[i % 16] |= (code + 1) << 2 * (i // 16)
            data += bytes(packed)
    return data


def iq2_bn_r4(codes: Any, scales: Any) -> bytes:
    data = b""
    for first in range(0, len(codes), 4):
        data += struct.pack("<4f", *(scales[first + r][0] for r in range(4)))
        for start in range(0, codes.shape[1], 64):
            packed = bytearray(64)
            for r in range(4):
                for w in range(64):
                    quarter, j, i = w // 16, w % 16 // 4, w % 4
                    packed[16 * quarter + 4 * r + i] |= (int(codes[first + r, start + w]) + 1) << 2 * j
            data += bytes(packed)
    return data


PACKERS: dict[str, Callable[[Any, Any], bytes]] = {
    "Q1_0": q1_0,
    "Q2_0": q2_0,
    "PQ2_0": pq2_0,
    "PTQ1_0": ptq1_0,
    "IQ1_BN": iq1_bn,
    "IQ2_BN": iq2_bn,
    "IQ2_BN_R4": iq2_bn_r4,
}
IDS = {"Q1_0": 41, "Q2_0": 42, "PQ2_0": 142, "PTQ1_0": 143, "IQ1_BN": 134, "IQ2_BN": 135, "IQ2_BN_R4": 335}
GROUPS = {"Q1_0": 128, "Q2_0": 64, "PQ2_0": 128, "PTQ1_0": 128}  # weights of a block; the others have a scale a row


def matrix(name: str, n: int, k: int, rng: Any) -> tuple[Any, Any]:
    """Random codes and scales that a type can hold: int8 [N, K], and float32 [N, G], with a row and a block of zeros
    where it has zeros."""
    groups = k // GROUPS.get(name, k)
    codes = (2 * rng.integers(0, 2, (n, k)) - 1 if name == "Q1_0" else rng.integers(-1, 2, (n, k))).astype(np.int8)
    scales = rng.uniform(0.01, 0.1, (n, groups)).astype(np.float16).astype(np.float32)
    if name.startswith("IQ2"):
        scales = rng.uniform(0.01, 0.1, (n, 1)).astype(np.float32)  # these keep all of a float32
    if name != "Q1_0":
        codes[1], scales[1] = 0, 0
        codes[2, : k // groups], scales[2, 0] = 0, 0
    return codes, scales


def retyped(source: Path, target: Path, name: str, number: int | None = None) -> dict[str, tuple[Any, Any]]:
    """A GGUF file whose low-bit matrices are random ones of another type; returns their codes and scales by name.

    number: the type's, if it is not the right one
    """
    metadata, tensors = read_header(source)
    rng, found, infos, data = np.random.default_rng(0), {}, {}, b""
    for key, info in tensors.items():
        kind, part = info.kind, b""
        if kind in (35, 42):
            found[key] = matrix(name, *info.shape, rng)
            kind, part = IDS[name] if number is None else number, PACKERS[name](*found[key])
        else:
            part = read_tensor(source, info).tobytes()
        infos[key] = TensorInfo(kind, info.shape, len(data), len(part))
        data += part.ljust(padded(len(part)), b"\0")
    target.write_bytes(header_bytes(metadata, infos) + data)
    return found
