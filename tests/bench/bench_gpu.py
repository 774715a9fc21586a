"""How fast packed layers, a training step and whole tokens are on this GPU, against bf16 and what memory allows.

    python -m pytest -q -m gpu tests && python tests/bench/bench_gpu.py --quick     (everything that needs a GPU)
    python tests/bench/bench_gpu.py [--peers] [--csv tests/bench/results.csv]

Run it from the repository's root, installed or not. Every call goes through the public layer, quantizing and rescaling
included. Calls are replayed as CUDA graphs, weights rotate through three times the L2 cache, data are random, medians
are compared. --peers adds gemlite, humming-kernels and torchao's training where they are installed; gemlite tunes for
minutes on its first calls. One row a figure is appended to the CSV.

The floor is the larger of two times: bytes (weights, x and y) at the speed of a large copy, and products at the speed
of a large bf16 matmul, doubled for int8; both are measured first.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import results
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import bitnet
from bitnet import PackedBitLinear
from bitnet.kernels import backends
from bitnet.kernels.layout import pack_codes
from bitnet.linear import BitLayer
from bitnet.packing import to_packed
from bitnet.tuning import graph_seconds

SHAPES = [(2560, 2560), (6912, 2560), (4096, 4096), (14336, 4096), (8192, 8192), (28672, 8192)]  # (N, K)
TOKENS = [1, 4, 16, 64, 256, 1024, 4096]
HEAD, HEAD_TOKENS = (128_256, 2560), [1, 16, 64]
Run = Callable[[Tensor], object]


def random_codes(n: int, k: int) -> Tensor:
    return torch.randint(-1, 2, (n, k), dtype=torch.int8, device="cuda")


def ours(bits: float, **options: Any) -> Callable[[int, int, int], Iterator[Run]]:
    def make(n: int, k: int, m: int) -> Iterator[Run]:
        layer = PackedBitLinear(k, n, bias=False, weight_bits=bits, device="cuda", **options)
        layer.weight.copy_(pack_codes(random_codes(n, k), layer.spec.weights))
        layer.weight_scale.fill_(0.5)
        weight, _ = layer.prepack()
        while True:
            twin = PackedBitLinear(k, n, bias=False, weight_bits=bits, device="meta", **options)
            twin.weight, twin.weight_scale = (
                layer.weight,
                layer.weight_scale.clone(),
            )  # Hub bytes are not read in a call
            twin._prepacked = layer._prepacked._replace(weight=weight.clone())
            yield twin

    return make


def torch_bf16(n: int, k: int, m: int) -> Iterator[Run]:
    while True:
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        yield lambda x, w=w: F.linear(x, w)


def torch_int8(n: int, k: int, m: int) -> Iterator[Run]:
    """The product alone: quantizing and rescaling are not counted."""
    q = torch.randint(-128, 128, (max(m, 32), k), dtype=torch.int8, device="cuda")
    while True:
        w = random_codes(n, k)
        yield lambda x, w=w: torch._int_mm(q, w.t())


def gemlite(n: int, k: int, m: int) -> Iterator[Run]:
    from gemlite.helper import A8W158_INT_dynamic

    while True:
        layer = A8W158_INT_dynamic(dtype=torch.bfloat16)
        yield layer.from_weights(random_codes(n, k).bfloat16(), torch.ones(1))


def humming(n: int, k: int, m: int) -> Iterator[Run]:
    from humming.layer import HummingLayer

    while True:
        options = {"weight_config": {"dtype": "int2"}, "input_config": {"dtype": "int8"}}
        layer = HummingLayer(shape_n=n, shape_k=k, torch_dtype=torch.bfloat16, **options).cuda()
        layer.load_from_unquantized(random_codes(n, k).bfloat16())
        layer.transform()
        yield layer


Candidates = dict[str, tuple[Callable[[int, int, int], Iterator[Run]], str, float]]  # how, what, bits a weight
CANDIDATES: Candidates = {
    "triton": (ours(2), "2 bit", 2),
    "triton-base3": (ours(1.6), "1.6 bit", 1.6),
    "triton, groups of 128": (ours(2, group_size=128), "2 bit, groups of 128", 2 + 16 / 128),
    "triton, groups of 32": (ours(2, group_size=32), "2 bit, groups of 32", 2 + 16 / 32),
    "triton, 16-bit tokens": (ours(2, activation_bits=16), "2 bit, 16-bit tokens", 2),
    "triton, float tokens": (ours(2, activation_bits=None), "2 bit, float tokens", 2),
    "triton, float tokens, groups of 128": (
        ours(2, activation_bits=None, group_size=128),
        "2 bit, float tokens, groups of 128",
        2 + 16 / 128,
    ),
    "torch bf16": (torch_bf16, "bf16", 16),
    "torch int8": (torch_int8, "int8", 8),
}
HEADS: Candidates = {
    "triton, int8": (ours(2, weights="int8", per_row=True), "int8", 8),
    "triton, int4": (ours(2, weights="int4", group_size=32), "int4", 4.5),
    "torch bf16": CANDIDATES["torch bf16"],
}
PEERS: Candidates = {"gemlite": (gemlite, "2 bit", 2), "humming-kernels": (humming, "2 bit", 2)}


def seconds(make: Callable[[int, int, int], Iterator[Run]], m: int, n: int, k: int, bits: float, rounds: int) -> Tensor:
    """Seconds a call, one figure a round, with weights of three L2 caches' size together."""
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    copies = int(3 * torch.cuda.get_device_properties(x.device).L2_cache_size / (n * k * bits / 8)) + 2
    runs = [run for _, run in zip(range(copies), make(n, k, m), strict=False)]
    return graph_seconds([(lambda run=run: run(x)) for run in runs], rounds)


