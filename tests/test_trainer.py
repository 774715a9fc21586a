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


def small(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


def arguments(folder: Path, **changes) -> TrainingArguments:  # type: ignore[no-untyped-def]
    options = {"max_steps": 6, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return TrainingArguments(str(folder), **options | {"logging_steps": 2, "save_strategy": "no"} | changes)


def rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    text = torch.randint(0, 32, (count, 12), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in text]


class Log(TrainerCallback):
    """What a logger is told, wandb's or tensorboard's say."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs, **kwargs) -> None:  # type: ignore[no-untyped-def]
        self.seen.append(dict(logs))


def test_the_monitor_tells_every_logger_what_becomes_of_the_codes(tmp_path: Path) -> None:
    model = small()
    bitnet.replace_linear(model)
    log = Log()
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[log])  # type: ignore[arg-type]
    monitor = bitnet.MonitorCallback(trainer, every=3)
    trainer.add_callback(monitor)
    trainer.train()
    looks = [found for found in log.seen if "bitnet/flips" in found]
    assert len(looks) == 2
    assert all(0 < found["bitnet/zeros"] < 1 for found in looks)
    assert [look["step"] for look in monitor.monitor.history] == [3, 6]
    assert [found["step"] for found in trainer.state.log_history if "bitnet/flips" in found] == [3, 6]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_trainer_that_distills_minimizes_the_distillation(tmp_path: Path, accumulation: int) -> None:
    teacher, student = small(1), small()
    bitnet.replace_linear(student)
    loss = bitnet.Distillation(teacher, ce=0.5, kl=2.0, temperature=5, relation=1.0)
    row = rows(1)[0]
    batch = {"input_ids": torch.stack([row["input_ids"]] * 2)}
    batch["labels"] = torch.nn.functional.pad(batch["input_ids"], (0, 1), value=-100)[:, 1:]
    student.train()
    expected = loss(student, batch).item()
    log = Log()
    options = arguments(
        tmp_path, max_steps=1, logging_steps=1, gradient_accumulation_steps=accumulation, learning_rate=0.0
    )
    trainer = bitnet.DistillTrainer(
        student, options, distillation=loss, train_dataset=[row] * 8, eval_dataset=[row], callbacks=[log]
    )
    trainer.train()
    assert log.seen[0]["loss"] == pytest.approx(expected, rel=1e-3)
    assert {"distill/ce", "distill/kl", "distill/relation"} <= log.seen[0].keys()
    own = student.eval()(input_ids=row["input_ids"][None], labels=row["labels"][None]).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(own, rel=1e-4)  # the student's own


def test_a_trainer_that_distills_brings_the_student_to_its_teacher(tmp_path: Path) -> None:
    teacher, student = small(1), small()
    bitnet.replace_linear(student)
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    options = arguments(tmp_path, max_steps=80, learning_rate=1e-2, per_device_train_batch_size=8)
    log = Log()
    callbacks = [bitnet.StrengthCallback(0, 0.5), log]
    bitnet.DistillTrainer(
        student,
        options,
        distillation=bitnet.Distillation(teacher, ce=0),
        train_dataset=rows(),
        callbacks=callbacks,
    ).train()
    losses = [found["loss"] for found in log.seen if "loss" in found]
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.equal(before[name]) for name, p in teacher.named_parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3, "max_grad_norm": 0.1},
        {"gradient_checkpointing": True},
        {"bf16": True},
        {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 2},
    ],
    ids=lambda c: "-".join(c),
)
def test_a_trainers_own_options_work_unchanged(tmp_path: Path, changes: dict) -> None:
    model = small()
    bitnet.replace_linear(model)
    start = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    callbacks = [bitnet.StrengthCallback(0.2, 0.6)]
    result = Trainer(model, arguments(tmp_path, **changes), train_dataset=rows(), callbacks=callbacks).train()  # type: ignore[arg-type]
    assert result.training_loss < 10
    assert not model.model.layers[0].mlp.up_proj.weight.equal(start)
    assert "Packed" in str(bitnet.pack(model))


def test_accelerate_trains_packs_and_saves(tmp_path: Path) -> None:
    from accelerate import Accelerator

    model = small()
    bitnet.replace_linear(model)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    data = torch.utils.data.DataLoader(rows(), batch_size=2)  # type: ignore[arg-type]
    prepared, optimizer, data = accelerator.prepare(model, optimizer, data)
    losses = []
    for _ in range(10):
        for batch in data:
            with accelerator.accumulate(prepared):
                loss = prepared(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
    assert losses[-1] < losses[0]
    model = accelerator.unwrap_model(prepared).eval()
    ids = rows(1)[0]["input_ids"][None]
    with torch.no_grad():
        trained = model(ids).logits
        bitnet.pack(model)
        bitnet.save(model, tmp_path / "packed")
        assert bitnet.load(tmp_path / "packed")(ids).logits.equal(trained)


def test_trl_fine_tunes_unchanged(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    from bitnet.train.stdlib import build_tokenizer

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, eos_token_id=256, pad_token_id=256, **sizes))
    bitnet.replace_linear(model)
    data = datasets.Dataset.from_dict({"prompt": ["1 + 1 = ", "2 + 1 = "] * 4, "completion": ["2", "3"] * 4})
    options = trl.SFTConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, logging_steps=1, save_strategy="no", bf16=False,
    )  # fmt: skip
    watch = Watch()
    trainer = trl.SFTTrainer(
        model,
        options,
        train_dataset=data,
        processing_class=build_tokenizer(),
        callbacks=[bitnet.StrengthCallback(0, 0.5), watch],
    )
    trainer.train()
    assert watch.seen == pytest.approx([0, 0.5, 1, 1])
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "packed")
    assert isinstance(bitnet.load(tmp_path / "packed").model.layers[0].mlp.up_proj, bitnet.PackedBitLinear)


@pytest.mark.parametrize(
    ("optimizer", "package"), [("adamw_bnb_8bit", "bitsandbytes"), ("galore_adamw", "galore_torch")]
)
def test_optimizers_that_keep_less_train_unchanged(optimizer: str, package: str, tmp_path: Path) -> None:
    """bitsandbytes keeps AdamW's moments in 8 bits, GaLore those of a gradient of low rank."""
    pytest.importorskip(package, reason=f"{package} is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    bitnet.replace_linear(model)
    text = torch.arange(24) + torch.arange(16)[:, None]
    options = {"optim": optimizer, "learning_rate": 1e-2, "max_steps": 12, "logging_steps": 1}
    if optimizer == "galore_adamw":
        options |= {"optim_target_modules": ["attn", "mlp"], "optim_args": "rank=8, update_proj_gap=5"}
    trainer = Trainer(
        model, arguments(tmp_path, **options), train_dataset=[{"input_ids": t, "labels": t} for t in text]
    )  # type: ignore[arg-type]
    trainer.train()
    losses = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert losses[-1] < losses[0] - 1
    kept = list(trainer.optimizer.optimizer.state.values())
    if optimizer == "galore_adamw":
        assert any("projector" in state for state in kept)
    else:
        assert any(value.dtype == torch.uint8 for state in kept for value in state.values() if torch.is_tensor(value))
    with torch.no_grad():
        trained = model.eval()(text[:1]).logits
        bitnet.pack(model)
        assert model(text[:1]).logits.equal(trained)
