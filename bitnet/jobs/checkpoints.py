"""Checkpoints of a run, each a folder that is there whole or not at all.

OUT/checkpoints/step-00000500 is a Hugging Face checkpoint of the model in training, with training.safetensors (what
optimizers and random generators remember) and training.json (steps, losses, metrics) beside it. No pickles.
"""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..convert.checkpoint import save
from ..convert.writing import sync
from ..progress import without_bars
from ..train.loop import Loop

TENSORS, FACTS = "training.safetensors", "training.json"


class Checkpoints:
    """Writes checkpoints of a loop: one of the functions that Loop.run calls after each step.

    folder:        theirs
    every:         steps from one to the next, or None
    every_minutes: the same in time
    keep:          how many stay
    """

    def __init__(self, folder: Path, tokenizer: Any, every: int | None, every_minutes: float, keep: int) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.every, self.every_minutes, self.keep = every, every_minutes, keep
        self.written_at = time.monotonic()

    def __call__(self, loop: Loop) -> None:
        due = self.every is not None and loop.step % self.every == 0
        late = time.monotonic() - self.written_at >= 60 * self.every_minutes
        if due or loop.step == loop.schedule.steps or any(loop.processes.any([late, loop.stop])):
            self.write(loop)

    def write(self, loop: Loop) -> Path:
        """A checkpoint of the present step, which the first of the loop's processes writes; returns its folder."""
        path = self.folder / f"step-{loop.step:08}"
        tensors, facts = loop.state()
        self.written_at = time.monotonic()
        if not loop.processes.first:
            return path
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            new = self.folder / ".writing"
            shutil.rmtree(new, ignore_errors=True)  # of a run that was killed
            with without_bars():
                save(loop.model, new)
            self.tokenizer.save_pretrained(new)
            save_file(tensors, new / TENSORS)
            (new / FACTS).write_text(json.dumps(facts))
            sync([*(file for file in new.iterdir() if file.is_file()), new])
            os.rename(new, path)
            sync([self.folder])
        for old in found(self.folder)[: -self.keep]:
            gone = self.folder / ".removing"  # a folder that is half removed must not look like a checkpoint
            shutil.rmtree(gone, ignore_errors=True)
            os.rename(old, gone)
            shutil.rmtree(gone)
        return path


def found(folder: Path) -> list[Path]:
    """The checkpoints there, the latest last."""
    return sorted(folder.glob("step-*"))


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What Loop.restore needs; raises ValueError naming the file if one is missing or damaged."""
    try:
        return load_file(path / TENSORS), json.loads((path / FACTS).read_text())
    except Exception as error:
        raise ValueError(f"{path}: cannot be read ({error}); remove it to go on from an earlier checkpoint") from error
