"""A tiny packed model of every family that the native step computes, and one call to run it token by token."""

from collections.abc import Callable

import torch
from tiny import randomize
from torch import Tensor
from transformers import (
    BitNetConfig,
    BitNetForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import bitnet
from bitnet.decode.native import NativeSequences

SIZES = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 64}
_KINDS = ["sliding_attention", "full_attention"] * 2

FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, rope_parameters=_LLAMA3, attention_bias=True, mlp_bias=True)
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=24, head_dim=32)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=20, max_window_layers=2)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=48)),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=24, layer_types=_KINDS, final_logit_softcapping=3.0)
    ),
    "bitnet": lambda: BitNetForCausalLM(BitNetConfig(**SIZES | {"num_key_value_heads": 4}, hidden_act="relu2")),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SIZES, pad_token_id=0)),
}


def packed(family: str = "llama", head: str | None = None, **options: object) -> PreTrainedModel:
    """The same weights every time."""
    torch.manual_seed(0)
    model = randomize(FAMILIES[family]()).eval()
    bitnet.replace_linear(model, **options)
    bitnet.pack(model, head=head)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def stepwise(sequences: NativeSequences, ids: Tensor, slot: int = 0) -> Tensor:
    """Logits [T, V] after each of ids [T], one step a token."""
    return torch.cat([sequences.extend([(slot, token[None])]) for token in ids])
