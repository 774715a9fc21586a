"""8-bit and 4-bit weights: the output heads that pack(head=...) makes, and the embeddings tied to them."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from oracle import DTYPES, grid
from safetensors.torch import load_file
from shapes import SHAPES
from tiny import IDS, Mlp, llama, neox
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM, PreTrainedModel

import bitnet
from bitnet import BitLinear, PackedBitLinear
from bitnet.convert.conversion import heads
from bitnet.convert.swap import pack as swap_pack
from bitnet.kernels import backends, layout, ops, reference
from bitnet.kernels.cpu import library as cpu_library
from bitnet.kernels.cpu import linear as cpu_linear
from bitnet.packed import PackedEmbedding
from bitnet.packing import quantize_matrix

BACKENDS = [row.name for row in backends.backends("cpu") if row.ready and "binary" not in row.name]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_head = pytest.mark.parametrize("head", ["int8", "int4", "ternary"])


def int8_layer(codes: Tensor, scale: Tensor, bias: Tensor | None, backend: str, bits: int = 8) -> PackedBitLinear:
    n, k = codes.shape
    options: dict[str, Any] = {"weights": "int8", "per_row": len(scale) > 1, "activation_bits": bits}
    layer = PackedBitLinear(k, n, bias is not None, backend=backend, **options)
    layer.weight, layer.weight_scale, layer.bias = codes, scale, bias
    return layer


def with_head(model: PreTrainedModel, head: str = "int8") -> PreTrainedModel:
    bitnet.replace_linear(model)
    bitnet.pack(model, head=head)
    return model


def rounded(weight: Tensor, head: str) -> Tensor:
    """codes * scale of a head."""
    codes, scale = oracle.weight(weight, head, per_row=True) if head != "int4" else oracle.q4_0(weight)
    if head != "int4":
        return (torch.tensor(codes) * torch.tensor(scale)[:, None]).float()
    spread = np.repeat(scale.astype(np.float32), 32, axis=1)[:, : codes.shape[1]]
    return torch.from_numpy(codes.astype(np.float32) * spread)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
def test_codes_and_scale_are_the_oracles(per_row: bool) -> None:
    for n, k in [(1, 1), (5, 7), (64, 33)]:
        w = torch.randn(n, k)
        w[0] = 0  # a row of zeros: codes 0, a finite scale
        codes, scale = ops.quantize_weight(w, kind="int8", per_row=per_row)
        expected_codes, expected_scale = oracle.weight(w, "int8", per_row)
        assert codes.dtype == torch.int8
        assert codes.tolist() == expected_codes.tolist()
        assert scale.tolist() == expected_scale.tolist()


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bits", [8, 4], ids=["a8", "a4"])
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (1, 257, 128), (7, 100, 1025)])
def test_output_has_the_oracles_bits(backend: str, dtype: torch.dtype, bits: int, m: int, n: int, k: int) -> None:
    x, codes = grid(m, k).to(dtype), torch.randint(-128, 128, (n, k), dtype=torch.int8)
    for scale, bias in ((torch.rand(1) + 0.1, None), (torch.rand(n) + 0.1, torch.randn(n).to(dtype))):
        y = int8_layer(codes, scale, bias, backend, bits)(x)
        assert y.dtype == dtype
        assert torch.equal(y, oracle.linear(x, codes.numpy().astype(np.int64), scale.numpy(), bias, bits))


@each_backend
@pytest.mark.parametrize("m", [1, 2, 9])
@pytest.mark.parametrize("k", [4096, 16384, 65536])
def test_accumulators_are_exact_at_the_extremes(backend: str, m: int, k: int) -> None:
    """Fails if two products of 128 * 128 saturate 16 bits, or an unsigned offset overflows 32."""
    codes = torch.full((3, k), -128, dtype=torch.int8)
    codes[1] = 127
    codes[2, ::2] = 0
    for value in (-1.0, 1.0):
        x = torch.full((m, k), value)
        y = int8_layer(codes, torch.ones(1), None, backend)(x)
        assert torch.equal(y, oracle.linear(x, codes.numpy().astype(np.int64), np.ones(1, np.float32), None, 8))


@pytest.mark.skipif(isinstance(cpu_library.load(), str), reason="there is no native library")
@pytest.mark.parametrize("m", [1, 2, 8, 13])
@pytest.mark.parametrize("lowest", [False, True])
def test_products_of_the_lowest_codes_are_exact(lowest: bool, m: int) -> None:
    """Fails if -128, which has no opposite, is multiplied by way of signs; tokens given as floats have no such code."""
    codes = torch.randint(-128, 128, (67, 130), dtype=torch.int8)
    codes[:9], q = -128, torch.randint(-127, 128, (m, 130), dtype=torch.int8)
    if lowest:
        q[m - 1] = -128
    for isa in cpu_library.isas(cpu_library.EIGHT_BITS):
        y = cpu_linear.int_matmul(q, cpu_linear.prepack_codes(codes, True), 67, cpu_library.EIGHT_BITS, isa)
        assert torch.equal(y, (q.long() @ codes.long().T).int())


# 4-bit weights


def int4_layer(
    codes: Tensor, scale: Tensor, bias: Tensor | None, backend: str, bits: int | None = 8
) -> PackedBitLinear:
    n, k = codes.shape
    layer = PackedBitLinear(
        k, n, bias is not None, backend=backend, weights="int4", group_size=32, activation_bits=bits
    )
    layer.weight, layer.weight_scale, layer.bias = layout.pack_int4(codes), scale, bias
    return layer


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 7), (3, 32), (64, 33), (7, 130)])
def test_4_bit_codes_and_scales_are_the_oracles(n: int, k: int) -> None:
    """Fails for another rounding of ties, a scale without its sign, or the last of two largest values."""
    w = torch.randn(n, k)
    w[0] = 0  # a scale of 0
    if n > 2 and k > 6:
        w[1, 2], w[1, 5] = -9, 9
        w[2] = 0
        w[2, :7] = torch.tensor([-8, 0.5, 1.5, 2.5, -0.5, -1.5, 7.5])  # ties; 7.5 is clamped
        w[3 % n] *= 1e-8  # whose scale is 0 as a float16
    codes, scale = ops.quantize_weight(w, kind="int4", group_size=32)
    expected_codes, expected_scale = oracle.q4_0(w)
    assert (codes.dtype, scale.dtype) == (torch.int8, torch.float16)
    assert codes.tolist() == expected_codes.tolist()
    assert scale.tolist() == expected_scale.tolist()


def test_bad_4_bit_options_are_refused() -> None:
    for group_size in (None, 64):
        with pytest.raises(ValueError, match="4-bit weights have scales of groups of 32: group_size=32, got"):
            BitLinear(32, 4, weights="int4", group_size=group_size)
        with pytest.raises(ValueError, match="kind 'int4' needs group_size=32"):
            ops.quantize_weight(torch.ones(2, 2), kind="int4", group_size=group_size)
    with pytest.raises(ValueError, match="activation_bits=16 is for ternary and binary weights, not for int4 ones"):
        BitLinear(32, 4, weights="int4", group_size=32, activation_bits=16)
    with pytest.raises(ValueError, match="largest value of a group is above 524032"):
        ops.quantize_weight(torch.full((1, 4), 6e5), kind="int4", group_size=32)
    layer = int4_layer(torch.zeros(4, 40).char(), torch.ones(4, 2).half(), None, "auto")
    layer.weight_scale[1, 1] = float("nan")
    with pytest.raises(ValueError, match="weight_scale must be"):
        layer.prepack()


@each_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bits", [8, 4], ids=["a8", "a4"])
@pytest.mark.parametrize(("m", "n", "k"), [*SHAPES, (1, 257, 128), (3, 33, 1100), (17, 35, 2080)])
def test_4_bit_output_has_the_oracles_bits(backend: str, dtype: torch.dtype, bits: int, m: int, n: int, k: int) -> None:
    x, codes = grid(m, k).to(dtype), torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scale = torch.randn(n, -(-k // 32)).half()
    for bias in (None, torch.randn(n).to(dtype)):
        y = int4_layer(codes, scale, bias, backend, bits)(x)
        assert y.dtype == dtype
        assert torch.equal(y, oracle.grouped(x, codes.numpy().astype(np.int64), scale.numpy(), 32, bias, bits))


@each_backend
@pytest.mark.parametrize("m", [1, 3, 17])
def test_4_bit_sums_are_exact_at_the_extremes(backend: str, m: int) -> None:
    """Fails if the sum of a group saturates 16 bits."""
    k = 32_768
    codes = torch.full((3, k), -8, dtype=torch.int8)
    codes[1] = 7
    codes[2, ::2] = 7
    scale = torch.ones(3, k // 32).half()
    for value in (-1.0, 1.0):
        x = torch.full((m, k), value)
        y = int4_layer(codes, scale, None, backend)(x)
        assert torch.equal(y, oracle.grouped(x, codes.numpy().astype(np.int64), scale.numpy(), 32, None, 8))


def test_float_activations_of_4_bit_weights_run_on_torch() -> None:
    codes, scale, x = torch.randint(-8, 8, (5, 40)).char(), torch.rand(5, 2).half(), torch.randn(3, 40)
    layer = int4_layer(codes, scale, None, "auto", None)
    assert torch.equal(layer(x), x @ reference.dequantize_weight(codes, scale).T)
    assert layer.prepack()[1] == "torch"


def test_a_4_bit_layer_goes_through_autograd_export_and_its_state() -> None:
    codes, scale = torch.randint(-8, 8, (6, 70)).char(), torch.randn(6, 3).half()
    layer, x = int4_layer(codes, scale, torch.ones(6), "auto"), torch.randn(3, 70)
    y, watched = layer(x), x.clone().requires_grad_()
    layer(watched).sum().backward()
    weight = reference.dequantize_weight(codes, scale)
    torch.testing.assert_close(watched.grad, weight.sum(0).expand(3, -1))
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), y)
    other = PackedBitLinear(70, 6, weights="int4", group_size=32)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    assert torch.equal(layer.to_linear(torch.float32).weight, weight)


def test_files_hold_the_bytes_of_q4_0(tmp_path: Path) -> None:
    """As llama.cpp's own Python package reads them, in GGUF and in the 4-bit layout."""
    import gguf

    model = with_head(llama(tie_word_embeddings=True, hidden_size=256, intermediate_size=256), "int4")
    bitnet.save(model, tmp_path / "model")
    bitnet.convert_checkpoint(tmp_path / "model", tmp_path / "model.gguf", "gguf-tq2_0", tokenizer=False)
    (tensor,) = [t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors if t.name == "token_embd.weight"]
    assert tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    expected = reference.dequantize_weight(model.lm_head.codes(), model.lm_head.weight_scale)
    assert np.array_equal(values.reshape(expected.shape), expected.numpy())