def limits() -> tuple[float, float]:
    """Bytes a second of a copy (read and written), and bf16 operations a second of a matmul."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    copy = graph_seconds([lambda: b.copy_(a)], 5).median().item()
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = graph_seconds([lambda: x @ x], 3).median().item()
    return 2 * a.nbytes / copy, 2 * 8192**3 / product


def floor(m: int, n: int, k: int, bits: float, bandwidth: float, flops: float) -> float:
    """Seconds that no kernel can beat."""
    return max((n * k * bits / 8 + 2 * m * (n + k)) / bandwidth, 2 * m * n * k / (flops if bits == 16 else 2 * flops))


class Block(nn.Module):
    """A transformer block of the Llama-3-8B shape."""

    def __init__(self, hidden: int = 4096, inner: int = 14336, heads: int = 32, kv_heads: int = 8) -> None:
        super().__init__()
        self.head, self.groups = hidden // heads, heads // kv_heads
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.q, self.o = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(hidden, kv_heads * self.head, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (-1, self.head)).transpose(-2, -3) for p in (self.q, self.k, self.v))
        k, v = (t.repeat_interleave(self.groups, -3) for t in (k, v))
        x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(-2, -3).flatten(-2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def step_seconds(kind: str, compiled: bool, tokens: int = 4096, rounds: int = 10) -> Tensor:
    """Seconds of a forward and backward pass, one figure a round."""
    with torch.device("cuda"):
        block = Block().bfloat16()
    if kind == "bitnet":
        for name, module in [*block.named_modules()]:
            if isinstance(module, nn.Linear):
                block.set_submodule(name, bitnet.BitLinear.from_linear(module))
    elif kind == "torchao":
        from torchao import quantize_
        from torchao.prototype.quantized_training import bitnet_training

        quantize_(block, bitnet_training())
    run = torch.compile(block) if compiled else block
    x = torch.randn(1, tokens, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    gy = torch.randn_like(x)
    times = []
    for _ in range(rounds + 3):
        for parameter in block.parameters():
            parameter.grad = None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(x).backward(gy)
        end.record()
        end.synchronize()
        times.append(1e-3 * start.elapsed_time(end))
    return torch.tensor(times[3:], dtype=torch.float64)


def random_model(layers: int, device: str, **sizes: int) -> PreTrainedModel:
    """A packed Llama of bitnet-b1.58-2B-4T's shape with random codes and a head of 8 bits."""
    sizes = {
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_attention_heads": 20,
        "num_key_value_heads": 5,
    } | sizes
    sizes = {"vocab_size": 128_256, "max_position_embeddings": 4096, "num_hidden_layers": layers} | sizes
    config = AutoConfig.for_model("llama", tie_word_embeddings=True, pad_token_id=0, dtype=torch.bfloat16, **sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        bitnet.replace_linear(model)
        for module in [m for m in model.modules() if isinstance(m, BitLayer)]:
            to_packed(module)
    model = model.to(torch.bfloat16).to_empty(device=device).eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, PackedBitLinear):
            codes = torch.randint(-1, 2, (module.out_features, module.in_features), dtype=torch.int8, device=device)
            module.weight = pack_codes(codes, "ternary")
            module.weight_scale = torch.full((1,), (module.in_features / 1.5) ** -0.5, device=device)
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(std=0.02)
        elif "Norm" in type(module).__name__:
            module.weight.fill_(1)
        elif hasattr(module, "inv_freq"):
            half = torch.arange(len(module.inv_freq), device=device) / len(module.inv_freq)
            module.inv_freq = 10_000.0**-half
    model.tie_weights()
    bitnet.pack(model, head="int8")
    return model


