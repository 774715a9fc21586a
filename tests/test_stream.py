"""Conversion of checkpoints on disk: the same bytes as in memory, whatever interrupts it."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import IDS, llama
from torch import Tensor, nn
from transformers import PreTrainedModel

import bitnet
from bitnet import cli
from bitnet.commands import convert as command
from bitnet.convert.checkpoint import read_headers
from bitnet.convert.conversion import convert as conversion
from bitnet.convert.conversion import jobs, journal, plan
from bitnet.convert.conversion.convert import convert_checkpoint
from bitnet.train.data import build_tokenizer

QUIET = Console(quiet=True)


def convert(source: Path, target: Path, to: str = "hub", **options: Any) -> Path:
    return convert_checkpoint(source, target, to, console=QUIET, **options)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def tensors(directory: Path) -> dict[str, Tensor]:
    return {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}


def write_forms(model: PreTrainedModel, root: Path, **options: Any) -> None:
    """The model as a float checkpoint, and as bitnet.save writes it in training and packed."""
    model.save_pretrained(root / "float")
    bitnet.replace_linear(model, **options)
    bitnet.save(model, root / "latent")
    bitnet.pack(model)
    bitnet.save(model, root / "hub")
    bitnet.save(model, root / "base3", weight_bits=1.6)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("forms")
    torch.manual_seed(0)
    write_forms(llama(), root)
    return root


@pytest.mark.parametrize("to", ["hub", "base3", "latent"])
@pytest.mark.parametrize("source", ["float", "latent", "hub", "base3"])
def test_the_result_is_what_saving_the_model_would_have_written(
    forms: Path, source: str, to: str, tmp_path: Path
) -> None:
    if to == "latent" and source in ("hub", "base3"):
        with pytest.raises(ValueError, match=r"q_proj, say\) are gone"):
            convert(forms / source, tmp_path / "out", to)
        assert not list(tmp_path.iterdir())
        return
    convert(forms / source, tmp_path / "out", to)
    ours, saved = tensors(tmp_path / "out"), tensors(forms / to)
    assert ours.keys() == saved.keys()
    assert all(ours[key].dtype == saved[key].dtype and torch.equal(ours[key], saved[key]) for key in saved)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", forms / to)]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    "options",
    [{"per_row": True}, {"weights": "binary"}, {"rms_norm": True}, {"skip": ["o_proj", r"layers\.0\..*"]}],
    ids=["per_row", "binary", "rms_norm", "skip"],
)
@pytest.mark.parametrize("to", ["hub", "base3", "latent"])
def test_options_of_the_layers_travel(options: dict[str, Any], to: str, tmp_path: Path) -> None:
    write_forms(llama(intermediate_size=26), tmp_path, **options)
    sources = ["latent"] if options.get("rms_norm") else ["latent", "float"]  # the norm's weight is in no float file
    for source in sources:
        convert(tmp_path / source, tmp_path / f"from-{source}", to, **(options if source == "float" else {}))
        ours, saved = tensors(tmp_path / f"from-{source}"), tensors(tmp_path / to)
        assert ours.keys() == saved.keys()
        assert all(torch.equal(ours[key], saved[key]) for key in saved)
        assert torch.equal(logits(bitnet.load(tmp_path / f"from-{source}")), logits(bitnet.load(tmp_path / to)))


@pytest.mark.parametrize("source", ["latent", "hub", "base3"])
def test_bf16_is_codes_times_scale_and_an_ordinary_model(forms: Path, source: str, tmp_path: Path) -> None:
    convert(forms / source, tmp_path / "out", "bf16")
    packed = bitnet.load(forms / "hub")
    bitnet.unpack(packed, torch.bfloat16)
    expected = {name: value.bfloat16() for name, value in packed.state_dict().items()}
    found = tensors(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("to", ["hub", "base3", "bf16"])
def test_an_int8_head_goes_along(tied: bool, to: str, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=tied)
    bitnet.replace_linear(model)
    bitnet.pack(model, head="int8")
    bitnet.save(model, tmp_path / "source")
    loaded = bitnet.load(convert(tmp_path / "source", tmp_path / "out", to))
    if to == "bf16":
        bitnet.unpack(model, torch.bfloat16)
        assert torch.equal(loaded.get_output_embeddings().weight, model.get_output_embeddings().weight)
        assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight.bfloat16())
    else:
        assert torch.equal(logits(loaded), logits(model))


def test_shards_keep_to_their_size_and_hold_everything_once(forms: Path, tmp_path: Path) -> None:
    convert(forms / "float", tmp_path / "out", max_shard_size="3KB")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {file.name: load_file(file) for file in files}
    assert len(files) > 2
    for state in held.values():
        assert sum(t.nbytes for t in state.values()) <= 3000 or len(state) == 1
    assert index["weight_map"] == {key: name for name, state in held.items() for key in state}
    assert index["metadata"]["total_size"] == sum(t.nbytes for state in held.values() for t in state.values())
    for name, state in held.items():  # a layer's codes and its scale are where one job put them
        assert {key + "_scale" for key in state if state[key].dtype == torch.uint8} <= state.keys(), name
    assert torch.equal(logits(bitnet.load(tmp_path / "out")), logits(bitnet.load(forms / "hub")))


def test_every_tensor_is_aligned_for_readers_that_map_the_file(tmp_path: Path) -> None:
    model = llama(hidden_size=12, intermediate_size=10, num_attention_heads=2, num_key_value_heads=1)
    model.save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", "base3")
    headers = read_headers([tmp_path / "out" / "model.safetensors"])
    assert any(header.dtype == "U8" and header.shape[0] * header.shape[1] % 4 for header in headers.values())
    assert all(header.offset % jobs.WIDTHS[header.dtype] == 0 for header in headers.values())


def test_the_number_of_workers_changes_no_byte(forms: Path, tmp_path: Path) -> None:
    results = [contents(convert(forms / "float", tmp_path / str(n), workers=n)) for n in (1, 2, 5)]
    assert results[0] == results[1] == results[2]


def test_the_tokenizer_goes_along_and_pickles_do_not(forms: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name, data in contents(forms / "float").items():
        (source / name).write_bytes(data)
    others = {"tokenizer.json": b"{}", "chat_template.jinja": b"x", "merges.txt": b"y", "tokenizer.model": b"z"}
    for name, data in (others | {"pytorch_model.bin": b"p", "old.gguf": b"g", ".cache": b"c"}).items():
        (source / name).write_bytes(data)
    convert(source, tmp_path / "out")
    left = {"config.json", "generation_config.json", "model.safetensors"}
    assert contents(tmp_path / "out").keys() == others.keys() | left
    assert others.items() <= contents(tmp_path / "out").items()


# 1bitLLM


def one_bit_llm(directory: Path) -> Callable[[Tensor], Tensor]:
    """A checkpoint as 1bitLLM/bitnet_b1_58-* are, and its forward pass, written after their modeling_bitnet.py."""
    torch.manual_seed(0)
    d, inter, heads, layers, eps, theta = 16, 24, 2, 2, 1e-5, 10000.0
    state = {"model.embed_tokens.weight": torch.randn(64, d), "model.norm.weight": 1 + 0.1 * torch.randn(d)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name in ("q", "k", "v", "o"):
            state[f"{layer}.self_attn.{name}_proj.weight"] = torch.randn(d, d)
        for name, n, k in (("gate", inter, d), ("up", inter, d), ("down", d, inter)):
            state[f"{layer}.mlp.{name}_proj.weight"] = torch.randn(n, k)
        norms = (("input_layernorm", d), ("post_attention_layernorm", d), ("self_attn.inner_attn_ln", d))
        for name, size in (*norms, ("mlp.ffn_layernorm", inter)):
            state[f"{layer}.{name}.weight"] = 1 + 0.1 * torch.randn(size)
        state[f"{layer}.self_attn.rotary_emb.inv_freq"] = theta ** (-torch.arange(0, d // heads, 2) / (d // heads))
    config = {"architectures": ["BitnetForCausalLM"], "model_type": "llama", "torch_dtype": "float32"}
    config |= {"hidden_size": d, "intermediate_size": inter, "num_hidden_layers": layers, "vocab_size": 64}
    config |= {"num_attention_heads": heads, "num_key_value_heads": heads, "hidden_act": "silu", "rms_norm_eps": eps}
    config |= {"rope_theta": theta, "rope_scaling": None, "tie_word_embeddings": True, "max_position_embeddings": 128}
    config |= {"weight_bits": 1, "input_bits": 8, "attention_bias": False, "bos_token_id": 1, "eos_token_id": 2}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(state, directory / "model.safetensors", {"format": "pt"})

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * state[f"{name}.weight"]

    def linear(x: Tensor, name: str) -> Tensor:
        w = state[f"{name}.weight"]
        s = 1 / w.abs().mean().clamp(min=1e-5)
        t = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5)
        return F.linear((x * t).round().clamp(-128, 127) / t, (w * s).round().clamp(-1, 1) / s)

    def forward(ids: Tensor) -> Tensor:
        x = state["model.embed_tokens.weight"][ids[0]]
        n = len(x)
        angles = torch.arange(n)[:, None] * state["model.layers.0.self_attn.rotary_emb.inv_freq"]
        cos, sin = (torch.cat([f(angles)] * 2, dim=-1) for f in (torch.cos, torch.sin))

        def rotate(t: Tensor) -> Tensor:
            a, b = t.chunk(2, dim=-1)
            return t * cos + torch.cat([-b, a], dim=-1) * sin

        for i in range(layers):
            layer = f"model.layers.{i}"
            h = norm(x, f"{layer}.input_layernorm")
            q, k, v = (linear(h, f"{layer}.self_attn.{name}_proj").view(n, heads, -1).transpose(0, 1) for name in "qkv")
            scores = rotate(q) @ rotate(k).transpose(1, 2) / (d // heads) ** 0.5
            scores = scores.masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -torch.inf)
            h = (scores.softmax(-1) @ v).transpose(0, 1).reshape(n, d)
            x = x + linear(norm(h, f"{layer}.self_attn.inner_attn_ln"), f"{layer}.self_attn.o_proj")
            h = norm(x, f"{layer}.post_attention_layernorm")
            h = F.silu(linear(h, f"{layer}.mlp.gate_proj")) * linear(h, f"{layer}.mlp.up_proj")
            x = x + linear(norm(h, f"{layer}.mlp.ffn_layernorm"), f"{layer}.mlp.down_proj")
        return F.linear(norm(x, "model.norm"), state["model.embed_tokens.weight"])

    return forward


@pytest.mark.parametrize("to", ["hub", "base3", "latent", "as it is"])
def test_1bitllms_models_compute_what_their_own_code_computes(to: str, tmp_path: Path) -> None:
    forward = one_bit_llm(tmp_path / "source")
    source = tmp_path / "source"
    model = bitnet.load(source if to == "as it is" else convert(source, tmp_path / "out", to))
    assert model.config.model_type == "bitnet"
    expected = forward(IDS)
    # float32 against float32 in another order: an int8 code may step (1/127 of a layer's largest input), no more
    assert float((logits(model)[0] - expected).abs().max() / expected.abs().max()) < 2 / 127


def test_1bitllms_models_can_be_saved_and_loaded_again(tmp_path: Path) -> None:
    one_bit_llm(tmp_path / "source")
    model = bitnet.load(tmp_path / "source")
    bitnet.save(model, tmp_path / "saved")
    assert torch.equal(logits(bitnet.load(tmp_path / "saved")), logits(model))


def test_1bitllm_models_with_other_bits_are_refused(tmp_path: Path) -> None:
    one_bit_llm(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"input_bits": 4}))
    with pytest.raises(ValueError, match="input_bits 4"):
        convert(tmp_path / "source", tmp_path / "out")


# What is refused, before anything is written


def edited(forms: Path, target: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> Path:
    """The float checkpoint with other tensors or another config."""
    state = load_file(forms / "float" / "model.safetensors")
    config = json.loads((forms / "float" / "config.json").read_text())
    change(state, config)
    target.mkdir()
    save_file(state, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


UP = "model.layers.1.mlp.up_proj"
BAD: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, Any]], Any], str]] = {
    "missing": (lambda state, config: state.pop(f"{UP}.weight"), f"there is no tensor {UP}.weight"),
    "other_method": (
        lambda state, config: config.update(quantization_config={"quant_method": "gptq", "bits": 4}),
        "is quantized by 'gptq'",
    ),
    "unknown_model": (lambda state, config: config.update(model_type="nonesuch"), "model_type 'nonesuch' is none of"),
    "no_class": (lambda state, config: config.update(architectures=["NoSuchModel"]), "no model class 'NoSuchModel'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_source_that_cannot_be_converted_leaves_nothing_behind(forms: Path, name: str, tmp_path: Path) -> None:
    change, message = BAD[name]
    source = edited(forms, tmp_path / "source", change)
    with pytest.raises(ValueError, match=re.escape(message)):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_nan_is_found_and_named_and_no_checkpoint_appears(forms: Path, tmp_path: Path) -> None:
    source = edited(forms, tmp_path / "source", lambda state, _: state[f"{UP}.weight"].view(-1)[7:8].fill_(torch.nan))
    with pytest.raises(ValueError, match=f"{UP}: .*1 NaN or Inf"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_there_already_is_not_touched(forms: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists already"):
        convert(forms / "float", tmp_path / "out")
    assert contents(tmp_path / "out") == {"precious": b"mine"}
    (tmp_path / "out" / "precious").unlink()
    assert convert(forms / "float", tmp_path / "out").exists()  # an empty folder is as good as none


def test_too_small_a_disk_is_noticed_before_writing(forms: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(OSError, match=r"needs .* GB more, but the disk has 0.0 GB free"):
        convert(forms / "float", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("size", ["huge", "0GB", "-1", ""])
def test_a_senseless_shard_size_is_refused(forms: Path, size: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_size must be a size such as"):
        convert(forms / "float", tmp_path / "out", max_shard_size=size)


def test_norms_that_would_have_to_be_trained_are_not_added(forms: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"rms_norm=True adds norms.*replace_linear\(model, rms_norm=True\), and train"
    ):
        convert(forms / "float", tmp_path / "out", rms_norm=True)
    assert not (tmp_path / "out").exists()


def test_sizes_are_decimal() -> None:
    assert [conversion._bytes(size) for size in ("5GB", "1.5 mb", "200", 7, "3K")] == [5 * 10**9, 1500000, 200, 7, 3000]


@pytest.mark.parametrize("to", ["hub", "base3", "bf16", "gguf-q2_0"])
def test_a_damaged_source_is_converted_with_a_warning(forms: Path, to: str, tmp_path: Path, capsys: Any) -> None:
    """As some uploads are: every byte of a layer zero. And a scale that is far from the others."""
    model = llama(hidden_size=64, intermediate_size=128, vocab_size=257)
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "source")
    build_tokenizer().save_pretrained(tmp_path / "source")
    state = load_file(tmp_path / "source" / "model.safetensors")
    state[f"{UP}.weight"].zero_()
    state["model.layers.0.mlp.up_proj.weight_scale"] *= 200
    save_file(state, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    convert_checkpoint(tmp_path / "source", tmp_path / "out", to)
    told = capsys.readouterr().err
    assert f"warning: {UP}: every weight is -1; the checkpoint is probably damaged" in told
    assert "warning: model.layers.0.mlp.up_proj: its scale of " in told
    assert told.count("warning") == 2


# Interruptions


def test_a_full_disk_leaves_the_source_and_resume_goes_on(forms: Path, tmp_path: Path, monkeypatch: Any) -> None:
    before, whole = contents(forms / "float"), contents(convert(forms / "float", tmp_path / "whole"))
    write, calls = os.pwrite, []

    def full(handle: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match=r"No space left on device; what is finished is kept in .*--resume"):
        convert(forms / "float", tmp_path / "out", workers=1)
    monkeypatch.setattr(os, "pwrite", write)
    assert not (tmp_path / "out").exists()
    assert contents(forms / "float") == before
    with pytest.raises(FileExistsError, match=r"go on with resume=True \(--resume\), or remove that folder"):
        convert(forms / "float", tmp_path / "out")
    runs: list[str] = []
    original = journal.Work.write
    monkeypatch.setattr(
        journal.Work, "write", lambda self, job, values: (runs.append(job.name), original(self, job, values))
    )
    convert(forms / "float", tmp_path / "out", resume=True)
    assert 0 < len(runs) < len(load_file(forms / "float" / "model.safetensors"))  # what was done is not done again
    assert contents(tmp_path / "out") == whole
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


@pytest.mark.parametrize("change", ["options", "source"])
def test_resume_mixes_no_two_conversions(forms: Path, change: str, tmp_path: Path, monkeypatch: Any) -> None:
    source = edited(forms, tmp_path / "source", lambda state, config: None)
    monkeypatch.setattr(journal.Work, "finish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(source, tmp_path / "out")
    monkeypatch.undo()
    if change == "source":
        save_file(tensors(forms / "float"), source / "model.safetensors", {"format": "pt", "other": "x"})
    with pytest.raises(ValueError, match="of another source, or with other options"):
        convert(source, tmp_path / "out", "base3" if change == "options" else "hub", resume=True)
    assert not (tmp_path / "out").exists()


def test_a_journal_that_was_cut_off_in_a_line_is_read_up_to_it(forms: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole = contents(convert(forms / "float", tmp_path / "whole"))
    monkeypatch.setattr(journal.Work, "finish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(forms / "float", tmp_path / "out")
    monkeypatch.undo()
    # The beginning of a longer name can be the name of another job, whose data are not there.
    (tmp_path / ".out-converting" / "journal").write_text("model.embed_tokens.weight")
    file = tmp_path / ".out-converting" / "files" / "model.safetensors"
    file.write_bytes(bytes(file.stat().st_size))
    convert(forms / "float", tmp_path / "out", resume=True)
    assert contents(tmp_path / "out") == whole


def test_files_that_lost_their_end_are_made_again_whatever_the_journal_says(
    forms: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    whole = contents(convert(forms / "float", tmp_path / "whole", max_shard_size="3KB"))
    monkeypatch.setattr(journal.Work, "finish", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(forms / "float", tmp_path / "out", max_shard_size="3KB")
    monkeypatch.undo()
    first, second, *_ = sorted((tmp_path / ".out-converting" / "files").glob("*.safetensors"))
    with first.open("r+b") as opened:
        opened.truncate(600)
    second.unlink()
    convert(forms / "float", tmp_path / "out", max_shard_size="3KB", resume=True)
    assert contents(tmp_path / "out") == whole


def test_a_journal_of_files_that_are_gone_is_not_believed(forms: Path, tmp_path: Path, monkeypatch: Any) -> None:
    whole = contents(convert(forms / "float", tmp_path / "whole"))
    for module in (journal, conversion):
        monkeypatch.setattr(module, "dissolve", lambda *args: 1 / 0)  # as if killed just before
    with pytest.raises(ZeroDivisionError):
        convert(forms / "float", tmp_path / "out")
    monkeypatch.undo()
    assert contents(tmp_path / "out") == whole
    assert (tmp_path / ".out-converting" / "journal").exists()
    for path in (tmp_path / "out").iterdir():
        path.unlink()
    assert contents(convert(forms / "float", tmp_path / "out")) == whole
    assert not (tmp_path / ".out-converting").exists()


KILLED = """
import os, sys
import torch
torch.set_num_threads(1)
from rich.console import Console
from bitnet.convert.conversion import convert as conversion, journal
journal.SYNC = 1  # note every job at once, so that there is something to go on with
source, target, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
for line in sys.stdin:  # a child each: importing everything once takes longer than twenty conversions
    child = os.fork()
    if not child:
        conversion.convert_checkpoint(source, target, resume=True, workers=2, console=Console(quiet=True))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def test_killed_at_any_moment_it_leaves_no_checkpoint_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    model = llama(hidden_size=128, intermediate_size=256, num_hidden_layers=12)
    model.save_pretrained(tmp_path / "source")
    whole = contents(convert(tmp_path / "source", tmp_path / "whole", max_shard_size="200KB"))
    target = tmp_path / "out"
    code = KILLED.replace("resume=True", "resume=True, max_shard_size='200KB'")
    command = [sys.executable, "-c", code, str(tmp_path / "source"), str(target), "20"]
    rng = random.Random(0)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        kills, finished, slowest = 0, 0, 0.6
        while kills < 20:
            parent.stdin.write("\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())
            timer = threading.Timer(rng.uniform(0.0, slowest), os.kill, (child, signal.SIGKILL))
            timer.start()
            status = int(parent.stdout.readline())
            timer.cancel()
            if status == 0:
                assert contents(target) == whole
                for path in target.iterdir():
                    path.unlink()
                target.rmdir()
                finished, slowest = finished + 1, slowest * 0.8
                assert finished < 20, "the kills all come too late"
            else:
                assert os.WTERMSIG(status) == signal.SIGKILL
                kills += 1
                if target.exists():  # killed between the name and the end of the process
                    assert contents(target) == whole
                    for path in target.iterdir():
                        path.unlink()
                    target.rmdir()
                for folder in tmp_path.iterdir():  # nothing anywhere that loads as if it were complete
                    if folder.name not in ("source", "whole"):
                        with pytest.raises((FileNotFoundError, ValueError)):
                            bitnet.load(folder)
        parent.stdin.close()
    if not target.exists():
        convert(tmp_path / "source", target, max_shard_size="200KB", resume=True)
    assert contents(target) == whole


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads peak memory as Linux counts it")
@pytest.mark.parametrize("to", ["hub", "base3", "bf16"])
def test_memory_does_not_grow_with_the_model(to: str, tmp_path: Path) -> None:
    """1.5 times the largest tensor in float32 and 500 MB, for a checkpoint of 1.6 GB whose largest has 16 M weights."""
    model = llama(hidden_size=2048, intermediate_size=8192, num_hidden_layers=8, vocab_size=4096).bfloat16()
    model.save_pretrained(tmp_path / "source", max_shard_size="400MB")
    del model
    code = """
import re, sys
from bitnet.convert.conversion.convert import convert_checkpoint
convert_checkpoint(*sys.argv[1:])
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / "out"), to]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    assert int(done.stdout) < 1.5 * 4 * 2048 * 8192 + 500e6


# The command


def test_the_command_offers_every_form() -> None:
    assert sorted(command.FORMS) == sorted(plan.TARGETS)


def test_the_command_converts_and_says_what_it_did(forms: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = [
        "convert",
        str(forms / "float"),
        str(tmp_path / "out"),
        "--to",
        "base3",
        "--skip",
        "o_proj",
        "--per-row",
    ]
    assert cli.main(arguments) == 0
    told = capsys.readouterr().err
    assert "skipped by request" in told
    assert "rounded, not trained" in told
    model = bitnet.load(tmp_path / "out")
    layer = model.model.layers[0]
    assert type(layer.self_attn.o_proj) is nn.Linear
    assert layer.mlp.up_proj.weight_scale.shape == (24,)
    assert cli.main(arguments) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"bitnet convert: /.*/out exists already; remove it or choose another name$", told)
