"""A model's numbers in GGUF metadata, both ways: from transformers' config, and back to one.

Each family's own lie side by side: what is written of it, what is refused because its graph would compute something
else, and what is read back. A key that is not understood is refused, too.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..files import ggml
from ..files.damaged import Damaged
from ..files.gguf import REMEDY, TensorInfo
from ..files.safetensors import DTYPES
from ..hub.models import refusals
from . import tokenizer as gguf_tokenizer
from .families import BITNET_CPP, FAMILIES, LLAMA3_ROPE, Family, head_dim_of, rope_factors
from .header import Value

BF16_FILE = 32  # general.file_type
GEMMA3_PERIOD = 6  # every sixth layer attends to everything, where no key says otherwise
QWEN35_PERIOD = 4
DRAFTS = "nextn_predict_layers"
MROPE = [11, 11, 10, 0]  # Qwen3.5's sections; a text's positions are the same in all of them
POOLINGS = {1: "mean_tokens", 2: "cls_token", 3: "lasttoken"}  # pooling_type, as sentence-transformers calls them
L2_EPS = 1e-6  # transformers' for the queries and keys of gated delta nets, whatever rms_norm_eps is


def described(config: Any, family: Family, ternary: str) -> dict[str, Value]:
    """general.* and the architecture's own metadata; raises ValueError for what its graph would compute otherwise."""
    arch, act = family.arch, getattr(config, "hidden_act", None) or config.hidden_activation
    heads, width = config.num_attention_heads, config.hidden_size
    head_dim = head_dim_of(config)
    if act not in family.activations:
        raise ValueError(f"llama.cpp's `{arch}` runs {' or '.join(family.activations)}, not {act}")
    if ternary == "I2_S":
        if arch not in ("llama", "bitnet"):
            raise ValueError(f"bitnet.cpp, which alone reads I2_S, is not known to run `{arch}`; take gguf-tq2_0")
        arch = BITNET_CPP[act] if arch == "bitnet" else arch
    elif act == "relu2":
        raise ValueError("llama.cpp's `bitnet` runs silu, not relu2, which only bitnet.cpp does; take gguf-i2_s")
    if family.arch == "bitnet" and head_dim * heads != width:
        raise ValueError(f"`{arch}` has heads of hidden_size / heads = {width / heads:g} values, not {head_dim}")
    if family.arch == "bitnet" and not config.tie_word_embeddings:
        raise ValueError("`bitnet` uses the input embedding as output head, and this model has a head of its own")
    rope, more = config.rope_parameters, {}
    if family.arch == "gemma3":
        rope, more = rope["full_attention"], _gemma3(config)
    elif family.arch == "qwen3moe":
        more = _mixture(config)
    elif family.arch == "qwen35":
        more = _delta_net(config)
    if family.arch != "gemma3":
        window = getattr(config, "sliding_window", None)
        slides = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ["all"])
        if slides and window is not None and window < config.max_position_embeddings:
            raise ValueError(f"`{arch}` attends to the whole context, not to a sliding window of {window}")
    partial = rope.get("partial_rotary_factor", 1)
    if rope["rope_type"] not in family.rope or (partial != 1 and family.arch != "qwen35"):
        raise ValueError(f"`{arch}` has rotary embeddings of type {' or '.join(family.rope)}, not {rope}")
    own: dict[str, Value] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": width,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": int(head_dim * partial),
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] == "linear":
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    metadata: dict[str, Value] = {"general.architecture": arch, "general.quantization_version": 2}
    metadata["general.file_type"] = BF16_FILE if ternary == "BF16" else ggml.TERNARY[ternary].file_type
    return metadata | {f"{arch}.{key}": value for key, value in (own | more).items()}


