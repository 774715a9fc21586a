"""Single tokens in rooms, which GPUs capture as CUDA graphs: the same as transformers computes, or transformers does.

Everywhere the rooms are tested, steps simply run; on a GPU (python -m pytest -m gpu) steps are graphs.
"""

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decode_models import FAMILIES, SIZES
from decode_models import packed as packed_family
from tiny import randomize
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

import bitnet
from bitnet.decode import rooms as rooms_module
from bitnet.decode.attach import CACHE, NativeForward, attach_decoding, why_not
from bitnet.decode.captured import TRIES, RoomSequences
from bitnet.decode.eager import EagerSequences
from bitnet.decode.rooms import ROOM, RoomLayer, Rooms, Unfit, Windows
from bitnet.serving.model import sequences_of

HAS_GPU = torch.cuda.is_available()
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])]
IDS = torch.randint(3, 200, (2, 60), generator=torch.Generator().manual_seed(1))
OTHERS: dict[str, dict[str, Any]] = {  # that the native step on CPUs does not compute
    "mpt": {"d_model": 64, "n_layers": 3, "n_heads": 4, "max_seq_len": 512},
    "gptj": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "rotary_dim": 8},
}
ON_GPUS = ("llama", "mistral", "qwen2", "gemma2", "gemma3", "cohere2", "phi", "mixtral", "qwen3_5", "lfm2_moe")
ON_GPUS += ("gpt2", "opt", "gpt_oss", "apertus", "deepseek_v3", "gemma4", "nemotron_h")
STATES = {"qwen3_5", "qwen3_5_moe", "qwen3_next", "olmo_hybrid", "lfm2", "lfm2_moe", "nemotron_h", "bamba"}
STATES |= {"granitemoehybrid", "granitemoehybrid experts"}


def packed(kind: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    if kind in FAMILIES:
        model = packed_family(kind, **options)
        bitnet.native_decoding(model, None)
    else:
        torch.manual_seed(0)
        sizes = SIZES | OTHERS[kind] | {"pad_token_id": 0}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.float32).eval()
        randomize(model)
        bitnet.replace_linear(model)
        bitnet.pack(model)
    return model.to(device, dtype)


