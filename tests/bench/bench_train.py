"""What a training step costs: BitLinear against nn.Linear, and against the quantizer written in plain torch.

    python tests/bench/bench_train.py [--quick] [--isa avx2] [--threads 2] [--csv tests/bench/results.csv]

Forward, backward and AdamW of a Llama of 4 layers, 768 wide, on 4 x 256 tokens; the models take turns, step by step, so
noise of the machine hits all of them. The vocabulary is small, so that nearly all of the step is the layers'. One row a
figure is appended to the CSV (m: tokens, n: hidden size, k: intermediate size).
"""

import argparse
import time
from pathlib import Path
from typing import Any

import results
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import bitnet
from bitnet.kernels import products

HIDDEN, INTERMEDIATE, LAYERS, BATCH, LENGTH = 768, 2048, 4, 4, 256


class PlainTorch(nn.Linear):
    """The formulas as most people write them: fake-quantized float operands, gradients straight through."""

    def forward(self, input: Tensor) -> Tensor:
        w, x = self.weight, input
        scale = 1 / w.abs().mean().clamp(min=1e-5)
        s = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
        w = w + ((w * scale).round().clamp(-1, 1) / scale - w).detach()
        x = x + ((x * s).round().clamp(-128, 127) / s - x).detach()
        return F.linear(x, w)


def model(kind: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=LENGTH,
    )
    made = LlamaForCausalLM(config).to(dtype)
    if kind == "plain torch":
        for module in made.model.layers.modules():
            if type(module) is nn.Linear:
                module.__class__ = PlainTorch
    elif kind != "nn.Linear":
        bitnet.replace_linear(made)
        bitnet.set_strength(made, 0.5 if kind == "BitLinear, strength 0.5" else 1.0)
    return made.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="float32 only, 5 rounds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--csv", type=Path, default=results.FILE)
    results.add_isa(parser)
    args = parser.parse_args()
    results.hold(args.isa)
    torch.set_num_threads(args.threads)
    common = results.conditions()
    print(f"{common['hardware']}; {common['versions']}")
    ways = ", ".join(f"{name} {rate:.0f}" for name, rate in products.rates(BATCH * LENGTH, native=True).items())
    print(f"GOP/s of the exact product: {ways}")
    rows = []
    for dtype in (torch.float32,) if args.quick else (torch.float32, torch.bfloat16):
        kinds = ["nn.Linear", "BitLinear", "BitLinear, strength 0.5", "plain torch"]
        models = {kind: model(kind, dtype) for kind in kinds}
        optimizers = {kind: torch.optim.AdamW(m.parameters(), lr=1e-4, fused=True) for kind, m in models.items()}
        ids = torch.randint(257, (BATCH, LENGTH))
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(1 + (5 if args.quick else 15)):
            for kind in kinds:
                start = time.perf_counter()
                models[kind](input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimizers[kind].step()
                optimizers[kind].zero_grad()
                times[kind].append(time.perf_counter() - start)
        seconds = {kind: torch.tensor(t[1:], dtype=torch.float64) for kind, t in times.items()}
        base = seconds["nn.Linear"].median()
        name = str(dtype).removeprefix("torch.")
        for kind, t in seconds.items():
            print(
                f"{name} {kind:<24}{1e3 * t.median():8.0f} ms a step, {t.median() / base:.2f} x nn.Linear", flush=True
            )
            what = {"op": "training step", "m": BATCH * LENGTH, "n": HIDDEN, "k": INTERMEDIATE, "dtype": name}
            rows.append(results.row(what | {"backend": kind, "threads": args.threads}, t, None, common))
    results.append(rows, args.csv)


if __name__ == "__main__":
    main()
