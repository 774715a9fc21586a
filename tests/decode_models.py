"""A tiny packed model of every family that the native step computes, and one call to run it token by token."""

from collections.abc import Callable
from typing import Any

import torch
from tiny import randomize
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
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
_PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
_KINDS = ["sliding_attention", "full_attention"] * 2

_FUSED = {"intermediate_size": 96, "pad_token_id": 0}  # whose halves begin at a block of rows


def _model(kind: str, **options: object) -> Callable[[], PreTrainedModel]:
    return lambda: AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | options), dtype=torch.float32)


# torch's attention does not cap scores, which transformers 5.17 leaves at that
_CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
_YARN |= {"llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32.0, "beta_slow": 1.0}
_SLIDING = {"sliding_window": 24, "layer_types": _KINDS}

_LINEAR = {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 16}
_LINEAR |= {"linear_value_head_dim": 32, "layer_types": ["linear_attention", "full_attention"] * 2}
_LINEAR |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
_GEMMA4 = {"head_dim": 16, "global_head_dim": 32, "sliding_window": 24, "layer_types": _KINDS}
_GEMMA4 |= {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 200, "final_logit_softcapping": 3.0}
_SWA = {"sliding_window": 24, "layer_types": _KINDS, "layer_rope_theta": [1e4, 0, 1e3, 1e4], "pad_token_id": 0}
_MAMBA: dict[str, object] = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 2}
_MAMBA |= {"mamba_chunk_size": 8, "pad_token_id": 0}
_MIXED = {"layer_types": ["linear_attention", "full_attention"] * 2}
_SHORT = {"layer_types": ["conv", "full_attention"] * 2, "conv_L_cache": 3, "pad_token_id": 0}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
_LATENT: dict[str, object] = {"kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32}
_LATENT["num_key_value_heads"] = 4
_ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "n_shared_experts": 2}
_ROUTED |= {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 1}

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
    "gemma": _model("gemma", head_dim=32, hidden_act="gelu_pytorch_tanh"),
    "gemma2": _model("gemma2", head_dim=32, **_CAPS, **_SLIDING),
    "olmo2": _model("olmo2", attention_bias=True),
    "olmo3": _model("olmo3", **_SLIDING),
    "phi3": _model("phi3", sliding_window=24, partial_rotary_factor=0.5, **_FUSED),
    "phi": _model("phi", rope_parameters=_PARTIAL),
    "gpt_neox": _model("gpt_neox", rope_parameters=_PARTIAL, bos_token_id=None, eos_token_id=None),
    "gpt_neox in turn": _model("gpt_neox", use_parallel_residual=False, hidden_act="gelu_new"),
    "jais2": _model("jais2", attention_bias=True, mlp_bias=True),
    "nemotron": _model("nemotron", attention_bias=True, mlp_bias=True, rope_parameters=_PARTIAL, head_dim=32),
    "vaultgemma": _model("vaultgemma", head_dim=16, **_CAPS, **_SLIDING),
    "granite": _model(
        "granite",
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        attention_multiplier=0.3,
        logits_scaling=2.0,
    ),
    "cohere": _model("cohere", logit_scale=0.5),
    "cohere2": _model("cohere2", **_SLIDING),
    "exaone4": _model("exaone4", **_SLIDING),
    "glm": _model("glm", head_dim=32, attention_bias=True, **_FUSED),
    "glm4": _model("glm4", head_dim=32, **_FUSED),
    "helium": _model("helium", head_dim=16),
    "ernie4_5": _model("ernie4_5", use_bias=True, head_dim=32),
    "seed_oss": _model("seed_oss", head_dim=16, pad_token_id=0),
    "ministral": _model("ministral", head_dim=16, **_SLIDING),
    "cwm": _model("cwm", head_dim=16, pad_token_id=0, **_SLIDING),
    "arcee": _model("arcee", mlp_bias=True),
    "starcoder2": _model("starcoder2", hidden_act="gelu_pytorch_tanh", sliding_window=24),
    "stablelm": _model("stablelm", use_qkv_bias=True, rope_parameters=_PARTIAL),
    "stablelm parallel": _model("stablelm", use_parallel_residual=True, rope_parameters=_PARTIAL),
    "mixtral": _model("mixtral", sliding_window=24, num_local_experts=5, num_experts_per_tok=2),
    "qwen2_moe": _model("qwen2_moe", **_EXPERTS, shared_expert_intermediate_size=80, mlp_only_layers=[1]),
    "qwen3_moe": _model("qwen3_moe", **_EXPERTS, head_dim=16, norm_topk_prob=True),
    "olmoe": _model("olmoe", **_EXPERTS),
    "flex_olmo": _model("flex_olmo", **_EXPERTS, norm_topk_prob=True, pad_token_id=0),
    "granitemoe": _model(
        "granitemoe",
        num_local_experts=6,
        num_experts_per_tok=3,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        logits_scaling=2.0,
    ),
    "ernie4_5_moe": _model(
        "ernie4_5_moe",
        moe_num_experts=6,
        moe_k=3,
        moe_intermediate_size=48,
        moe_num_shared_experts=2,
        moe_layer_start_index=1,
    ),
    "minimax_m2": _model("minimax_m2", num_local_experts=6, num_experts_per_tok=3, head_dim=16, rotary_dim=8),
    "glm4_moe": _model("glm4_moe", **_ROUTED, use_qk_norm=True, head_dim=16, routed_scaling_factor=1.5),
    "dots1": _model("dots1", **_ROUTED, head_dim=16, **_SLIDING),
    "qwen3_5": _model("qwen3_5_text", **_LINEAR),
    "qwen3_5_moe": _model("qwen3_5_moe_text", **_LINEAR, **_EXPERTS, shared_expert_intermediate_size=80),
    "hunyuan_v1_dense": _model("hunyuan_v1_dense", head_dim=16, attention_bias=True, pad_token_id=0),
    "hunyuan_v1_moe": _model("hunyuan_v1_moe", head_dim=16, num_experts=4, moe_topk=2, pad_token_id=0),
    "lfm2": _model("lfm2", **_SHORT, block_auto_adjust_ff_dim=False),
    "lfm2_moe": _model("lfm2_moe", **_SHORT, **_EXPERTS, num_dense_layers=1, routed_scaling_factor=1.5),
    "solar_open": _model("solar_open", **_ROUTED, head_dim=16),
    "exaone_moe": _model("exaone_moe", **_ROUTED, head_dim=16, **_SLIDING),
    "gpt2": _model("gpt2"),
    "opt": _model("opt", ffn_dim=80, word_embed_proj_dim=64, pad_token_id=0),
    "falcon": _model("falcon", bias=True, num_attention_heads=2),
    "olmo": _model("olmo", clip_qkv=1.5),
    "apertus": _model("apertus", head_dim=16, pad_token_id=0),
    "ministral3": _model("ministral3", head_dim=16, rope_parameters=_YARN, sliding_window=None),
    "nanochat": _model("nanochat", final_logit_softcapping=3.0),
    "hyperclovax": _model("hyperclovax", embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=0.5),
    "gpt_oss": _model("gpt_oss", num_local_experts=6, num_experts_per_tok=3, head_dim=16, **_SLIDING),
    "granitemoeshared": _model(
        "granitemoeshared",
        num_local_experts=6,
        num_experts_per_tok=3,
        shared_intermediate_size=64,
        residual_multiplier=0.4,
    ),
    "granite_swa": _model("granite_swa", **_SWA, residual_multiplier=0.4, attention_multiplier=0.3),
    "granitemoe_swa": _model(
        "granitemoe_swa", **_SWA, num_local_experts=6, num_experts_per_tok=3, shared_intermediate_size=64
    ),
    "granitemoehybrid": _model(
        "granitemoehybrid", **_MAMBA, **_MIXED, num_local_experts=0, shared_intermediate_size=64
    ),
    "granitemoehybrid experts": _model(
        "granitemoehybrid",
        **_MAMBA,
        **_MIXED,
        num_local_experts=6,
        num_experts_per_tok=3,
        shared_intermediate_size=64,
        position_embedding_type="rope",
        residual_multiplier=0.4,
        logits_scaling=2.0,
    ),
    "nemotron_h": _model(
        "nemotron_h",
        mamba_num_heads=4,
        mamba_head_dim=32,
        ssm_state_size=16,
        n_groups=2,
        chunk_size=8,
        head_dim=16,
        num_hidden_layers=7,
        layers_block_type=["mlp", "linear_attention", "mlp", "full_attention", "moe", *_MIXED["layer_types"][:2]],
        n_routed_experts=6,
        num_experts_per_tok=3,
        moe_intermediate_size=48,
        moe_shared_expert_intermediate_size=48,
        pad_token_id=0,
    ),
    "bamba": _model("bamba", **_MAMBA, attn_layer_indices=[1, 3]),
    "mellum": _model("mellum", **_EXPERTS, head_dim=16, **_SLIDING, mlp_layer_types=["dense", *["sparse"] * 3]),
    "hy_v3": _model("hy_v3", **_EXPERTS, head_dim=16, num_shared_experts=2),
    "afmoe": _model(
        "afmoe", **_EXPERTS, head_dim=16, **_SLIDING, mup_enabled=True, num_dense_layers=1, num_shared_experts=1
    ),
    "qwen3_next": _model("qwen3_next", **_LINEAR, **_EXPERTS, shared_expert_intermediate_size=80),
    "olmo_hybrid": _model("olmo_hybrid", **_LINEAR, linear_allow_neg_eigval=True, pad_token_id=0),
    "deepseek_v2": _model("deepseek_v2", **_ROUTED, **_LATENT, topk_method="group_limited_greedy"),
    "deepseek_v3": _model("deepseek_v3", **_ROUTED, **_LATENT, q_lora_rank=48, rope_parameters=_YARN),
    "glm4_moe_lite": _model("glm4_moe_lite", **_ROUTED, **_LATENT, q_lora_rank=48),
    "axk1": _model("axk1", **_ROUTED, **_LATENT, q_lora_rank=48),
    "youtu": _model("youtu", **_LATENT, q_lora_rank=None, rope_interleave=False),
    "minicpm3": _model("minicpm3", **_LATENT, q_lora_rank=48, scale_depth=1.4, scale_emb=3, dim_model_base=16),
    "gemma4": _model("gemma4_text", **_GEMMA4, num_kv_shared_layers=2, use_double_wide_mlp=True),
    "gemma4 experts": _model(
        "gemma4_text",
        **_GEMMA4 | {"hidden_size_per_layer_input": 0},
        enable_moe_block=True,
        num_experts=6,
        top_k_experts=3,
        moe_intermediate_size=48,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
    ),
}


