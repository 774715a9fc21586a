"""The native step computes what transformers does, on every instruction set, and generate() runs on it unchanged."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from decode_models import FAMILIES, SEEING, image_inputs, packed, stepwise
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedModel,
    TextIteratorStreamer,
)

import bitnet
from bitnet.decode.attach import NativeForward, native_decoding, why_not
from bitnet.decode.native import Cached, NativeSequences, run
from bitnet.decode.pieces import Unplanned
from bitnet.decode.plan import Plan
from bitnet.experts import PackedStack
from bitnet.kernels.cpu import library
from bitnet.kernels.cpu import step as native

pytestmark = pytest.mark.skipif(isinstance(library.load(), str), reason="there is no native library")

IDS = torch.randint(3, 200, (70,), generator=torch.Generator().manual_seed(1))
SPECS = {
    "row": {"per_row": True},
    "groups": {"group_size": 32},
    "16 bits": {"activation_bits": 16},
    "weight-only groups": {"activation_bits": None, "group_size": 64},
    "binary": {"weights": "binary"},
    "rotated": {"hadamard": 16, "hadamard_signs": True},
    "norms inside": {"rms_norm": True},
    "4 bits": {"activation_bits": 4},
}


@torch.no_grad()
def reference(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    return model(ids[None], use_cache=False).logits[0]


def assert_same_but_for_roundings(found: Tensor, expected: Tensor, bits: int = 8) -> None:
    """Sums in another order move a value by some 1e-7 of itself, and some activations then round to another code.

    Of 8 bits hardly a token in a few has one that does, and a code is 1/127 of the largest activation. Of 16 bits
    nearly each has, and a code is 1/32639.
    """
    error = (found - expected).abs().amax(-1) / expected.abs().max()
    assert error.quantile(0.1) < (2e-6 if bits == 8 else 1e-4)
    assert error.max() < (0.05 if bits == 8 else 5e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_computes_what_transformers_does(family: str) -> None:
    model = packed(family)
    found = stepwise(NativeSequences(model, 1, "float32"), IDS)
    assert_same_but_for_roundings(found, reference(model))


@pytest.mark.parametrize("name", SPECS)
def test_a_step_computes_every_option_of_the_layers(name: str) -> None:
    model = packed("llama", **SPECS[name])
    found = stepwise(NativeSequences(model, 1, "float32"), IDS)
    assert_same_but_for_roundings(found, reference(model), model.model.layers[0].mlp.up_proj.activation_bits)


@pytest.mark.parametrize("name", ["row", "groups", "16 bits", "weight-only groups", "binary"])
def test_a_step_computes_every_option_of_experts(name: str) -> None:
    model = packed("mixtral", **SPECS[name])
    found = stepwise(NativeSequences(model, 1, "float32"), IDS)
    assert_same_but_for_roundings(found, reference(model), model.model.layers[0].self_attn.q_proj.activation_bits)


def test_layers_that_rotate_their_common_input_alike_share_the_transform() -> None:
    """And those whose signs differ do not, which decides what is computed."""
    model = packed("llama", **SPECS["rotated"])
    block = Plan(model.model).native.blocks
    assert _products(block) == (1, 1)
    layer = model.model.layers[0]
    layer.self_attn.k_proj.signs = -layer.self_attn.k_proj.signs
    layer.mlp.up_proj.signs = -layer.mlp.up_proj.signs
    assert _products(Plan(model.model).native.blocks) == (3, 2)
    assert_same_but_for_roundings(stepwise(NativeSequences(model, 1, "float32"), IDS), reference(model))


def _products(blocks: int) -> tuple[int, int]:
    """Of the first block: for queries, keys and values, and for gate and up."""
    block = native.Block.from_address(blocks)
    return block.in_count, block.gate_count


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_many_sequences_and_single_tokens_give_the_same_bits(family: str) -> None:
    sequences = NativeSequences(
        packed(family, head="int8"), 4, "float16"
    )  # torch's product of a float head is not the same
    alone = stepwise(sequences, IDS)
    others = [IDS[:50], IDS[5:60]]
    rest = [stepwise(sequences, ids, slot) for slot, ids in enumerate(others, 1)]
    for slot in range(4):
        sequences.truncate(slot, 0)
    work = [(0, IDS[:33]), (1, others[0][:1]), (2, others[1][:17])]
    first = sequences.extend(work)
    second = sequences.extend([(2, others[1][17:]), (0, IDS[33:]), (1, others[0][1:])])
    assert torch.equal(first, torch.stack([alone[32], rest[0][0], rest[1][16]]))
    assert torch.equal(second, torch.stack([rest[1][-1], alone[-1], rest[0][-1]]))


def test_more_tokens_than_one_call_takes() -> None:
    sequences = NativeSequences(packed("qwen3", head="int8"), 2)
    ids = torch.randint(3, 200, (400,), generator=torch.Generator().manual_seed(2))
    whole = sequences.extend([(0, ids)])
    parts = [sequences.extend([(1, part)]) for part in ids.split(90)]
    assert torch.equal(whole, parts[-1])


@pytest.mark.parametrize("cache_type", ["float32", "float16", "int8"])
@pytest.mark.parametrize("isa", library.isas() if not isinstance(library.load(), str) else [])
@pytest.mark.parametrize(
    "family", ["gemma3", "qwen3_5_moe", "deepseek_v3", "gpt_oss", "apertus", "gemma4 experts", "nemotron_h"]
)
def test_every_instruction_set_gives_the_same_bits(isa: str, cache_type: str, family: str) -> None:
    model, found = packed(family), []
    for name in (isa, library.isas()[-1]):  # the last is plain C++
        plan = Plan(model.base_model, cache_type, name)
        cached = Cached(plan)
        x = model.get_input_embeddings()(IDS).detach()
        found.append(
            torch.cat([run(plan, x[:41], [(cached, 41)]), *(run(plan, e[None], [(cached, 1)]) for e in x[41:])])
        )
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("bits", [8, 16])
def test_weights_of_1_bit_give_the_bits_of_2(bits: int, family: str) -> None:
    """For one token, a few and many, which are multiplied in different ways."""
    model, found = packed(family, weights="binary", activation_bits=bits, group_size=32), []
    for weight_bits in (2, 1):
        for layer in model.modules():
            if isinstance(layer, bitnet.PackedBitLinear | PackedStack):
                layer.set_backend("cpu", weight_bits=weight_bits)
        sequences = NativeSequences(model, 1)
        found.append(torch.cat([sequences.extend([(0, part)]) for part in IDS.split([40, 5, 1, 2, 17, 5])]))
    assert torch.equal(*found)


@pytest.mark.parametrize(("cache_type", "most"), [("float16", 2e-2), ("int8", 5e-2)])
def test_narrow_caches_stay_close(cache_type: str, most: float) -> None:
    model = packed("llama")
    expected = stepwise(NativeSequences(model, 1, "float32"), IDS)
    found = stepwise(NativeSequences(model, 1, cache_type), IDS)
    error = (found - expected).abs().amax(-1) / expected.abs().max()
    assert 0 < error.median() < most / 2
    assert error.max() < 2 * most


@pytest.mark.parametrize(
    "family",
    ["bitnet", "qwen2_moe", "qwen3_5", "qwen3_next", "olmo_hybrid", "deepseek_v3", "afmoe", "gemma4", "nemotron_h"],
)
def test_threads_do_not_change_a_bit(family: str) -> None:
    model, before, found = packed(family, head="int8"), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sequences = NativeSequences(model, 2)
            found.append(torch.cat([sequences.extend([(0, IDS[:40])]), stepwise(sequences, IDS[40:])]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_threads_of_a_program_decode_on_one_model_at_once() -> None:
    model = packed("qwen2", head="int8")
    native_decoding(model)
    prompts = [IDS[None, : 10 + 7 * i] for i in range(6)]

    def text(ids: Tensor) -> list[int]:
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False}
        return model.generate(ids, **options)[0].tolist()

    alone = [text(ids) for ids in prompts]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(text, prompts * 2)) == alone * 2


def test_slots_are_cut_copied_and_freed() -> None:
    sequences = NativeSequences(packed(head="int8"), 3, context=100)
    whole = sequences.extend([(0, IDS)])
    sequences.copy(0, 1, 30)
    assert [sequences.length(slot) for slot in range(3)] == [70, 30, 0]
    assert torch.equal(sequences.extend([(1, IDS[30:])]), whole)
    sequences.truncate(0, 69)
    assert torch.equal(sequences.extend([(0, IDS[69:])]), whole)
    sequences.truncate(1, 0)
    assert sequences.length(1) == 0
    with pytest.raises(ValueError, match="a sequence of 0 tokens cannot be cut to 5"):
        sequences.truncate(2, 5)
    with pytest.raises(ValueError, match="140 tokens, but a sequence holds 100"):
        sequences.extend([(0, IDS)])
    assert sequences.length(0) == 70


@pytest.mark.parametrize("change", ["scale", "norm", "bits", "bias"])
def test_a_changed_weight_is_noticed(change: str) -> None:
    model = packed()
    sequences = NativeSequences(model, 2, "float32")
    before = sequences.extend([(0, IDS)])
    layer = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        if change == "scale":
            layer.weight_scale *= 2
        elif change == "norm":
            model.model.norm.weight *= 3
        elif change == "bits":
            layer.weight = layer.weight.flip(1)
        else:
            layer.bias += 1
    after = sequences.extend([(1, IDS)])
    assert not torch.equal(before, after)
    assert_same_but_for_roundings(after, reference(model)[-1:])


@pytest.mark.parametrize("change", ["speed", "convolution", "gated norm"])
def test_a_changed_recurrence_is_noticed(change: str) -> None:
    model = packed("qwen3_5")
    sequences = NativeSequences(model, 2, "float32")
    before = sequences.extend([(0, IDS)])
    rule = model.model.layers[0].linear_attn
    with torch.no_grad():
        changed = {"speed": rule.A_log, "convolution": rule.conv1d.weight, "gated norm": rule.norm.weight}[change]
        changed *= -1
    after = sequences.extend([(1, IDS)])
    assert not torch.equal(before, after)
    assert_same_but_for_roundings(after, reference(model)[-1:])


@pytest.mark.parametrize("change", ["scale", "router", "correction"])
def test_a_changed_mixture_is_noticed(change: str) -> None:
    model = packed("minimax_m2")
    sequences = NativeSequences(model, 2, "float32")
    before = sequences.extend([(0, IDS)])
    mlp = model.model.layers[1].mlp
    with torch.no_grad():
        if change == "scale":
            mlp.experts.packed_down_proj.weight_scale *= 2
        elif change == "router":
            mlp.gate.weight *= -1
        else:
            mlp.e_score_correction_bias[1] += 1
    after = sequences.extend([(1, IDS)])
    assert not torch.equal(before, after)
    assert_same_but_for_roundings(after, reference(model)[-1:])


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("gpt_oss", "model.layers.1.self_attn.sinks"),
        ("gpt_oss", "model.layers.1.mlp.router.bias"),
        ("apertus", "model.layers.1.mlp.act_fn.alpha_n"),
        ("gpt2", "transformer.wpe.weight"),
        ("opt", "model.decoder.embed_positions.weight"),
        ("deepseek_v3", "model.layers.1.self_attn.kv_a_layernorm.weight"),
        ("deepseek_v3", "model.layers.1.self_attn.q_a_layernorm.weight"),
        ("olmo_hybrid", "model.layers.0.linear_attn.o_norm.weight"),
        ("hyperclovax", "model.layers.0.post_norm1.weight"),
        ("nemotron_h", "model.layers.1.mixer.D"),
        ("nemotron_h", "model.layers.1.mixer.dt_bias"),
        ("nemotron_h", "model.layers.1.mixer.norm.weight"),
        ("bamba", "model.layers.0.mamba.conv1d.bias"),
        ("axk1", "model.layers.1.mlp.post_mlp_layernorm.weight"),
        ("gemma4", "model.layers.1.post_per_layer_input_norm.weight"),
        ("gemma4", "model.embed_tokens_per_layer.weight"),
        ("gemma4 experts", "model.layers.1.router.scale"),
        ("gemma4 experts", "model.layers.1.router.per_expert_scale"),
        ("gemma4 experts", "model.layers.1.post_feedforward_layernorm_1.weight"),
    ],
)
def test_a_changed_parameter_is_noticed(family: str, name: str) -> None:
    """And takes part: of the parameters that few families have."""
    model = packed(family)
    sequences = NativeSequences(model, 2, "float32")
    before = sequences.extend([(0, IDS)])
    with torch.no_grad():
        model.get_parameter(name).mul_(-3).sub_(1)
    after = stepwise(sequences, IDS, slot=1)
    assert not torch.equal(before, after[-1:])
    assert_same_but_for_roundings(after, reference(model))


@pytest.mark.parametrize("why", ["head_dim", "float layer", "kind", "hook", "activation", "rope", "float experts"])
def test_models_that_are_not_computed_say_why(why: str) -> None:
    from tiny import llama

    model, words = packed(), "multiple of 16"
    if why == "head_dim":
        model = llama()
        bitnet.replace_linear(model)
        bitnet.pack(model)
    elif why == "float layer":
        model.model.layers[2].mlp.down_proj.to_linear(torch.float32)
        words = "layers.2.mlp.down_proj is a Linear, not a packed layer"
    elif why == "kind":
        model, words = _bloom(), "BloomModel is not one of"
    elif why == "hook":
        plan = Plan(model.base_model)
        model.model.layers[0].register_forward_hook(lambda *_: None)
        assert not plan.current()
        words = "layers.0 has hooks"
    elif why == "activation":
        model.config.hidden_act, words = "tanh", "'tanh' in its MLPs"
    elif why == "float experts":
        model, words = (
            packed("mixtral", skip=["experts"]),
            "layers.0.mlp.experts is a MixtralExperts, not packed experts",
        )
    else:
        model.model.rotary_emb.rope_type, words = "dynamic", "rotary positions of type dynamic"
    assert words in str(why_not(model))
    with pytest.raises(Unplanned, match=r"\w"):
        NativeSequences(model)


def _bloom() -> PreTrainedModel:
    config = AutoConfig.for_model("bloom", hidden_size=64, n_layer=2, n_head=4, vocab_size=200)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_head_that_does_more_than_its_layer_is_left_to_the_model() -> None:
    """The server computes logits itself; a model's own class may do something to them."""

    class Sharper(LlamaForCausalLM):
        def forward(self, *args: object, **kwargs: object) -> object:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model = packed()
    NativeSequences(model)
    model.__class__ = Sharper
    with pytest.raises(Unplanned, match="the logits of a Sharper are not those of its output layer"):
        NativeSequences(model)


