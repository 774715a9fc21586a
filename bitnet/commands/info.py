"""`bitnet info`: what is installed, and which backends are ready."""

import argparse
from typing import Any


def add(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "info", help="versions, hardware, and which backends are ready (and why others are not)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..info import show

    show()
    return 0