# Heads of models


@each_head
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_head_and_tied_embedding_hold_the_same_bytes_and_little_is_lost(tied: bool, head: str) -> None:
    model = llama(tie_word_embeddings=tied)
    latent = model.lm_head.weight.detach().clone()
    bitnet.replace_linear(model)
    exact = copy.deepcopy(model)
    bitnet.pack(exact)
    report = bitnet.pack(model, head=head)
    expected, embedding = rounded(latent, head), model.model.embed_tokens
    assert torch.equal(reference.dequantize_weight(model.lm_head.codes(), model.lm_head.weight_scale), expected)
    row = next(row for row in report.rows if row.name == "lm_head")
    lost = f"its weights move by {100 * ((expected - latent).norm() / latent.norm()).item():.2g} % (rms)"
    size = 64 * 16 // (4 if head == "ternary" else 1)  # of 4-bit codes a block is 32 features
    assert (row.action, row.bytes, row.reason) == ("packed" if head == "ternary" else head, size, lost)
    if tied:
        assert embedding.weight is model.lm_head.weight
        assert torch.equal(embedding(IDS), expected[IDS])
    else:
        assert type(embedding) is nn.Embedding
    change = (logits(model) - logits(exact)).norm() / logits(exact).norm()
    assert 0 < change < {"int8": 0.05, "int4": 0.2, "ternary": 1}[head]


