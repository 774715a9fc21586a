"""Hugging Face models inside something else: what is kept, and that they save themselves right."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IDS, Mlp, llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaForSequenceClassification

import bitnet
from bitnet.linear import BitLayer


class Classifier(nn.Module):
    """As a SentenceTransformer, a LightningModule or a class of the user's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone, self.mlp, self.score = model, nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.mlp(self.backbone(x).logits).relu())


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a class of one's own": Classifier,
    "DataParallel": nn.DataParallel,
    "torch.compile": lambda model: torch.compile(model, backend="eager"),  # type: ignore[return-value]
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),  # type: ignore[return-value]
    "Sequential": lambda model: nn.Sequential(model),
}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize("form", ["latent", "packed", "unpacked", "int8 head"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_inner_model_saves_itself_right(wrapper: str, form: str, tmp_path: Path) -> None:
    model = llama()
    outer = WRAPPERS[wrapper](model)
    bitnet.replace_linear(outer)
    if form != "latent":
        bitnet.pack(outer, head="int8" if form == "int8 head" else None)
    if form == "unpacked":
        bitnet.unpack(outer)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    kinds = [type(module) for module in again.modules()]
    assert kinds == [type(module) for module in model.modules()]
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("wrapper", ["DataParallel", "torch.compile", "both"])
def test_a_save_of_what_only_wraps_is_a_save_of_the_model(wrapper: str, tmp_path: Path) -> None:
    model = llama()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(WRAPPERS[wrapper](model), tmp_path / "wrapped")
    bitnet.save(model, tmp_path / "model")
    assert torch.equal(logits(bitnet.load(tmp_path / "wrapped")), logits(model))
    for file in (tmp_path / "model").iterdir():
        assert file.read_bytes() == (tmp_path / "wrapped" / file.name).read_bytes()
    mlp = Mlp().eval()
    bitnet.replace_linear(mlp)
    bitnet.save(WRAPPERS[wrapper](mlp), tmp_path / "mlp")
    x = torch.randn(2, 16)
    assert torch.equal(bitnet.load(tmp_path / "mlp", Mlp())(x), mlp(x))


def test_a_class_around_a_model_saves_and_loads_whole(tmp_path: Path) -> None:
    model = Classifier(llama()).eval()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path)
    loaded = bitnet.load(tmp_path, Classifier(llama()))
    assert torch.equal(loaded(IDS), model(IDS))


def test_the_heads_of_an_inner_model_are_kept() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Classifier(BertForMaskedLM(BertConfig(vocab_size=64, **sizes)))
    kept = {row.name: row.reason for row in bitnet.replace_linear(model).rows if row.kind == "Linear"}
    assert kept == {
        "backbone.cls.predictions.transform.dense": "task head (outside bert)",
        "backbone.cls.predictions.decoder": "tied to the embedding backbone.bert.embeddings.word_embeddings",
        "score": "task head",
    }


# New heads on old checkpoints


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("labels", [2, 4])
def test_a_new_task_head_on_a_checkpoint_is_float_and_trains(labels: int, packed: bool, tmp_path: Path) -> None:
    model = llama()
    bitnet.replace_linear(model)
    if packed:
        bitnet.pack(model)
    bitnet.save(model, tmp_path / "base")
    task = LlamaForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=labels, pad_token_id=0)
    assert type(task.score) is nn.Linear
    assert task.score.weight.abs().sum() > 0
    kinds = [type(module) for module in task.model.modules()]
    assert kinds == [type(module) for module in model.model.modules()]
    task.train()(IDS, labels=torch.tensor([1])).loss.backward()
    assert task.score.weight.grad is not None
    task.save_pretrained(tmp_path / "task")
    again = LlamaForSequenceClassification.from_pretrained(tmp_path / "task")
    assert torch.equal(logits(again), logits(task))


def test_a_packed_head_comes_back_packed(tmp_path: Path) -> None:
    model = LlamaForSequenceClassification(llama(num_labels=4, pad_token_id=0).config)
    bitnet.replace_linear(model, include=["score", ".*proj"])
    bitnet.pack(model)
    bitnet.save(model, tmp_path)
    again = bitnet.load(tmp_path)
    assert isinstance(again.score, bitnet.PackedBitLinear)
    assert torch.equal(logits(again), logits(model))


def test_a_missing_layer_of_the_body_is_no_new_head(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = llama()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    save_file({k: t for k, t in state.items() if name not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=name):
        LlamaForSequenceClassification.from_pretrained(tmp_path, num_labels=4)


# Adapters


class LoRA(nn.Module):
    """One's own."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.lora_A, self.lora_B = base, nn.Linear(16, 2, bias=False), nn.Linear(2, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


def adapters_and_base(model: nn.Module) -> tuple[set[type], set[type]]:
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | BitLayer) and "q_proj" in n}
    adapters = {type(m) for n, m in linears.items() if "lora_" in n}
    return adapters, {type(m) for n, m in linears.items() if "lora_" not in n}


def test_adapters_of_ones_own_stay_float() -> None:
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj = LoRA(layer.self_attn.q_proj)
    report = bitnet.replace_linear(model)
    assert adapters_and_base(model) == ({nn.Linear}, {bitnet.BitLinear})
    assert {row.reason for row in report.rows if "lora_" in row.name} == {"adapter"}


@pytest.mark.parametrize("method", ["LoraConfig", "IA3Config", "LoHaConfig", "VeraConfig", "PrefixTuningConfig"])
@pytest.mark.filterwarnings("ignore")  # PEFT's own
def test_adapters_of_peft_stay_float_and_their_base_is_swapped(method: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    if method == "IA3Config":
        options["feedforward_modules"] = ["down_proj"]
    if method == "PrefixTuningConfig":
        options = {"num_virtual_tokens": 4, "prefix_projection": True, "task_type": "CAUSAL_LM"}
    inner = llama()
    plain = {name for name, module in inner.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    model = peft.get_peft_model(inner, getattr(peft, method)(**options))
    ours = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    bitnet.replace_linear(model)
    low = {name.removesuffix(".base_layer") for name, m in inner.named_modules() if isinstance(m, BitLayer)}
    assert low == plain
    for name in ours:
        owner = model.get_submodule(name.rpartition(".")[0])
        assert not isinstance(owner, BitLayer), name
    assert sum(isinstance(module, BitLayer) for module in model.modules()) == len(plain)
