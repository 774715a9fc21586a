"""The folder of an unfinished conversion, and the journal that says what in it is done."""

import json
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files.folder import CONFIG, INDEX
from ..files.safetensors import DTYPES
from ..llama_cpp import writer
from ..source import Source
from ..writing import clear, dissolve, settle, where, write_whole
from .jobs import Job, Output
from .shards import header

MOVED = "moved.json"


SYNC = 256 << 20  # bytes after which finished jobs are noted


NAMES = {dtype: name for name, dtype in DTYPES.items()} | {torch.uint32: "U32"}


def check_target(target: Path, to: str) -> None:
    """Refuse what would overwrite something."""
    if to in writer.KINDS and target.is_dir():
        raise IsADirectoryError(f"convert: {target} is a folder; name a file, {target / 'model.gguf'} say")
    present = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if (work := where(target, "converting")).name in present:  # of a conversion that was interrupted
        present -= {work.name, *moved_names(work)}
    if target.is_dir() and (earlier := target.with_name(f".{target.name}-converting")).is_dir():
        if (earlier / "files").exists():
            raise FileExistsError(
                f"convert: {earlier} holds an interrupted conversion to {target}, from before that folder was there; "
                "remove this empty folder to go on with it, or the other to start afresh"
            )
        shutil.rmtree(earlier)  # killed when it was done
    if present or target.is_file():
        raise FileExistsError(f"convert: {target} exists already; remove it or choose another name")


def moved_names(work: Path) -> list[str]:
    """The names in a work folder of what is complete, and may have been moved to its place in part."""
    return json.loads((work / MOVED).read_text()) if (work / MOVED).exists() else []


class Work:
    """The folder of an unfinished conversion: job.json says of what, journal which jobs are done."""

    def __init__(self, target: Path, folder: Path, fingerprint: dict[str, Any], resume: bool) -> None:
        self.target, self.folder, self.files = target, folder, folder / "files"
        self.path = self.folder / "journal"
        self.done: set[str] = set()
        job = self.folder / "job.json"
        earlier = json.loads(job.read_text()) if job.exists() else None
        if not self.begun():
            clear(folder)
        elif not resume:
            raise FileExistsError(
                f"convert: {folder} holds an interrupted conversion to {target}; go on with resume=True (--resume), or "
                "remove that folder to start afresh"
            )
        elif earlier != fingerprint and not (earlier is None and self.moved()):
            raise ValueError(
                f"convert: {folder} holds an interrupted conversion of another source, or with other options; call it "
                "as before, or remove that folder to start afresh"
            )
        if self.path.exists():
            *lines, rest = self.path.read_bytes().split(b"\n")  # what follows the last line's end was cut off
            self.done = {line.decode() for line in lines}
            os.truncate(self.path, self.path.stat().st_size - len(rest))
        self.handles: dict[Path, int] = {}
        self.pending: list[str] = []
        self.unsynced = 0
        self.lock = threading.Lock()

    def begin(self, fingerprint: dict[str, Any]) -> None:
        write_whole(self.folder / "job.json", json.dumps(fingerprint, indent=1).encode())
        self.files.mkdir(exist_ok=True)

    def begun(self) -> bool:
        """Whether there is anything to go on with."""
        noted = self.path.exists() and self.path.stat().st_size > 0
        kept = (noted, any(self.files.glob(".*.partial")), any(self.folder.glob("calibration/block-*")))
        return self.moved() or (self.files.exists() and any(kept))  # without files the last process was done

    def moved(self) -> bool:
        """Whether all is complete, but for the names."""
        return bool(moved_names(self.folder))

    def create(self, file: Path, outputs: list[Output]) -> bool:
        """Open an output file in its final size, its header written; returns whether it was there in that size."""
        handle = self.handles[file] = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        first = header(outputs)
        size = len(first) + sum(output.nbytes for output in outputs)
        intact = os.fstat(handle).st_size == size
        os.ftruncate(handle, size)
        _write_at(handle, memoryview(first), 0)
        return intact

    def write(self, job: Job, values: list[Iterable[Tensor]]) -> None:
        """Put what a job returned in its places; by any thread."""
        for output, pieces in zip(job.outputs, values, strict=True):
            assert output.file is not None
            at, end = output.offset, output.offset + output.nbytes
            for piece in pieces:
                if NAMES[piece.dtype] != output.dtype or at + piece.nbytes > end:
                    raise RuntimeError(
                        f"{output.key}: {piece.dtype} {list(piece.shape)} is not what was planned: {output}"
                    )
                _write_at(self.handles[output.file], piece.contiguous().view(-1).view(torch.uint8).numpy().data, at)
                at += piece.nbytes
            if at != end:
                raise RuntimeError(f"{output.key}: {end - at} bytes fewer than planned: {output}")
        with self.lock:
            self.pending.append(job.name)
            self.unsynced += sum(output.nbytes for output in job.outputs)
            if self.unsynced >= SYNC:
                self.sync()

    def sync(self) -> None:
        """Note the jobs whose data have reached the disk."""
        for handle in self.handles.values():
            os.fsync(handle)
        with self.path.open("ab") as journal:
            journal.write("".join(f"{name}\n" for name in self.pending).encode())
            journal.flush()
            os.fsync(journal.fileno())
        self.pending, self.unsynced = [], 0

    def close(self) -> None:
        self.sync()
        for handle in self.handles.values():
            os.close(handle)

    def finish(self, files: dict[Path, list[Output]], config: dict[str, Any], source: Source, tokenizer: bool) -> None:
        """Everything but the weights, and the name."""
        source.copy_other_files(self.files, tokenizer)
        if len(files) > 1:
            weight_map = {output.key: file.name for file, outputs in files.items() for output in outputs}
            total = sum(output.nbytes for outputs in files.values() for output in outputs)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.files / INDEX).write_text(json.dumps(index, indent=2) + "\n")
        (self.files / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        check_target(self.target, "")  # some time has passed
        if self.target.exists():
            write_whole(self.folder / MOVED, json.dumps([path.name for path in self.files.iterdir()]).encode())
        self.publish()

    def publish(self) -> None:
        if self.files.exists():  # else the last process was killed when it was done
            settle(self.files, self.target)
        dissolve(self.folder, MOVED)


def _write_at(handle: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(handle, view[: 1 << 30], offset)  # at most 2 GB in one call
        view, offset = view[count:], offset + count
