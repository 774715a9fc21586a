"""`bitnet quickstart`: the whole loop on real text, and what it costs, measured on this machine.

Two byte-level Llamas of the same shape see the same bytes of the Python standard library in the same order. One
trains in full precision, one in 1.58 bit: full precision for the first part, then quantized more and more (the
strength of bitnet.set_strength), fully at the end. The second is packed, saved, reloaded and compared.
"""

import json
import math
import statistics
import sysconfig
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..convert.checkpoint import load, read_headers, save
from ..convert.swap.pack import pack
from ..convert.swap.replace import replace_linear
from ..info import hardware, versions
from ..linear import BitLinear
from ..packed import PackedBitLinear
from ..progress import Progress
from ..train.strength import Muon, set_strength, strength_at

END = 256  # end-of-text token; tokens 0..255 are bytes
VOCABULARY = 257
PROMPT = "import os\n\n\ndef "
EVALUATION_BYTES = 64 * 1024
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}


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


def corpus() -> tuple[Tensor, Tensor, dict[str, int]]:
    """The standard library's own sources as tokens: training, held-out, and their file and byte counts.

    One file in twenty is held out, by a checksum of its path, so no file is in both. Tests and tables are left
    out: Python installations differ in them.
    """
    root = Path(sysconfig.get_path("stdlib"))
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not LEFT_OUT.intersection(relative.parts):
            parts[zlib.crc32(relative.as_posix().encode()) % 20 == 0].append(path.read_bytes())
    if not parts[True]:
        raise FileNotFoundError(f"no Python sources under {root}; quickstart needs an installation with its .py files")

    def tokens(files: list[bytes]) -> Tensor:
        end = torch.tensor([END], dtype=torch.int16)
        return torch.cat([t for f in files if f for t in (torch.frombuffer(bytearray(f), dtype=torch.uint8), end)])

    training, held_out = tokens(parts[False]), tokens(parts[True])
    facts = {"training_files": len(parts[False]), "training_bytes": len(training)}
    return training, held_out, facts | {"held_out_files": len(parts[True]), "held_out_bytes": len(held_out)}


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


def build_tokenizer() -> Any:
    """Bytes as tokens, in Hugging Face's terms: token i < 256 is byte i, 256 is <|end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return fast


def train(model: Any, data: Tensor, settings: Settings, console: Console, label: str) -> dict[str, Any]:
    """Train in place; returns the loss of every step in bits per byte, and the seconds taken.

    Muon updates the matrices of the blocks, AdamW the embedding, the head and the norms; both learning rates
    rise and fall linearly. A model with BitLinear layers follows the strength schedule as well.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    decay = settings.weight_decay
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=settings.muon_lr, momentum=settings.muon_momentum, weight_decay=decay),
        torch.optim.AdamW(others, lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=decay, fused=True),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: _lr_factor(step, settings)) for o in optimizers]
    low_bit = any(isinstance(module, BitLinear) for module in model.modules())
    generator = torch.Generator().manual_seed(settings.seed)  # both runs draw the same batches
    window = torch.arange(settings.context + 1)
    losses = []
    model.train()
    start = time.perf_counter()
    with Progress(label, settings.steps, "steps", console) as progress:
        for step in range(settings.steps):
            if low_bit:
                set_strength(model, strength_at(step, settings.steps, settings.strength_start, settings.strength_end))
            at = torch.randint(len(data) - settings.context, (settings.batch, 1), generator=generator)
            batch = data[at + window].long()
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            loss.backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            losses.append(loss.item() / math.log(2))
            recent = statistics.fmean(losses[-20:])
            speed = (step + 1) * settings.batch * settings.context / (time.perf_counter() - start)
            progress.advance(1, f"{recent:.3f} bits/byte", f"{speed:,.0f} tokens/s")
    if not math.isfinite(losses[-1]):
        raise RuntimeError(f"{label}: the loss is {losses[-1]}; training diverged")
    return {"losses": losses, "seconds": time.perf_counter() - start}


def _lr_factor(step: int, settings: Settings) -> float:
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, settings.steps - warmup)
    return 1 + (settings.final_lr - 1) * done


