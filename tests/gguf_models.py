"""Small models with tokenizers for the GGUF tests: dimensions that fill ggml's blocks, every parameter random."""

import argparse
import inspect
import json
import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    BitNetForCausalLM,
    Gemma3ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

import bitnet
from bitnet.convert.files.gguf import padded, read_header, read_tensor
from bitnet.convert.llama_cpp import tokenizer as gguf_tokenizer
from bitnet.convert.llama_cpp.header import header_bytes
from bitnet.convert.source import Source
from bitnet.experts import PackedStack
from bitnet.packed import PackedBitLinear

CLASSES: dict[str, Any] = {
    "llama": LlamaForCausalLM,
    "mistral": MistralForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
    "qwen3_moe": Qwen3MoeForCausalLM,
    "qwen3_5": Qwen3_5ForCausalLM,
    "gemma3": Gemma3ForCausalLM,
    "bitnet": BitNetForCausalLM,
}
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None, "head_dim": 128},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {
        "head_dim": 64,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
    },
    "qwen3_5": {
        "head_dim": 128,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "gemma3": {
        "head_dim": 128,
        "query_pre_attn_scalar": 128,
        "sliding_window": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "pad_token_id": 0,
    },
    "bitnet": {"hidden_act": "silu", "tie_word_embeddings": True},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
IDS = torch.tensor([[3, 41, 5, 17, 200, 511]])
TEXTS = [
    "def parse_args(self, 12345 args=None):\n    return  x.foo('it''s', \"I'll\")  \n\n\tnaïve 日本 😀",
    " leading",
    "trailing  ",
    "a\r\n\r\nb",
    "x = 3.14159e10;y=1234567",
    "<|end|>hi<|start|> there",
    "<b>one two  three   four    five     6      7</b>  ",
    "I'VE don'T a . b , c !",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n🦙🦙 3 33 333 3333 3.3 3..3 3...3 កាន់តែ ------===== нещо на Български",
]


def model(family: str, **changes: Any) -> PreTrainedModel:
    options: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    cls = CLASSES[family]
    built = cls(cls.config_class(**options | OWN.get(family, {}) | changes)).eval()
    for parameter in built.parameters():
        parameter.data += (0.1 if parameter.ndim == 1 else 0.02) * torch.randn_like(parameter)
    return built


@lru_cache
def tokenizer(pre: str = "gpt-2", size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that cuts text by llama.cpp's rule `pre`, trained on Python's sources."""
    steps, ignore_merges = gguf_tokenizer.PRE[pre]
    build: dict[str, Any] = {
        "ByteLevel": lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex),
        "Split": lambda regex: pre_tokenizers.Split(Regex(regex), "isolated"),
        "Digits": pre_tokenizers.Digits,
        "Punctuation": lambda behavior: pre_tokenizers.Punctuation(behavior.lower()),
    }
    parts = [build[kind](detail) for kind, detail in steps]
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>", "<|start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(str(m.__file__)).read_text() for m in (argparse, json, logging)], trainer)
    return fast(backend)


def sentencepiece(prefix: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer as transformers makes them of sentencepiece models."""
    pieces = ["<unk>", "<|start|>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters = [gguf_tokenizer.SPACE, *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,='()_"]
    pairs = ["_ t", "h e", "_t he", "r e", "a r", "e t", "r s"]  # the order decides "ret" and "ars"
    merges = [tuple(pair.replace("_", gguf_tokenizer.SPACE).split(" ")) for pair in pairs]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *letters, *("".join(merge) for merge in merges)])}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps: list[Any] = [normalizers.Prepend(gguf_tokenizer.SPACE)] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", gguf_tokenizer.SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(gguf_tokenizer.SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens(["<|start|>", "<|end|>"])
    return fast(backend, unk_token="<unk>")


def gemma() -> PreTrainedTokenizerFast:
    """As Gemma's: no space in front, a cut at spaces that are gone by then, tokens for runs of spaces and for tags."""
    described = json.loads(sentencepiece(False).backend_tokenizer.to_str())
    model = described["model"]
    for piece, merge in ((2 * gguf_tokenizer.SPACE, 2 * [gguf_tokenizer.SPACE]), ("<b>", None)):
        model["vocab"][piece] = len(model["vocab"])
        model["merges"] = [merge, *model["merges"]] if merge else model["merges"]
    described["pre_tokenizer"] = {
        "type": "Split",
        "pattern": {"String": " "},
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    backend = Tokenizer.from_str(json.dumps(described))
    spaces = [AddedToken(n * gguf_tokenizer.SPACE, normalized=n > 2, special=False) for n in (2, 3)]
    backend.add_tokens([*spaces, AddedToken("<b>", normalized=False, special=False)])
    return fast(backend, unk_token="<unk>")


def fast(backend: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, **{"eos_token": "<|end|>", "bos_token": "<|start|>"} | special
    )
    wrapped.chat_template = "{{ messages }}"
    return wrapped


def checkpoint(
    folder: Path,
    family: str = "llama",
    pre: str = "gpt-2",
    head: str | None = None,
    layers: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """Save a packed model, with a tokenizer, to folder; returns the model. layers: options of replace_linear."""
    built = model(family, **changes)
    bitnet.replace_linear(built, **layers or {})
    bitnet.pack(built, head=head)
    bitnet.save(built, folder)
    tokenizer(pre).save_pretrained(folder)
    return built


def assemble(source: Source) -> Any:
    """The model that a source describes, with all of its values."""
    model = source.model
    state = {key: source.tensor(key) for key in source.stored()}
    model.load_state_dict(state, assign=True, strict=False)
    model.tie_weights()
    for module in model.modules():  # what no checkpoint holds
        if "embed_scale" in module._buffers:
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
        if hasattr(module, "rope_init_fn") or any(name.endswith("inv_freq") for name in module._buffers):
            type(module).__init__(module, model.config)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def round_scales(model: Any) -> Any:
    """What the blocked types keep of the scales, and GGUF of parameters that it holds a function of."""
    for name, module in model.named_modules():
        if isinstance(module, PackedBitLinear | PackedStack):
            module.weight_scale = module.weight_scale.half().float()
        if "1.0 + self.weight" in inspect.getsource(type(module).forward):
            module.weight.data = (1 + module.weight) - 1
        if name.endswith("linear_attn"):
            module.A_log.data = module.A_log.exp().log()
    return model


def rewritten(exported: Path, file: Path, metadata: dict[str, Any] | None = None, without: str = "-") -> Path:
    """The file with other metadata or a tensor less."""
    before, tensors = read_header(exported)
    infos, parts, end = {}, [], 0
    for name, info in tensors.items():
        if name != without:
            infos[name] = info._replace(offset=end)
            data = read_tensor(exported, info).tobytes()
            parts.append(data.ljust(padded(len(data)), b"\0"))
            end += len(parts[-1])
    entries = {key: value for key, value in (before | (metadata or {})).items() if value is not None}
    file.write_bytes(header_bytes(entries, infos) + b"".join(parts))
    return file
