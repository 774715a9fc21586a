"""`bitnet train`: from options to a packed model, a report, and checkpoints to go on from.

A run's folder has options.yaml, data/ (the tokens), blocks/ (of a reconstruction), checkpoints/, and at the end model/
(packed), report.json and report.png, which is written last of what a finished run has.
"""

import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import tables
from ..convert.checkpoint import load, save
from ..convert.finding import from_anywhere
from ..convert.swap.pack import pack
from ..convert.writing import write_whole
from ..info import hardware, versions
from ..progress import without_bars
from ..train import texts
from ..train.evaluate import evaluating
from ..train.loop import Loop
from ..train.options import TrainOptions, from_yaml
from ..train.processes import Processes, together
from . import checkpoints
from .models import tokenizer_of, trainable
from .reconstruction import run_reconstruction
from .report import plot
from .setup import Run, build, device_of, evaluate, prepare, settled, sizes, strengths, tokenized, tokenizer_for

OPTIONS, REPORT, BLOCKS = "options.yaml", "report.json", "blocks"
TEXT = "training.bin", "held-out.bin"


def train(options: TrainOptions, console: Console | None = None) -> dict[str, Any]:
    """Train a model as the options say; returns what is in OUT/report.json.

    Raises ValueError or OSError for options that cannot be, before OUT is made; KeyboardInterrupt after a checkpoint if
    it was asked to stop.

    Started by torchrun, all processes train together: each on its share of every batch, so that the run is that of one
    process to float rounding. The first of them writes; OUT must be one folder for all.
    """
    options.check()
    if options.out is None:
        raise ValueError("say where the results go: --out DIR")
    out, options = Path(options.out), settled(options)
    with together(device_of(options)) as processes:
        console = _console(console, processes)
        return _go(_start(options, out, console, processes), out, console)


def _start(options: TrainOptions, out: Path, console: Console, processes: Processes) -> Run:
    """A new run and its folder, which the first process makes."""
    if not processes.first:
        tokenizer = tokenizer_for(options)
        model = build(options, tokenizer, console)
        processes.wait()
        training, held_out = (texts.mapped(out / "data" / name) for name in TEXT)
        return prepare(options, model, tokenizer, training, held_out, processes)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        remedy = f"go on with it: bitnet train --resume {out}; or name" if (out / OPTIONS).exists() else "name"
        raise ValueError(f"{out} is there already; {remedy} another folder")
    tokenizer = tokenizer_for(options)
    model = build(options, tokenizer, console)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        training, held_out = tokenized(options, tokenizer, out / "data", console)
        run = prepare(options, model, tokenizer, training, held_out, processes)
        write_whole(out / OPTIONS, _from_anywhere(options).to_yaml().encode())
    except BaseException:
        _remove(out, made)  # nothing there is worth a second look
        raise
    processes.wait()
    return run


def resume(out: str | Path, console: Console | None = None) -> dict[str, Any]:
    """Go on with a run from its last checkpoint: its loss curve becomes what it would have been, bit for bit, on the
    same machine with as many threads and processes."""
    out = Path(out)
    if not (out / OPTIONS).is_file():
        raise FileNotFoundError(f"{out}: no run to go on with there (it has no {OPTIONS})")
    if (out / REPORT).exists():
        raise ValueError(f"{out}: this run is finished; see {out / 'model'} and {out / REPORT}")
    options = settled(from_yaml(out / OPTIONS))
    with together(device_of(options)) as processes:
        console = _console(console, processes)
        return _go(_found(options, out, console, processes), out, console)


def _found(options: TrainOptions, out: Path, console: Console, processes: Processes) -> Run:
    """The run in a folder, after its last checkpoint."""
    training, held_out = (texts.mapped(out / "data" / name) for name in TEXT)
    found = checkpoints.found(out / "checkpoints")
    tokenizer = tokenizer_of(found[-1]) if found else tokenizer_for(options)
    if not found:
        console.print("there is no checkpoint yet; starting from the beginning", highlight=False)
        model = build(options, tokenizer, console)
        return prepare(options, model, tokenizer, training, held_out, processes)
    tensors, facts = checkpoints.read(found[-1])
    model = trainable(found[-1]).to(device_of(options))
    run = prepare(options, model, tokenizer, training, held_out, processes)
    run.loop.restore(tensors, facts)
    console.print(f"going on after step {run.loop.step:,} of {run.loop.schedule.steps:,}", highlight=False)
    return run


