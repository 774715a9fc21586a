"""Embedding models: sentence-transformers folders, and BitNet-embedding's norms in front of every projection."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    BertConfig,
    BertModel,
    Gemma3TextConfig,
    Gemma3TextModel,
    Qwen3Config,
    Qwen3Model,
)

import bitnet
from bitnet.convert.conversion.convert import convert_checkpoint
from bitnet.convert.files.gguf import TensorInfo, padded
from bitnet.convert.hub.sentences import read_sentences
from bitnet.convert.llama_cpp import tokenizer as gguf_tokenizer
from bitnet.convert.llama_cpp.header import header_bytes
from bitnet.packed import PackedBitLinear

IDS = torch.tensor([[3, 41, 5, 17, 60]])
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
DECODER = {**SIZES, "num_key_value_heads": 1, "head_dim": 12, "vocab_size": 64, "max_position_embeddings": 64}


def convert(source: Path, target: Path, to: str = "hub", **options: Any) -> Path:
    return convert_checkpoint(source, target, to, console=Console(quiet=True), **options)


def random(model: Any) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model.eval()


# BitNet-embedding


def bitnet_embedding(folder: Path, family: str, **sizes: Any) -> Tensor:
    """A checkpoint as microsoft/bitnet-embedding-* are, and the hidden states that their layers make of IDS.

    After the description in microsoft/BitNet: RMSNorm(x) * norm.weight, 8-bit activations, absmean ternary weights.
    """
    build: dict[str, Any] = {
        "qwen3": lambda: Qwen3Model(Qwen3Config(**DECODER | {"bos_token_id": 1, "eos_token_id": 0} | sizes)),
        "gemma3": lambda: Gemma3TextModel(
            Gemma3TextConfig(**DECODER | {"query_pre_attn_scalar": 12, "sliding_window": 4} | sizes)
        ),
    }
    model = random(build[family]())
    for parameter in model.parameters():  # to what float16 holds, in which GGUF has them, Gemma's norms as 1 + weight
        shift = float(parameter.ndim == 1)
        parameter.data = (parameter + shift).half().float() - shift
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")

    def forward(linear: nn.Linear, norm: Tensor) -> Any:
        def run(x: Tensor) -> Tensor:
            x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * norm
            scale, w = 127 / x.abs().amax(-1, keepdim=True), linear.weight
            s = 1 / w.abs().mean()
            return F.linear((x * scale).round() / scale, (w * s).round().clamp(-1, 1) / s)

        return run

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            state[f"{name}.norm.weight"] = (1 + 0.3 * torch.randn(module.in_features)).half().float()
            module.forward = forward(module, state[f"{name}.norm.weight"])
    assert sum(name.endswith("_proj.norm.weight") for name in state) == 14
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with torch.no_grad():
        return model(IDS).last_hidden_state


def hidden(folder: Path) -> Tensor:
    with torch.no_grad():
        return bitnet.load(folder)(IDS).last_hidden_state


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("to", ["as it is", "hub", "base3", "latent"])
def test_norms_in_front_of_projections_are_computed(to: str, family: str, tmp_path: Path) -> None:
    expected = bitnet_embedding(tmp_path / "source", family)
    folder = tmp_path / "source" if to == "as it is" else convert(tmp_path / "source", tmp_path / "out", to)
    assert apart(hidden(folder), expected) < 1 / 127, "more than a step of an activation"
    assert bitnet.inspect_checkpoint(folder, Console(quiet=True)).problems == []
    if to != "as it is":
        with torch.no_grad():
            assert apart(AutoModel.from_pretrained(folder).eval()(IDS).last_hidden_state, expected) < 1 / 127
    layers = [m for m in bitnet.load(folder).modules() if isinstance(m, bitnet.BitLinear | PackedBitLinear)]
    assert len(layers) == 14
    assert all(layer.spec.rms_norm and layer.rms_norm is not None for layer in layers)
    assert all(isinstance(layer, PackedBitLinear) == (to in ("hub", "base3")) for layer in layers)


# 128 features are a block of I2_S; the published Gemma has one rotary base
FULL = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 128, "vocab_size": 512}
BASES = {f"{kind}_attention": {"rope_type": "default", "rope_theta": 1e4} for kind in ("full", "sliding")}
GGUF_SIZES: dict[str, dict[str, Any]] = {
    "qwen3": FULL,
    "gemma3": FULL | {"query_pre_attn_scalar": 128, "sliding_window": 512, "rope_parameters": BASES},
}
GGUF_NAMES = {  # utils/convert-bitnet-embedding-to-gguf.py of microsoft/BitNet
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj.norm": "attn_q_norm_in",
    "self_attn.k_proj.norm": "attn_k_norm_in",
    "self_attn.v_proj.norm": "attn_v_norm_in",
    "self_attn.o_proj.norm": "attn_output_norm_in",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_proj.norm": "ffn_gate_norm_in",
    "mlp.up_proj.norm": "ffn_up_norm_in",
    "mlp.down_proj.norm": "ffn_down_norm_in",
}
GGUF_NORMS = {
    "qwen3": {"post_attention_layernorm": "ffn_norm"},
    "gemma3": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}


def i2_s(w: Any) -> bytes:
    """A matrix as that script packs it: 128 weights in 32 bytes, then the scale in 32."""
    scale = np.float32(np.abs(w).mean())
    fields = (np.round(w / scale).clip(-1, 1) + 1).astype(np.uint8).reshape(-1, 4, 32)
    packed = fields[:, 0] << 6 | fields[:, 1] << 4 | fields[:, 2] << 2 | fields[:, 3]
    return packed.tobytes() + scale.tobytes() + bytes(28)


def embedding_gguf(source: Path, file: Path, family: str, ternary: bool = True, **keys: Any) -> Path:
    """What bitnet.cpp's converter makes of such a checkpoint; keys: metadata of the architecture that are to differ."""
    names = GGUF_NAMES | GGUF_NORMS[family]
    infos, data = {}, b""
    for key, tensor in load_file(source / "model.safetensors").items():
        module, values = key.removesuffix(".weight"), tensor.float().numpy()
        if module.startswith("layers."):
            _, number, module = module.split(".", 2)
            name = f"blk.{number}.{names[module]}.weight"
        else:
            name = {"embed_tokens": "token_embd", "norm": "output_norm"}[module] + ".weight"
        if ternary and values.ndim == 2 and name != "token_embd.weight":
            kind, part = 36, i2_s(values)
        else:  # norms of Gemma itself multiply by 1 + weight
            values = values + (family == "gemma3" and values.ndim == 1 and "norm_in" not in name)
            kind, part = 1, values.astype(np.float16).tobytes()
        infos[name] = TensorInfo(kind, values.shape, len(data), len(part))
        data += part.ljust(padded(len(part)), b"\0")
    config = json.loads((source / "config.json").read_text())
    own = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "vocab_size": config["vocab_size"],
        "rope.dimension_count": config["head_dim"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "pooling_type": 3,
    }
    metadata = {"general.architecture": family, "general.file_type": 40}
    metadata |= {f"{family}.{key}": value for key, value in (own | keys).items()}
    gguf_models.tokenizer().save_pretrained(source)
    metadata |= gguf_tokenizer.metadata_of(source, AutoConfig.from_pretrained(source))
    file.write_bytes(header_bytes(metadata, infos) + data)
    return file


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_bitnet_cpps_files_of_such_models_are_read(family: str, tmp_path: Path) -> None:
    expected = bitnet_embedding(tmp_path / "source", family, **GGUF_SIZES[family])
    file = embedding_gguf(tmp_path / "source", tmp_path / "m.gguf", family)
    model = bitnet.load(file, dtype=torch.float32).base_model
    with torch.no_grad():
        assert apart(model(IDS).last_hidden_state, expected) < 1 / 127, "more than a step of an activation"
    direct = bitnet.load(convert(tmp_path / "source", tmp_path / "direct"))
    for name, layer in direct.named_modules():
        if isinstance(layer, PackedBitLinear):
            found = model.get_submodule(name)
            assert isinstance(found, PackedBitLinear)
            assert found.spec == layer.spec
            assert torch.equal(found.codes(), layer.codes())
            torch.testing.assert_close(found.weight_scale, layer.weight_scale, rtol=1e-6, atol=0)
            assert torch.equal(found.rms_norm.weight, layer.rms_norm.weight)
    assert bitnet.inspect_checkpoint(file, Console(quiet=True)).problems == []
    folder = convert(file, tmp_path / "hub")
    assert str(read_sentences(folder)) == "a sentence-transformers folder: Transformer, Pooling (lasttoken), Normalize"
    vector = bitnet.embed(folder, TEXTS[0])
    assert torch.equal(bitnet.embed(file, TEXTS[0]), vector)
    assert vector.norm().item() == pytest.approx(1)


