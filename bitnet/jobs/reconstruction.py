"""The first stage of a run with `reconstruct`: its blocks by themselves, each kept on disk when it is done."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from ..convert.writing import write_whole
from ..train.blocks import BlockReport, reconstruct
from ..train.distill import Distillation
from .setup import Run

FACTS = "block"  # the entry of a file's metadata that has its report


def run_reconstruction(run: Run, store: Path, console: Console) -> list[dict[str, Any]]:
    """Reconstruct the blocks of a run's model, in place; what became of each, as BlockReport has it.

    store: a folder for one file a block; blocks that it has are not trained again
    The text is that of the first rows which the run's own steps will see, documents not told apart.
    """
    options, loop = run.options, run.loop
    assert isinstance(loop.loss, Distillation)
    store.mkdir(exist_ok=True)

    def saved(index: int, block: nn.Module) -> BlockReport | None:
        file = _file(store, index)
        if not file.exists():
            return None
        with safe_open(file, "pt") as stream:
            block.load_state_dict({name: stream.get_tensor(name) for name in block.state_dict()})
            return BlockReport(**json.loads(stream.metadata()[FACTS]))

    def keep(index: int, block: nn.Module, report: BlockReport) -> None:
        state = {name: value.detach().cpu().contiguous() for name, value in block.state_dict().items()}
        write_whole(_file(store, index), save(state, {FACTS: json.dumps(asdict(report))}))

    reports = reconstruct(
        loop.model,
        loop.loss.teacher,
        run.rows.stretches(options.reconstruct_rows),
        steps=options.reconstruct,
        lr=options.reconstruct_lr,
        batch=options.batch,
        seed=options.seed,
        console=console,
        saved=saved,
        save=keep,
    )
    return [asdict(report) for report in reports]


def _file(store: Path, index: int) -> Path:
    return store / f"block-{index:05}.safetensors"
