"""Fused experts and Conv1D against a loop over matrices in numpy, and what only they can get wrong."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from machine import said
from oracle import DTYPES, grid
from safetensors.torch import load_file, save_file
from tiny import IDS, gpt2, gpt_oss, mixtral
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig, MixtralConfig
from transformers.integrations import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import bitnet
from bitnet.convert.hub import values
from bitnet.experts import BitExperts, PackedExperts, PackedStack, stacks_of
from bitnet.kernels import backends
from bitnet.linear import BitConv1D
from bitnet.packing import pack_layer, to_packed
from bitnet.quantize import QuantSpec

BACKENDS = [row.name for row in backends.backends("cpu") if row.ready and "binary" not in row.name]
E, H, INNER = 4, 24, 10  # 2 * INNER is no multiple of 8, H / 4 = 6 packed rows


@use_experts_implementation(has_gate=False)
class Ungated(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts, self.act_fn = E, nn.ReLU()
        self.up_proj = nn.Parameter(torch.empty(E, INNER, H))
        self.down_proj = nn.Parameter(torch.empty(E, H, INNER))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        raise NotImplementedError


class Kind:
    """One family: how its module is built, and its gate, written a second time."""

    def __init__(self, build: Callable[[], nn.Module], gate: Callable[[Tensor], Tensor]) -> None:
        self.build, self.gate = build, gate

    def experts(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        module = self.build()
        for parameter in module.parameters():  # on a grid, where means do not depend on the order of a sum
            parameter.data = grid(*parameter.shape).to(dtype)
        return module


def clamped_swiglu(x: Tensor) -> Tensor:
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


SIZES: dict[str, Any] = {"num_local_experts": E, "hidden_size": H, "intermediate_size": INNER}
KINDS = {
    "mixtral": Kind(
        lambda: MixtralExperts(MixtralConfig(**SIZES, hidden_act="relu")),
        lambda x: x[..., :INNER].clamp(min=0) * x[..., INNER:],
    ),
    "gpt_oss": Kind(lambda: GptOssExperts(GptOssConfig(**SIZES)), clamped_swiglu),
    "ungated": Kind(lambda: Ungated(MixtralConfig(**SIZES)), lambda x: x.clamp(min=0)),
}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


def route(tokens: int, skip: int = 1) -> tuple[Tensor, Tensor]:
    """Two experts a token, never expert `skip`, and their weights."""
    others = torch.tensor([e for e in range(E) if e != skip])
    index = torch.stack([others[torch.randperm(E - 1)[:2]] for _ in range(tokens)] or [others[:2]])[:tokens]
    return index, torch.rand(tokens, 2)


def by_hand(experts: nn.Module, kind: Kind, x: Tensor, index: Tensor, weights: Tensor, spec: QuantSpec) -> Tensor:
    """Token by token: two oracle products and the gate for each expert, then the weighted sum."""
    transposed = experts.is_transposed
    y = torch.zeros(*index.shape, H)
    for token, chosen in enumerate(index.tolist()):
        for i, e in enumerate(chosen):
            z = x[token : token + 1]
            for name in stacks_of(experts):
                w = experts.get_parameter(name)[e]
                codes, scale = oracle.weight(w.T if transposed else w, spec.weights, spec.per_row)
                bias = experts.get_parameter(f"{name}_bias")[e] if experts.has_bias else None
                z = oracle.linear(z, codes, scale, bias, spec.activation_bits)
                z = z if name == "down_proj" else kind.gate(z)
            y[token, i] = z[0].float()
    return (y.to(x.dtype) * weights[..., None]).sum(1).to(x.dtype)


def packed(experts: BitExperts, backend: str = "auto") -> PackedExperts:
    twin = copy.deepcopy(experts)
    result = to_packed(twin, pack_layer(twin), backend)
    assert isinstance(result, PackedExperts)
    return result


@each_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "options", [{}, {"per_row": True}, {"weights": "binary"}, {"weights": "int8", "per_row": True}], ids=str
)
def test_training_and_packed_experts_have_the_oracles_bits(
    kind: Kind, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    experts, spec = kind.experts(dtype), QuantSpec(**options)
    x, (index, weights) = grid(7, H).to(dtype), route(7)
    with torch.no_grad():
        expected = by_hand(experts, kind, x, index, weights, spec)
        layer = BitExperts.from_experts(experts, spec).eval()
        y = layer(x, index, weights)
        assert y.dtype == dtype
        assert torch.equal(y, expected)
        for backend in BACKENDS:
            assert torch.equal(packed(layer, backend)(x, index, weights), expected), backend


@each_kind
@pytest.mark.parametrize("bits", [4, None])
def test_other_activations_are_the_same_in_training_and_serving(kind: Kind, bits: int | None) -> None:
    layer = BitExperts.from_experts(kind.experts(), QuantSpec(activation_bits=bits)).eval()
    x, (index, weights) = grid(7, H), route(7)
    expected = layer(x, index, weights)
    assert not torch.equal(expected, BitExperts.from_experts(kind.experts()).eval()(x, index, weights))
    with torch.no_grad():
        for backend in ("torch", "reference"):
            assert torch.equal(packed(layer, backend)(x, index, weights), expected)


@each_kind
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_or_no_tokens_find_their_route(kind: Kind, tokens: int) -> None:
    layer = BitExperts.from_experts(kind.experts())
    x, (index, weights) = torch.randn(tokens, H, requires_grad=True), route(tokens)
    y = layer(x, index, weights)
    assert y.shape == (tokens, H)
    y.sum().backward()
    assert torch.equal(packed(layer)(x, index, weights), y)


@each_kind
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@torch.no_grad()
def test_kernels_that_choose_experts_change_nothing(
    kind: Kind, dtype: torch.dtype, per_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where they read what was chosen; up to so many pairs, and not where autograd looks on."""
    spec = QuantSpec(per_row=per_row)
    layer = packed(BitExperts.from_experts(kind.experts(dtype), spec).eval(), "torch")
    calls, backend = [], backends.BACKENDS["torch"]

    def bind_stack(
        weight: Tensor, scale: Tensor, bias: Tensor | None, n: int, k: int, bits: int | None
    ) -> backends.Chosen:
        def run(x: Tensor, chosen: Tensor) -> Tensor:
            calls.append(len(chosen))
            shifts = [None] * len(weight) if bias is None else bias
            layers = [backend.bind(*each, n, k, bits) for each in zip(weight, scale, shifts, strict=True)]
            share = len(chosen) // len(x)
            return torch.cat([layers[e](x[i // share][None]) for i, e in enumerate(chosen)])

        return run

    for tokens in (1, 3, 32, 33):
        x = grid(tokens, H).to(dtype)
        index = torch.stack([torch.randperm(E)[:2] for _ in range(tokens)])
        weights = torch.rand(tokens, 2).to(dtype)
        expected = layer(x, index, weights)
        for stack in (layer.stack(m) for m in layer.stacks):
            stack.set_backend("torch")
        with monkeypatch.context() as patch:
            patch.setitem(backends.BACKENDS, "torch", backend._replace(bind_stack=bind_stack))
            calls.clear()
            assert torch.equal(layer(x, index, weights), expected)
            assert calls == ([2 * tokens] * 2 if tokens <= 32 else [])
            with monkeypatch.context() as without:  # such a kernel for one of the two

                def unable(weight: Tensor, scale: Tensor, bias: Any, n: int, k: int, bits: Any) -> Any:
                    return None if n == H else bind_stack(weight, scale, bias, n, k, bits)

                without.setitem(backends.BACKENDS, "torch", backend._replace(bind_stack=unable))
                for stack in (layer.stack(m) for m in layer.stacks):
                    stack.set_backend("torch")
                assert torch.equal(layer(x, index, weights), expected)
                assert len(calls) == (2 if tokens <= 32 else 0)
            for stack in (layer.stack(m) for m in layer.stacks):
                stack.set_backend("torch")
            with torch.enable_grad():
                assert torch.equal(layer(x.requires_grad_(), index, weights), expected)
            assert len(calls) == (2 if tokens <= 32 else 0)
            x.requires_grad_(False)
            changed = layer.stack(layer.stacks[0])
            changed.weight_scale = changed.weight_scale * 2
            found = layer(x, index, weights)
            assert not torch.equal(found, expected)
        changed.set_backend("torch")
        layer.stack(layer.stacks[1]).set_backend("torch")
        assert torch.equal(layer(x, index, weights), found)
        changed.weight_scale = changed.weight_scale / 2


@each_kind
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
def test_gradients_are_those_of_the_formula(kind: Kind, strength: float, per_row: bool) -> None:
    layer = BitExperts.from_experts(kind.experts(), QuantSpec(per_row=per_row))
    bitnet.set_strength(layer, strength)
    x, (index, weights) = grid(9, H).requires_grad_(), route(9)
    weights.requires_grad_()
    names = [name for name, _ in layer.named_parameters()]
    given = torch.randn(9, H)
    (layer(x, index, weights) * given).sum().backward()
    got = [x.grad, weights.grad, *(layer.get_parameter(name).grad for name in names)]

    def blend(v: Tensor, quantized: Tensor) -> Tensor:
        return v + strength * (quantized - v).detach()

    def product(z: Tensor, name: str, e: int) -> Tensor:
        w = layer.get_parameter(name)[e]
        w = w.T if layer.is_transposed else w
        codes, scale = oracle.weight(w, "ternary", per_row)
        q, s = oracle.activation(z, 8)
        z = blend(z, torch.from_numpy(q).float() / torch.from_numpy(s))
        y = z @ blend(w, torch.from_numpy(codes).float() * torch.from_numpy(scale)[:, None]).T
        return y + layer.get_parameter(f"{name}_bias")[e] if layer.has_bias else y

    x2, weights2 = x.detach().requires_grad_(), weights.detach().requires_grad_()
    up, down = (m.parameter for m in layer.latent_weights())
    rows = []
    for token, chosen in enumerate(index.tolist()):
        z = [product(kind.gate(product(x2[token : token + 1], up, e)), down, e) for e in chosen]
        rows.append((torch.cat(z) * weights2[token][:, None]).sum(0))
    loss = (torch.stack(rows) * given).sum()
    parameters = [layer.get_parameter(name) for name in names]
    for name, a, b in zip(
        ["x", "weights", *names], got, torch.autograd.grad(loss, [x2, weights2, *parameters]), strict=True
    ):
        # float32 sums in another order, some 200 terms of the gradient's size: 200 * 2^-24 is 1e-5
        assert (a - b).abs().max() <= 2e-5 * b.abs().max(), name
        assert a.any(), name
    for name in (up, down):
        assert not layer.get_parameter(name).grad[1].any(), "expert 1 saw no token"


@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_conv1d_has_the_bits_of_the_transposed_linear(dtype: torch.dtype, per_row: bool) -> None:
    conv = Conv1D(10, 24)
    conv.weight.data, conv.bias.data = grid(24, 10).to(dtype), grid(10).to(dtype)
    latent, x = conv.weight, grid(2, 3, 24).to(dtype)
    expected = oracle.linear(x, *oracle.weight(latent.T, "ternary", per_row), conv.bias, 8)
    layer = BitConv1D.from_conv1d(conv, QuantSpec(per_row=per_row)).eval()
    assert layer is conv
    assert layer.weight is latent
    assert torch.equal(layer(x), expected)
    pieces = pack_layer(layer)
    for backend in BACKENDS:
        served = to_packed(copy.deepcopy(layer), pieces, backend)
        assert served.weight.shape == (3, 24)
        assert torch.equal(served(x), expected), backend


@pytest.mark.parametrize("bits", [4, None])
def test_a_packed_conv1d_computes_what_was_trained_for_any_activations(bits: int | None) -> None:
    layer = BitConv1D.from_conv1d(Conv1D(10, 257), QuantSpec(activation_bits=bits)).eval()
    x = torch.randn(5, 257)
    with torch.no_grad():
        expected = layer(x)
        assert torch.equal(to_packed(layer, pack_layer(layer), "torch")(x), expected)


def test_conv1d_has_the_gradients_of_the_transposed_linear() -> None:
    conv = Conv1D(10, 24)
    linear = nn.Linear(24, 10)
    linear.weight.data, linear.bias.data = conv.weight.data.T.clone(), conv.bias.data.clone()
    a, b = (
        BitConv1D.from_conv1d(conv, QuantSpec(rms_norm=True)),
        bitnet.BitLinear.from_linear(linear, QuantSpec(rms_norm=True)),
    )
    x, y = (torch.randn(5, 24).requires_grad_() for _ in range(2))
    y.data = x.data.clone()
    a(x).square().sum().backward()
    b(y).square().sum().backward()
    for got, wanted in ((conv.weight.grad.T, linear.weight.grad), (conv.bias.grad, linear.bias.grad), (x.grad, y.grad)):
        # the transposed product sums in another order: 24 terms
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@each_kind
def test_the_swap_leaves_parameters_and_keys(kind: Kind) -> None:
    model = nn.ModuleDict({"experts": kind.experts()})
    experts, before, keys = model.experts, dict(model.named_parameters()), list(model.state_dict())
    report = bitnet.replace_linear(model)
    assert model.experts is experts
    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    assert list(model.state_dict()) == keys
    assert [row.name for row in report.rows] == [f"experts.{m.parameter}" for m in model.experts.latent_weights()]
    rows = {row.name: (row.kind, row.shape, row.action) for row in bitnet.pack(model).rows}
    for name in (m.parameter for m in model.experts.stacks):
        assert rows[f"experts.{name}"] == ("PackedExperts", tuple(before[f"experts.{name}"].shape), "packed")


@each_kind
def test_the_report_counts_experts(kind: Kind) -> None:
    model = nn.ModuleDict({"experts": kind.experts()})
    before = bitnet.replace_linear(model)
    after = bitnet.pack(model)
    stacks = [module for module in model.modules() if isinstance(module, PackedStack)]
    assert before.low_bit_weights == after.low_bit_weights == sum(stack.codes().numel() for stack in stacks)
    assert before.packed_bytes == after.packed_bytes == sum(stack.weight.nbytes for stack in stacks)
    assert after.packed_bytes + after.kept_bytes == sum(tensor.nbytes for tensor in model.state_dict().values())


def test_copies_pickles_and_dtypes_lose_nothing() -> None:
    layer = BitExperts.from_experts(KINDS["gpt_oss"].experts())
    x, (index, weights) = grid(5, H), route(5)
    expected = layer.eval()(x, index, weights)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x, index, weights), expected)
    served = packed(layer)
    small = len(pickle.dumps(served))
    served(x, index, weights)  # backends have derived their layouts
    assert len(pickle.dumps(served)) == small
    for twin in (copy.deepcopy(served), pickle.loads(pickle.dumps(served))):
        assert torch.equal(twin(x, index, weights), expected)
        twin.packed_down_proj.weight.fill_(0b01010101)
        assert torch.equal(served(x, index, weights), expected)
    served.to(torch.bfloat16)
    assert served.packed_down_proj.weight_scale.dtype == torch.float32
    assert served.packed_down_proj.bias.dtype == torch.bfloat16
    low = served(x.bfloat16(), index, weights.bfloat16())
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, packed(layer.to(torch.bfloat16))(x.bfloat16(), index, weights.bfloat16()))


def test_loaded_bytes_reach_the_backend() -> None:
    one, two = (BitExperts.from_experts(KINDS["mixtral"].experts()).eval() for _ in range(2))
    x, (index, weights) = grid(5, H), route(5)
    served = packed(one)
    served(x, index, weights)
    served.load_state_dict(packed(two).state_dict())
    assert torch.equal(served(x, index, weights), two(x, index, weights))
    for stack in (served.packed_gate_up_proj, served.packed_down_proj):
        stack.weight_scale = stack.weight_scale * 2
    assert not torch.equal(served(x, index, weights), two(x, index, weights))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("way", ["replaced", "written", "written elsewhere", "one row", "data replaced"])
@pytest.mark.parametrize("leaf", ["weight", "weight_scale", "bias"])
def test_changed_experts_are_never_answered_from_old_bytes(leaf: str, way: str, backend: str) -> None:
    one, two = (packed(BitExperts.from_experts(KINDS["gpt_oss"].experts()), backend) for _ in range(2))
    x, (index, weights) = grid(5, H), route(5)
    one(x, index, weights)
    for name in ("packed_gate_up_proj", "packed_down_proj"):
        old, new = getattr(one, name)._buffers[leaf], getattr(two, name)._buffers[leaf].clone()
        if way == "replaced":
            setattr(getattr(one, name), leaf, new)
        elif way == "data replaced":
            old.data = new
        elif way == "written":
            old.copy_(new)
        elif way == "written elsewhere":
            one.state_dict()[f"{name}.{leaf}"].copy_(new)
        else:
            old[1] = new[1]
    fresh = copy.deepcopy(one)  # without anything derived
    assert torch.equal(one(x, index, weights), fresh(x, index, weights))


def test_gradient_checkpointing_leaves_gradients() -> None:
    layer = BitExperts.from_experts(KINDS["gpt_oss"].experts())
    x, (index, weights) = grid(5, H).requires_grad_(), route(5)
    layer(x, index, weights).sum().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    checkpoint(layer, x, index, weights, use_reentrant=False).sum().backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in layer.named_parameters())