def rehearse(options: TrainOptions, console: Console | None = None) -> dict[str, Any]:
    """What a run would be: sizes, tokens, steps; time and memory, measured on a few steps. Writes nothing to OUT."""
    console = console or Console()
    options.check()
    options = settled(options)
    with together(device_of(options)) as processes:
        if processes.world > 1:
            raise ValueError("--dry-run measures one process; start it without torchrun")
    tokenizer = tokenizer_for(options)
    model = build(options, tokenizer, console)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        training, held_out = tokenized(options, tokenizer, Path(folder), console)
        run = prepare(options, model, tokenizer, training, held_out)
        loop, steps = run.loop, run.loop.schedule.steps
        loop.step = min(steps - 1, round(steps * sum(strengths(options)) / 2))  # half quantized
        model.train()
        times = []
        for _ in range(min(4, steps - loop.step)):
            start = time.perf_counter()
            loop.one_step()
            loop.fetch()
            times.append(time.perf_counter() - start)
    seconds = statistics.median(times[1:] or times)
    facts = sizes(run) | {"seconds_per_step": seconds, "seconds": seconds * steps, "memory_bytes": _peak(loop.device)}
    hours, minutes = divmod(round(facts["seconds"] / 60), 60)
    rows = [
        ("parameters", f"{facts['parameters']:,}, {facts['low_bit_weights']:,} of them low-bit"),
        ("text", f"{facts['training_tokens']:,} tokens of {facts['training_bytes']:,} bytes; "
         f"{facts['held_out_tokens']:,} tokens held out"),
        ("steps", f"{steps:,} of {facts['tokens_per_step']:,} tokens: {facts['epochs']:.3g} epochs"),
        ("a step", f"{seconds:.3g} s, {facts['tokens_per_step'] / seconds:,.0f} tokens/s"),
        ("all steps", f"about {hours} h {minutes:02} min, without evaluation and checkpoints"),
        ("memory", f"{facts['memory_bytes'] / 1e9:.2f} GB at most so far"),
    ]  # fmt: skip
    console.print(tables.grid(rows), highlight=False)
    return facts