@pytest.fixture(autouse=True)
def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NativeForward, "_captures", lambda self, inputs: True)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each step."""
    rows: list[int] = []
    original = Rooms.step

    def counted(self: Rooms, count: int | None = None) -> Tensor:
        rows.append(self.rows if count is None else count)
        return original(self, count)

    monkeypatch.setattr(Rooms, "step", counted)
    return rows


@torch.no_grad()
def one_by_one(model: PreTrainedModel, prompt: int = 30) -> tuple[Tensor, DynamicCache]:
    """Logits of IDS, whose second row begins with padding, and the cache."""
    cache, mask = DynamicCache(config=model.config), torch.ones_like(IDS)
    mask[1, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    device, logits = model.device, []
    for a, b in [(0, prompt), *((i, i + 1) for i in range(prompt, IDS.shape[1]))]:
        inputs = {"input_ids": IDS[:, a:b], "attention_mask": mask[:, :b], "position_ids": positions[:, a:b]}
        output = model(**{k: v.to(device) for k, v in inputs.items()}, use_cache=True, **{CACHE: cache})
        logits.append(output.logits.float().cpu())
    return torch.cat(logits, 1)[:, 7:], cache


def assert_same_but_for_roundings(found: Tensor, expected: Tensor) -> None:
    """Sums in another order make some activations round to another code."""
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.quantile(0.1) < 1e-5
    assert error.quantile(0.9) < 0.05


@pytest.mark.parametrize(
    ("kind", "device"),
    [(kind, "cpu") for kind in [*ON_GPUS, *OTHERS]]
    + [pytest.param(kind, "cpu", marks=pytest.mark.slow) for kind in FAMILIES if kind not in ON_GPUS]
    + [pytest.param(kind, "cuda", marks=[pytest.mark.gpu, on_gpu]) for kind in [*ON_GPUS, *OTHERS]],
)
def test_single_tokens_are_those_of_transformers(kind: str, device: str, steps: list[int]) -> None:
    model = packed(kind, device)
    expected, _ = one_by_one(model)
    assert not steps
    attach_decoding(model)
    found, cache = one_by_one(model)
    assert_same_but_for_roundings(found, expected)
    assert why_not_here(model) is None
    assert steps == [2] * 30
    rooms = next(layer.rooms for layer in cache.layers if isinstance(layer, RoomLayer))
    assert rooms.are_of(cache.layers, IDS.shape[1])
    assert bool(rooms.recurrent) == (kind in STATES)


def why_not_here(model: PreTrainedModel) -> str | None:
    forward = vars(model.base_model)["forward"]
    return getattr(forward, "_native", forward)._captured.why()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("kind", "how"),
    [(kind, how) for kind in ("llama", "gemma3") for how in ("greedy", "beams", "assisted", "samples")]
    + [("qwen3_5", "greedy"), ("qwen3_5", "beams")],
)
def test_generate_does_all_it_did(kind: str, how: str, device: str, steps: list[int]) -> None:
    model = packed(kind, device)
    inputs: dict[str, Any] = {"input_ids": IDS.to(device), "attention_mask": torch.ones_like(IDS).to(device)}
    inputs |= {"max_new_tokens": 40, "do_sample": False}
    if how == "beams":
        inputs |= {"num_beams": 3, "num_return_sequences": 2}
    elif how == "samples":
        inputs |= {"do_sample": True, "num_return_sequences": 2, "top_k": 5}
    elif how == "assisted":
        ids = IDS[:1].repeat(1, 2).to(device)
        inputs |= {"prompt_lookup_num_tokens": 3, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    torch.manual_seed(0)
    plain = model.generate(**inputs)
    attach_decoding(model)
    torch.manual_seed(0)
    found = model.generate(**inputs)
    assert bool(steps) == (how != "assisted")  # which asks for some tokens at once
    if device == "cpu":
        assert torch.equal(found, plain)
        return
    for a, b in zip(plain, found, strict=True):  # where they differ, it is at a tie
        if how in ("greedy", "assisted") and not torch.equal(a, b):
            at = int((a != b).nonzero()[0])
            scores = one_row(model, a[:at])
            assert (scores[a[at]] - scores[b[at]]).abs() < 0.02 * scores.abs().max()


@torch.no_grad()
def one_row(model: PreTrainedModel, ids: Tensor) -> Tensor:
    logits: Tensor = model(ids[None], use_cache=False).logits[0, -1].float()
    return logits


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_a_cache_in_rooms_is_one_of_transformers(device: str) -> None:
    """It is copied, pickled, cropped, reordered, repeated, chosen from, gone on by many tokens, and emptied."""
    model = packed("llama", device)
    ids = IDS.to(device)

    def logits(new: Tensor, cache: DynamicCache) -> Tensor:
        mask = torch.ones(len(new), cache.get_seq_length() + new.shape[1], dtype=torch.long, device=device)
        return model(
            new, attention_mask=mask, **{CACHE: cache}, position_ids=mask.cumsum(1)[:, -new.shape[1] :] - 1
        ).logits

    def begun() -> DynamicCache:
        cache = DynamicCache(config=model.config)
        for a, b in ((0, 20), (20, 21), (21, 22), (22, 23)):
            logits(ids[:, a:b], cache)
        return cache

    changes: dict[str, Callable[[DynamicCache], Any]] = {
        "copied": copy.deepcopy,
        "pickled": lambda cache: pickle.loads(pickle.dumps(cache)),
        "cropped": lambda cache: cache.crop(-3),
        "reordered": lambda cache: cache.reorder_cache(torch.tensor([1, 1], device=device)),
        "repeated": lambda cache: cache.batch_repeat_interleave(2),
        "chosen": lambda cache: cache.batch_select_indices(torch.tensor([1], device=device)),
        "gone on": lambda cache: logits(ids[:, 23:26], cache),
        "emptied": lambda cache: cache.reset(),
    }
    for attached in (False, True):
        found = []
        if attached:
            attach_decoding(model)
        for name, change in changes.items():
            cache = begun()
            assert isinstance(cache.layers[0], RoomLayer) == attached
            changed = change(cache)
            cache = changed if isinstance(changed, DynamicCache) else cache
            if name == "emptied" and not attached:
                cache = DynamicCache(config=model.config)  # transformers 5.17 makes zeros of it
            rows = {"repeated": 4, "chosen": 1}.get(name, 2)
            new = ids[:1, 30:36].expand(rows, 6)
            first = logits(new[:, :5], cache) if name == "emptied" else logits(new[:, :1], cache)
            found.append(torch.cat([first[:, -1], logits(new[:, 5:], cache)[:, 0]]).cpu())
        if not attached:
            expected = found
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


@torch.no_grad()
def test_caches_that_live_at_once_have_rooms_of_their_own_and_others_inherit() -> None:
    model = packed("llama")
    attach_decoding(model)
    first, a = one_by_one(model)
    second, b = one_by_one(model)
    assert a.layers[0].rooms is not b.layers[0].rooms
    rooms = a.layers[0].rooms
    kept = copy.copy(a)  # which has the same layers
    del a
    third, c = one_by_one(model)
    assert c.layers[0].rooms is not rooms
    del kept
    fourth, d = one_by_one(model)
    assert d.layers[0].rooms is rooms
    assert torch.equal(second, third)
    assert torch.equal(second, fourth)
    assert_same_but_for_roundings(second, first)  # of which one token was transformers'


@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_rooms_grow(device: str, steps: list[int]) -> None:
    model = packed("gemma3", device)
    ids = torch.randint(3, 200, (1, ROOM - 5), generator=torch.Generator().manual_seed(0)).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 20, "do_sample": False}
    plain = model.generate(**inputs, output_logits=True, return_dict_in_generate=True)
    attach_decoding(model)
    found = model.generate(**inputs, output_logits=True, return_dict_in_generate=True)
    assert len(steps) == 19
    same = int((plain.sequences == found.sequences).long().cumprod(1).sum()) - ids.shape[1]
    assert same == 20 if device == "cpu" else same > 0
    for one, other in zip(plain.logits[:same], found.logits[:same], strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "norms"), [("llama", 9), ("qwen3", 17), ("gemma3", 0), ("gpt2", 0)])
@torch.no_grad()
def test_norms_in_rooms_are_one_kernel(
    kind: str, norms: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those that multiply by 1 + weight, which would be rounded, and LayerNorms, which are one anyway."""
    model, calls = packed(kind, dtype=dtype), []
    plain, _ = one_by_one(model)
    exact, _ = one_by_one(nn.Module.float(copy.deepcopy(model)))
    original = nn.functional.rms_norm
    monkeypatch.setattr(nn.functional, "rms_norm", lambda *args: calls.append(1) or original(*args))
    attach_decoding(model)
    found, _ = one_by_one(model)
    assert len(calls) == 30 * norms
    if dtype == torch.float32:
        assert_same_but_for_roundings(found, plain)
    else:  # as far from float32's as transformers is
        assert (found - exact).abs().mean() < 1.2 * (plain - exact).abs().mean()
    calls.clear()
    model(IDS)
    assert not calls
    bitnet.native_decoding(model, None)
    assert not any("forward" in vars(module) for module in model.modules())


