import copy
import itertools
import json
import re
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import gguf_models
import pytest
import torch
from gguf_models import (
    LLAMA3,
    TEXTS,
    assemble,
    checkpoint,
    fast,
    gemma,
    logits,
    rewritten,
    round_scales,
    sentencepiece,
    tokenizer,
)
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

import bitnet
from bitnet.convert.conversion.convert import convert_checkpoint
from bitnet.convert.files import ggml
from bitnet.convert.files.gguf import read_header
from bitnet.convert.hub.source import FolderSource
from bitnet.convert.llama_cpp import tokenizer as gguf_tokenizer
from bitnet.convert.llama_cpp.families import FAMILIES
from bitnet.convert.llama_cpp.source import GgufSource
from bitnet.convert.llama_cpp.writer import KINDS, write_gguf
from bitnet.kernels.reference import dequantize_weight
from bitnet.packed import PackedBitLinear
from bitnet.train.data import build_tokenizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gguf") / "llama"
    return checkpoint(folder), folder


@pytest.fixture(scope="module")
def llama(saved: tuple[Any, Path]) -> Path:
    return saved[1]


@pytest.fixture(scope="module")
def exported(llama: Path) -> Path:
    return write_gguf(FolderSource(llama), llama.parent / "llama.gguf", "gguf-tq2_0")


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases, wide heads, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_5": ("qwen3_5", {}),
    "qwen3_5, as many keys as values": ("qwen3_5", {"linear_num_key_heads": 8}),
    "gemma3": ("gemma3", {}),
    "gemma3, every sixth layer, head of its own": (
        "gemma3",
        {
            "num_hidden_layers": 7,
            "layer_types": None,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 5.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
        },
    ),
    "gemma3, no windows": ("gemma3", {"layer_types": ["full_attention"] * 2}),
    "bitnet": ("bitnet", {}),
}


