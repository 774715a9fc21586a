"""`bitnet inspect`: what is in a checkpoint, and whether anything is wrong with it."""

import argparse
from typing import Any

from .serve import MODEL


def add(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "inspect",
        help="what is in a checkpoint, layer by layer, and what is wrong with it",
        description="Reads a checkpoint once and prints, for every matrix, its shape, bits a weight, scale, the shares "
        "of -1, 0 and +1 and their entropy; then the totals, which backend runs each kind of layer here, and "
        "the problems found (exit status 1 if there are any).",
    )
    parser.add_argument("checkpoint", metavar="MODEL", help=f"{MODEL}; MLX's folders, too")
    parser.add_argument("--plot", metavar="FILE.png", help="draw shares, entropies and scales by depth")
    parser.add_argument(
        "--diff",
        metavar="OTHER",
        help="compare with another checkpoint instead, tensor by tensor (exit status 1 if they differ)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..convert.inspection import diff_checkpoints, inspect_checkpoint

    if args.diff:
        comparison = diff_checkpoints(args.checkpoint, args.diff)
        print(comparison)
        return int(bool(comparison.differences))
    found = inspect_checkpoint(args.checkpoint)
    print(found)
    if args.plot:
        found.plot(args.plot)
    return int(bool(found.problems))
