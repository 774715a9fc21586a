"""`bitnet train`: from options to a packed model, a report, and checkpoints to go on from.

A run's folder has options.yaml, data/ (the tokens), checkpoints/, and at the end model/ (packed), report.json and
report.png, which is written last of what a finished run has.
"""

import inspect
import json
import math
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import tables
from ..convert.checkpoint import load, save
from ..convert.swap.pack import pack
from ..convert.swap.replace import replace_linear
from ..convert.writing import write_whole
from ..info import hardware, versions
from ..linear import BitLayer
from ..progress import without_bars
from ..train import texts
from ..train.data import PackedRows
from ..train.distill import Distillation
from ..train.evaluate import evaluating, spread_loss
from ..train.loop import Loop, next_token_loss
from ..train.monitors import Monitor
from ..train.optimizers import make_optimizers
from ..train.options import TrainOptions, from_yaml
from ..train.schedule import Schedule
from ..train.texts import Tokens
from . import checkpoints
from .models import check_causal, new_model, tokenizer_of, trainable
from .report import plot

HELD_OUT = 4_000_000  # characters that are held out at most
OPTIONS, REPORT = "options.yaml", "report.json"


@dataclass
class Run:
    """A run that is ready to start, or to go on."""

    options: TrainOptions
    loop: Loop
    tokenizer: Any
    rows: PackedRows
    training: Tokens
    held_out: Tokens