def test_adapters_get_gradients_through_packed_experts() -> None:
    served = packed(BitExperts.from_experts(KINDS["gpt_oss"].experts()))
    x, (index, weights) = grid(5, H).requires_grad_(), route(5)
    weights.requires_grad_()
    served(x, index, weights).sum().backward()
    assert x.grad.any()
    assert weights.grad.any()
    assert not list(served.parameters())


def test_autocast_gives_the_same_trained_and_packed() -> None:
    layer = BitExperts.from_experts(KINDS["mixtral"].experts()).eval()
    x, (index, weights) = grid(5, H), route(5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x, index, weights)
        assert torch.equal(packed(layer)(x, index, weights), y)
    assert y.dtype == torch.float32  # the dtype of hidden_states, as everywhere in transformers


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # looked at by dynamo
def test_compiled_experts_compute_the_same() -> None:
    """A graph break around the experts: how many tokens each gets is only known at run time."""
    torch._dynamo.reset()
    block = nn.ModuleDict({"experts": KINDS["mixtral"].experts()})
    bitnet.replace_linear(block)

    def run(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return block.experts(x * 2, index, weights) + 1

    graphs = CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(run, backend=graphs), []
    for tokens in (3, 5, 7, 9):
        x, (index, weights) = grid(tokens, H).requires_grad_(), route(tokens)
        assert torch.equal(compiled(x, index, weights), run(x, index, weights))
        counts.append(graphs.frame_count)
    assert counts[1] == counts[3], "compiled anew for every number of tokens"
    compiled(x, index, weights).sum().backward()
    assert block.experts.down_proj.grad.any()


def test_a_compiled_conv1d_is_one_graph_and_computes_the_same() -> None:
    layer = BitConv1D.from_conv1d(Conv1D(10, 24))
    x = grid(5, 24)
    layer.weight.data = grid(24, 10)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.weight.grad.any()


def test_strength_reaches_experts() -> None:
    layer = BitExperts.from_experts(KINDS["mixtral"].experts())
    x, (index, weights) = grid(5, H), route(5)
    full = layer(x, index, weights)
    bitnet.set_strength(layer, 0.0)
    up, down = layer.gate_up_proj, layer.down_proj
    plain = torch.stack(
        [
            sum(
                w * F.linear(KINDS["mixtral"].gate(F.linear(t, up[e])), down[e])
                for e, w in zip(chosen, ws, strict=True)
            )
            for t, chosen, ws in zip(x, index.tolist(), weights, strict=True)
        ]
    )
    assert torch.allclose(layer(x, index, weights), plain, rtol=1e-5, atol=1e-4)
    assert torch.equal(layer.eval()(x, index, weights), full)


# What is left alone


def kept(model: nn.Module, **options: Any) -> dict[str, str]:
    report = bitnet.replace_linear(model, **options)
    return {row.name: row.reason for row in report.rows if row.action == "kept"}


def test_patterns_know_experts_by_name() -> None:
    model = mixtral()
    reasons = kept(model, skip="mlp.experts")
    stacks = {f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in ("gate_up_proj", "down_proj")}
    assert {reasons[name] for name in stacks} == {"skipped by request"}
    assert model.config.quantization_config.linear_class == "autobitlinear"  # so stock transformers reads it
    bitnet.replace_linear(model, include=r"layers\.0\.mlp\.experts", per_row=True)
    assert type(model.model.layers[0].mlp.experts) is BitExperts
    assert type(model.model.layers[1].mlp.experts) is MixtralExperts
    assert bitnet.replace_linear(gpt2(), include="c_fc").low_bit_weights == 2 * 16 * 64


def test_unsafe_experts_are_kept() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = KINDS["mixtral"].experts()

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.experts.gate_up_proj[0].T

    reader, parallel, tied = Reader(), *(nn.ModuleDict({"experts": KINDS["mixtral"].experts()}) for _ in range(2))
    parallel.experts._is_expert_parallel = True
    tied["table"] = nn.Embedding(1, 1)
    tied.table.weight = tied.experts.down_proj
    for model, why in (
        (reader, "Reader uses experts.gate_up_proj directly"),
        (parallel, "expert parallelism"),
        (tied, "tied to the embedding table"),
    ):
        assert why in kept(model)["experts.gate_up_proj"]
        assert type(model.experts) is MixtralExperts
    model = nn.ModuleDict({"experts": KINDS["mixtral"].experts(), "fc": nn.Linear(4, 4)})
    assert kept(model, rms_norm=True)["experts.down_proj"] == "an RMSNorm inside fused experts is not supported"
    assert type(model.fc) is bitnet.BitLinear


def test_a_diverged_expert_is_named_and_the_model_stays_as_it_was() -> None:
    model = mixtral()
    bitnet.replace_linear(model)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: down_proj, expert 2: .* 1 NaN or Inf"):
        bitnet.pack(model)
    assert not any(isinstance(module, bitnet.PackedBitLinear | PackedExperts) for module in model.modules())


# Checkpoints


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


EXPERT = "model.layers.1.mlp.experts"
ON_DISK = "model.layers.1.block_sparse_moe.experts"  # as every Mixtral checkpoint has them


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{ON_DISK}.2.w3.weight"), rf"no tensor {EXPERT}\.2\.w3\.weight, a part of {EXPERT}\.gate_up"),
        (lambda t: [t.pop(f"{ON_DISK}.{e}.w2.weight") for e in range(4)], rf"no tensor {EXPERT}\.down_proj"),
        (
            lambda t: t.update({f"{ON_DISK}.2.w2.weight": torch.zeros(3, 3)}),
            rf"{EXPERT}\.2\.w2\.weight is F32 \[3, 3\]",
        ),
        (
            lambda t: t.update({f"{ON_DISK}.{e}.w2.weight": torch.zeros(16, 23) for e in range(4)}),
            rf"{EXPERT}\.down_proj is \[4, 16, 24\], which .*w2\.weight in the checkpoint do not add up to",
        ),
        (
            lambda t: t.update({f"{ON_DISK}.2.w2.weight": torch.zeros(16, 24, dtype=torch.uint8)}),
            rf"{EXPERT}\.2\.w2\.weight is U8",
        ),
    ],
)
def test_damaged_latent_experts_are_named(change: Any, message: str, tmp_path: Path) -> None:
    model = mixtral()
    bitnet.replace_linear(model)
    bitnet.save(model, tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        bitnet.load(tmp_path)


@pytest.mark.parametrize("bits", [2, 1.6])
@pytest.mark.parametrize(
    ("leaf", "change", "message"),
    [
        ("packed_down_proj.weight", None, r"no tensor {}"),
        ("packed_gate_up_proj.weight_scale", None, r"no tensor {}"),
        ("packed_down_proj.weight", lambda t: t[1:], r"{} is U8 \[3, "),
        ("packed_down_proj.weight", lambda t: t.float(), r"{} is F32"),
        ("packed_gate_up_proj.weight", lambda t: t.index_fill(0, torch.tensor([2]), 255), "expert 2: .*corrupt"),
        ("packed_down_proj.weight_scale", lambda t: t.index_fill(0, torch.tensor([3]), -1), "expert 3: .*positive"),
    ],
)
def test_damaged_packed_experts_are_named(leaf: str, change: Any, message: str, bits: float, tmp_path: Path) -> None:
    model = mixtral()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path, weight_bits=bits)
    key = f"{EXPERT}.{leaf}" if f"{EXPERT}.{leaf}" in load_file(tmp_path / "model.safetensors") else f"{ON_DISK}.{leaf}"

    def apply(tensors: dict[str, Tensor]) -> None:
        value = tensors.pop(key)
        if change is not None:
            tensors[key] = change(value).clone()

    rewrite(tmp_path, apply)
    if bits == 1.6 and "corrupt" in message:
        message = "corrupt"
    with pytest.raises(ValueError, match=message.format(f"{EXPERT}.{leaf}".replace(".", r"\."))):
        bitnet.load(tmp_path)


