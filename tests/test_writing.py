"""Saves and conversions that are killed, meet full disks, mounts and links, or one another."""

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import IDS, Mlp, llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import bitnet
from bitnet.convert import writing
from bitnet.convert.conversion import convert as conversion
from bitnet.convert.conversion import journal, plan
from bitnet.convert.conversion.convert import convert_checkpoint
from bitnet.convert.opening import open_source

QUIET = Console(quiet=True)
KILLS = Path(__file__).with_name("kills.py")
MOUNTS = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False)
mounts = pytest.mark.skipif(MOUNTS.returncode != 0, reason=f"cannot mount here: {MOUNTS.stderr.decode().strip()}")


def kill(kind: str, target: Path, root: Path, prepare: str = "", **options: Any) -> None:
    """Run kills.py, in a mount namespace of its own where there is something to `prepare` in it."""
    command = [sys.executable, str(KILLS), kind, str(target), str(root), repr(options)]
    if prepare:
        command = ["unshare", "-m", "sh", "-ec", f'{prepare}\nexec "$@"', "sh", *command]
    root.mkdir(exist_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)


def packed(**changes: Any) -> PreTrainedModel:
    model = llama(**changes)
    bitnet.replace_linear(model)
    bitnet.pack(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system than the others."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no /dev/shm of its own to write to")
    folder = shared / f"{tmp_path.parent.name}-{tmp_path.name}-{os.getpid()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


# Killed

ONE: dict[str, Any] = {}
MANY = {"max_shard_size": 3000}


