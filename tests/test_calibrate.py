"""Calibrated rounding: the arithmetic against slow definitions, and the walk through a model block by block."""

import json
import math
import os
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tiny import llama, randomize
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import bitnet
from bitnet import BitLinear, PackedBitLinear, QuantSpec, cli
from bitnet.convert.calibration import gptq
from bitnet.convert.calibration.blocks import BlockModel
from bitnet.convert.calibration.calibrate import calibrate, calibrated, read_text
from bitnet.convert.conversion.convert import convert_checkpoint
from bitnet.convert.hub.source import FolderSource
from bitnet.convert.rounding import latent_weight
from bitnet.kernels import layout, reference
from bitnet.kernels.cpu.choose import choose
from bitnet.kernels.quantizers import on_native
from bitnet.packing import quantize_matrix
from bitnet.train.data import build_tokenizer

TEXT = "".join(f"def f{i}(x):\n    return {i * i} * x + {i}\n\n\n" for i in range(60))
OPTIONS: dict[str, Any] = {"samples": 8, "length": 16}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """LatentWeight this small only lose time to more, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def opt() -> OPTForCausalLM:
    """Positions are embedded, and two linear layers stand outside the blocks."""
    options = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 257}
    return randomize(OPTForCausalLM(OPTConfig(**options, word_embed_proj_dim=8, max_position_embeddings=64)))


def neox_257() -> PreTrainedModel:
    options = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return randomize(GPTNeoXForCausalLM(GPTNeoXConfig(**options, vocab_size=257)))


def mixtral() -> MixtralForCausalLM:
    options = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    options |= {"num_key_value_heads": 2, "num_local_experts": 4}
    return randomize(MixtralForCausalLM(MixtralConfig(**options, vocab_size=257)))


def checkpoint(model: PreTrainedModel, path: Path) -> Path:
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return checkpoint(llama(vocab_size=257), tmp_path_factory.mktemp("float") / "llama")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


def layer(n: int, k: int, tokens: int = 64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and correlated inputs before and after some disturbance."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, k, generator=generator) @ torch.randn(k, k, generator=generator)
    y = x + 0.3 * torch.randn(tokens, k, generator=generator)
    return torch.randn(n, k, generator=generator), x, y


def output_error(w: Tensor, x: Tensor, y: Tensor, codes: Tensor, scale: Tensor, damping: float) -> Tensor:
    """The sum in gptq.py's docstring, from its definition, by row."""
    v = reference.dequantize_weight(codes, scale).double()
    outputs = x.double() @ w.double().T - y.double() @ v.T
    return outputs.square().sum(0) + damping * (w.double() - v).square().sum(1)


SCALES = {"row": {"per_row": True}, "tensor": {"per_row": False}, "groups": {"per_row": False, "group_size": 32}}
scales = pytest.mark.parametrize("options", SCALES.values(), ids=SCALES)
BINARY: dict[str, dict[str, Any]] = {
    "binary tensor": {"weights": "binary"},
    "binary row": {"weights": "binary", "per_row": True, "centered": False},
    "binary groups": {"weights": "binary", "group_size": 32, "centered": False},
    "binary groups, centered": {"weights": "binary", "group_size": 32},
}
ALL = SCALES | BINARY


@pytest.mark.parametrize("options", ALL.values(), ids=ALL)
@pytest.mark.parametrize(("n", "k", "tokens"), [(8, 24, 64), (5, 200, 40), (3, 130, 400), (1, 1, 4), (24, 4, 1)])
def test_outputs_are_never_further_off_than_with_plain_rounding(
    n: int, k: int, tokens: int, options: dict[str, Any]
) -> None:
    for seed in range(2 if k > 4 else 30):  # with few columns plain rounding now and then wins by luck
        w, x, y = layer(n, k, tokens, seed)
        w[0] *= 10  # a row that spoils the scale of all
        h, c = y.T @ y, y.T @ x
        spec = QuantSpec(**options)
        codes, scale = gptq.round_matrix(w, h, c, spec)
        plain_codes, plain_scale = quantize_matrix(w, spec)
        assert codes.dtype == torch.int8
        assert (scale.shape, scale.dtype) == (plain_scale.shape, plain_scale.dtype)
        assert bool((scale > 0).all())
        assert spec.weights == "ternary" or bool(codes.all())
        damping = gptq.DAMPING * h.diagonal().mean().item()
        ours = output_error(w, x, y, codes, scale, damping)
        plain = output_error(w, x, y, plain_codes, plain_scale, damping)
        if scale.numel() == 1:
            ours, plain = ours.sum(), plain.sum()
        assert bool((ours <= plain * (1 + 1e-4)).all())  # float32 sums
        if tokens > k > 1:
            assert ours.sum() < 0.7 * plain.sum()


