"""`bitnet serve`: a checkpoint behind an OpenAI-compatible API."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "serve",
        help="an OpenAI-compatible API for a checkpoint (chat, completions, streaming)",
        description="Starts transformers' OpenAI-compatible server on a checkpoint. All further options are those of "
        "`transformers serve`, for instance --port 8000, --host 0.0.0.0, --device cpu, --continuous-batching.",
        epilog="`bitnet serve DIR --help` lists every option. There is no authentication: trusted networks only.",
    )
    parser.add_argument("checkpoint", metavar="DIR", help="a checkpoint directory with a tokenizer")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="options of `transformers serve`")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..serving.app import serve

    serve(args.checkpoint, args.options)
    return 0