def test_what_a_file_of_such_a_model_cannot_be_is_named(tmp_path: Path) -> None:
    bitnet_embedding(tmp_path / "source", "qwen3", **FULL)
    file = embedding_gguf(tmp_path / "source", tmp_path / "m.gguf", "qwen3")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has an RMSNorm in front of it, which no plain"):
        convert(file, tmp_path / "bf16", "bf16")
    with pytest.raises(ValueError, match="has an RMSNorm in front of it, which no plain model can express"):
        bitnet.load(embedding_gguf(tmp_path / "source", tmp_path / "f16.gguf", "qwen3", ternary=False))
    with pytest.raises(ValueError, match=r"not understood here: qwen3\.pooling_type"):
        bitnet.load(embedding_gguf(tmp_path / "source", tmp_path / "rank.gguf", "qwen3", pooling_type=4))
    plain = convert(embedding_gguf(tmp_path / "source", tmp_path / "n.gguf", "qwen3", pooling_type=0), tmp_path / "hub")
    assert read_sentences(plain) is None


def test_saved_again_they_have_our_names(tmp_path: Path) -> None:
    expected = bitnet_embedding(tmp_path / "source", "qwen3")
    model = bitnet.load(tmp_path / "source")
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors")
    assert "layers.0.self_attn.q_proj.rms_norm.weight" in names
    assert apart(hidden(tmp_path / "saved"), expected) < 1 / 127


