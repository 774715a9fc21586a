"""Train a language model in 1.58 bit from nothing, with the library's parts, beside its full-precision twin.

Run:  python examples/from_scratch.py          (about two minutes on two idle CPU cores)

Documents become rows of tokens in which attention stays within a document; Muon trains the matrices, AdamW the rest;
the quantization ramps up on the way. `bitnet train --help` is this as a command, with checkpoints and a report. The
last lines say what 1.58 bit costs on text that neither model has seen.
"""

import argparse
import math
from pathlib import Path

import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import bitnet
from bitnet.train.data import END, VOCABULARY, PackedRows, build_tokenizer, corpus
from bitnet.train.evaluate import spread_loss
from bitnet.train.loop import Loop
from bitnet.train.monitors import Monitor
from bitnet.train.optimizers import make_optimizers
from bitnet.train.schedule import Schedule

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=400, help="of 1024 bytes, for each model (default: %(default)s)")
parser.add_argument("--out", type=Path, default=Path("from-scratch"), help="where the packed model goes")
args = parser.parse_args()
CONTEXT, BATCH = 256, 4

# 1. Text: the standard library's sources, bytes as tokens; END follows each file. Your own: bitnet.train.texts.
training, held_out, facts = corpus()
ends = (training == END).nonzero().flatten()
starts = torch.cat([torch.zeros(1, dtype=torch.long), ends[:-1] + 1])  # where documents start
rows = PackedRows(training, starts, BATCH, CONTEXT, seed=0)
print(f"{len(starts)} documents, {len(training):,} tokens, {rows.rows:,} rows of {CONTEXT}")


# 2. A model and its twin: the same weights at the start, the same rows in the same order.
def new_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=2,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=END,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2)  # small models drown in small embeddings
    return model


def train(model: LlamaForCausalLM, label: str) -> Loop:
    """The schedule's strength moves layers of ours from full precision to 1.58 bit; others have none."""
    optimizers = make_optimizers(model, "muon", lr=1e-2, adamw_lr=1.2e-2, momentum=0.9)
    schedule = Schedule(args.steps, "linear", warmup=0.04, final_lr=0.05, strength_start=0.2, strength_end=0.7)
    loop = Loop(model, rows, optimizers, schedule, clip=1.0, monitor=Monitor(model, max(1, args.steps // 10)))
    loop.run(label, Console(), show=lambda loss: f"{loss / math.log(2):.3f} bits/byte")
    return loop


full, ternary = new_model(), new_model()
print(bitnet.replace_linear(ternary))
train(full, "full precision")
loop = train(ternary, "1.58 bit")
for look in loop.metrics:
    flips, zeros = look["bitnet/flips"], look["bitnet/zeros"]
    print(f"step {look['step']:>5}: a step changes {flips:.3%} of the codes; {zeros:.1%} are 0")

# 3. Packed, saved with its tokenizer, loaded: two bits a weight, the same model.
scores = [spread_loss(model, held_out, CONTEXT) / math.log(2) for model in (full, ternary)]
bitnet.pack(ternary)
bitnet.save(ternary, args.out)
build_tokenizer().save_pretrained(args.out)
served = spread_loss(bitnet.load(args.out), held_out, CONTEXT) / math.log(2)

print(f"\nbits per held-out byte: full precision {scores[0]:.4f}, 1.58 bit {scores[1]:.4f}, as served {served:.4f}")
print(f"1.58 bit costs {100 * (scores[1] / scores[0] - 1):.1f} % here; bitnet generate {args.out} 'import ' continues")
assert served == scores[1], "what was trained is what is served"
