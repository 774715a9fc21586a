"""`bitnet train`: a model from text, new or from a checkpoint."""

import argparse
from typing import Any

from ..train.options import TrainOptions, add_options, from_yaml, given

EPILOG = """examples:
  a new model on your own text, bytes as tokens, packed in the end:
    bitnet train --architecture '{model_type: llama, hidden_size: 256, intermediate_size: 768,
      num_hidden_layers: 4, num_attention_heads: 4, num_key_value_heads: 4}' --embedding-std 0.2
      --lr 1e-2 --data notes/*.txt --out run
  an existing model to 1.58 bit, following its own predictions:
    bitnet train --model my-model --teacher my-model --data text.jsonl --steps 2000 --out run
  the same from a file of options, which flags override:
    bitnet train run.yaml --out run2 --seed 1
  on two GPUs, or in two processes of any machine:
    torchrun --nproc-per-node 2 -m bitnet train run.yaml
  how long it will take, before it is started; and after it was interrupted or killed:
    bitnet train run.yaml --dry-run
    bitnet train --resume run

Training starts in full precision and quantizes gradually (--strength-start, --strength-end); evaluation
always shows the fully quantized model. OUT gets model/ (packed, for bitnet generate and serve),
report.json, report.png, and checkpoints/, each of which is a model in training that --model takes.
"""


def add(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "train",
        usage="bitnet train [CONFIG.yaml] (--model DIR | --architecture CONFIG) --data FILE ... --out DIR [options]\n"
        "       bitnet train --resume OUT",
        help="train a model in 1.58 bit, new or from a checkpoint, and pack it",
        description="Trains a language model whose layers are quantized to 1.58 bits, on text files, and packs it.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG.yaml", help="a file with any of these options, as 'option: value' lines"
    )
    parser.add_argument("--resume", metavar="OUT", help="go on with a run from its last checkpoint")
    parser.add_argument(
        "--dry-run", action="store_true", help="say how large it is, and how long it would take; write nothing"
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options = given(args)
    if args.resume and (args.config or options or args.dry_run):
        raise ValueError("--resume OUT goes on with the options of the run; it takes no others")
    if not (args.resume or args.config or options):
        raise ValueError("what is to be trained, and on what? See bitnet train --help")
    chosen = None
    if not args.resume:
        chosen = from_yaml(args.config, **options) if args.config else TrainOptions(**options)
        chosen.check()

    from ..jobs.train import rehearse, resume, train

    if chosen is None:
        resume(args.resume)
    elif args.dry_run:
        rehearse(chosen)
    else:
        train(chosen)
    return 0
