"""Tokenizers in checkpoint folders: what is missing or damaged is one error that says so."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FILES = re.compile(
    r"tokenizer.*|.*vocab.*\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json|chat_template\..*"
    r"|.*\.(spm|tiktoken)|(sentencepiece|spiece|source|target|tekken).*"
)


def load_tokenizer(directory: str | Path, remedy: str = "") -> Any:
    """The tokenizer in a checkpoint folder, as AutoTokenizer loads it.

    remedy: what else the user can do where there is none, as the end of a sentence
    Raises ValueError naming the folder if there is none, or if it cannot be read.
    """
    from transformers import AutoTokenizer

    directory = Path(directory)
    if not directory.is_dir() or not any(FILES.fullmatch(path.name) for path in directory.iterdir()):
        raise ValueError(
            f"{directory}: no tokenizer there; copy its files to it, or AutoTokenizer.from_pretrained(...)."
            f"save_pretrained({str(directory)!r}) of the model it was made from{remedy}"
        )
    with reading(f"{directory}: its tokenizer"):
        return AutoTokenizer.from_pretrained(directory)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Whatever the tokenizer libraries raise about damaged files, as one error."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # the Rust library's panics are no Exceptions
        words = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise ValueError(f"{what} cannot be read ({words}); copy or download it again") from error
