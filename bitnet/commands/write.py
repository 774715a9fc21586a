"""`bitnet write`: text that a model writes, to train another on."""

import argparse
from typing import Any

from .serve import MODEL


def add(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "write",
        help="have a model write text to train another on, where there is no other text",
        description="Has a model write documents into a .jsonl file, for a low-bit copy to learn from: they begin\n"
        "with any word of its vocabulary and are sampled, or are conversations for which it also writes\n"
        "the question. Each batch is written when it is done; --resume goes on after the last.",
        epilog="example, a model to 1.58 bit without any data:\n"
        "  bitnet write my-model own-text.jsonl --tokens 1000000 --chat 0.5\n"
        "  bitnet train --model my-model --teacher my-model --data own-text.jsonl --ce 0 --out run",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("out", metavar="OUT.jsonl", help='a new file, one document a line: {"text": ...}')
    parser.add_argument("--tokens", type=int, default=1_000_000, metavar="N", help="in all (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, metavar="N", help="of a document (default: %(default)s)")
    parser.add_argument(
        "--batch", type=int, default=32, metavar="N", help="documents written at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--chat", type=float, default=0.0, metavar="SHARE", help="of conversations, from 0 to 1 (default: 0)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with OUT, begun with the same options")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    parser.add_argument("--backend", default="auto", help="of packed layers (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from ..jobs.write import write

    names = (
        "tokens",
        "length",
        "batch",
        "chat",
        "temperature",
        "seed",
        "resume",
        "device",
        "backend",
    )
    console = Console(stderr=True)
    options = {name: getattr(args, name) for name in names}
    written = write(args.model, args.out, **options, console=console)
    console.print(
        f"{args.out}: {written:,} tokens. Next: bitnet train --model DIR --teacher {args.model} --data {args.out} ...",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return 0
