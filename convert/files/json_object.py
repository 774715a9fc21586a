"""JSON files: an object, or a list, in UTF-8, of bounded size and depth, whatever this machine's locale is."""

import json
from pathlib import Path
from typing import Any

from .damaged import Damaged

MAX_BYTES = 1 << 28  # a tokenizer.json of 200,000 tokens takes 20 MB
MAX_DEPTH = 64


def read_json(file: Path, kind: type = dict) -> Any:
    """The JSON object, or list, in a file. Raises Damaged for anything else; OSError where it cannot be read."""
    return parse_json(file, read_bytes(file), kind=kind)


def read_bytes(file: Path) -> bytes:
    """All of a file, if it is no larger than JSON files are; raises as read_json does."""
    with file.open("rb") as stream:
        data = stream.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise Damaged(file, f"is larger than {MAX_BYTES >> 20} MB, which no JSON file of a model is")
    return data


def parse_json(file: Path, data: bytes, what: str = "is", kind: type = dict) -> Any:
    """The JSON object, or list, in some bytes of a file. what: subject and verb of the error, "its header is", say."""
    try:
        found = json.loads(data.decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise Damaged(file, f"{what} not valid JSON ({error})") from None
    if not isinstance(found, kind):
        expected = "object" if kind is dict else "list"
        raise Damaged(file, f"{what} no JSON {expected}, but a {type(found).__name__}")
    level: list[Any] = [found]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return found
    raise Damaged(file, f"{what} nested more than {MAX_DEPTH} levels deep")
