"""`bitnet quickstart`: the whole loop on this machine."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "quickstart",
        help="the whole loop on real text: train in full precision and in 1.58 bit, pack, reload, compare",
        description="Trains a small byte-level Llama on the Python standard library's sources, once in full precision "
        "and once in 1.58 bit on the same tokens, packs and reloads it, and writes both models, report.json and "
        "report.png to the output folder.",
    )
    parser.add_argument("--out", default="quickstart", help="output folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, help="training steps of each model (default: the tuned number; fewer is a quick look)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..quickstart.run import run as run_quickstart

    run_quickstart(args.out, seed=args.seed, steps=args.steps)
    return 0