def test_groups_fit_better_than_rows() -> None:
    w, x, y = layer(16, 192, 600)
    w *= (torch.arange(192) // 32 + 1.0) ** 2  # features whose sizes differ
    damping = gptq.DAMPING * (y.T @ y).diagonal().mean().item()
    sums = {
        name: output_error(w, x, y, *gptq.round_matrix(w, y.T @ y, y.T @ x, QuantSpec(**options)), damping).sum()
        for name, options in SCALES.items()
    }
    assert sums["groups"] < 0.9 * sums["row"] < sums["tensor"]


@scales
def test_a_ternary_matrix_comes_back_as_it_was(options: dict[str, Any]) -> None:
    codes = torch.randint(-1, 2, (12, 150))
    codes[3] = 0
    _, wanted = reference.quantize_weight(torch.rand(12, 150) + 0.1, **options)
    _, x, _ = layer(1, 150, 100)
    weight = reference.dequantize_weight(codes.to(torch.int8), wanted)
    found, scale = gptq.round_matrix(weight, x.T @ x, x.T @ x, QuantSpec(**options))
    assert torch.equal(found, codes.to(torch.int8))
    used = torch.arange(12) != 3 if len(scale) > 1 else torch.tensor([True])
    torch.testing.assert_close(scale[used], wanted[used], rtol=1e-3 if scale.ndim > 1 else 1e-5, atol=0)


def test_scales_of_groups_are_the_best_for_their_codes() -> None:
    w, x, _ = layer(5, 100, 300)
    h = x.T @ x
    h.diagonal().add_(3 * h.diagonal().mean())  # so that all of the best ones are positive
    group_of = torch.randperm(100) // 32
    codes = w.sign()
    scale = torch.ones(5, 4)
    slope = (w - codes * gptq.columns(scale, group_of)) @ h
    for _ in range(60):  # one after the other, until none can become better
        scale = gptq.refit_groups(h, group_of, codes, scale, slope)
    torch.testing.assert_close(slope, (w - codes * gptq.columns(scale, group_of)) @ h, rtol=1e-4, atol=1e-2)
    for row in range(5):
        parts = torch.stack([codes[row] * (group_of == g) for g in range(4)]).double()
        best = torch.linalg.solve(parts @ h.double() @ parts.T, parts @ h.double() @ w[row].double())
        torch.testing.assert_close(scale[row].double(), best, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows", [5, 1], ids=["row", "tensor"])
def test_a_refitted_scale_is_the_best_for_its_codes_and_moves_the_slope(rows: int) -> None:
    w, x, _ = layer(5, 60, 300)
    h, codes, scale = x.T @ x, w.sign(), torch.full((rows,), 0.3)
    slope = (w - codes * scale[:, None]) @ h
    scale = gptq.refit(w, w @ h, codes, scale, slope)
    torch.testing.assert_close(slope, (w - codes * scale[:, None]) @ h, rtol=1e-3, atol=1e-4 * float(h.abs().max()))
    best = torch.stack([(w @ h * codes).sum(1), (codes @ h * codes).sum(1)])
    best = best if rows > 1 else best.sum(1, keepdim=True)
    torch.testing.assert_close(scale, best[0] / best[1], rtol=1e-4, atol=0)


def test_columns_and_layers_without_input_are_rounded_by_their_weights() -> None:
    w, x, y = layer(8, 32)
    x[:, 5] = y[:, 5] = 0
    codes, scale = gptq.round_matrix(w, y.T @ y, y.T @ x, QuantSpec(per_row=True))
    size = (w[:, 5] / scale).abs()
    clear = (size < 0.45) | (size > 0.55)  # the scale was refitted after the codes
    assert int(clear.sum()) > 5
    assert torch.equal(codes[clear, 5].float(), (w[:, 5] / scale).round().clamp(-1, 1)[clear])
    codes, scale = gptq.round_matrix(w, torch.zeros(32, 32), torch.zeros(32, 32), QuantSpec(per_row=True))
    torch.testing.assert_close(scale, gptq.first_scale(w, torch.ones(32), True))
    assert torch.equal(codes.float(), (w / scale[:, None]).round().clamp(-1, 1))


@pytest.mark.parametrize("per_row", [True, False], ids=["per_row", "per_tensor"])
def test_the_first_scale_is_the_best_for_its_codes(per_row: bool) -> None:
    w, d = torch.randn(4, 90), torch.rand(90) + 0.1
    w[2] = 0
    scale = gptq.first_scale(w, d, per_row)
    codes = (w / scale[:, None]).round().clamp(-1, 1)
    fit, mass = d * w * codes, d * codes * codes
    best = fit.sum(1) / mass.sum(1) if per_row else (fit.sum() / mass.sum()).reshape(1)
    torch.testing.assert_close(scale, best.nan_to_num(reference.EPS))


NATIVE = pytest.param(True, marks=pytest.mark.skipif(not on_native(torch.zeros(1)), reason="no native library"))


@pytest.mark.parametrize("native", [NATIVE, False], ids=["native", "torch"])
def test_codes_equal_those_of_a_slow_gptq_and_a_slow_descent(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "on_native", lambda part: native)
    w, x, _ = layer(6, 150, 300)  # more columns than are propagated at once
    h = x.T @ x
    h.diagonal().add_(0.01 * h.diagonal().mean())
    scale = gptq.first_scale(w, h.diagonal(), True)
    exact, free, slow = h.double().numpy(), w.double().numpy().copy(), np.zeros((6, 150))
    s = scale.double().numpy()
    for j in range(150):  # arXiv 2210.17323, eq. 2: fix one weight, move its error to the free ones
        inverse = np.linalg.inv(exact[j:, j:])
        slow[:, j] = np.clip(np.round(free[:, j] / s), -1, 1)
        free[:, j:] -= np.outer((free[:, j] - slow[:, j] * s) / inverse[0, 0], inverse[0])
    codes = gptq.gptq(w, gptq.inverse_factor(h), gptq.columns(scale, None))
    assert np.array_equal(codes.numpy(), slow)

    for j in range(150):
        tried = []
        for code in (-1, 0, 1):
            slow[:, j] = code
            e = w.double().numpy() - slow * s[:, None]
            tried.append(((e @ exact) * e).sum(1))
        slow[:, j] = np.argmin(tried, axis=0) - 1
    columns = gptq.columns(scale, None)
    slope = (w - codes * columns) @ h
    gptq.sweep(h, codes, columns, slope)
    assert np.array_equal(codes.numpy(), slow)
    torch.testing.assert_close(slope, (w - codes * columns) @ h, rtol=1e-4, atol=1e-4 * float(h.abs().max()))


@pytest.mark.skipif(not on_native(torch.zeros(1)), reason="no native library")
@pytest.mark.parametrize("binary", [False, True], ids=["ternary", "binary"])
@pytest.mark.parametrize("by", ["row", "column", "tensor"])
@pytest.mark.parametrize(("n", "j"), [(1, 1), (3, 5), (70, 128), (257, 40)])
def test_native_codes_of_a_block_are_the_definitions(
    n: int, j: int, by: str, binary: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few integers and powers of two, so that no operation rounds and any order of them gives the same."""
    generator = torch.Generator().manual_seed(n + j)

    def integers(low: int, *shape: int) -> Tensor:
        return torch.randint(low, 4, shape, generator=generator).float()

    corner = (integers(-3, j, j) * (torch.rand(j, j, generator=generator) < 1 / 64)).fill_diagonal_(1)
    scale = {"row": 2.0 ** integers(-2, n, 1), "column": 2.0 ** integers(-2, n, j), "tensor": torch.full((1, 1), 0.5)}[
        by
    ]
    whole, before = integers(-3, n, j + 7), integers(-1, n, j + 3).clamp(max=1)
    results: dict[tuple[bool, Any], tuple[Tensor, ...]] = {}
    for native in (True, False):
        monkeypatch.setattr(gptq, "on_native", lambda part, native=native: native)
        for step in (gptq.feed, gptq.descend):
            codes = before.clone()
            moved = step(whole.clone()[:, 4 : j + 4], corner, scale.expand(n, j), codes[:, 1 : j + 1], binary)
            assert torch.equal(codes[:, [0, -2, -1]], before[:, [0, -2, -1]])
            results[native, step] = codes, moved
    for step in (gptq.feed, gptq.descend):
        for ours, wanted in zip(results[True, step], results[False, step], strict=True):
            assert torch.equal(ours, wanted)


def test_what_is_no_block_of_columns_is_refused() -> None:
    part, corner, scale = torch.zeros(4, 6), torch.eye(6), torch.ones(4, 6)
    with pytest.raises(ValueError, match="shapes must fit"):
        choose(part, torch.eye(5), scale, torch.zeros(4, 6), False, False)
    with pytest.raises(ValueError, match="contiguous"):
        choose(torch.zeros(6, 4).T, corner, scale, torch.zeros(4, 6), False, False)
    with pytest.raises(ValueError, match="float32"):
        choose(part, corner, scale.double(), torch.zeros(4, 6), False, False)


def test_documents_of_a_jsonl_file_follow_each_other_behind_the_end_of_text_token(text: Path, tmp_path: Path) -> None:
    lines = text.read_text().splitlines()[:40]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tokenizer = build_tokenizer()
    (tmp_path / "joined.txt").write_text(tokenizer.eos_token.join(lines))
    (tmp_path / "one.txt").write_text("\n".join(lines))

    def read(name: str) -> Tensor:
        return torch.cat(read_text(tmp_path / name, tokenizer, 4, 16, 0))

    assert torch.equal(read("own.jsonl"), read("joined.txt"))
    assert not torch.equal(read("own.jsonl"), read("one.txt"))


def perplexity(model: PreTrainedModel, texts: Tensor) -> float:
    with torch.no_grad():
        losses = [F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:]).item() for ids in texts]
    return math.exp(sum(losses) / len(losses))


SERVED: dict[str, dict[str, Any]] = {
    "per_row": {"per_row": True},
    "per_tensor": {"per_row": False},
    "rotated": {"per_row": True, "hadamard": 8, "hadamard_signs": True, "signs_seed": 5},
}


@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED)
@pytest.mark.parametrize("build", [lambda: llama(vocab_size=257, tie_word_embeddings=True), neox_257, opt])
def test_scores_are_those_of_the_whole_model_as_it_is_served(
    build: Callable[[], PreTrainedModel], options: dict[str, Any], text: Path, tmp_path: Path
) -> None:
    folder, per_row = checkpoint(build(), tmp_path / "float"), options["per_row"]
    result = calibrate(FolderSource(folder, **options), text, tmp_path / "store", **OPTIONS)
    _, held_out = read_text(text, build_tokenizer(), OPTIONS["samples"], OPTIONS["length"], 0)
    assert result.tokens == 2 * 15
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert result.perplexity["float"] == pytest.approx(perplexity(model, held_out), rel=1e-5)
    assert result.bits_per_byte["float"] == pytest.approx(math.log2(result.perplexity["float"]))  # a byte is a token
    bitnet.replace_linear(model, **options)
    assert result.perplexity["plain"] == pytest.approx(perplexity(model, held_out), rel=1e-4)
    codes = calibrated(tmp_path / "store")
    rows = {row.name: row for row in result.layers}
    for name, module in list(model.named_modules()):
        if isinstance(module, BitLinear):
            assert bool(rows[name].reason) == (name not in codes)
            if name in codes:
                assert rows[name].calibrated > rows[name].plain + 1
                ternary, scale = codes[name]()
                assert scale.shape == (module.out_features if per_row else 1,)
                PackedBitLinear.from_bit_linear(module, layout.pack_ternary(ternary), scale)
    assert len(codes) == len(rows) - (2 if isinstance(model, OPTForCausalLM) else 0)  # project_in and project_out
    assert result.perplexity["calibrated"] == pytest.approx(perplexity(model, held_out), rel=1e-4)
    assert str(result).count("\n") == len(rows) + 4


def test_what_writes_behind_a_vision_tower_is_calibrated_if_the_tower_stays_float(text: Path, tmp_path: Path) -> None:
    tower = CLIPVisionConfig(**VISION | {"num_hidden_layers": 2}, patch_size=4)
    config = LlavaConfig(text_config=llama(vocab_size=257).config, vision_config=tower, image_token_index=256)
    folder = checkpoint(randomize(LlavaForConditionalGeneration(config)), tmp_path / "float")
    with pytest.raises(ValueError, match=r"skip='.*vision_tower.*' keeps the layers of the first float") as refused:
        calibrate(FolderSource(folder), text, tmp_path / "store", **OPTIONS)
    options: dict[str, Any] = {"per_row": True, "skip": re.findall(r"skip='(.*?)'", str(refused.value))}
    result = calibrate(FolderSource(folder, **options), text, tmp_path / "store", **OPTIONS)
    _, held_out = read_text(text, build_tokenizer(), OPTIONS["samples"], OPTIONS["length"], 0)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert result.perplexity["float"] == pytest.approx(perplexity(model, held_out), rel=1e-5)
    bitnet.replace_linear(model, **options)
    assert result.perplexity["plain"] == pytest.approx(perplexity(model, held_out), rel=1e-4)


ENCODER: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
ENCODER |= {"vocab_size": 260, "max_position_embeddings": 64}


def bert() -> PreTrainedModel:
    return randomize(BertModel(BertConfig(**ENCODER)))


def classifier() -> PreTrainedModel:
    return randomize(BertForSequenceClassification(BertConfig(**ENCODER)))


def deberta() -> PreTrainedModel:
    """Its encoder reads a table of relative positions without calling it."""
    options = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
    return randomize(DebertaV2Model(DebertaV2Config(**ENCODER, **options)))


def qwen3_body() -> PreTrainedModel:
    return randomize(Qwen3Model(Qwen3Config(**ENCODER, num_key_value_heads=2, head_dim=8)))


def albert() -> PreTrainedModel:
    """One block, called twice."""
    return AlbertModel(AlbertConfig(**ENCODER, embedding_size=8))


def closing_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, between [CLS] (257) and [SEP] (258)."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def test_encoders_see_stretches_between_their_special_tokens(text: Path) -> None:
    plain, _ = read_text(text, build_tokenizer(), 4, 16, 0)
    closed, held_out = read_text(text, closing_tokenizer(), 4, 18, 0, closed=True)
    assert torch.equal(closed[:, 1:-1], plain)
    assert bool((closed[:, 0] == 257).all() & (closed[:, -1] == 258).all())
    assert held_out.shape == (1, 18)
    opened, _ = read_text(text, closing_tokenizer(), 4, 17, 0)  # a model that writes goes on
    assert torch.equal(opened, closed[:, :-1])


@pytest.mark.parametrize("build", [bert, classifier, deberta, qwen3_body])
def test_encoders_are_compared_with_the_float_model_as_they_are_served(
    build: Callable[[], PreTrainedModel], text: Path, tmp_path: Path
) -> None:
    folder = checkpoint(build(), tmp_path / "float")
    closing_tokenizer().save_pretrained(folder)
    result = calibrate(FolderSource(folder, per_row=True), text, tmp_path / "store", **OPTIONS)
    assert (result.bits_per_byte, result.perplexity, result.tokens) == ({}, {}, 2 * 16)
    _, held_out = read_text(text, closing_tokenizer(), OPTIONS["samples"], OPTIONS["length"], 0, closed=True)
    teacher, student = (AutoModel.from_pretrained(folder) for _ in range(2))
    bitnet.replace_linear(student, per_row=True)

    @torch.no_grad()
    def similarity() -> float:
        outputs = [model.eval()(held_out).last_hidden_state for model in (teacher, student)]
        return F.cosine_similarity(*outputs, dim=-1).mean().item()

    assert result.similarity["float"] == pytest.approx(1)
    assert result.similarity["plain"] == pytest.approx(similarity(), rel=1e-5)
    body = type(student).base_model_prefix if build is classifier else ""
    for name, codes in calibrated(tmp_path / "store").items():
        layer = student.get_submodule(name.removeprefix(f"{body}."))
        assert isinstance(layer, BitLinear)
        ternary, scale = codes()
        PackedBitLinear.from_bit_linear(layer, layout.pack_ternary(ternary), scale)
    assert result.similarity["calibrated"] == pytest.approx(similarity(), rel=1e-5)
    assert result.similarity["calibrated"] > result.similarity["plain"]
    assert "calibrated  0.9" in str(result)


def contents(store: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in store.iterdir()}


def test_a_killed_run_goes_on_to_the_same_bytes(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = calibrate(FolderSource(folder), text, tmp_path / "whole", **OPTIONS)
    store = tmp_path / "store"
    with monkeypatch.context() as patched:
        replace = os.replace

        def killed(scratch: Path, file: Path) -> None:
            if file.name == "block-00001.safetensors":
                raise KeyboardInterrupt
            replace(scratch, file)

        patched.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            calibrate(FolderSource(folder), text, store, **OPTIONS)
    assert sorted(contents(store)) == ["block-00000.safetensors", "block-00001.safetensors.part", "calibration.json"]
    with pytest.raises(ValueError, match="1 of 2 calibrated blocks"):
        calibrated(store)
    with pytest.raises(ValueError, match="not empty"):
        calibrate(FolderSource(folder), text, store, **OPTIONS)
    for options in ({"seed": 1}, {"samples": 7}):
        with pytest.raises(ValueError, match="another checkpoint, text, or options"):
            calibrate(FolderSource(folder), text, store, resume=True, **OPTIONS | options)
    with pytest.raises(ValueError, match="another checkpoint, text, or options"):
        calibrate(FolderSource(folder, per_row=True), text, store, resume=True, **OPTIONS)
    finished = (store / "block-00000.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patched:
        solved = []
        solve = gptq.round_matrix
        patched.setattr(
            "bitnet.convert.calibration.calibrate.round_matrix", lambda *args: solved.append(args) or solve(*args)
        )
        resumed = calibrate(FolderSource(folder), text, store, resume=True, **OPTIONS)
        assert len(solved) == 7  # the second block's layers
    assert (store / "block-00000.safetensors").stat().st_mtime_ns == finished
    assert resumed == whole
    assert contents(store) == contents(tmp_path / "whole")


class Watched(FolderSource):
    """Knows which of the tensors it handed out are still in memory."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.alive: set[str] = set()
        self.together: list[set[str]] = []

    def tensor(self, key: str) -> Tensor:
        array = super().tensor(key).numpy().copy()
        self.alive.add(key)
        self.together.append(set(self.alive))
        weakref.finalize(array, self.alive.discard, key)
        return torch.from_numpy(array)


def test_no_more_than_one_block_is_in_memory(folder: Path, text: Path, tmp_path: Path) -> None:
    source = Watched(folder)
    calibrate(source, text, tmp_path / "store", **OPTIONS)
    assert not source.alive
    for keys in source.together:
        where = {key.split(".")[2] if key.startswith("model.layers.") else "outside" for key in keys}
        assert len(where) == 1 or keys == {"model.embed_tokens.weight"} | {k for k in keys if ".layers.0." in k}
    read = Counter(
        key for keys, before in zip(source.together, [set(), *source.together], strict=False) for key in keys - before
    )
    assert read["model.layers.1.mlp.up_proj.weight"] == 1


def low_bit(folder: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(folder)
    bitnet.replace_linear(model)
    return bitnet.save(model, tmp_path / "low_bit")


def t5() -> PreTrainedModel:
    return T5ForConditionalGeneration(T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=257))


VISION = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8}


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=257))