# generate()


class Calls:
    """How many forwards ran natively, and how many did not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.native = self.other = 0
        original = NativeForward.__call__

        def counted(this: NativeForward, *args: object, **kwargs: object) -> object:
            output = original(this, *args, **kwargs)
            cache = getattr(output, "cache", None) or getattr(output, "past_key_values", None)
            native = cache is not None and bool(cache.layers) and type(cache.layers[0]).__name__ == "_NativeLayer"
            self.native, self.other = self.native + native, self.other + (not native)
            return output

        monkeypatch.setattr(NativeForward, "__call__", counted)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


def batch() -> dict[str, Tensor]:
    ids = torch.stack([IDS[:30], IDS[20:50], IDS[40:70]])
    mask = torch.ones_like(ids)
    mask[1, :7], mask[2, :20] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_same_texts(model: PreTrainedModel, plain: Tensor, found: Tensor, masks: Tensor) -> None:
    for a, b, mask in zip(plain, found, masks, strict=True):
        if not torch.equal(a, b):
            at = int((a != b).nonzero()[0])
            scores = reference(model, a[int(mask.argmax()) : at])[-1]
            assert (scores[a[at]] - scores[b[at]]).abs() < 0.02 * scores.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_gives_the_same_tokens(calls: Calls, family: str) -> None:
    """With left padding. Where a text differs, it does so at a tie: the two tokens' scores are as close as
    roundings."""
    model = packed(family)
    plain = model.generate(**batch(), max_new_tokens=30, do_sample=False)
    native_decoding(model, "float32")
    found = model.generate(**batch(), max_new_tokens=30, do_sample=False)
    assert (calls.native, calls.other) == (30, 0)
    assert_same_texts(model, plain, found, batch()["attention_mask"])


@pytest.mark.parametrize("family", SEEING)
def test_models_that_also_see_compute_text_natively(calls: Calls, family: str) -> None:
    """Alone, and in batches; what follows an image is transformers' own."""
    model = packed(f"{family} seeing")
    plain = [model.generate(**each, max_new_tokens=30, do_sample=False) for each in (batch(), image_inputs(family))]
    found = stepwise(NativeSequences(model, 1, "float32"), IDS)
    assert_same_but_for_roundings(found, reference(model))
    native_decoding(model, "float32")
    texts = model.generate(**batch(), max_new_tokens=30, do_sample=False)
    assert (calls.native, calls.other) == (30, 0)
    assert_same_texts(model, plain[0], texts, batch()["attention_mask"])
    seen = model.generate(**image_inputs(family), max_new_tokens=30, do_sample=False)
    assert (calls.native, calls.other) == (30, 30)
    assert torch.equal(seen, plain[1])
    native_decoding(model, None)
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_tied_head_of_gemma_4_can_be_packed_and_images_still_be_seen(calls: Calls) -> None:
    model = packed("gemma4 seeing", head="int8")
    inputs = batch(), image_inputs("gemma4")
    plain = [model.generate(**each, max_new_tokens=20, do_sample=False) for each in inputs]
    native_decoding(model, "float32")
    found = [model.generate(**each, max_new_tokens=20, do_sample=False) for each in inputs]
    assert (calls.native, calls.other) == (20, 20)
    assert_same_texts(model, plain[0], found[0], batch()["attention_mask"])
    assert torch.equal(plain[1], found[1])
    with pytest.raises(RuntimeError, match="without providing `input_ids`"):
        model(inputs_embeds=model.get_input_embeddings()(IDS[None, :5]))
    with pytest.raises(ValueError, match="the output head must stay float: Gemma4Model uses"):
        packed("gemma4 seeing", head="int4")


