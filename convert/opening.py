"""A checkpoint, whatever its form, as a Source."""

from pathlib import Path
from typing import Any

from .files import mlx
from .files.folder import CONFIG
from .files.json_object import read_json
from .finding import find
from .hub.source import FolderSource
from .llama_cpp.source import GgufSource
from .mlx.source import MlxSource
from .source import Source


def open_source(path: str | Path, *, floats: bool = False, **swap: Any) -> Source:
    """A checkpoint folder, one that MLX quantized among them, a GGUF file, or one of them on the Hub, as a Source.

    path:   see finding.find

    floats: of a GGUF file and of MLX all matrices count as floats, also those that no packed layer can hold
    swap:   skip, include and options, for a float checkpoint
    """
    path = find(path)
    if path.is_file():
        return GgufSource(path, dequantize=floats)
    config = path / CONFIG
    if config.is_file() and mlx.is_mlx(read_json(config)):
        return MlxSource(path, dequantize=floats)
    return FolderSource(path, **swap)