def _gemma3(config: Any) -> dict[str, Value]:
    theirs, what = head_dim_of(config), "head_dim"
    if config.num_hidden_layers == 62:  # llama.cpp takes it for the 27B model, whose scale is another
        theirs, what = config.hidden_size // config.num_attention_heads, "hidden_size / heads in models of 62 layers"
    if config.query_pre_attn_scalar != theirs:
        raise ValueError(
            f"`gemma3` divides attention scores by the root of {what}, {theirs}, not of query_pre_attn_scalar, "
            f"{config.query_pre_attn_scalar}"
        )
    if config.use_bidirectional_attention:
        raise ValueError("`gemma3` attends to earlier tokens only, and this model to later ones, too")
    if config.attn_logit_softcapping is not None:
        raise ValueError("`gemma3` does not cap attention scores (attn_logit_softcapping)")
    own: dict[str, Value] = {}
    if config.final_logit_softcapping:
        own["final_logit_softcapping"] = float(config.final_logit_softcapping)
    slides = [kind == "sliding_attention" for kind in config.layer_types]
    if any(slides):
        local = config.rope_parameters["sliding_attention"]
        if local["rope_type"] != "default" or local.get("partial_rotary_factor", 1) != 1:
            raise ValueError(f"`gemma3` has plain rotary embeddings in layers with a sliding window, not {local}")
        own |= {"attention.sliding_window": config.sliding_window, "rope.freq_base_swa": float(local["rope_theta"])}
        if slides != _periodic(len(slides), GEMMA3_PERIOD):  # which older llama.cpp always have
            own["attention.sliding_window_pattern"] = slides
    return own