@pytest.mark.parametrize("family", ["gemma3", "qwen3_5"])
def test_beams_and_samples_are_as_good(calls: Calls, family: str) -> None:
    model = packed(family)
    options = {"num_beams": 3, "max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True}
    plain = model.generate(**batch(), do_sample=False, **options).sequences_scores
    native_decoding(model, "float32")
    found = model.generate(**batch(), do_sample=False, **options).sequences_scores
    torch.testing.assert_close(found, plain, rtol=0.01, atol=0)
    texts = model.generate(**batch(), do_sample=True, top_k=10, max_new_tokens=20, num_return_sequences=2)
    assert calls.other == 0
    assert len(set(map(tuple, texts.tolist()))) == 6
    for text, mask in zip(texts, batch()["attention_mask"].repeat_interleave(2, 0), strict=True):
        scores = reference(model, text[int(mask.argmax()) :])[:-1][-20:]
        allowed = scores.topk(10).values[:, -1] - 0.02 * scores.abs().max()
        assert bool((scores.gather(1, text[-20:, None])[:, 0] >= allowed).all())


def test_the_loop_of_a_user_runs_natively(calls: Calls) -> None:
    model = packed()
    native_decoding(model, "float32")
    cache = DynamicCache(config=model.config)
    name = "cache" if _new_names() else "past_key_values"
    with torch.no_grad():
        first = model(IDS[None, :40], **{name: cache}).logits
        rest = [model(IDS[None, i : i + 1], **{name: cache}).logits for i in range(40, 70)]
    assert (calls.native, calls.other) == (31, 0)
    assert cache.get_seq_length() == 70
    assert_same_but_for_roundings(torch.cat([first, *rest], dim=1)[0], reference(model))


@pytest.mark.parametrize(
    "family", ["llama", "gemma3", "qwen3_5", "lfm2", "gpt2", "deepseek_v2", "deepseek_v3", "gemma4", "nemotron_h"]
)
def test_a_cache_is_handed_to_transformers_and_goes_on(calls: Calls, family: str) -> None:
    """Attentions are asked for in the middle: transformers' own forward takes over with the same keys and values."""
    for cache_type in ("float32", "float16", "int8"):
        model = packed(family)
        model.set_attn_implementation("eager")
        native_decoding(model, cache_type)
        inputs = batch()
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            key = "cache" if _new_names() else "past_key_values"
            model(**inputs, **{key: cache})
            new = torch.tensor([[5], [6], [7]])
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
            positions = mask.cumsum(1)[:, -1:] - 1
            found = model(new, attention_mask=mask, position_ids=positions, output_attentions=True, **{key: cache})
            assert found.attentions is not None
            assert type(cache.layers[0]).__name__ != "_NativeLayer"
            mask = torch.cat([mask, torch.ones_like(new)], 1)
            after = model(new + 3, attention_mask=mask, position_ids=positions + 1, **{key: cache})
            ids = torch.cat([inputs["input_ids"], new, new + 3], 1)
            for row in range(3):
                expected = reference(model, ids[row][mask[row].bool()])[-2:]
                logits = torch.cat([found.logits[row], after.logits[row]])
                assert (logits - expected).abs().max() < (0.2 if cache_type == "int8" else 0.05) * expected.abs().max()


def _new_names() -> bool:
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return "cache" in BaseModelOutputWithPast.__dataclass_fields__


@pytest.mark.parametrize("what", ["no cache", "gradients", "hook", "adapter", "static cache", "routers"])
def test_other_calls_stay_transformers_own(calls: Calls, what: str) -> None:
    model = packed("mixtral" if what == "routers" else "llama")
    native_decoding(model)
    inputs = {"input_ids": IDS[None], "attention_mask": torch.ones(1, 70, dtype=torch.long)}
    if what == "no cache":
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits[0], reference(model))
    elif what == "gradients":
        model.get_input_embeddings().requires_grad_(True)
        model(**inputs).logits.sum().backward()
        assert model.get_input_embeddings().weight.grad.abs().sum() > 0
    elif what == "routers":  # asked for by an argument, or by the config
        with torch.no_grad():
            assert model(**inputs, output_router_logits=True, use_cache=True).router_logits is not None
        model.config.output_router_logits = True
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
    elif what == "static cache":
        model.generate(**inputs, max_new_tokens=3, do_sample=False, cache_implementation="static")
    else:
        layer, seen = model.model.layers[0].self_attn, []
        if what == "hook":
            layer.q_proj.register_forward_hook(lambda *_: seen.append(1))
        else:
            layer.q_proj = nn.Sequential(layer.q_proj)
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert len(seen) == (3 if what == "hook" else 0)
    assert calls.native == 0


