"""Damaged checkpoints through every reader: `python run.py FOLDER FIRST COUNT` prints a line for each finding.

A case is a number: it decides the form of the checkpoint, the damage and the reader. A reader must give what it gives
for the whole checkpoint, or an error of its own that names the file; or else the damage says something else that is
true (a config with another epsilon). Findings: raw errors, other results without a word, hangs, memory beyond three
times the files and 500 MB, and files touched outside of the folder. A crash ends the process: the last case printed.
"""

import contextlib
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import ggml_blocks
import gguf_models
import torch
from mutate import MUTATIONS
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import IDS, gpt2, llama, mixtral
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import bitnet
from bitnet.convert.conversion import plan
from bitnet.convert.files import mlx
from bitnet.convert.files.damaged import Damaged
from bitnet.convert.hub.models import model_config
from bitnet.convert.llama_cpp.writer import KINDS

QUIET = Console(quiet=True)
SECONDS, MEMORY = 30, 500 << 20
OURS = (ValueError, Damaged, OSError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


def build(root: Path) -> None:
    """The checkpoints that are damaged: in every form, none larger than 300 KB."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 336, "num_hidden_layers": 1}
    model = llama(**sizes, eos_token_id=0)
    model.save_pretrained(root / "float")
    model.save_pretrained(root / "shards", max_shard_size="30KB")
    bitnet.replace_linear(model)
    bitnet.save(model, root / "latent")
    bitnet.pack(model)
    bitnet.save(model, root / "hub")
    bitnet.save(model, root / "hub-shards", max_shard_size="30KB")
    bitnet.save(model, root / "base3", weight_bits=1.6)
    bitnet.pack(model, head="int8")
    bitnet.save(model, root / "int8")
    tied = llama(**sizes, tie_word_embeddings=True, eos_token_id=0)
    bitnet.replace_linear(tied, per_row=True, skip="o_proj")
    bitnet.pack(tied, head="int8")
    bitnet.save(tied, root / "tied")
    for name, other in (("gpt2", gpt2()), ("mixtral", mixtral())):
        other.save_pretrained(root / name)
        bitnet.replace_linear(other)
        bitnet.pack(other)
        bitnet.save(other, root / f"{name}-packed")
    for folder in root.iterdir():
        if folder.name.partition("-")[0] not in ("gpt2", "mixtral"):
            gguf_models.tokenizer("gpt-2", 300).save_pretrained(folder)
    bitnet.convert_checkpoint(root / "hub", root / "hub.gguf", "gguf-q2_0", console=QUIET)
    shutil.copytree(root / "hub", root / "pieces")
    gguf_models.sentencepiece().save_pretrained(root / "pieces")
    (root / "pieces" / "config.json").write_text((root / "hub" / "config.json").read_text())
    bitnet.convert_checkpoint(root / "pieces", root / "pieces.gguf", "gguf-q2_0", console=QUIET)
    shutil.rmtree(root / "pieces")
    bitnet.convert_checkpoint(root / "hub", root / "mlx", "mlx", console=QUIET)
    binary = llama(**sizes | {"hidden_size": 128, "intermediate_size": 128}, tie_word_embeddings=True, eos_token_id=0)
    bitnet.replace_linear(binary, weights="binary", centered=False, group_size=128)
    bitnet.pack(binary)
    bitnet.save(binary, root / "binary")
    gguf_models.tokenizer("gpt-2", 300).save_pretrained(root / "binary")
    for kind in ("q1_0", "q2_0"):
        bitnet.convert_checkpoint(root / "binary", root / f"{kind}.gguf", f"gguf-{kind}", console=QUIET)
    for name in ("PTQ1_0", "IQ1_BN", "IQ2_BN", "IQ2_BN_R4"):
        ggml_blocks.retyped(root / "q2_0.gguf", root / f"{name.lower()}.gguf", name)
    ggml_blocks.retyped(root / "q2_0.gguf", root / "older.gguf", "PQ2_0", number=42)
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    heads = {"linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32}
    own = {"qwen3_moe": {"moe_intermediate_size": 64}, "gemma3": {"query_pre_attn_scalar": 32}, "qwen3_5": heads}
    for family, changes in own.items():
        gguf_models.checkpoint(root / "family", family, **sizes | changes, eos_token_id=0)
        gguf_models.tokenizer("gpt-2", 300).save_pretrained(root / "family")
        bitnet.convert_checkpoint(root / "family", root / f"{family}.gguf", "gguf-q2_0", console=QUIET)
        shutil.rmtree(root / "family")
    shutil.copy(root / "hub" / "model.safetensors", root / "secret.safetensors")


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(IDS).logits


def contents(path: Path) -> Any:
    if path.is_file():
        return path.read_bytes()
    tensors = {key: value for file in sorted(path.glob("*.safetensors")) for key, value in load_file(file).items()}
    others = {file.name: file.read_bytes() for file in path.iterdir() if file.suffix not in (".safetensors", ".json")}
    return tensors, others, described(path / "config.json")


def described(file: Path) -> Any:
    """What transformers makes of a config.json; and what MLX does."""
    config = json.loads(file.read_text())
    if mlx.is_mlx(config):
        return model_config(file, mlx.without(config), 1000).to_dict(), mlx.scheme(file, config)
    return model_config(file, config, 1000).to_dict()


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, tuple):
        return all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def readers(whole: Path) -> dict[str, Callable[[Path, Path], Any]]:
    def convert(to: str, source: Path, out: Path) -> Any:
        return contents(bitnet.convert_checkpoint(source, out, to, console=QUIET, workers=1))

    def inspect(source: Path, out: Path) -> Any:
        found = bitnet.inspect_checkpoint(source, QUIET)
        return sorted(str(found).splitlines())  # the order is that of the files

    def diff(source: Path, out: Path) -> Any:
        return str(bitnet.diff_checkpoints(source, whole, QUIET))

    found: dict[str, Callable[[Path, Path], Any]] = {to: partial(convert, to) for to in plan.TARGETS}
    found |= {"inspect": inspect, "diff": diff}
    if whole.is_dir():
        found["load"] = lambda source, out: logits(bitnet.load(source))
    if whole.is_dir() and "quantization_config" in (whole / "config.json").read_text():
        found["from_pretrained"] = lambda source, out: logits(AutoModelForCausalLM.from_pretrained(source).eval())
    return found


class Hang(BaseException):
    pass


def attempt(read: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    def stop(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("error", UserWarning)
            return read(), None
    except BaseException as error:
        return None, error
    finally:
        signal.alarm(0)


touched: list[str] = []
home: list[str] = []


def watch(event: str, args: tuple[Any, ...]) -> None:
    if event != "open" or not home or not isinstance(args[0], str | bytes):
        return
    path, writes = os.path.realpath(os.fsdecode(args[0])), args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    secret = path.endswith("secret.safetensors") or path == "/etc/passwd"
    if secret or (writes and not path.startswith((home[0], "/dev/"))):
        touched.append(path)


def means_another_model(form: Path, source: Path, kind: str) -> bool:
    """Is the damage a statement about the model that could be true?"""
    if kind == "config":  # what transformers makes of it is another config
        try:
            return bool(described(form / "config.json") != described(source / "config.json"))
        except Exception:
            return False
    if kind == "header":  # safetensors reads other tensors out of it
        try:
            for file in source.glob("*.safetensors"):
                with safe_open(file, "pt") as stream:
                    before = load_file(form / file.name)
                    if before.keys() != {*stream.keys()}:
                        return True
                    if any(not same(stream.get_tensor(key), value) for key, value in before.items()):
                        return True
        except Exception:
            return False
    return kind in ("tokenizer", "gguf", "data")  # such as other merges, another epsilon, other codes


def case(number: int, root: Path, scratch: Path, whole: dict[tuple[str, str], Any]) -> tuple[str, str] | None:
    """Run one case; returns (what it was, what is wrong) if something is."""
    rng = random.Random(number)
    kind = rng.choice([*MUTATIONS, "config", "header", "gguf"])
    forms = [path for path in sorted(root.iterdir()) if path.name != "secret.safetensors"]
    suitable = {
        "gguf": lambda path: path.suffix == ".gguf",
        "data": lambda path: True,
        "index": lambda path: "shards" in path.name,
        "shards": lambda path: "shards" in path.name,
        "tokenizer": lambda path: (path / "tokenizer.json").exists(),
    }.get(kind, Path.is_dir)
    form = rng.choice([path for path in forms if suitable(path)])
    choices = readers(form)
    name = rng.choice(sorted(choices))
    if kind == "tokenizer":
        name = rng.choice(sorted(KINDS))
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    source = scratch / form.name
    shutil.copytree(form, source) if form.is_dir() else shutil.copyfile(form, source)
    shutil.copy(root / "secret.safetensors", scratch)
    if (form.name, name) not in whole:
        whole[form.name, name] = attempt(lambda: choices[name](source, scratch / "out"))
        shutil.rmtree(scratch / "out", ignore_errors=True)
        with contextlib.suppress(OSError):
            (scratch / "out").unlink()
    expected, refused = whole[form.name, name]
    if refused is not None and type(refused) not in OURS:
        return f"{number} {form.name} {name}", f"whole, it is refused: {refused!r}"
    try:
        what = f"{number} {form.name} {name} {MUTATIONS[kind](rng, source)}"
    except (OSError, RecursionError) as error:
        return f"{number} {form.name} {kind}", f"the mutation failed: {error!r}"
    touched.clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    home[:] = [str(scratch.resolve())]
    result, error = attempt(lambda: choices[name](source, scratch / "out"))
    home.clear()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before
    if touched and name != "from_pretrained":  # whose files transformers finds
        return what, f"touched {touched}"
    if grown > MEMORY:
        return what, f"took {grown >> 20} MB"
    if error is not None:
        frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if name == "from_pretrained" and not any("/convert/" in frame or "/bitnet/" in frame for frame in frames):
            return None  # transformers' own
        named = str(source) in str(error) or str(refused) == str(error)
        if kind == "data" and type(error) in OURS:
            return None  # it names the layer, and what was finished before it is kept
        if isinstance(error, UserWarning) or (type(error) in OURS and named):
            left = [path.name for path in scratch.iterdir() if path.name not in (source.name, "secret.safetensors")]
            return (what, f"left {left}") if left else None
        if type(error) in OURS and ("config.json" in str(error) or name == "from_pretrained"):
            return None
        where = "".join(traceback.format_tb(error.__traceback__)[-2:])
        return what, f"{type(error).__name__}: {str(error)[:300]}\n{where}"
    if refused is None and same(expected, result):
        return None
    if name == "inspect" and "no problems found" not in result:
        return None
    if name == "diff" and "0 different" not in result:
        return None
    if means_another_model(form, source, kind) or (name == "from_pretrained" and kind in ("shards", "index")):
        return None  # transformers says itself which tensors are missing
    return what, "another result without a word"


def main() -> None:
    root, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    scratch = root.parent / f"case-{first}"
    whole: dict[tuple[str, str], Any] = {}
    sys.addaudithook(watch)
    progress = root.parent / f"at-{first}"
    for number in range(first, first + count):
        progress.write_text(str(number))
        if found := case(number, root, scratch, whole):
            print(json.dumps(found), flush=True)
    shutil.rmtree(scratch, ignore_errors=True)
    progress.unlink()


if __name__ == "__main__":
    main()
