"""Every model type that transformers has, as far as it can be built small: swapped, saved, loaded and converted.

    python -m pytest -m slow tests/test_architectures.py     (half an hour on one core of Zen 1)

Sizes are tried from a common list, as the options of model types have common names; what cannot be built of them, needs
a package that is missing or has no layer to swap is skipped with the reason. Tensors are compared, which needs no
inputs: what was saved and what a conversion made of the float checkpoint must be what is in memory. Language models
also write, which must be what their own forward writes: float32 sums in another order change a logit by millionths,
and through rounded activations by more, so of two tokens whose logits lie closer than NEAR either may follow.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto
from transformers.utils import logging

import bitnet

pytestmark = pytest.mark.slow
VOCABULARY, NEAR, MANY = 200, 0.05, 100_000_000
SIZES = {  # and the options that are of one
    0: "pad_token_id num_kv_shared_layers",
    1: "n_shared_experts n_group topk_group first_k_dense_replace bos_token_id",
    2: """num_key_value_heads num_kv_heads linear_num_key_heads num_experts_per_tok moe_topk top_k_experts
        type_vocab_size eos_token_id""",
    4: """num_hidden_layers num_layers n_layers n_layer encoder_layers decoder_layers depth num_attention_heads
        num_heads n_heads n_head encoder_attention_heads decoder_attention_heads index_n_heads mamba_num_heads
        linear_num_value_heads num_experts num_local_experts n_routed_experts moe_num_experts""",
    8: """qk_rope_head_dim qk_nope_head_dim rotary_dim state_size mamba_d_state ssm_state_size mamba_n_heads chunk_size
        mamba_chunk_size index_topk laurel_rank patch_size""",
    16: """head_dim dim_head mamba_d_head mamba_head_dim v_head_dim qk_head_dim global_head_dim linear_key_head_dim
        linear_value_head_dim index_head_dim d_kv kv_lora_rank q_lora_rank hidden_size_per_layer_input sliding_window
        attention_window num_mel_bins""",
    32: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size image_size",
    64: """hidden_size d_model n_embd embed_dim dim embedding_size dim_model encoder_hidden_size decoder_hidden_size
        out_hidden_size word_embed_proj_dim projection_dim lru_width""",
    96: "intermediate_size n_inner ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim dim_ff mlp_dim",
    128: "max_position_embeddings n_positions n_ctx max_seq_len",
    VOCABULARY: "vocab_size text_vocab_size vocab_size_per_layer_input",
}
SMALL: dict[str, Any] = {option: size for size, names in SIZES.items() for option in names.split()}
SMALL |= {"hidden_sizes": [16, 32, 64, 64], "embed_dims": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}
# What does not fit some types, tried in turn.
WIDTHS = {"head_dim", "num_key_value_heads", "qk_rope_head_dim", "qk_nope_head_dim", "hidden_sizes", "embed_dims"}
WITHOUT: list[Collection[str]] = [
    (),
    {"num_key_value_heads"},
    {"head_dim", "num_key_value_heads"},
    WIDTHS | {"depths", "num_layers", "num_attention_heads", "num_heads"},
    SMALL.keys() - {"vocab_size", "num_hidden_layers", "intermediate_size", "pad_token_id"},
    SMALL.keys() - {"vocab_size", "pad_token_id"},
]
TASKS = ("IMAGE_TEXT_TO_TEXT", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "IMAGE_CLASSIFICATION")
TASKS += ("SPEECH_SEQ_2_SEQ", "OBJECT_DETECTION", "CTC")


def options(config: PreTrainedConfig, without: Collection[str]) -> dict[str, Any]:
    """The small sizes of those that a config has, its parts' too."""
    found: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found[key] = options(value, without) | {"model_type": value.model_type}
        elif key in SMALL and key not in without and type(value) is type(SMALL[key]):
            found[key] = SMALL[key]
    return found


def class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    for name in (*(f"MODEL_FOR_{task}_MAPPING" for task in TASKS), "MODEL_MAPPING"):
        if (found := getattr(auto, name).get(type(config), None)) is not None:
            return found[0] if isinstance(found, tuple) else found
    raise KeyError(type(config))


def build(kind: str, folder: Path) -> PreTrainedModel:
    """A model of a type, of random weights, as transformers saves it to a folder and loads it again; skips where it
    cannot."""
    reason = ""
    for without in WITHOUT:
        try:
            config = AutoConfig.for_model(kind, **options(AutoConfig.for_model(kind), without))
            cls = class_of(config)
            with torch.device("meta"):
                size = sum(p.numel() for p in cls._from_config(config).parameters())
            if size > MANY:
                raise ValueError(f"has {size:,} parameters")
            model = cls._from_config(config, dtype=torch.float32)
            random = torch.Generator().manual_seed(0)
            for parameter in (p for p in model.parameters() if p.ndim > 1):
                parameter.data = torch.randn(parameter.shape, generator=random) * 0.08
            model.tie_weights()
            model.save_pretrained(folder)
            return cls.from_pretrained(folder, config=config, dtype=torch.float32).eval()
        except Exception as error:  # whatever strangers' code raises
            reason = reason or f"{type(error).__name__}: {' '.join(str(error).split()):.80}"
    pytest.skip(f"cannot be built small ({reason})")


def assert_same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@torch.no_grad()
def assert_writes(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Is a greedy text the reference's, which is the model in transformers' own forward, or near it?"""
    prompt = torch.randint(3, VOCABULARY, (1, 10), generator=torch.Generator().manual_seed(1))
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    try:
        expected = reference.generate(prompt, **how)[0]
    except Exception as error:  # of models that need more than a prompt
        pytest.skip(f"saved, loaded and converted, but does not write: {' '.join(str(error).split()):.80}")
    written: Tensor = model.generate(prompt, **how)[0]
    assert written.shape == expected.shape
    for at in (written != expected).nonzero().flatten()[:1]:
        logits = reference(expected[None, :at]).logits[0, -1]
        gap = (logits[expected[at]] - logits[written[at]]) / logits.std()
        assert gap < NEAR, f"token {int(at)} is another, by {gap:.3f} standard deviations of the logits"


@pytest.mark.parametrize("kind", sorted(auto.MODEL_MAPPING_NAMES))
def test_a_model_of_any_type_comes_back_and_is_converted(kind: str, tmp_path: Path) -> None:
    logging.disable_progress_bar()
    model = build(kind, tmp_path / "float")
    if not bitnet.replace_linear(model).low_bit_weights:
        pytest.skip("has no layer that is swapped")
    bitnet.save(model, tmp_path / "latent")
    assert_same(model, bitnet.load(tmp_path / "latent", dtype=torch.float32))
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "packed")
    loaded = bitnet.load(tmp_path / "packed", dtype=torch.float32)
    assert_same(model, loaded)
    bitnet.save(loaded, tmp_path / "again")
    assert_same(model, bitnet.load(tmp_path / "again", dtype=torch.float32))
    bitnet.convert_checkpoint(tmp_path / "float", tmp_path / "converted", console=Console(quiet=True))
    assert_same(model, bitnet.load(tmp_path / "converted", dtype=torch.float32))
    if kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        assert_writes(loaded, model)