def unmasked(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Windows.masks
    monkeypatch.setattr(Windows, "masks", lambda self, columns, *rest: original(self, columns + 1, *rest))


def misplaced(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Rooms.give

    def give(self: Rooms, **inputs: Tensor) -> None:
        original(self, **inputs | {"position_ids": inputs["position_ids"] + 7})

    monkeypatch.setattr(Rooms, "give", give)


def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Rooms, rows: int | None = None) -> Tensor:
        raise TypeError("it takes no such mask")

    monkeypatch.setattr(Rooms, "step", step)


@pytest.mark.parametrize(
    ("broken", "why"), [(unmasked, " % different"), (misplaced, " % different"), (failing, "it takes no such mask")]
)
@torch.no_grad()
def test_a_step_that_computes_something_else_is_not_taken(
    broken: Callable, why: str, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    model = packed("qwen3")
    expected, _ = one_by_one(model)
    broken(monkeypatch)
    attach_decoding(model)
    found, cache = one_by_one(model)
    assert torch.equal(found, expected)
    assert why in str(why_not_here(model))
    assert not any(isinstance(layer, RoomLayer) for layer in cache.layers)
    assert len(steps) == (0 if broken is failing else TRIES)
    with pytest.raises(Unfit, match=why):
        RoomSequences(model, CACHE, 2)


@pytest.mark.parametrize("proven", [False, True])
@torch.no_grad()
def test_without_memory_for_rooms_transformers_goes_on(proven: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed("llama")
    expected, _ = one_by_one(model)
    attach_decoding(model)
    if proven:
        one_by_one(model)

    def reserve(self: Rooms, columns: int) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate a lot. And more.")

    monkeypatch.setattr(Rooms, "reserve", reserve)
    found, cache = one_by_one(model)
    assert torch.equal(found, expected)
    assert why_not_here(model) == "CUDA out of memory"
    assert not any(isinstance(layer, RoomLayer) for layer in cache.layers)
    with pytest.raises(Unfit, match="OutOfMemoryError: CUDA out of memory"):
        RoomSequences(model, CACHE, 2)


@pytest.mark.parametrize(
    "what",
    [
        "gradients",
        "gradients afterwards",
        "hook",
        "adapter",
        "attentions",
        "static cache",
        "no mask",
        "4D mask",
    ],
)
def test_other_calls_stay_transformers_own(what: str, steps: list[int]) -> None:
    model = packed("llama")
    attach_decoding(model)
    inputs: dict[str, Any] = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    inputs |= {"max_new_tokens": 4, "do_sample": False}
    cache, seen = DynamicCache(config=model.config), []
    if what == "gradients":
        model.get_input_embeddings().requires_grad_(True)
        scores = [model(new, **{CACHE: cache}).logits for new in (IDS[:, :5], IDS[:, 5:6])]
        torch.cat(scores, 1).sum().backward()
    elif what == "hook":
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: seen.append(1))
        model.generate(**inputs)
        assert len(seen) == 4
        assert why_not_here(model) == "it has hooks"
    elif what == "adapter":
        peft = pytest.importorskip("peft")
        layers = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(model, layers).generate(**inputs)
        assert why_not_here(model) == "it has adapters, which may be switched"
    elif what == "attentions":
        with torch.no_grad():
            model.set_attn_implementation("eager")
            model(IDS[:, :5], **{CACHE: cache})
            assert model(IDS[:, 5:6], output_attentions=True, **{CACHE: cache}).attentions is not None
    elif what == "static cache":
        model.generate(**inputs, cache_implementation="static", disable_compile=True)
    elif what == "gradients afterwards":
        for grad, new in ((False, IDS[:, :5]), (False, IDS[:, 5:6]), (True, IDS[:, 6:7]), (False, IDS[:, 7:8])):
            model.get_input_embeddings().requires_grad_(grad)
            with torch.set_grad_enabled(grad):
                assert model(new, **{CACHE: cache}).logits.requires_grad == grad
        assert isinstance(cache.layers[0], RoomLayer)
        assert not cache.layers[0].keys.requires_grad
    else:
        with torch.no_grad():
            model(IDS[:, :5], **{CACHE: cache})
            if what == "4D mask":
                model(IDS[:, 5:6], attention_mask=torch.ones(2, 1, 1, 6, dtype=torch.bool), **{CACHE: cache})
            else:  # positions are then those of the columns
                model(IDS[:, 5:6], **{CACHE: cache})
    assert len(steps) == {"no mask": 1, "gradients afterwards": 2}.get(what, 0)


@torch.no_grad()
def test_another_model_is_captured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph reads is where it was, so a tensor in another's place needs another graph."""
    model = packed("llama")
    attach_decoding(model)
    _, cache = one_by_one(model)
    rooms, ids = cache.layers[0].rooms, IDS[:, :1]
    layer = model.model.layers[1].mlp.down_proj

    sequences = RoomSequences(model, CACHE, 2)
    sequences.extend([(0, ids[0])])

    def goes_on() -> bool:
        both = rooms, sequences._rooms
        for each in both:
            each._graphs[9] = ()
        model(ids, **{CACHE: cache})
        sequences.extend([(0, ids[0])])
        kept = [9 in each._graphs for each in both]
        assert kept[0] == kept[1]
        return kept[0]

    assert goes_on()
    for change in (
        lambda: layer.weight_scale.mul_(1.5),
        lambda: setattr(layer, "weight_scale", layer.weight_scale.clone()),
        lambda: setattr(model.model.norm, "weight", nn.Parameter(torch.ones(64))),
        lambda: setattr(model.model.layers[0], "mlp", copy.deepcopy(model.model.layers[0].mlp)),
    ):
        change()
        assert not goes_on()
        assert goes_on()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "mixtral", "qwen3_5", "lfm2"])
