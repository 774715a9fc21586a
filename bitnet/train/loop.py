"""A training loop, in full precision or with the strength of the quantization ramping up, and its evaluation."""

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from ..linear import BitLinear
from ..progress import Progress
from .muon import Muon
from .strength import set_strength, strength_at

EVALUATION_BYTES = 64 * 1024


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
