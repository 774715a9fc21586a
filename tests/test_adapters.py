"""LoRA beside packed layers, through PEFT's and transformers' own calls."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import save_model
from tiny import IDS, llama, mixtral
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import bitnet
from bitnet.convert.checkpoint import add_adapter
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


def packed(changes: dict[str, Any] | None = None, head: str | None = None, **options: Any) -> nn.Module:
    model = llama(**changes or {})
    bitnet.replace_linear(model, **options)
    bitnet.pack(model, head=head)
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
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' starts from the float weight"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal' starts from the float weight"),
        ({"bias": "all"}, "bias='all' trains biases of the layers themselves"),
        ({"bias": "lora_only"}, "bias='lora_only' trains biases of the layers themselves"),
        ({"modules_to_save": ["k_proj"]}, "k_proj, a packed layer, which cannot be trained"),
        ({"modules_to_save": ["mlp"]}, "mlp.gate_proj, a packed layer, which cannot be trained"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens, a packed embedding, which cannot be trained"),
        ({"trainable_token_indices": [1]}, "embed_tokens is an int8 embedding"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens is an int8 embedding"),
    ],
)
def test_what_needs_the_float_weight_is_refused_and_leaves_the_model_as_it_was(
    options: dict[str, Any], words: str
) -> None:
    model = packed({"attention_bias": True, "tie_word_embeddings": True}, head="int8")
    model.model.layers[0].self_attn.q_proj = nn.Linear(16, 16)  # the first target, which PEFT could adapt
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=words):
        peft.get_peft_model(model, config(**options))
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("targets", [{"target_modules": ["experts"]}, {"target_parameters": ["experts.gate_up_proj"]}])
def test_packed_experts_are_refused(targets: dict[str, Any]) -> None:
    model = mixtral()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    with pytest.raises(ValueError, match="packed experts, which take no adapters"):
        peft.get_peft_model(model, config(**targets))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_reach_the_adapters_below_and_are_those_of_the_dequantized_weight(options: dict[str, Any]) -> None:
    model = peft.get_peft_model(packed(**options), config(target_modules=["q_proj"]))
    disturb(model)
    layer = model.base_model.model.model.layers[1].self_attn.q_proj
    base = layer.get_base_layer()
    x, gy = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16)
    layer(x).backward(gy)
    weight = reference.dequantize_weight(base.codes(), base.weight_scale)
    seen = x.detach().clone().requires_grad_()
    inner = seen if base.rms_norm is None else base.rms_norm(seen)
    if base.spec.hadamard:
        inner = reference.hadamard(inner, base.spec.hadamard, base.signs)
    a, b = (each["default"].weight.detach() for each in (layer.lora_A, layer.lora_B))
    (inner @ weight.T + layer.scaling["default"] * seen @ a.T @ b.T).backward(gy)
    torch.testing.assert_close(x.grad, seen.grad)
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert "lora_" not in name or parameter.grad.abs().sum() > 0, name


def test_bfloat16_autocast_trains_and_an_int8_head_takes_an_adapter() -> None:
    model = peft.get_peft_model(packed(head="int8"), config(target_modules=["q_proj", "lm_head"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(12):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_merging_by_peft_is_refused_before_it_merges_what_it_could() -> None:
    model = packed()
    first = model.model.layers[0].self_attn.q_proj = nn.Linear(16, 16)
    adapted, before = peft.get_peft_model(model, config()), first.weight.clone()
    disturb(adapted)
    for merge in (adapted.merge_adapter, adapted.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged into a packed weight"):
            merge()
    assert torch.equal(first.weight, before)


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
    with pytest.warns(UserWarning, match=r"merging kept -?\d+% of what the adapters add to 2 packed layers"):
        row = bitnet.merge_adapter(adapted).layers[0]
    moved = reference.dequantize_weight(base.codes(), base.weight_scale) - before
    if base.spec.hadamard:
        added = reference.hadamard(added, 8, base.signs)
    assert row.asked == pytest.approx((added.norm() / before.norm()).item(), rel=1e-4)
    assert row.kept == pytest.approx(((moved * added).sum() / added.norm() ** 2).item(), rel=1e-4)
    assert row.error == pytest.approx(((moved - added).norm() / added.norm()).item(), rel=1e-4)
    assert row.kept > 0
    assert "q_proj" in str(bitnet.convert.swap.merge.MergeReport([row]))


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({"rms_norm": True}, {}, "RMSNorm before its packed weight"),
        ({}, {"lora_bias": True}, "has no bias, and its adapter does"),
        ({}, {"alora_invocation_tokens": [41]}, "more than B A"),
        (
            {"head": "int8", "changes": {"tie_word_embeddings": True}},
            {"target_modules": ["q_proj", "lm_head"]},
            "shares",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*", "ignore:.*tie_word_embeddings.*", "ignore:Model has")
def test_what_no_merge_can_express_is_refused_and_nothing_is_merged(
    options: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    model = peft.get_peft_model(packed(**options), config(**changes))
    disturb(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        bitnet.merge_adapter(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize("road", ["peft", "transformers"])
@pytest.mark.filterwarnings("ignore:merging kept", "ignore:.*have invalid shape.*lora_B.bias")  # as biases are
def test_a_merged_model_has_all_that_was_trained_and_saves_as_one_without_adapters(road: str, tmp_path: Path) -> None:
    base = packed({"attention_bias": True})
    bitnet.save(base, tmp_path / "base")
    changes = {"target_modules": ["q_proj"], "lora_bias": True, "modules_to_save": ["lm_head"]}
    model = adapted = peft.get_peft_model(base, config(**changes))
    disturb(adapted)
    nn.init.normal_(base.lm_head.modules_to_save["default"].weight)
    head = base.lm_head.modules_to_save["default"].weight.clone()
    if road == "transformers":
        adapted.save_pretrained(tmp_path / "adapter")
        base = model = bitnet.load(tmp_path / "base")
        add_adapter(model, tmp_path / "adapter")
    layer = base.model.layers[0].self_attn.q_proj
    bias = layer.get_base_layer().bias + 2 * layer.lora_B["default"].bias.detach()
    bitnet.merge_adapter(model)
    torch.testing.assert_close(base.model.layers[0].self_attn.q_proj.bias, bias)
    assert torch.equal(base.lm_head.weight, head)
    bitnet.save(base, tmp_path / "merged")
    assert torch.equal(logits(bitnet.load(tmp_path / "merged")), logits(base))
    peft.get_peft_model(base, config())  # and PEFT does not take it for an adapted one


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


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A packed checkpoint with its tokenizer, and an adapter that changes its answers."""
    base, adapter = (tmp_path_factory.mktemp(name) for name in ("base", "adapter"))
    save_model(base)
    model = peft.get_peft_model(bitnet.load(base), config(target_modules="all-linear"))
    disturb(model)
    model.save_pretrained(adapter)
    return base, adapter


