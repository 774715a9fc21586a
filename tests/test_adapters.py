"""LoRA beside packed layers, through PEFT's and transformers' own calls."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IDS, llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import bitnet
from bitnet.decode.attach import why_not
from bitnet.kernels import reference
from bitnet.packed import PackedBitLinear

peft = pytest.importorskip("peft")
OPTIONS: dict[str, dict[str, Any]] = {
    "tensor": {},
    "row": {"per_row": True},
    "group": {"group_size": 32},
    "rotated": {"hadamard": 8, "hadamard_signs": True},
    "norm inside": {"rms_norm": True},
    "float activations": {"activation_bits": None},
    "binary": {"weights": "binary"},
}


def packed(**options: Any) -> nn.Module:
    model = llama()
    bitnet.replace_linear(model, **options)
    bitnet.pack(model)
    return model


def config(**changes: Any) -> Any:
    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**options | changes)


def disturb(model: nn.Module) -> None:
    """Adapters that do something: PEFT's begin with B = 0."""
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_an_adapted_layer_is_the_packed_one_and_a_product_of_low_rank(options: dict[str, Any]) -> None:
    model = packed(**options)
    plain = logits(model)
    adapted = peft.get_peft_model(model, config(use_rslora=True))
    assert torch.equal(logits(adapted), plain)
    disturb(adapted)
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer.get_base_layer(), PackedBitLinear)
    x = torch.randn(3, 16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    wanted = layer.get_base_layer()(x) + 8 / 4**0.5 * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), wanted)
    assert not torch.equal(logits(adapted), plain)


def test_all_linear_means_every_packed_layer_but_the_head() -> None:
    model = packed()
    bitnet.pack(model, head="int8")
    names = {name for name, m in model.named_modules() if isinstance(m, PackedBitLinear)} - {"lm_head"}
    adapted = peft.get_peft_model(model, config(target_modules="all-linear"))
    assert {name for name, m in model.named_modules() if hasattr(m, "lora_A")} == names
    again = peft.LoraConfig(r=2, target_modules="all-linear")
    adapted.add_adapter("second", again)
    assert {name for name, m in model.named_modules() if hasattr(m, "lora_A") and "second" in m.lora_A} == names


def test_training_lowers_the_loss_and_leaves_the_packed_weights_alone(tmp_path: Path) -> None:
    model = peft.get_peft_model(packed(), config(target_modules="all-linear"))
    before = {name: value.clone() for name, value in model.state_dict().items() if "lora_" not in name}
    row = torch.arange(8) % 5
    data = [{"input_ids": row, "labels": row}] * 8
    arguments = TrainingArguments(
        tmp_path, max_steps=30, learning_rate=3e-2, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
        gradient_checkpointing=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data)
    start = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data)["eval_loss"] < 0.7 * start
    for name, value in model.state_dict().items():
        assert "lora_" in name or torch.equal(value, before[name]), name


def test_an_adapter_comes_back_by_every_road(tmp_path: Path) -> None:
    model = packed()
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config())
    disturb(adapted)
    wanted = logits(adapted)
    adapted.save_pretrained(adapter)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(bitnet.load(base), adapter)), wanted)
    assert torch.equal(logits(peft.AutoPeftModelForCausalLM.from_pretrained(adapter)), wanted)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(adapter)), wanted)
    loaded = bitnet.load(base)
    loaded.load_adapter(adapter)
    assert torch.equal(logits(loaded), wanted)
    adapted.save_pretrained(base)  # beside the weights it belongs to
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(base)), wanted)


def test_generation_with_an_adapter_is_that_of_the_plain_forward() -> None:
    model = llama(hidden_size=64, intermediate_size=96)
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.native_decoding(model.eval())
    ids = torch.arange(1, 6)[None]
    model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    adapted = peft.get_peft_model(model, config())
    disturb(adapted)
    made = adapted.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=63)
    with torch.no_grad():
        for length in range(5, made.shape[1]):
            assert made[0, length] == adapted(input_ids=made[:, :length]).logits[0, -1].argmax()
    assert "q_proj" in why_not(model, "float16")


