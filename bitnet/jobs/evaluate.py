"""`bitnet eval`: how well a checkpoint predicts text, beside another one, and its scores at lm-eval's tasks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from .. import tables
from ..decode.sequences import positions
from ..progress import Progress
from ..train import texts
from ..train.evaluate import score
from .models import runnable

LONGEST = 2048  # default context, where a model has more


def evaluate(
    model: str | Path,
    files: Sequence[str | Path],
    *,
    against: str | Path | None = None,
    adapter: str | Path | None = None,
    context: int | None = None,
    stride: int | None = None,
    column: str = "text",
    device: str | None = None,
    backend: str = "auto",
    console: Console | None = None,
) -> dict[str, Any]:
    """Perplexity and bits per byte of text, of one checkpoint or of two, and how far the two are apart.

    model, against: checkpoint folders, packed or float, or GGUF files; models run as they serve, fully quantized
    adapter:        a folder with a LoRA adapter for `model`, as PEFT saves them; the model is then "path + adapter"
    files:          see train.texts.documents: text files, .jsonl, .parquet, folders that datasets saved
    context:        tokens that go through a model together; default what it was made for, at most 2048
    stride:         from one window to the next; default half a context: a token has so many before it at least

    returns: {"models": {path: {"perplexity", "bits_per_byte", "nats", "tokens", "bytes"}},
             "context", "stride"}, and with two models of one vocabulary "kl" (mean over tokens of KL(against || model),
             nats) and "agreement" (share of tokens with one likeliest next token). Perplexity is exp of nats / tokens;
             scored are all tokens of each document, from the begin-of-text token on, or the end-of-text token where
             there is none; without either, from its first token on. "bytes" are the documents' UTF-8 bytes.
    """
    console = console or Console(quiet=True)
    paths = [model, *([] if against is None else [against])]
    documents = [text for text, _ in texts.documents(files, column) if text]
    if not documents:
        raise ValueError("there is no text to score in " + ", ".join(map(str, files)))
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    adapters = [adapter, *(None for _ in paths[1:])]  # the other model has none: it may be the same without
    names = [
        str(path) if beside is None else f"{path} + {beside}" for path, beside in zip(paths, adapters, strict=True)
    ]
    loaded = [
        runnable(path, device=place, backend=backend, adapter=beside)
        for path, beside in zip(paths, adapters, strict=True)
    ]
    limits = [positions(found.config) or LONGEST for found, _ in loaded]
    context = context or min(LONGEST, *limits)
    if context > min(limits):
        raise ValueError(f"--context {context} is more than the {min(limits)} positions of the model")
    stride = stride or max(1, context // 2)
    one = len(loaded) == 2 and loaded[0][1].get_vocab() == loaded[1][1].get_vocab()
    report: dict[str, Any] = {"models": {}, "context": context, "stride": stride}
    for group in [[0, 1]] if one else [[index] for index in range(len(loaded))]:
        rows = [_tokens(loaded[group[0]][1], text) for text in documents]
        rows = [(ids, size) for ids, size in rows if len(ids) > 1]
        both = " and ".join(names[index] for index in group)
        with Progress(both, sum(len(ids) - 1 for ids, _ in rows), "tokens", console, transient=True) as progress:
            found = score([loaded[index][0] for index in group], rows, context, stride, progress.advance)
        for at, index in enumerate(group):
            report["models"][names[index]] = {
                "perplexity": found.perplexity(at),
                "bits_per_byte": found.bits_per_byte(at),
                "nats": found.nats[at],
                "tokens": found.tokens,
                "bytes": found.text_bytes,
            }
        if len(group) == 2:
            report |= {"kl": found.kl, "agreement": found.agreement}
    return report


def show(report: dict[str, Any], console: Console) -> None:
    """The figures of evaluate as a table."""
    rows = [("", "perplexity", "bits per byte", "tokens", "bytes")]
    for name, found in report["models"].items():
        figures = f"{found['perplexity']:,.3f}", f"{found['bits_per_byte']:.4f}"
        rows.append((name, *figures, f"{found['tokens']:,}", f"{found['bytes']:,}"))
    console.print(tables.grid(rows, right=(1, 2, 3, 4)), highlight=False)
    note = f"windows of {report['context']} tokens, every {report['stride']}; perplexity is per token"
    if report.get("kl") is not None:
        names = list(report["models"])
        console.print(
            f"KL({names[1]} || {names[0]}): {report['kl']:.4g} nats a token; both have the same likeliest next token "
            f"for {100 * report['agreement']:.2f} %",
            highlight=False,
            soft_wrap=True,
        )
    elif len(report["models"]) == 2:
        note += "; their vocabularies differ, so compare bits per byte only"
    console.print(note, highlight=False, soft_wrap=True)


def run_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None,
    device: str | None,
    backend: str,
    batch: int,
    adapter: str | Path | None = None,
) -> dict[str, Any]:
    """lm-eval's results for a checkpoint, run by our layers: {task: {metric: value}}.

    adapter: as of evaluate
    tasks: names of lm-eval, or .yaml files of tasks of one's own
    limit: documents of each task
    Raises ImportError with the remedy if lm-eval is not installed.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(f"--tasks needs lm-eval ({error}): pip install 'bitnet-toolkit[eval]'") from error
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    found, tokenizer = runnable(model, device=place, backend=backend, adapter=adapter)
    wrapped = HFLM(pretrained=found, tokenizer=tokenizer, batch_size=batch)
    chosen: list[Any] = [_task(name) if name.endswith((".yaml", ".yml")) else name for name in tasks]
    results = lm_eval.simple_evaluate(model=wrapped, tasks=chosen, limit=limit)
    return json.loads(json.dumps(results["results"], default=str))


def _task(file: str) -> Any:
    import yaml

    found = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if not isinstance(found, dict) or "task" not in found:
        raise ValueError(f"{file}: not a task of lm-eval; it needs an entry 'task: NAME'")
    return found


def _tokens(tokenizer: Any, text: str) -> tuple[Tensor, int]:
    """A document's tokens behind the one to begin with, and its bytes."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor([*texts.prefix(tokenizer), *ids], dtype=torch.long), len(text.encode())
