"""A checkpoint, whatever its form, as a Source."""

from pathlib import Path
from typing import Any

from .hub.source import FolderSource
from .llama_cpp.source import GgufSource
from .source import Source


def open_source(path: str | Path, *, floats: bool = False, **swap: Any) -> Source:
    """A checkpoint folder, or a GGUF file, as a Source.

    floats: of a GGUF file all matrices count as floats, also those whose scales no packed layer can hold
    swap:   skip, include and options, for a float checkpoint
    """
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such folder or file")
    if Path(path).is_file():
        return GgufSource(path, dequantize=floats)
    return FolderSource(path, **swap)
