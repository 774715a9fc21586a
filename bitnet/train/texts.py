"""Documents from files, and their tokens on disk.

A source of documents is any iterable of strings: `documents` reads files, and text that a teacher wrote would be
another.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from ..progress import Progress

BATCH = 1 << 20  # characters that are tokenized at a time


@dataclass(frozen=True)
class Tokens:
    """Documents as one run of tokens.

    ids:       int32 [T]; each document begins with its prefix (see `prefix`) and ends with the end-of-text token
    starts:    int64 [D], where each document begins
    text_bytes: UTF-8 bytes of the documents
    """

    ids: Tensor
    starts: Tensor
    text_bytes: int

    @property
    def per_byte(self) -> float:
        """Tokens a byte of text, the ends of documents included: what turns a loss a token into one a byte."""
        return (len(self.ids) - len(self.starts)) / max(self.text_bytes, 1)


def documents(paths: Iterable[str | Path], column: str = "text") -> Iterator[tuple[str, int]]:
    """The documents of files in order, each with the number of the path it is from.

    A .jsonl file has one a line, its string at the key `column`; a .parquet file and a folder that `datasets` saved
    (Dataset.save_to_disk) one a row; any other file is one document in UTF-8.

    Raises FileNotFoundError or ValueError naming the file, and ImportError where the package datasets is needed.
    """
    for number, path in enumerate(map(Path, paths)):
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        if path.is_dir() or path.suffix == ".parquet":
            yield from ((text, number) for text in _rows(path, column))
            continue
        try:
            if path.suffix == ".jsonl":
                with path.open(encoding="utf-8") as lines:
                    for at, line in enumerate(lines, 1):
                        if line.strip():
                            yield _text_of(line, column, f"{path}, line {at}"), number
            else:
                yield path.read_text(encoding="utf-8"), number
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: not UTF-8 text ({error}); convert it, or leave it out") from None


def _text_of(line: str, column: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        keys = ", ".join(map(repr, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: no text at {column!r} (it has {keys:.200}); name its key with --column")
    return row[column]


def _rows(path: Path, column: str) -> Iterator[str]:
    if path.is_dir() and not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        raise ValueError(f"{path}: a folder, but not one that datasets saved; name the files in it ({path}/*.txt, say)")
    try:
        import datasets
    except ImportError:
        raise ImportError(f"{path} needs the package datasets: pip install datasets") from None
    if path.is_dir():
        data = datasets.load_from_disk(str(path))
        if isinstance(data, dict):
            if "train" not in data:
                raise ValueError(f"{path}: has the splits {', '.join(data)}; name the folder of one, {path}/NAME")
            data = data["train"]
    else:
        data = datasets.Dataset.from_parquet(str(path), keep_in_memory=False)
    if column not in data.column_names:
        raise ValueError(f"{path}: no column {column!r}, only {', '.join(data.column_names)}; name it with --column")
    for row in data:
        yield row[column]


def split(texts: Iterable[tuple[str, int]], share: float, limit: int) -> tuple[Iterator[str], list[str]]:
    """Documents to train on, and others to evaluate on: of each path the last `share` of each run of 1 / share
    documents; of a path with one document, the end of its text.

    limit: how many characters are held out at most; the rest is trained on
    The list is complete when the iterator is at its end.
    """
    held_out: list[str] = []
    period = max(2, round(1 / share)) if share else 0

    def training() -> Iterator[str]:
        size, current, count, pending = 0, -1, 0, ""

        def take(text: str) -> bool:
            nonlocal size
            if not text.strip() or size + len(text) > limit:
                return False
            held_out.append(text)
            size += len(text)
            return True

        def cut(text: str) -> str:
            """A document alone in its file gives its end."""
            at = len(text) - min(int(len(text) * share), limit - size)
            at = text.rfind("\n", 0, at) + 1 or at
            return text[:at] if share and at < len(text) and take(text[at:]) else text

        for text, path in texts:
            if path != current:
                if count == 1:
                    yield cut(pending)
                current, count, pending = path, 1, text
                continue
            if count == 1:
                yield pending
            count += 1
            if not (period and count % period == 0 and take(text)):
                yield text
        if count == 1:
            yield cut(pending)

    return training(), held_out


def prefix(tokenizer: Any) -> list[int]:
    """What precedes the first token of a text: the begin-of-text token, else the end-of-text one, else nothing."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    return []


def tokenize(
    texts: Iterable[str], tokenizer: Any, file: Path, *, console: Console | None = None, total: int | None = None
) -> Tokens:
    """Write the tokens of documents to a file, int32 in the machine's order, and map it.

    total: bytes of text to come, as far as it is known, for the progress shown on `console`
    A document at a time is in memory, and about a megabyte of tokens: longer documents are tokenized in pieces
    that end with a line. Empty documents are left out. Beside FILE comes FILE.json, which says where documents start,
    and which is written last: `mapped` reads the two.
    """
    before = prefix(tokenizer)
    after = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    starts: list[int] = []
    length = size = 0
    file.parent.mkdir(parents=True, exist_ok=True)
    quiet = console or Console(quiet=True)
    with Progress("tokenizing", total or 0, "bytes", quiet, transient=True) as progress, file.open("wb") as out:
        for batch in _batches(texts):
            pieces = [piece for piece, _, _ in batch]
            rows = tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]
            for row, (_, first, last) in zip(rows, batch, strict=True):
                if first:
                    starts.append(length)
                ids = np.array([*before * first, *row, *after * last], dtype=np.int32)
                ids.tofile(out)
                length += len(ids)
            size += sum(len(piece.encode()) for piece in pieces)
            progress.update(min(size, total or 0))
    facts = {"starts": starts, "tokens": length, "text_bytes": size}
    scratch = file.with_name(f"{file.name}.json.part")
    scratch.write_text(json.dumps(facts))
    scratch.replace(file.with_name(f"{file.name}.json"))
    return mapped(file)


def mapped(file: Path) -> Tokens:
    """What tokenize wrote, without reading it into memory."""
    facts = json.loads(file.with_name(f"{file.name}.json").read_text())
    if file.stat().st_size != 4 * facts["tokens"]:
        raise ValueError(f"{file}: has {file.stat().st_size:,} bytes, not the 4 x {facts['tokens']:,} it should have")
    if facts["tokens"]:
        ids = torch.from_file(str(file), shared=False, size=facts["tokens"], dtype=torch.int32)
    else:
        ids = torch.zeros(0, dtype=torch.int32)
    return Tokens(ids, torch.tensor(facts["starts"], dtype=torch.int64), facts["text_bytes"])


def _batches(texts: Iterable[str]) -> Iterator[list[tuple[str, bool, bool]]]:
    """Pieces of documents, about BATCH characters at a time, and whether each begins and ends its document."""
    batch: list[tuple[str, bool, bool]] = []
    size = 0
    for text in texts:
        at = 0
        while at < len(text):
            end = len(text)
            if end - at > BATCH:
                end = text.rfind("\n", at, at + BATCH) + 1 or at + BATCH
            batch.append((text[at:end], at == 0, end == len(text)))
            size += end - at
            at = end
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
