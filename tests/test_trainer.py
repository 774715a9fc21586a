from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import bitnet


class Watch(TrainerCallback):
    """Records the strength that each training step ran with."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, args, state, control, model, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self.seen.append(float(next(m for m in model.modules() if isinstance(m, bitnet.BitLinear)).strength))


def test_trainer_ramps_the_strength_and_ends_fully_quantized(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    bitnet.replace_linear(model)
    text = torch.randint(0, 32, (8, 12))
    watch = Watch()
    arguments = TrainingArguments(
        str(tmp_path), max_steps=10, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    data = [{"input_ids": row, "labels": row} for row in text]
    callbacks = [bitnet.StrengthCallback(0.2, 0.6), watch]
    Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()  # type: ignore[arg-type]
    assert watch.seen == pytest.approx([0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1])
    assert all(m.strength == 1.0 for m in model.modules() if isinstance(m, bitnet.BitLinear))


def test_a_schedule_that_ends_before_it_starts_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"start=0\.9, end=0\.5"):
        bitnet.StrengthCallback(0.9, 0.5)
