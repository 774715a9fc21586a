"""`bitnet bench`: how fast a model is here."""

import argparse
from pathlib import Path
from typing import Any

from .serve import MODEL, add_model_options, model_options


def add(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "bench",
        help="how fast a model is here, alone or beside another",
        description="Loads a checkpoint and measures prefill, decoding of one sequence and of many at a time, loading\n"
        "and memory. With --against, two models in turns, in one process.",
        epilog="examples:\n"
        "  bitnet bench my-model-1.58 --head int8\n"
        "  bitnet bench my-model-1.58 --against my-model --plot speed.png     what packing brings\n"
        "Other programs make all figures worse; run it on a machine that does nothing else.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="MODEL", help=MODEL)
    parser.add_argument("--against", metavar="OTHER", help="another checkpoint, float or packed, or a GGUF file")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=128, metavar="N", help="tokens of a sequence that is decoded (default: 128)"
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help="sequences (default: 1 2 4 8 16)"
    )
    parser.add_argument("--runs", type=int, default=5, metavar="N", help="medians of so many (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="a picture of the decoding speeds")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from ..serving import bench
    from ..tables import wide

    report = bench.bench(
        args.checkpoint,
        against=args.against,
        prompt=args.prompt,
        context=args.context,
        batches=tuple(dict.fromkeys(args.batch)),
        runs=args.runs,
        options=model_options(args),
        console=Console(stderr=True),
    )
    if args.json:
        print(bench.write_json(report))
    else:
        bench.show(report, wide())
    if args.plot is not None:
        bench.plot(report, args.plot)
    return 0