def test_sequences_in_rooms_are_those_of_the_model(kind: str, device: str) -> None:
    model = packed(kind, device)
    eager, rooms = EagerSequences(model, 5), RoomSequences(model, CACHE, 5)
    assert rooms.is_captured == (device == "cuda")
    assert rooms.cuts != rooms.marks == (kind in STATES)
    assert (rooms.context, rooms.vocabulary) == (512, 200)
    ids = IDS.flatten()
    found, expected = [], []

    def both(*work: tuple[int, Tensor]) -> None:
        found.append(rooms.extend(work))
        expected.append(eager.extend(work))

    both((0, ids[:20]), (3, ids[5:30]))
    if rooms.marks:
        rooms.mark(0)
    both((3, ids[30:31]), (0, ids[20:21]), (1, ids[:7]))
    for sequences in (eager, rooms):
        sequences.copy(0, 4, 21)
    for token in range(40, 44):
        both((4, ids[token : token + 1]), (1, ids[:1]), (0, ids[50:53]))
    both((2, ids[:1]))
    both((2, ids[1:2]), (3, ids[31:32]))
    assert [rooms.length(slot) for slot in range(5)] == [33, 11, 2, 27, 25]
    assert_same_but_for_roundings(torch.cat(found), torch.cat(expected))
    for slot in (0, 4):  # whose first tokens are the same
        rooms.truncate(slot, 20)
        again = rooms.extend([(slot, ids[20:21])])
        assert (again - expected[1][1]).norm() < 0.02 * again.norm()
    rooms.copy(0, 3, 20)
    rooms.copy(3, 1, 20)
    again = rooms.extend([(1, ids[20:21])])
    assert (again - expected[1][1]).norm() < 0.02 * again.norm()
    for wrong in (lambda: rooms.truncate(0, 27), lambda: rooms.copy(0, 1, 27)):
        with pytest.raises(ValueError, match="a sequence of 21 tokens cannot be cut to 27"):
            wrong()
    if rooms.marks:
        for wrong in (lambda: rooms.truncate(0, 19), lambda: rooms.copy(0, 1, 19)):
            with pytest.raises(ValueError, match="of a recurrent model's 21 tokens, the first 19 cannot be had alone"):
                wrong()
        rooms.truncate(0, 0)
        rooms.copy(2, 1, 2)
        for slot in (0, 1):  # which have forgotten what was marked
            rooms.extend([(slot, ids[:24])])
            with pytest.raises(ValueError, match="the first 20 cannot be had alone"):
                rooms.truncate(slot, 20)
    with pytest.raises(ValueError, match="a sequence holds 512"):
        rooms.extend([(0, ids.repeat(20))])
    long = ids.repeat(4)[:400]  # beyond the room there is
    for sequences in (eager, rooms):
        sequences.truncate(2, 0)
    assert (rooms.extend([(2, long)]) - eager.extend([(2, long)])).norm() < 0.02 * again.norm()


