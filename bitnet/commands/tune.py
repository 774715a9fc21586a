"""`bitnet tune`: the fastest kernel configurations of a GPU."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "tune",
        help="on a GPU: measure a handful of kernel configurations for a model's layers, and keep the fastest",
        description="The Triton kernels come with configurations that were chosen without measuring. This measures\n"
        "up to 8 for each shape and number of tokens and keeps the fastest, for this kind of GPU and this\n"
        "version of Triton, in ~/.cache/bitnet/triton.json (under XDG_CACHE_HOME if that is set). Results do\n"
        "not change, not by a bit; nothing is ever tuned while a model runs.",
        epilog="examples:\n"
        "  bitnet tune my-model-1.58                     every shape in a checkpoint\n"
        "  bitnet tune 14336x4096 4096x14336 --tokens 1  shapes, out_features x in_features; one token at a time\n"
        "Numbers of tokens share configurations up to 1, 2, 4, 16, 32, 64, 128, 256, 512, 1024, 2048 and beyond.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "targets", nargs="+", metavar="DIR|NxK", help="checkpoint directories, or shapes like 14336x4096"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 4096], metavar="M", help="(default: %(default)s)"
    )
    parser.add_argument("--base3", action="store_true", help="tune the 1.6-bit form instead of the 2-bit one")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..tuning import tune

    tune(args.targets, args.tokens, args.base3, args.device)
    return 0
