"""`bitnet bench`: how fast a checkpoint is here, alone or beside another one."""

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .. import tables
from ..decode.sequences import Sequences
from ..info import hardware, versions
from ..progress import Progress
from .model import sequences_of
from .run import Options, load_both

BATCHES = (1, 2, 4, 8, 16)
STEPS = 8  # tokens that each sequence is extended by in a measurement


def bench(
    checkpoint: str,
    *,
    against: str | None = None,
    prompt: int = 512,
    context: int = 128,
    batches: tuple[int, ...] = BATCHES,
    runs: int = 5,
    options: Options | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Prefill, decoding of one sequence and of many, loading and memory, of one checkpoint or of two, in turns.

    checkpoint, against: as of bitnet.load; the head and the adapter of `options` are the first one's
    prompt:  tokens of the prompt that prefill takes, drawn at random
    context: tokens that each sequence has when it is decoded
    runs:    of everything; shown is the median

    returns: {"models": {name: {"engine", "load_s", "memory_bytes", "prefill_tokens_per_s",
             "decode_tokens_per_s": {batch: tokens/s of all sequences together}}}, and what was asked for}. memory_bytes
             is how much larger the process became by loading (of a GPU: what torch allocated); None where the system
             does not say. Sampling is not in it.
    Raises ValueError for lengths that a model does not have room for.
    """
    if min(prompt, context, runs, *batches) < 1:
        raise ValueError(f"lengths, batches and runs must be at least 1, got {prompt}, {context}, {batches} and {runs}")
    names = list(dict.fromkeys([checkpoint, *([] if against is None else [against])]))
    facts: dict[str, dict[str, Any]] = {}
    models: dict[str, Sequences] = {}
    for name in names:
        chosen = options or Options()
        before, start = _memory(), time.perf_counter()
        model, _ = load_both(name, chosen if name == checkpoint else replace(chosen, head=None, adapter=None))
        models[name], engine = sequences_of(model, max(batches))
        after = _memory()
        facts[name] = {
            "engine": engine,
            "load_s": time.perf_counter() - start,
            "memory_bytes": None if before is None or after is None else after - before,
        }
        most = models[name].context
        if max(prompt, context + STEPS) > most:
            raise ValueError(f"{name} has {most} positions, fewer than {max(prompt, context + STEPS)}")
    times: dict[str, dict[int, list[float]]] = {name: {0: [], **{batch: [] for batch in batches}} for name in names}
    work = (runs + 1) * (1 + len(batches)) * len(names)
    with Progress("measuring", work, "runs", console or Console(quiet=True), transient=True) as progress:
        for run in range(runs + 1):  # the first one is not counted
            for batch in (0, *batches):
                for name, sequences in models.items():
                    seconds = _decode(sequences, batch, context) if batch else _prefill(sequences, prompt)
                    times[name][batch] += [seconds] if run else []
                    progress.advance()
    for name, found in times.items():
        median = {batch: statistics.median(seconds) for batch, seconds in found.items()}
        facts[name]["prefill_tokens_per_s"] = prompt / median.pop(0)
        facts[name]["decode_tokens_per_s"] = {b: b * STEPS / seconds for b, seconds in median.items()}
    asked = {"prompt": prompt, "context": context, "runs": runs}
    return {"models": facts, **asked, "hardware": hardware(), "versions": versions()}


def show(report: dict[str, Any], console: Console) -> None:
    """The figures of bench as a table."""
    names = list(report["models"])
    columns = list(report["models"].values())
    rows = [("", *names)]
    rows.append(("decoded by", *(found["engine"].split(" (")[0] for found in columns)))
    rows.append(("ready after", *(f"{found['load_s']:.1f} s" for found in columns)))
    if all(found["memory_bytes"] is not None for found in columns):
        rows.append(("memory", *(f"{found['memory_bytes'] / 1e9:.2f} GB" for found in columns)))
    rows.append((f"prefill of {report['prompt']}", *(_rates(found["prefill_tokens_per_s"] for found in columns))))
    for batch in columns[0]["decode_tokens_per_s"]:
        rows.append((f"decoding {batch}", *(_rates(found["decode_tokens_per_s"][batch] for found in columns))))
    console.print(tables.grid(rows, right=range(1, len(names) + 1)), highlight=False)
    console.print(
        f"tokens/s, medians of {report['runs']} runs; sequences of {report['context']} tokens; "
        f"{report['hardware']['cpu_threads']}, {report['hardware'].get('gpu', '')}",
        highlight=False,
        soft_wrap=True,
    )


def plot(report: dict[str, Any], file: Path) -> None:
    """A picture of decoding: tokens/s of all sequences together, by how many there are."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, found in report["models"].items():
        rates = found["decode_tokens_per_s"]
        axes.plot(list(rates), list(rates.values()), marker="o", label=f"{name} ({found['engine'].split(' (')[0]})")
    axes.set(title="decoding", xlabel="sequences at a time", ylabel="tokens/s of all together", ylim=(0, None))
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(rates), [str(batch) for batch in rates])
    axes.legend()
    figure.savefig(file, dpi=110)


def write_json(report: dict[str, Any]) -> str:
    """The report as JSON."""
    return json.dumps(report, indent=1)


def _rates(values: Any) -> list[str]:
    values = list(values)
    first = values[0]
    return [
        f"{value:,.1f}" + (f" ({first / value:.2f} times slower)" if value < first else "") * (i > 0)
        for i, value in enumerate(values)
    ]


def _prefill(sequences: Sequences, prompt: int) -> float:
    ids = torch.randint(sequences.vocabulary, (prompt,))
    sequences.truncate(0, 0)
    start = time.perf_counter()
    sequences.extend([(0, ids)])
    seconds = time.perf_counter() - start
    sequences.truncate(0, 0)
    return seconds


def _decode(sequences: Sequences, batch: int, context: int) -> float:
    ids = torch.randint(sequences.vocabulary, (context,))
    sequences.extend([(0, ids)])
    for slot in range(1, batch):
        sequences.copy(0, slot, context)
    token = torch.zeros(1, dtype=torch.int64)
    start = time.perf_counter()
    for _ in range(STEPS):
        sequences.extend([(slot, token) for slot in range(batch)])
    seconds = time.perf_counter() - start
    for slot in range(batch):
        sequences.truncate(slot, 0)
    return seconds


def _memory() -> int | None:
    """Bytes of this process, or of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return None
    import resource

    return int(pages) * resource.getpagesize()
