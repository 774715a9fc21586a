"""`bitnet serve`: a checkpoint behind an OpenAI-compatible API, with a page to chat with it."""

import argparse
from pathlib import Path
from typing import Any

from ..collector import collector_off

MODEL = "a checkpoint folder, a GGUF file, or a name on the Hugging Face Hub: org/name, org/name@revision"


def add(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "serve",
        help="an OpenAI-compatible API for a checkpoint, and a page to chat with it",
        description="Serves one checkpoint: chat, completions, responses (streamed or whole, with JSON schemas and "
        "tools), or "
        "embeddings of a sentence encoder; continuous batching; metrics for Prometheus at /metrics. Open the address "
        "in a browser to chat. Any OpenAI client works: base_url=http://127.0.0.1:8000/v1.",
        epilog="SIGTERM and Ctrl-C finish what is running, then stop. Needs pip install 'bitnet-toolkit[serve]'.",
    )
    parser.add_argument("checkpoint", metavar="MODEL", help=MODEL)
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; set a key then (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    key = parser.add_mutually_exclusive_group()
    key.add_argument("--api-key", metavar="KEY", help="what clients must send; other users of this machine can see it")
    key.add_argument("--api-key-file", metavar="FILE", type=Path, help="the same, read from a file, where they cannot")
    parser.add_argument("--name", help="of the model, as clients see it (default: MODEL)")
    parser.add_argument(
        "--max-batch", type=int, default=8, metavar="N", help="sequences at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--max-queue", type=int, default=64, metavar="N", help="that may wait; more get 503 (default: %(default)s)"
    )
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of a sequence (default: the model's own limit)"
    )
    parser.add_argument(
        "--timeout", type=float, default=600, metavar="S", help="seconds for one answer (default: %(default)s)"
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded, for all commands that generate."""
    parser.add_argument(
        "--head",
        choices=["int8", "int4", "ternary"],
        help="pack the output head, too: faster, with int8 nearly the same (see README)",
    )
    parser.add_argument("--adapter", metavar="DIR", help="a LoRA adapter beside the layers, as PEFT saves it")
    parser.add_argument("--activation-bits", choices=["8", "16", "none"], help="of layers made for float activations")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    parser.add_argument(
        "--backend", default="auto", help="of the packed layers; see `bitnet info` (default: %(default)s)"
    )


def model_options(args: argparse.Namespace, **more: Any) -> Any:
    """The same as bitnet.serving.run.Options."""
    from ..serving.run import Options

    bits = {None: "auto", "none": None, "8": 8, "16": 16}[args.activation_bits]
    return Options(args.head, args.adapter, args.backend, bits, args.device, **more)


def run(args: argparse.Namespace) -> int:
    with collector_off() as loaded:
        from ..serving.run import serve

        for name in ("max_batch", "max_queue", "context", "timeout"):
            if (value := getattr(args, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value:g}")
        limits = {"context": args.context, "max_batch": args.max_batch, "max_queue": args.max_queue}
        key = args.api_key if args.api_key_file is None else args.api_key_file.read_text().strip()
        if key == "":
            raise ValueError("the API key is empty")
        where = {"host": args.host, "port": args.port, "name": args.name}
        options = model_options(args, **limits, loaded=loaded)
        serve(args.checkpoint, options, **where, api_key=key, seconds=args.timeout)
    return 0
