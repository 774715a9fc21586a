"""Which models llama.cpp computes as transformers does: names, the order of rows, rotary embeddings.

What llama.cpp computes is decided by `general.architecture` and the tensors that are there; most of a config it takes
on trust. So a model is written only where the graph of its architecture is known to compute the same (FAMILIES), and
refused with the reason otherwise.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS


class Family(NamedTuple):
    """A model type of transformers, and the architecture of llama.cpp that computes the same."""

    arch: str
    model: str  # class in transformers
    modules: dict[str, str]  # name in transformers: in GGUF; {} is the layer's number
    biases: tuple[str, ...] = ()  # matrices in a layer whose bias the graph adds
    activations: tuple[str, ...] = ("silu",)
    rope: tuple[str, ...] = ("default", "linear")
    permuted: bool = False  # rows of q and k: llama's rotary embedding pairs neighbours there
    rope_read: tuple[str, ...] = ()  # types of rotary embeddings that are read, but not written: not compared yet


_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


_SUB_NORMS = {"self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"}


_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


def _modules(block: dict[str, str]) -> dict[str, str]:
    names = {f"model.layers.{{}}.{ours}": f"blk.{{}}.{theirs}" for ours, theirs in block.items()}
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"} | names


FAMILIES = {
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        _modules(_BLOCK),
        ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
        rope=("default", "linear", "llama3"),
        permuted=True,
    ),
    "mistral": Family("llama", "MistralForCausalLM", _modules(_BLOCK), permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _modules(_BLOCK), ("attn_q", "attn_k", "attn_v"), rope_read=("yarn",)),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _modules(_BLOCK | _QK_NORMS), rope_read=("yarn",)),
    "bitnet": Family(
        "bitnet",
        "BitNetForCausalLM",
        _modules(_BLOCK | _SUB_NORMS),
        activations=("silu", "relu2"),
        rope=("default",),
    ),
}


BITNET_CPP = {"relu2": "bitnet-b1.58", "silu": "bitnet"}  # the two graphs bitnet.cpp has for sub-layer norms


LLAMA3_ROPE = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))  # of Llama 3.1 and 3.2: GGUF keeps only what they yield


def leaf_of(name: str) -> str:
    return name.rpartition(".")[2]


def translate(module: str, names: dict[str, str]) -> str | None:
    """A module's name in the other world, or None."""
    parts = module.split(".")
    number = next((part for part in parts if part.isdecimal()), "")
    name = names.get(".".join("{}" if part.isdecimal() else part for part in parts))
    return None if name is None else name.format(number)


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def row_order(name: str, config: Any, family: Family) -> Tensor | None:
    """Which row of transformers' matrix stands in each row of GGUF's; None where it is the same."""
    leaf = leaf_of(name)
    if family.permuted and leaf in ("attn_q", "attn_k"):
        # transformers rotates value i of a head with value i + d/2, llama.cpp with i + 1: the halves are interleaved
        count = config.num_attention_heads if leaf == "attn_q" else config.num_key_value_heads
        return torch.arange(count * head_dim_of(config)).view(count, 2, -1).transpose(1, 2).reshape(-1)
    return None


def rope_factors(config: Any) -> Tensor:
    """What llama.cpp divides the rotary frequencies by, float32 [head_dim / 2], for the type llama3."""
    head_dim = head_dim_of(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    return plain / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
