"""Tokens per second of transformers' generate at batch 1: a Llama in float32, in bf16, and packed.

    python tests/bench/bench_decode.py [--threads 1 2] [--layers 6] [--csv tests/bench/results.csv]

Random weights: speed does not depend on them. The models take turns, medians are compared, and one row a model is
appended to the CSV, with n and k the vocabulary and the width, and times per token.
"""

import argparse
import copy
import time
from pathlib import Path

import results
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import bitnet

VOCABULARY, WIDTH, TOKENS, ROUNDS = 32000, 2048, 16, 6


def models(layers: int) -> dict[str, LlamaForCausalLM]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    full = LlamaForCausalLM(config).eval()
    found = {"float32": full, "bf16": copy.deepcopy(full).bfloat16()}
    for name, head in (("1.58 bit", None), ("1.58 bit, int8 head", "int8")):
        found[name] = copy.deepcopy(full)
        bitnet.replace_linear(found[name])
        bitnet.pack(found[name], head=head)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--csv", type=Path, default=results.FILE)
    args = parser.parse_args()
    common, rows = results.conditions(), []
    candidates = models(args.layers)
    prompt = torch.randint(0, VOCABULARY, (1, 32))
    options = {"do_sample": False, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS, "pad_token_id": 0}
    print(f"{common['hardware']}; {common['versions']}; {args.layers} layers; tokens per second")
    for threads in args.threads:
        torch.set_num_threads(threads)
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(ROUNDS + 1):
            for name, model in candidates.items():
                start = time.perf_counter()
                model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
                times[name].append((time.perf_counter() - start) / TOKENS)
        for name, seconds in times.items():
            per_token = torch.tensor(seconds[1:], dtype=torch.float64)  # the first round warms up
            print(f"threads {threads}  {name:<20} {1 / per_token.median():6.1f}", flush=True)
            what = {"op": f"generate, {args.layers} layers", "m": 1, "n": VOCABULARY, "k": WIDTH, "dtype": name}
            rows.append(results.row(what | {"backend": "auto", "threads": threads}, per_token, None, common))
    results.append(rows, args.csv)


if __name__ == "__main__":
    main()
