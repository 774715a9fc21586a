"""transformers.Trainer: the quantization warm-up, the monitor of codes, and distillation."""

from typing import Any

import torch.nn.functional as F
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .data import IGNORED
from .distill import Distillation
from .monitors import Monitor
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


class MonitorCallback(TrainerCallback):
    """What becomes of the codes, in the Trainer's log: trainer.add_callback(bitnet.MonitorCallback(trainer)).

    every: steps between two looks. The log gets the means over layers ("bitnet/flips", "bitnet/zeros", ...),
           `monitor.history` each layer's figures; see bitnet.train.monitors.
    """

    def __init__(self, trainer: Trainer, every: int = 50) -> None:
        model = trainer.model
        assert isinstance(model, nn.Module)
        self.log, self.monitor = trainer.log, Monitor(model, every)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.monitor.before_step(state.global_step + 1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if found := self.monitor.after_step(state.global_step):
            self.log(found)


class DistillTrainer(Trainer):
    """transformers.Trainer whose loss follows a teacher: DistillTrainer(model, args, distillation=..., ...).

    distillation: a bitnet.Distillation, which has the teacher and the terms of the loss
    Batches are as for any Trainer: labels of causal models equal their input_ids and are shifted here. The terms are in
    the log, as "distill/kl", ...; evaluation's loss is the model's own, without the teacher.
    """

    def __init__(self, *args: Any, distillation: Distillation, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = distillation
        distillation.teacher.to(self.args.device)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over tokens; accumulation averages these

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        batch = dict(inputs)
        if "labels" in batch and type(self.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
            batch["labels"] = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
        loss, outputs = self.distillation.with_outputs(model, batch)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= {f"distill/{name}": float(value) for name, value in self.distillation.parts.items()}
        super().log(logs, start_time)
