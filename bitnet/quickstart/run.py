"""`bitnet quickstart`: the whole loop on real text, and what it costs, measured on this machine.

Two byte-level Llamas of the same shape see the same bytes of the Python standard library in the same order. One
trains in full precision, one in 1.58 bit: full precision for the first part, then quantized more and more (the
strength of bitnet.set_strength), fully at the end. The second is packed, saved, reloaded and compared.
"""

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ..convert.checkpoint import load, read_headers, save
from ..convert.swap.pack import pack
from ..convert.swap.replace import replace_linear
from ..info import hardware, versions
from ..linear import BitLinear
from ..packed import PackedBitLinear
from ..progress import without_bars
from ..train.data import END, VOCABULARY, Windows, build_tokenizer, corpus
from ..train.evaluate import spread_loss
from ..train.loop import Loop
from ..train.muon import Muon
from ..train.optimizers import split_parameters
from ..train.schedule import Schedule
from .report import plot, show

PROMPT = "import os\n\n\ndef "


@dataclass(frozen=True)
class Settings:
    """Everything that decides the result besides the machine; all of it goes to report.json."""

    seed: int = 0
    hidden: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 2
    context: int = 256
    batch: int = 4
    steps: int = 1250
    embedding_std: float = 0.2
    muon_lr: float = 1e-2
    muon_momentum: float = 0.9
    adamw_lr: float = 1.2e-2
    weight_decay: float = 0.1
    warmup: float = 0.04  # share of the steps
    final_lr: float = 0.05  # share of the peak, reached linearly
    strength_start: float = 0.2  # of the 1.58-bit run; shares of the steps
    strength_end: float = 0.7
    evaluation_bytes: int = 64 * 1024


def build_model(settings: Settings) -> Any:
    """A small LlamaForCausalLM; the same seed gives the same weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=4 * settings.context,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    model = LlamaForCausalLM(config)
    nn.init.normal_(model.model.embed_tokens.weight, std=settings.embedding_std)
    return model


def train(model: Any, data: Tensor, settings: Settings, console: Console, label: str) -> dict[str, Any]:
    """Train in place; returns the loss of every step in bits per byte, and the seconds taken. The seed decides on the
    batches: models that are trained with one see the same."""
    matrices, others = split_parameters(model)
    decay = settings.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=settings.muon_lr, momentum=settings.muon_momentum, weight_decay=decay),
        torch.optim.AdamW(others, lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=decay, fused=True),
    ]
    schedule = Schedule(
        settings.steps,
        warmup=settings.warmup,
        final_lr=settings.final_lr,
        strength_start=settings.strength_start,
        strength_end=settings.strength_end,
    )
    loop = Loop(model, Windows(data, settings.batch, settings.context, settings.seed), optimizers, schedule)
    try:
        loop.run(label, console, show=lambda loss: f"{loss / math.log(2):.3f} bits/byte")
    except RuntimeError as error:
        raise RuntimeError(f"{label}: {error}") from None
    return {"losses": [loss / math.log(2) for loss in loop.losses], "seconds": loop.seconds}


def decode_speed(models: list[Any], tokens: int = 64, rounds: int = 5) -> list[float]:
    """Median tokens per second of greedy generation at batch 1, the models taking turns."""
    prompt = torch.tensor([list(PROMPT.encode())])
    seconds: list[list[float]] = [[] for _ in models]
    for _ in range(rounds + 1):
        for model, times in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
            )
            times.append(time.perf_counter() - start)
    return [tokens / statistics.median(times[1:]) for times in seconds]  # the first round warms up


def bytes_in_memory(model: nn.Module) -> int:
    """Bytes of all weights a model holds, backend layouts included."""
    packed = [module for module in model.modules() if isinstance(module, PackedBitLinear)]
    inside = {id(t) for module in packed for t in [*module.parameters(), *module.buffers()]}
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside)
    return rest + sum(module.nbytes() for module in packed)


def run(out: str | Path = "quickstart", *, seed: int = 0, steps: int | None = None) -> dict[str, Any]:
    """The whole quickstart; returns what it writes to report.json. See the module's docstring."""
    settings = Settings(seed=seed) if steps is None else Settings(seed=seed, steps=steps)
    if settings.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {steps}")
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    training, held_out, facts = corpus()
    console.print(
        f"{facts['training_files']} files, {facts['training_bytes'] / 1e6:.1f} MB to train on; "
        f"{facts['held_out_files']} other files, {facts['held_out_bytes'] / 1e6:.1f} MB, held out"
    )
    full, ternary = build_model(settings), build_model(settings)
    swap = replace_linear(ternary)
    runs = {
        "full": train(full, training, settings, console, "full precision"),
        "ternary": train(ternary, training, settings, console, "1.58 bit"),
    }
    for model in (full, ternary):
        model.generation_config.pad_token_id = END

    console.print("evaluating, packing, reloading ...")
    trained = {"full": full.eval(), "ternary": ternary.eval()}
    scores = {
        name: spread_loss(model, held_out, settings.context, settings.evaluation_bytes) / math.log(2)
        for name, model in trained.items()
    }
    probe = held_out[None, : settings.context].long()
    with torch.no_grad():
        trained_logits = ternary(input_ids=probe).logits
    weights = {name: module.weight.numel() for name, module in ternary.named_modules() if isinstance(module, BitLinear)}
    tokenizer = build_tokenizer()
    pack(ternary)
    with without_bars():
        for name, model in (("full", full), ("ternary", ternary)):
            save(model, out / name)
            tokenizer.save_pretrained(out / name)
        served = {"full": load(out / "full"), "ternary": load(out / "ternary")}
    with torch.no_grad():
        difference = (served["ternary"](input_ids=probe).logits - trained_logits).abs().max().item()
    if difference != 0:
        raise RuntimeError(f"the reloaded packed model's logits differ from the trained model's by up to {difference}")

    speeds = dict(zip(served, decode_speed(list(served.values())), strict=True))
    stored = read_headers([str(out / "ternary" / "model.safetensors")])
    low_bit_bytes = sum(math.prod(stored[f"{name}.weight"].shape) + 4 for name in weights)  # + the float32 scale
    models = {
        name: {
            "bits_per_byte": scores[name],
            "disk_bytes": (out / name / "model.safetensors").stat().st_size,
            "memory_bytes": bytes_in_memory(served[name]),
            "tokens_per_second": speeds[name],
            "training_seconds": runs[name]["seconds"],
            "sample": _sample(served[name], tokenizer),
        }
        for name in served
    }
    report = {
        "settings": asdict(settings),
        "data": facts,
        "training_tokens": settings.steps * settings.batch * settings.context,
        "models": models,
        "gap_percent": 100 * (scores["ternary"] / scores["full"] - 1),
        "logits_difference": difference,
        "low_bit_weights": swap.low_bit_weights,
        "low_bit_bytes": low_bit_bytes,
        "times_smaller_than_bf16": 2 * sum(weights.values()) / low_bit_bytes,
        "losses": {name: result["losses"] for name, result in runs.items()},
        "versions": versions(),
        "hardware": hardware(),
    }
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(report, served["ternary"], out / "report.png")
    show(report, out, console)
    return report


def _sample(model: Any, tokenizer: Any) -> str:
    torch.manual_seed(0)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, do_sample=True, temperature=0.7, max_new_tokens=160)
    return tokenizer.decode(output[0], skip_special_tokens=True)
