"""`bitnet bench`: what it reports, on models that say nothing about speed."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import llama

import bitnet
from bitnet import cli
from bitnet.serving.bench import bench
from bitnet.train.stdlib import build_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("bench")
    model = llama(hidden_size=64, intermediate_size=96, vocab_size=257)
    model.save_pretrained(root / "float")
    bitnet.replace_linear(model)
    bitnet.pack(model)
    model.save_pretrained(root / "packed")
    for name in ("float", "packed"):
        build_tokenizer().save_pretrained(root / name)
    return str(root / "packed"), str(root / "float")


def test_two_models_are_measured_side_by_side(folders: tuple[str, str], tmp_path: Path, capsys: Any) -> None:
    packed, full = folders
    command = [
        "bench",
        packed,
        "--against",
        full,
        "--prompt",
        "24",
        "--context",
        "8",
        "--batch",
        "1",
        "3",
        "--runs",
        "2",
    ]
    command += ["--device", "cpu", "--head", "int8"]
    assert cli.main([*command, "--json", "--plot", str(tmp_path / "speed.png")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [found["engine"][:6] for found in report["models"].values()] == ["native", "transf"]
    for found in report["models"].values():
        assert found["load_s"] > 0
        assert found["prefill_tokens_per_s"] > 0
        assert list(found["decode_tokens_per_s"]) == ["1", "3"]
        assert min(found["decode_tokens_per_s"].values()) > 0
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    assert "prefill of 24" in printed
    assert "decoding 3" in printed


def test_every_sequence_is_as_long_as_asked_for(folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    from bitnet.decode.native import NativeSequences

    seen: list[list[tuple[int, int]]] = []
    extend = NativeSequences.extend

    def watched(self: NativeSequences, work: Any) -> Any:
        seen.append([(self.length(slot), len(ids)) for slot, ids in work])
        return extend(self, work)

    monkeypatch.setattr(NativeSequences, "extend", watched)
    from bitnet.serving.run import Options

    bench(folders[0], prompt=24, context=8, batches=(3,), runs=1, options=Options(device="cpu"))
    assert seen == 2 * [[(0, 24)], [(0, 8)], *[[(8 + step, 1)] * 3 for step in range(8)]]


@pytest.mark.parametrize(
    ("options", "words"),
    [({"prompt": 0}, "must be at least 1"), ({"prompt": 3000}, "has 2048 positions, fewer than 3000")],
)
def test_what_cannot_be_measured_is_refused(folders: tuple[str, str], options: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bench(folders[0], **options)  # type: ignore[arg-type]


def test_measured_rows_end_alike_whatever_appended_them() -> None:
    files = sorted((Path(__file__).parent / "bench").glob("*.csv"))
    assert files
    assert not [file.name for file in files if b"\r" in file.read_bytes()]