@each_head
def test_the_head_of_a_model_that_is_packed_already_can_follow(head: str, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    bitnet.replace_linear(model)
    whole = copy.deepcopy(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path)
    model = bitnet.load(tmp_path)
    bitnet.pack(model, head=head)
    bitnet.pack(whole, head=head)
    assert torch.equal(logits(model), logits(whole))


@each_head
@pytest.mark.parametrize("bits", [2, 1.6])
@pytest.mark.parametrize("shards", [{}, {"max_shard_size": 3000}], ids=["one_file", "sharded"])
@pytest.mark.parametrize("name", ["untied", "tied", "bias", "bf16"])
def test_a_saved_head_comes_back(name: str, shards: dict[str, Any], bits: float, head: str, tmp_path: Path) -> None:
    model = neox() if name == "bias" else llama(tie_word_embeddings=name != "untied")
    with_head(model.to(torch.bfloat16) if name == "bf16" else model, head)
    expected = logits(model)
    bitnet.save(model, tmp_path / "out", weight_bits=bits, **shards)
    for loaded in (bitnet.load(tmp_path / "out"), AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        layer, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
        assert layer.spec.weights == head
        assert layer.weight.dtype == (torch.int8 if head == "int8" else torch.uint8)
        assert layer.weight_scale.dtype == (torch.float16 if head == "int4" else torch.float32)
        assert isinstance(embedding, PackedEmbedding) == (name in ("tied", "bf16"))
        assert not isinstance(embedding, PackedEmbedding) or embedding.weight is layer.weight
        assert torch.equal(logits(loaded), expected)
        bitnet.save(loaded, tmp_path / "again", weight_bits=bits, **shards)
        for file in (tmp_path / "out").glob("*.safetensors"):
            first, again = load_file(file), load_file(tmp_path / "again" / file.name)
            assert first.keys() == again.keys()
            assert all(torch.equal(first[key], again[key]) for key in first)
    linear_class = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["linear_class"]
    assert "pip install bitnet-toolkit" in linear_class, "stock transformers would take it for its own"


@each_head
@pytest.mark.parametrize("to", ["hub", "base3"])
@pytest.mark.parametrize("source", ["float", "packed"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_conversion_writes_the_head_that_packing_makes(
    tied: bool, source: str, to: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "ROWS", 100)  # several blocks
    model = llama(tie_word_embeddings=tied)
    if source == "float":
        model.save_pretrained(tmp_path / "source")
    else:
        bitnet.replace_linear(model)
        bitnet.pack(model)
        bitnet.save(model, tmp_path / "source")
    bitnet.convert_checkpoint(tmp_path / "source", tmp_path / "out", to, head=head, tokenizer=False)
    with_head(model, head) if source == "float" else bitnet.pack(model, head=head)
    bitnet.save(model, tmp_path / "expected", weight_bits=2 if to == "hub" else 1.6)
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "expected"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert torch.equal(logits(bitnet.load(tmp_path / "out")), logits(model))
    with pytest.raises(ValueError, match="that is still float"):
        bitnet.convert_checkpoint(tmp_path / "out", tmp_path / "again", "hub", head=head, tokenizer=False)
    for form in ("bf16", "latent", "mlx", "gguf-tq2_0"):
        with pytest.raises(ValueError, match="head"):
            bitnet.convert_checkpoint(tmp_path / "source", tmp_path / "no", form, head=head, tokenizer=False)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("bits", [2, 1.6])
def test_a_ternary_head_has_scales_of_the_layers_groups(bits: float, tmp_path: Path) -> None:
    """Saved, converted and loaded; fails if the head's and the embedding's bytes are of different layouts."""
    model = llama(tie_word_embeddings=True, hidden_size=48, vocab_size=66)
    model.save_pretrained(tmp_path / "float")
    bitnet.replace_linear(model, group_size=32)
    bitnet.pack(model, head="ternary")
    assert (model.lm_head.spec.group_size, model.lm_head.weight_scale.shape) == (32, (66, 2))
    expected = logits(model)
    bitnet.save(model, tmp_path / "saved", weight_bits=bits)
    to = {2: "hub", 1.6: "base3"}
    options: dict[str, Any] = {"head": "ternary", "tokenizer": False}
    bitnet.convert_checkpoint(tmp_path / "float", tmp_path / "converted", to[bits], group_size=32, **options)
    other = to[2 if bits == 1.6 else 1.6]
    bitnet.convert_checkpoint(tmp_path / "saved", tmp_path / "again", other, tokenizer=False)
    bitnet.convert_checkpoint(tmp_path / "saved", tmp_path / "floats", "bf16", tokenizer=False)
    for name in ("saved", "converted", "again"):
        loaded = bitnet.load(tmp_path / name)
        assert loaded.model.embed_tokens.weight is loaded.lm_head.weight
        assert torch.equal(logits(loaded), expected)
    floats = AutoModelForCausalLM.from_pretrained(tmp_path / "floats")
    rows = reference.dequantize_weight(model.lm_head.codes(), model.lm_head.weight_scale, torch.bfloat16)
    assert torch.equal(floats.lm_head.weight.bfloat16(), rows)


@each_head
def test_generation_and_dtype_changes_work_with_a_tied_head(head: str) -> None:
    model = with_head(llama(tie_word_embeddings=True), head)
    scale = model.lm_head.weight_scale.dtype
    expected = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(copy.deepcopy(model).generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0), expected)
    model.to(torch.bfloat16)
    assert model.model.embed_tokens(IDS).dtype == logits(model).dtype == torch.bfloat16
    assert model.model.embed_tokens.weight_scale.dtype == model.lm_head.weight_scale.dtype == scale


@each_head
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_scaled_embedding_keeps_its_scale(dtype: torch.dtype, head: str, tmp_path: Path) -> None:
    """Gemma 3 multiplies the rows of its embedding, which is tied to the head, by sqrt(width)."""
    sizes = {"hidden_size": 24, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    options = {"head_dim": 4, "vocab_size": 64, "layer_types": ["full_attention"]}
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes, **options)).eval().to(dtype)
    scaled = type(model.model.embed_tokens)
    with_head(model, head)
    embedding = model.model.embed_tokens
    rows = reference.dequantize_weight(embedding.codes(), embedding.weight_scale)[IDS].to(dtype)
    assert torch.equal(embedding(IDS), rows * torch.tensor(24**0.5).to(dtype))
    expected = logits(model)
    bitnet.save(model, tmp_path)
    for loaded in (bitnet.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model)):
        assert loaded.model.embed_tokens.weight is loaded.lm_head.weight
        assert torch.equal(logits(loaded), expected)
        assert torch.equal(loaded.model.embed_tokens(IDS), embedding(IDS))
        bitnet.unpack(loaded)
        assert type(loaded.model.embed_tokens) is scaled
        assert loaded.model.embed_tokens.weight is loaded.lm_head.weight
        assert torch.equal(loaded.model.embed_tokens(IDS), embedding(IDS))
        assert list(loaded.state_dict()) == list(Gemma3ForCausalLM(model.config).state_dict())


@each_head
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_unpack_gives_back_a_float_head_of_codes_times_scale(tied: bool, head: str) -> None:
    model = llama(tie_word_embeddings=tied)
    weight = rounded(model.lm_head.weight, head)
    with_head(model, head)
    bitnet.unpack(model)
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.lm_head.weight, weight)
    assert type(model.model.embed_tokens) is nn.Embedding
    assert (model.model.embed_tokens.weight is model.lm_head.weight) == tied


