"""A run that is ready to start: its tokens, its model with low-bit layers, and the loop, as the options say."""

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..convert.checkpoint import CONFIG, load
from ..convert.files.json_object import read_json
from ..convert.folders import find_folder
from ..convert.swap.replace import replace_linear
from ..decode.sequences import positions
from ..linear import BitLayer
from ..progress import without_bars
from ..train import texts
from ..train.data import PackedRows
from ..train.distill import Distillation
from ..train.evaluate import spread_loss
from ..train.loop import Loop, next_token_loss
from ..train.monitors import Monitor
from ..train.optimizers import make_optimizers
from ..train.options import TrainOptions
from ..train.processes import Processes
from ..train.schedule import Schedule
from ..train.texts import Tokens
from .models import check_causal, new_model, tokenizer_of, trainable

HELD_OUT = 4_000_000  # characters that are held out at most


@dataclass
class Run:
    """A run that is ready to start, or to go on."""

    options: TrainOptions
    loop: Loop
    tokenizer: Any
    rows: PackedRows
    training: Tokens
    held_out: Tokens


def tokenizer_for(options: TrainOptions) -> Any:
    """The tokenizer of a run."""
    remedy = "; or name one with --tokenizer"
    return tokenizer_of(options.tokenizer or options.model, remedy if options.tokenizer is None else "")


def settled(options: TrainOptions) -> TrainOptions:
    """Options whose strengths say when quantization sets in: at once, where the start is low-bit already."""
    if options.strength_start is not None and options.strength_end is not None:
        return options  # a run that goes on needs nothing of what it started from
    low_bit = bool(options.reconstruct)
    if options.model is not None and options.weights != "float":
        low_bit |= "quantization_config" in read_json(find_folder(options.model) / CONFIG)
    first, last = options.strength_start, options.strength_end
    first = (0.0 if low_bit else 0.2) if first is None else first
    last = max(first, 0.0 if low_bit else 0.7) if last is None else last
    return replace(options, strength_start=first, strength_end=last)


def strengths(options: TrainOptions) -> tuple[float, float]:
    """The two of settled options."""
    assert options.strength_start is not None
    assert options.strength_end is not None
    return options.strength_start, options.strength_end


def build(options: TrainOptions, tokenizer: Any, console: Console) -> Any:
    """The model of a run, its layers swapped, on its device."""
    torch.manual_seed(options.seed)
    if options.model is not None:
        model = trainable(options.model)
    else:
        assert options.architecture is not None
        model = new_model(options.architecture, tokenizer, options.context, options.embedding_std)
    check_causal(model)
    limit = positions(model.config)
    if limit and options.context > limit:
        raise ValueError(f"--context {options.context} is more than the {limit} positions of the model")
    if options.weights != "float":
        names = ("weights", "per_row", "group_size", "activation_bits", "rms_norm", "hadamard", "hadamard_signs")
        chosen = {name: getattr(options, name) for name in names}
        report = replace_linear(model, skip=options.skip or None, include=options.include or None, **chosen)
        console.print(str(report), highlight=False, markup=False, soft_wrap=True)
        if not report.low_bit_weights:
            raise ValueError("no layer can be low-bit; the reasons are above. --weights float trains it as it is")
    return model.to(device_of(options))


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


def prepare(
    options: TrainOptions,
    model: Any,
    tokenizer: Any,
    training: Tokens,
    held_out: Tokens,
    processes: Processes = Processes(),  # noqa: B008 (frozen)
) -> Run:
    """The loop of a run, at its first step."""
    if options.batch % processes.world:
        raise ValueError(
            f"--batch {options.batch} are the rows of all processes together, which {processes.world} cannot share "
            f"evenly; give a multiple of {processes.world}"
        )
    if processes.rank:
        torch.manual_seed(options.seed + processes.rank)  # dropout of its own
    rows = PackedRows(
        training.ids,
        training.starts,
        options.batch // processes.world,
        options.context,
        options.seed,
        separate=_separates(options, model),
    )
    steps = options.steps or math.ceil(options.epochs * rows.rows / (options.batch * options.accumulation))
    first, last = strengths(options)
    schedule = Schedule(
        steps,
        options.schedule,  # type: ignore[arg-type]
        options.warmup,
        options.final_lr,
        options.decay,
        first,
        last,
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
        processes=processes,
    )
    return Run(options, loop, tokenizer, rows, training, held_out)


def device_of(options: TrainOptions) -> str:
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
        ids, options, processes = run.held_out.ids, run.options, run.loop.processes
        loss = spread_loss(run.loop.model, ids, options.context, options.eval_tokens, starts, processes)
    bits = loss / math.log(2) * run.held_out.per_byte
    return {"held_out_loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": bits}


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
