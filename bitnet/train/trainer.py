"""transformers.Trainer and the quantization warm-up."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .strength import set_strength, strength_at


class StrengthCallback(TrainerCallback):
    """Follows bitnet.strength_at through a Trainer run: Trainer(..., callbacks=[bitnet.StrengthCallback()]).

    start, end: shares of the training steps between which layers go from full precision to fully quantized
    """

    def __init__(self, start: float = 0.2, end: float = 0.7) -> None:
        strength_at(0, 1, start, end)  # a clear error now rather than at the first step
        self.start, self.end = start, end

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_strength(kwargs["model"], strength_at(state.global_step, state.max_steps, self.start, self.end))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        set_strength(kwargs["model"], 1.0)