def overflowing(factor: float, *names: str) -> PreTrainedModel:
    model = llama(vocab_size=257)
    for name in names:
        model.get_submodule(f"model.layers.1.mlp.{name}").weight.data *= factor
    return model


def damaged() -> PreTrainedModel:
    model = llama(vocab_size=257)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (t5, "T5ForConditionalGeneration does not read one text alone"),
        (lambda: ViTModel(ViTConfig(**VISION)), "ViTModel does not read one text alone"),
        (albert, "AlbertModel cannot be run one by one .they are not called one after the other"),
        (gpt2, r"transformer.h.0.attn.c_attn is no nn.Linear .*; keep such layers float \(skip='c_attn'\)"),
        (mixtral, r"layers.0.mlp.experts is no nn.Linear .*; keep such layers float \(skip='experts'\)"),
        (lambda: overflowing(1e38, "up_proj"), r"model.layers.1.mlp.up_proj: its outputs overflow float32"),
        (lambda: overflowing(1e15, "gate_proj", "up_proj"), r"layers.1.mlp.down_proj: its inputs are NaN or too large"),
        (damaged, r"model.layers.1.mlp.up_proj.weight holds NaN or Inf"),
    ],
    ids=["t5", "vit", "albert", "gpt2", "mixtral", "outputs", "inputs", "nan"],
)
def test_models_that_cannot_be_calibrated_are_refused(
    build: Callable[[], PreTrainedModel], message: str, text: Path, tmp_path: Path
) -> None:
    folder = checkpoint(build(), tmp_path / "float")
    with pytest.raises(ValueError, match=message):
        calibrate(FolderSource(folder), text, tmp_path / "store", **OPTIONS)


