"""GGUF files in the real llama.cpp, by way of the PyPI package llama-cpp-python, against transformers' models.

llama.cpp rounds activations to 8 bits by blocks, we by tokens, so logits differ by what rounding does to them. How much
that is needs no guess: `emulated` runs transformers' own model on the codes in the file with llama.cpp's rounding, or
with none. Both sides then do the same arithmetic but for the order of float32 sums. Now and then that moves an
activation across a rounding boundary, which the rest of its text inherits; so most texts of four tokens must have
equal logits, and a long one's must differ by less than all roundings together make.
"""

import copy
import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf_models
import numpy as np
import pytest
import torch
from gguf_models import LLAMA3, TEXTS, checkpoint, gemma, sentencepiece, tokenizer
from rich.console import Console
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

import bitnet
from bitnet.convert.hub.source import FolderSource
from bitnet.convert.llama_cpp import tokenizer as gguf_tokenizer
from bitnet.convert.llama_cpp.header import header_bytes
from bitnet.convert.llama_cpp.writer import write_gguf
from bitnet.experts import PackedStack
from bitnet.kernels import reference
from bitnet.packed import PackedBitLinear, PackedEmbedding
from bitnet.quickstart.run import Settings, train
from bitnet.train.data import build_tokenizer, corpus

llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python", exc_type=ImportError)
pytestmark = pytest.mark.slow


def open_in_llama_cpp(file: Path, **options: Any) -> Any:
    """With one thread (more would spin) and, as in transformers, a float32 key-value cache."""
    float32 = 0
    common = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "logits_all": True, "verbose": False}
    return llama_cpp.Llama(str(file), **common | {"type_k": float32, "type_v": float32} | options)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def knows_q2_0() -> bool:
    library = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    library.ggml_type_name.restype = ctypes.c_char_p
    return bool(library.ggml_type_name(42) == b"q2_0")


Q2_0 = pytest.param("gguf-q2_0", marks=pytest.mark.skipif(not knows_q2_0(), reason="this llama.cpp has no Q2_0 yet"))
LOADABLE = ["gguf-tq1_0", "gguf-tq2_0", Q2_0, "gguf-bf16"]


def emulated(model: Any, kind: str | None) -> Any:
    """A copy of a packed model with llama.cpp's products: float16 scales, activations in blocks; None: not rounded.

    ggml/src/ggml-quants.c: quantize_row_q8_K_ref for TQ1_0 and TQ2_0, quantize_row_q8_0 for Q2_0, Q1_0 and Q8_0.
    """

    def rounded(x: Tensor, blocks_of_32: bool) -> Tensor:
        if kind is None:
            return x
        if kind == "gguf-bf16" and not blocks_of_32:
            return x.bfloat16().float()
        if blocks_of_32:
            blocks = x.reshape(-1, 32)
            d = blocks.abs().amax(1, keepdim=True) / 127
            q = torch.round(blocks * torch.where(d > 0, 1 / d, 0.0))
            return (q * d.half().float()).reshape(x.shape)
        blocks = x.reshape(-1, 256)
        inverse = -127 / blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
        return (torch.round(blocks * inverse).clamp(max=127) / inverse).reshape(x.shape)

    def product(layer: PackedBitLinear, order: Tensor | slice = slice(None)) -> Any:
        """order: of the features, which decides what shares a block"""
        floats = kind == "gguf-bf16" and layer.spec.weights != "int8"
        scale = layer.weight_scale
        scale = scale if floats or scale.ndim == 2 else scale.half().float()  # those of groups are float16
        weight = reference.dequantize_weight(layer.codes(), scale)[:, order]
        weight = weight.bfloat16().float() if floats else weight
        blocks_of_32 = kind in ("gguf-q2_0", "gguf-q1_0") or layer.spec.weights == "int8"
        return lambda x: torch.nn.functional.linear(rounded(x[..., order], blocks_of_32), weight, layer.bias)

    def gelu(x: Tensor) -> Tensor:
        """From a table of float16 numbers, outside of which it is 0 or x (ggml_vec_gelu_f32)."""
        table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x >= 10, x, torch.where(x <= -10, 0.0, table))

    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, PackedBitLinear):
            module.forward = product(module)
        elif isinstance(module, PackedStack):
            for layer in module.layers():
                layer.forward = product(layer)
        elif isinstance(module, Gemma3MLP) and kind is not None:
            module.act_fn.forward = gelu
    for module in model.modules():
        if isinstance(module, Qwen3_5GatedDeltaNet):  # whose heads of values llama.cpp has in another order
            heads = torch.arange(module.value_dim).view(module.num_k_heads, -1, module.head_v_dim)
            module.out_proj.forward = product(module.out_proj, heads.transpose(0, 1).reshape(-1))
        elif isinstance(module, PackedEmbedding):
            module.weight_scale = module.weight_scale.half().float()
    return model


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Any:
    return model(torch.tensor([ids])).logits[0].float().numpy()


