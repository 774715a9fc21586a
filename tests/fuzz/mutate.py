"""Structured damage to the files of a checkpoint: headers stay readable, values change their type, size and place.

Each mutation takes a random generator and a folder (or GGUF file) that it may change, and returns what it did. Those in
VALID only say something else about the model, which no reader can know to be wrong.
"""

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 1000, 10**6, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0, 1e-9,
    1e308, float("nan"), float("inf"), "", "x", "16", "none", "../x", "/etc/passwd", "\u0000", "\ud800", "ä" * 300,
    "a" * 10**5,
    [], {}, [1], ["x"], [None], [[1]], {"a": 1}, {"": None}, [0] * 1000,
]  # fmt: skip
DTYPES = [
    "F64",
    "F32",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "I64",
    "I32",
    "I16",
    "I8",
    "U8",
    "U16",
    "U32",
    "BOOL",
    "C64",
]
NAMES = ["../secret.safetensors", "/etc/passwd", "model.safetensors", "missing.safetensors", "config.json", "", "a/b"]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def damage_json(rng: random.Random, value: dict[str, Any], nasty: list[Any] = NASTY) -> tuple[Any, str]:
    """One change somewhere in a JSON object."""
    value = copy.deepcopy(value)
    path = rng.choice(places(value)[1:])
    owner, key, item = at(value, path[:-1]), path[-1], at(value, path)
    kind = rng.choice(["replace", "replace", "replace", "number", "remove", "wrap", "nest", "rename", "swap"])
    if kind == "number" and type(item) in (int, float):
        owner[key] = rng.choice([item + 1, item - 1, -item, item * 2, item * 10**6, str(item), float(item), [item]])
    elif kind == "remove":
        del owner[key]
    elif kind == "wrap":
        owner[key] = rng.choice([[item], {"value": item}, str(item)])
    elif kind == "nest":
        for _ in range(rng.choice([5, 100, 5000])):
            item = [item] if rng.random() < 0.5 else {"a": item}
        owner[key] = item
    elif kind == "rename" and isinstance(owner, dict):
        owner[rng.choice([f"{key}x", str(key)[1:], "weight", "__metadata__"])] = owner.pop(key)
    elif kind == "swap":
        other = rng.choice(places(value)[1:])
        if other[: len(path)] != path and path[: len(other)] != other:
            owner[key], at(value, other[:-1])[other[-1]] = copy.deepcopy(at(value, other)), item
    else:
        owner[key] = rng.choice(nasty)
    return value, f"{kind} {'.'.join(map(str, path))}"


def dump(value: Any) -> bytes:
    """JSON of anything, however deep."""
    depth, inner = 0, value
    while isinstance(inner, list | dict) and len(inner) == 1 and depth < 10**4:
        inner, depth = next(iter(inner.values() if isinstance(inner, dict) else inner)), depth + 1
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b"[" * 5000 + b"]" * 5000


def damage_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """One change to bytes that know of no structure."""
    at = rng.randrange(len(data) or 1)
    kind = rng.choice(["cut", "empty", "flip", "insert", "double", "utf16"])
    changed = {
        "cut": data[:at],
        "empty": b"",
        "flip": data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
        "insert": data[:at] + rng.choice([b"\xff", b"\0" * 9, b'"', b"{", b"[" * 10**4]) + data[at:],
        "double": data + data,
        "utf16": data[:2000].decode("latin1").encode("utf-16"),
    }[kind]
    return changed, f"{kind} at {at}"


def mutate_json_file(rng: random.Random, file: Path, under: tuple[str, ...] = ()) -> str:
    """Damage a JSON file, or the part of it under some keys."""
    data = file.read_bytes()
    if rng.random() < 0.1 or not isinstance(value := json.loads(data), dict):
        changed, what = damage_bytes(rng, data)
        file.write_bytes(changed)
        return f"{file.name}: {what}"
    part = at(value, under)
    if under and isinstance(part, dict) and part:
        changed, what = damage_json(rng, part)
        at(value, under[:-1])[under[-1]] = changed
    else:
        value, what = damage_json(rng, value)
    file.write_bytes(dump(value))
    return f"{file.name}: {'.'.join(under)} {what}"