def _mixture(config: Any) -> dict[str, Value]:
    if not config.norm_topk_prob and config.num_experts_per_tok > 1:
        raise ValueError("`qwen3moe` makes the weights of a token's experts add up to 1; norm_topk_prob is off here")
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise ValueError(
            "`qwen3moe` has experts in every layer; here mlp_only_layers is "
            f"{config.mlp_only_layers} and decoder_sparse_step {config.decoder_sparse_step}"
        )
    return {
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


def _delta_net(config: Any) -> dict[str, Value]:
    size, keys, values = config.linear_key_head_dim, config.linear_num_key_heads, config.linear_num_value_heads
    if config.linear_value_head_dim != size:
        raise ValueError(
            f"`qwen35` has keys and values of one size in its gated delta nets, not {size} and "
            f"{config.linear_value_head_dim}"
        )
    if config.rms_norm_eps != L2_EPS:
        raise ValueError(
            f"`qwen35` takes rms_norm_eps, {config.rms_norm_eps:g}, in the norm of queries and keys of its gated delta "
            f"nets, too, where transformers has {L2_EPS:g}"
        )
    recurrent = [kind == "linear_attention" for kind in config.layer_types]
    if len({*recurrent}) < 2:
        raise ValueError(f"llama.cpp's `qwen35` aborts on a model whose layers are all {config.layer_types[0]}")
    return {
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": size,
        "ssm.group_count": keys,
        "ssm.time_step_rank": values,
        "ssm.inner_size": size * values,
        "attention.recurrent_layers": recurrent,
        "rope.dimension_sections": [*config.rope_parameters.get("mrope_section", MROPE[:3]), 0][:4],
    }


def _periodic(layers: int, period: int) -> list[bool]:
    return [(i + 1) % period != 0 for i in range(layers)]


def without_drafts(metadata: dict[str, Any], stored: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors without the blocks behind the model's that guess further tokens; transformers drops them, too."""
    blocks, drafts = (metadata.get(f"qwen35.{key}") for key in ("block_count", DRAFTS))
    if type(blocks) is not int or type(drafts) is not int or not 0 < drafts < blocks <= len(stored):
        return stored
    dropped = tuple(f"blk.{i}." for i in range(blocks - drafts, blocks))
    return {name: info for name, info in stored.items() if not name.startswith(dropped)}


class Keys:
    """The keys of a file's architecture: whatever is not taken is not understood."""

    def __init__(self, path: Path, metadata: dict[str, Any], arch: str) -> None:
        self.path, self.arch = path, arch
        self.own = {k.removeprefix(f"{arch}."): v for k, v in metadata.items() if k.startswith(f"{arch}.")}

    def take(self, key: str, default: Any = None, kind: Any = int) -> Any:
        value: Any = self.own.pop(key, default)
        where = f"{self.arch}.{key}"
        if value is None or isinstance(value, list):
            missing = "missing" if value is None else "one for each layer"
            raise ValueError(f"{self.path}: {where} is {missing}")
        if type(value) is not kind or (kind is not str and not 0 < value < 1 << 31):
            raise Damaged(self.path, f"{where} is {value!r:.80}, which cannot be", REMEDY)
        return value

    def layers(self, key: str, count: int, period: Any) -> list[bool]:
        """What is so in all layers but every period-th, or in those that the key lists; it may hold a period itself."""
        value = self.own.pop(key, None)
        if isinstance(value, list):
            if len(value) < count or not all(type(item) in (bool, int) for item in value):
                raise Damaged(self.path, f"{self.arch}.{key} is {value!r:.80}, for {count} layers", REMEDY)
            return [bool(item) for item in value[:count]]
        if value is not None:
            period = value
        if type(period) is not int or not 0 < period < 1 << 31:
            raise Damaged(self.path, f"{self.arch}.{key} is {period!r:.80}, which cannot be", REMEDY)
        return _periodic(count, period)


def config_of(path: Path, metadata: dict[str, Any], stored: dict[str, TensorInfo], factors: Any) -> tuple[Family, Any]:
    """The family and the transformers config that a file's metadata describe.

    factors: reads the tensor rope_freqs.weight, where there is one

    Raises ValueError naming the key for what is not understood, or not there.
    """
    arch = metadata.get("general.architecture")
    names = {family.arch: family for family in reversed(FAMILIES.values())}
    names |= dict.fromkeys((*BITNET_CPP.values(), "bitnet-25"), FAMILIES["bitnet"])
    if not isinstance(arch, str) or arch not in names:
        raise ValueError(f"{path}: its architecture is {arch!r:.80}; read here are {', '.join(names)}")
    family, keys = names[arch], Keys(path, metadata, arch)
    take = keys.take
    if "token_embd.weight" not in stored:
        raise ValueError(f"{path}: has no tensor token_embd.weight; is it a model?")
    embedding = stored["token_embd.weight"]
    heads, width, layers = take("attention.head_count"), take("embedding_length"), take("block_count")
    if family.arch == "qwen35" and keys.own.get(DRAFTS):
        layers -= take(DRAFTS)
    if not 0 < layers <= len(stored):
        raise Damaged(path, f"{arch}.block_count is {layers:,}, for {len(stored)} tensors", REMEDY)
    kv, head_dim = take("attention.head_count_kv", heads), take("attention.key_length", width // heads)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": take("rope.freq_base", 10000.0, float)}
    scaling, factor = take("rope.scaling.type", "linear", str), take("rope.scaling.factor", 1.0, float)
    if scaling != "none" and (scaling != "linear" or factor != 1):
        rope |= {"rope_type": scaling, "factor": factor}
    if scaling == "yarn" and factor > 1 and "rope.scaling.original_context_length" in keys.own:
        rope["original_max_position_embeddings"] = take("rope.scaling.original_context_length")
    known = family.rope + (family.rope_read if "original_max_position_embeddings" in rope else ())
    same = {"attention.value_length": head_dim, "vocab_size": embedding.shape[0]}
    if family.arch == "qwen35":
        rope["partial_rotary_factor"] = min(take("rope.dimension_count", head_dim) / head_dim, 1.0)
    else:
        same["rope.dimension_count"] = head_dim
    wrong = [key for key, value in same.items() if take(key, value) != value]
    special = {name: metadata.get(f"tokenizer.ggml.{word}_token_id") for word, name in gguf_tokenizer.SPECIAL.items()}
    options: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": take("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": head_dim,
        "rms_norm_eps": take("attention.layer_norm_rms_epsilon", kind=float),
        "max_position_embeddings": take("context_length"),
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in stored,
        "rope_parameters": rope,
        "dtype": next((DTYPES[n] for n, kind in ggml.FLOATS.items() if kind == embedding.kind), torch.float32),
        "architectures": [family.model],
        **{f"{name}_token_id": special[name] for name in ("bos", "eos", "pad")},
    }
    if family.arch == "bitnet":
        options["hidden_act"] = "silu" if arch == "bitnet" else "relu2"
    if family.arch == "llama":
        options["attention_bias"] = "blk.0.attn_q.bias" in stored
        options["mlp_bias"] = "blk.0.ffn_up.bias" in stored
    if family.arch == "gemma3":
        options |= _read_gemma3(keys, options)
    if family.arch == "qwen3moe":
        options |= _read_mixture(keys, options)
    if family.arch == "qwen35":
        options |= _read_delta_net(keys, options)
    if keys.own.get("pooling_type") in POOLINGS:
        del keys.own["pooling_type"]
    wrong += [key for key, value in keys.own.items() if value]
    if rope["rope_type"] not in known or wrong:
        raise ValueError(
            f"{path}: says what is not understood here: {', '.join(f'{arch}.{key}' for key in wrong) or rope}; the "
            "model would compute something else"
        )
    config_class = getattr(transformers, family.model).config_class
    with refusals(path):
        config = config_class(**options)
    if "rope_freqs.weight" in stored:
        config = _llama3(path, factors(), config_class, options)
    return family, config


def _read_gemma3(keys: Keys, options: dict[str, Any]) -> dict[str, Any]:
    layers, head_dim = options["num_hidden_layers"], options["head_dim"]
    slides, window = [False] * layers, 4096  # which no layer has then, but the class needs one
    if keys.own.get("attention.sliding_window"):
        window = keys.take("attention.sliding_window")
        slides = keys.layers("attention.sliding_window_pattern", layers, GEMMA3_PERIOD)
    local = {"rope_type": "default", "rope_theta": keys.take("rope.freq_base_swa", 10000.0, float)}
    cap = keys.own.pop("final_logit_softcapping", 0.0)
    return {
        "sliding_window": window,
        "layer_types": ["sliding_attention" if slide else "full_attention" for slide in slides],
        "rope_parameters": {"full_attention": options["rope_parameters"], "sliding_attention": local},
        "final_logit_softcapping": cap or None,
        "query_pre_attn_scalar": options["hidden_size"] // options["num_attention_heads"] if layers == 62 else head_dim,
    }


def _read_mixture(keys: Keys, options: dict[str, Any]) -> dict[str, Any]:
    used = keys.take("expert_used_count")
    return {
        "num_experts": keys.take("expert_count"),
        "num_experts_per_tok": used,
        "moe_intermediate_size": keys.take("expert_feed_forward_length", max(1, options["intermediate_size"] // used)),
        "norm_topk_prob": True,
    }


def _read_delta_net(keys: Keys, options: dict[str, Any]) -> dict[str, Any]:
    layers, size, values = options["num_hidden_layers"], keys.take("ssm.state_size"), keys.take("ssm.time_step_rank")
    period = keys.own.pop("full_attention_interval", QWEN35_PERIOD)
    recurrent = keys.layers("attention.recurrent_layers", layers, period)
    groups, inner = keys.take("ssm.group_count"), keys.take("ssm.inner_size")
    if inner != size * values or values % groups:
        raise ValueError(
            f"{keys.path}: {keys.arch}.ssm.inner_size is {inner}, not {values} heads of {size} in {groups} groups"
        )
    sections = keys.own.pop("rope.dimension_sections", MROPE)
    if not isinstance(sections, list) or len(sections) < 3 or not all(type(item) is int for item in sections):
        raise Damaged(keys.path, f"{keys.arch}.rope.dimension_sections is {sections!r:.80}", REMEDY)
    return {
        "layer_types": ["linear_attention" if item else "full_attention" for item in recurrent],
        "linear_conv_kernel_dim": keys.take("ssm.conv_kernel"),
        "linear_key_head_dim": size,
        "linear_value_head_dim": size,
        "linear_num_key_heads": groups,
        "linear_num_value_heads": values,
        "rope_parameters": options["rope_parameters"] | {"mrope_section": sections[:3], "mrope_interleaved": True},
    }


def _llama3(path: Path, factors: Tensor, config_class: Any, options: dict[str, Any]) -> Any:
    """The config whose rotary embedding yields the factors in the file."""
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    for known in LLAMA3_ROPE:
        scaling = {"rope_type": "llama3", **dict(zip(names, known, strict=True))}
        config = config_class(**options | {"rope_parameters": options["rope_parameters"] | scaling})
        known_factors = rope_factors(config)
        if known_factors.shape == factors.shape and torch.allclose(known_factors, factors, rtol=1e-5):
            return config
    raise ValueError(f"{path}: its rope_freqs.weight is not that of Llama 3.1 or 3.2, and so not understood here")