@torch.no_grad()
def bits_per_byte(model: Any, data: Tensor, context: int) -> float:
    """Mean -log2 p(next token) over stretches spread evenly through the held-out files.

    Each stretch is half a context long and follows half a context that is not scored, so that every scored token
    is predicted from that much text at least.
    """
    half = context // 2
    stretches = min((len(data) - 1) // context, EVALUATION_BYTES // half)
    starts = torch.linspace(0, len(data) - 1 - context, stretches).long()[:, None]
    model.eval()
    total = 0.0
    for rows in (starts + torch.arange(context + 1)).split(32):
        batch = data[rows].long()
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits[:, half:]
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, half + 1 :].flatten(), reduction="sum").item()
    return total / (stretches * (context - half)) / math.log(2)


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
    _plot(report, served["ternary"], out / "report.png")
    _show(report, out, console)
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


def _show(report: dict[str, Any], out: Path, console: Console) -> None:
    full, ternary = report["models"]["full"], report["models"]["ternary"]
    for title, model in (("full precision", full), ("1.58 bit, packed", ternary)):
        console.rule(f"a sample, {title}")
        console.print(model["sample"], markup=False, highlight=False)
    table = Table("", "full precision", "1.58 bit", "ratio")

    def row(label: str, key: str, form: str, scale: float = 1) -> None:
        ratio = f"{ternary[key] / full[key]:.3f}"
        table.add_row(label, form.format(full[key] / scale), form.format(ternary[key] / scale), ratio)

    row("held-out bits per byte", "bits_per_byte", "{:.3f}")
    row("MB on disk", "disk_bytes", "{:.2f}", 1e6)
    row("MB in memory", "memory_bytes", "{:.2f}", 1e6)
    row("tokens/s, batch 1", "tokens_per_second", "{:.0f}")
    row("training, s", "training_seconds", "{:.0f}")
    console.print(table)
    console.print(
        f"1.58 bit costs {report['gap_percent']:.1f} % here. Its {report['low_bit_weights']:,} ternary weights take "
        f"{report['low_bit_bytes'] / 1e6:.2f} MB on disk, {report['times_smaller_than_bf16']:.2f} times less than in "
        "bf16; embedding, head and norms stay float32. The reloaded model's logits equal the trained model's exactly.\n"
        "At this size a token costs mostly Python, so its speed says little about the kernels.\n"
        f"Both models, report.json and report.png are in {out}. Next:\n"
        f"bitnet generate {out / 'ternary'} 'import ' --temperature 0.7",
        highlight=False,
    )


def _plot(report: dict[str, Any], model: nn.Module, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), layout="constrained")
    per_step = report["training_tokens"] / report["settings"]["steps"] / 1e6
    for name, label, color in (("full", "full precision", "tab:blue"), ("ternary", "1.58 bit", "tab:orange")):
        losses = report["losses"][name]
        width = max(10, len(losses) // 40)
        smooth = [statistics.fmean(losses[max(0, i + 1 - width) : i + 1]) for i in range(len(losses))]
        xs = [per_step * (i + 1) for i in range(len(losses))]
        final = report["models"][name]["bits_per_byte"]
        left.plot(xs, losses, color=color, alpha=0.15)
        left.plot(xs, smooth, color=color, label=f"{label}, {final:.3f} held out")
    for share in ("strength_start", "strength_end"):
        left.axvline(report["settings"][share] * xs[-1], color="grey", linestyle=":", linewidth=1)
    left.set(
        title="training loss (dotted: quantization ramps up between)", xlabel="million bytes", ylabel="bits per byte"
    )
    left.set_ylim(top=min(5.0, max(report["losses"]["full"])))
    left.legend()

    layers = [(name, module.codes()) for name, module in model.named_modules() if isinstance(module, PackedBitLinear)]
    names = [name.removeprefix("model.layers.").replace("self_attn.", "").replace("mlp.", "") for name, _ in layers]
    bottom = [0.0] * len(layers)
    for code, color in ((-1, "tab:red"), (0, "lightgrey"), (1, "tab:green")):
        shares = [float((codes == code).float().mean()) for _, codes in layers]
        right.bar(names, shares, bottom=bottom, color=color, label=f"{code:+d}" if code else "0", width=0.9)
        bottom = [b + s for b, s in zip(bottom, shares, strict=True)]
    right.set(title="ternary weights per layer", ylabel="share", ylim=(0, 1))
    right.tick_params(axis="x", rotation=90, labelsize=7)
    right.margins(x=0.01)
    right.legend(loc="upper right")
    figure.savefig(file, dpi=110)
    plt.close(figure)
