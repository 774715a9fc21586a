"""The training loop that commands and examples share. A run is its steps: whatever a step uses is a function of its
number (data, learning rate, strength) or part of the state (weights, optimizers, random numbers), so that a run that
goes on from its state repeats, to the last bit, what it would have done.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from ..linear import BitLayer
from ..progress import Progress
from .data import IGNORED, Batches
from .monitors import Monitor
from .optimizers import optimizer_state, restore_optimizers
from .processes import Processes
from .schedule import Schedule
from .strength import set_strength

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]
RECENT = 20  # steps whose mean loss is shown
FETCH = 10  # steps after which losses are fetched from a GPU, which waits for it


def next_token_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross entropy, in nats, of a batch as train.data makes them, its labels shifted already."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits.float()
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)


class Loop:
    """Trains a model in place: Loop(model, batches, optimizers, Schedule(steps)).run().

    model:        any whose forward the loss can call; layers of ours follow the schedule's strength
    batches:      see train.data.Batches; number i is the i-th micro-batch of the run
    optimizers:   their learning rates and weight decays are the peaks, which the schedule multiplies
    loss:         (model, batch) -> the mean over the batch's labels; bitnet.Distillation is one
    accumulation: micro-batches a step; each counts by its labels, so that the step is that of one large batch
    clip:         the greatest norm of the gradient
    autocast:     a dtype, torch.bfloat16, in which products run where torch.autocast says so
    monitor:      looks at the codes, every so many steps
    processes:    that train the same model together: each takes one after the other of the micro-batches, so that W of
                  them make the step of one with W times the accumulation

    Evaluation and checkpoints are functions of the loop, called after each step that they say is theirs: see run.
    `step` counts finished steps, `losses` has each one's loss in nats, `seconds` the time that they took.
    """

    def __init__(
        self,
        model: Any,
        batches: Batches,
        optimizers: list[torch.optim.Optimizer],
        schedule: Schedule,
        *,
        loss: Loss = next_token_loss,
        accumulation: int = 1,
        clip: float | None = None,
        autocast: torch.dtype | None = None,
        monitor: Monitor | None = None,
        processes: Processes = Processes(),  # noqa: B008 (frozen)
    ) -> None:
        if accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, got {accumulation}")
        self.model, self.batches, self.optimizers, self.schedule = model, batches, optimizers, schedule
        self.loss, self.accumulation, self.clip, self.autocast, self.monitor = (
            loss,
            accumulation,
            clip,
            autocast,
            monitor,
        )
        self.processes = processes
        self.device = next(model.parameters()).device
        self.low_bit = any(isinstance(module, BitLayer) for module in model.modules())
        self.peaks = [
            [(group, group["lr"], group.get("weight_decay", 0.0)) for group in optimizer.param_groups]
            for optimizer in optimizers
        ]
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.losses: list[float] = []
        self.metrics: list[dict[str, Any]] = []  # what monitor and evaluation found, each with its "step"
        self.stop = False  # set it, from a signal say, and run returns after the present step, in all processes
        self._unread: list[Tensor] = []

    def one_step(self) -> None:
        """The next step, whatever has to be done around it."""
        step = self.step
        if not self.model.training:
            self.model.train()
        if self.low_bit:
            set_strength(self.model, self.schedule.strength(step))
        lr, decay = self.schedule.lr(step), self.schedule.weight_decay(step)
        for groups in self.peaks:
            for group, peak, most in groups:
                group["lr"] = peak * lr
                group["weight_decay"] = most * decay
        if self.monitor is not None:
            self.monitor.before_step(step + 1)
        rank, world = self.processes.rank, self.processes.world
        first = step * self.accumulation
        micro = [self._moved(self.batches[(first + i) * world + rank]) for i in range(self.accumulation)]
        labels = [(batch["labels"] != IGNORED).sum() for batch in micro] if world * len(micro) > 1 else []
        in_all: Any = self.processes.sum(torch.stack(labels).sum()) if labels else None
        total: Any = 0
        for i, batch in enumerate(micro):
            with self.autocasting():
                loss = self.loss(self.model, batch)
            if labels:
                loss = loss * (labels[i] / in_all)
            loss.backward()
            total = total + loss.detach()
        parameters = [p for groups in self.peaks for group, _, _ in groups for p in group["params"]]
        self.processes.sum_gradients(parameters)
        if self.clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.tokens += world * sum(batch["labels"].numel() for batch in micro)
        self._unread.append(self.processes.sum(total))
        if self.device.type == "cpu" or len(self._unread) >= FETCH:
            self.fetch()
        if self.monitor is not None and (found := self.monitor.after_step(self.step)):
            self.metrics.append({"step": self.step, **found})

    def run(
        self,
        label: str = "training",
        console: Console | None = None,
        *,
        show: Callable[[float], str] = lambda loss: f"loss {loss:.3f}",
        after: Iterable[Callable[["Loop"], None]] = (),
    ) -> list[float]:
        """All steps that are left; returns the losses of all steps.

        show:  how progress shows a loss
        after: called after every step, in order; the time they take is not training's
        Raises RuntimeError if the loss is not a number any more.
        """
        after, began, at_start = list(after), self.seconds, self.tokens
        quiet = console or Console(quiet=True)
        with Progress(label, self.schedule.steps, "steps", quiet, done=self.step) as progress:
            while self.step < self.schedule.steps and not self.processes.any([self.stop])[0]:
                start = time.perf_counter()
                self.one_step()
                self.seconds += time.perf_counter() - start
                speed = (self.tokens - at_start) / max(self.seconds - began, 1e-9)
                recent = show(statistics.fmean(self.losses[-RECENT:])) if self.losses else "loss -"
                progress.update(self.step, recent, f"{speed:,.0f} tokens/s")
                for call in after:
                    call(self)
            self.fetch()
        return self.losses

    def fetch(self) -> None:
        """Have all losses in `losses`; raises RuntimeError if one is not a number."""
        start = len(self.losses)
        self.losses += torch.stack(self._unread).tolist() if self._unread else []
        self._unread = []
        for step, loss in enumerate(self.losses[start:], start + 1):
            if not math.isfinite(loss):
                raise RuntimeError(
                    f"the loss of step {step} is {loss}: training diverged; use a lower learning rate, a longer "
                    "warm-up, or clip the gradient"
                )

    def autocasting(self) -> Any:
        """The context in which the model runs, in evaluation, too."""
        return torch.autocast(self.device.type, self.autocast) if self.autocast is not None else nullcontext()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a run needs to go on besides the weights: tensors, and what JSON can hold.

        Every process must ask for it.
        """
        self.fetch()
        tensors, numbers = optimizer_state(self.model, self.optimizers)
        tensors = {f"optimizer/{name}": value for name, value in tensors.items()}
        for rank, state in enumerate(self.processes.each(torch.get_rng_state())):
            tensors[_random("cpu", rank)] = state
        if self.device.type == "cuda":
            for rank, state in enumerate(self.processes.each(torch.cuda.get_rng_state(self.device))):
                tensors[_random("cuda", rank)] = state
        return tensors, {
            "step": self.step,
            "processes": self.processes.world,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "losses": self.losses,
            "metrics": self.metrics,
            "layers": self.monitor.history if self.monitor is not None else [],
            "optimizer": numbers,
        }

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Go on from a state; the weights are the caller's. Raises ValueError for that of more or fewer processes."""
        rank, world, before = self.processes.rank, self.processes.world, facts.get("processes", 1)
        if world != before:
            raise ValueError(f"this run was one of {before} processes, and goes on with as many; here are {world}")
        prefix = "optimizer/"
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        restore_optimizers(self.model, self.optimizers, own, facts["optimizer"])
        torch.set_rng_state(tensors[_random("cpu", rank)])
        if self.device.type == "cuda" and _random("cuda", rank) in tensors:
            torch.cuda.set_rng_state(tensors[_random("cuda", rank)], self.device)
        self.step, self.tokens, self.seconds = facts["step"], facts["tokens"], facts["seconds"]
        self.losses, self.metrics = list(facts["losses"]), list(facts["metrics"])
        if self.monitor is not None:
            self.monitor.history = list(facts["layers"])

    def _moved(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}


def _random(kind: str, rank: int) -> str:
    """Where a state has a process's random numbers."""
    return f"random/{kind}/{rank}" if rank else f"random/{kind}"
