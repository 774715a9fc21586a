"""Training in two processes, data-parallel and sharded: the same losses, codes and checkpoints as in one."""

import json
import os
import shutil
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
        assert "is sharded; pack what bitnet.gather(model) gives the first process" in report["pack"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gathered_copy_packs_to_the_bytes_of_one_process(found: Any, kind: str) -> None:
    name, how = kind.split()
    gathered, alone = bitnet.load(found[0] / f"{name}-{how}-gathered"), bitnet.load(found[0] / name)
    for key, value in alone.state_dict().items():
        assert torch.equal(value, gathered.state_dict()[key]) or value.dtype.is_floating_point, key
    assert [report[f"{kind} gathered"] for report in found[1]] == [True, False]


def test_a_save_that_fails_in_one_process_fails_in_all(found: Any) -> None:
    assert [bool(report["save"]) for report in found[1]] == [True, True]


def test_bitnet_train_is_the_run_of_one_process(tmp_path: Path) -> None:
    """Also after it was stopped: the second half goes on from a checkpoint."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"def f{i}(x):\n    return x + {i * 7 % 13}\n" for i in range(200)))
    shape = "{model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2}"
    command = ["train", "--architecture", shape, "--data", str(text), "--context", "32", "--batch", "4", "--lr", "1e-3"]
    command += ["--held-out", "0.1", "--eval-tokens", "200", "--device", "cpu", "--monitor-every", "5"]
    assert cli.main([*command, "--steps", "8", "--out", str(tmp_path / "one")]) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    options = [*command, "--steps", "8", "--checkpoint-every", "4", "--out", str(tmp_path / "two")]
    subprocess.run([*torchrun, "-m", "bitnet", *options], env=environment, check=True, capture_output=True, timeout=300)
    first, second = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("one", "two"))
    assert second["losses"] == pytest.approx(first["losses"], abs=1e-5)
    assert second["bits_per_byte"] == pytest.approx(first["bits_per_byte"], abs=1e-4)
    for name in ("report.json", "model", "checkpoints/step-00000008"):
        path = tmp_path / "two" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = [*torchrun, "-m", "bitnet", "train", "--resume", str(tmp_path / "two")]
    subprocess.run(again, env=environment, check=True, capture_output=True, timeout=300)
    assert json.loads((tmp_path / "two" / "report.json").read_text())["losses"] == second["losses"]
