"""Conversion of checkpoints on disk, tensor by tensor: the size of the model does not matter.

A conversion is a list of jobs planned from headers alone. Each reads one tensor, or one layer's, and writes what
becomes of it to its final place in the output files, in any order; a few jobs run at a time. Finished jobs are noted
in a journal beside the files, so that an interrupted conversion can go on where it stopped. The folder gets its name,
or its config.json where it is there already, when everything in it is complete.
"""

import os
import re
import shutil
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from rich.console import Console

from bitnet.progress import Progress
from bitnet.version import __version__

from ..calibration.calibrate import calibrate as calibrate_source
from ..calibration.calibrate import calibrated
from ..files import ggml
from ..inspection import scale_problems
from ..llama_cpp import writer
from ..mlx import writer as mlx_writer
from ..opening import open_source
from ..source import Source
from ..writing import dissolve, sync, work_folder
from .jobs import Job
from .journal import Work, check_target
from .plan import TARGETS, Plan, plan
from .shards import place


def convert_checkpoint(
    source: str | Path | Source,
    target: str | Path,
    to: str = "hub",
    *,
    max_shard_size: str | int = "5GB",
    resume: bool = False,
    tokenizer: bool = True,
    head: str | None = None,
    calibrate: str | Path | None = None,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    device: str = "cpu",
    workers: int | None = None,
    console: Console | None = None,
    **swap: Any,
) -> Path:
    """Convert a checkpoint on disk to another form without ever loading the model; returns `target`.

    source:         a Hugging Face checkpoint folder, float or `bitnet` in any published form, one that MLX quantized,
                    or a GGUF file
    target:         a folder that does not exist yet, or is empty (a mount point, say); or a GGUF file, a new one
    to:             "hub":    packed, 2 bits a weight, in the Hub's `bitnet` format
                    "base3":  packed, 1.6 bits a weight; loads with this package only
                    "binary": packed, binary layers in 1 bit a weight, others in 2; loads with this package only
                    "latent": the float weights, marked for training in 1.58 bit
                    "bf16":   codes * scale in bfloat16, for any runtime; activations are no longer quantized
                    "mlx":    a folder for MLX, 2 bits a weight; activations are no longer quantized
                    "gguf-tq2_0", "gguf-tq1_0", "gguf-q2_0", "gguf-q1_0", "gguf-i2_s", "gguf-pq2_0", "gguf-ptq1_0",
                    "gguf-bf16": a GGUF file, see llama_cpp/
    max_shard_size: of the output's files, in bytes or as "5GB", "500MB"
    resume:         go on with an interrupted conversion of the same source to the same target
    tokenizer:      False leaves it out, where it is missing or cannot be converted
    head:           "int8" or "int4" stores the output head, and the embedding if the two are tied, as pack does
    calibrate:      a text file: round a float model's weights so that the layers' outputs on it change least, instead
                    of each weight to the nearest; samples, length, seed and device are options of calibrate.calibrate.
                    With "latent", the float weights become ones that round to the result: a start for training
    workers:        jobs at a time; default one for each core, at most four
    console:        where the progress goes; default standard error
    swap:           skip, include and the options of replace_linear, for a float source: which layers become low-bit

    A float source is rounded as bitnet.replace_linear followed by bitnet.pack would (but see calibrate): only useful
    for weights that were trained for it. The result is the same whatever the number of workers and interruptions.

    Memory: the largest low-bit weight as it is stored and in 8 bits, or 256 MB if that is more, besides the program.

    Raises ValueError or OSError naming the tensor or file and what to do; then, and when it is killed, `target` does
    not exist, or does not load, and what was finished waits in a folder beside it, or in it, for resume=True. That
    folder is one process's at a time, and nobody else removes it.
    """
    start = time.perf_counter()
    if to not in TARGETS:
        raise ValueError(f"convert: unknown target {to!r}; choose one of {', '.join(TARGETS)}")
    given, shard_bytes, console = Path(target), _bytes(max_shard_size), console or Console(stderr=True)
    target = given.resolve()  # through a link, to the disk where it will be
    opened = source if isinstance(source, Source) else open_source(source, floats=to == "bf16", **swap)
    check_target(target, to)
    _check_options(opened, calibrate, swap)
    calibration = {"text": calibrate, "samples": samples, "length": length, "seed": seed, "device": device}
    options = {name: str(value) for name, value in sorted((swap | calibration if calibrate else swap).items())}
    form = {"to": to, "max_shard_size": shard_bytes, "tokenizer": tokenizer, "options": options, "head": head}
    fingerprint = {"version": __version__, "source": opened.fingerprint(), **form}
    if head and (to == "mlx" or to in writer.KINDS):
        raise ValueError(f"convert: head={head!r} is for our own forms; {to} keeps the output head as it is")
    # both plans refuse what cannot be done
    gguf_plan = writer.plan(opened, to, tokenizer) if to in writer.KINDS else None
    folder_plan = None
    if not gguf_plan:
        folder_plan = mlx_writer.plan(opened) if to == "mlx" else plan(opened, to, bool(calibrate), head)
    if folder_plan:
        opened.check_other_files(tokenizer)
    for note in [*opened.notes, *(writer.readers(gguf_plan, to) if gguf_plan else [])]:
        console.print(note, style="yellow", markup=False, highlight=False, soft_wrap=True)
    _announce(opened, rounded=to != "latent" and not calibrate, console=console)
    with work_folder(target, "converting", wait=False) as folder:
        work = Work(target, folder, fingerprint, resume)
        try:
            work.begin(fingerprint)
            if calibrate and not work.moved():
                opened.round_to(_calibrate(opened, work, calibration, console))
            if work.moved():
                work.publish()
            elif gguf_plan:
                _write_gguf(opened, work, to, gguf_plan, console)
            elif folder_plan:
                workers = workers or min(os.cpu_count() or 1, 4)
                _write_folder(opened, work, folder_plan, shard_bytes, tokenizer, workers, console)
        except BaseException as error:
            kept = ""
            if work.begun():
                kept = (
                    f"; what is finished is kept in {folder}: go on with resume=True (--resume), or remove that folder"
                )
            else:
                dissolve(folder)
            if isinstance(error, KeyboardInterrupt):
                console.print(f"interrupted{kept}", highlight=False)
            if isinstance(error, OSError):
                raise OSError(f"convert: {str(error).removeprefix('convert: ')}{kept}") from error
            if isinstance(error, ValueError) and kept:
                raise ValueError(f"{error}{kept}") from error
            raise
    for problem in [*opened.problems, *scale_problems(opened.scale_ranges)]:
        console.print(f"warning: {problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    size = sum(path.stat().st_size for path in ([target] if target.is_file() else target.rglob("*")) if path.is_file())
    console.print(f"{given}: {size / 1e6:,.1f} MB in {time.perf_counter() - start:,.0f} s", highlight=False)
    return given


def _check_options(source: Source, calibrate: str | Path | None, swap: dict[str, Any]) -> None:
    """Refuse what is missing in the source, or would go nowhere."""
    if not source.plain and (unused := [name for name, value in (swap | {"calibrate": calibrate}).items() if value]):
        raise ValueError(f"convert: {source.path} is low-bit already; {', '.join(unused)} is for float checkpoints")
    if source.plain and swap.get("rms_norm"):
        raise ValueError(
            "convert: rms_norm=True adds norms, which a float checkpoint has no weights for and which have to be "
            "trained: load the model, call bitnet.replace_linear(model, rms_norm=True), and train it"
        )
    if mismatches := source.mismatches():
        more = f", and {len(mismatches) - 1} more like this" if len(mismatches) > 1 else ""
        raise ValueError(
            f"convert: {source.path} is not the model that its config.json describes: {mismatches[0]}{more}"
        )


def _announce(source: Source, rounded: bool, console: Console) -> None:
    if source.plain:
        console.print(str(source.report), markup=False, highlight=False, soft_wrap=True)
        if source.ternary:
            console.print(
                f"{len(source.ternary)} of {len(source.weights())} weights are ternary already (codes x scale in "
                "floats); they keep their codes and scales",
                highlight=False,
            )
        if rounded and len(source.ternary) < len(source.weights()):
            console.print(
                f"{source.path} is a float model: its weights are rounded, not trained. Expect nonsense from the "
                "result; fine-tune to close the gap, or see --calibrate (README, Without training).",
                style="yellow",
                highlight=False,
            )


def _write_folder(
    source: Source, work: Work, planned: Plan, shard_bytes: int, tokenizer: bool, workers: int, console: Console
) -> None:
    config, jobs = planned
    files = place(jobs, work.files, shard_bytes)
    _check_space(work, sum(output.nbytes for job in jobs if job.name not in work.done for output in job.outputs))
    lost = {file for file, outputs in files.items() if not work.create(file, outputs)}
    work.done -= {job.name for job in jobs if job.outputs[0].file in lost}
    _run(jobs, work, workers, console)
    work.finish(files, config, source, tokenizer)


def _write_gguf(source: Source, work: Work, to: str, planned: writer.Plan, console: Console) -> None:
    _, entries = planned
    total = sum(ggml.nbytes(entry.kind, entry.shape) for entry in entries.values())
    there = sum(path.stat().st_size for path in work.files.iterdir())
    _check_space(work, total - there)
    with Progress(work.target.name, total, "bytes", console, done=there) as progress:
        file = work.files / work.target.name
        writer.write_gguf(source, file, to, progress=progress.advance, resume=True, planned=planned)
    os.rename(work.files / work.target.name, work.target)
    sync([work.target.parent])
    dissolve(work.folder)


def _calibrate(source: Source, work: Work, options: dict[str, Any], console: Console) -> dict[str, Any]:
    """Calibrate, or go on where an interrupted run stopped; shows what it achieved."""
    store = work.folder / "calibration"
    if not store.exists() and any(work.files.iterdir()):
        raise ValueError(f"convert: {store} is gone, but there are weights that were rounded by it")
    result = calibrate_source(source, store=store, resume=store.exists(), console=console, **options)
    console.print(str(result), markup=False, highlight=False, soft_wrap=True)
    return calibrated(store)


def _run(jobs: list[Job], work: Work, workers: int, console: Console) -> None:
    """Run the jobs that are not done yet, a few at a time, in the order of the list; what fails stops all."""
    budget = max([256 << 20, *(job.memory for job in jobs)])
    running: dict[Future[None], Job] = {}
    left = [job for job in jobs if job.name not in work.done][::-1]
    total, done = (sum(job.reads for job in some) for some in (jobs, [job for job in jobs if job.name in work.done]))
    with (
        Progress(work.target.name, total, "bytes", console, done=done) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):
        try:
            while left or running:
                while left and len(running) < workers:
                    if left[-1].memory + sum(job.memory for job in running.values()) > budget:
                        break
                    job = left.pop()
                    running[pool.submit(lambda job=job: work.write(job, job.run()))] = job  # type: ignore[misc]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    future.result()
                    progress.advance(job.reads)
        finally:
            wait(running)
            work.close()


def _bytes(size: str | int) -> int:
    """5GB, 500 MB or 1000000 as a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(size).strip().upper())
    number = int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " ")) if found else 0
    if number < 1:
        raise ValueError(f"convert: max_shard_size must be a size such as '5GB' or '500MB', got {size!r}")
    return number


def _check_space(work: Work, needs: int) -> None:
    free = shutil.disk_usage(work.files).free
    if needs > free:
        raise OSError(
            f"{work.target} needs {needs / 1e9:,.1f} GB more, but the disk has {free / 1e9:,.1f} GB free; "
            "make room, or choose another disk"
        )
