"""`bitnet chat`: what is typed is answered, commands do what they say, and mistakes cost one line."""

import asyncio
import json
from pathlib import Path

import pytest

pytest.importorskip("llguidance")

from servers import save_model

from bitnet import cli
from bitnet.serving.run import Options, load_text_model
from bitnet.serving.talk import Talk, read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("chat"))


def test_a_piped_conversation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "talk.json"
    typed = [
        "hello",
        "/again",
        "/system be brief",
        "one \\",
        "two",
        '"""',
        "three",
        "",
        "four",
        '"""',
        "/undo",
        "/nope",
    ]
    typed += ["/set temperature much", "/save", f"/save {saved}"]
    lines = iter(typed)

    def next_line(prompt: str = "") -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", next_line)
    assert cli.main(["chat", str(folder), "--temperature", "0", "--max-tokens", "6", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    turns = json.loads(saved.read_text())
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"]
    assert turns[1]["content"] == "one \ntwo"
    answers = out.split("\n")
    assert answers[0] == answers[1]  # /again at temperature 0
    assert err.count("tokens/s") == 4
    assert err.count("/help lists what there is") == 2
    assert "could not convert string to float" in err


def test_history_is_part_of_the_prompt_and_known_already(folder: Path) -> None:
    model = load_text_model(str(folder), Options(device="cpu", max_batch=1))
    talk = Talk(model, temperature=0, max_tokens=5)
    seen = []
    start = model.start

    async def spy(prompt: list[int], *args: object, **kwargs: object) -> list[object]:
        answers = await start(prompt, *args, **kwargs)
        seen.append(answers[0].request)
        return answers

    model.start = spy
    for text in ("a", "b"):
        asyncio.run(talk.say(text))
    assert len(seen[1].prompt) > len(seen[0].prompt) + 5
    assert seen[1].cached >= len(seen[0].prompt)
    with pytest.raises(ValueError, match="but a sequence holds 512"):
        asyncio.run(talk.say("x" * 600))
    assert [turn["role"] for turn in talk.turns] == ["user", "assistant"] * 2
    with pytest.raises(EOFError):
        talk.command("/exit")


def test_a_model_without_a_template_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["chat", str(save_model(tmp_path, template=False)), "--device", "cpu"]) == 1
    assert "has no chat template; `bitnet generate` continues plain text" in capsys.readouterr().err


def test_lines_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["a\\", "b\\", "c"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert read() == "a\nb\nc"
