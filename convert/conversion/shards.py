"""Where the tensors of a conversion lie in its safetensors files: known before they are."""

import json
from pathlib import Path
from typing import Any

from ..files.folder import WEIGHTS
from .jobs import WIDTHS, Job, Output


def place(jobs: list[Job], folder: Path, shard_bytes: int) -> dict[Path, list[Output]]:
    """Give every output its file and offset; returns the files with their outputs in the order they have there.

    Jobs fill one file after the other; the outputs of one stay together. In a file wider dtypes come first, so that
    each tensor is aligned, as readers that map files expect.
    """
    shards: list[list[Output]] = [[]]
    size = 0
    for job in jobs:
        needs = sum(output.nbytes for output in job.outputs)
        if shards[-1] and size + needs > shard_bytes:
            shards.append([])
            size = 0
        shards[-1] += job.outputs
        size += needs
    files = {}
    for number, outputs in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        outputs.sort(key=lambda output: -WIDTHS[output.dtype])
        files[folder / name] = outputs
        offset = len(header(outputs))
        for output in outputs:
            output.file, output.offset = folder / name, offset
            offset += output.nbytes
    return files


def header(outputs: list[Output]) -> bytes:
    """What a safetensors file of these tensors begins with: the header's length, and the header."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for output in outputs:
        shape = list(output.shape)
        entries[output.key] = {"dtype": output.dtype, "shape": shape, "data_offsets": [at, at + output.nbytes]}
        at += output.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
