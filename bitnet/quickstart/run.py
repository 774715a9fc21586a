"""`bitnet quickstart`: the whole loop on real text, and what it costs, measured on this machine.

Two byte-level Llamas of the same shape see the same bytes of the Python standard library in the same order. One
trains in full precision, one in 1.58 bit: full precision for the first part, then quantized more and more (the
strength of bitnet.set_strength), fully at the end. The second is packed, saved, reloaded and compared.
"""

import json
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..convert.checkpoint import load, read_headers, save
from ..convert.swap.pack import pack
from ..convert.swap.replace import replace_linear
from ..info import hardware, versions
from ..linear import BitLinear
from ..packed import PackedBitLinear
from ..train.data import END, VOCABULARY, build_tokenizer, corpus
from ..train.loop import Settings, bits_per_byte, train
from .report import plot, show

PROMPT = "import os\n\n\ndef "


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
    scores = {"full": bits_per_byte(full, held_out, settings.context)}
    scores["ternary"] = bits_per_byte(ternary, held_out, settings.context)
    probe = held_out[None, : settings.context].long()
    with torch.no_grad():
        trained_logits = ternary(input_ids=probe).logits
    weights = {name: module.weight.numel() for name, module in ternary.named_modules() if isinstance(module, BitLinear)}
    tokenizer = build_tokenizer()
    pack(ternary)
    with _no_progress_bars():  # of transformers: the files take milliseconds
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


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _sample(model: Any, tokenizer: Any) -> str:
    torch.manual_seed(0)
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    output = model.generate(**inputs, do_sample=True, temperature=0.7, max_new_tokens=160)
    return tokenizer.decode(output[0], skip_special_tokens=True)
