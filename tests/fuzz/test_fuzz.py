"""Damaged checkpoints through every reader, thousands of them; what they found has small tests in test_files.py."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")
WORKERS = 2
QUICK, MANY = 600, 30_000


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz") / "root"
    root.mkdir()
    code = f"import sys; sys.path.insert(0, {str(RUN.parent)!r}); import run; from pathlib import Path; "
    done = subprocess.run(
        [sys.executable, "-c", f"{code} run.build(Path({str(root)!r}))"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return root


def findings(root: Path, first: int, count: int) -> list[str]:
    """What a process of its own finds in some cases; that it died is a finding, too."""
    command = [sys.executable, str(RUN), str(root), str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 5 * count)
    found = [": ".join(json.loads(line)) for line in done.stdout.splitlines()]
    if done.returncode:
        at = (root.parent / f"at-{first}").read_text()
        found.append(f"case {at}: the process died with {done.returncode}: {done.stderr[-2000:]}")
    return found


def run(root: Path, ranges: list[tuple[int, int]]) -> list[str]:
    with ThreadPoolExecutor(WORKERS) as pool:
        return [line for lines in pool.map(lambda part: findings(root, *part), ranges) for line in lines]


def test_no_damage_is_more_than_one_clear_error(root: Path) -> None:
    part = QUICK // WORKERS
    assert not run(root, [(first, part) for first in range(0, QUICK, part)])


@pytest.mark.slow
def test_thirty_thousand_damaged_checkpoints(root: Path) -> None:
    assert not run(root, [(first, 1000) for first in range(0, MANY, 1000)])
