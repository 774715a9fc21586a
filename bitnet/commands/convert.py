"""`bitnet convert`: a checkpoint in another form."""

import argparse
from typing import Any

from .serve import MODEL

# The forms `bitnet convert` writes: conversion/plan.py's TARGETS, in words; importing that here would take seconds.
FORMS = {
    "hub": "packed, 2 bits a weight, in the Hub's `bitnet` format, which stock transformers loads, too",
    "base3": "packed, 1.6 bits a weight; loads with this package only",
    "binary": "packed, binary layers in 1 bit a weight, others in 2; loads with this package only",
    "latent": "float weights, marked for training in 1.58 bit",
    "bf16": "codes x scale in bfloat16, for any runtime; activations are no longer quantized",
    "mlx": "a folder for MLX, 2 bits a weight and its scales; activations are no longer quantized",
    "gguf-tq2_0": "a GGUF file for llama.cpp, 2.06 bits a weight",
    "gguf-tq1_0": "the same, 1.69 bits; slower",
    "gguf-q2_0": "for recent llama.cpp, 2.25 bits; row lengths may be any multiple of 64 instead of 256",
    "gguf-q1_0": "of a model of 1-bit weights, for recent llama.cpp, 1.125 bits",
    "gguf-i2_s": "for bitnet.cpp on x86-64, 2 bits",
    "gguf-pq2_0": "for PrismML's llama.cpp, 2.13 bits, rotated layers too; stock llama.cpp refuses it",
    "gguf-ptq1_0": "the same, 1.75 bits",
    "gguf-bf16": "codes x scale in bfloat16, for llama.cpp; activations are no longer quantized",
}


def add(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "convert",
        help="turn a checkpoint on disk into another form, whatever its size",
        description="Converts a checkpoint tensor by tensor, in bounded memory. SRC is a Hugging Face checkpoint\n"
        "folder, a float model or a `bitnet` one in any published form, one that MLX quantized to 1 or\n"
        "2 bits, or a GGUF file. DST must not exist yet, or be an empty folder, and can be loaded only\n"
        "when it is complete.",
        epilog="forms:\n" + "".join(f"  {name:<11}  {what}\n" for name, what in FORMS.items()) + "\n"
        "A float model is rounded, not trained: expect nonsense from the result until it is\n"
        "fine-tuned; --calibrate makes it less bad.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help=f"{MODEL}; MLX's folders, too")
    parser.add_argument(
        "target", metavar="DST", help="a folder that does not exist yet or is empty, or a new GGUF file"
    )
    parser.add_argument(
        "--to", choices=FORMS, required=True, metavar="FORM", help=f"one of {', '.join(FORMS)}; see below"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of the files (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on with a conversion that was interrupted")
    parser.add_argument(
        "--no-tokenizer",
        dest="tokenizer",
        action="store_false",
        help="leave the tokenizer out, where there is none or it cannot be converted",
    )
    parser.add_argument(
        "--head", choices=["int8", "int4", "ternary"], help="the output head in 8, 4.5 or 2 bits, too (in packed forms)"
    )
    swap = parser.add_argument_group("of a float model, which layers become low-bit, and how")
    swap.add_argument("--skip", action="append", metavar="REGEX", help="layers to leave alone besides head and routers")
    swap.add_argument("--include", action="append", metavar="REGEX", help="only these layers")
    swap.add_argument("--weights", choices=["ternary", "binary"], help="-1, 0 and 1, or -1 and 1 (default: ternary)")
    swap.add_argument(
        "--centered",
        action=argparse.BooleanOptionalAction,
        help="of binary weights: whether the mean is taken off before the sign (default: yes)",
    )
    swap.add_argument(
        "--activation-bits",
        choices=["16", "8", "4", "none"],
        help="of the layers' inputs; none keeps them float (default: 8)",
    )
    swap.add_argument(
        "--per-row",
        action=argparse.BooleanOptionalAction,
        help="one scale per output row (default with --calibrate but for groups; loads with this package only), or "
        "one per matrix",
    )
    swap.add_argument(
        "--group-size",
        type=int,
        metavar="N",
        help="one scale per output row and N features, 32, 64, 128 or 256 (loads with this package only)",
    )
    swap.add_argument(
        "--rotate",
        type=int,
        dest="hadamard",
        metavar="BLOCK",
        help="pass activations through a Walsh-Hadamard transform of so many features, and the weights with them "
        "(loads with this package only)",
    )
    swap.add_argument(
        "--rotate-signs",
        nargs="?",
        type=int,
        const=0,
        metavar="SEED",
        help="with --rotate, multiply features by signs first, drawn from SEED (default: 0)",
    )
    calibrate = parser.add_argument_group(
        "of a float model, rounding that is calibrated on text",
        "Instead of taking each weight to the nearest code, choose codes block by block so that the\noutputs on TEXT "
        "change least; prints each layer's signal-to-noise ratio and the perplexity\non held-out parts of TEXT, both "
        "ways (of encoders, how alike the last hidden states are to\nfloat's). With --to latent, the weights become a "
        "start for training.",
    )
    calibrate.add_argument(
        "--calibrate",
        metavar="TEXT",
        help="a text file like what the model will be used on, or the .jsonl file that bitnet write had it write",
    )
    calibrate.add_argument(
        "--samples", type=int, default=128, metavar="N", help="stretches of it (default: %(default)s)"
    )
    calibrate.add_argument("--length", type=int, default=512, metavar="N", help="tokens in each (default: %(default)s)")
    calibrate.add_argument("--seed", type=int, default=0, metavar="N", help="of their choice (default: %(default)s)")
    calibrate.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..convert.conversion.convert import convert_checkpoint

    options = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    if args.per_row is None:
        options["per_row"] = args.calibrate is not None and args.group_size is None
    if (seed := options.pop("rotate_signs")) is not None:
        options |= {"hadamard_signs": True, "signs_seed": seed}
    for name in ("weights", "centered"):
        if options[name] is None:
            del options[name]
    if (bits := options.pop("activation_bits")) is not None:
        options["activation_bits"] = None if bits == "none" else int(bits)
    convert_checkpoint(**options)
    return 0