def test_an_expert_of_zero_bytes_is_pointed_out(tmp_path: Path) -> None:
    model = mixtral()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    model.model.layers[1].mlp.experts.packed_down_proj.weight[2] = 0
    bitnet.save(model, tmp_path)
    with pytest.warns(UserWarning, match=r"packed_down_proj, expert 2: every packed byte is zero"):
        bitnet.load(tmp_path)


def test_packed_experts_that_the_config_keeps_are_refused(tmp_path: Path) -> None:
    model = mixtral()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"].append(r"model\.layers\.\d+\.mlp\.experts$")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"keeps model\.layers\.0\.mlp\.experts as it is .* packed bytes"):
        bitnet.load(tmp_path)


@pytest.mark.parametrize("bits", [2, 1.6])
@pytest.mark.parametrize("build", [mixtral, gpt_oss, gpt2])
def test_options_and_mixtures_of_layers_come_back(build: Any, bits: float, tmp_path: Path) -> None:
    model = build()
    some = "c_fc" if build is gpt2 else r"layers\.0\.mlp\.experts"
    bitnet.replace_linear(model, include=some, per_row=True, weights="binary")
    bitnet.replace_linear(model, skip=r"h\.1\..*" if build is gpt2 else r"layers\.1\.mlp\.experts")
    bitnet.save(model, tmp_path / "latent")
    loaded = bitnet.load(tmp_path / "latent")
    classes = {name: type(module) for name, module in model.named_modules()}
    assert {name: type(module) for name, module in loaded.named_modules()} == classes
    bitnet.pack(model)
    bitnet.pack(loaded)
    with torch.no_grad():
        expected = model(IDS).logits
        assert torch.equal(loaded(IDS).logits, expected)
        bitnet.save(model, tmp_path / "packed", weight_bits=bits, max_shard_size=3000)
        with said(bits):
            result = bitnet.load(tmp_path / "packed", weight_bits=bits)(IDS).logits
        assert torch.equal(result, expected)


def test_experts_outside_hugging_face_come_back(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({"a": KINDS["gpt_oss"].experts(), "b": KINDS["mixtral"].experts(), "c": Conv1D(6, 4)})

    model, (x, (index, weights)) = build().eval(), (grid(3, H), route(3))
    bitnet.replace_linear(model)
    for form in ("latent", "packed"):
        if form == "packed":
            bitnet.pack(model)
        bitnet.save(model, tmp_path / form)
        loaded = bitnet.load(tmp_path / form, build())
        for name in ("a", "b"):
            assert torch.equal(loaded[name](x, index, weights), model[name](x, index, weights))
        assert torch.equal(loaded.c(x[:, :4]), model.c(x[:, :4]))


def test_stored_expert_scales_lose_nothing() -> None:
    layer = BitExperts.from_experts(MixtralExperts(MixtralConfig(**SIZES)))
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter)
    for _, scale in pack_layer(layer):
        assert scale.shape == (E,)
        assert torch.equal(1 / values.stored_scale(scale), scale)
        assert np.isfinite(scale.numpy()).all()