SUMS = 512 * 2**-24  # the most that the order matters in a float32 sum of 512 terms, relative to it


def rms(x: Any) -> float:
    return float(np.sqrt((x**2).mean()))


def compare(model: Any, file: Path, kind: str, ids: list[int]) -> None:
    """Assert that llama.cpp's logits are those of `model` up to the rounding of activations."""
    llama = open_in_llama_cpp(file)

    def in_llama_cpp(ids: list[int]) -> Any:
        llama.reset()
        llama.eval(ids)
        return np.array(llama.scores[: len(ids)])

    same, plain = emulated(model, kind), emulated(model, None)
    equal = []
    for start in range(0, len(ids) - 3, 4):
        emulation = logits(same, part := ids[start : start + 4])
        # for most tokens: where a float32 sum in another order flips a rounding, all tokens from there on differ
        equal += list(np.abs(in_llama_cpp(part) - emulation).max(axis=1) < SUMS * np.abs(emulation).max())
    assert np.mean(equal) > 0.5, "llama.cpp computes something else"
    theirs, emulation, exact, ours = in_llama_cpp(ids), logits(same, ids), logits(plain, ids), logits(model, ids)
    their_noise, our_noise = rms(emulation - exact), rms(ours - exact)
    assert rms(theirs - emulation) < their_noise
    assert rms(theirs - ours) < their_noise + our_noise
    top = np.argsort(ours, axis=1)[:, -5:]
    difference = np.take_along_axis(theirs - ours, top, 1)
    assert rms(difference) < 2 * (their_noise + our_noise), "the top logits stand out"


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, biases, wide heads, tied": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 64}}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, int8 head": ("llama", {"head": "int8"}),
    "llama, tied int8 head": ("llama", {"head": "int8", "tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_5": ("qwen3_5", {}),
    "qwen3_5, as many keys as values": ("qwen3_5", {"linear_num_key_heads": 8}),
    "gemma3": ("gemma3", {}),
    "gemma3, rope, caps, int8 head": (
        "gemma3",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
            },
            "final_logit_softcapping": 5.0,
            "head": "int8",
        },
    ),
    "bitnet": ("bitnet", {}),
}


@pytest.mark.parametrize("kind", LOADABLE)
@pytest.mark.parametrize(("family", "changes"), FAMILIES.values(), ids=FAMILIES)
def test_every_family_has_the_same_logits(kind: str, family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "hf", family, **changes)
    file = write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", kind)
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")(TEXTS[0]).input_ids
    compare(model, file, kind, ids)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small Llama trained in 1.58 bit for a few hundred steps on the standard library's sources."""
    torch.manual_seed(0)
    text = bytes(token for token in corpus()[0][:1_000_000].tolist() if token < 256).decode(errors="ignore")
    ids = torch.tensor(tokenizer("llama-bpe", 512)(text).input_ids, dtype=torch.int16)
    model = gguf_models.model("llama")
    bitnet.replace_linear(model)
    settings = Settings(steps=300, context=128)
    losses = train(model, ids, settings, Console(quiet=True), "1.58 bit")["losses"]
    assert np.mean(losses[-20:]) < 0.6 * losses[0]
    bitnet.pack(model)
    folder = tmp_path_factory.mktemp("trained") / "hf"
    bitnet.save(model.eval(), folder)
    tokenizer("llama-bpe", 512).save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("kind", LOADABLE)
