"""How far a long job is: lines where there is no terminal, a bar where there is one."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tiny import llama

from bitnet import cli
from bitnet import tuning as tune
from bitnet.kernels import backends
from bitnet.kernels.gpu.layout import TWO_BITS
from bitnet.progress import Progress, track
from bitnet.train.data import build_tokenizer


class Recorder:
    """A console on no terminal, with a clock that only the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.console = Console(file=StringIO(), width=20, get_time=lambda: self.now)

    def lines(self) -> list[str]:
        assert isinstance(self.console.file, StringIO)
        return self.console.file.getvalue().splitlines()


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def test_a_line_tells_what_is_done_and_left_how_fast_and_since_when(recorder: Recorder) -> None:
    with Progress("1.58 bit [x]", 1250, "steps", recorder.console) as progress:
        for step in range(1250):
            recorder.now += 0.2
            progress.advance(1, f"{3 - step / 1250:.3f} bits/byte")
    lines = recorder.lines()
    assert lines[0] == "1.58 bit [x]: 0/1,250 steps (0 %)"
    assert lines[1] == "1.58 bit [x]: 125/1,250 steps (10 %), 0:03:45 left, 2.901 bits/byte, 5 steps/s, 0:00:25 elapsed"
    assert lines[-1] == "1.58 bit [x]: 1,250/1,250 steps (100 %), 2.001 bits/byte, 5 steps/s, 0:04:10 elapsed"
    assert len(lines) == 11


@pytest.mark.parametrize(("seconds", "lines"), [(0.001, 2), (0.02, 3), (1, 11), (100, 101)])
def test_lines_come_every_tenth_but_neither_crowd_nor_stay_away(seconds: float, lines: int, recorder: Recorder) -> None:
    """Of a job of 100 parts: at least a second apart, at most 30 seconds (or one part) apart."""
    with Progress("job", 100, "parts", recorder.console) as progress:
        for _ in range(100):
            recorder.now += seconds
            progress.advance()
    assert len(recorder.lines()) == lines


def test_what_an_earlier_run_did_counts_as_done_and_not_for_the_rate(recorder: Recorder) -> None:
    with Progress("model.gguf", 4e9, "bytes", recorder.console, done=3e9) as progress:
        recorder.now += 10
        progress.advance(500_000_000)
    assert recorder.lines() == [
        "model.gguf: 3.0 GB/4.0 GB (75 %)",
        "model.gguf: 3.5 GB/4.0 GB (88 %), 0:00:10 left, 50.0 MB/s, 0:00:10 elapsed",
        "model.gguf: 4.0 GB/4.0 GB (100 %), 100.0 MB/s, 0:00:10 elapsed",
    ]


def test_parts_of_a_unit_are_shown_and_never_more_than_all(recorder: Recorder) -> None:
    with Progress("calibrating", 3, "blocks", recorder.console) as progress:
        for _ in range(5):
            recorder.now += 40
            progress.advance(0.7)
    lines = recorder.lines()
    assert lines[1] == "calibrating: 0.7/3 blocks (23 %), 0:02:11 left, 0.0175 blocks/s, 0:00:40 elapsed"
    assert [line.split()[1] for line in lines] == ["0/3", "0.7/3", "1.4/3", "2.1/3", "2.8/3", "3/3"]


def test_a_short_transient_job_leaves_no_line_and_a_long_one_does(recorder: Recorder) -> None:
    for _ in track(range(50), "reading", "tensors", recorder.console):
        recorder.now += 0.5
    assert recorder.lines() == []
    for _ in track(range(50), "reading", "tensors", recorder.console):
        recorder.now += 2
    assert recorder.lines()[0] == "reading: 15/50 tensors (30 %), 0:01:10 left, 0.5 tensors/s, 0:00:30 elapsed"
    assert recorder.lines()[-1].startswith("reading: 50/50 tensors (100 %)")


def test_a_job_that_fails_is_not_reported_as_finished(recorder: Recorder) -> None:
    def part() -> int:
        raise OSError("disk full")

    with pytest.raises(OSError, match="full"), Progress("job", 10, "parts", recorder.console) as progress:
        progress.advance(part())
    assert recorder.lines() == ["job: 0/10 parts (0 %)"]