class Reader(LlamaForCausalLM):
    def scores(self, hidden: Tensor) -> Tensor:
        return hidden @ self.model.embed_tokens.weight.T


def test_a_head_that_cannot_become_int8_is_refused_before_anything_changes() -> None:
    with pytest.raises(ValueError, match="head must be None or one of 'int8', 'int4', 'ternary', got 'int3'"):
        bitnet.pack(llama(), head="int3")
    model = llama()
    bitnet.replace_linear(model)
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"output head, lm_head: .* 1 NaN or Inf"):
        bitnet.pack(model, head="int8")
    plain = Mlp()
    bitnet.replace_linear(plain)
    with pytest.raises(ValueError, match=r"needs a Hugging Face model .* found NoneType; .*weights='int8'"):
        bitnet.pack(plain, head="int8")
    model = llama(tie_word_embeddings=True)
    model.extra = nn.Embedding(64, 16)
    model.extra.weight = model.lm_head.weight
    bitnet.replace_linear(model)
    with pytest.raises(ValueError, match=r"tied to Embedding, Embedding; .* one nn\.Embedding"):
        bitnet.pack(model, head="int8")
    model = Reader(llama(tie_word_embeddings=True).config)
    bitnet.replace_linear(model)
    with pytest.raises(ValueError, match=r"head must stay float: Reader uses lm_head\.weight directly, in scores"):
        bitnet.pack(model, head="int8")
    assert type(plain.up) is type(model.model.layers[0].mlp.up_proj) is BitLinear


