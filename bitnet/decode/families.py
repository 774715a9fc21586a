"""Which models of transformers the native step (kernels/csrc/step.h) computes, and what plan.py must know of each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_Norms = tuple[str | None, str | None, str | None, str | None]
_BEFORE: _Norms = ("input_layernorm", None, "post_attention_layernorm", None)


def _no(config: Any) -> None:
    return None


def _kv_heads(config: Any) -> int | None:
    return getattr(config, "num_key_value_heads", None)


def _multiplier(config: Any) -> float:
    return getattr(config, "embedding_multiplier", 1)


def _logits(config: Any) -> float:
    return getattr(config, "logit_scale", 1) / getattr(config, "logits_scaling", 1)  # of Cohere and Granite


def kind_of(attention: Any) -> str:
    """The kind of a layer with attention: full, sliding, ..."""
    kinds = getattr(attention.config, "layer_types", None)
    kind = getattr(attention, "layer_type", None) or getattr(attention, "attention_type", None)
    return kind or (kinds[attention.layer_idx] if kinds else "")


def _theta(attention: Any) -> float:
    theta: float = attention.config.layer_rope_theta[attention.layer_idx]
    return theta


class Family(NamedTuple):
    """What the modules of a base model do not say themselves."""

    norms: _Norms = _BEFORE  # before and after attention, and the MLP
    plus_one: bool = False  # norms multiply by 1 + weight
    centered: bool = False  # norms take the mean off, though they are not torch's LayerNorm
    parallel: bool = False  # attention and the MLP see the same x, and its one norm where there is no second
    pairs: str | None = "halves"  # features that rotary positions turn together (native.PAIRS); None: the config says
    mlp: tuple[str | None, str, str] = ("gate_proj", "up_proj", "down_proj")
    holder: str | None = "mlp"  # of these, or of experts; None: the layer
    gate: str | None = None  # where the config does not say how they are gated
    turned: bool = False  # positions come before the norms of queries and keys
    added: float = 0  # to the sum that experts' weights are divided by
    normalized: bool | None = None  # whether their weights are divided by it, where a router does not say
    group_best: int = 2  # scores of a group of experts that tell whether these are among the chosen
    score: str = "softmax"  # of a router's outputs; see kernels/csrc/bitnet_cpu.h
    attention: str = "self_attn"
    recurrence: str = "linear_attn"  # in its place
    recurrent_norms: _Norms | None = None  # beside it, if not `norms`
    layers: str = "layers"
    blocks: Callable[[list[Any]], list[Any]] = list  # of layers
    fused: str = "qkv_proj"  # q, k and v in one layer, where there is such a one
    by_head: bool = False  # in which those of a head are one after the other
    out: str = "o_proj"
    final: str = "norm"
    rotary: str = "rotary_emb"
    halves: bool = False  # whose tables have each angle once
    flipped: bool = False  # which turn the other way
    learned: str | None = None  # a table of what is added to embeddings by position
    learned_offset: int = 0  # of position 0 in it
    per_layer: bool = False  # a token's identity may add to each block: see native.PerLayer
    normed: bool = False  # embeddings go through the final norm
    multiplier: Callable[[Any], float] = _multiplier  # of embeddings, by the config
    caps: bool = False  # logits as its text's config says, also of a model around it, which sees
    logits: Callable[[Any], float] = _logits  # what they are multiplied by, by the config
    position_scales: Callable[[Any, Tensor], Tensor] | None = None  # of queries, by the config, at positions
    kv_heads: Callable[[Any], int | None] = _kv_heads  # by the config; None: as many as heads
    odd: Callable[[Any], str | None] = _no  # why a config's options are not what the step computes
    window: Callable[[Any], int | None] = lambda attention: getattr(attention, "sliding_window", None)
    turning: Callable[[Any], str] = kind_of  # which of its rotary positions a layer has
    rotates: Callable[[Any], bool] = lambda attention: getattr(attention, "use_rope", True)


def _of_config(attention: Any) -> int | None:
    return getattr(attention.config, "sliding_window", None)


def _of_exaone(attention: Any) -> int | None:
    return attention.sliding_window if attention.is_sliding else None


def _exaone_rotates(attention: Any) -> bool:
    return attention.sliding_window is None or attention.is_sliding


def _llama4_scales(config: Any, positions: Tensor) -> Tensor:
    """transformers' get_llama_4_attn_scale."""
    rope = config.rope_parameters
    beyond: Tensor = (positions / rope["original_max_position_embeddings"]).floor()
    return 1 + rope["llama_4_scaling_beta"] * beyond.log1p()


def _odd_opt(config: Any) -> str | None:
    if not config.do_layer_norm_before or config._remove_final_layer_norm:
        return "its norms come after its layers"
    return "its embeddings are projected" if config.word_embed_proj_dim != config.hidden_size else None


def _odd_gpt2(config: Any) -> str | None:
    return "it has cross-attention" if config.add_cross_attention else None


