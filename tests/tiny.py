"""Tiny models for checkpoint tests: every parameter random (biases and norms too), so that none can be lost unseen."""

import torch
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

IDS = torch.tensor([[3, 41, 5, 17]])


def llama(**changes: object) -> LlamaForCausalLM:
    options = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return randomize(LlamaForCausalLM(LlamaConfig(**options | {"num_key_value_heads": 2, "vocab_size": 64} | changes)))


def neox() -> GPTNeoXForCausalLM:
    options = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    return randomize(GPTNeoXForCausalLM(GPTNeoXConfig(**options, vocab_size=64)))


def gpt2() -> GPT2LMHeadModel:
    sizes = {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 64,
        "n_positions": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return randomize(GPT2LMHeadModel(GPT2Config(**sizes, embd_pdrop=0, attn_pdrop=0, resid_pdrop=0)))


MIXTURE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXTURE |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64}


def mixtral() -> MixtralForCausalLM:
    return randomize(MixtralForCausalLM(MixtralConfig(**MIXTURE)))


def gpt_oss() -> GptOssForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return randomize(GptOssForCausalLM(GptOssConfig(**MIXTURE, head_dim=4, rope_parameters=rope)))


def randomize(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


class Mlp(nn.Module):
    """A module that is not from Hugging Face: biases, a norm, and rows that do not fill bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(16, 24), nn.LayerNorm(24), nn.Linear(24, 6, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)).relu())
