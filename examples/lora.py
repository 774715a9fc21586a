"""LoRA on a packed model: it learns new text while its 1.58-bit weights stay packed, and serves the two side by side.

Run:  python examples/lora.py                  (about a minute on two idle CPU cores: it trains a model first)
      python examples/lora.py --model DIR --data text.txt ...          (a packed model and text of yours)

Needs PEFT: pip install -e '.[lora]'. The last lines compare the packed model without and with its adapter on text of
the new kind that neither has seen, and what merging the adapter into 1.58-bit weights would leave of it.
"""

import argparse
import math
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

import bitnet
from bitnet.train.data import END, VOCABULARY, Windows, build_tokenizer, corpus
from bitnet.train.evaluate import spread_loss
from bitnet.train.loop import Loop
from bitnet.train.optimizers import make_optimizers
from bitnet.train.schedule import Schedule

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, help="a packed checkpoint with its tokenizer (default: trains a small one)")
parser.add_argument("--data", type=Path, nargs="+", help="text files, with --model")
parser.add_argument("--base-steps", type=int, default=300, help="of the packed model, without --model")
parser.add_argument("--steps", type=int, default=100, help="of the adapter (default: %(default)s)")
parser.add_argument("--rank", type=int, default=8, help="of the adapter (default: %(default)s)")
parser.add_argument("--out", type=Path, default=Path("lora"), help="where base and adapter go")
args = parser.parse_args()
CONTEXT, BATCH = 256, 4
console = Console()

# 1. A packed model. Yours, or a small byte-level Llama trained on the standard library's sources.
if args.model:
    from transformers import AutoTokenizer

    base, tokenizer = args.model, AutoTokenizer.from_pretrained(args.model)
    text = "\n".join(path.read_text() for path in args.data)
    tokens = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
else:
    base, tokenizer = args.out / "base", build_tokenizer()
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, eos_token_id=END, pad_token_id=END, **sizes))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2)
    bitnet.replace_linear(model)
    sources, _, _ = corpus()
    optimizers = make_optimizers(model, "muon", lr=1e-2, momentum=0.9)
    Loop(model, Windows(sources, BATCH, CONTEXT), optimizers, Schedule(args.base_steps), clip=1.0).run("base", console)
    bitnet.pack(model)
    bitnet.save(model, base)
    tokenizer.save_pretrained(base)
    # text of another kind: the same sources in capitals, every byte of which the base finds surprising
    tokens = torch.tensor(list(bytes(sources[sources != END].tolist()).upper()))
held_out, tokens = tokens[-len(tokens) // 10 :], tokens[: -len(tokens) // 10]


def loss(model: torch.nn.Module) -> float:
    return spread_loss(model, held_out, CONTEXT, 8192)


# 2. Its layers stay packed and frozen; PEFT puts a product of low rank beside each, and only that is trained.
packed = bitnet.load(base, dtype=torch.float32)
before = loss(packed)
rank = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM")
adapted = get_peft_model(packed, rank)
adapted.print_trainable_parameters()
optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
loop = Loop(adapted, Windows(tokens, BATCH, CONTEXT), [optimizer], Schedule(args.steps), clip=1.0)
loop.run("adapter", console)
after = loss(adapted)

# 3. The adapter is a small folder; whoever has the packed model loads it beside: bitnet serve BASE --adapter DIR
adapted.save_pretrained(args.out / "adapter")
served = loss(PeftModel.from_pretrained(bitnet.load(base, dtype=torch.float32), args.out / "adapter"))
assert served == after, "what was trained is what is served"

# 4. Merged into weights of 1.58 bit, most of it is lost.
with warnings.catch_warnings(action="ignore"):  # which says the same
    report = bitnet.merge_adapter(adapted)
merged = loss(adapted.get_base_model())
print(f"\nnats a token on new text: packed {before:.3f}, with the adapter {after:.3f}, merged {merged:.3f}")
print(f"merging kept {100 * report.kept:.0f} % of what the adapter adds; perplexity {math.exp(before):.1f} -> ", end="")
print(f"{math.exp(after):.1f} with it beside. Serve it: bitnet serve {base} --adapter {args.out / 'adapter'}")
