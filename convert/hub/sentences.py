"""Folders of sentence-transformers: modules.json says what makes an embedding of a model's tokens."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..files.damaged import Damaged
from ..files.folder import inside
from ..files.json_object import read_json

MODULES, LENGTH, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
POOLINGS = {"cls_token": "cls", "mean_tokens": "mean", "lasttoken": "lasttoken"}  # those that are computed here


@dataclass(frozen=True)
class Sentences:
    """What follows the model, in order.

    kinds:   the names of the modules' classes, the model's first
    folders: where those that have one have their files
    pooling: "mean", "cls" or "lasttoken"; another name, or several, as they are; "" if the folder does not say
    """

    kinds: tuple[str, ...]
    folders: tuple[str, ...]
    pooling: str = ""
    without_prompt: bool = False  # the tokens of the prompt do not count in the mean
    length: int | None = None  # tokens; what is longer is cut
    lower_case: bool = False
    prompt: str = ""  # in front of every text

    def __str__(self) -> str:
        words = [f"{kind} ({self.pooling})" if kind == "Pooling" else kind for kind in self.kinds]
        return f"a sentence-transformers folder: {', '.join(words)}"


def module_folders(directory: Path) -> list[Path]:
    """The folders in a checkpoint's that modules.json names; [] if there is none."""
    return [directory / folder for folder in _modules(directory)[1]]


def read_sentences(directory: Path) -> Sentences | None:
    """What the files of sentence-transformers in a checkpoint's folder say; None if there are none.

    Raises ValueError naming the file that is damaged or missing.
    """
    kinds, folders, homes = _modules(directory)
    if not kinds:
        return None
    pooling: dict[str, Any] = {}
    if "Pooling" in homes:
        pooling = read_json(directory / homes["Pooling"] / "config.json")
    mode = pooling.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else mode if isinstance(mode, list) else None
    if modes is None:  # older ones have a key for each
        modes = [key.removeprefix("pooling_mode_") for key, on in pooling.items() if key[:13] == "pooling_mode_" and on]
    modes = [POOLINGS.get(str(mode), str(mode)) for mode in modes]
    own, prompts = _optional(directory / LENGTH), _optional(directory / PROMPTS)
    length, chosen = own.get("max_seq_length"), prompts.get("default_prompt_name")
    known = prompts.get("prompts") or {}
    prompt = known.get(chosen, "") if isinstance(known, dict) and isinstance(chosen, str) else ""
    if not isinstance(prompt, str) or not (length is None or (type(length) is int and length > 0)):
        raise Damaged(directory / (LENGTH if isinstance(prompt, str) else PROMPTS), "says what cannot be")
    return Sentences(
        kinds,
        folders,
        "+".join(modes),
        pooling.get("include_prompt") is False,
        length,
        own.get("do_lower_case") is True,
        prompt,
    )


def write_sentences(directory: Path, pooling: str, features: int) -> None:
    """Write to a checkpoint's folder that a text's embedding is pooled from its tokens' and divided by its length.

    pooling: one of POOLINGS
    """
    homes = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(homes.items())
    ]
    (directory / homes["Pooling"]).mkdir(exist_ok=True)
    modes = {f"pooling_mode_{mode}": mode == pooling for mode in POOLINGS}
    config = {"word_embedding_dimension": features} | modes
    (directory / homes["Pooling"] / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / MODULES).write_text(json.dumps(modules, indent=2) + "\n")


def _modules(directory: Path) -> tuple[tuple[str, ...], tuple[str, ...], dict[str, str]]:
    """The modules' kinds, the folders they have, and these by kind."""
    file = directory / MODULES
    if not file.is_file():
        return (), (), {}
    entries = read_json(file, list)
    kinds, homes = [], {}
    for entry in entries:
        kind, path = (entry.get(key) if isinstance(entry, dict) else None for key in ("type", "path"))
        if not isinstance(kind, str) or not isinstance(path, str):
            raise Damaged(file, f"has the module {entry!r:.80}, without a type and a path")
        pure = PureWindowsPath(path)
        if PurePosixPath(path).is_absolute() or pure.is_absolute() or pure.drive or ".." in pure.parts:
            raise Damaged(file, f"has a module in {path!r:.80}, outside of the folder")
        if not inside(directory, directory / path):
            raise Damaged(file, f"has a module in {path!r:.80}, a link that leads out of the folder")
        kinds.append(kind.rpartition(".")[2])
        homes[kinds[-1]] = path
    folders = tuple(dict.fromkeys(path for path in homes.values() if PurePosixPath(path).parts))
    return tuple(kinds), folders, homes


def _optional(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
