"""The `bitnet` command."""

import argparse
import io
import os
import sys
from collections.abc import Sequence

EPILOG = """examples:
  bitnet quickstart                         train, pack and reload a 1.58-bit model on this machine (about 5 minutes)
  bitnet generate quickstart/ternary "def "  continue a prompt with it
  bitnet serve quickstart/ternary           the same model behind an OpenAI-compatible API
  bitnet inspect quickstart/ternary         its layers and codes, and whether anything is wrong with them
  bitnet convert SRC DST --to base3         the same weights in another form
  bitnet tune my-model-1.58                 on a GPU: measure which kernel configurations suit its layers
"""


# The forms `bitnet convert` writes: convert/stream.py's TARGETS, in words; importing that here would take seconds.
FORMS = {
    "hub": "packed, 2 bits a weight, in the Hub's `bitnet` format, which stock transformers loads, too",
    "base3": "packed, 1.6 bits a weight; loads with this package only",
    "latent": "float weights, marked for training in 1.58 bit",
    "bf16": "codes x scale in bfloat16, for any runtime; activations are no longer quantized",
    "gguf-tq2_0": "a GGUF file for llama.cpp, 2.06 bits a weight",
    "gguf-tq1_0": "the same, 1.69 bits; slower",
    "gguf-q2_0": "for recent llama.cpp, 2.25 bits; row lengths may be any multiple of 64 instead of 256",
    "gguf-i2_s": "for bitnet.cpp on x86-64, 2 bits",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="bitnet",
        description="Train, convert and serve 1-bit and 1.58-bit language models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser("info", help="versions, hardware, and which backends are ready (and why others are not)")

    quickstart = commands.add_parser(
        "quickstart",
        help="the whole loop on real text: train in full precision and in 1.58 bit, pack, reload, compare",
        description="Trains a small byte-level Llama on the Python standard library's sources, once in full precision "
        "and once in 1.58 bit on the same tokens, packs and reloads it, and writes both models, report.json and "
        "report.png to the output folder.",
    )
    quickstart.add_argument("--out", default="quickstart", help="output folder (default: %(default)s)")
    quickstart.add_argument("--seed", type=int, default=0, help="of the weights and the batches (default: %(default)s)")
    quickstart.add_argument(
        "--steps", type=int, help="training steps of each model (default: the tuned number; fewer is a quick look)"
    )

    generate = commands.add_parser(
        "generate",
        help="continue a prompt, streamed to the terminal",
        description="Loads a checkpoint and continues a prompt, streamed to the terminal as it is generated.",
    )
    generate.add_argument("checkpoint", metavar="DIR", help="a checkpoint directory with a tokenizer")
    generate.add_argument("prompt", nargs="?", default="-", help="text to continue; - or nothing reads standard input")
    generate.add_argument("--max-new-tokens", type=int, default=200, metavar="N", help="(default: %(default)s)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    generate.add_argument("--top-p", type=float, default=1.0, help="sample from this share of the probability")
    generate.add_argument("--seed", type=int, help="makes sampling repeatable")
    generate.add_argument("--chat", action="store_true", help="wrap the prompt as a user's turn in the chat template")
    generate.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    generate.add_argument(
        "--backend", default="auto", help="of the packed layers; see `bitnet info` (default: %(default)s)"
    )

    convert = commands.add_parser(
        "convert",
        help="turn a checkpoint on disk into another form, whatever its size",
        description="Converts a checkpoint tensor by tensor, in bounded memory. SRC is a Hugging Face checkpoint\n"
        "folder, a float model or a `bitnet` one in any published form, or a GGUF file. DST must not\n"
        "exist yet, or be an empty folder, and can be loaded only when it is complete.",
        epilog="forms:\n" + "".join(f"  {name:<10}  {what}\n" for name, what in FORMS.items()) + "\n"
        "A float model is rounded, not trained: expect nonsense from the result until it is\n"
        "fine-tuned; --calibrate makes it less bad.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    convert.add_argument("source", metavar="SRC", help="a checkpoint folder, or a GGUF file")
    convert.add_argument(
        "target", metavar="DST", help="a folder that does not exist yet or is empty, or a new GGUF file"
    )
    convert.add_argument(
        "--to", choices=FORMS, required=True, metavar="FORM", help=f"one of {', '.join(FORMS)}; see below"
    )
    convert.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of the files (default: %(default)s)")
    convert.add_argument("--resume", action="store_true", help="go on with a conversion that was interrupted")
    convert.add_argument(
        "--no-tokenizer",
        dest="tokenizer",
        action="store_false",
        help="leave the tokenizer out, where there is none or it cannot be converted",
    )
    swap = convert.add_argument_group("of a float model, which layers become low-bit, and how")
    swap.add_argument("--skip", action="append", metavar="REGEX", help="layers to leave alone besides head and routers")
    swap.add_argument("--include", action="append", metavar="REGEX", help="only these layers")
    swap.add_argument(
        "--per-row",
        action=argparse.BooleanOptionalAction,
        help="one scale per output row (default with --calibrate; loads with this package only), or one per matrix",
    )
    calibrate = convert.add_argument_group(
        "of a float model, rounding that is calibrated on text",
        "Instead of taking each weight to the nearest code, choose codes block by block so that the\noutputs on TEXT "
        "change least; prints each layer's signal-to-noise ratio and the perplexity\non held-out parts of TEXT, both "
        "ways. With --to latent, the weights become a start for\ntraining.",
    )
    calibrate.add_argument("--calibrate", metavar="TEXT", help="a UTF-8 text file like what the model will be used on")
    calibrate.add_argument(
        "--samples", type=int, default=128, metavar="N", help="stretches of it (default: %(default)s)"
    )
    calibrate.add_argument("--length", type=int, default=512, metavar="N", help="tokens in each (default: %(default)s)")
    calibrate.add_argument("--seed", type=int, default=0, metavar="N", help="of their choice (default: %(default)s)")
    calibrate.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")

    inspect = commands.add_parser(
        "inspect",
        help="what is in a checkpoint, layer by layer, and what is wrong with it",
        description="Reads a checkpoint once and prints, for every matrix, its shape, bits a weight, scale, the shares "
        "of -1, 0 and +1 and their entropy; then the totals and the problems found (exit status 1 if there are any).",
    )
    inspect.add_argument("checkpoint", metavar="PATH", help="a checkpoint folder, or a GGUF file")
    inspect.add_argument("--plot", metavar="FILE.png", help="draw shares, entropies and scales by depth")
    inspect.add_argument(
        "--diff",
        metavar="OTHER",
        help="compare with another checkpoint instead, tensor by tensor (exit status 1 if they differ)",
    )

    serve = commands.add_parser(
        "serve",
        help="an OpenAI-compatible API for a checkpoint (chat, completions, streaming)",
        description="Starts transformers' OpenAI-compatible server on a checkpoint. All further options are those of "
        "`transformers serve`, for instance --port 8000, --host 0.0.0.0, --device cpu, --continuous-batching.",
        epilog="`bitnet serve DIR --help` lists every option. There is no authentication: trusted networks only.",
    )
    serve.add_argument("checkpoint", metavar="DIR", help="a checkpoint directory with a tokenizer")
    serve.add_argument("options", nargs=argparse.REMAINDER, help="options of `transformers serve`")

    tune = commands.add_parser(
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
    tune.add_argument("targets", nargs="+", metavar="DIR|NxK", help="checkpoint directories, or shapes like 14336x4096")
    tune.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 4096], metavar="M", help="(default: %(default)s)"
    )
    tune.add_argument("--base3", action="store_true", help="tune the 1.6-bit form instead of the 2-bit one")
    tune.add_argument("--device", default="cuda", help="cuda, cuda:1, ... (default: %(default)s)")

    args = parser.parse_args(argv)
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")  # a terminal that lacks a letter shows a question mark
    try:
        if args.command == "info":
            from .info import info

            print(info())
        elif args.command == "quickstart":
            from .quickstart.run import run

            run(args.out, seed=args.seed, steps=args.steps)
        elif args.command == "generate":
            from .serving.app import generate as generate_text

            prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
            options = {name: value for name, value in vars(args).items() if name not in ("command", "prompt")}
            generate_text(prompt=prompt, **options)
        elif args.command == "convert":
            from .convert.conversion.convert import convert_checkpoint

            options = {name: value for name, value in vars(args).items() if name != "command"}
            if args.per_row is None:
                options["per_row"] = args.calibrate is not None
            convert_checkpoint(**options)
        elif args.command == "inspect":
            from .convert.inspection import diff_checkpoints, inspect_checkpoint

            if args.diff:
                comparison = diff_checkpoints(args.checkpoint, args.diff)
                print(comparison)
                return int(bool(comparison.differences))
            found = inspect_checkpoint(args.checkpoint)
            print(found)
            if args.plot:
                found.plot(args.plot)
            return int(bool(found.problems))
        elif args.command == "serve":
            from .serving.app import serve as run_server

            run_server(args.checkpoint, args.options)
        elif args.command == "tune":
            from .tuning import tune as tune_kernels

            tune_kernels(args.targets, args.tokens, args.base3, args.device)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        text = str(error).removeprefix(f"{args.command}: ")
        print(f"bitnet {args.command}: {text}", file=sys.stderr)
        return 1
    return 0