def mutate_config(rng: random.Random, folder: Path) -> str:
    under: tuple[str, ...] = ()
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" in config and rng.random() < 0.5:
        under = ("quantization_config",)
        if "bitnet_toolkit" in config["quantization_config"] and rng.random() < 0.6:
            under += ("bitnet_toolkit",)
    return mutate_json_file(rng, folder / "config.json", under)


def mutate_header(rng: random.Random, folder: Path) -> str:
    file = rng.choice(sorted(folder.glob("*.safetensors")))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = rng.choice([key for key in header if key != "__metadata__"])
    other = rng.choice([key for key in header if key != "__metadata__"])
    entry = header[name]
    kind = rng.choice(
        ["json", "dtype", "shape", "offsets", "same", "swap", "lost", "name", "length", "raw", "moved", "tail"]
    )
    if kind == "json":
        header, what = damage_json(rng, header)
        kind += " " + what
    elif kind == "dtype":
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == "shape":
        shape = entry["shape"]
        entry["shape"] = rng.choice([shape[::-1], [*shape, 1], [1, *shape], shape[:-1], [2**62, 4], [-1], [0]])
    elif kind == "offsets":
        shift = rng.choice([-1, 1, 4, -4, 64, -64, 2**40, 2**63])
        entry["data_offsets"] = [offset + shift * rng.choice([0, 1, 1]) for offset in entry["data_offsets"]]
    elif kind == "same":
        entry["data_offsets"] = header[other]["data_offsets"]
    elif kind == "swap":
        header[name], header[other] = header[other], header[name]
    elif kind == "lost":
        del header[name]
    elif kind == "name":
        header[rng.choice([other, "x", "", f"{name}.weight", name.replace("0", "1"), "a\nb"])] = header.pop(name)
    elif kind == "moved":
        entry["data_offsets"] = entry["data_offsets"][::-1]
    elif kind == "tail":
        rest = rng.choice([rest + b"\0" * 8, rest[:-4], b""])
    text = dump(header)
    size = len(text)
    if kind == "length":
        size = rng.choice([0, 1, size - 1, size + 1, 2**31, 2**63, len(data)])
    file.write_bytes(struct.pack("<Q", size) + text + rest)
    if kind == "raw":
        changed, what = damage_bytes(rng, data[: 8 + length])
        file.write_bytes(changed + rest)
    return f"{file.name}: {kind} {name}"


def mutate_index(rng: random.Random, folder: Path) -> str:
    file = folder / "model.safetensors.index.json"
    if rng.random() < 0.5:
        index = json.loads(file.read_text())
        name = rng.choice(sorted(index["weight_map"]))
        index["weight_map"][name] = rng.choice(NAMES)
        file.write_text(json.dumps(index))
        return f"{file.name}: {name} in {index['weight_map'][name]!r}"
    return mutate_json_file(rng, file)