@pytest.mark.parametrize(("family", "changes"), MODELS.values(), ids=MODELS)
def test_a_model_comes_back_with_the_same_logits(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "hf", family, **changes)
    source = FolderSource(tmp_path / "hf")
    back = GgufSource(write_gguf(source, tmp_path / "m.gguf", "gguf-tq2_0"))
    weights = source.weights()
    assert back.weights().keys() == weights.keys()
    for name, weight in weights.items():
        assert back.weights()[name].spec == weight.spec
        for ours, theirs in zip(source.matrices(weight), back.matrices(back.weights()[name]), strict=True):
            assert torch.equal(theirs.codes, ours.codes)
            assert torch.equal(theirs.scale, ours.scale.half().float())
    assert torch.equal(logits(assemble(back)), logits(round_scales(model)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gguf-q1_0"])  # of binary ones: test_gguf_types.py
def test_every_kind_comes_back_with_the_same_logits(kind: str, saved: tuple[Any, Path], tmp_path: Path) -> None:
    model = copy.deepcopy(saved[0])
    back = GgufSource(write_gguf(FolderSource(saved[1]), tmp_path / "m.gguf", kind))
    if kind == "gguf-bf16":
        bitnet.unpack(model)
        for layer in model.model.layers.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.data = layer.weight.bfloat16().float()
    found = assemble(back)
    assert torch.equal(
        logits(found.float()), logits(model if kind in ("gguf-i2_s", "gguf-bf16") else round_scales(model))
    )


def test_scales_of_rows_come_back(tmp_path: Path) -> None:
    model = gguf_models.model("llama")
    bitnet.replace_linear(model, per_row=True)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "hf")
    tokenizer().save_pretrained(tmp_path / "hf")
    back = GgufSource(write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", "gguf-tq1_0"))
    assert torch.equal(logits(assemble(back)), logits(round_scales(model)))


def test_a_float_checkpoint_gives_the_file_of_the_packed_one(tmp_path: Path) -> None:
    model = gguf_models.model("llama")
    for name in ("float", "packed"):
        folder = tmp_path / name / "m"
        if name == "packed":
            bitnet.replace_linear(model)
            bitnet.pack(model)
            bitnet.save(model, folder)
        else:
            model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        write_gguf(FolderSource(folder), tmp_path / f"{name}.gguf", "gguf-q2_0")
    assert (tmp_path / "float.gguf").read_bytes() == (tmp_path / "packed.gguf").read_bytes()


@pytest.mark.parametrize("tied", [True, False])
def test_8_bit_heads_keep_their_codes(tied: bool, tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf", head="int8", tie_word_embeddings=tied)
    source = FolderSource(tmp_path / "hf")
    back = GgufSource(write_gguf(source, tmp_path / "m.gguf", "gguf-tq2_0"))
    name = "model.embed_tokens" if tied else "lm_head"
    if tied:
        codes, scale = source.tensor(f"{name}.weight"), 1 / source.tensor(f"{name}.weight_scale")
    else:
        codes, scale = source.quantized(name)
    assert codes.abs().max() == 127
    assert torch.equal(back.tensor(f"{name}.weight"), codes * scale.half().float()[:, None])


def test_floats_keep_their_type(tmp_path: Path) -> None:
    model = gguf_models.model("llama").bfloat16()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "hf")
    tokenizer().save_pretrained(tmp_path / "hf")
    _, tensors = read_header(write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", "gguf-tq2_0"))
    kinds = {name.rsplit(".", 2)[-2]: ggml.NAMES[info.kind] for name, info in tensors.items()}
    assert kinds["token_embd"] == kinds["output"] == "BF16"
    assert kinds["attn_norm"] == kinds["output_norm"] == "F32"
    assert kinds["attn_q"] == kinds["ffn_down"] == "TQ2_0"


def test_the_gguf_package_reads_the_file(exported: Path) -> None:
    reader = gguf.GGUFReader(exported)
    metadata, tensors = read_header(exported)
    assert {t.name: (t.tensor_type, t.data_offset, t.n_bytes) for t in reader.tensors} == {
        name: (info.kind, info.offset, info.nbytes) for name, info in tensors.items()
    }
    for key, value in metadata.items():
        assert reader.fields[key].contents() == (pytest.approx(value) if isinstance(value, float) else value), key


def test_names_are_those_of_llama_cpp() -> None:
    for family in FAMILIES.values():
        arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
        known = {gguf.TENSOR_NAMES[tensor].replace("{bid}", "{}") for tensor in gguf.MODEL_TENSORS[arch]}
        others = {n for names in (family.parameters or {}).values() for n in names}
        modules = {re.sub(r"\.(weight|bias)$", "", name) for name in (*family.modules.values(), *others)}
        assert modules - {"output"} <= known


@pytest.mark.parametrize("to", ["hub", "base3", "bf16"])
def test_a_gguf_file_becomes_a_checkpoint(to: str, saved: tuple[Any, Path], exported: Path, tmp_path: Path) -> None:
    convert_checkpoint(exported, tmp_path / "back", to, console=Console(quiet=True))
    model, back = round_scales(copy.deepcopy(saved[0])), bitnet.load(tmp_path / "back")
    for module in model.modules():
        if isinstance(module, PackedBitLinear) and to != "bf16":
            module.weight_scale = 1 / (1 / module.weight_scale)  # folders hold 1 / scale
    if to == "bf16":
        bitnet.unpack(model)
        state = back.state_dict()
        assert all(torch.equal(state[key], value.bfloat16()) for key, value in model.state_dict().items())
    else:
        assert torch.equal(logits(back), logits(model))
    same_tokens(AutoTokenizer.from_pretrained(saved[1]), AutoTokenizer.from_pretrained(tmp_path / "back"))


def test_a_gguf_file_becomes_another(exported: Path, tmp_path: Path) -> None:
    first = GgufSource(exported)
    second = GgufSource(write_gguf(first, tmp_path / "m.gguf", "gguf-q2_0"))
    assert all(torch.equal(first.quantized(name).codes, second.quantized(name).codes) for name in first.layers())
    same = {k: v for k, v in first.metadata.items() if k.startswith("tokenizer.")}
    assert same == {k: v for k, v in second.metadata.items() if k.startswith("tokenizer.")}


YARN = LLAMA3 | {"rope_type": "yarn"}
REFUSED: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], str]] = {
    "blocks": ("gguf-tq2_0", "llama", {"intermediate_size": 384}, {}, "down_proj: its rows of 384 weights"),
    "small blocks": ("gguf-q2_0", "llama", {"intermediate_size": 288}, {}, r"TQ|Q2_0 blocks \(64\)"),
    "i2_s blocks": ("gguf-i2_s", "llama", {"intermediate_size": 320}, {}, r"I2_S blocks \(128\)"),
    "norms in layers": ("gguf-tq2_0", "llama", {}, {"rms_norm": True}, "has an RMSNorm inside the layer"),
    "4-bit activations": ("gguf-tq2_0", "llama", {}, {"activation_bits": 4}, "takes 4-bit activations"),
    "float activations": ("gguf-tq2_0", "llama", {}, {"activation_bits": None}, "takes float activations"),
    "i2_s scales of rows": ("gguf-i2_s", "llama", {}, {"per_row": True}, "has a scale for each row"),
    "i2_s qwen3": ("gguf-i2_s", "qwen3", {}, {}, "bitnet.cpp.* is not known to run `qwen3`"),
    "relu2": ("gguf-tq2_0", "bitnet", {"hidden_act": "relu2"}, {}, "runs silu, not relu2.*gguf-i2_s"),
    "gelu": ("gguf-tq2_0", "llama", {"hidden_act": "gelu"}, {}, "runs silu, not gelu"),
    "untied bitnet": ("gguf-tq2_0", "bitnet", {"tie_word_embeddings": False}, {}, "input embedding as output head"),
    "bitnet heads": ("gguf-tq2_0", "bitnet", {"head_dim": 128}, {}, "hidden_size / heads = 64"),
    "bitnet biases": ("gguf-tq2_0", "bitnet", {"attention_bias": True}, {}, "no place for .*bias"),
    "qwen3 biases": ("gguf-tq2_0", "qwen3", {"attention_bias": True}, {}, "no place for .*bias"),
    "window": ("gguf-tq2_0", "mistral", {"sliding_window": 64}, {}, "not to a sliding window of 64"),
    "yarn": (
        "gguf-tq2_0",
        "llama",
        {"rope_parameters": YARN},
        {},
        "rotary embeddings of type",
    ),
    "free experts": ("gguf-tq2_0", "qwen3_moe", {"norm_topk_prob": False}, {}, "norm_topk_prob is off here"),
    "some experts": ("gguf-tq2_0", "qwen3_moe", {"mlp_only_layers": [0]}, {}, r"experts in every layer.*\[0\]"),
    "experts' blocks": (
        "gguf-tq2_0",
        "qwen3_moe",
        {"moe_intermediate_size": 128},
        {},
        "experts.packed_down_proj: its rows of 128 weights",
    ),
    "i2_s experts": ("gguf-i2_s", "qwen3_moe", {}, {}, "not known to run `qwen3moe`"),
    "4-bit experts": ("gguf-tq2_0", "qwen3_moe", {}, {"activation_bits": 4}, "takes 4-bit activations"),
    "moe window": (
        "gguf-tq2_0",
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 64},
        {},
        "not to a sliding window of 64",
    ),
    "attention scale": (
        "gguf-tq2_0",
        "gemma3",
        {"query_pre_attn_scalar": 64},
        {},
        "root of head_dim, 128, not of query_pre_attn_scalar, 64",
    ),
    "both ways": ("gguf-tq2_0", "gemma3", {"use_bidirectional_attention": True}, {}, "to later ones, too"),
    "capped scores": ("gguf-tq2_0", "gemma3", {"attn_logit_softcapping": 5.0}, {}, "does not cap attention scores"),
    "gemma's gelu": ("gguf-tq2_0", "gemma3", {"hidden_activation": "gelu"}, {}, "runs gelu_pytorch_tanh, not gelu"),
    "gemma biases": ("gguf-tq2_0", "gemma3", {"attention_bias": True}, {}, "no place for .*bias"),
    "delta net's eps": ("gguf-tq2_0", "qwen3_5", {"rms_norm_eps": 1e-5}, {}, "1e-05, in the norm of queries and keys"),
    "delta net's sizes": ("gguf-tq2_0", "qwen3_5", {"linear_value_head_dim": 32}, {}, "of one size.*64 and 32"),
    "only delta nets": ("gguf-tq2_0", "qwen3_5", {"layer_types": ["linear_attention"] * 2}, {}, "aborts on a model"),
    "groups across heads": (
        "gguf-q2_0",
        "qwen3_5",
        {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 4},
        {"group_size": 64},
        "groups of 64 features, which llama.cpp's order of heads cuts",
    ),
    "llama3 rope elsewhere": ("gguf-tq2_0", "qwen3", {"rope_parameters": LLAMA3}, {}, "rotary embeddings of type"),
}


