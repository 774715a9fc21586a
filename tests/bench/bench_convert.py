"""Conversion of a large checkpoint against copying the same files: rate and peak memory.

    python tests/bench/bench_convert.py FOLDER [--layers 10] [--to hub base3]

Makes a random Llama checkpoint with the shapes of an 8B model in FOLDER (10 layers: 6.5 GB, in shards of 2 GB), once;
then, round by round, copies it and converts it in a fresh process, and prints and appends the medians. Every run ends
with its files on the disk (fsync). FOLDER is not cleaned up.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import results
import torch
from safetensors.torch import save_file

HIDDEN, INTER, VOCAB, KV = 4096, 14336, 128256, 1024


def make(folder: Path, layers: int) -> None:
    """A Llama-3-8B-shaped checkpoint of `layers` layers in bfloat16."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "vocab_size": VOCAB,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        for name, n, k in (("q", HIDDEN, HIDDEN), ("k", KV, HIDDEN), ("v", KV, HIDDEN), ("o", HIDDEN, HIDDEN)):
            shapes[f"{layer}.self_attn.{name}_proj.weight"] = (n, k)
        for name, n, k in (("gate", INTER, HIDDEN), ("up", INTER, HIDDEN), ("down", HIDDEN, INTER)):
            shapes[f"{layer}.mlp.{name}_proj.weight"] = (n, k)
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (HIDDEN,)
    shapes |= {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in shapes.items():
        size += 2 * torch.Size(shape).numel()
        if size > 2e9:
            shards.append({})
            size = 2 * torch.Size(shape).numel()
        shards[-1][name] = shape
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(
            {name: torch.randn(shape, dtype=torch.bfloat16) * 0.02 for name, shape in shard.items()}, folder / file
        )
        index |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config))


def copy(source: Path, target: Path) -> float:
    start = time.perf_counter()
    shutil.copytree(source, target)
    for file in target.iterdir():
        with file.open("rb+") as stream:
            os.fsync(stream.fileno())
    return time.perf_counter() - start


def convert(source: Path, target: Path, to: str) -> tuple[float, float]:
    """Seconds of the conversion, start of the process not counted, and its peak memory in MB."""
    code = f"""
import re, time
from bitnet.convert.conversion.plan import convert_checkpoint
start = time.perf_counter()
convert_checkpoint({str(source)!r}, {str(target)!r}, {to!r})
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())  # ru_maxrss would count the parent's, too
print(time.perf_counter() - start, int(peak[1]) * 1.024e-3)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    seconds, memory = map(float, done.stdout.split())
    return seconds, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--to", nargs="*", default=["hub", "base3"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    common = results.conditions()
    source, target = args.folder / f"float-{args.layers}", args.folder / "out"
    make(source, args.layers)
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    seconds: dict[str, list[float]] = {name: [] for name in ("copy", *args.to)}
    memory = 0.0
    for _ in range(args.rounds):
        for name in seconds:
            shutil.rmtree(target, ignore_errors=True)
            if name == "copy":
                seconds[name].append(copy(source, target))
            else:
                taken, peak = convert(source, target, name)
                seconds[name].append(taken)
                memory = max(memory, peak)
    shutil.rmtree(target)
    rows = []
    for name, times in seconds.items():
        what = {"op": f"convert {source.name}", "m": "", "n": "", "k": "", "dtype": "bfloat16", "backend": name}
        what["threads"] = torch.get_num_threads()
        rows.append(results.row(what, torch.tensor(times, dtype=torch.float64), size, common))
        middle = statistics.median(times)
        ratio = statistics.median([a / b for a, b in zip(seconds["copy"], times, strict=True)])
        print(f"{name:6} {middle:7.2f} s  {size / middle / 1e9:5.2f} GB/s  {100 * ratio:4.0f} % of the copy's rate")
    results.append(rows, results.FILE)
    bound = 1.5 * VOCAB * HIDDEN * 4 / 1e6 + 500
    print(f"peak memory {memory:,.0f} MB; 1.5 x the largest tensor in float32 + 500 MB is {bound:,.0f} MB")


if __name__ == "__main__":
    main()