def test_commands_run_a_model_and_its_adapter(
    served: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitnet.cli import main
    from bitnet.serving.run import Options, load_text_model

    base, adapter = map(str, served)
    wanted = peft.PeftModel.from_pretrained(bitnet.load(base), adapter)
    model = load_text_model(base, Options(device="cpu", adapter=adapter))
    assert re.fullmatch(r"transformers \(layers\.0\.self_attn\.q_proj is a PackedLoraLinear, .*\)", model.engine)
    model.scheduler.drain(0)
    ids = torch.tensor([model.plain_ids("hi")])
    with torch.no_grad():
        made = wanted.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=256)
    assert main(["generate", base, "hi", "--max-new-tokens", "8", "--adapter", adapter, "--device", "cpu"]) == 0
    text = model.tokenizer.decode(made[0], skip_special_tokens=True)
    assert capsys.readouterr().out.strip() == text.strip()
    (tmp_path / "text.txt").write_text("some text to score " * 20)
    command = ["eval", base, "--text", str(tmp_path / "text.txt"), "--against", base, "--device", "cpu"]
    assert main([*command, "--adapter", adapter]) == 0
    printed = capsys.readouterr().out
    assert f"{base} + {adapter}" in printed  # and the other is the model without
    assert float(re.findall(r": ([\d.e+-]+) nats a token", printed)[0]) > 0


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 32}])
def test_an_adapter_of_another_model_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    peft.get_peft_model(packed(), config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"of another model: it (has|lacks) model\.layers|cannot go beside this model"):
        add_adapter(packed(changes), tmp_path)