@pytest.mark.parametrize(("kind", "family", "changes", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_would_compute_something_else_is_refused(
    kind: str, family: str, changes: dict[str, Any], options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    model = gguf_models.model(family, **changes)
    bitnet.replace_linear(model, **options)
    bitnet.save(model, tmp_path / "hf")
    with pytest.raises(ValueError, match=reason):
        write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", kind)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_relu2_is_written_for_bitnet_cpp(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "hf", "bitnet", hidden_act="relu2")
    back = GgufSource(write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", "gguf-i2_s"))
    assert back.metadata["general.architecture"] == "bitnet-b1.58"
    assert back.model.config.hidden_act == "relu2"
    assert torch.equal(logits(assemble(back)), logits(model))


def test_other_models_and_kinds_are_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="kind must be one of gguf-tq1_0"):
        write_gguf(FolderSource(llama), tmp_path / "m.gguf", "tq2_0")
    from tiny import neox

    neox().save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"written for LlamaForCausalLM, .*this is a GPTNeoXForCausalLM"):
        write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", "gguf-tq2_0")


def test_scales_outside_of_float16_leave_nothing_behind(tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "hf")
    model.model.layers[1].mlp.down_proj.weight_scale.fill_(1e-6)
    bitnet.save(model, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_down\.weight: its scales.*float16"):
        write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", "gguf-tq2_0")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


# Interrupted runs


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Make the ternary matrix number `after` raise KeyboardInterrupt."""
    calls, pack = itertools.count(), ggml.pack

    def packing(*args: Any) -> ggml.Bytes:
        if next(calls) == after:
            raise KeyboardInterrupt
        return pack(*args)

    monkeypatch.setattr(ggml, "pack", packing)


def partials(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "partial" in path.name)


def test_a_resumed_run_gives_the_same_bytes(
    llama: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, source = tmp_path / "m.gguf", FolderSource(llama)
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            write_gguf(source, file, "gguf-tq2_0", resume=True, fingerprint="a")
    assert not file.exists()
    assert partials(tmp_path) == [".m.gguf.partial", ".m.gguf.partial.json"]
    written: list[int] = []
    write_gguf(source, file, "gguf-tq2_0", resume=True, fingerprint="a", progress=written.append)
    assert file.read_bytes() == exported.read_bytes()
    assert 0 < sum(written) < exported.stat().st_size / 2 + 512 * 1024, "it did the finished tensors again"
    assert partials(tmp_path) == []


def test_a_run_killed_anywhere_can_be_resumed(
    llama: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, file, source = exported.read_bytes(), tmp_path / "m.gguf", FolderSource(llama)
    first = min(info.offset for info in read_header(exported)[1].values())
    for size in (0, 100, first, first + 1, len(whole) // 2, len(whole) - 1, len(whole)):
        (tmp_path / ".m.gguf.partial").write_bytes(whole[:size])
        (tmp_path / ".m.gguf.partial.json").write_text(json.dumps({"fingerprint": "a"}))
        write_gguf(source, file, "gguf-tq2_0", resume=True, fingerprint="a")
        assert file.read_bytes() == whole, size


@pytest.mark.parametrize("other", ["fingerprint", "kind"])
def test_another_runs_tensors_are_not_continued(
    other: str, llama: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, source = tmp_path / "m.gguf", FolderSource(llama)
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            write_gguf(source, file, "gguf-tq2_0", resume=True, fingerprint="a")
    changed = {"fingerprint": "b"} if other == "fingerprint" else {"fingerprint": "a"}
    kind = "gguf-tq1_0" if other == "kind" else "gguf-tq2_0"
    with pytest.raises(ValueError, match=r"\.m\.gguf\.partial: was left by a run with another source"):
        write_gguf(source, file, kind, resume=True, **changed)
    write_gguf(source, file, "gguf-tq2_0")
    assert file.read_bytes() == exported.read_bytes()
    assert partials(tmp_path) == []


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Limits the size of files, which fails a write as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("resume", [False, True])
def test_a_full_disk_keeps_the_earlier_file(
    resume: bool, llama: Path, exported: Path, tmp_path: Path, small_files: Callable[[int], None]
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(b"earlier")
    small_files(exported.stat().st_size // 2)
    with pytest.raises(OSError, match="File too large"):
        write_gguf(FolderSource(llama), file, "gguf-tq2_0", resume=resume)
    assert file.read_bytes() == b"earlier"
    assert partials(tmp_path) == ([".m.gguf.partial", ".m.gguf.partial.json"] if resume else [])
    small_files(1 << 30)
    write_gguf(FolderSource(llama), file, "gguf-tq2_0", resume=resume)
    assert file.read_bytes() == exported.read_bytes()


# Damaged and foreign files


@pytest.mark.parametrize("size", [3, 30, 1000, -100_000, -33])
def test_a_file_cut_short_is_refused(size: int, exported: Path, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(exported.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"m\.gguf: (its header needs|is [\d,]+ bytes, but tensor|is no GGUF)"):
        GgufSource(tmp_path / "m.gguf")


@pytest.mark.parametrize(
    ("at", "value", "reason"),
    [(0, b"JUNK", "is no GGUF file"), (4, b"\x01", "is GGUF version 1"), (8, b"\xff" * 8, "damaged")],
)
def test_a_damaged_header_is_refused(at: int, value: bytes, reason: str, exported: Path, tmp_path: Path) -> None:
    data = bytearray(exported.read_bytes())
    data[at : at + len(value)] = value
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        GgufSource(tmp_path / "m.gguf")


FOREIGN: dict[str, tuple[dict[str, Any], str, str]] = {
    "architecture": ({"general.architecture": "mamba"}, "-", "architecture is 'mamba'; read here are"),
    "missing key": ({"llama.block_count": None}, "-", r"llama\.block_count is missing"),
    "unknown key": ({"llama.attention.scale": 0.5}, "-", r"not understood here: llama\.attention\.scale"),
    "partial rotary": ({"llama.rope.dimension_count": 32}, "-", r"not understood here: llama\.rope\.dimension_count"),
    "yarn": ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "-", "not understood here:.*yarn"),
    "yarn without a factor": ({"llama.rope.scaling.type": "yarn"}, "-", "not understood here:.*yarn"),
    "other width": ({"llama.feed_forward_length": 1024}, "-", r"tensor blk\.0\.\w+\.weight is .*, but by the metadata"),
    "no embedding": ({}, "token_embd.weight", r"has no tensor token_embd\.weight"),
    "more layers": ({"llama.block_count": 1}, "-", r"tensor blk\.1\.\w+\.weight has no place"),
    "a part": ({"split.count": 2}, "-", "is one of 2 parts"),
}


@pytest.mark.parametrize(("metadata", "without", "reason"), FOREIGN.values(), ids=FOREIGN)
def test_what_is_not_understood_is_refused(
    metadata: dict[str, Any], without: str, reason: str, exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        GgufSource(rewritten(exported, tmp_path / "m.gguf", metadata, without))


def test_a_missing_tensor_is_named(exported: Path, tmp_path: Path) -> None:
    source = GgufSource(rewritten(exported, tmp_path / "m.gguf", without="blk.1.ffn_up.weight"))
    assert source.missing() == ["there is no tensor model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"there is no tensor model\.layers\.1"):
        write_gguf(source, tmp_path / "n.gguf", "gguf-q2_0")


def test_damaged_tensors_are_named(exported: Path, tmp_path: Path) -> None:
    info = read_header(exported)[1]["blk.1.ffn_up.weight"]
    data = bytearray(exported.read_bytes())
    data[info.offset] = 0xFF
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: holds bytes that encode no ternary"):
        GgufSource(tmp_path / "m.gguf").quantized("model.layers.1.mlp.up_proj")
    data[info.offset + 65] = 0xFF  # the first block's scale: now negative or NaN
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=r"m\.gguf: tensor blk\.1\.ffn_up\.weight: has a scale"):
        GgufSource(tmp_path / "m.gguf")


def test_blocks_with_scales_of_their_own_are_groups_or_floats(exported: Path, tmp_path: Path) -> None:
    """llama-quantize rounds float weights to TQ2_0 by blocks."""
    info = read_header(exported)[1]["blk.1.ffn_down.weight"]
    data = bytearray(exported.read_bytes())
    quantized = gguf.quants.quantize(torch.randn(info.shape).numpy(), gguf.GGMLQuantizationType.TQ2_0)
    data[info.offset : info.offset + info.nbytes] = quantized.tobytes()
    (tmp_path / "m.gguf").write_bytes(data)
    grouped = GgufSource(tmp_path / "m.gguf")
    assert grouped.layers()["model.layers.1.mlp.down_proj"].spec.group_size == 256
    source = GgufSource(tmp_path / "m.gguf", dequantize=True)
    assert source.layers() == {}
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "floats", "bf16", console=Console(quiet=True))
    stored = load_file(tmp_path / "floats" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(stored, source.tensor("model.layers.1.mlp.down_proj.weight").bfloat16())
    weight = source.tensor("model.layers.1.mlp.down_proj.weight")
    assert torch.equal(weight, torch.from_numpy(gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType.TQ2_0)))
    assert torch.equal(weight, dequantize_weight(*grouped.quantized("model.layers.1.mlp.down_proj")))
    packed = GgufSource(exported)
    codes, scale = packed.quantized("model.layers.0.self_attn.q_proj")
    assert torch.equal(source.tensor("model.layers.0.self_attn.q_proj.weight"), codes * scale)


def test_other_rotary_factors_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf", rope_parameters=LLAMA3 | {"factor": 5.0})
    file = write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", "gguf-tq2_0")
    with pytest.raises(ValueError, match="not that of Llama 3"):
        GgufSource(file)


# Tokenizers


def same_tokens(one: Any, other: Any) -> None:
    for text in TEXTS:
        assert other(text).input_ids == one(text).input_ids
        assert other.decode(other(text).input_ids) == one.decode(one(text).input_ids)


def there_and_back(directory: Path, **config: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The tokenizer in a directory, the one that comes back from GGUF metadata, and the metadata."""
    options = {"vocab_size": 600, "eos_token_id": 0}
    metadata: dict[str, Any] = gguf_tokenizer.metadata_of(directory, AutoConfig.for_model("llama", **options | config))
    gguf_tokenizer.save_tokenizer(metadata, directory / "back")
    return AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(directory / "back"), metadata


@pytest.mark.parametrize("pre", gguf_tokenizer.PRE)
def test_byte_level_tokenizers_come_back(pre: str, tmp_path: Path) -> None:
    tokenizer(pre, 500).save_pretrained(tmp_path)
    one, other, metadata = there_and_back(tmp_path)
    assert metadata["tokenizer.ggml.pre"] == pre
    assert metadata["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert len(metadata["tokenizer.ggml.tokens"]) == 600, (
        "llama.cpp takes the number of rows of the embedding from here"
    )
    same_tokens(one, other)
    assert (other.eos_token, other.bos_token, other.chat_template) == ("<|end|>", "<|start|>", one.chat_template)


def test_tokens_around_a_text_come_back(tmp_path: Path) -> None:
    backend = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single="<|start|> $A <|end|>", special_tokens=[("<|start|>", 1), ("<|end|>", 0)]
    )
    fast(backend).save_pretrained(tmp_path)
    one, other, metadata = there_and_back(tmp_path)
    assert metadata["tokenizer.ggml.add_bos_token"]
    assert metadata["tokenizer.ggml.add_eos_token"]
    same_tokens(one, other)


def test_quickstarts_tokenizer_comes_back(tmp_path: Path) -> None:
    build_tokenizer().save_pretrained(tmp_path)
    same_tokens(*there_and_back(tmp_path)[:2])


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_like_tokenizers_come_back(prefix: bool, tmp_path: Path) -> None:
    sentencepiece(prefix).save_pretrained(tmp_path)
    one, other, metadata = there_and_back(tmp_path)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_space_prefix"] is prefix
    assert metadata["tokenizer.ggml.token_type"][:4] == [2, 3, 3, 6]
    same_tokens(one, other)


def test_gemmas_tokenizer_comes_back(tmp_path: Path) -> None:
    gemma().save_pretrained(tmp_path)
    one, other, metadata = there_and_back(tmp_path)
    assert metadata["tokenizer.ggml.add_space_prefix"] is False
    tokens = [
        metadata["tokenizer.ggml.tokens"][i]
        for i, kind in enumerate(metadata["tokenizer.ggml.token_type"])
        if kind == 4
    ]
    assert tokens == [2 * gguf_tokenizer.SPACE, "<b>", "   "]
    same_tokens(one, other)


WHITESPACE = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])
REGEX = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex("a+"), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
)
UNKNOWN: dict[str, tuple[str, Any, str]] = {
    "steps": ("pre_tokenizer", WHITESPACE, "its pre-tokenizer is none that llama.cpp has a name for"),
    "regex": ("pre_tokenizer", REGEX, "its pre-tokenizer is none that llama.cpp has a name for"),
    "normalizer": ("normalizer", normalizers.Lowercase(), "normalizes text"),
    "around": (
        "post_processor",
        processors.TemplateProcessing(single="$A ! !", special_tokens=[("!", 3)]),
        "other tokens around a text",
    ),
}