def train(options: TrainOptions, console: Console | None = None) -> dict[str, Any]:
    """Train a model as the options say; returns what is in OUT/report.json.

    Raises ValueError or OSError for options that cannot be, before OUT is made; KeyboardInterrupt after a checkpoint if
    it was asked to stop.
    """
    console = console or Console()
    options.check()
    if options.out is None:
        raise ValueError("say where the results go: --out DIR")
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        remedy = f"go on with it: bitnet train --resume {out}; or name" if (out / OPTIONS).exists() else "name"
        raise ValueError(f"{out} is there already; {remedy} another folder")
    tokenizer = tokenizer_for(options)
    model = build(options, tokenizer, console)
    made = [folder for folder in (out, *out.parents) if not folder.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        training, held_out = tokenized(options, tokenizer, out / "data", console)
        run = prepare(options, model, tokenizer, training, held_out)
        write_whole(out / OPTIONS, _from_anywhere(options).to_yaml().encode())
    except BaseException:
        _remove(out, made)  # nothing there is worth a second look
        raise
    return _go(run, out, console)


def resume(out: str | Path, console: Console | None = None) -> dict[str, Any]:
    """Go on with a run from its last checkpoint: its loss curve becomes what it would have been, bit for bit, on the
    same machine with as many threads."""
    out, console = Path(out), console or Console()
    if not (out / OPTIONS).is_file():
        raise FileNotFoundError(f"{out}: no run to go on with there (it has no {OPTIONS})")
    if (out / REPORT).exists():
        raise ValueError(f"{out}: this run is finished; see {out / 'model'} and {out / REPORT}")
    options = from_yaml(out / OPTIONS)
    training, held_out = (texts.mapped(out / "data" / name) for name in ("training.bin", "held-out.bin"))
    found = checkpoints.found(out / "checkpoints")
    tokenizer = tokenizer_of(found[-1]) if found else tokenizer_for(options)
    if not found:
        console.print("there is no checkpoint yet; starting from the beginning", highlight=False)
        model = build(options, tokenizer, console)
        return _go(prepare(options, model, tokenizer, training, held_out), out, console)
    tensors, facts = checkpoints.read(found[-1])
    run = prepare(options, trainable(found[-1]).to(_device(options)), tokenizer, training, held_out)
    run.loop.restore(tensors, facts)
    console.print(f"going on after step {run.loop.step:,} of {run.loop.schedule.steps:,}", highlight=False)
    return _go(run, out, console)


def rehearse(options: TrainOptions, console: Console | None = None) -> dict[str, Any]:
    """What a run would be: sizes, tokens, steps; time and memory, measured on a few steps. Writes nothing to OUT."""
    console = console or Console()
    options.check()
    tokenizer = tokenizer_for(options)
    model = build(options, tokenizer, console)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        training, held_out = tokenized(options, tokenizer, Path(folder), console)
        run = prepare(options, model, tokenizer, training, held_out)
        loop, steps = run.loop, run.loop.schedule.steps
        loop.step = min(steps - 1, round(steps * (options.strength_start + options.strength_end) / 2))  # half quantized
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


def tokenizer_for(options: TrainOptions) -> Any:
    """The tokenizer of a run."""
    remedy = "; or name one with --tokenizer"
    return tokenizer_of(options.tokenizer or options.model, remedy if options.tokenizer is None else "")


def build(options: TrainOptions, tokenizer: Any, console: Console) -> Any:
    """The model of a run, its layers swapped, on its device."""
    torch.manual_seed(options.seed)
    if options.model is not None:
        model = trainable(options.model)
    else:
        assert options.architecture is not None
        model = new_model(options.architecture, tokenizer, options.context, options.embedding_std)
    check_causal(model)
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and options.context > limit:
        raise ValueError(f"--context {options.context} is more than the {limit} positions of the model")
    if options.weights != "float":
        names = ("weights", "per_row", "group_size", "activation_bits", "rms_norm", "hadamard")
        chosen = {name: getattr(options, name) for name in names}
        report = replace_linear(model, skip=options.skip or None, include=options.include or None, **chosen)
        console.print(str(report), highlight=False, markup=False, soft_wrap=True)
        if not report.low_bit_weights:
            raise ValueError("no layer can be low-bit; the reasons are above. --weights float trains it as it is")
    return model.to(_device(options))


def tokenized(options: TrainOptions, tokenizer: Any, folder: Path, console: Console) -> tuple[Tokens, Tokens]:
    """The text to train on and to evaluate on, as tokens in `folder`."""
    paths = [Path(path) for path in options.data]
    size = sum(path.stat().st_size for path in paths if path.is_file())
    read = texts.documents(paths, options.column)
    training: Iterator[str]
    if options.eval_data:
        training = (text for text, _ in read)
        held_out = [text for text, _ in texts.documents(options.eval_data, options.column)]
    else:
        training, held_out = texts.split(read, options.held_out, HELD_OUT)
    found = texts.tokenize(training, tokenizer, folder / "training.bin", console=console, total=size)
    return found, texts.tokenize(held_out, tokenizer, folder / "held-out.bin")


def prepare(options: TrainOptions, model: Any, tokenizer: Any, training: Tokens, held_out: Tokens) -> Run:
    """The loop of a run, at its first step."""
    rows = PackedRows(
        training.ids,
        training.starts,
        options.batch,
        options.context,
        options.seed,
        separate=_separates(options, model),
    )
    steps = options.steps or math.ceil(options.epochs * rows.rows / (options.batch * options.accumulation))
    schedule = Schedule(
        steps,
        options.schedule,  # type: ignore[arg-type]
        options.warmup,
        options.final_lr,
        options.decay,
        options.strength_start,
        options.strength_end,
    )
    optimizers = make_optimizers(
        model,
        options.optimizer,
        lr=options.peak,
        adamw_lr=options.adamw_lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    device = next(model.parameters()).device
    bf16 = options.precision == "bf16" or (options.precision == "auto" and device.type == "cuda")
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if options.compile:
        model.compile()
    loop = Loop(
        model,
        rows,
        optimizers,
        schedule,
        loss=next_token_loss if options.teacher is None else _distillation(options, tokenizer, device, bf16),
        accumulation=options.accumulation,
        clip=options.clip,
        autocast=torch.bfloat16 if bf16 else None,
        monitor=Monitor(model, options.monitor_every or max(10, steps // 50)) if options.weights != "float" else None,
    )
    return Run(options, loop, tokenizer, rows, training, held_out)


def _device(options: TrainOptions) -> str:
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _separates(options: TrainOptions, model: Any) -> bool:
    """Whether a row's documents are told apart; a model without attention cannot be told of their positions."""
    return options.documents == "separate" and "position_ids" in inspect.signature(model.forward).parameters


def sizes(run: Run) -> dict[str, Any]:
    """How large a run is."""
    layers = [module for module in run.loop.model.modules() if isinstance(module, BitLayer)]
    weights = (layer.get_parameter(m.parameter) for layer in layers for m in layer.latent_weights())
    per_step = run.options.batch * run.options.accumulation * run.options.context
    return {
        "parameters": sum(p.numel() for p in run.loop.model.parameters()),
        "low_bit_weights": sum(weight.numel() for weight in weights),
        "training_tokens": len(run.training.ids),
        "training_bytes": run.training.text_bytes,
        "held_out_tokens": len(run.held_out.ids),
        "held_out_bytes": run.held_out.text_bytes,
        "tokens_per_step": per_step,
        "steps": run.loop.schedule.steps,
        "epochs": run.loop.schedule.steps * run.options.batch * run.options.accumulation / run.rows.rows,
    }


def evaluate(run: Run) -> dict[str, Any]:
    """Held-out loss (nats a token), perplexity and bits per byte of the model, fully quantized."""
    with run.loop.autocasting():
        starts = run.held_out.starts if run.rows.separate else None
        loss = spread_loss(run.loop.model, run.held_out.ids, run.options.context, run.options.eval_tokens, starts)
    bits = loss / math.log(2) * run.held_out.per_byte
    return {"held_out_loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits}


def _go(run: Run, out: Path, console: Console) -> dict[str, Any]:
    """All steps that are left, then the packed model and the report."""
    options, loop = run.options, run.loop
    steps = loop.schedule.steps
    after: list[Any] = []
    if can_evaluate := len(run.held_out.ids) > options.context:
        every = options.eval_every or max(1, steps // 10)

        def look(loop: Loop) -> None:
            if loop.step % every == 0 or loop.step == steps:
                found = evaluate(run)
                loop.metrics.append({"step": loop.step, **found})
                console.print(
                    f"step {loop.step:,}: {found['bits_per_byte']:.4f} bits per held-out byte, perplexity "
                    f"{found['perplexity']:,.2f}, fully quantized",
                    highlight=False,
                )

        after.append(look)
    else:
        console.print(
            "too little text is held out to evaluate on; give --eval-data, or more --held-out", highlight=False
        )
    after.append(
        checkpoints.Checkpoints(
            out / "checkpoints", run.tokenizer, options.checkpoint_every, options.checkpoint_minutes, options.keep
        )
    )
    with _stops(loop):
        loop.run("training", console, after=after)
    if loop.step < steps:
        console.print(f"stopped after step {loop.step:,}; go on: bitnet train --resume {out}", highlight=False)
        raise KeyboardInterrupt
    return _finish(run, out, console, can_evaluate)


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


def _distillation(options: TrainOptions, tokenizer: Any, device: torch.device, bf16: bool) -> Distillation:
    assert options.teacher is not None
    with without_bars():
        teacher = load(options.teacher, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    try:
        other = tokenizer_of(options.teacher)
    except ValueError:
        other = None  # logits of another size are refused at the first step
    if other is not None and other.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{options.teacher}: the teacher's tokenizer has another vocabulary than the model's")
    return Distillation(
        teacher,
        ce=options.ce,
        kl=options.kl,
        temperature=options.temperature,
        relation=options.relation,
        layer=options.relation_layer,
    )


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
            changes[name] = str(Path(path).resolve())
    for name in ("data", "eval_data"):
        changes[name] = [str(Path(path).resolve()) for path in getattr(options, name)]
    return replace(options, **changes)


def _remove(out: Path, made: list[Path]) -> None:
    """The tokens in `out`, and the folders that were made for it."""
    shutil.rmtree(out / "data", ignore_errors=True)
    for folder in made:
        with suppress(OSError):
            folder.rmdir()