@pytest.mark.parametrize("first", ["bitnet", "peft"])
def test_it_does_not_matter_which_is_imported_first(first: str) -> None:
    second = {"bitnet": "peft", "peft": "bitnet"}[first]
    code = (
        f"import {first}, {second}\nimport torch\n"
        "from peft.tuners.lora import LoraModel\n"
        "layer = torch.nn.Sequential(bitnet.PackedBitLinear(8, 8), torch.nn.Linear(8, 8))\n"
        "LoraModel(layer, peft.LoraConfig(r=2, target_modules=['0']), 'default')\n"
        "assert type(layer[0]).__name__ == 'PackedLoraLinear'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora=True needs the norms"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the float weight"),
        ({"modules_to_save": ["k_proj"]}, "k_proj, a packed layer, which cannot be trained"),
    ],
)
def test_what_needs_the_float_weight_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        peft.get_peft_model(packed(), config(**options))


def test_merging_by_peft_is_refused() -> None:
    adapted = peft.get_peft_model(packed(), config())
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged into a packed weight"):
            merge()


@pytest.mark.parametrize("options", [OPTIONS[name] for name in OPTIONS if name != "norm inside"])
def test_merging_an_adapter_that_adds_nothing_changes_nothing(options: dict[str, Any]) -> None:
    model = packed(**options)
    plain = logits(model)
    adapted = peft.get_peft_model(model, config())
    report = bitnet.merge_adapter(adapted)
    assert [row.asked for row in report.layers] == [0.0] * 4
    assert not any("lora_" in name for name, _ in adapted.get_base_model().named_modules())
    assert torch.equal(logits(adapted.get_base_model()), plain)


@pytest.mark.parametrize("options", [OPTIONS["row"], OPTIONS["rotated"]])
def test_a_merge_is_what_training_would_quantize_and_says_what_came_through(options: dict[str, Any]) -> None:
    model = packed(**options)
    adapted = peft.get_peft_model(model, config(target_modules=["q_proj"]))
    disturb(adapted)
    layer = model.model.layers[0].self_attn.q_proj
    base = layer.get_base_layer()
    added = layer.get_delta_weight("default").detach()
    before = reference.dequantize_weight(base.codes(), base.weight_scale)
    row = bitnet.merge_adapter(adapted).layers[0]
    moved = reference.dequantize_weight(base.codes(), base.weight_scale) - before
    if base.spec.hadamard:
        added = reference.hadamard(added, 8, base.signs)
    assert row.asked == pytest.approx((added.norm() / before.norm()).item(), rel=1e-4)
    assert row.kept == pytest.approx(((moved * added).sum() / added.norm() ** 2).item(), rel=1e-4)
    assert row.error == pytest.approx(((moved - added).norm() / added.norm()).item(), rel=1e-4)
    assert row.kept > 0
    assert "q_proj" in str(bitnet.convert.swap.merge.MergeReport([row]))


def test_a_layer_with_a_norm_inside_is_not_merged() -> None:
    adapted = peft.get_peft_model(packed(rms_norm=True), config())
    with pytest.raises(ValueError, match="RMSNorm before its packed weight"):
        bitnet.merge_adapter(adapted)


@pytest.mark.parametrize("scale", ["tensor", "row", "group"])
def test_the_gradient_of_the_input_never_expands_a_large_weight(scale: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = torch.randint(-1, 2, (37, 64), dtype=torch.int8)
    scales = {"tensor": torch.rand(1), "row": torch.rand(37), "group": torch.rand(37, 2).half()}[scale]
    gy = torch.randn(5, 37)
    wanted = reference.grad_input(gy, codes, scales)
    seen: list[int] = []
    monkeypatch.setattr(reference, "MOST_FLOATS", 64 * 8)
    part = reference.grad_input
    monkeypatch.setattr(reference, "grad_input", lambda *args: (seen.append(len(args[1])), part(*args))[1])
    torch.testing.assert_close(part(gy, codes, scales), wanted)
    assert seen == [8, 8, 8, 8, 5]
