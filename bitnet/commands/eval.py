"""`bitnet eval`: perplexity, bits per byte, and the distance to another model."""

import argparse
import json
from typing import Any

from .serve import MODEL


def add(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "eval",
        help="how well a model predicts text, alone or beside another; lm-eval's tasks",
        description="Scores text with a checkpoint, packed or float, a folder or a GGUF file: perplexity (a token, so\n"
        "it depends on the tokenizer) and bits per UTF-8 byte (comparable between models), in windows\n"
        "that slide. With --against, both models and how far they are apart.",
        epilog="examples:\n"
        "  bitnet eval my-model-1.58 --text held-out.txt\n"
        "  bitnet eval my-model-1.58 --text held-out.txt --against my-model      what 1.58 bit costs\n"
        "  bitnet eval my-model-1.58 --adapter DIR --text new.txt --against my-model-1.58      what an adapter gains\n"
        "  bitnet eval my-model-1.58 --tasks arc_easy,hellaswag --limit 200      needs pip install -e '.[eval]'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="text files, .jsonl, .parquet, or folders of `datasets`"
    )
    parser.add_argument("--column", default="text", metavar="NAME", help="where rows have text (default: %(default)s)")
    parser.add_argument("--against", metavar="OTHER", help="compare with another: KL(OTHER || MODEL), agreement")
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter beside MODEL's layers, as PEFT saves it")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of a window (default: the model's, at most 2048)"
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="from one window to the next (default: half a context); a token is scored behind CONTEXT - STRIDE others",
    )
    parser.add_argument("--tasks", metavar="A,B", help="tasks of lm-eval by name, or .yaml files of your own")
    parser.add_argument("--limit", type=int, metavar="N", help="of --tasks: documents of each")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="of --tasks (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    parser.add_argument("--backend", default="auto", help="of the packed layers (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if not args.text and not args.tasks:
        raise ValueError("what is the model to be scored on? Give --text FILE ..., --tasks NAMES, or both")
    for name in ("context", "stride", "limit", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")

    from rich.console import Console

    from ..jobs import evaluate
    from ..tables import grid, wide

    report: dict[str, Any] = {}
    if args.text:
        names = ("against", "adapter", "context", "stride", "column", "device", "backend")
        options = {name: getattr(args, name) for name in names}
        report = evaluate.evaluate(args.model, args.text, **options, console=Console(stderr=True))
        if not args.json:
            evaluate.show(report, wide())
    if args.tasks:
        tasks = [name.strip() for name in args.tasks.split(",") if name.strip()]
        chosen = {name: getattr(args, name) for name in ("limit", "device", "backend", "batch", "adapter")}
        report["tasks"] = evaluate.run_tasks(args.model, tasks, **chosen)
        rows = [
            (task, metric.removesuffix(",none"), f"{value:.4f}")
            for task, found in report["tasks"].items()
            for metric, value in found.items()
            if isinstance(value, int | float)
        ]
        if not args.json:
            wide().print(grid([("task", "metric", "value"), *rows], right=(2,)), highlight=False)
    if args.json:
        print(json.dumps(report, indent=1))
    return 0
