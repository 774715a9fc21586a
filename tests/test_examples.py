"""Each example runs, in little, and ends on a number that bears out what it says."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import bitnet

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the text, so that evaluation takes no time."""
    from bitnet.train import data, stdlib

    def little() -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
        text = "".join(f"def f{i}(x):\n    return x + {i * 7 % 13}\n" for i in range(400)).encode()
        tokens = torch.tensor([*text, stdlib.END] * 2, dtype=torch.int16)
        return tokens, tokens[:3000], {}

    monkeypatch.setattr(data, "corpus", little)


def test_examples_are_short_and_say_how_to_run_them() -> None:
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 120
        assert f"Run:  python examples/{path.name}" in text.split('"""')[1]


def test_from_scratch_serves_what_it_trained(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    printed = run("from_scratch.py", "--steps", "6", monkeypatch=monkeypatch, capsys=capsys)
    found = re.search(r"full precision ([\d.]+), 1.58 bit ([\d.]+), as served ([\d.]+)", printed)
    assert found is not None
    assert found[2] == found[3]
    assert Path("from-scratch/model.safetensors").exists()
    assert printed.count("a step changes") == 6


def test_finetune_takes_back_what_rounding_loses(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    flags = ["--float-steps", "30", "--steps", "20", "--lr", "1e-2"]
    printed = run("finetune.py", *flags, monkeypatch=monkeypatch, capsys=capsys)
    scores = {
        name: float(value) for name, value in re.findall(r"(float|rounded|fine-tuned|as served) ([\d.]+)", printed)
    }
    assert scores["float"] < scores["fine-tuned"] < scores["rounded"]
    assert scores["as served"] == scores["fine-tuned"]


def test_an_encoder_is_served_as_it_was_trained(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    printed = run("embedding.py", "--steps", "40", "--lr", "1e-3", monkeypatch=monkeypatch, capsys=capsys)
    scores = dict(re.findall(r"(rounded|calibrated|trained|as served) ([\d.]+)", printed))
    assert scores["as served"] == scores["trained"]
    assert float(scores["trained"]) > 0.1 + max(float(scores["rounded"]), float(scores["calibrated"]))
    assert bitnet.Encoder("embedding-1.58", pooling="mean")(["one", "two"]).shape == (2, 64)


def test_lora_learns_beside_packed_weights(monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("peft")
    printed = run("lora.py", "--base-steps", "20", "--steps", "20", monkeypatch=monkeypatch, capsys=capsys)
    scores = {name: float(value) for name, value in re.findall(r"(packed|with the adapter) ([\d.]+)", printed)}
    assert scores["with the adapter"] < 0.8 * scores["packed"]
    assert Path("lora/adapter/adapter_config.json").exists()


def test_finetune_takes_a_model_and_text_of_ones_own(tmp_path, monkeypatch, capsys) -> None:  # type: ignore[no-untyped-def]
    from tiny import llama

    from bitnet.train.stdlib import build_tokenizer

    llama(vocab_size=257).save_pretrained("mine")
    build_tokenizer().save_pretrained("mine")
    Path("text.txt").write_text("".join(f"line {i}\n" for i in range(3000)))
    flags = ["--model", "mine", "--data", "text.txt", "--steps", "4", "--out", "out"]
    printed = run("finetune.py", *flags, monkeypatch=monkeypatch, capsys=capsys)
    assert "fine-tuning took back" in printed
    assert (tmp_path / "out" / "tokenizer.json").exists()