def test_a_job_without_parts_is_finished(recorder: Recorder) -> None:
    assert list(track([], "reading", "tensors", recorder.console)) == []
    with Progress("job", 0, "parts", recorder.console):
        pass
    assert recorder.lines()[-1] == "job: 0/0 parts (100 %)"


def test_a_terminal_gets_a_bar_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    now, out = [0.0], StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system=None, get_time=lambda: now[0])
    with Progress("full precision [x]", 1250, "steps", console) as progress:
        now[0] += 25
        progress.advance(125, "2.901 bits/byte", "5,120 tokens/s")
        console.print("a remark above the bar")
        assert progress.bar is not None
        progress.bar.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).replace("\r", "\n")
    assert re.search(r"^full precision \[x\] [━╸╺ ]{20} 125/1,250 steps \(10 %\), 0:03:45 left", shown, re.M)
    assert re.search(r"^full precision \[x\] ━{20} 1,250/1,250 steps \(100 %\), 2\.901 bits", shown, re.M)
    assert "\na remark above the bar\n" in shown
    assert max(map(len, shown.splitlines())) <= 80


def test_lines_arrive_while_the_job_runs() -> None:
    """Through a pipe, which Python fills up before it passes anything on; here it never gets to."""
    code = """
import os
from rich.console import Console
from bitnet.progress import Progress
with Progress("job", 2, "parts", Console()):
    os._exit(3)
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (3, "job: 0/2 parts (0 %)\n"), done.stderr


# Commands


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    model = llama(vocab_size=257)
    model.save_pretrained(tmp_path / "float")
    build_tokenizer().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def convert(*options: str) -> Callable[[Path], list[str]]:
    return lambda checkpoint: ["convert", str(checkpoint), str(checkpoint.parent / "out"), *options]


def calibrate(checkpoint: Path) -> list[str]:
    text = checkpoint.parent / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return {i * i} * x + {i}\n\n\n" for i in range(60)))
    return convert("--to", "hub", "--calibrate", str(text), "--samples", "8", "--length", "16")(checkpoint)


def gguf(checkpoint: Path) -> list[str]:
    llama(hidden_size=256, intermediate_size=256, vocab_size=257).save_pretrained(checkpoint)
    return convert("--to", "gguf-tq2_0")(checkpoint)


@pytest.mark.parametrize(
    ("command", "job"),
    [
        (convert("--to", "hub"), r"out: {}[\d.]+ kB"),
        (gguf, r"out: {}[\d.]+ kB"),
        (calibrate, "calibrating: {}2 blocks"),
    ],
    ids=["folder", "gguf", "calibration"],
)
def test_a_conversion_says_how_far_it_is(
    command: Callable[[Path], list[str]], job: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(checkpoint)) == 0
    lines = capsys.readouterr().err
    assert re.search("^" + job.format(r"0( bytes)?/") + r" \(0 %\)$", lines, re.M)
    assert re.search("^" + job.format(r"(\S+ kB|2)/") + r" \(100 %\), .*/s, 0:00:\d\d elapsed$", lines, re.M)


def test_tune_says_how_far_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    from bitnet.kernels.gpu import configs as configs

    gpu = configs.Gpu("some GPU", "sm_90", 132)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(backends.BACKENDS, "triton", backends.BACKENDS["triton"]._replace(missing=lambda *_: None))
    monkeypatch.setattr(configs, "gpu_of", lambda device: gpu)

    def measure(found, m, n, k, planes, device, done):  # type: ignore[no-untyped-def]
        for _ in found:
            done()
        return {config: 1e-6 * (i + 1) for i, config in enumerate(found)}

    monkeypatch.setattr(tune, "measure", measure)
    assert cli.main(["tune", "512x512", "--tokens", "1", "64"]) == 0
    lines = capsys.readouterr().out
    total = sum(len(configs.candidates(gpu, m, 512, 512, TWO_BITS)) for m in (1, 64))
    assert f"tuning: 0/{total} configurations (0 %)\n" in lines
    assert f"tuning: {total}/{total} configurations (100 %), " in lines
