"""A sentence-embedding model in 1.58 bit: swapped in one call, calibrated on a text, and taught by the float model.

Run:  python examples/embedding.py             (seconds: a small encoder of random weights stands in for a real one)
      python examples/embedding.py --model DIR --data text.txt ... --steps 1500      (an encoder and text of yours)

No labels are needed. The last lines say how alike the float model's ranking of held-out sentence pairs and others' are:
Spearman's correlation of their cosine similarities. Then `bitnet serve OUT` answers /v1/embeddings.
"""

import argparse
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

import bitnet
from bitnet.train.data import IGNORED, build_tokenizer, corpus
from bitnet.train.loop import Loop
from bitnet.train.optimizers import make_optimizers
from bitnet.train.schedule import Schedule

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", type=Path, help="a float encoder, a folder of sentence-transformers, say")
parser.add_argument("--data", type=Path, nargs="+", help="text files, with --model")
parser.add_argument("--steps", type=int, default=60, help="of BATCH sentences (default: %(default)s)")
parser.add_argument("--batch", type=int, default=16, help="sentences; many small steps learn most")
parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate (default: %(default)s)")
parser.add_argument("--bf16", action="store_true", help="autocast, on CPUs with such instructions and on GPUs")
parser.add_argument("--out", type=Path, default=Path("embedding-1.58"), help="where the packed model goes")
args = parser.parse_args()
LENGTH, HELD_OUT = 64, 400

# 1. The float encoder, and sentences: one in so many is held out.
if args.model:
    teacher = AutoModel.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = "\n\n".join(path.read_text(encoding="utf-8") for path in args.data)
else:
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    teacher, tokenizer = BertModel(BertConfig(vocab_size=257, initializer_range=0.2, **sizes)), build_tokenizer()
    text = bytes(corpus()[0][:200_000].clamp(max=255).tolist()).decode("latin-1")
found = dict.fromkeys(" ".join(s.split()) for s in re.split(r"(?<=[.!?:])\s+|\n\s*\n", text))
sentences = [s for s in found if 20 <= len(s) <= 300]
held_out = set(unseen := sentences[:: max(2, len(sentences) // HELD_OUT)][:HELD_OUT])
sentences = [s for s in sentences if s not in held_out]
print(f"{len(sentences):,} sentences to train on, {len(unseen)} held out")


def encoded(some: list[str]) -> dict[str, Tensor]:
    return dict(tokenizer(some, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt"))


class Sentences:
    """Batch number i: BATCH sentences drawn with i, alike in length, so that little of it is padding."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        dice = torch.Generator().manual_seed(index)
        at = int(torch.randint(max(1, len(sentences) - args.batch), (), generator=dice))
        batch = encoded(sentences[at : at + args.batch])
        return batch | {"labels": batch["input_ids"].where(batch["attention_mask"].bool(), IGNORED)}  # what counts


@torch.no_grad()
def similarities(model: nn.Module) -> Tensor:
    """The cosine similarity of all pairs of held-out sentences."""
    pooled = []
    for batch in (encoded(unseen[i : i + 50]) for i in range(0, len(unseen), 50)):
        mask = batch["attention_mask"][..., None]
        pooled.append((model.eval()(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    vectors = nn.functional.normalize(torch.cat(pooled), dim=-1)
    return (vectors @ vectors.T)[tuple(torch.triu_indices(len(unseen), len(unseen), 1))]


def spearman(model: nn.Module) -> float:
    ranks = [pairs.argsort().argsort().double() for pairs in (similarities(model), wanted)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


# 2. Its copy has low-bit layers, with codes chosen so that their outputs on the text change least.
wanted = similarities(teacher)
with tempfile.TemporaryDirectory() as folder:
    source, latent, seen = (Path(folder, name) for name in ("float", "latent", "text.txt"))
    teacher.save_pretrained(source)
    tokenizer.save_pretrained(source)
    seen.write_text("\n".join(sentences), encoding="utf-8")
    options: Any = {"calibrate": seen, "samples": min(128, len(sentences) // 10), "length": LENGTH}
    bitnet.convert_checkpoint(source, latent, "latent", group_size=128, hadamard=64, console=Console(), **options)
    student = AutoModel.from_pretrained(latent, dtype=torch.float32)
    bitnet.replace_linear(rounded := AutoModel.from_pretrained(source), group_size=128, hadamard=64)
scores = {"rounded": spearman(rounded), "calibrated": spearman(student)}

# 3. It learns the float model's hidden states, every layer's of every token, fully quantized from the first step.
sentences.sort(key=lambda s: (len(tokenizer.tokenize(s)), s))
student.get_input_embeddings().requires_grad_(False)  # as large as all layers together
for dropout in (module for module in student.modules() if isinstance(module, nn.Dropout)):
    dropout.p = 0.0  # the float model that it follows has none
loss = bitnet.Distillation(teacher, ce=0, kl=0, hidden=1.0, cosine=1.0)
options = {"loss": loss, "clip": 1.0, "autocast": torch.bfloat16 if args.bf16 else None}
optimizers = make_optimizers(student, "adamw", lr=args.lr, weight_decay=0.01)
schedule = Schedule(args.steps, strength_start=0.0, strength_end=0.0)
Loop(student, Sentences(), optimizers, schedule, **options).run("to 1.58 bit", Console())
scores["trained"] = spearman(student)

# 4. Packed, saved beside what the folder says of pooling, and measured as it is served.
bitnet.pack(student)
if args.model:
    shutil.copytree(args.model, args.out, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"), dirs_exist_ok=True)
bitnet.save(student, args.out)
tokenizer.save_pretrained(args.out)
scores["as served"] = spearman(bitnet.load(args.out))
print(f"\nSpearman's correlation with the float model over all pairs of {len(unseen)} held-out sentences: ", end="")
print(", ".join(f"{name} {score:.4f}" for name, score in scores.items()))
assert scores["as served"] == scores["trained"], "what was trained is what is served"