def test_a_projection_without_its_norm_is_named(tmp_path: Path) -> None:
    bitnet_embedding(tmp_path / "source", "qwen3")
    state = load_file(tmp_path / "source" / "model.safetensors")
    del state["layers.1.mlp.up_proj.norm.weight"]
    save_file(state, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no tensor layers\.1\.mlp\.up_proj\.rms_norm\.weight"):
        bitnet.load(tmp_path / "source")


def test_a_model_without_such_norms_stays_a_float_model(tmp_path: Path) -> None:
    random(Qwen3Model(Qwen3Config(**DECODER))).save_pretrained(tmp_path / "float")
    assert not any(isinstance(m, bitnet.BitLinear) for m in bitnet.load(tmp_path / "float").modules())


# sentence-transformers


def sentence_folder(folder: Path, pooling: str = "mean_tokens", normalize: bool = True, decoder: bool = False) -> Path:
    if decoder:
        model = random(Qwen3Model(Qwen3Config(**DECODER | {"vocab_size": 512})))
    else:
        model = random(BertModel(BertConfig(**SIZES, vocab_size=512, max_position_embeddings=64)))
    model.save_pretrained(folder)
    gguf_models.tokenizer().save_pretrained(folder)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=False))
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    modes = {
        f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    }
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 16, **modes}))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24, "do_lower_case": false}')
    return folder


TEXTS = ["import json", "def main(args):\n    return args.path", "x", "a much longer text " * 9]


def alone(folder: Path, text: str, pooling: str, normalize: bool) -> Tensor:
    """One text's embedding, without padding."""
    ids = gguf_models.tokenizer()(text).input_ids[:24]
    with torch.no_grad():
        states = bitnet.load(folder)(input_ids=torch.tensor([ids])).last_hidden_state[0]
    vector = {"mean_tokens": states.mean(0), "cls_token": states[0], "lasttoken": states[-1]}[pooling]
    return vector / vector.norm() if normalize else vector


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("pooling", "decoder"), [("mean_tokens", False), ("cls_token", False), ("lasttoken", True)])
def test_a_batch_has_the_embeddings_of_its_texts(pooling: str, decoder: bool, normalize: bool, tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "m", pooling, normalize, decoder)
    found = bitnet.embed(folder, TEXTS)
    expected = torch.stack([alone(folder, text, pooling, normalize) for text in TEXTS])
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
    encoder = bitnet.Encoder(folder)
    assert torch.allclose(bitnet.embed(encoder, TEXTS, batch=2), found, rtol=1e-4, atol=1e-4)
    assert torch.allclose(encoder(TEXTS[1]), found[1], rtol=1e-4, atol=1e-4)
    assert encoder([]).shape == (0, 16)


