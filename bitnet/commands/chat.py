"""`bitnet chat`: a conversation in the terminal."""

import argparse
from typing import Any

from ..collector import collector_off
from .serve import MODEL, add_model_options, model_options


def add(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model in the terminal",
        description="A conversation with a checkpoint that has a chat template: streamed, with history; /help lists "
        "what can "
        "be typed besides text. What is piped in is read line by line.",
    )
    parser.add_argument("checkpoint", metavar="MODEL", help=MODEL)
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument(
        "--temperature", type=float, help="0 takes the likeliest token (default: the model's own, else 1)"
    )
    parser.add_argument("--top-p", type=float, help="sample from this share of the probability")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="of an answer (default: what the context leaves)")
    parser.add_argument("--seed", type=int, help="makes sampling repeatable")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of the conversation (default: the model's limit)"
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with collector_off() as loaded:
        from ..serving.talk import talk

        options = model_options(args, context=args.context, max_batch=1, loaded=loaded)
        settings = {name: getattr(args, name) for name in ("temperature", "top_p", "max_tokens", "seed")}
        talk(args.checkpoint, options, args.system, **settings)
    return 0