@pytest.mark.parametrize(("part", "value", "reason"), UNKNOWN.values(), ids=UNKNOWN)
def test_tokenizers_that_llama_cpp_would_run_otherwise_are_refused(
    part: str, value: Any, reason: str, tmp_path: Path
) -> None:
    backend = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
    setattr(backend, part, value)
    fast(backend).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=reason):
        there_and_back(tmp_path)


def test_tokenizers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("llama", vocab_size=600, eos_token_id=None)
    with pytest.raises(ValueError, match="no tokenizer there"):
        gguf_tokenizer.metadata_of(tmp_path, config)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names an end token"):
        gguf_tokenizer.metadata_of(tmp_path, config)
    with pytest.raises(ValueError, match="vocabulary ends at 99"):
        there_and_back(tmp_path, vocab_size=100)
    with pytest.raises(ValueError, match="'nonsense'; known here are"):
        gguf_tokenizer.save_tokenizer({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "nonsense"}, tmp_path)


def test_an_imported_tokenizer_belongs_to_its_model(exported: Path, llama: Path, tmp_path: Path) -> None:
    GgufSource(exported).copy_other_files(tmp_path)
    same_tokens(AutoTokenizer.from_pretrained(llama), AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize(("size", "kind"), [(64, "gguf-q2_0"), (128, "gguf-q2_0"), (256, "gguf-tq2_0")])
def test_scales_of_groups_come_back(size: int, kind: str, tmp_path: Path) -> None:
    model = gguf_models.model("llama", hidden_size=512, intermediate_size=1024)
    bitnet.replace_linear(model, group_size=size)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "m.gguf", kind, tokenizer=False, console=Console(quiet=True))
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "back", tokenizer=False, console=Console(quiet=True))
    back = bitnet.load(tmp_path / "back")
    assert next(m for m in back.modules() if isinstance(m, PackedBitLinear)).spec.group_size == size
    assert torch.equal(logits(back), logits(model))


def test_groups_that_a_type_cannot_hold_are_refused_before_a_byte_is_written(tmp_path: Path) -> None:
    model = gguf_models.model("llama")
    bitnet.replace_linear(model, group_size=64)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "hf")
    for kind, message in (("gguf-tq2_0", "take gguf-q2_0"), ("gguf-i2_s", "I2_S has one for the matrix")):
        with pytest.raises(ValueError, match=message):
            write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", kind, tokenizer=False)
    assert not (tmp_path / "m.gguf").exists()