def token_seconds(model: PreTrainedModel, rows: int, rounds: int, tokens: int = 32, context: int = 128) -> Tensor:
    """Seconds a token of each row through generate(), one figure a round: what more tokens take more."""
    ids = torch.randint(5, model.config.vocab_size, (rows, context), device=model.device)
    found = []
    for round in range(rounds + 1):
        times = []
        for new in (4, 4 + tokens):
            options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
            torch.cuda.synchronize()
            start = time.perf_counter()
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        found += [(times[1] - times[0]) / tokens] * (round > 0)
    return torch.tensor(found, dtype=torch.float64)


def measure_tokens(quick: bool, common: dict[str, str]) -> list[dict[str, Any]]:
    """Whole tokens, as CUDA graphs (bitnet/decode/captured.py) and in transformers' forward with the same layers."""
    model, rows = random_model(30, "cuda"), []
    for m in (1, 8):
        times: dict[str, Tensor] = {}
        for name in ("captured", "transformers"):
            bitnet.native_decoding(model, "auto" if name == "captured" else None)
            times[name] = token_seconds(model, m, 3 if quick else 7)
            what = {
                "op": "token",
                "m": m,
                "n": "",
                "k": "",
                "dtype": "2 bit, int8 head",
                "backend": name,
                "threads": "",
            }
            rows.append(results.row(what, times[name], None, common))
        mine = times["captured"].median()
        words = f"{1e3 * mine:.2f} ms, transformers {times['transformers'].median() / mine:.1f}"
        print(f"a token of each of {m} sequences, 2B-4T's shape, generate(): {words}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three shapes, fewer tokens, no compiled training step")
    parser.add_argument("--peers", action="store_true", help="gemlite, humming-kernels and torchao, where installed")
    parser.add_argument("--csv", type=Path, default=results.FILE)
    args = parser.parse_args()
    if missing := backends.BACKENDS["triton"].missing(torch.device("cuda"), 8, False):
        sys.exit(f"there is nothing to measure here: {missing}")
    shapes, tokens = ([SHAPES[i] for i in (0, 3, 5)], [1, 16, 64, 256, 4096]) if args.quick else (SHAPES, TOKENS)
    candidates = CANDIDATES | (PEERS if args.peers else {})
    common = results.gpu_conditions()
    bandwidth, flops = limits()
    print(
        f"{common['hardware']}; {common['versions']}; copy {bandwidth / 1e12:.2f} TB/s, bf16 {flops / 1e12:.0f} TFLOP/s"
    )
    print("µs a call of what stands first; its floor; and how many times as long as it the others take")
    rows = []
    refused: dict[str, str] = {}
    work = [(shape, m, candidates) for shape in shapes for m in tokens] + [(HEAD, m, HEADS) for m in HEAD_TOKENS]
    for (n, k), m, tried in work:
        first = next(iter(tried))
        times: dict[str, Tensor] = {}
        for name, (make, kind, bits) in tried.items():
            if name in refused:
                continue
            try:
                with torch.no_grad():
                    times[name] = seconds(make, m, n, k, bits, 5 if args.quick else 15)
            except Exception as error:
                if name == first:
                    raise
                refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                print(f"{name} is skipped from here on: {refused[name]}")
                continue
            what = {"op": "ternary_linear", "m": m, "n": n, "k": k, "dtype": kind, "backend": name, "threads": ""}
            rows.append(results.row(what, times[name], n * k * bits / 8, common))
        mine = times[first].median()
        words = [f"N {n:>6} K {k:>4} M {m:>4}: {first} {1e6 * mine:7.1f} µs"]
        words += [f"floor {1e6 * floor(m, n, k, tried[first][2], bandwidth, flops):.1f}"]
        words += [f"{name} {t.median() / mine:.2f}" for name, t in times.items() if name != first]
        print(", ".join(words), flush=True)
    kinds = ["nn.Linear", "bitnet"] + (["torchao"] if args.peers else [])
    for compiled in [False] if args.quick else [False, True]:
        steps: dict[str, Tensor] = {}
        for kind in kinds:
            try:
                steps[kind] = step_seconds(kind, compiled)
            except ImportError as error:
                print(f"{kind} is skipped: {error}")
                continue
            what: dict[str, Any] = {"op": "training_step", "m": 4096, "n": "", "k": "", "dtype": "bf16"}
            what |= {"backend": f"{kind}{', compiled' if compiled else ''}", "threads": ""}
            rows.append(results.row(what, steps[kind], None, common))
        base = steps["nn.Linear"].median()
        words = [f"{kind} {t.median() / base:.2f}" for kind, t in steps.items()]
        form = "compiled" if compiled else "eager"
        print(
            f"training step of a Llama-8B block, 4096 tokens, {form}: {1e3 * base:.1f} ms; {', '.join(words)}",
            flush=True,
        )
    rows += measure_tokens(args.quick, common)
    results.append(rows, args.csv)


if __name__ == "__main__":
    main()
