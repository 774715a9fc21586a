"""Models that the native step does not know decode in transformers' own forward with its slow parts replaced."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path

import decode_models
import pytest
import torch
from decode_models import SIZES
from tiny import randomize
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

import bitnet
from bitnet.decode import lean
from bitnet.decode.attach import CACHE, attach_decoding, why_not
from bitnet.decode.lean import Growing, LeanNorm
from bitnet.kernels import reference
from bitnet.kernels.cpu import library
from bitnet.kernels.cpu.attention import attention, bind_rms_norm

pytestmark = pytest.mark.skipif(isinstance(library.load(), str), reason="there is no native library")

TYPES = [torch.float32, torch.bfloat16, torch.float16]
ISAS = library.isas() if not isinstance(library.load(), str) else []
IDS = torch.randint(3, 200, (70,), generator=torch.Generator().manual_seed(1))


def rounding(dtype: torch.dtype) -> float:
    """Of one result, and for float32 of its sums."""
    return 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps


# (batch, heads, kv_heads, tokens, positions, dim, value_dim)
SHAPES = [
    (1, 1, 1, 1, 1, 16, 16),
    (1, 4, 2, 1, 17, 32, 32),
    (2, 5, 1, 1, 130, 48, 16),
    (1, 6, 6, 3, 40, 64, 80),
    (3, 12, 4, 8, 33, 128, 128),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES)
def test_attention_is_the_reference_s_and_has_the_same_bits_on_every_instruction_set(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    batch, heads, kv_heads, tokens, positions, dim, value_dim = shape
    dice = torch.Generator().manual_seed(0)
    q = torch.randn(batch, tokens, heads, dim, generator=dice).to(dtype).transpose(1, 2)
    k = torch.randn(batch, kv_heads, positions + 5, dim, generator=dice).to(dtype)[:, :, :positions]
    v = torch.randn(batch, kv_heads, positions + 5, value_dim, generator=dice).to(dtype)[:, :, :positions]
    some = torch.rand(batch, 1, tokens, positions, generator=dice) < 0.6
    some[0, 0, 0] = False
    for mask in (None, some, some.expand(batch, heads, tokens, positions).contiguous()):
        expected = reference.attention(q, k, v, mask, 0.3)
        found = [attention(q, k, v, mask, 0.3, isa) for isa in ISAS]
        assert all(torch.equal(found[0], each) for each in found)
        torch.testing.assert_close(found[0], expected, rtol=rounding(dtype), atol=rounding(dtype))
    assert not found[0][0, 0].any()  # sees nothing


def test_attention_leaves_what_it_does_not_compute() -> None:
    q, k = torch.randn(1, 4, 1, 32), torch.randn(1, 2, 9, 32)
    assert attention(q, k, k, None, 1.0) is not None
    assert attention(q[..., :20], k[..., :20], k[..., :20], None, 1.0) is None
    assert attention(q.double(), k.double(), k.double(), None, 1.0) is None
    assert attention(q, k.bfloat16(), k, None, 1.0) is None
    assert attention(q, k.mT.contiguous().mT, k, None, 1.0) is None
    assert attention(q, k, k, torch.zeros(1, 1, 1, 9), 1.0) is None


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("features", [1, 15, 16, 100, 2560])
def test_norms_are_the_reference_s(features: int, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 2, features) * torch.tensor([[[1e-3]], [[1.0]], [[50.0]]])).to(dtype)
    weight = torch.randn(features)
    found = [bind_rms_norm(weight, 1e-5, isa)(x) for isa in ISAS]
    assert all(torch.equal(found[0], each) for each in found)
    torch.testing.assert_close(found[0], reference.rms_norm(x, weight, 1e-5), rtol=rounding(dtype), atol=1e-7)


def test_norms_are_told_by_what_they_compute() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1e-3

    class GatedRMSNorm(LlamaRMSNorm):
        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return super().forward(x * gate)

    found = [lean._rms_norm(each) for each in (LlamaRMSNorm(32, 1e-5), Gemma2RMSNorm(32, 1e-6), nn.RMSNorm(32, 1e-6))]
    assert found == [(1e-5, False), (1e-6, True), (1e-6, False)]
    for other in (OtherRMSNorm(32), GatedRMSNorm(32), nn.LayerNorm(32), nn.Linear(32, 32)):
        assert lean._rms_norm(other) is None


# the cache


def test_a_growing_layer_does_what_transformers_layer_does() -> None:
    dice = torch.Generator().manual_seed(0)

    def new(batch: int, tokens: int) -> tuple[Tensor, Tensor]:
        return torch.randn(batch, 2, tokens, 16, generator=dice), torch.randn(batch, 2, tokens, 24, generator=dice)

    with torch.no_grad():
        plain, growing = DynamicLayer(), Growing()
        steps: list[Callable[[DynamicLayer], object]] = [
            lambda layer: layer.crop(-5),
            lambda layer: layer.batch_repeat_interleave(3),
            lambda layer: layer.reorder_cache(torch.tensor([2, 0, 2])),
            lambda layer: layer.batch_select_indices(torch.tensor([1])),
            lambda layer: layer.crop(-1),
            lambda layer: vars(layer).update(keys=layer.keys[:, :, 2:], values=layer.values[:, :, 2:]),
            lambda layer: layer.reset(),
        ]
        for step, tokens in itertools.zip_longest(steps, (200, 1, 100, 1, 300, 1, 1, 1)):
            batch = plain.keys.shape[0] if plain.is_initialized else 1
            states = new(batch, tokens)
            for a, b in zip(growing.update(*states), plain.update(*states), strict=True):
                assert torch.equal(a, b)
            copied = copy.deepcopy(growing)
            copied.update(*new(batch, 2))  # a copy grows for itself
            for _ in range(3):
                states = new(batch, 1)
                for a, b in zip(growing.update(*states), plain.update(*states), strict=True):
                    assert torch.equal(a, b)
            assert growing.get_seq_length() == plain.get_seq_length()
            if step is not None:
                step(plain)
                step(growing)


def test_a_growing_layer_does_not_copy_what_it_has() -> None:
    layer, states = Growing(), (torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))
    with torch.no_grad():
        places = {layer.update(*states)[0].data_ptr() for _ in range(250)}
    assert len(places) == 1


def test_a_growing_layer_begun_in_inference_mode_goes_on_outside() -> None:
    layer, states = Growing(), (torch.ones(1, 2, 3, 16), torch.ones(1, 2, 3, 16))
    with torch.inference_mode():
        layer.update(*states)
    with torch.no_grad():
        assert layer.update(*states)[0].shape[2] == 6
    keys = torch.ones(1, 2, 1, 16, requires_grad=True)
    squares = layer.update(keys, states[1][:, :, :1])[0].square().sum()
    (squares + layer.update(keys, states[1][:, :, :1])[0].sum()).backward()
    assert bool((keys.grad == 4).all())


# models

MODELS = {
    "gpt2": {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512},
    "apertus": {},
    "olmo": {},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 48},
    "deepseek_v3": {
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
}


OTHERS = {
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 0,
    }
}


def packed(kind: str, dtype: torch.dtype = torch.float32, own: bool = True) -> PreTrainedModel:
    """The same weights every time; of a class of somebody's own, which the native step does not know."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 2, "pad_token_id": 0} | (MODELS | OTHERS).get(kind, {})
    config = AutoConfig.for_model(kind, **sizes)
    model = randomize(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    model.generation_config.eos_token_id = None
    if own:
        cls = type(model.base_model)
        model.base_model.__class__ = type(cls.__name__, (cls,), {"__module__": "own"})
    return model.to(dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each native attention had."""
    found: list[int] = []

    def counted(q: Tensor, *args: object) -> Tensor | None:
        y = attention(q, *args)
        found.extend([q.shape[2]] if y is not None else [])
        return y

    monkeypatch.setattr(lean, "attention", counted)
    return found


def batch() -> dict[str, Tensor]:
    ids = torch.stack([IDS[:30], IDS[20:50], IDS[40:70]])
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :20] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def assert_same_texts(model: PreTrainedModel, plain: Tensor, found: Tensor, mask: Tensor) -> None:
    """Where a text differs, it does so at a tie: the two tokens' scores are as close as roundings."""
    for a, b, seen in zip(plain, found, mask, strict=True):
        if not torch.equal(a, b):
            at = int((a != b).nonzero()[0])
            scores = model(a[None, int(seen.argmax()) : at], use_cache=False).logits[0, -1].float()
            assert (scores[a[at]] - scores[b[at]]).abs() < 0.02 * scores.abs().max()


@pytest.mark.parametrize("kind", MODELS)
def test_200_tokens_are_the_same(kind: str, calls: list[int]) -> None:
    model = packed(kind)
    assert "is not one of" in str(why_not(model))
    plain = model.generate(**batch(), max_new_tokens=200, do_sample=False)
    assert not calls
    attach_decoding(model)
    found = model.generate(**batch(), max_new_tokens=200, do_sample=False)
    assert calls == [1] * 199 * 2
    assert_same_texts(model, plain, found, batch()["attention_mask"])


@torch.no_grad()
def in_parts(model: PreTrainedModel) -> Tensor:
    cache = DynamicCache(config=model.config)
    return torch.cat([model(ids[None], **{CACHE: cache}).logits[0].float() for ids in IDS.split([40, 1, 7, 1, 21])])


@pytest.mark.parametrize("dtype", TYPES)
def test_logits_are_as_close_as_roundings(dtype: torch.dtype, calls: list[int]) -> None:
    model = packed("apertus", dtype)
    plain, exact = in_parts(model), in_parts(nn.Module.float(copy.deepcopy(model)))
    attach_decoding(model)
    found = in_parts(model)
    assert calls == [1, 1, 7, 7, 1, 1]
    assert any(isinstance(vars(module).get("forward"), LeanNorm) for module in model.modules())
    assert torch.equal(found[:40], plain[:40])  # a prompt is torch's
    assert not torch.equal(found, plain)
    if dtype == torch.float32:
        error = (found - plain).abs().amax(-1) / plain.abs().max()
        assert error.quantile(0.1) < 2e-6
        assert error.max() < 0.05
    else:  # as far from float32's as torch is
        assert (found - exact)[40:].abs().mean() < 1.5 * (plain - exact)[40:].abs().mean()


SHAPES_1D = [(1, 6, 5, 4, 0, True), (2, 40, 9, 4, 3, False), (1, 1, 1, 1, 0, False)]


@pytest.mark.parametrize(("batch", "channels", "tokens", "kernel", "padding", "bias"), SHAPES_1D)
@pytest.mark.parametrize("dtype", TYPES[1:])
@torch.no_grad()
def test_depthwise_convolutions_are_torch_s(
    batch: int, channels: int, tokens: int, kernel: int, padding: int, bias: bool, dtype: torch.dtype
) -> None:
    x, weight = torch.randn(batch, channels, tokens).to(dtype), torch.randn(channels, 1, kernel).to(dtype)
    shift = torch.randn(channels).to(dtype) if bias else None
    expected = nn.functional.conv1d(
        x.float(), weight.float(), None if shift is None else shift.float(), padding=padding, groups=channels
    )
    found = lean.depthwise(x, weight, shift, (1,), (padding,), 1, channels)
    assert found is not None
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=rounding(dtype), atol=1e-6)
    for other in (
        lean.depthwise(x.float(), weight.float(), None, 1, padding, 1, channels),
        lean.depthwise(x, weight.expand(channels, 2, kernel), None, 1, padding, 1, channels),
        lean.depthwise(x, weight, None, 2, padding, 1, channels),
        lean.depthwise(x, weight, None, 1, "same", 1, channels),
    ):
        assert other is None


def test_convolutions_of_single_tokens_are_not_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = packed("qwen3_next", torch.bfloat16), []
    original = lean.depthwise

    def counted(x: Tensor, *args: object, **options: object) -> Tensor | None:
        y = original(x, *args, **options)
        tokens.append(0 if y is None else y.shape[2])
        return y

    monkeypatch.setattr(lean, "depthwise", counted)
    plain = in_parts(model)
    assert not tokens
    exact = in_parts(nn.Module.float(copy.deepcopy(model)))
    attach_decoding(model)
    found = in_parts(model)
    assert len(tokens) == 3  # a prompt is torch's
    assert min(tokens) >= 1
    assert (found - exact)[40:].abs().mean() < 1.5 * (plain - exact)[40:].abs().mean()


def test_tokens_of_a_short_prompt_see_none_behind_them(calls: list[int]) -> None:
    model = packed("granitemoeshared")
    attach_decoding(model)
    with torch.no_grad():
        found, alone = (model(IDS[None, :n], **{CACHE: DynamicCache(config=model.config)}).logits[0, 0] for n in (5, 1))
    assert (found - alone).abs().max() < 0.02 * alone.abs().max()
    assert calls == [1, 1]


def test_beams_assistants_and_samples_go_on(calls: list[int]) -> None:
    model = packed("apertus")
    options = {"max_new_tokens": 20, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(**batch(), do_sample=False, **options).sequences_scores
    alone = model.generate(IDS[None], max_new_tokens=30, do_sample=False)
    attach_decoding(model)
    found = model.generate(**batch(), do_sample=False, **options).sequences_scores
    torch.testing.assert_close(found, plain, rtol=0.01, atol=0)
    calls.clear()
    helped = model.generate(IDS[None], max_new_tokens=30, do_sample=False, assistant_model=copy.deepcopy(model))
    assert_same_texts(model, alone, helped, torch.ones(1, 70))
    assert set(calls) & set(range(2, 9))  # guesses are read together
    texts = model.generate(**batch(), do_sample=True, top_k=10, max_new_tokens=20, num_return_sequences=2)
    assert len(set(map(tuple, texts.tolist()))) == 6


@pytest.mark.parametrize("what", ["no cache", "gradients", "eager", "attentions", "detached"])
def test_other_calls_stay_transformers_own(what: str, calls: list[int]) -> None:
    model = packed("apertus")
    with torch.no_grad():
        expected = model(IDS[None, :5], use_cache=False).logits
    attach_decoding(model)
    if what == "eager":
        model.set_attn_implementation("eager")
    if what in ("eager", "attentions", "detached"):
        if what == "detached":
            model.generate(IDS[None], max_new_tokens=3, do_sample=False)
            bitnet.native_decoding(model, None)
            calls.clear()
        if what == "attentions":
            model.set_attn_implementation("eager")
        output = model.generate(
            IDS[None],
            max_new_tokens=3,
            do_sample=False,
            return_dict_in_generate=True,
            output_attentions=what == "attentions",
        )
        assert output.sequences.shape == (1, 73)
        assert (output.attentions is not None) == (what == "attentions")
        assert what != "detached" or not any("forward" in vars(module) for module in model.modules())
    else:
        given = {CACHE: DynamicCache()} if what == "gradients" else {"use_cache": False}
        with torch.set_grad_enabled(what == "gradients"):
            found = model(IDS[None, :5], **given)
        assert torch.equal(found.logits, expected)
    assert not calls


def test_what_looks_at_operations_sees_torch_s(calls: list[int]) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = packed("apertus")
    attach_decoding(model)
    with torch.no_grad():
        expected = model(IDS[None, :5], use_cache=False).logits
        compiled = torch.compile(model, backend="eager")(IDS[None, :5], **{CACHE: DynamicCache(config=model.config)})
        with FlopCounterMode(display=False) as counted:
            found = model(IDS[None, :5], **{CACHE: DynamicCache(config=model.config)})
    assert torch.equal(compiled.logits, expected)
    assert torch.equal(found.logits, expected)
    assert not calls
    assert counted.get_total_flops() > 0


def test_what_the_step_cannot_compute_of_a_family_it_knows_runs_lean(calls: list[int]) -> None:
    model = decode_models.packed("qwen3")
    plain = model.generate(IDS[None], max_new_tokens=20, do_sample=False)
    bitnet.native_decoding(model)
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)
    found = model.generate(IDS[None], max_new_tokens=20, do_sample=False)
    assert calls == [1] * 19 * 4
    assert_same_texts(model, plain, found, torch.ones(1, 70))


def test_a_changed_norm_is_noticed(calls: list[int]) -> None:
    model = packed("granitemoeshared")
    attach_decoding(model)
    texts = []
    for _ in range(2):
        texts.append(model.generate(IDS[None], max_new_tokens=20, do_sample=False))
        with torch.no_grad():
            model.model.norm.weight.copy_(torch.randn(64))
    plain = copy.deepcopy(model)
    bitnet.native_decoding(plain, None)
    assert not torch.equal(*texts)
    found, expected = (each.generate(IDS[None], max_new_tokens=20, do_sample=False) for each in (model, plain))
    assert_same_texts(plain, expected, found, torch.ones(1, 70))


def test_a_loaded_checkpoint_decodes_lean(calls: list[int], tmp_path: Path) -> None:
    model = packed("diffllama", own=False)
    bitnet.save(model, tmp_path)
    for loaded in (bitnet.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        calls.clear()
        loaded.generate(IDS[None], max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert calls == [1] * 16
    assert bitnet.load(tmp_path).state_dict().keys() == model.state_dict().keys()