def _go(run: Run, out: Path, console: Console) -> dict[str, Any]:
    """All steps that are left, then the packed model and the report."""
    options, loop = run.options, run.loop
    steps = loop.schedule.steps
    loop.processes.share(loop.model)
    after: list[Any] = []

    def look(loop: Loop, when: str = "") -> None:
        found = evaluate(run)
        loop.metrics.append({"step": loop.step, **found})
        console.print(
            f"{when or f'step {loop.step:,}'}: {found['bits_per_byte']:.4f} bits per held-out byte, perplexity "
            f"{found['perplexity']:,.2f}, fully quantized",
            highlight=False,
        )

    if can_evaluate := len(run.held_out.ids) > options.context:
        every = options.eval_every or max(1, steps // 10)
        after.append(lambda loop: look(loop) if loop.step % every == 0 or loop.step == steps else None)
    else:
        console.print(
            "too little text is held out to evaluate on; give --eval-data, or more --held-out", highlight=False
        )
    if loop.step == 0 and options.model is not None and can_evaluate:
        look(loop, "at the start")
    if loop.step == 0 and options.reconstruct:
        blocks = run_reconstruction(run, out / BLOCKS, console) if loop.processes.first else []
        loop.processes.share(loop.model)
        loop.metrics.append({"step": 0, "blocks": blocks})
        if can_evaluate:
            look(loop, "reconstructed")
    after.append(
        checkpoints.Checkpoints(
            out / "checkpoints", run.tokenizer, options.checkpoint_every, options.checkpoint_minutes, options.keep
        )
    )
    with _stops(loop):  # while blocks are reconstructed, an interrupt ends it at once: those that are done are kept
        loop.run("training", console, after=after)
    if loop.step < steps:
        console.print(f"stopped after step {loop.step:,}; go on: bitnet train --resume {out}", highlight=False)
        raise KeyboardInterrupt
    report = _finish(run, out, console, can_evaluate) if loop.processes.first else {}
    loop.processes.wait()
    return report or json.loads((out / REPORT).read_text())


def _console(console: Console | None, processes: Processes) -> Console:
    return (console or Console()) if processes.first else Console(quiet=True)


def _finish(run: Run, out: Path, console: Console, can_evaluate: bool) -> dict[str, Any]:
    """Pack, save, load again and compare, and report."""
    options, loop = run.options, run.loop
    facts = sizes(run)
    probe = (run.held_out if can_evaluate else run.training).ids[None, : options.context].long().to(loop.device)
    with evaluating(loop.model), torch.compiler.set_stance("force_eager"):
        trained = loop.model(input_ids=probe, use_cache=False).logits
    if options.weights != "float":
        packing = pack(loop.model, head=options.head)
        console.print(f"{packing.low_bit_weights:,} weights packed", highlight=False)
    with without_bars():
        save(loop.model, out / "model")
        run.tokenizer.save_pretrained(out / "model")
        served = load(out / "model", device=loop.device)
    with evaluating(served):
        difference = (served(input_ids=probe, use_cache=False).logits - trained).abs().max().item()
    evaluations = [row for row in loop.metrics if "bits_per_byte" in row]
    report = {
        "options": asdict(options),
        **facts,
        "processes": loop.processes.world,
        "seconds": loop.seconds,
        "tokens_per_second": loop.tokens / max(loop.seconds, 1e-9),
        "bits_per_byte": evaluations[-1]["bits_per_byte"] if evaluations else None,
        "perplexity": evaluations[-1]["perplexity"] if evaluations else None,
        "logits_difference": difference,
        "disk_bytes": sum(file.stat().st_size for file in (out / "model").glob("*.safetensors")),
        "losses": loop.losses,
        "metrics": loop.metrics,
        "layers": loop.monitor.history if loop.monitor is not None else [],
        "versions": versions(),
        "hardware": hardware(),
    }
    plot(report, out / "report.png")
    write_whole(out / REPORT, (json.dumps(report, indent=1) + "\n").encode())
    score = f"{report['bits_per_byte']:.4f} bits per held-out byte; " if evaluations else ""
    console.print(
        f"{score}{report['disk_bytes'] / 1e6:.2f} MB on disk; logits of the saved model differ from the trained one's "
        f"by {difference:.3g} at most\nThe model is in {out / 'model'}, its report in {out / REPORT} and report.png. "
        "Next:\n"
        f"bitnet generate {out / 'model'} 'Once upon a time'",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return report


@contextmanager
def _stops(loop: Loop) -> Iterator[None]:
    """Ctrl-C and a request to terminate end a run after its present step; the second one ends it at once."""

    def stop(number: int, frame: Any) -> None:
        loop.stop = True
        for each, handler in before.items():
            signal.signal(each, handler)

    before: dict[int, Any] = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop)
    except ValueError:  # not the main thread
        before.clear()
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _peak(device: torch.device) -> int:
    """The most memory that was taken: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _from_anywhere(options: TrainOptions) -> TrainOptions:
    """The same options wherever the run is resumed."""
    changes: dict[str, Any] = {}
    for name in ("model", "tokenizer", "teacher", "architecture"):
        path = getattr(options, name)
        if isinstance(path, str) and not path.lstrip().startswith("{"):
            changes[name] = from_anywhere(path)
    for name in ("data", "eval_data"):
        changes[name] = [str(Path(path).resolve()) for path in getattr(options, name)]
    return replace(options, **changes)


def _remove(out: Path, made: list[Path]) -> None:
    """The tokens in `out`, and the folders that were made for it."""
    shutil.rmtree(out / "data", ignore_errors=True)
    for folder in made:
        with suppress(OSError):
            folder.rmdir()
