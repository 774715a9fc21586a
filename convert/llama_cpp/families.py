"""Which models llama.cpp computes as transformers does: the architectures and their names.

What llama.cpp computes is decided by `general.architecture` and the tensors that are there; most of a config it takes
on trust. So a model is written only where the graph of its architecture is known to compute the same (FAMILIES), and
refused with the reason otherwise. metadata.py has their numbers, places.py their tensors.
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
    centered: bool = False  # the norms multiply by 1 + weight in transformers, by weight in llama.cpp
    parameters: dict[str, tuple[str, ...]] | None = None  # what is no module's weight or bias: its tensors in GGUF
    rope_read: tuple[str, ...] = ()  # types of rotary embeddings that are read, but not written: not compared yet


_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
}


_MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


_BLOCK = {"input_layernorm": "attn_norm", **_ATTENTION, "post_attention_layernorm": "ffn_norm"}


_SUB_NORMS = {"self_attn.attn_sub_norm": "attn_sub_norm", "mlp.ffn_sub_norm": "ffn_sub_norm"}


_QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}


_GEMMA3_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


_DELTA_NET = {
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
}


def _modules(block: dict[str, str]) -> dict[str, str]:
    names = {f"model.layers.{{}}.{ours}": f"blk.{{}}.{theirs}" for ours, theirs in block.items()}
    return {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"} | names


FAMILIES = {
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        _modules(_BLOCK | _MLP),
        ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
        rope=("default", "linear", "llama3"),
        permuted=True,
    ),
    "mistral": Family("llama", "MistralForCausalLM", _modules(_BLOCK | _MLP), permuted=True),
    "qwen2": Family(
        "qwen2", "Qwen2ForCausalLM", _modules(_BLOCK | _MLP), ("attn_q", "attn_k", "attn_v"), rope_read=("yarn",)
    ),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _modules(_BLOCK | _MLP | _QK_NORMS), rope_read=("yarn",)),
    "qwen3_moe": Family(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        _modules(_BLOCK | _QK_NORMS | {"mlp.gate": "ffn_gate_inp"}),
        parameters={
            "model.layers.{}.mlp.experts.gate_up_proj": ("blk.{}.ffn_gate_exps.weight", "blk.{}.ffn_up_exps.weight"),
            "model.layers.{}.mlp.experts.down_proj": ("blk.{}.ffn_down_exps.weight",),
        },
    ),
    "qwen3_5_text": Family(
        "qwen35",
        "Qwen3_5ForCausalLM",
        _modules(_BLOCK | _MLP | _QK_NORMS | _DELTA_NET | {"post_attention_layernorm": "post_attention_norm"}),
        rope=("default",),
        centered=True,
        parameters={
            "model.layers.{}.linear_attn.A_log": ("blk.{}.ssm_a",),
            "model.layers.{}.linear_attn.dt_bias": ("blk.{}.ssm_dt.bias",),
        },
    ),
    "gemma3_text": Family(
        "gemma3",
        "Gemma3ForCausalLM",
        _modules(_GEMMA3_NORMS | _ATTENTION | _QK_NORMS | _MLP),
        activations=("gelu_pytorch_tanh",),
        centered=True,
    ),
    "bitnet": Family(
        "bitnet",
        "BitNetForCausalLM",
        _modules(_BLOCK | _MLP | _SUB_NORMS),
        activations=("silu", "relu2"),
        rope=("default",),
    ),
}


BITNET_CPP = {"relu2": "bitnet-b1.58", "silu": "bitnet"}  # the two graphs bitnet.cpp has for sub-layer norms


LLAMA3_ROPE = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))  # of Llama 3.1 and 3.2: GGUF keeps only what they yield


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_factors(config: Any) -> Tensor:
    """What llama.cpp divides the rotary frequencies by, float32 [head_dim / 2], for the type llama3."""
    head_dim = head_dim_of(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
    return plain / ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))[0]