def test_prompts_are_cut_for_an_assistant_and_streamed(calls: Calls) -> None:
    model, draft = packed(), packed("llama", per_row=True)
    for each in (model, draft):
        native_decoding(each, "float32")
    options = {"attention_mask": torch.ones(1, 70, dtype=torch.long), "max_new_tokens": 30, "do_sample": False}
    plain = model.generate(IDS[None], **options)
    assert torch.equal(model.generate(IDS[None], assistant_model=draft, **options), plain)
    assert calls.other == 0

    class Words:
        def decode(self, ids: list[int], **kwargs: object) -> str:
            return " ".join(map(str, ids))

    streamer = TextIteratorStreamer(Words(), skip_prompt=True)
    model.generate(IDS[None], streamer=streamer, **options)
    assert "".join(streamer).split() == [str(int(token)) for token in plain[0, 70:]]


def test_a_cache_begun_once_serves_many(calls: Calls) -> None:
    model = packed()
    native_decoding(model)
    key = "cache" if _new_names() else "past_key_values"
    prefix = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[None, :40], **{key: prefix})
    plain = model.generate(
        IDS[None, :50], attention_mask=torch.ones(1, 50, dtype=torch.long), max_new_tokens=20, do_sample=False
    )
    for _ in range(2):
        again = model.generate(
            IDS[None, :50],
            attention_mask=torch.ones(1, 50, dtype=torch.long),
            max_new_tokens=20,
            do_sample=False,
            **{key: copy.deepcopy(prefix)},
        )
        assert torch.equal(again, plain)
    assert calls.other == 0


