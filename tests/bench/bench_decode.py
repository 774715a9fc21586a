"""A token end to end: a random model of bitnet-b1.58-2B-4T's shape, here and in llama.cpp on the same weights.

    python tests/bench/bench_decode.py [--threads 1 2] [--layers 30] [--architecture llama] [--stock] [--folder DIR]
        [--csv FILE]

A Llama (2560 wide, 6912 inside, 20 heads, 5 of them for keys and values, vocabulary 128,256) with random ternary codes:
speed does not depend on them. llama.cpp (llama-cpp-python) gets it as TQ2_0 through our converter, and its head as Q6_K
through its own quantizer; ours has 8 bits. Rounds take turns, medians are compared; what a raw read of our weights
takes stands beside, and what the packed layers take in transformers' own forward, as it is.
--architecture gives these sizes to another model type, and to qwen3_moe, deepseek_v2, gpt_oss and nemotron_h the blocks
of Qwen3-30B-A3B, DeepSeek-V2-Lite, gpt-oss-20b and Nemotron-3-Nano-30B-A3B (8 layers), to qwen3_5_text one like
Qwen3.5-4B's; llama.cpp takes part where it
has the architecture. --stock adds transformers' own `bitnet`
layers, which take minutes. 30 layers of a Llama need 6 GB of memory and 3 GB of disk.
--core-taken measures something else: 1 and 2 threads in turns, while another process is at work on one of two cores.
So does --ready: how long a new process takes to its first token, and the memory at its peak, as the file is and with
a head of 8 bits.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import results
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import bitnet
from bitnet.decode.attach import attach_decoding
from bitnet.decode.native import NativeSequences
from bitnet.experts import PackedStack
from bitnet.kernels.cpu import library
from bitnet.linear import BitLayer
from bitnet.packed import PackedBitLinear
from bitnet.packing import to_packed
from bitnet.serving.model import sequences_of

VOCABULARY, WIDTH, ROUNDS = 128_256, 2560, 9
CONTEXTS = (128, 1024)
SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
    },
    "qwen3_5_text": {"intermediate_size": 9216, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256},
    "deepseek_v2": {
        "hidden_size": 2048,
        "moe_intermediate_size": 1408,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
    },
    "nemotron_h": {
        "hidden_size": 2688,
        "layers_block_type": [*["linear_attention", "moe"] * 3, "full_attention", "moe"],
        "mamba_num_heads": 64,
        "mamba_head_dim": 64,
        "ssm_state_size": 128,
        "n_groups": 8,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "n_routed_experts": 128,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1856,
        "moe_shared_expert_intermediate_size": 3712,
    },
    "gpt_oss": {
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
    },
}
IN_LLAMA_CPP = ("llama", "qwen3_moe", "qwen3_5_text")


def build(folder: Path, layers: int, architecture: str) -> None:
    """Write the model, as published ones are: packed layers, and a bf16 embedding that is the head, too."""
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 6912, "num_attention_heads": 20, "num_key_value_heads": 5}
    config = AutoConfig.for_model(
        architecture,
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        **sizes | SIZES.get(architecture, {}),
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        bitnet.replace_linear(model)
        for module in [m for m in model.modules() if isinstance(m, BitLayer)]:
            to_packed(module)
    model.to(torch.bfloat16)
    for module in model.modules():
        if isinstance(module, PackedBitLinear | PackedStack):
            codes = torch.randint(0, 81, module.weight.shape, dtype=torch.uint8)
            module.weight = sum((codes // 3**j % 3) << 2 * j for j in range(4))
            module.weight_scale = torch.full(module.weight_scale.shape, (module.in_features / 1.5) ** -0.5)
        elif isinstance(module, torch.nn.Embedding):
            module.weight = torch.nn.Parameter(torch.randn(module.weight.shape, dtype=torch.bfloat16) * 0.02)
        elif "Norm" in type(module).__name__:
            module.weight = torch.nn.Parameter(torch.ones(module.weight.shape, dtype=torch.bfloat16))
        for name in ("weight", "bias"):
            if (tensor := getattr(module, name, None)) is not None and tensor.is_meta:
                zeros = torch.zeros(tensor.shape, dtype=tensor.dtype)
                setattr(module, name, torch.nn.Parameter(zeros) if isinstance(tensor, torch.nn.Parameter) else zeros)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta and name in module.state_dict():  # what corrects a router
                setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta or "router" in type(module).__name__.lower():  # routers, and a recurrence's speeds
                setattr(module, name, torch.nn.Parameter(torch.randn(parameter.shape, dtype=parameter.dtype) * 0.02))
    model.tie_weights()
    bitnet.save(model, folder)


def to_llama_cpp(folder: Path, file: Path) -> None:
    """The same weights for llama.cpp, with a head of 6 bits."""
    import llama_cpp

    from bitnet.convert.llama_cpp.writer import write_gguf
    from bitnet.convert.opening import open_source

    plain = file.with_suffix(".bf16-head")
    write_gguf(open_source(folder), plain, "gguf-tq2_0", tokenizer=False)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = 37, True  # LLAMA_FTYPE_MOSTLY_TQ2_0
    options.token_embedding_type = options.output_tensor_type = 14  # GGML_TYPE_Q6_K
    if llama_cpp.llama_model_quantize(str(plain).encode(), str(file).encode(), options):
        raise RuntimeError("llama.cpp could not quantize the head")
    plain.unlink()


class Ours:
    """The native step, or transformers' forward running lean."""

    def __init__(self, folder: Path) -> None:
        model = bitnet.load(folder)
        bitnet.pack(model, head="int8")
        self.model, (self.sequences, _) = model, sequences_of(model, 9)
        self.name = "native" if isinstance(self.sequences, NativeSequences) else "lean"
        layers = [m for m in model.modules() if isinstance(m, PackedBitLinear)]
        chosen = getattr(model.config, "num_experts_per_tok", 0)
        for stack in [m for m in model.modules() if isinstance(m, PackedStack)]:  # as many as a token takes
            layers += stack.layers()[:: len(stack.layers()) // chosen][:chosen]
        self.weights = [layer.prepack()[0] for layer in layers]

    def reset(self) -> None:
        for slot in range(9):
            self.sequences.truncate(slot, 0)

    def extend(self, ids: list[int]) -> None:
        self.sequences.extend([(0, torch.tensor(ids))])

    def batch(self, ids: list[int]) -> None:
        self.sequences.extend([(slot, torch.tensor(ids)) for slot in range(1, 9)])

    def read(self) -> None:
        for weight in self.weights:
            library.read(weight)


class LlamaCpp:
    """llama-cpp-python."""

    def __init__(self, file: Path, threads: int) -> None:
        import llama_cpp

        options: dict[str, Any] = {"n_ctx": 2048, "n_batch": 512, "n_ubatch": 512, "verbose": False}
        self._llama = llama_cpp.Llama(str(file), n_threads=threads, n_threads_batch=threads, **options)

    def reset(self) -> None:
        self._llama.reset()

    def extend(self, ids: list[int]) -> None:
        self._llama.eval(ids)


class Generate:
    """transformers' generate, natively behind, or its own layers; a call extends by so many tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    def per_token(self, prompt: list[int], tokens: int) -> float:
        """Median seconds from one token to the next."""
        ids, clock = torch.tensor([prompt]), Clock()
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
        self.model.generate(ids, max_new_tokens=1 + tokens, streamer=clock, **options)
        return statistics.median(after - before for before, after in pairwise(clock.times[1:]))  # the first: the prompt


class Clock:
    """A streamer that notes when each token comes."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def timed(call: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(threads: int, ours: Ours, gguf: Path | None, generate: Generate) -> dict[tuple[str, str], list[float]]:
    """Seconds by (what, who)."""
    torch.set_num_threads(threads)
    found: dict[tuple[str, str], list[float]] = {}
    dice = torch.Generator().manual_seed(0)
    prompt: list[int] = torch.randint(0, VOCABULARY, (1024,), generator=dice).tolist()
    others: dict[str, Any] = {ours.name: ours}
    if gguf is not None:
        others["llama.cpp TQ2_0"] = LlamaCpp(gguf, threads)

    def note(what: str, who: str, call: Callable[[], Any]) -> None:
        found.setdefault((what, who), []).append(timed(call))

    for round_ in range(3):
        for who, each in others.items():
            each.reset()
            each.extend(prompt[:8])
            each.reset()
            if round_:
                note("prefill 512", who, lambda each=each: each.extend(prompt[:512]))
            else:
                each.extend(prompt[:512])
    for context in CONTEXTS:
        for each in others.values():
            each.reset()
            for at in range(0, context, 128):
                each.extend(prompt[at : at + 128])
        for i in range(ROUNDS + 1):
            for who, each in others.items():
                call = lambda each=each, i=i: each.extend([prompt[i]])  # noqa: E731
                note(f"decode, context {context}", who, call) if i else call()
            if i:
                note(f"decode, context {context}", "read", ours.read)
    ours.reset()
    ours.batch(prompt[:128])
    for i in range(ROUNDS):
        note("decode, batch 8, context 128", ours.name, lambda i=i: ours.batch([prompt[i]]))
    others.clear()  # llama.cpp's threads would go on waiting for work on our cores
    for _ in range(3):
        attach_decoding(ours.model)
        generate.per_token(prompt[:8], 1)  # prepares
        ways = {"generate()": generate.per_token(prompt[:128], 16)}
        bitnet.native_decoding(ours.model, None)
        ways["transformers' forward"] = generate.per_token(prompt[:128], 8)
        for who, seconds in ways.items():
            found.setdefault(("decode, context 128", who), []).append(seconds)
        note("decode, context 128", "read", ours.read)
    attach_decoding(ours.model)
    return found


@contextmanager
def core_taken() -> Iterator[None]:
    """This process on two cores, and one that never rests on one of them."""
    before = os.sched_getaffinity(0)
    cores = sorted(before)[:2]
    if len(cores) < 2:
        raise SystemExit("--core-taken needs two cores")
    code = f"import os\nos.sched_setaffinity(0, {{{cores[1]}}})\nwhile True: pass"
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)
    with subprocess.Popen([sys.executable, "-c", code]) as other:
        try:
            time.sleep(1)
            yield
        finally:
            other.kill()
            for thread in os.listdir("/proc/self/task"):
                os.sched_setaffinity(int(thread), before)


