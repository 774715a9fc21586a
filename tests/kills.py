"""Writes that are killed at every step: `python kills.py KIND TARGET ROOT OPTIONS` looks at what is left after each.

A child dies at its n-th change of a name, or opening of a file, where TARGET is, for n = 0, 1, ... until one lives to
the end. (Children are forks: importing everything once takes longer than a hundred of them.)
"""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tiny import IDS, Mlp, llama
from torch import Tensor
from transformers.utils import logging

import bitnet
from bitnet.convert.conversion.convert import convert_checkpoint

STEPS = {"open", "os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}
EXTRA = {"README.md": b"mine", "notes.ipynb": b"{}", "model-ema.safetensors": b"mine, too"}


def dies(action: Callable[[], object], step: int, *places: str) -> bool:
    """Run `action` in a child that is killed just before the given step; False if it came to the end before."""
    child = os.fork()
    if not child:
        left = step

        def hook(event: str, args: tuple[Any, ...]) -> None:
            nonlocal left
            if event in STEPS and (event in ("os.remove", "os.rmdir") or any(place in str(args) for place in places)):
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

        sys.addaudithook(hook)
        try:
            action()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status != 0


def every_step(action: Callable[[], object], stride: int, *places: str) -> Iterator[int]:
    """The steps at which a child died, until one lives."""
    for step in count(0, stride):
        if not dies(action, step, *places):
            return
        yield step


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def outputs(folder: Path) -> Tensor:
    """Of what loads from a folder."""
    with torch.no_grad():
        if "architectures" in json.loads((folder / "config.json").read_text()):
            return bitnet.load(folder)(IDS).logits
        return bitnet.load(folder, Mlp())(torch.ones(2, 16))


def save_two(root: Path, old: dict[str, Any], new: dict[str, Any], plain: bool = False) -> tuple[Any, Tensor, Tensor]:
    """Save a packed model at root/old, and one whose layers have other options at root/new; returns that, and both
    outputs."""
    for name, options, spec in (("old", old, {}), ("new", new, {"per_row": True})):
        model = Mlp() if plain else llama()
        bitnet.replace_linear(model, **spec)
        bitnet.pack(model)
        bitnet.save(model, root / name, **options)
    return model, outputs(root / "old"), outputs(root / "new")


def kill_saves(
    target: Path, root: Path, old: dict[str, Any], new: dict[str, Any], plain: bool = False, stride: int = 1
) -> None:
    """A save over an earlier one, beside files of the user's own."""
    model, before, after = save_two(root, old, new, plain)
    for name, data in EXTRA.items():
        (root / "old" / name).write_bytes(data)
    places = str(target.resolve()), str(root)
    switched = steps = 0
    shutil.copytree(root / "old", target, dirs_exist_ok=True)
    for steps in every_step(lambda: bitnet.save(model, target, **new), stride, *places):
        found = outputs(target)
        assert torch.equal(found, before) or torch.equal(found, after), f"a mixture at step {steps}"
        assert all((target / name).read_bytes() == data for name, data in EXTRA.items()), steps
        if torch.equal(found, after):
            switched += 1
        else:
            assert not switched, f"the old one again at step {steps}"
        if steps % 3:  # else the next save begins with what this one left over
            empty(target)
            shutil.copytree(root / "old", target, dirs_exist_ok=True)
    assert torch.equal(outputs(target), after)
    wanted = {path.name for path in (root / "new").iterdir()} | EXTRA.keys()
    assert {path.name for path in target.iterdir()} == wanted
    assert steps >= 10
    assert switched
    print(f"old or new at {steps} steps, new at {switched}")


def kill_conversions(target: Path, root: Path, stride: int = 1) -> None:
    """A conversion into an empty folder, or to a new one, each resumed after it was killed."""
    llama().save_pretrained(root / "source")

    def convert(out: Path = target) -> None:
        console = Console(quiet=True)
        convert_checkpoint(root / "source", out, max_shard_size="3KB", resume=True, workers=1, console=console)

    convert(root / "new")
    whole, after = {path.name: path.read_bytes() for path in (root / "new").iterdir()}, outputs(root / "new")
    steps = loaded = 0
    existed = target.exists()
    for steps in every_step(convert, stride, str(target.resolve().parent if not existed else target.resolve())):
        try:
            assert torch.equal(outputs(target), after), f"a mixture at step {steps}"
            loaded += 1
        except FileNotFoundError:
            assert not (target / "config.json").exists(), f"half of it at step {steps}"
        if not (target / "config.json").exists() or (target / ".converting" / "moved.json").exists():
            assert not dies(convert, -1)
        found = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
        assert found == whole, steps
        assert {path.name for path in target.rglob("*")} <= {*found, ".converting", "lock"}, steps
        empty(target)
        if not existed:
            target.rmdir()
    assert {path.name: path.read_bytes() for path in target.iterdir()} == whole
    assert steps >= 10
    print(f"nothing or the new at {steps} steps, the new at {loaded}")


def refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except OSError as error:
        return str(error)
    return ""


def fill_disks(target: Path, root: Path) -> None:
    """`target` is a small disk: with whatever room there is, a save leaves the earlier one or is there itself."""
    model, before, after = save_two(root, {}, {})
    bitnet.save(model, root / "next")
    size = sum(path.stat().st_size for path in (root / "next").iterdir())
    refused = 0
    for room in range(0, 3 * size, 4096):
        empty(target)
        shutil.copytree(root / "old", target, dirs_exist_ok=True)
        names = {path.name for path in target.iterdir()}
        with (target / "filler").open("wb") as filler:
            filler.write(bytes(max(0, shutil.disk_usage(target).free - room)))
        error = refusal(lambda: bitnet.save(model, target))
        if not error:
            assert torch.equal(outputs(target), after)
            continue
        assert "No space left" in error, error
        assert str(target) in error, error
        assert torch.equal(outputs(target), before), room
        assert {path.name for path in target.iterdir()} == {*names, "filler"}, room
        refused += 1
        empty(target)
        (target / "filler").write_bytes(bytes(max(0, shutil.disk_usage(target).free - room)))
        error = refusal(lambda: convert_checkpoint(root / "old", target / "out", "base3", console=Console(quiet=True)))
        kept = {".out-converting"} if "what is finished is kept in" in error else set()
        assert {path.name for path in target.iterdir()} == {"filler", *kept, *([] if error else ["out"])}, room
    assert 1 < refused < 3 * size / 4096
    print(f"{refused} saves refused")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    logging.disable_progress_bar()
    kind, target, root, *rest = sys.argv[1:]
    options = eval(rest[0]) if rest else {}
    {"save": kill_saves, "convert": kill_conversions, "full": fill_disks}[kind](Path(target), Path(root), **options)
