"""Checkpoints made for code of their own, as transformers' own classes have them."""

from collections.abc import Iterable
from typing import Any

from .config import BitNetConfig


def modernize(config: dict[str, Any], keys: Iterable[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """config.json and tensor names of a checkpoint as transformers' own classes have them; most are left as they are.

    keys: the names in the files; returns the config and, for each name kept, the name in the model

    The 1bitLLM/bitnet_b1_58-* checkpoints were made for code of their own: float latent weights under
    `model_type: llama`, with norms before o_proj and down_proj (the BitNet paper's SubLN) that Llama lacks. They are
    `bitnet` models under other names, with SiLU instead of ReLU^2.
    """
    names = {key: key for key in keys}
    if not any(key.endswith(".self_attn.inner_attn_ln.weight") for key in names):
        return config, names
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