def mutate_shards(rng: random.Random, folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    a, b = rng.sample(files, 2)
    kind = rng.choice(["copied", "swapped", "removed", "folder", "link"])
    if kind == "copied":
        shutil.copyfile(a, b)
    elif kind == "swapped":
        data = a.read_bytes()
        a.write_bytes(b.read_bytes())
        b.write_bytes(data)
    else:
        a.unlink()
        if kind == "folder":
            a.mkdir()
        elif kind == "link":
            a.symlink_to(rng.choice([a, "/etc/passwd", folder.parent / "secret.safetensors"]))
    return f"{kind} {a.name} {b.name}"


def mutate_tokenizer(rng: random.Random, folder: Path) -> str:
    names = [path for path in sorted(folder.iterdir()) if path.name in ("tokenizer.json", "tokenizer_config.json")]
    return mutate_json_file(rng, rng.choice(names))


# GGUF


def gguf_parts(data: bytes) -> list[tuple[str, int, int]]:
    """(what, first byte, width) of every number in the header of a GGUF file, by a reader of its own."""
    widths = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
    found = [("version", 4, 4), ("tensors", 8, 8), ("entries", 16, 8)]
    place = 24

    def number(what: str, width: int) -> int:
        nonlocal place
        found.append((what, place, width))
        place += width
        return int.from_bytes(data[place - width : place], "little")

    def text(what: str) -> str:
        nonlocal place
        size = number(f"length of {what}", 8)
        found.append((what, place, max(size, 1)))
        place += size
        return data[place - size : place].decode(errors="replace")

    def value(what: str, kind: int, top: bool = True) -> None:
        nonlocal place
        if kind == 8:
            text(what)
        elif kind == 9:
            element, count = number(f"element type of {what}", 4), number(f"count of {what}", 8)
            for index in range(count):
                if element == 8:
                    before = len(found)
                    text(what)
                    if index > 2:
                        del found[before:]
                else:
                    place += widths[element]
        else:
            number(what, widths[kind])

    counts = [int.from_bytes(data[start : start + 8], "little") for start in (8, 16)]
    for _ in range(counts[1]):
        key = text("key")
        value(f"value of {key}", number(f"type of {key}", 4))
    for _ in range(counts[0]):
        name = text("tensor")
        for _ in range(number(f"dimensions of {name}", 4)):
            number(f"size of {name}", 8)
        number(f"type of {name}", 4)
        number(f"offset of {name}", 8)
    return found


def mutate_gguf(rng: random.Random, file: Path) -> str:
    data = bytearray(file.read_bytes())
    what, start, width = rng.choice(gguf_parts(bytes(data)))
    kind = rng.choice(["number", "number", "number", "bytes", "cut", "insert"])
    if kind == "number" and width <= 8:
        old = int.from_bytes(data[start : start + width], "little")
        new = rng.choice([0, 1, 2, 3, 4, 6, 7, 8, 9, 12, 13, old + 1, old - 1, old * 2, 2**31, 2**63, 2**64 - 1, 255])
        data[start : start + width] = (new % 2 ** (8 * width)).to_bytes(width, "little")
        what += f" {old} -> {new}"
    elif kind == "cut":
        del data[start : start + rng.choice([1, width, len(data)])]
    elif kind == "insert":
        data[start:start] = rng.choice([b"\0", b"\xff" * 8, b"\x09\0\0\0\x01\0\0\0\0\0\0\0" * 3000])
    else:
        data[start : start + width] = bytes(rng.randrange(256) for _ in range(min(width, 64)))
    file.write_bytes(bytes(data))
    return f"{kind} {what}"


def mutate_data(rng: random.Random, path: Path) -> str:
    """Damage the values of a tensor: no header says what they must be, but not all bytes are codes or scales."""
    file = path if path.is_file() else rng.choice(sorted(path.glob("*.safetensors")))
    data = bytearray(file.read_bytes())
    first = 8 + int.from_bytes(data[:8], "little")  # a GGUF file's is small: most of it is data
    if path.is_file():
        first = max(start + width for _, start, width in gguf_parts(bytes(data)))
    start, width = rng.randrange(first, len(data)), rng.choice([1, 2, 4, 64, 4096])
    fill = rng.choice([b"\0", b"\xff", b"\x00\x7c", b"\x00\x7e", b"\x00\x80", rng.randbytes(64)])
    data[start : start + width] = (fill * 4096)[: min(width, len(data) - start)]
    file.write_bytes(bytes(data))
    return f"{file.name}: {width} bytes at {start}"


MUTATIONS: dict[str, Callable[[random.Random, Path], str]] = {
    "config": mutate_config,
    "header": mutate_header,
    "index": mutate_index,
    "shards": mutate_shards,
    "tokenizer": mutate_tokenizer,
    "gguf": mutate_gguf,
    "data": mutate_data,
}
