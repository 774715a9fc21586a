"""How learning rate, weight decay and the strength of the quantization move through a run: functions of the step."""

import math
from dataclasses import dataclass
from typing import Literal

from .strength import strength_at

KINDS = ("linear", "cosine", "wsd", "two-stage", "constant")
SECOND_PEAK = 2 / 3  # of "two-stage": 1e-3 after 1.5e-3, 8e-4 after 1.2e-3


@dataclass(frozen=True)
class Schedule:
    """What multiplies the peak learning rate and the weight decay at each step, and how far layers quantize.

    steps:   of the run
    kind:    after the warm-up, the learning rate falls
             "linear"     in a line to `final_lr`
             "cosine"     in half a cosine to it
             "wsd"        not at all, and in the last `decay` of the run in a line to it (warm-up, stable, decay;
                          MiniCPM, arXiv 2404.06395, sec. 4)
             "two-stage"  in a line that would reach 0 at the end; at half of the run it drops to a second line, 2/3 as
                          high, and weight decay ends: as BitNet b1.58 was trained (arXiv 2402.17764 and "The Era of
                          1-bit LLMs: Training Tips, Code and FAQ", sec. 2). `final_lr` has no say
             "constant"   never
    warmup:  share of the steps in which the learning rate rises, in a line
    final_lr: the last learning rate, as a share of the peak
    decay:   of "wsd"
    strength_start, strength_end: shares of the steps between which layers go from full precision to fully quantized;
             see strength_at. 0, 0 quantizes fully from the first step, 0, 0.5 is Hugging Face's recipe for models
             that were trained already, and 0.5, 0.9 is late
    """

    steps: int
    kind: Literal["linear", "cosine", "wsd", "two-stage", "constant"] = "linear"
    warmup: float = 0.04
    final_lr: float = 0.05
    decay: float = 0.2
    strength_start: float = 0.2
    strength_end: float = 0.7

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.kind not in KINDS:
            raise ValueError(f"schedule must be one of {', '.join(KINDS)}; got {self.kind!r}")
        for name in ("warmup", "final_lr", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share and must lie in [0, 1], got {getattr(self, name)}")
        strength_at(0, 1, self.strength_start, self.strength_end)  # refuses what is not in order

    def lr(self, step: int) -> float:
        """The learning rate of a step, 0 the first, as a share of the peak."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, self.steps - warmup)
        if self.kind == "linear":
            return 1 + (self.final_lr - 1) * done
        if self.kind == "cosine":
            return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * done)) / 2
        if self.kind == "wsd":
            left = (1 - done) / self.decay if self.decay else 1.0
            return self.final_lr + (1 - self.final_lr) * min(1.0, left)
        if self.kind == "two-stage":
            return (1 - done) * (SECOND_PEAK if 2 * step >= self.steps else 1)
        return 1.0

    def weight_decay(self, step: int) -> float:
        """The weight decay of a step, as a share of the greatest."""
        return 0.0 if self.kind == "two-stage" and 2 * step >= self.steps else 1.0

    def strength(self, step: int) -> float:
        """How far layers quantize in a step, from 0 to 1."""
        return strength_at(step, self.steps, self.strength_start, self.strength_end)
