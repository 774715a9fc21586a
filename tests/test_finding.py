"""Names that people type: what is here comes first, then the Hub's cache, and each failure is one sentence with a
remedy."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from servers import save_model

import bitnet
from bitnet.convert import finding
from bitnet.convert.finding import find
from bitnet.convert.folders import find_folder
from bitnet.jobs.evaluate import evaluate
from bitnet.jobs.train import REPORT, resume, train
from bitnet.jobs.write import write
from bitnet.train.options import TrainOptions

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache as huggingface_hub keeps it: org/tiny in two revisions, and org/files with GGUF files only."""
    home = tmp_path_factory.mktemp("home")
    for revision, commit in COMMITS.items():
        folder = home / "hub" / "models--org--tiny"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        save_model(folder / "snapshots" / commit, num_hidden_layers=1 + (revision == "v2"))
    tiny = home / "hub" / "models--org--tiny" / "snapshots" / COMMITS["main"]
    folder = home / "hub" / "models--org--files"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c" * 40)
    (folder / "snapshots" / ("c" * 40)).mkdir(parents=True)
    bitnet.convert_checkpoint(tiny, folder / "snapshots" / ("c" * 40) / "x.gguf", "gguf-bf16", tokenizer=False)
    return home


@pytest.fixture
def offline(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return home / "hub"


def test_a_name_means_what_is_cached(offline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    snapshots = offline / "models--org--tiny" / "snapshots"
    assert find("org/tiny") == snapshots / COMMITS["main"]
    assert find("org/tiny@v2") == snapshots / COMMITS["v2"]
    assert find("org/files/x.gguf").name == "x.gguf"
    assert find("org/files").name == "x.gguf"  # the only one
    assert bitnet.load("org/tiny@v2").config.num_hidden_layers == 2
    assert len(bitnet.inspect_checkpoint("org/tiny").matrices) > 5
    bitnet.convert_checkpoint("org/tiny", tmp_path / "out", "bf16")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert find("org/tiny") == Path("org/tiny")  # what is here comes first


def test_a_gguf_file_is_loaded_and_converted_once(offline: Path) -> None:
    file = find("org/files/x.gguf")
    folder = find_folder(file)
    assert find_folder("org/files") == folder
    model, plain = bitnet.load(file), bitnet.load("org/tiny")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert (model(ids).logits - plain(ids).logits).abs().max() < 0.1 * plain(ids).logits.abs().max()


@pytest.mark.parametrize("name", ["nothing/here", "org/tiny@v3", "org/tiny/none.gguf", "org/files/none.gguf"])
def test_what_is_not_cached_and_cannot_be_asked_for_is_one_sentence(offline: Path, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="cannot be reached now") as caught:
        find(name)
    assert str(caught.value).startswith(name)


@pytest.mark.parametrize(
    "name", ["nowhere", "a/b/c", "/no/such", "org/tiny.gguf/x", "c:/x", "org/na me", Path("org/tiny")]
)
def test_what_is_no_name_on_the_hub_is_not_asked_for(offline: Path, name: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder or file"):
        find(name)


def failing(error: Exception) -> Callable[..., None]:
    def call(*args: object, **kwargs: object) -> None:
        raise error

    return call


def test_the_hubs_refusals_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx
    from huggingface_hub import errors

    answer = httpx.Response(403, request=httpx.Request("GET", "https://huggingface.co/x"))
    for error, words in (
        (errors.GatedRepoError("x", response=answer), "accept its terms on https://huggingface.co/org/x"),
        (errors.RepositoryNotFoundError("x", response=answer), "no such model on the Hugging Face Hub"),
        (errors.RevisionNotFoundError("x", response=answer), "has no revision 'r'"),
        (errors.HfHubHTTPError("out of order", response=answer), "did not answer as it should: out of order"),
        (OSError("no space left on device"), "no space left on device"),
    ):
        monkeypatch.setattr(finding, "snapshot_download", failing(error))
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            find("org/x@r")


def test_a_repository_of_several_files_asks_which(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        huggingface_hub.HfApi, "list_repo_files", lambda *args, **kwargs: ["a.gguf", "b/c.gguf", "README.md"]
    )
    with pytest.raises(ValueError, match=r"2 GGUF files; name one: org/files/a\.gguf, org/files/b/c\.gguf"):
        find("org/files")
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *args, **kwargs: ["pytorch_model.bin"])
    with pytest.raises(ValueError, match="neither safetensors nor GGUF"):
        find("org/files")


def test_jobs_take_names(offline: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("as many words as a row has, and some more. " * 40)
    found = evaluate("org/tiny", [text], against="org/tiny@v2", context=32, device="cpu")
    assert list(found["models"]) == ["org/tiny", "org/tiny@v2"]
    assert found["kl"] > 0
    own = tmp_path / "own.jsonl"
    options: dict[str, Any] = {"length": 32, "batch": 2, "device": "cpu"}
    write("org/tiny", own, tokens=32, **options)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert write("org/tiny", own, tokens=96, resume=True, **options) >= 96
    bitnet.convert_checkpoint("org/tiny", "float", "bf16")
    settings = {"model": "float", "teacher": "org/tiny", "data": [str(text)], "context": 32, "device": "cpu"}
    train(TrainOptions(**settings, out="run", steps=2, batch=1))
    Path("run", REPORT).unlink()  # as if it had been stopped at the end
    monkeypatch.chdir(tmp_path)
    resume("elsewhere/run")


def test_commands_take_names(home: Path) -> None:
    environment = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    for command in (
        ["inspect", "org/tiny"],
        ["generate", "org/tiny@v2", "a", "--max-new-tokens", "2", "--device", "cpu"],
    ):
        line = [sys.executable, "-m", "bitnet", *command]
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    line = [sys.executable, "-m", "bitnet", "serve", "org/nothing", "--port", "0"]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.startswith("bitnet serve: org/nothing: there is no such folder or file here")
