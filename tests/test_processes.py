"""Training in two processes, data-parallel and sharded: the same losses, codes and checkpoints as in one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import SPECS, WORLD

import bitnet
from bitnet import cli

KINDS = [f"{name} {kind}" for name in SPECS for kind in ("ddp", "fsdp")]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("processes")
    script = str(Path(__file__).with_name("processes.py"))
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    running = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(folder)], env=environment, text=True, stderr=subprocess.PIPE
        )
        for rank in range(WORLD)
    ]
    errors = [process.communicate(timeout=300)[1] for process in running]
    assert [process.returncode for process in running] == [0] * WORLD, "\n".join(errors)
    return folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_have_the_losses_and_codes_of_one(found: Any, kind: str) -> None:
    for report in found[1]:
        assert report[kind]["gap"] < 1e-5
        assert report[kind]["codes"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_what_they_save_packs_to_the_bytes_of_one_process(found: Any, kind: str) -> None:
    name, how = kind.split()
    together = bitnet.load(found[0] / f"{name}-{how}-0")
    bitnet.pack(together)
    alone = bitnet.load(found[0] / name)
    for key, value in alone.state_dict().items():
        if value.dtype == torch.uint8:
            assert torch.equal(value, together.state_dict()[key]), key


def test_shards_are_not_packed_and_the_remedy_is_named(found: Any) -> None:
    for report in found[1]:
        assert "is sharded (DTensor); bitnet.save(model, dir) in all processes" in report["pack"]


def test_a_save_that_fails_in_one_process_fails_in_all(found: Any) -> None:
    assert [bool(report["save"]) for report in found[1]] == [True, True]


def test_bitnet_train_in_many_processes_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", "--model", "a", "--data", "b", "--out", "c"]) == 1
    assert "bitnet train is one process" in capsys.readouterr().err
