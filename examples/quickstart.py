"""Train a 1.58-bit language model on the Python standard library's sources, pack it, reload it, generate.

Run:  python examples/quickstart.py            (about two minutes on two CPU cores)

The loop in as little code as possible. `bitnet quickstart` does the same beside a full-precision twin, with
figures and pictures.
"""

import math
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

import bitnet

STEPS, BATCH, CONTEXT = 800, 4, 256

# 1. Text: bytes are tokens. The last twentieth of the files is held out.
files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
split = len(files) * 19 // 20
train, held_out = (
    torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in part)), dtype=torch.uint8)
    for part in (files[:split], files[split:])
)

# 2. Any model, then one call: nn.Linear becomes BitLinear, and the report says what was kept and why.
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=2,
    bos_token_id=None,
    eos_token_id=None,
)
model = LlamaForCausalLM(config)
torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.2)
print(bitnet.replace_linear(model))

# 3. An ordinary training loop. set_strength moves from full precision to 1.58 bit between 20 % and 70 % of it.
matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
others = [p for p in model.parameters() if not any(p is m for m in matrices)]
optimizers = [bitnet.Muon(matrices, lr=1e-2, momentum=0.9), torch.optim.AdamW(others, lr=1.2e-2, betas=(0.9, 0.95))]
schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.05, STEPS) for o in optimizers]
start = time.perf_counter()
for step in range(STEPS):
    bitnet.set_strength(model, bitnet.strength_at(step, STEPS))
    at = torch.randint(len(train) - CONTEXT, (BATCH, 1))
    batch = train[at + torch.arange(CONTEXT + 1)].long()
    loss = F.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())
    loss.backward()
    for optimizer, schedule in zip(optimizers, schedules, strict=True):
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if step % 25 == 24:
        speed = (step + 1) * BATCH * CONTEXT / (time.perf_counter() - start)
        print(f"step {step + 1}/{STEPS}  {loss.item() / math.log(2):.3f} bits/byte  {speed:,.0f} tokens/s", flush=True)

# 4. Pack: two bits a weight, the same outputs. Save: a checkpoint that stock transformers loads, too.
model.eval()
windows = held_out[: len(held_out) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:64].long()
with torch.no_grad():
    trained = model(windows).logits
    bitnet.pack(model)
    bitnet.save(model, "quickstart/example")
    model = bitnet.load("quickstart/example")
    served = model(windows).logits
bits = F.cross_entropy(served[:, :-1].flatten(0, 1), windows[:, 1:].flatten()).item() / math.log(2)

# 5. Generate.
prompt = torch.tensor([list(b"import os\n\n\ndef ")])
text = model.generate(prompt, do_sample=True, temperature=0.7, max_new_tokens=120)
print(bytes(text[0].tolist()).decode(errors="replace"))
print(f"\n{bits:.3f} bits per held-out byte; largest difference between trained and served logits: ", end="")
print((trained - served).abs().max().item())
