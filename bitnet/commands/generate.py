"""`bitnet generate`: a prompt continued."""

import argparse
import sys
from typing import Any

from ..collector import collector_off
from .serve import MODEL, add_model_options, model_options


def add(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "generate",
        help="continue a prompt, streamed to the terminal",
        description="Loads a checkpoint and continues a prompt, streamed to the terminal as it is generated.",
    )
    parser.add_argument("checkpoint", metavar="MODEL", help=MODEL)
    parser.add_argument("prompt", nargs="?", default="-", help="text to continue; - or nothing reads standard input")
    parser.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this share of the probability")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt as a user's turn in the chat template")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with collector_off() as loaded:
        from ..serving.generate import generate

        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        names = ("checkpoint", "max_new_tokens", "temperature", "top_p", "seed", "chat")
        options = model_options(args, loaded=loaded)
        generate(prompt=prompt, options=options, **{name: getattr(args, name) for name in names})
    return 0
