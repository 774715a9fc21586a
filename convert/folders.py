"""Any checkpoint as a folder that bitnet.load reads: GGUF files are converted on the way."""

import tempfile
from functools import lru_cache
from pathlib import Path

from .finding import find


def find_folder(name: str | Path) -> Path:
    """finding.find, as a folder: a GGUF file is converted once in a process, to a temporary one.

    Low-bit matrices stay packed; a file with none becomes bfloat16.
    """
    path = find(name)
    return _unpacked(path, path.stat().st_mtime_ns) if path.is_file() else path


_KEPT: list[tempfile.TemporaryDirectory[str]] = []  # removed when the process ends


@lru_cache(8)
def _unpacked(file: Path, changed: int) -> Path:
    from .conversion.convert import convert_checkpoint  # which folders do without: a tenth of a second
    from .llama_cpp.source import GgufSource

    source = GgufSource(file)
    words = source.metadata.get("tokenizer.ggml.model", "none") not in (
        "none",
        "no_vocab",
    )  # else what needs one says so
    _KEPT.append(tempfile.TemporaryDirectory(prefix="bitnet-gguf-"))
    target = Path(_KEPT[-1].name) / file.stem
    return convert_checkpoint(file, target, "hub" if source.weights() else "bf16", tokenizer=words)