def test_a_trained_model_writes_the_same_text(kind: str, trained: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = trained
    file = write_gguf(FolderSource(folder), tmp_path / "m.gguf", kind)
    prompt = tokenizer("llama-bpe", 512)("import os\n\n\ndef main(args):\n    ").input_ids
    compare(model, file, kind, tokenizer("llama-bpe", 512)(TEXTS[0]).input_ids)
    llama = open_in_llama_cpp(file)
    theirs: list[int] = []
    for token in llama.generate(prompt, temp=0, repeat_penalty=1.0):
        theirs.append(token)
        if len(theirs) == 32:
            break
    scores = logits(model, prompt + theirs)[len(prompt) - 1 : -1]
    llama.reset()
    llama.eval(prompt + theirs)
    apart = np.abs(np.array(llama.scores[len(prompt) - 1 : len(prompt) + 31]) - scores).max()
    behind = scores.max(axis=1) - scores[np.arange(32), theirs]
    assert behind.max() <= 2 * apart, "llama.cpp chose a token that is no near tie here"
    assert (behind == 0).mean() > 0.8


@pytest.mark.skipif(not knows_q2_0(), reason="this llama.cpp has no Q2_0 yet")
def test_q2_0_takes_rows_that_fill_no_large_block(tmp_path: Path) -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 320, "num_attention_heads": 3, "num_key_value_heads": 1}
    model = checkpoint(tmp_path / "hf", **sizes)
    file = write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", "gguf-q2_0")
    compare(model, file, "gguf-q2_0", tokenizer()(TEXTS[0]).input_ids)


BINARY = {"weights": "binary", "centered": False}
SCALES: dict[str, tuple[Any, dict[str, Any]]] = {
    "tq2_0, rows": ("gguf-tq2_0", {"per_row": True}),
    "tq1_0, groups": ("gguf-tq1_0", {"group_size": 256}),
    "tq2_0, groups": ("gguf-tq2_0", {"group_size": 256}),
    "q2_0, groups of 64": ("gguf-q2_0", {"group_size": 64}),
    "q2_0, groups of 128": ("gguf-q2_0", {"group_size": 128}),
    "q1_0": ("gguf-q1_0", BINARY),
    "q1_0, rows": ("gguf-q1_0", BINARY | {"per_row": True}),
    "q1_0, groups": ("gguf-q1_0", BINARY | {"group_size": 128}),
}


@pytest.mark.parametrize(("kind", "layers"), SCALES.values(), ids=SCALES)
def test_scales_of_rows_and_groups_and_binary_weights_have_the_same_logits(
    kind: str, layers: dict[str, Any], tmp_path: Path
) -> None:
    if kind in ("gguf-q2_0", "gguf-q1_0") and not knows_q2_0():
        pytest.skip("this llama.cpp has neither yet")
    model = checkpoint(tmp_path / "hf", layers=layers)
    file = write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", kind)
    compare(model, file, kind, tokenizer()(TEXTS[0]).input_ids)


def test_i2_s_is_for_bitnet_cpp_only(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf")
    file = write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", "gguf-i2_s")
    with pytest.raises(ValueError, match="Failed to load model"):
        open_in_llama_cpp(file)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    **{pre: functools.partial(tokenizer, pre, 500) for pre in gguf_tokenizer.PRE},
    "sentencepiece": sentencepiece,
    "sentencepiece without a space": functools.partial(sentencepiece, False),
    "gemma": gemma,
    "bytes": build_tokenizer,
}


@pytest.mark.parametrize("build", TOKENIZERS.values(), ids=TOKENIZERS)
def test_texts_have_the_same_tokens(build: Callable[[], Any], tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    config = AutoConfig.for_model("llama", vocab_size=600)
    least = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.context_length": 512,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    file = tmp_path / "vocabulary.gguf"
    file.write_bytes(header_bytes(least | gguf_tokenizer.metadata_of(tmp_path, config), {}))
    llama = open_in_llama_cpp(file, vocab_only=True)
    ours = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert llama.tokenize(text.encode(), add_bos=True, special=True) == ours(text).input_ids, text
