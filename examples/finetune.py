"""Take an existing model to 1.58 bit: the quantization ramps up while the model follows its float self.

Run:  python examples/finetune.py              (about two minutes on two idle CPU cores: it trains a float model first)
      python examples/finetune.py --model DIR --data text.txt ...         (a model and text of yours)

`bitnet train --model DIR --teacher DIR` is this as a command. The last lines compare the float model, plain rounding,
and the fine-tuned model on text that was held out.
"""

import argparse
import copy
import math
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import bitnet
from bitnet.train import texts
from bitnet.train.data import END, VOCABULARY, PackedRows, build_tokenizer, corpus
from bitnet.train.evaluate import spread_loss
from bitnet.train.loop import Loop
from bitnet.train.optimizers import make_optimizers
from bitnet.train.schedule import Schedule

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, help="a float checkpoint with its tokenizer (default: trains a small one)")
parser.add_argument("--data", type=Path, nargs="+", help="text files, with --model")
parser.add_argument("--steps", type=int, default=300, help="to 1.58 bit (default: %(default)s)")
parser.add_argument("--float-steps", type=int, default=600, help="of the float model, without --model")
parser.add_argument("--lr", type=float, default=3e-3, help="peak, to 1.58 bit (default: %(default)s)")
parser.add_argument("--out", type=Path, default=Path("finetuned"), help="where the packed model goes")
args = parser.parse_args()
CONTEXT, BATCH = 256, 4
console = Console()


def run(model: torch.nn.Module, rows: PackedRows, schedule: Schedule, lr: float, label: str, **options: object) -> None:
    optimizers = make_optimizers(model, "muon", lr=lr, momentum=0.9)
    Loop(model, rows, optimizers, schedule, clip=1.0, **options).run(label, console)  # type: ignore[arg-type]


# 1. The model there is, and text. Yours, or a small byte-level Llama on the standard library's sources.
if args.model:
    from transformers import AutoTokenizer

    tokenizer, teacher = AutoTokenizer.from_pretrained(args.model), bitnet.load(args.model, dtype=torch.float32)
    read, unseen = texts.split(texts.documents(args.data), 0.05, 1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        training = texts.tokenize(read, tokenizer, Path(folder) / "training.bin", console=console)
        rest = texts.tokenize(unseen, tokenizer, Path(folder) / "held-out.bin")
    rows = PackedRows(training.ids, training.starts, BATCH, CONTEXT)
    held_out, per_byte = rest.ids, rest.per_byte
else:
    tokenizer = build_tokenizer()
    ids, held_out, _ = corpus()
    starts = torch.cat([torch.zeros(1, dtype=torch.long), (ids == END).nonzero().flatten()[:-1] + 1])
    rows, per_byte = PackedRows(ids, starts, BATCH, CONTEXT), 1.0
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 2}
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, eos_token_id=END, pad_token_id=END, **sizes))
    torch.nn.init.normal_(teacher.model.embed_tokens.weight, std=0.2)
    run(teacher, rows, Schedule(args.float_steps), 1e-2, "float model")


def bits_per_byte(model: torch.nn.Module) -> float:
    return spread_loss(model, held_out, CONTEXT) / math.log(2) * per_byte


# 2. Its copy gets low-bit layers. Rounded and no more, it is useless.
student = copy.deepcopy(teacher)
print(bitnet.replace_linear(student, per_row=True))
scores = {"float": bits_per_byte(teacher), "rounded": bits_per_byte(student)}

# 3. In training it starts in full precision, as its teacher, and quantizes more and more until 60 % of the steps.
#    The loss is the text's and the distance to the teacher's predictions (and to how its last layer relates tokens).
distillation = bitnet.Distillation(teacher, ce=0.5, kl=1.0, relation=0.1)
ramp = Schedule(args.steps, strength_start=0.0, strength_end=0.6)
run(student, rows, ramp, args.lr, "to 1.58 bit", loss=distillation)
scores["fine-tuned"] = bits_per_byte(student)

# 4. Pack, save, and measure what is served.
bitnet.pack(student)
bitnet.save(student, args.out)
tokenizer.save_pretrained(args.out)
scores["as served"] = bits_per_byte(bitnet.load(args.out))
print("\nbits per held-out byte: " + ", ".join(f"{name} {score:.4f}" for name, score in scores.items()))
lost = (scores["fine-tuned"] - scores["float"]) / (scores["rounded"] - scores["float"])
print(f"fine-tuning took back {100 * (1 - lost):.1f} % of what rounding loses; the packed model is in {args.out}")
assert scores["as served"] == scores["fine-tuned"], "what was trained is what is served"