def measure_taken(ours: Ours) -> dict[int, list[float]]:
    """Seconds of a token at context 128, by threads, while a core is taken; 64 tokens by one, then by two, in turns."""
    found: dict[int, list[float]] = {1: [], 2: []}
    prompt = list(range(128))
    torch.set_num_threads(2)
    with core_taken():
        for _ in range(ROUNDS):
            for threads, seconds in found.items():
                ours.reset()
                ours.extend(prompt)
                torch.set_num_threads(threads)
                ours.extend(prompt[:1])
                seconds += [timed(lambda i=i: ours.extend([i])) for i in range(64)]  # type: ignore[misc]
    return found


# A process that answers: what it took for, in seconds, and megabytes at its peak (of which getrusage would tell the
# parent's, were they more).
ANSWER = """
import sys, time
times = [time.perf_counter()]
import torch
from transformers import AutoModelForCausalLM
import bitnet
times.append(time.perf_counter())
model = bitnet.load(sys.argv[1], head=sys.argv[2] or None)
times.append(time.perf_counter())
model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, do_sample=False, eos_token_id=[], pad_token_id=0)
times.append(time.perf_counter())
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(*(after - before for before, after in zip(times, times[1:])), int(peak.split()[1]) / 1e3)
"""


def measure_ready(folder: Path) -> dict[str, dict[str, list[float]]]:
    """By head, and what it is of: each process's seconds, and megabytes of memory at its peak."""
    found: dict[str, dict[str, list[float]]] = {"none": {}, "int8": {}}
    for round_ in range(4):
        for head, columns in found.items():
            command = [sys.executable, "-c", ANSWER, str(folder), "" if head == "none" else head]
            values = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
            if round_:  # the first brings the files into memory
                for name, value in zip(("imports", "loading", "first token", "peak"), values, strict=True):
                    columns.setdefault(name, []).append(float(value))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--architecture", default="llama", help="a model type of transformers")
    parser.add_argument("--stock", action="store_true", help="measure transformers' own layers, too")
    parser.add_argument("--core-taken", action="store_true", help="1 and 2 threads while another process takes a core")
    parser.add_argument("--ready", action="store_true", help="new processes, to their first token")
    parser.add_argument("--folder", type=Path, help="where the model is, or is written to (default: a temporary one)")
    parser.add_argument("--csv", type=Path, default=results.FILE)
    args = parser.parse_args()
    logging.set_verbosity_error()
    common, rows = results.conditions(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.folder or Path(temporary)) / f"{args.architecture}-{args.layers}-layers"
        gguf: Path | None = folder / "model.gguf"
        if not (folder / "config.json").exists():
            build(folder, args.layers, args.architecture)
        if args.ready:
            print("a new process: seconds, and megabytes at its peak")
            for head, columns in measure_ready(folder).items():
                print(f"head {head}  " + "  ".join(f"{name} {statistics.median(c):.2f}" for name, c in columns.items()))
                del columns["peak"]
                for name, seconds in columns.items():
                    op = {"op": f"ready: {name}, {args.layers} layers", "m": 1, "n": VOCABULARY, "k": WIDTH}
                    shape = {"dtype": f"head {head}", "backend": "native", "threads": torch.get_num_threads()}
                    rows.append(results.row(op | shape, torch.tensor(seconds, dtype=torch.float64), None, common))
            return results.append(rows, args.csv)
        if args.core_taken:
            taken = measure_taken(Ours(folder))
            for threads, seconds in taken.items():
                mean = statistics.mean(seconds)
                times = statistics.mean(taken[1]) / mean
                print(f"threads {threads}  a core taken: {1e3 * mean:.1f} ms a token, {times:.2f} times as fast as one")
                op = {"op": f"decode, context 128, a core taken, {args.layers} layers", "m": 1, "n": VOCABULARY}
                shape = {"k": WIDTH, "dtype": "float32", "backend": "native", "threads": threads}
                rows.append(results.row(op | shape, torch.tensor(seconds, dtype=torch.float64), None, common))
            return results.append(rows, args.csv)
        if args.architecture not in IN_LLAMA_CPP:
            gguf = None
        elif not (folder / "model.gguf").exists():
            try:
                to_llama_cpp(folder, folder / "model.gguf")
            except ImportError:
                print("llama-cpp-python is not installed: without it", file=sys.stderr)
                gguf = None
        start = time.perf_counter()
        ours = Ours(folder)
        loading = time.perf_counter() - start
        kind = f"{args.layers} layers" + (f" of {args.architecture}" if args.architecture != "llama" else "")
        print(f"{common['hardware']}; {common['versions']}; {kind}; loaded in {loading:.1f} s")
        size = sum(weight.nbytes for weight in ours.weights)
        generate = Generate(ours.model)
        for threads in args.threads:
            found = measure(threads, ours, gguf, generate)
            if args.stock:
                stock = Generate(stock_model(folder))
                found["decode, context 128", "transformers' bitnet"] = [stock.per_token([5] * 128, 2)]
            for (what, who), seconds in found.items():
                middle = statistics.median(seconds)
                own = statistics.median(found.get((what, ours.name), seconds))
                compared = f"{1e3 * middle:9.1f} ms  {middle / own:6.2f} of {ours.name}"
                print(f"threads {threads}  {what:<30} {who:<22} {compared}", flush=True)
                op = {
                    "op": f"{what}, {kind}",
                    "m": 8 if "batch" in what else 512 if "prefill" in what else 1,
                }
                shape = {"n": VOCABULARY, "k": WIDTH, "dtype": "float32", "backend": who, "threads": threads}
                moved = size if "decode" in what and who in (ours.name, "read") else None
                rows.append(results.row(op | shape, torch.tensor(seconds, dtype=torch.float64), moved, common))
    results.append(rows, args.csv)


def stock_model(folder: Path) -> Any:
    """The checkpoint in transformers' own layers."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer

    kept = AUTO_QUANTIZER_MAPPING["bitnet"]
    AUTO_QUANTIZER_MAPPING["bitnet"] = BitNetHfQuantizer
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    finally:
        AUTO_QUANTIZER_MAPPING["bitnet"] = kept


if __name__ == "__main__":
    main()