@pytest.mark.gpu
@on_gpu
def test_the_server_says_what_runs() -> None:
    for kind, options, name in (
        ("llama", {}, "CUDA graph"),
        ("mixtral", {}, "CUDA graph"),
        ("mixtral", {"group_size": 32}, "CUDA graph"),
        ("mixtral", {"activation_bits": None}, "CUDA graph"),
        ("mixtral", {"activation_bits": 4}, "transformers, in one step for all"),
        ("qwen3_5", {}, "CUDA graph"),
    ):
        assert sequences_of(packed(kind, "cuda", **options), 3)[1] == name
    model = packed("mixtral", "cuda", activation_bits=4)
    attach_decoding(model)
    one_by_one(model)
    assert why_not_here(model) == "its forward waits for the GPU"


@pytest.mark.gpu
@on_gpu
def test_native_decoding_is_asked_for_on_a_gpu() -> None:
    model = packed("llama", "cuda")
    with pytest.raises(ValueError, match="cache_type='int8' is for CPUs"):
        bitnet.native_decoding(model, "int8")
    bitnet.native_decoding(model)
    assert isinstance(vars(model.model)["forward"], NativeForward)
    bitnet.native_decoding(model, None)
    assert "forward" not in vars(model.model)
    assert why_not(model) is None
    model.model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="it has hooks"):
        bitnet.native_decoding(model)


@torch.no_grad()
def test_a_rehearsal_leaves_states_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph is rehearsed and captured before it runs; keys are written to the same place each time, states change."""
    monkeypatch.setattr(rooms_module, "_synchronizing_raises", contextlib.nullcontext)
    model = packed("qwen3_5")
    attach_decoding(model)
    _, cache = one_by_one(model)
    rooms = next(layer.rooms for layer in cache.layers if isinstance(layer, RoomLayer))
    before = [state.clone() for state in rooms.states]
    assert len(before) == 2 * 2
    again = rooms.step().clone()
    assert not any(map(torch.equal, before, rooms.states))
    for was, state in zip(before, rooms.states, strict=True):
        state.copy_(was)
    rooms._rehearse(2)
    assert all(map(torch.equal, before, rooms.states))
    assert torch.equal(rooms.step(), again)