@each_head
def test_a_missing_or_wrong_tensor_is_named(head: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    bitnet.save(with_head(llama(tie_word_embeddings=True), head), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = "model.embed_tokens.weight"
    for wrong, message in (
        (None, f"no tensor {key}"),
        (tensors[key].float(), f"{key} is F32"),
        (tensors[key][1:], f"{key} is .8 .{len(tensors[key]) - 1}"),
    ):
        changed = {**tensors, key: wrong} if wrong is not None else {k: v for k, v in tensors.items() if k != key}
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            bitnet.load(tmp_path)


@pytest.mark.parametrize("options", [{"weights": "int8", "per_row": True}, {"weights": "int4", "group_size": 32}])
def test_any_linear_layer_can_be_trained_and_packed(options: dict[str, Any]) -> None:
    model, x = Mlp(), torch.randn(3, 16)
    bitnet.replace_linear(model, **options)
    model(x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    expected = model.eval()(x)
    bitnet.pack(model)
    assert model.up.spec.weights == options["weights"]
    assert torch.equal(model(x), expected)


@each_head
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_with_a_packed_head_can_learn_new_tokens(tied: bool, head: str, tmp_path: Path) -> None:
    """transformers resizes float embeddings only: the head becomes one, and can be packed again."""
    bitnet.save(with_head(llama(tie_word_embeddings=tied), head), tmp_path / "m")
    model = bitnet.load(tmp_path / "m")
    before = logits(model)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    assert isinstance(model.get_output_embeddings(), PackedBitLinear)  # nothing was asked for
    model = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=f"the {head} head is float again"):
        model.resize_token_embeddings(72, mean_resizing=False)
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (72, 16)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    torch.testing.assert_close(logits(model)[..., :64], before, rtol=0.05, atol=0.05)  # activations were int8
    floats = model.get_output_embeddings().weight[:64].clone()
    bitnet.pack(model, head=head)
    layer = model.get_output_embeddings()
    again = reference.dequantize_weight(layer.codes(), layer.weight_scale)[:64]
    if head != "ternary":  # whose scale is a mean, smaller where codes are 0
        torch.testing.assert_close(again, floats, rtol=1e-6, atol=0)
    bitnet.save(model, tmp_path / "again")
    assert torch.equal(logits(bitnet.load(tmp_path / "again")), logits(model))


# Memory


@each_head
def test_a_head_of_many_rows_is_quantized_as_one(head: str) -> None:
    """pack takes a few rows at a time."""
    weight = torch.randn(4099, 513, dtype=torch.bfloat16)
    assert len(list(swap_pack._rows(weight))) > 2
    spec = swap_pack.head_spec(nn.Sequential(), head)
    stored, scale, change, _ = swap_pack._packed_rows(weight, spec)
    codes, whole = quantize_matrix(weight, spec)
    assert torch.equal(stored, layout.pack_codes(codes, head))
    assert torch.equal(scale, whole)
    if not isinstance(cpu_library.load(), str):
        _, same, _, prepacked = swap_pack._packed_rows(weight, spec, lean=True)
        assert torch.equal(same, whole)
        assert torch.equal(prepacked, cpu_linear.prepack(stored, 4099, k=513))
    moved = reference.dequantize_weight(codes, scale) - weight
    assert change == pytest.approx((moved.double().norm() / weight.double().norm()).item(), rel=1e-6)
    assert swap_pack._packed_rows(torch.zeros(3, 5), spec)[2] == 0


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory as Linux counts it")
@each_head
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_packing_a_head_takes_its_packed_copy_and_little_more(tied: bool, head: str) -> None:
    code = f"""
import re, bitnet
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=512, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=65536)
model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings={tied}))
bitnet.replace_linear(model)
open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
kilobytes = lambda what: int(re.search(what + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1])
before = kilobytes("VmRSS")
bitnet.pack(model, head={head!r})
print(1024 * (kilobytes("VmHWM") - before))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    assert int(done.stdout) < 65536 * 512 + 100e6
