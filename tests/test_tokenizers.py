"""Tokenizers in conversions: what cannot be written is refused before the work, or left out on request."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import TEXTS, checkpoint, tokenizer
from rich.console import Console
from tiny import IDS, llama
from transformers import AutoTokenizer

import bitnet
from bitnet.cli import main
from bitnet.convert.conversion import convert as conversion
from bitnet.convert.files.gguf import TensorInfo, padded, read_header, read_tensor
from bitnet.convert.llama_cpp.header import header_bytes
from bitnet.convert.llama_cpp.tokenizer import tokenizer_of

QUIET = Console(quiet=True)


def convert(source: Path, target: Path, to: str = "hub", **options: Any) -> Path:
    return bitnet.convert_checkpoint(source, target, to, console=QUIET, **options)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    checkpoint(root / "hf", num_hidden_layers=1)
    file = convert(root / "hf", root / "m.gguf", "gguf-q2_0")
    convert(file, root / "back")
    return file


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    metadata, tensors = read_header(source)
    change(metadata)
    parts, infos, end = [], {}, 0
    for name, info in tensors.items():
        data = read_tensor(source, info).tobytes()
        infos[name] = TensorInfo(info.kind, info.shape, end, len(data))
        end += padded(len(data))
        parts.append(data.ljust(padded(len(data)), b"\0"))
    target.write_bytes(header_bytes(metadata, infos) + b"".join(parts))
    return target


def test_a_gguf_file_without_a_pre_tokenizer_has_llama_cpps_default(exported: Path, tmp_path: Path) -> None:
    """As microsoft/bitnet-b1.58-2B-4T-gguf is."""
    file = rewritten(exported, tmp_path / "m.gguf", lambda metadata: metadata.pop("tokenizer.ggml.pre"))
    out = convert(file, tmp_path / "out")
    assert torch.equal(bitnet.load(out)(IDS).logits, bitnet.load(exported.parent / "back")(IDS).logits)
    back = AutoTokenizer.from_pretrained(out)
    expected = tokenizer("default")
    for text in TEXTS:  # another tokenizer: cut by the same rule, with other merges
        cut = back.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert cut == expected.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert back.decode(back(text)["input_ids"], skip_special_tokens=False) == text


def drop(metadata: dict[str, Any]) -> None:
    for key in list(metadata):
        if key.startswith("tokenizer."):
            del metadata[key]


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "none": drop,
    "unknown": lambda metadata: metadata.update({"tokenizer.ggml.pre": "nonesuch"}),
    "model": lambda metadata: metadata.update({"tokenizer.ggml.model": "bert"}),
    "no_tokens": lambda metadata: metadata.pop("tokenizer.ggml.tokens"),
    "numbers": lambda metadata: metadata.update({"tokenizer.ggml.tokens": [1, 2]}),
    "twice": lambda metadata: metadata["tokenizer.ggml.tokens"].__setitem__(5, metadata["tokenizer.ggml.tokens"][6]),
    "types": lambda metadata: metadata["tokenizer.ggml.token_type"].pop(),
    "merges": lambda metadata: metadata.update({"tokenizer.ggml.merges": ["abc"]}),
    "foreign_merges": lambda metadata: metadata.update({"tokenizer.ggml.merges": ["no such"]}),
    "bos": lambda metadata: metadata.update({"tokenizer.ggml.add_bos_token": "yes"}),
    "template": lambda metadata: metadata.update({"tokenizer.chat_template": 7}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_tokenizer_that_cannot_be_written_is_refused_before_the_work(
    exported: Path, name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    file = rewritten(exported, tmp_path / "m.gguf", DAMAGE[name])
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_run", lambda *args: pytest.fail("the weights were converted first"))
        with pytest.raises(ValueError, match=r"m\.gguf: .*(token|merge)"):
            convert(file, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    assert main(["convert", str(file), str(tmp_path / "out"), "--to", "hub", "--no-tokenizer"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    assert torch.equal(bitnet.load(tmp_path / "out")(IDS).logits, bitnet.load(exported.parent / "back")(IDS).logits)


def test_a_folder_goes_without_its_tokenizer_on_request(exported: Path, tmp_path: Path) -> None:
    out = convert(exported.parent / "hf", tmp_path / "out", "base3", tokenizer=False)
    assert not any("token" in path.name or "template" in path.name for path in out.iterdir())
    with pytest.raises(ValueError, match=r"no tokenizer there.*--no-tokenizer"):
        convert(out, tmp_path / "m.gguf", "gguf-q2_0")
    file = convert(out, tmp_path / "m.gguf", "gguf-q2_0", tokenizer=False)
    metadata, tensors = read_header(file)
    assert [key for key in metadata if key.startswith("tokenizer.")] == ["tokenizer.ggml.model"]
    assert metadata["tokenizer.ggml.model"] == "no_vocab"  # what llama.cpp takes for no tokenizer
    assert tensors.keys() == read_header(exported)[1].keys()
    with pytest.raises(ValueError, match="the file has no tokenizer"):
        tokenizer_of(metadata)


def test_generate_says_that_there_is_no_tokenizer_or_that_it_is_damaged(tmp_path: Path, capsys: Any) -> None:
    model = llama()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "m")
    for text, words in (
        (None, "no tokenizer there"),
        (b"{}", "its tokenizer cannot be read"),
        (b"\xff", "not valid JSON"),
    ):
        if text is not None:
            (tmp_path / "m" / "tokenizer.json").write_bytes(text)
        assert main(["generate", str(tmp_path / "m"), "hello"]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert str(tmp_path / "m") in error


def test_a_terminal_that_lacks_letters_shows_others(exported: Path, monkeypatch: Any) -> None:
    shown = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr("sys.stdout", shown)
    assert main(["generate", str(exported.parent / "hf"), "h\u00e9llo \u4e2d", "--max-new-tokens", "2"]) == 0
    shown.flush()
    assert shown.buffer.getvalue().startswith("h\u00e9llo ?".encode("latin-1"))
