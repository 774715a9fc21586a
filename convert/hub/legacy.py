"""Checkpoints made for code of their own, as transformers' own classes have them."""

import re
from collections.abc import Iterable
from typing import Any

from .config import BitNetConfig

_INNER_NORM = re.compile(r"(.*\.\w+_proj)\.norm\.weight")


def modernize(config: dict[str, Any], keys: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """config.json and tensor names of a checkpoint as transformers' own classes have them; most are left as they are.

    keys: the names in the files; returns the config and, for each name kept, the name in the model

    Two kinds of checkpoints are known by names of their tensors that their model type does not have:

    1bitLLM/bitnet_b1_58-*: float latent weights under `model_type: llama`, with norms before o_proj and down_proj (the
    BitNet paper's SubLN) that Llama lacks. They are `bitnet` models under other names, with SiLU instead of ReLU^2.

    microsoft/bitnet-embedding-*: Qwen 3 and Gemma 3 with an RMSNorm in front of every projection, `q_proj.norm.weight`
    beside `q_proj.weight`, and float latent weights: our layers with rms_norm=True. These norms multiply by their
    weight in Gemma, too, whose own multiply by 1 + weight.
    """
    names = {key: key for key in keys}
    if config.get("model_type") == "llama" and any(key.endswith(".self_attn.inner_attn_ln.weight") for key in names):
        return _bitnet_b1_58(config, names)
    inner = inner_norms(names)
    return (_norms_inside(config), names | inner) if inner else (config, names)


def inner_norms(keys: Iterable[str]) -> dict[str, str]:
    """Of the second kind's tensors, those of norms in front of projections, and the names they have in our layers."""
    names = {*keys}
    found = {key: match[1] for key in names if (match := _INNER_NORM.fullmatch(key))}
    return {key: f"{layer}.rms_norm.weight" for key, layer in found.items() if f"{layer}.weight" in names}


def _bitnet_b1_58(config: dict[str, Any], names: dict[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    if (config.get("weight_bits"), config.get("input_bits")) != (1, 8):
        found = f"weight_bits {config.get('weight_bits')!r} and input_bits {config.get('input_bits')!r}"
        raise ValueError(f"config.json has {found}; of the 1bitLLM checkpoints, those with 1 and 8 are known")
    ours = {key: config[key] for key in config if key not in ("auto_map", "weight_bits", "input_bits", "rope_theta")}
    ours |= {"model_type": "bitnet", "architectures": ["BitNetForCausalLM"]}
    ours["rope_parameters"] = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    skips = {"modules_to_not_convert": ["lm_head"]}
    ours["quantization_config"] = BitNetConfig("autobitlinear", quantization_mode="online", **skips).to_dict()
    norms = {"self_attn.inner_attn_ln": "self_attn.attn_sub_norm", "mlp.ffn_layernorm": "mlp.ffn_sub_norm"}
    for old, new in norms.items():
        names = {key: name.replace(old, new) for key, name in names.items()}
    return ours, {key: name for key, name in names.items() if not name.endswith("rotary_emb.inv_freq")}


def _norms_inside(config: dict[str, Any]) -> dict[str, Any]:
    ours = {key: value for key, value in config.items() if key != "auto_map"}
    if ours.get("quantization_config") is None:
        options = {"use_rms_norm": True, "rms_norm_eps": config.get("rms_norm_eps", 1e-6)}
        skips = {"modules_to_not_convert": ["lm_head"]}
        settings = BitNetConfig("autobitlinear", quantization_mode="online", **skips, **options)
        ours["quantization_config"] = settings.to_dict()
    return ours
