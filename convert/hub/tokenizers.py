"""Tokenizers in checkpoint folders: what is missing or damaged is one error that says so."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files.damaged import Damaged
from ..files.json_object import parse_json, read_bytes, read_json

FILES = re.compile(
    r"tokenizer.*|.*vocab.*\.(json|txt)|merges\.txt|special_tokens_map\.json|added_tokens\.json|chat_template\..*"
    r"|.*\.(spm|tiktoken)|(sentencepiece|spiece|source|target|tekken).*"
)
MAX_TOKENS = 1 << 24
_LONG_NUMBER = re.compile(rb":[ \t\r\n]*\d{8}")  # in JSON only 0 begins with 0


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
    file = directory / "tokenizer.json"
    if file.is_file():
        _check_ids(file)
    try:
        with reading(f"{directory}: its tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(directory)
            tokenizer("a")  # some damage only shows when it is used
            return tokenizer
    except ValueError:
        if file.is_file():
            read_json(file)  # which says more, if it is no JSON
        raise


def _check_ids(file: Path) -> None:
    """Refuse numbers of tokens so large that the library would fill the memory with what is between them."""
    data = read_bytes(file)
    if _LONG_NUMBER.search(data) is None:  # then there are none, and parsing takes as long as the library itself
        return
    model = parse_json(file, data).get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    numbers = vocabulary.values() if isinstance(vocabulary, dict) else ()
    for number in numbers:
        if type(number) is not int or not 0 <= number < MAX_TOKENS:
            raise Damaged(file, f"gives a token the number {number!r:.80}")


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
