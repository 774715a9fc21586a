"""results.csv: one row a measured figure, with what it was measured on."""

import argparse
import csv
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ggml
from torch import Tensor

from bitnet import info
from bitnet.kernels.cpu import library as cpu_library

FILE = Path(__file__).with_name("results.csv")
sys.path.append(str(Path(__file__).parent.parent))  # machine.py


def add_isa(parser: argparse.ArgumentParser) -> None:
    """--isa, which hold is for."""
    parser.add_argument("--isa", help="hold the native kernels to an instruction set (avx2, ...), as on a lesser CPU")


def hold(isa: str | None) -> None:
    """machine.hold. (ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 in the environment hold torch.)"""
    if isa is not None:
        from machine import hold

        hold(isa)


def conditions() -> dict[str, str]:
    """Date, commit, hardware and versions: the same for all rows of a run. Call it before anything changes."""
    hardware, versions = info.hardware(), info.versions()
    return _now() | {
        "hardware": f"{hardware['cpu']}, {cpu_library.isas()[0]}",
        "versions": f"torch {versions['torch']}, python {versions['python']}, llama-cpp-python {ggml.version()}",
    }


def gpu_conditions() -> dict[str, str]:
    """The same for what ran on the first GPU."""
    hardware, versions = info.hardware(), info.versions()
    return _now() | {
        "hardware": hardware["gpu 0"],
        "versions": f"torch {versions['torch']}, triton {versions['triton']}, python {versions['python']}",
    }


def _now() -> dict[str, str]:
    commit = ""
    if shutil.which("git"):
        command = ["git", "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True, cwd=FILE.parent).stdout.strip()
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit}


def row(what: dict[str, Any], seconds: Tensor, nbytes: float | None, common: dict[str, str]) -> dict[str, Any]:
    """what: op, m, n, k, dtype, backend, threads; seconds: float64, one figure a round; nbytes: of weights read."""
    low, middle, high = (1e6 * seconds.quantile(seconds.new_tensor([0.2, 0.5, 0.8]))).tolist()
    times = {"p20_us": f"{low:.1f}", "p50_us": f"{middle:.1f}", "p80_us": f"{high:.1f}"}
    return what | times | {"weight_GB_per_s": nbytes and f"{nbytes / middle / 1e3:.1f}"} | common


def append(rows: list[dict[str, Any]], file: Path) -> None:
    new = not file.exists()
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