def _odd_falcon(config: Any) -> str | None:
    if config.alibi:
        return "alibi in place of rotary positions"
    if not config.parallel_attn:
        return "its attention and MLPs come in turn"
    if config.new_decoder_architecture or not (config.multi_query or config.num_attention_heads == 1):
        return "its queries, keys and values lie together"
    return None


def _mup(config: Any) -> float:
    return float(config.hidden_size**0.5) if config.mup_enabled else 1


_AFTER = (None, "post_attention_layernorm", None, "post_feedforward_layernorm")
_SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
_AXK1 = ("input_layernorm", None, "post_attention_layernorm", "mlp.post_mlp_layernorm")
_GLM4 = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


class _Pair:
    """A block of one or two layers of Nemotron-H: what looks at other tokens, and an MLP or experts."""

    def __init__(self) -> None:
        self.input_layernorm: Any = None
        self.post_attention_layernorm: Any = None
        self.self_attn: Any = None
        self.mamba: Any = None
        self.mlp: Any = None


def _paired(layers: list[Any]) -> list[Any]:
    pairs: list[_Pair] = []
    for layer in layers:
        if layer.block_type in ("mlp", "moe"):
            if not pairs or pairs[-1].mlp is not None:
                pairs.append(_Pair())
            pairs[-1].post_attention_layernorm, pairs[-1].mlp = layer.norm, layer.mixer
        else:
            pairs.append(_Pair())
            pairs[-1].input_layernorm = layer.norm
            setattr(pairs[-1], "mamba" if layer.block_type == "linear_attention" else "self_attn", layer.mixer)
    return pairs