if "sarvam_moe" in CONFIG_MAPPING:  # a config of its own for GLM's class, which older versions do not have
    FAMILIES["sarvam_moe"] = _model("sarvam_moe", **_ROUTED, head_dim=16)


def packed(family: str = "llama", head: str | None = None, **options: object) -> PreTrainedModel:
    """The same weights every time."""
    torch.manual_seed(0)
    build = SEEING[family.removesuffix(" seeing")] if family.endswith(" seeing") else FAMILIES[family]
    model = randomize(build()).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "expert_bias")):
            buffer.data += 0.1 * torch.randn_like(buffer)
    bitnet.replace_linear(model, **options)
    bitnet.pack(model, head=head)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


def stepwise(sequences: NativeSequences, ids: Tensor, slot: int = 0) -> Tensor:
    """Logits [T, V] after each of ids [T], one step a token."""
    return torch.cat([sequences.extend([(slot, token[None])]) for token in ids])


def _seeing(kind: str, text: Callable[[], PreTrainedModel], vision: dict[str, object], **options: object) -> Any:
    def build() -> PreTrainedModel:
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = {"text_config": text().config.to_dict(), "vision_config": sizes | vision}
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **config | options))

    return build


# models that also see: how to build one, and the inputs of an image of which `image_tokens` tokens 199 are made
_PIXELS = {"image_size": 28, "patch_size": 14}
SEEING: dict[str, Callable[[], PreTrainedModel]] = {
    "llava": _seeing("llava", FAMILIES["llama"], {"model_type": "clip_vision_model", **_PIXELS}, image_token_index=199),
    "gemma3": _seeing(
        "gemma3",
        FAMILIES["gemma3"],
        {"model_type": "siglip_vision_model", **_PIXELS},
        mm_tokens_per_image=4,
        image_token_index=199,
    ),
    "gemma4": _seeing(
        "gemma4",
        FAMILIES["gemma4"],
        {
            "model_type": "gemma4_vision",
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "position_embedding_size": 64,
        },
        image_token_id=199,
        video_token_id=198,
        audio_token_id=197,
    ),
    "mistral3": _seeing(
        "mistral3",
        FAMILIES["mistral"],
        {"model_type": "pixtral", "head_dim": 16, **_PIXELS},
        spatial_merge_size=1,
        image_token_index=199,
    ),
    "qwen3_5": _seeing(
        "qwen3_5",
        FAMILIES["qwen3_5"],
        {"depth": 1, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14, "spatial_merge_size": 1},
        image_token_id=199,
    ),
}


def image_inputs(family: str) -> dict[str, Tensor]:
    """A prompt with an image in it."""
    ids = torch.tensor([[1, 5, 9, *[199] * 4, 17, 23, 42]])
    dice = torch.Generator().manual_seed(0)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "qwen3_5":
        inputs["pixel_values"] = torch.randn(4, 3 * 2 * 14 * 14, generator=dice)
        inputs |= {"image_grid_thw": torch.tensor([[1, 2, 2]]), "mm_token_type_ids": (ids == 199).int()}
    elif family == "gemma4":
        inputs["pixel_values"] = torch.rand(1, 16, 3 * 4 * 4, generator=dice)
        inputs["image_position_ids"] = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None]
        inputs |= {"mm_token_type_ids": (ids == 199).int()}
    else:
        inputs["pixel_values"] = torch.randn(1, 3, 28, 28, generator=dice)
    if family == "mistral3":
        inputs["image_sizes"] = torch.tensor([[28, 28]])
    if family == "gemma3":
        inputs["token_type_ids"] = (ids == 199).int()
    return inputs
