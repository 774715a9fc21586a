"""Conversion of checkpoints on disk, tensor by tensor: the size of the model does not matter.

A conversion is a list of jobs planned from headers alone. Each reads one tensor, or one layer's, and writes what
becomes of it to its final place in the output files, in any order; a few jobs run at a time. Finished jobs are noted
in a journal beside the files, so that an interrupted conversion can go on where it stopped. The folder gets its name,
or its config.json where it is there already, when everything in it is complete.
"""

import copy
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from bitnet.experts import BitExperts, PackedExperts, to_packed
from bitnet.kernels import layout
from bitnet.linear import BitLayer
from bitnet.packed import PackedBitLinear, PackedEmbedding
from bitnet.progress import Progress
from bitnet.version import __version__

from ..calibration.calibrate import calibrate as calibrate_source
from ..calibration.calibrate import calibrated, latent_weight
from ..files.folder import CONFIG, INDEX, WEIGHTS
from ..hub import loading as hf
from ..inspection import scale_problems
from ..llama_cpp import source as gguf
from ..llama_cpp import tensor_types as ggml
from ..rounding import exact
from ..source import DTYPES, Source, Weight, open_source
from ..writing import clear, dissolve, settle, sync, where, work_folder, write_whole

TARGETS = ("hub", "base3", "latent", "bf16", *gguf.KINDS)
MOVED = "moved.json"
SYNC = 256 << 20  # bytes after which finished jobs are noted
WIDTHS = {name: dtype.itemsize for name, dtype in DTYPES.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass
class Output:
    """One tensor of the output: name, dtype as safetensors spells it, shape; and, once planned, its file and place."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    file: Path | None = None
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return WIDTHS[self.dtype] * torch.Size(self.shape).numel()


@dataclass
class Job:
    """What is read and computed as one.

    run() returns the values of each of `outputs`: consecutive pieces of the flat tensor, made as they are written.
    """

    name: str
    outputs: list[Output]
    reads: int  # bytes
    memory: int  # bytes it holds while it runs, but for a few MB
    run: Callable[[], list[Iterable[Tensor]]]


def convert_checkpoint(
    source: str | Path | Source,
    target: str | Path,
    to: str = "hub",
    *,
    max_shard_size: str | int = "5GB",
    resume: bool = False,
    tokenizer: bool = True,
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

    source:         a Hugging Face checkpoint folder, float or `bitnet` in any published form, or a GGUF file
    target:         a folder that does not exist yet, or is empty (a mount point, say); or a GGUF file, a new one
    to:             "hub":    packed, 2 bits a weight, in the Hub's `bitnet` format
                    "base3":  packed, 1.6 bits a weight; loads with this package only
                    "latent": the float weights, marked for training in 1.58 bit
                    "bf16":   codes * scale in bfloat16, for any runtime; activations are no longer quantized
                    "gguf-tq2_0", "gguf-tq1_0", "gguf-q2_0", "gguf-i2_s": a GGUF file, see gguf.py
    max_shard_size: of the output's files, in bytes or as "5GB", "500MB"
    resume:         go on with an interrupted conversion of the same source to the same target
    tokenizer:      False leaves it out, where it is missing or cannot be converted
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
    _check_target(target, to)
    _check_options(opened, calibrate, swap)
    calibration = {"text": calibrate, "samples": samples, "length": length, "seed": seed, "device": device}
    options = {name: str(value) for name, value in sorted((swap | calibration if calibrate else swap).items())}
    form = {"to": to, "max_shard_size": shard_bytes, "tokenizer": tokenizer, "options": options}
    fingerprint = {"version": __version__, "source": opened.fingerprint(), **form}
    if to in gguf.KINDS:  # either refuses what cannot be done
        gguf.plan(opened, to, tokenizer)
    else:
        plan(opened, to)
        if tokenizer:
            opened.check_other_files()
    _announce(opened, rounded=to != "latent" and not calibrate, console=console)
    with work_folder(target, "converting", wait=False) as folder:
        work = _Work(target, folder, fingerprint, resume)
        try:
            work.begin(fingerprint)
            if calibrate and not work.moved():
                opened.calibrated = _calibrate(opened, work, calibration, console)
            if work.moved():
                work.publish()
            elif to in gguf.KINDS:
                _write_gguf(opened, work, to, tokenizer, console)
            else:
                _write_folder(opened, work, to, shard_bytes, tokenizer, workers or min(os.cpu_count() or 1, 4), console)
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
    size = sum(path.stat().st_size for path in ([target] if target.is_file() else target.iterdir()))
    console.print(f"{given}: {size / 1e6:,.1f} MB in {time.perf_counter() - start:,.0f} s", highlight=False)
    return given


def _check_target(target: Path, to: str) -> None:
    """Refuse what would overwrite something."""
    if to in gguf.KINDS and target.is_dir():
        raise IsADirectoryError(f"convert: {target} is a folder; name a file, {target / 'model.gguf'} say")
    present = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if (work := where(target, "converting")).name in present:  # of a conversion that was interrupted
        present -= {work.name, *_moved(work)}
    if target.is_dir() and (earlier := target.with_name(f".{target.name}-converting")).is_dir():
        if (earlier / "files").exists():
            raise FileExistsError(
                f"convert: {earlier} holds an interrupted conversion to {target}, from before that folder was there; "
                "remove this empty folder to go on with it, or the other to start afresh"
            )
        shutil.rmtree(earlier)  # killed when it was done
    if present or target.is_file():
        raise FileExistsError(f"convert: {target} exists already; remove it or choose another name")


def _moved(work: Path) -> list[str]:
    """The names in a work folder of what is complete, and may have been moved to its place in part."""
    return json.loads((work / MOVED).read_text()) if (work / MOVED).exists() else []


def _check_options(source: Source, calibrate: str | Path | None, swap: dict[str, Any]) -> None:
    """Refuse what is missing in the source, or would go nowhere."""
    if not source.plain and (unused := [name for name, value in (swap | {"calibrate": calibrate}).items() if value]):
        raise ValueError(f"convert: {source.path} is low-bit already; {', '.join(unused)} is for float checkpoints")
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
    source: Source, work: "_Work", to: str, shard_bytes: int, tokenizer: bool, workers: int, console: Console
) -> None:
    config, jobs = plan(source, to)
    files = place(jobs, work.files, shard_bytes)
    _check_space(work, sum(output.nbytes for job in jobs if job.name not in work.done for output in job.outputs))
    lost = {file for file, outputs in files.items() if not work.create(file, outputs)}
    work.done -= {job.name for job in jobs if job.outputs[0].file in lost}
    _run(jobs, work, workers, console)
    work.finish(files, config, source, tokenizer)


def _write_gguf(source: Source, work: "_Work", to: str, tokenizer: bool, console: Console) -> None:
    _, entries = gguf.plan(source, to, tokenizer)
    total = sum(ggml.nbytes(entry.kind, entry.shape) for entry in entries.values())
    there = sum(path.stat().st_size for path in work.files.iterdir())
    _check_space(work, total - there)
    with Progress(work.target.name, total, "bytes", console, done=there) as progress:
        gguf.write_gguf(
            source, work.files / work.target.name, to, progress=progress.advance, resume=True, tokenizer=tokenizer
        )
    os.rename(work.files / work.target.name, work.target)
    sync([work.target.parent])
    dissolve(work.folder)


def plan(source: Source, to: str) -> tuple[dict[str, Any], list[Job]]:
    """The config.json of the result, and the jobs that make its tensors in the order in which the source has them."""
    weights = source.weights()
    embeddings = {name: m for name, m in source.model.named_modules() if isinstance(m, PackedEmbedding)}
    if to == "latent" and (packed := [weight.name for weight in weights.values() if not weight.latent]):
        raise ValueError(
            f"convert: {source.path} holds codes, and the float weights they were made from (of {packed[0]}, say) are "
            "gone; to='bf16' gives codes x scale"
        )
    if to == "bf16" and (normed := [weight.name for weight in weights.values() if weight.spec.rms_norm]):
        raise ValueError(f"convert: {normed[0]} has an RMSNorm inside, which no plain model can express")
    if not weights and (source.plain or to != "bf16"):
        raise ValueError(f"convert: {source.path} has no layer that can be low-bit, so there is nothing to convert")
    consumed = {f"{name}.{leaf}" for name in embeddings for leaf in ("weight", "weight_scale")}
    consumed |= {part for weight in weights.values() for part in source.parts(weight.key)}
    consumed |= {f"{weight.name}.weight_scale" for weight in weights.values()}
    if to == "bf16":  # a tied head has a scale, but its weight is the embedding's
        consumed |= {
            f"{name}.weight_scale" for name, m in source.model.named_modules() if isinstance(m, PackedBitLinear)
        }
    names = {} if to == "latent" else _bias_names(source, to)
    starts = {source.parts(weight.key)[0]: weight for weight in weights.values()}
    jobs = []
    for key, (dtype, shape) in source.stored().items():
        name = key.removesuffix(".weight")
        if to == "latent" and key in starts and starts[key].name in {*source.calibrated, *source.ternary}:
            jobs.append(_latent(source, starts[key], dtype))
        elif key not in consumed or to == "latent":
            floats = to == "bf16" and DTYPES[dtype].is_floating_point
            jobs.append(_copy(source, key, "BF16" if floats else dtype, shape, names.get(key)))
        elif key in starts:
            jobs.append(_weight(source, starts[key], to))
        elif key != name and name in embeddings:
            jobs.extend(_embedding(source, name, to))
    return _config(source, to), jobs


def _calibrate(source: Source, work: "_Work", options: dict[str, Any], console: Console) -> dict[str, Any]:
    """Calibrate, or go on where an interrupted run stopped; shows what it achieved."""
    store = work.folder / "calibration"
    if not store.exists() and any(work.files.iterdir()):
        raise ValueError(f"convert: {store} is gone, but there are weights that were rounded by it")
    result = calibrate_source(source, store=store, resume=store.exists(), console=console, **options)
    console.print(str(result), markup=False, highlight=False, soft_wrap=True)
    return calibrated(store)


def _config(source: Source, to: str) -> dict[str, Any]:
    config = dict(source.config)
    config.pop("quantization_config", None)
    config.pop("transformers_weights", None)  # where the source has its weights
    if to == "bf16":
        config["dtype"] = "bfloat16"
        config.pop("torch_dtype", None)
        return config
    model = copy.deepcopy(source.model)
    for module in list(model.modules()):
        if isinstance(module, BitLayer) and to != "latent":
            if hasattr(module, "weight_scale"):  # its codes are stored as floats
                del module.weight_scale
            to_packed(module)
    settings = hf.config_of(model, 1.6 if to == "base3" else 2)
    assert settings is not None
    if to == "hub" and source.multiplies:
        settings.linear_class, settings.quantization_mode = "autobitlinear", "offline"
    config["quantization_config"] = settings.to_dict()
    return config


def _bias_names(source: Source, to: str) -> dict[str, str]:
    """The names that the biases of fused experts get, which stay beside their stacks."""
    names: dict[str, str] = {}
    for name, module in source.model.named_modules():
        if isinstance(module, BitExperts | PackedExperts):
            for m in module.stacks:
                floating, packed = f"{name}.{m.parameter}_bias", f"{name}.{m.packed}.bias"
                names |= {packed: floating} if to == "bf16" else {floating: packed}
    return names


def _copy(source: Source, key: str, dtype: str, shape: tuple[int, ...], name: str | None = None) -> Job:
    output = Output(source.file_key(name or key), dtype, shape)
    return Job(key, [output], source.nbytes(key), 0, lambda: [(p.to(DTYPES[dtype]) for p in source.pieces(key))])


def _latent(source: Source, weight: Weight, dtype: str) -> Job:
    """Float weights that round to codes which were calibrated, or which the floats are times a scale."""

    def make() -> list[Iterable[Tensor]]:
        if weight.name in source.calibrated:
            return [(latent_weight(*matrix).to(DTYPES[dtype]) for matrix in source.matrices(weight))]
        floats = source.tensor(weight.key)
        found = exact(floats, weight.spec.per_row)
        return [[latent_weight(*found).to(DTYPES[dtype]) if found else floats]]

    n, k = weight.shape
    return Job(weight.name, [Output(source.file_key(weight.key), dtype, (n, k))], 2 * n * k, 10 * n * k, make)


def _weight(source: Source, weight: Weight, to: str) -> Job:
    n, k, spec = weight.out_features, weight.in_features, weight.spec
    reads, stack = source.nbytes(weight.key), () if weight.experts is None else (weight.experts,)
    copies = 3 if len(source.parts(weight.key)) > 1 else 1  # experts that are stored one by one are merged first
    memory = copies * reads + 2 * n * k
    if to == "bf16":
        shape = (k, n) if weight.transposed else (n, k)
        output = Output(source.file_key(weight.float_key), "BF16", (*stack, *shape))
        return Job(
            weight.name, [output], reads, memory, lambda: [_bfloat16(source.matrices(weight), weight.transposed)]
        )
    key = source.file_key(f"{weight.name}.weight")
    base3 = to == "base3" and spec.weights != "int8"
    if spec.weights == "int8":
        dtype, shape = "I8", (n, k)
    else:
        dtype, shape = "U8", (n, -(-k // 5)) if base3 else (layout.packed_rows(n), k)
    scale = (*stack, n) if spec.per_row else stack or (1,)
    outputs = [Output(key, dtype, (*stack, *shape)), Output(f"{key}_scale", "F32", scale)]
    if multiplies := to == "hub" and source.multiplies:  # not every float32 is the reciprocal of one
        outputs[1] = Output(f"{key}_scale", *source.stored()[f"{weight.name}.weight_scale"])

    def pack() -> list[Iterable[Tensor]]:
        scales: list[Tensor] = []  # known once the codes have been made, which are written first

        def codes() -> Iterator[Tensor]:
            for matrix, scale in source.matrices(weight) if base3 else source.packed(weight):
                scales.append(hf.stored_scale(scale))
                yield from map(layout.pack_base3, _blocks(matrix)) if base3 else [matrix]

        return [codes(), [source.tensor(f"{weight.name}.weight_scale")] if multiplies else (s for s in scales)]

    return Job(weight.name, outputs, reads, memory, pack)


def _embedding(source: Source, name: str, to: str) -> list[Job]:
    """An int8 embedding: as it is where its layers stay packed, else in bfloat16."""
    weight, scale = f"{name}.weight", f"{name}.weight_scale"
    if to != "bf16":
        return [_copy(source, key, *source.stored()[key]) for key in (weight, scale)]

    def dequantize() -> list[Iterable[Tensor]]:
        return [_bfloat16([(source.tensor(weight), 1 / source.tensor(scale).float())])]

    output = Output(source.file_key(weight), "BF16", source.stored()[weight][1])
    reads = source.nbytes(weight)
    return [Job(name, [output], reads, reads, dequantize)]


def _blocks(codes: Tensor) -> tuple[Tensor, ...]:
    """Blocks of rows small enough for a processor's cache."""
    return codes.split(max(1, (1 << 18) // codes.shape[1]))


def _bfloat16(matrices: Iterable[tuple[Tensor, Tensor]], transposed: bool = False) -> Iterator[Tensor]:
    """codes * scale of each, rounded once."""
    for codes, scale in matrices:
        if transposed:
            yield (codes * scale[:, None]).bfloat16().T
            continue
        blocks = _blocks(codes)
        for block, part in zip(blocks, scale.expand(len(codes)).split(len(blocks[0])), strict=True):
            yield (block * part[:, None]).bfloat16()


def place(jobs: list[Job], folder: Path, shard_bytes: int) -> dict[Path, list[Output]]:
    """Give every output its file and offset; returns the files with their outputs in the order they have there.

    Jobs fill one file after the other; the outputs of one stay together. In a file wider dtypes come first, so that
    each tensor is aligned, as readers that map files expect.
    """
    shards: list[list[Output]] = [[]]
    size = 0
    for job in jobs:
        needs = sum(output.nbytes for output in job.outputs)
        if shards[-1] and size + needs > shard_bytes:
            shards.append([])
            size = 0
        shards[-1] += job.outputs
        size += needs
    files = {}
    for number, outputs in enumerate(shards, 1):
        name = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        outputs.sort(key=lambda output: -WIDTHS[output.dtype])
        files[folder / name] = outputs
        offset = len(_header(outputs))
        for output in outputs:
            output.file, output.offset = folder / name, offset
            offset += output.nbytes
    return files


def _header(outputs: list[Output]) -> bytes:
    """What a safetensors file of these tensors begins with: the header's length, and the header."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for output in outputs:
        shape = list(output.shape)
        entries[output.key] = {"dtype": output.dtype, "shape": shape, "data_offsets": [at, at + output.nbytes]}
        at += output.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class _Work:
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
        return bool(_moved(self.folder))

    def create(self, file: Path, outputs: list[Output]) -> bool:
        """Open an output file in its final size, its header written; returns whether it was there in that size."""
        handle = self.handles[file] = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        header = _header(outputs)
        size = len(header) + sum(output.nbytes for output in outputs)
        intact = os.fstat(handle).st_size == size
        os.ftruncate(handle, size)
        _write_at(handle, memoryview(header), 0)
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
        _check_target(self.target, "")  # some time has passed
        if self.target.exists():
            write_whole(self.folder / MOVED, json.dumps([path.name for path in self.files.iterdir()]).encode())
        self.publish()

    def publish(self) -> None:
        if self.files.exists():  # else the last process was killed when it was done
            settle(self.files, self.target)
        dissolve(self.folder, MOVED)


def _run(jobs: list[Job], work: _Work, workers: int, console: Console) -> None:
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


def _write_at(handle: int, view: memoryview, offset: int) -> None:
    while view:
        count = os.pwrite(handle, view[: 1 << 30], offset)  # at most 2 GB in one call
        view, offset = view[count:], offset + count


def _bytes(size: str | int) -> int:
    """5GB, 500 MB or 1000000 as a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(size).strip().upper())
    number = int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " ")) if found else 0
    if number < 1:
        raise ValueError(f"convert: max_shard_size must be a size such as '5GB' or '500MB', got {size!r}")
    return number


def _check_space(work: _Work, needs: int) -> None:
    free = shutil.disk_usage(work.files).free
    if needs > free:
        raise OSError(
            f"{work.target} needs {needs / 1e9:,.1f} GB more, but the disk has {free / 1e9:,.1f} GB free; "
            "make room, or choose another disk"
        )
