import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import llama, mixtral
from transformers import LlamaConfig, LlamaForCausalLM

import bitnet
from bitnet import cli
from bitnet.experts import PackedStack
from bitnet.kernels.gpu.layout import BASE3, INT8, TWO_BITS
from bitnet.packed import PackedBitLinear
from bitnet.train.data import VOCABULARY, build_tokenizer
from bitnet.tuning import shapes_of


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny packed byte-level model with a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=256,
        pad_token_id=256,
    )
    model = LlamaForCausalLM(config)
    bitnet.replace_linear(model)
    bitnet.pack(model)
    path = bitnet.save(model, tmp_path_factory.mktemp("model") / "packed")
    build_tokenizer().save_pretrained(path)
    return path


def test_the_package_is_the_command_and_help_imports_nothing_heavy() -> None:
    """`python -m bitnet` in the repository's root, which is then first on sys.path, its folder kernels/ included."""
    command = [sys.executable, "-X", "importtime", "-m", "bitnet", "--help"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: bitnet ")
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert {"argparse", "bitnet.cli"} <= imported  # the list is one
    assert not imported & {"torch", "transformers", "numpy", "rich", "kernels"}


def test_info_names_every_backend_with_its_state(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for row in bitnet.backends():
        state = "ready" if row.ready else "missing"
        assert re.search(rf"^  {row.name} +{state}: {re.escape(row.detail)} *$", text, re.M)
    assert torch.__version__ in text


def test_tokenizer_tokens_are_the_bytes_of_any_text(checkpoint: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = "def f(x):\n\treturn 'zażółć 漢字 🙂'  # 3  spaces"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_garbage_is_collected_again_once_a_model_is_loaded(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where loading fails."""
    from bitnet.serving import run
    from bitnet.serving.generate import TextStreamer

    seen, load, end = [], run.load, TextStreamer.end
    monkeypatch.setattr(run, "load", lambda *args, **kwargs: seen.append(gc.isenabled()) or load(*args, **kwargs))
    monkeypatch.setattr(TextStreamer, "end", lambda self: seen.append(gc.isenabled()) or end(self))
    assert cli.main(["generate", str(checkpoint), "def ", "--max-new-tokens", "1", "--device", "cpu"]) == 0
    assert seen == [False, True]
    assert cli.main(["generate", str(checkpoint), "def ", "--backend", "abacus", "--device", "cpu"]) == 1
    assert seen == [False, True, False]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_generate_streams_what_the_model_says(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", str(checkpoint), "def ", "--max-new-tokens", "8", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    model, prompt = bitnet.load(checkpoint), torch.tensor([list(b"def ")])
    with torch.no_grad():
        for _ in range(8):  # greedy, without generate()
            prompt = torch.cat([prompt, model(prompt).logits[:, -1:].argmax(-1)], dim=1)
    expected = bytes(t for t in prompt[0].tolist() if t < 256).decode(errors="replace")
    assert printed.out.rstrip("\n") == expected.rstrip("\n")
    assert "tokens/s" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "no/such/dir", "x"], "no/such/dir: no such folder or file"),
        (["generate", "CHECKPOINT", "x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["generate", "CHECKPOINT", ""], "the prompt is empty"),
        (["generate", "CHECKPOINT", "x", "--backend", "abacus"], "unknown backend 'abacus'"),
        (["serve", "no/such/dir"], "no/such/dir: no such folder or file"),
        (["quickstart", "--steps", "0"], "--steps must be at least 1"),
        (["tune", "no/such/dir"], "no/such/dir: no such folder or file"),
        (["tune", "8x0"], "8x0: an empty shape"),
        (["tune", "8x8", "--tokens", "1", "0"], "--tokens must be at least 1, got 0"),
        pytest.param(
            ["tune", "CHECKPOINT"],
            "there is nothing to tune here: torch sees no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_mistakes_end_in_one_line_and_status_1(
    arguments: list[str], message: str, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(checkpoint) if a == "CHECKPOINT" else a for a in arguments]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert error[-1].startswith(f"bitnet {arguments[0]}: ")


def test_tune_finds_the_shapes_of_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    shapes = {(16, 16, TWO_BITS), (24, 16, TWO_BITS), (16, 24, TWO_BITS)}
    assert set(shapes_of(str(checkpoint), TWO_BITS)) == shapes
    model = bitnet.load(checkpoint)
    bitnet.pack(model, head="int8")
    assert set(shapes_of(str(bitnet.save(model, tmp_path / "head")), TWO_BITS)) == {*shapes, (VOCABULARY, 16, INT8)}
    assert shapes_of("512x40", BASE3) == [(512, 40, BASE3)]
    base3 = bitnet.save(bitnet.load(checkpoint), tmp_path / "base3", weight_bits=1.6)
    with pytest.raises(ValueError, match=r"give the shapes instead.*bitnet tune 14336x4096"):
        shapes_of(str(base3), TWO_BITS)


def test_tune_finds_the_shapes_that_layers_and_experts_have_when_they_run(tmp_path: Path) -> None:
    for name, model in (("odd", llama(intermediate_size=26, num_key_value_heads=1)), ("experts", mixtral())):
        bitnet.replace_linear(model)
        bitnet.pack(model)
        bitnet.save(model, tmp_path / name)
        parts = [m for m in model.modules() if isinstance(m, PackedBitLinear | PackedStack)]
        shapes = {(part.out_features, part.in_features, TWO_BITS) for part in parts}
        assert set(shapes_of(str(tmp_path / name), TWO_BITS)) == shapes
    assert (26, 16, TWO_BITS) in shapes_of(str(tmp_path / "odd"), TWO_BITS)
    assert (48, 16, TWO_BITS) in shapes_of(str(tmp_path / "experts"), TWO_BITS)


def test_quickstart_leaves_models_report_and_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from bitnet.quickstart import run

    tiny = run.Settings(hidden=32, intermediate=48, layers=1, heads=2, context=32, batch=2, evaluation_bytes=1024)
    monkeypatch.setattr(run, "Settings", lambda **changes: quickstart_settings(tiny, changes))
    report = run.run(tmp_path, seed=1, steps=4)
    assert report == json.loads((tmp_path / "report.json").read_text())
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert report["settings"]["seed"] == 1
    assert len(report["losses"]["ternary"]) == 4
    assert report["logits_difference"] == 0
    # 8 times smaller, but for one float32 scale a layer
    assert 7.5 < report["times_smaller_than_bf16"] < 8
    printed = capsys.readouterr().out
    for name in ("full precision", "1.58 bit"):  # no terminal, so progress is in lines
        assert f"{name}: 0/4 steps (0 %)\n" in printed
        end = r"4/4 steps \(100 %\), [\d.]+ bits/byte, [\d,]+ tokens/s, [\d.]+ steps/s, 0:00:\d\d elapsed"
        assert re.search(f"^{re.escape(name)}: {end}$", printed, re.M)
    for name in ("full", "ternary"):
        assert report["models"][name]["disk_bytes"] == (tmp_path / name / "model.safetensors").stat().st_size


def quickstart_settings(settings, changes):  # type: ignore[no-untyped-def]
    from dataclasses import replace

    return replace(settings, **changes)


@pytest.mark.slow
def test_quickstart_keeps_its_promises(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bitnet", "quickstart", "--out", str(tmp_path)]
    subprocess.run(command, check=True)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["models"]["full"]["bits_per_byte"] <= 1.85
    assert report["gap_percent"] <= 6
    assert report["times_smaller_than_bf16"] >= 7.9


def test_options_of_layers_reach_a_conversion(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama(hidden_size=32, intermediate_size=64).save_pretrained(tmp_path / "float")
    options = [
        "--to",
        "hub",
        "--no-tokenizer",
        "--weights",
        "binary",
        "--activation-bits",
        "none",
        "--group-size",
        "32",
    ]
    assert cli.main(["convert", str(tmp_path / "float"), str(tmp_path / "out"), *options]) == 0
    spec = bitnet.load(tmp_path / "out").model.layers[0].mlp.up_proj.spec
    assert (spec.weights, spec.activation_bits, spec.group_size) == ("binary", None, 32)
