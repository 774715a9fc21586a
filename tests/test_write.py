"""`bitnet write`: what a model writes, and that it goes on where it stopped."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import llama

import bitnet
from bitnet import cli
from bitnet.jobs import write as job
from bitnet.train import texts
from bitnet.train.stdlib import build_tokenizer

QUIET = Console(quiet=True)
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module", params=["float", "packed"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("writer")
    torch.manual_seed(0)
    model = llama(vocab_size=257)
    if request.param == "packed":
        bitnet.replace_linear(model)
        bitnet.pack(model)
    model.save_pretrained(path)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


def write(folder: Path, out: Path, **changes: Any) -> list[str]:
    chosen = {"tokens": 150, "length": 24, "batch": 3, "device": "cpu", "console": QUIET, **changes}
    job.write(folder, out, **chosen)
    return [json.loads(line)["text"] for line in out.read_text(encoding="utf-8").splitlines()]


def test_documents_are_as_many_and_as_long_as_asked_for_and_can_be_trained_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.jsonl"
    found = write(folder, out)
    tokenizer = build_tokenizer()
    lengths = [len(tokenizer(text)["input_ids"]) for text in found]
    assert len(found) % 3 == 0
    assert sum(lengths[:-3]) < 150 <= sum(lengths)
    assert len(set(found)) == len(found)
    assert "<|end|>" not in "".join(found)
    read = [text for text, _ in texts.documents([out])]
    assert read == found


def test_the_first_tokens_are_any_word_and_then_the_likeliest(folder: Path, tmp_path: Path) -> None:
    """All bytes of a document may be replaced in decoding, so the ids are looked at, not the text."""
    model, tokenizer = job.runnable(folder, device="cpu")
    kept: list[torch.Tensor] = []
    original = model.generate
    model.generate = lambda ids, **options: (kept.append(original(ids, **options)), kept[-1])[1]
    with torch.inference_mode():
        torch.manual_seed(0)
        job._prose(model, tokenizer, 64, 12, 1.0)
    begun = kept[0]
    start = len(texts.prefix(tokenizer))
    assert begun[:, start].unique().numel() > 40
    assert not bool((begun[:, start:] == tokenizer.eos_token_id).any())
    with torch.inference_mode():
        for length in range(start + 1, begun.shape[1]):
            scores = model(input_ids=begun[:, :length]).logits[:, -1].clone()
            scores[:, tokenizer.eos_token_id] = -torch.inf
            assert torch.equal(scores.argmax(-1), begun[:, length])


def test_conversations_are_the_models_own_questions_and_answers(folder: Path, tmp_path: Path) -> None:
    found = write(folder, tmp_path / "own.jsonl", chat=0.5, tokens=400)
    talks = [text.startswith("<user>") for text in found]
    assert talks[:6] == [False] * 3 + [True] * 3
    for text in (text for text in found if text.startswith("<user>")):
        question, _, answer = text.removeprefix("<user>").partition("</user><assistant>")
        assert question
        assert answer


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(folder: Path, tmp_path: Path, cut: int) -> None:
    wanted = write(folder, tmp_path / "whole.jsonl", chat=0.5)
    out = tmp_path / "own.jsonl"
    write(folder, out, chat=0.5, tokens=40)
    lines = out.read_bytes()
    out.write_bytes(lines[: len(lines) - cut])
    assert write(folder, out, chat=0.5, resume=True) == wanted
    assert write(folder, out, chat=0.5, resume=True) == wanted, "and a finished one adds nothing"


def test_what_cannot_be_is_refused_and_nothing_is_lost(folder: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "own.jsonl"
    before = write(folder, out)
    for changes, words in (
        ({}, "is there already; go on with it with --resume"),
        ({"resume": True, "seed": 1}, "was begun with seed 0"),
        ({"tokens": 0}, "--tokens and --batch must be at least 1"),
        ({"length": 5}, "--length more than 5"),
    ):
        with pytest.raises(ValueError, match=words):
            write(folder, out, **changes)
    assert [json.loads(line)["text"] for line in out.read_text().splitlines()] == before
    command = ["write", str(folder), str(tmp_path / "two.jsonl"), "--tokens", "20", "--length", "12", "--batch", "2"]
    assert cli.main([*command, "--device", "cpu"]) == 0
    assert "Next: bitnet train" in capsys.readouterr().err
    (folder / "chat_template.jinja").rename(tmp_path / "away")
    try:
        with pytest.raises(ValueError, match="has no chat template"):
            write(folder, tmp_path / "three.jsonl", chat=1.0)
        assert not list(tmp_path.glob("three*"))
    finally:
        (tmp_path / "away").rename(folder / "chat_template.jinja")
