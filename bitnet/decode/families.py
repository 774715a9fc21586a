"""Which models of transformers the native step (kernels/csrc/step.h) computes, and what plan.py must know of each."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Family(NamedTuple):
    """What the modules of a model type do not say themselves."""

    base: str  # class in transformers
    norms: tuple[str | None, str | None, str | None, str | None] = (  # before and after attention, and the MLP
        "input_layernorm",
        None,
        "post_attention_layernorm",
        None,
    )
    plus_one: bool = False  # norms multiply by 1 + weight
    centered: bool = False  # norms take the mean off, though they are not torch's LayerNorm
    parallel: bool = False  # attention and the MLP see the same x, and its one norm where there is no second
    interleaved: bool = False  # rotary positions turn features 2i and 2i + 1
    mlp: tuple[str | None, str, str] = ("gate_proj", "up_proj", "down_proj")
    holder: str = "mlp"  # of these, or of experts
    gate: str | None = None  # where the config does not name the activation
    turned: bool = False  # positions come before the norms of queries and keys
    added: float = 0  # to the sum that experts' weights are divided by
    score: str = "softmax"  # of a router's outputs; see kernels/csrc/bitnet_cpu.h
    attention: str = "self_attn"
    recurrence: str = "linear_attn"  # in its place
    fused: str = "qkv_proj"  # q, k and v in one layer, where there is such a one
    by_head: bool = False  # in which those of a head are one after the other
    out: str = "o_proj"
    final: str = "norm"
    rotary: str = "rotary_emb"
    window: Callable[[Any], int | None] = lambda attention: getattr(attention, "sliding_window", None)
    rotates: Callable[[Any], bool] = lambda attention: getattr(attention, "use_rope", True)


def _of_config(attention: Any) -> int | None:
    return getattr(attention.config, "sliding_window", None)


def _of_exaone(attention: Any) -> int | None:
    return attention.sliding_window if attention.is_sliding else None


def _exaone_rotates(attention: Any) -> bool:
    return attention.sliding_window is None or attention.is_sliding


_AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_GLM4 = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")

_LFM2: dict[str, Any] = {
    "norms": ("operator_norm", None, "ffn_norm", None),
    "mlp": ("w1", "w3", "w2"),
    "holder": "feed_forward",
    "gate": "silu",
    "recurrence": "conv",
    "out": "out_proj",
    "final": "embedding_norm",
}

FAMILIES = {
    "llama": Family("LlamaModel"),
    "mistral": Family("MistralModel", window=_of_config),
    "qwen2": Family("Qwen2Model"),
    "qwen3": Family("Qwen3Model"),
    "gemma": Family("GemmaModel", plus_one=True),
    "gemma2": Family("Gemma2Model", _SANDWICH, plus_one=True),
    "vaultgemma": Family(
        "VaultGemmaModel", ("input_layernorm", None, "pre_feedforward_layernorm", None), plus_one=True
    ),
    "gemma3_text": Family("Gemma3TextModel", _SANDWICH, plus_one=True),
    "bitnet": Family("BitNetModel"),
    "smollm3": Family("SmolLM3Model"),
    "olmo2": Family("Olmo2Model", _AFTER),
    "olmo3": Family("Olmo3Model", _AFTER),
    "phi": Family("PhiModel", parallel=True, mlp=(None, "fc1", "fc2"), out="dense", final="final_layernorm"),
    "phi3": Family("Phi3Model", window=_of_config),
    "gpt_neox": Family(
        "GPTNeoXModel",
        mlp=(None, "dense_h_to_4h", "dense_4h_to_h"),
        attention="attention",
        fused="query_key_value",
        by_head=True,
        out="dense",
        final="final_layer_norm",
    ),
    "granite": Family("GraniteModel"),
    "cohere": Family("CohereModel", centered=True, parallel=True, interleaved=True),
    "cohere2": Family(
        "Cohere2Model",
        centered=True,
        parallel=True,
        interleaved=True,
        rotates=lambda attention: attention.sliding_window is not None,
    ),
    "exaone4": Family("Exaone4Model", _AFTER, window=_of_exaone, rotates=_exaone_rotates),
    "glm": Family("GlmModel", interleaved=True),
    "glm4": Family("Glm4Model", _GLM4, interleaved=True),
    "helium": Family("HeliumModel", interleaved=True),
    "ernie4_5": Family("Ernie4_5Model", interleaved=True),
    "seed_oss": Family("SeedOssModel"),
    "ministral": Family("MinistralModel"),
    "cwm": Family("CwmModel"),
    "jais2": Family("Jais2Model", mlp=(None, "up_proj", "down_proj")),
    "nemotron": Family("NemotronModel", plus_one=True, mlp=(None, "up_proj", "down_proj")),
    "arcee": Family("ArceeModel", mlp=(None, "up_proj", "down_proj")),
    "starcoder2": Family("Starcoder2Model", mlp=(None, "c_fc", "c_proj"), window=_of_config),
    "stablelm": Family("StableLmModel"),
    "mixtral": Family("MixtralModel", window=_of_config),
    "qwen2_moe": Family("Qwen2MoeModel"),
    "qwen3_moe": Family("Qwen3MoeModel"),
    "olmoe": Family("OlmoeModel"),
    "flex_olmo": Family("FlexOlmoModel", _AFTER),
    "granitemoe": Family("GraniteMoeModel", holder="block_sparse_moe", score="softmax of chosen"),
    "ernie4_5_moe": Family("Ernie4_5_MoeModel", interleaved=True),
    "minimax_m2": Family("MiniMaxM2Model", score="sigmoid"),
    "glm4_moe": Family("Glm4MoeModel", score="sigmoid"),
    "dots1": Family("Dots1Model", score="sigmoid"),
    "solar_open": Family("SolarOpenModel", score="sigmoid"),
    "qwen3_5_text": Family("Qwen3_5TextModel", plus_one=True),
    "qwen3_5_moe_text": Family("Qwen3_5MoeTextModel", plus_one=True),
    "hunyuan_v1_dense": Family("HunYuanDenseV1Model", turned=True),
    "hunyuan_v1_moe": Family("HunYuanMoEV1Model", turned=True),
    "lfm2": Family("Lfm2Model", **_LFM2),
    "lfm2_moe": Family("Lfm2MoeModel", **_LFM2, score="sigmoid", added=1e-6, rotary="pos_emb"),
    "exaone_moe": Family("ExaoneMoeModel", window=_of_exaone, rotates=_exaone_rotates, score="sigmoid"),
}


def known(base: Any) -> bool:
    """Is it the base model of a family, of transformers' own class?"""
    family = FAMILIES.get(getattr(getattr(base, "config", None), "model_type", ""))
    return (
        family is not None and type(base).__name__ == family.base and type(base).__module__.startswith("transformers.")
    )


# Models that also see, whose language models compute what is text alone as if there were nothing else.
SEEING = {"gemma3", "mistral3", "llava", "qwen3_5", "qwen3_5_moe"}


def text_part(base: Any) -> Any:
    """What of a base model computes text: its language model if it is one of SEEING and that is known, or itself."""
    part = getattr(base, "language_model", None)
    seeing = getattr(getattr(base, "config", None), "model_type", "") in SEEING
    return part if seeing and type(base).__module__.startswith("transformers.") and known(part) else base