def test_a_save_killed_between_moves_loads_as_old_or_new(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    kill("save", tmp_path / "out", tmp_path / "root", old=MANY, new=MANY, stride=9)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["folder", "link", pytest.param("mount", marks=mounts)])
@pytest.mark.parametrize(
    "options",
    [
        {"old": ONE, "new": ONE},
        {"old": ONE, "new": MANY},
        {"old": MANY, "new": ONE},
        {"old": MANY, "new": MANY},
        {"old": ONE, "new": ONE, "plain": True},
    ],
    ids=["one-one", "one-many", "many-one", "many-many", "module"],
)
def test_a_save_killed_at_any_step_loads_as_old_or_new(
    options: dict[str, Any], place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    target = tmp_path / "out"
    prepare = ""
    if place == "link":
        target.symlink_to(request.getfixturevalue("elsewhere"))
    else:
        target.mkdir()
    if place == "mount":  # below a folder that cannot be written to
        above = tmp_path / "above"
        above.mkdir()
        target = above / "out"
        prepare = (
            f"mount -t tmpfs tmpfs {above}; mkdir {target}; mount -t tmpfs tmpfs {target}; mount -o remount,ro {above}"
        )
    kill("save", target, tmp_path / "root", prepare, **options)


@pytest.mark.parametrize(
    ("place", "stride"),
    [
        pytest.param("mount", 9, marks=mounts),
        *(pytest.param(place, 1, marks=pytest.mark.slow) for place in ("new", "folder", "link")),
        pytest.param("mount", 1, marks=[mounts, pytest.mark.slow]),
    ],
)
def test_a_conversion_killed_at_any_step_is_nothing_or_whole_and_goes_on(
    stride: int, place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    above = tmp_path / "above"
    above.mkdir()
    target = above / "out"
    prepare = (
        f"mount -t tmpfs tmpfs {above}; mkdir {target}; mount -t tmpfs tmpfs {target}; mount -o remount,ro {above}"
    )
    if place == "link":
        target.symlink_to(request.getfixturevalue("elsewhere"))
    elif place == "folder":
        target.mkdir()
    kill("convert", target, tmp_path / "root", prepare if place == "mount" else "", stride=stride)


# Disks


@mounts
@pytest.mark.slow
def test_a_full_disk_leaves_the_earlier_save_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    kill("full", tmp_path / "disk", tmp_path / "root", f"mount -t tmpfs -o size=400k tmpfs {tmp_path / 'disk'}")


def test_links_to_other_disks_are_followed(tmp_path: Path, elsewhere: Path) -> None:
    model = packed()
    (tmp_path / "out").symlink_to(elsewhere)
    (tmp_path / "missing").symlink_to(elsewhere / "new")
    for _ in range(2):
        for target in (tmp_path / "out", tmp_path / "missing"):
            bitnet.save(model, target)
            assert torch.equal(logits(bitnet.load(target)), logits(model))
    shutil.rmtree(elsewhere / "new")
    for path in elsewhere.iterdir():
        path.unlink()
    bitnet.save(model, tmp_path / "source")
    for target in (tmp_path / "out", tmp_path / "missing"):
        convert_checkpoint(tmp_path / "source", target, "base3", console=QUIET)
        assert torch.equal(logits(bitnet.load(target)), logits(model))
        shutil.rmtree(elsewhere / "new", ignore_errors=True)
    assert (tmp_path / "out").is_symlink()
    assert names(elsewhere) == names(tmp_path / "source")


def test_without_hard_links_a_save_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(writing.os, "link", refuse)
    for _ in range(2):
        model = packed()
        bitnet.save(model, tmp_path / "out", **MANY)
        assert torch.equal(logits(bitnet.load(tmp_path / "out")), logits(model))
    assert not [name for name in names(tmp_path / "out") if name.startswith("saved-")]
    assert "transformers_weights" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_without_locks_a_save_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(writing.fcntl, "flock", refuse)
    model = packed(hidden_size=32)
    bitnet.save(model, tmp_path / "out")
    assert torch.equal(logits(bitnet.load(tmp_path / "out")), logits(model))


# What is there already


def half_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, PreTrainedModel]:
    """A folder as a save over an earlier one leaves it that is killed just after the step that decides."""
    bitnet.save(packed(), tmp_path / "out", **MANY)
    model = packed()
    with monkeypatch.context() as patched:
        patched.setattr(writing, "settle", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bitnet.save(model, tmp_path / "out", **MANY)
    assert "transformers_weights" in json.loads((tmp_path / "out" / "config.json").read_text())
    return tmp_path / "out", model


def test_a_half_finished_save_is_read_by_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, model = half_saved(tmp_path, monkeypatch)
    for found in (bitnet.load(out), AutoModelForCausalLM.from_pretrained(out)):
        assert torch.equal(logits(found), logits(model))
    converted = convert_checkpoint(out, tmp_path / "converted", "base3", console=QUIET)
    assert torch.equal(logits(bitnet.load(converted)), logits(model))
    bitnet.save(bitnet.load(out), tmp_path / "again")
    for folder in (converted, tmp_path / "again"):
        assert names(folder) == {"config.json", "generation_config.json", "model.safetensors"}
        assert "transformers_weights" not in json.loads((folder / "config.json").read_text())
    bitnet.save(model, out)
    assert names(out) == names(converted)


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/model.safetensors", "model.bin", "", 5, ["a"], "gone.safetensors"]
)
def test_weights_that_config_names_lie_in_the_folder(name: object, tmp_path: Path) -> None:
    for folder in ("out", "other"):
        bitnet.save(packed(), tmp_path / folder)
    file = tmp_path / "out" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transformers_weights": name}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"transformers_weights|no gone.safetensors there"):
        bitnet.load(tmp_path / "out")


def test_files_of_the_user_survive_a_save(tmp_path: Path) -> None:
    bitnet.save(packed(), tmp_path, **MANY)
    mine = {"README.md", "model-ema.safetensors", "saved-by-me.txt", "tokenizer.json", "train.ipynb"}
    for name in mine:
        (tmp_path / name).write_text(name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "model.safetensors").write_text("mine")
    bitnet.save(packed(), tmp_path)
    assert names(tmp_path) == mine | {"runs", "config.json", "generation_config.json", "model.safetensors"}
    assert all((tmp_path / name).read_text() == name for name in mine)
    assert (tmp_path / "runs" / "model.safetensors").read_text() == "mine"


def test_a_save_that_fails_leaves_no_folder_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no BitLinear"):
        bitnet.save(Mlp(), tmp_path / "deep" / "below")
    assert not names(tmp_path)


# One another


def test_saves_to_one_folder_take_turns(tmp_path: Path) -> None:
    models = [packed() for _ in range(6)]
    threads = [threading.Thread(target=bitnet.save, args=(model, tmp_path / "out"), kwargs=MANY) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = logits(bitnet.load(tmp_path / "out"))
    assert sum(torch.equal(found, logits(model)) for model in models) == 1
    assert names(tmp_path) == {"out"}
    assert len(names(tmp_path / "out")) == len(list((tmp_path / "out").glob("*-of-*"))) + 3


@pytest.mark.parametrize("resume", [False, True])
def test_two_conversions_share_no_folder(resume: bool, tmp_path: Path) -> None:
    bitnet.save(packed(), tmp_path / "source")
    code = """
import sys, time
from bitnet.convert.writing import work_folder
from pathlib import Path
with work_folder(Path(sys.argv[1]), "converting", wait=False):
    print("held", flush=True)
    time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            OSError, match=rf"out is being written by process {other.pid} on .*; wait for it, or choose"
        ):
            convert_checkpoint(tmp_path / "source", tmp_path / "out", "base3", resume=resume, console=QUIET)
        assert not (tmp_path / "out").exists()
        other.kill()
    convert_checkpoint(tmp_path / "source", tmp_path / "out", "base3", resume=resume, console=QUIET)  # the lock died
    assert names(tmp_path) == {"source", "out"}


# Conversions that cannot go on keep what they have


def test_an_error_removes_nothing_that_took_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "source")
    monkeypatch.setattr(journal, "SYNC", 1)
    write, runs = journal.Work.write, []

    def failing(self: Any, job: Any, values: Any) -> None:
        if len(runs) == 4:
            raise ValueError("something in the source")
        runs.append(job.name)
        write(self, job, values)

    folder = tmp_path / ".out-converting"
    monkeypatch.setattr(journal.Work, "write", failing)
    with pytest.raises(ValueError, match=rf"in the source; what is finished is kept in {folder}: go on with resume"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", workers=1, console=QUIET)
    assert len((folder / "journal").read_text().splitlines()) == 4
    config = (tmp_path / "source" / "config.json").read_text()
    with pytest.raises(ValueError, match="or with other options; call it as before, or remove that folder"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", "base3", resume=True, console=QUIET)
    with pytest.raises(FileExistsError, match="holds an interrupted conversion"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", workers=1, console=QUIET)
    assert (tmp_path / "source" / "config.json").read_text() == config
    runs.clear()
    monkeypatch.setattr(
        journal.Work, "write", lambda self, job, values: (runs.append(job.name), write(self, job, values))
    )
    convert_checkpoint(tmp_path / "source", tmp_path / "out", resume=True, console=QUIET)
    assert len(runs) == len(list(plan.plan(open_source(tmp_path / "source"), "hub")[1])) - 4
    assert names(tmp_path) == {"source", "out"}


def test_an_earlier_result_is_not_converted_over(tmp_path: Path) -> None:
    bitnet.save(packed(), tmp_path / "source")
    convert_checkpoint(tmp_path / "source", tmp_path / "out", "base3", console=QUIET)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for resume in (False, True):
        with pytest.raises(FileExistsError, match="out exists already; remove it or choose another name"):
            convert_checkpoint(tmp_path / "source", tmp_path / "out", "hub", resume=resume, console=QUIET)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert names(tmp_path) == {"source", "out"}


def test_what_came_into_the_folder_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bitnet.save(packed(), tmp_path / "source")
    (tmp_path / "out").mkdir()
    run = conversion._run

    def slowly(*args: Any) -> None:
        run(*args)
        (tmp_path / "out" / "config.json").write_text("mine")

    monkeypatch.setattr(conversion, "_run", slowly)
    with pytest.raises(OSError, match=r"out exists already.*what is finished is kept in"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", "base3", console=QUIET)
    monkeypatch.undo()
    assert (tmp_path / "out" / "config.json").read_text() == "mine"
    (tmp_path / "out" / "config.json").unlink()
    convert_checkpoint(tmp_path / "source", tmp_path / "out", "base3", resume=True, console=QUIET)
    assert names(tmp_path / "out") == names(tmp_path / "source")


def test_a_gguf_file_is_not_put_in_the_place_of_a_folder(tmp_path: Path) -> None:
    bitnet.save(packed(), tmp_path / "source")
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match=r"out is a folder; name a file, .*out/model\.gguf say"):
        convert_checkpoint(tmp_path / "source", tmp_path / "out", "gguf-tq2_0", console=QUIET)
    assert names(tmp_path) == {"source", "out"}