def test_experts_may_stay_float_while_the_rest_is_calibrated(text: Path, tmp_path: Path) -> None:
    """Files have them one by one, and the block that is in memory has them in stacks."""
    folder = checkpoint(mixtral(), tmp_path / "float")
    source = FolderSource(folder, skip="experts")
    result = calibrate(source, text, tmp_path / "store", **OPTIONS)
    assert {row.name.rpartition(".")[2] for row in result.layers} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    for row in result.layers:
        assert row.calibrated >= row.plain, row.name


def test_modules_without_values_are_left_alone(folder: Path) -> None:
    """Some are of every model in the process, as OpenAI GPT's activations are."""
    model = BlockModel(FolderSource(folder), torch.device("cpu")).model
    assert not model.model.layers[0].mlp.act_fn._forward_pre_hooks
    assert model.model.layers[0].mlp.up_proj._forward_pre_hooks


def test_inputs_that_make_no_sense_are_refused(folder: Path, text: Path, tmp_path: Path) -> None:
    def refuse(message: str, source: FolderSource, file: Path = text, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            calibrate(source, file, tmp_path / "store", **OPTIONS | options)
        assert not (tmp_path / "store").exists()

    source = FolderSource(folder)
    (tmp_path / "empty").write_text("")
    (tmp_path / "latin").write_bytes("é".encode("latin-1") * 1000)
    refuse("has 0 tokens", source, tmp_path / "empty")
    refuse("not UTF-8", source, tmp_path / "latin")
    refuse(
        f"has {len(TEXT):,} tokens, but 900 samples of 16 and a quarter more, held out, need 18,000",
        source,
        samples=900,
    )
    refuse("samples must be at least 1", source, samples=0)
    refuse("length=4096 is more than the 2048 positions", source, length=4096)
    with pytest.raises(ValueError, match="length=2 leaves no room for text"):
        read_text(text, closing_tokenizer(), 4, 2, 0, closed=True)
    refuse("rms_norm=True adds norms", FolderSource(folder, rms_norm=True))
    refuse("is low-bit already", FolderSource(low_bit(folder, tmp_path)))


def test_latent_weights_made_from_codes_round_back_to_them() -> None:
    for n, k in ((8, 32), (5, 200)):
        w, x, y = layer(n, k)
        w[0] = 0.001 * w[0]
        w[1, 3] = 40.0
        w[2, :32] = w[2, :32].abs() + 1
        for options in ALL.values():
            spec = QuantSpec(**options)
            codes, scale = gptq.round_matrix(w, y.T @ y, y.T @ x, spec)
            for like in (None, w):
                latent = latent_weight(codes, scale, like, spec)
                again, scale_again = quantize_matrix(latent, spec)
                assert torch.equal(again, codes)
                exact = {"rtol": 0, "atol": 0} if scale.ndim > 1 else {}
                torch.testing.assert_close(scale_again, scale, **exact)


@pytest.mark.parametrize("options", BINARY.values(), ids=BINARY)
def test_centered_binary_codes_are_never_all_positive(options: dict[str, Any]) -> None:
    """No float weights round to that: one is above their mean only if another is not."""
    w, x, y = layer(4, 64, 200)
    w = w.abs() + 1
    codes, _ = gptq.round_matrix(w, y.T @ y, y.T @ x, QuantSpec(**options))
    rows = codes.flatten()[None] if options == BINARY["binary tensor"] else codes
    assert bool((reference.grouped(rows, 32 if "group_size" in options else rows.shape[1]) == 1).all(-1).any()) == (
        "centered" in options
    )


def test_binary_latent_weights_keep_their_order_and_sizes() -> None:
    w, x, y = layer(8, 64)
    spec = QuantSpec("binary", group_size=32, centered=False)
    codes, scale = gptq.round_matrix(w, y.T @ y, y.T @ x, spec)
    latent = latent_weight(codes, scale, w, spec)
    kept = w.sign() == codes
    assert 0.5 < kept.float().mean() < 1
    assert torch.corrcoef(torch.stack([latent[kept], w[kept]]))[0, 1] > 0.9


def test_latent_weights_keep_their_order_within_a_bin() -> None:
    w, x, y = layer(8, 32)
    codes, scale = gptq.round_matrix(w, y.T @ y, y.T @ x, QuantSpec(per_row=True))
    latent = latent_weight(codes, scale, w)
    threshold = 0.5 * scale[:, None]
    for row in range(8):
        for code in (-1, 0, 1):
            own = codes[row] == code
            order = w[row, own].argsort()
            assert bool((latent[row, own][order].diff() >= -1e-6).all())
    inside = (codes == 0) & (w.abs() < 0.9 * threshold)
    assert torch.equal(latent[inside], w[inside])


def test_a_row_of_zeros_stays_one() -> None:
    codes = torch.tensor([[0, 0, 0], [1, 0, -1]], dtype=torch.int8)
    weight = latent_weight(codes, torch.tensor([0.5, 2.0]))
    assert torch.equal(weight, torch.tensor([[0, 0, 0], [3.0, 0, -3.0]]))


# In a conversion


CONVERTED = SCALES | {"binary groups": BINARY["binary groups"]}
CONVERTED["rotated"] = {"per_row": True, "hadamard": 8, "hadamard_signs": True, "signs_seed": 5}


@pytest.mark.parametrize("options", CONVERTED.values(), ids=CONVERTED)
def test_a_conversion_writes_what_was_calibrated(
    folder: Path, text: Path, options: dict[str, Any], tmp_path: Path
) -> None:
    shape = options
    result = calibrate(FolderSource(folder, **shape), text, tmp_path / "store", **OPTIONS)
    assert all(row.calibrated > row.plain for row in result.layers)
    expected = {name: read() for name, read in calibrated(tmp_path / "store").items()}
    options = {"calibrate": text, "console": Console(quiet=True), **shape, **OPTIONS}
    models = {}
    packed, others = (["binary"], ["latent"]) if "weights" in shape else (["hub", "base3"], ["latent", "bf16"])
    for to in (*packed, *others):
        models[to] = bitnet.load(convert_checkpoint(folder, tmp_path / to, to, **options))
    for name, (codes, scale) in expected.items():
        for to in packed:
            layer = models[to].get_submodule(name)
            assert torch.equal(layer.codes(), codes)
            assert torch.equal(layer.weight_scale, scale)
        latent = models["latent"].get_submodule(name)
        again, scale_again = quantize_matrix(latent.weight, latent.spec)
        assert torch.equal(again, codes)
        torch.testing.assert_close(scale_again, scale)
        for to in {"bf16"}.intersection(others):
            weight = models[to].get_submodule(name).weight
            floats = reference.dequantize_weight(codes, scale)
            if "hadamard" in shape:
                assert torch.equal(layer.signs, latent.signs)
                floats = reference.hadamard(floats, shape["hadamard"]) * latent.signs
            assert torch.equal(weight, floats.bfloat16())
    assert len(expected) == 14
    assert {path.name for path in tmp_path.iterdir()} == {"store", *packed, *others}


def test_a_conversion_that_was_killed_in_calibration_goes_on_there(
    folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = tmp_path / "text"
    mine.write_bytes(text.read_bytes())
    options = {"calibrate": mine, "console": Console(quiet=True), **OPTIONS}
    whole = convert_checkpoint(folder, tmp_path / "whole", **options)
    solve, solved = gptq.round_matrix, []

    def failing(*args: Any) -> Any:
        solved.append(args)
        if len(solved) == 9:
            raise KeyboardInterrupt
        return solve(*args)

    monkeypatch.setattr("bitnet.convert.calibration.calibrate.round_matrix", failing)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(folder, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="or with other options"):
        convert_checkpoint(folder, tmp_path / "out", **options | {"seed": 1, "resume": True})
    mine.write_bytes(text.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"with 1 of 2 blocks, was made from another .*; what is finished is kept in"):
        convert_checkpoint(folder, tmp_path / "out", **options, resume=True)
    mine.write_bytes(b"short")
    with pytest.raises(ValueError, match=r"give more text, .*; what is finished is kept in"):
        convert_checkpoint(folder, tmp_path / "out", **options, resume=True)
    mine.write_bytes(text.read_bytes())
    solved.clear()
    monkeypatch.setattr(
        "bitnet.convert.calibration.calibrate.round_matrix", lambda *args: solved.append(args) or solve(*args)
    )
    convert_checkpoint(folder, tmp_path / "out", **options, resume=True)
    assert len(solved) == 7  # the second block's layers; the first block was finished
    assert contents(tmp_path / "out") == contents(whole)


def test_the_command_calibrates_per_row(folder: Path, text: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["convert", str(folder), str(tmp_path / "out"), "--to", "hub", "--calibrate", str(text)]
    numbers = [item for name, value in OPTIONS.items() for item in (f"--{name}", str(value))]
    assert cli.main([*arguments, *numbers]) == 0
    told = capsys.readouterr().err
    assert "output SNR on the calibration text, dB" in told
    assert "rounded, not trained" not in told
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["bitnet_toolkit"]["spec"]["per_row"]
