"""A checkpoint folder: which of its files are the weights, and what of it lies inside."""

import os
import re
from pathlib import Path, PurePosixPath, PureWindowsPath

from .damaged import Damaged
from .json_object import read_json

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_VARIANT = re.compile(r"model\.([^.]+)\.safetensors|model\.safetensors\.index\.([^.]+)\.json")


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder that from_pretrained would read, of its variant if it has only one.

    Raises FileNotFoundError naming what is missing, and Damaged for an index that names no files of the folder.
    """
    directory = Path(directory)
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory}: no {CONFIG} there; is it a checkpoint directory?")
    if (named := read_json(directory / CONFIG).get("transformers_weights")) is not None:
        return _named(directory / CONFIG, named)
    name = variant(directory)
    weights, index = WEIGHTS, INDEX
    if name is not None:
        weights, index = f"model.{name}.safetensors", f"model.safetensors.index.{name}.json"
    if (directory / weights).is_file():
        return [directory / weights]
    if (directory / index).is_file():
        return _shards(directory / index)
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern))
    remedy = f"; {pickles[0]} is a pickle, which could run code: convert it to safetensors first" if pickles else ""
    raise FileNotFoundError(f"{directory}: neither {WEIGHTS} nor {INDEX} is there{remedy}")


def _named(config: Path, name: object) -> list[Path]:
    """The weights, where config.json names them: from_pretrained reads no others then. (See writing.publish.)"""
    if not isinstance(name, str) or not re.fullmatch(r"[^\x00-\x1f/\\]{1,255}\.safetensors(\.index\.json)?", name):
        raise Damaged(config, f"has {name!r:.200} as transformers_weights, which is no safetensors file of the folder")
    path = config.parent / name
    if not path.is_file():
        raise FileNotFoundError(f"{config.parent}: no {name} there, which {CONFIG} names as its weights")
    if name.endswith(".json"):
        return _shards(path)
    if not inside(config.parent, path):
        raise Damaged(config, f"names {name}, a link that leads out of the folder", "copy the file there instead")
    return [path]


def variant(directory: Path) -> str | None:
    """What from_pretrained needs as `variant` to find the weights: None where it needs nothing, or there are none.

    Raises ValueError if there are several variants and no plain weights.
    """
    if (directory / WEIGHTS).is_file() or (directory / INDEX).is_file():
        return None
    found = filter(None, (_VARIANT.fullmatch(path.name) for path in directory.iterdir()))
    names = sorted({match[1] or match[2] for match in found if "-of-" not in (match[1] or "")})
    if len(names) > 1:
        raise ValueError(
            f"{directory}: holds its weights as {', '.join(names)}, and none as {WEIGHTS}; move the one that is wanted "
            "to a folder of its own, with the other files"
        )
    return names[0] if names else None


def inside(directory: Path, path: Path) -> bool:
    """Does a file of the folder lie in it, links followed? (In the Hub's cache, in the model's folder.)"""
    home, real = (Path(os.path.realpath(item)) for item in (directory, path))
    if home.parent.name == "snapshots" and real.is_relative_to(home.parent.parent / "blobs"):
        return True
    return real.is_relative_to(home)


def _shards(index: Path) -> list[Path]:
    directory, weight_map = index.parent, read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Damaged(index, "has no weight_map, which says where each tensor is")
    names = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^\x00-\x1f]{1,255}\.safetensors", name):
            raise Damaged(index, f"says {tensor!r:.200} is in {name!r:.200}, which is no safetensors file")
        for path in (PurePosixPath(name), PureWindowsPath(name)):
            if path.is_absolute() or path.drive or ".." in path.parts:
                raise Damaged(index, f"says {tensor!r:.200} is in {name!r:.200}, outside of the folder")
        names.add(name)
    missing = [name for name in sorted(names) if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory}: {len(missing)} of the {len(names)} files that {index.name} lists are missing: "
            f"{', '.join(missing[:5])}; copy or download them again"
        )
    for name in sorted(names):
        if not inside(directory, directory / name):
            raise Damaged(index, f"lists {name}, a link that leads out of the folder", "copy the file there instead")
    return [directory / name for name in sorted(names)]
