"""Checkpoints as MLX quantizes them, written weight by weight from the format's description; none of our packers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def words(q: Any, bits: int) -> Any:
    """Fields [N, K] as uint32 words: element i of a row in its bits [i * bits, (i + 1) * bits)."""
    packed = np.zeros((len(q), q.shape[1] * bits // 32), np.uint32)
    for row, fields in zip(packed, q.tolist(), strict=True):
        stream = sum(int(value) << i * bits for i, value in enumerate(fields))
        row[:] = [stream >> 32 * i & 0xFFFFFFFF for i in range(len(row))]
    return packed


class Matrix:
    """A matrix [N, K] of unsigned fields, with a scale and a bias for each group; what it means is `floats`."""

    def __init__(self, q: Any, scales: Tensor, biases: Tensor, bits: int) -> None:
        self.q, self.scales, self.biases, self.bits = q, scales, biases, bits

    @property
    def floats(self) -> Tensor:
        n, groups = self.scales.shape
        q = torch.from_numpy(self.q.astype(np.float32)).view(n, groups, -1)
        return (q * self.scales.float()[..., None] + self.biases.float()[..., None]).view(n, -1)


def ternary(n: int, k: int, group: int, rng: Any, dtype: torch.dtype = torch.float16, per_row: bool = False) -> Matrix:
    s = torch.from_numpy(rng.uniform(0.01, 0.1, (n, 1 if per_row else k // group))).to(dtype).expand(n, k // group)
    return Matrix(rng.integers(0, 3, (n, k)), s.contiguous(), -s, 2)


def binary(n: int, k: int, group: int, rng: Any, dtype: torch.dtype = torch.float16) -> Matrix:
    s = torch.from_numpy(rng.uniform(0.01, 0.1, (n, k // group))).to(dtype)
    return Matrix(rng.integers(0, 2, (n, k)), 2 * s, -s, 1)


def affine(n: int, k: int, group: int, bits: int, rng: Any, dtype: torch.dtype = torch.float16) -> Matrix:
    grid = (n, k // group)
    scales, biases = (torch.from_numpy(rng.normal(0, 0.01, grid)).to(dtype) for _ in range(2))
    return Matrix(rng.integers(0, 2**bits, (n, k)), scales, biases, bits)


def save(folder: Path, tensors: dict[str, Any], config: dict[str, Any], quantization: dict[str, Any]) -> Path:
    """Write a folder. tensors: float ones, or Matrix, by their names in the float model."""
    state: dict[str, Any] = {}
    for name, value in tensors.items():
        module = name.removesuffix(".weight")
        if isinstance(value, Matrix):
            state[name] = words(value.q, value.bits)
            state[f"{module}.scales"], state[f"{module}.biases"] = value.scales, value.biases
        else:
            state[name] = value
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "model.safetensors", state)
    section = {"quantization": quantization, "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config | section))
    return folder


def _write(file: Path, state: dict[str, Any]) -> None:
    """With bfloat16, which numpy does not have: as uint16, whose name in the header is then put right."""
    arrays, halves = {}, set()
    for name, value in state.items():
        if isinstance(value, Tensor) and value.dtype == torch.bfloat16:
            halves.add(name)
            value = value.contiguous().view(torch.int16).numpy().view(np.uint16)
        arrays[name] = value.contiguous().numpy() if isinstance(value, Tensor) else value
    save_file(arrays, file, {"format": "mlx"})
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name in halves:
        header[name]["dtype"] = "BF16"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def model(family: Any, rng: Any, make: Any, **others: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A transformers model's tensors, its linear layers made by make(n, k), and its config.

    others: makers of some tensors by the last part of their module's name
    """
    tensors: dict[str, Any] = {}
    for name, value in family.state_dict().items():
        leaf = name.split(".")[-2]
        if leaf in others:
            tensors[name] = others[leaf](*value.shape)
        elif value.ndim == 2 and leaf.endswith("_proj"):
            tensors[name] = make(*value.shape)
        else:
            tensors[name] = value.half()
    return tensors, json.loads(family.config.to_json_string())
