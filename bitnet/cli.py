"""The `bitnet` command: it lists those in commands/, which import what takes time when they run."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

from .commands import bench, chat, convert, eval, generate, info, inspect, quickstart, serve, train, tune, write

EPILOG = """examples:
  bitnet quickstart                         train, pack and reload a 1.58-bit model on this machine (about 5 minutes)
  bitnet train run.yaml                     a model of your own, or an existing one to 1.58 bit; see its --help
  bitnet write MODEL own-text.jsonl         have a model write the text that its low-bit copy is to learn from
  bitnet eval MODEL --text held-out.txt     perplexity and bits per byte, alone or beside another model
  bitnet generate quickstart/ternary "def "  continue a prompt with it
  bitnet chat my-model-1.58                 talk to a model that has a chat template
  bitnet serve quickstart/ternary           a model behind an OpenAI-compatible API, with a page to chat with it
  bitnet bench my-model-1.58                tokens/s of prefill and decoding, loading time and memory
  bitnet inspect quickstart/ternary         its layers and codes, and whether anything is wrong with them
  bitnet convert SRC DST --to base3         the same weights in another form
  bitnet tune my-model-1.58                 on a GPU: measure which kernel configurations suit its layers
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="bitnet",
        description="Train, convert and serve 1-bit and 1.58-bit language models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    for command in (info, quickstart, train, eval, generate, chat, convert, inspect, serve, bench, tune, write):
        command.add(commands)
    args = parser.parse_args(argv)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")  # a terminal that lacks a letter shows a question mark
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        text = str(error).removeprefix(f"{args.command}: ")
        print(f"bitnet {args.command}: {text}", file=sys.stderr)
        return 1
    return 0