def test_copies_and_pickles_run_on_their_own_weights(calls: Calls) -> None:
    model = packed()
    native_decoding(model)
    options = {"attention_mask": torch.ones(1, 70, dtype=torch.long), "max_new_tokens": 20, "do_sample": False}
    plain = model.generate(IDS[None], **options)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.generate(IDS[None], **options), plain)
        with torch.no_grad():
            other.model.norm.weight.neg_()
        assert not torch.equal(other.generate(IDS[None], **options), plain)
    assert torch.equal(model.generate(IDS[None], **options), plain)
    assert calls.other == 0
    native_decoding(model, None)
    calls.native = 0
    model.generate(IDS[None], **options)
    assert calls.native == 0


def test_a_loaded_checkpoint_decodes_natively(calls: Calls, tmp_path: Path) -> None:
    model = packed()
    options = {"attention_mask": torch.ones(1, 70, dtype=torch.long), "max_new_tokens": 20, "do_sample": False}
    bitnet.native_decoding(model)
    plain = model.generate(IDS[None], **options)
    bitnet.save(model, tmp_path)
    for loaded in (bitnet.load(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        calls.native = calls.other = 0
        assert torch.equal(loaded.generate(IDS[None], **options), plain)
        assert (calls.native, calls.other) == (20, 0)
    assert bitnet.load(tmp_path).state_dict().keys() == model.state_dict().keys()


def test_asking_for_what_the_step_does_not_compute_raises() -> None:
    with pytest.raises(ValueError, match="native_decoding: BloomModel is not one of the models"):
        bitnet.native_decoding(_bloom())
    with pytest.raises(ValueError, match="cache_type must be one of float32, float16, int8, got 'bf16'"):
        bitnet.native_decoding(packed(), "bf16")