@pytest.mark.parametrize("to", ["hub", "latent", "bf16"])
def test_a_converted_folder_still_is_one(to: str, tmp_path: Path) -> None:
    source = sentence_folder(tmp_path / "m")
    (source / "2_Normalize").mkdir()
    (source / "1_Pooling" / "deeper").mkdir()
    (source / "1_Pooling" / "deeper" / "dense.bin").write_bytes(b"weights of its own")
    (source / "assets").mkdir()
    (source / "assets" / "picture.png").write_bytes(b"")
    (tmp_path / "out").mkdir()  # a mount point, say
    convert(source, tmp_path / "out", to)
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "1_Pooling/deeper/dense.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "assets").exists()
    assert read_sentences(tmp_path / "out") == read_sentences(source)
    found = bitnet.inspect_checkpoint(tmp_path / "out", Console(quiet=True))
    assert "a sentence-transformers folder: Transformer, Pooling (mean), Normalize" in str(found)
    assert found.problems == []
    assert bitnet.embed(tmp_path / "out", TEXTS).norm(dim=1).allclose(torch.ones(4))


def test_the_folders_own_prompt_and_case_are_used(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "m")
    plain = bitnet.embed(folder, "query: return")
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 24, "do_lower_case": true}')
    encoder = bitnet.Encoder(folder)
    assert torch.equal(encoder("RETURN"), plain)
    assert torch.equal(encoder("Query: RETURN", prompt=""), bitnet.embed(encoder, "query: return", prompt=""))


REFUSED: dict[str, tuple[dict[str, str | None], str]] = {
    "max pooling": (
        {"1_Pooling/config.json": '{"pooling_mode_max_tokens": true}'},
        "pooling is 'max_tokens'; cls, mean",
    ),
    "two poolings": (
        {"1_Pooling/config.json": '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}'},
        r"pooling is 'cls\+mean'",
    ),
    "no pooling": ({"1_Pooling/config.json": None}, "1_Pooling/config.json"),
    "no modules": ({"modules.json": None}, "no modules.json, which says how tokens become an embedding; pass pooling="),
    "dense": (
        {"modules.json": '[{"type": "a.Transformer", "path": ""}, {"type": "a.Dense", "path": "1_Pooling"}]'},
        "has a Dense module, which is not computed here",
    ),
    "no list": ({"modules.json": '{"type": "a"}'}, r"modules\.json: is no JSON list, but a dict"),
    "no path": ({"modules.json": '[{"type": "a"}]'}, "without a type and a path"),
    "outside": ({"modules.json": '[{"type": "a", "path": "../other"}]'}, "'../other', outside of the folder"),
    "a length": ({"sentence_bert_config.json": '{"max_seq_length": -1}'}, "says what cannot be"),
}


@pytest.mark.parametrize(("files", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_known_embedding_is_refused(files: dict[str, str | None], reason: str, tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "m")
    for name, text in files.items():
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)
    with pytest.raises((ValueError, OSError), match=reason):
        bitnet.embed(folder, "a")


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    source = sentence_folder(tmp_path / "m")
    (tmp_path / "secret").write_text("secret")
    (source / "1_Pooling" / "config.json").unlink()
    (source / "1_Pooling" / "config.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"1_Pooling/config\.json, a link that leads out of the folder"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    shutil.rmtree(source / "1_Pooling")
    (tmp_path / "elsewhere").mkdir()
    (source / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="a link that leads out of the folder"):
        convert(source, tmp_path / "out")


def test_a_text_without_tokens_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        bitnet.embed(sentence_folder(tmp_path / "m"), ["a", ""])


def test_damaged_modules_are_a_problem_of_the_checkpoint(tmp_path: Path) -> None:
    folder = sentence_folder(tmp_path / "m")
    (folder / "modules.json").write_text("[")
    (line,) = bitnet.inspect_checkpoint(folder, Console(quiet=True)).problems
    assert "modules.json: is not valid JSON" in line