_SWA: dict[str, Any] = {
    "rotary": "rotary_embs",
    "turning": lambda attention: str(_theta(attention)),
    "rotates": lambda attention: bool(_theta(attention)),
}

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
    "LlamaModel": Family(),
    "MistralModel": Family(window=_of_config),
    "Qwen2Model": Family(),
    "Qwen3Model": Family(),
    "GemmaModel": Family(plus_one=True),
    "Gemma2Model": Family(_SANDWICH, plus_one=True),
    "VaultGemmaModel": Family(("input_layernorm", None, "pre_feedforward_layernorm", None), plus_one=True),
    "Gemma3TextModel": Family(_SANDWICH, plus_one=True),
    "BitNetModel": Family(),
    "SmolLM3Model": Family(),
    "Olmo2Model": Family(_AFTER),
    "Olmo3Model": Family(_AFTER),
    "PhiModel": Family(parallel=True, mlp=(None, "fc1", "fc2"), out="dense", final="final_layernorm"),
    "Phi3Model": Family(window=_of_config),
    "GPTNeoXModel": Family(
        mlp=(None, "dense_h_to_4h", "dense_4h_to_h"),
        attention="attention",
        fused="query_key_value",
        by_head=True,
        out="dense",
        final="final_layer_norm",
    ),
    "GraniteModel": Family(),
    "CohereModel": Family(centered=True, parallel=True, pairs="neighbours"),
    "Cohere2Model": Family(
        centered=True,
        parallel=True,
        pairs="neighbours",
        rotates=lambda attention: attention.sliding_window is not None,
    ),
    "Exaone4Model": Family(_AFTER, window=_of_exaone, rotates=_exaone_rotates),
    "GlmModel": Family(pairs="neighbours"),
    "Glm4Model": Family(_GLM4, pairs="neighbours"),
    "HeliumModel": Family(pairs="neighbours"),
    "Ernie4_5Model": Family(pairs="neighbours"),
    "SeedOssModel": Family(),
    "MinistralModel": Family(),
    "CwmModel": Family(),
    "Jais2Model": Family(mlp=(None, "up_proj", "down_proj")),
    "NemotronModel": Family(plus_one=True, mlp=(None, "up_proj", "down_proj")),
    "ArceeModel": Family(mlp=(None, "up_proj", "down_proj")),
    "Starcoder2Model": Family(mlp=(None, "c_fc", "c_proj"), window=_of_config),
    "StableLmModel": Family(),
    "MixtralModel": Family(window=_of_config),
    "Qwen2MoeModel": Family(),
    "Qwen3MoeModel": Family(),
    "OlmoeModel": Family(),
    "FlexOlmoModel": Family(_AFTER),
    "GraniteMoeModel": Family(holder="block_sparse_moe", score="softmax of chosen"),
    "Ernie4_5_MoeModel": Family(pairs="neighbours"),
    "MiniMaxM2Model": Family(score="sigmoid"),
    "Glm4MoeModel": Family(score="sigmoid"),
    "Dots1Model": Family(score="sigmoid"),
    "SolarOpenModel": Family(score="sigmoid"),
    "Qwen3_5TextModel": Family(plus_one=True),
    "Qwen3_5MoeTextModel": Family(plus_one=True),
    "HunYuanDenseV1Model": Family(turned=True),
    "HunYuanMoEV1Model": Family(turned=True),
    "Lfm2Model": Family(**_LFM2),
    "Lfm2MoeModel": Family(**_LFM2, score="sigmoid", added=1e-6, rotary="pos_emb"),
    "ExaoneMoeModel": Family(window=_of_exaone, rotates=_exaone_rotates, score="sigmoid"),
    "GPT2Model": Family(
        ("ln_1", None, "ln_2", None),
        mlp=(None, "c_fc", "c_proj"),
        attention="attn",
        fused="c_attn",
        out="c_proj",
        layers="h",
        final="ln_f",
        learned="wpe",
        kv_heads=_no,
        odd=_odd_gpt2,
    ),
    "OPTDecoder": Family(
        ("self_attn_layer_norm", None, "final_layer_norm", None),
        mlp=(None, "fc1", "fc2"),
        holder=None,
        out="out_proj",
        final="final_layer_norm",
        learned="embed_positions",
        learned_offset=2,
        kv_heads=_no,
        odd=_odd_opt,
    ),
    "FalconModel": Family(
        parallel=True,
        mlp=(None, "dense_h_to_4h", "dense_4h_to_h"),
        attention="self_attention",
        fused="query_key_value",
        out="dense",
        layers="h",
        final="ln_f",
        kv_heads=lambda config: 1,
        odd=_odd_falcon,
    ),
    "OlmoModel": Family(centered=True),
    "ApertusModel": Family(
        ("attention_layernorm", None, "feedforward_layernorm", None), mlp=(None, "up_proj", "down_proj")
    ),
    "Ministral3Model": Family(window=_of_config, position_scales=_llama4_scales),
    "NanoChatModel": Family(mlp=(None, "fc1", "fc2"), turned=True, flipped=True, normed=True),
    "HyperCLOVAXModel": Family(
        ("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2"),
        logits=lambda config: config.logits_scaling,
    ),
    "GptOssModel": Family(halves=True, gate="clamped_swiglu", score="softmax of chosen"),
    "GraniteMoeSharedModel": Family(holder="block_sparse_moe", score="softmax of chosen"),
    "GraniteMoeHybridModel": Family(holder="block_sparse_moe", recurrence="mamba", score="softmax of chosen"),
    "NemotronHModel": Family(
        blocks=_paired,
        mlp=(None, "up_proj", "down_proj"),
        recurrence="mamba",
        score="sigmoid",
        added=1e-20,
        final="norm_f",
    ),
    "BambaModel": Family(
        ("input_layernorm", None, "pre_ff_layernorm", None),
        holder="feed_forward",
        recurrence="mamba",
        final="final_layernorm",
    ),
    "GraniteSWAModel": Family(**_SWA),
    "GraniteMoeSWAModel": Family(**_SWA, holder="block_sparse_moe", score="softmax of chosen"),
    "MellumModel": Family(),
    "HYV3Model": Family(score="sigmoid", added=1e-20),
    "AfmoeModel": Family(
        ("input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"),
        score="sigmoid",
        added=1e-20,
        multiplier=_mup,
        rotates=lambda attention: attention.is_local_attention,
    ),
    "Qwen3NextModel": Family(plus_one=True),
    "DeepseekV2Model": Family(pairs="neighbours", normalized=False, group_best=1),
    "DeepseekV3Model": Family(pairs=None, score="sigmoid", added=1e-20),
    "Glm4MoeLiteModel": Family(pairs=None, score="sigmoid", added=1e-20),
    "AXK1Model": Family(_AXK1, pairs=None, score="sigmoid", added=1e-20),
    "YoutuModel": Family(pairs=None),
    "MiniCPM3Model": Family(logits=lambda config: config.dim_model_base / config.hidden_size),
    "Gemma4TextModel": Family(_SANDWICH, per_layer=True, caps=True, kv_heads=_no),
    "OlmoHybridModel": Family(_AFTER, recurrent_norms=_BEFORE),
}


def known(base: Any) -> bool:
    """Is it the base model of a family, of transformers' own class?"""
    return type(base).__name__ in FAMILIES and type(base).__module__.startswith("transformers.")


# Of base models by class what computes text: of those that also see, the language model, which takes what is text alone
# as if there were nothing else; of OPT the decoder inside, which its head calls, too.
TEXT_PARTS = dict.fromkeys(
    ("Gemma3Model", "Gemma4Model", "Mistral3Model", "LlavaModel", "Qwen3_5Model", "Qwen3_5MoeModel"), "language_model"
)
TEXT_PARTS["OPTModel"] = "decoder"


def as_text(base: Any, ids: Tensor) -> Tensor:
    """What a base model that also sees takes token ids for where there is text alone."""
    if type(base).__name__ != "Gemma4Model":
        return ids
    config = base.config  # whose forward has padding in place of what images and sounds come in for
    places = torch.tensor([config.image_token_id, config.video_token_id, config.audio_token_id], device=ids.device)
    return torch.where(torch.isin(ids, places), config.text_config.pad_token_id, ids)


def text_part(base: Any) -> Any:
    """What of a base model computes text: its part by TEXT_PARTS if that is known, or itself."""
    part = getattr(base, TEXT_PARTS.get(type(base).__name__, ""), None)
    return part if type(base).__module__.startswith("transformers.") and known(part) else base
