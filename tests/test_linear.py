import copy
import io
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from oracle import DTYPES, grid
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from bitnet import BitLinear, QuantSpec, set_strength
from bitnet.quantize import bit_linear

M, N, K = 5, 6, 24

each_weights = pytest.mark.parametrize("weights", ["ternary", "binary"])
each_scale = pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
each_bits = pytest.mark.parametrize("bits", [8, 4, None], ids=["a8", "a4", "float"])
each_norm = pytest.mark.parametrize("rms_norm", [False, True], ids=["plain", "norm"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])


def make(dtype: torch.dtype = torch.float32, bias: bool = True, **options: Any) -> BitLinear:
    """A layer whose weight lies on a grid, so that the oracle knows its exact mean."""
    layer = BitLinear(K, N, bias=bias, dtype=dtype, **options)
    with torch.no_grad():
        layer.weight.copy_(grid(N, K))
    return layer


def expected_output(layer: BitLinear, x: Tensor) -> Tensor:
    codes, scale = oracle.weight(layer.weight, layer.spec.weights, layer.spec.per_row)
    return oracle.linear(x, codes, scale, layer.bias, layer.spec.activation_bits)


@each_weights
@each_scale
@each_bits
@each_norm
@each_dtype
def test_forward_has_the_oracles_bits(
    weights: str, per_row: bool, bits: int | None, rms_norm: bool, dtype: torch.dtype
) -> None:
    layer = make(dtype, weights=weights, per_row=per_row, activation_bits=bits, rms_norm=rms_norm, rms_norm_eps=3.0)
    x = (oracle.small_sums(M, K) if bits is None else grid(M, K)).to(dtype)
    normed = x
    if layer.rms_norm is not None:
        # mean x^2 = 1, so x / sqrt(mean x^2 + eps) = x / 2 exactly; the norm's weight makes the values differ
        x = x.sign() + (x == 0)
        gain = torch.randint(1, 3, (K,)) if bits is None else torch.randint(1, 16, (K,)) / 8
        with torch.no_grad():
            layer.rms_norm.weight.copy_(gain)
        normed = (x * gain / 2).to(dtype)
    expected = expected_output(layer, normed)
    assert torch.equal(layer.eval()(x), expected)
    assert torch.equal(layer.train()(x), expected)
    assert torch.equal(layer(x.reshape(1, M, 1, K)), expected.reshape(1, M, 1, N))


@pytest.mark.parametrize("make_x", [lambda: grid(K, M).T, lambda: grid(M, 2 * K)[:, ::2], lambda: grid(0, K)])
def test_strides_and_empty_batches_do_not_matter(make_x: Callable[[], Tensor]) -> None:
    layer, x = make(), make_x().requires_grad_()
    y = layer(x)
    assert torch.equal(y, expected_output(layer, x))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape


@each_scale
@each_dtype
def test_latent_weight_in_float32_serves_activations_of_any_dtype(per_row: bool, dtype: torch.dtype) -> None:
    layer, x = make(per_row=per_row), grid(M, K).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert torch.equal(y, expected_output(layer, x))


# Gradients


def autograd_gradients(layer: BitLinear, x: Tensor, gy: Tensor, strength: float = 1.0) -> tuple[list[Tensor], ...]:
    """Gradients for (x, weight, bias) of w + strength * (wq - w).detach() by autograd in float64.

    Also returned: the sums of |terms| behind every entry, which bound what low precision may lose.
    """
    spec = layer.spec
    codes, scale = oracle.weight(layer.weight, spec.weights, spec.per_row)
    x64, w64 = x.detach().double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    b64 = layer.bias.detach().double().requires_grad_()
    w = w64 + strength * (torch.from_numpy(codes * scale.astype(np.float64)[:, None]) - w64).detach()
    v = x64
    if spec.activation_bits is not None:
        q, s = oracle.activation(x, spec.activation_bits)
        v = x64 + strength * (torch.from_numpy(q / s.astype(np.float64)) - x64).detach()
    F.linear(v, w, b64).backward(gy.double())
    a = gy.double().abs()
    magnitudes = [a @ w.detach().abs(), a.T @ v.detach().abs(), a.sum(0)]
    return [t.grad for t in (x64, w64, b64)], magnitudes  # type: ignore[misc]


@each_weights
@each_scale
@each_bits
@each_dtype
def test_gradients_are_straight_through(weights: str, per_row: bool, bits: int | None, dtype: torch.dtype) -> None:
    layer = make(dtype, weights=weights, per_row=per_row, activation_bits=bits)
    x = grid(M, K).to(dtype).requires_grad_()
    gy = torch.randn(M, N).to(dtype)
    layer(x).backward(gy)
    expected, magnitudes = autograd_gradients(layer, x, gy)
    # Against exact arithmetic on the same operands: in dtype one rounding each of the scale, of gy * scale (or of
    # q / s) and of the result, 2^-p relative with p bits of significand; sums of at most K float32 terms lose
    # K * 2^-24 of the sum of |terms|. fp16 adds its smallest step, 2^-24, where it goes subnormal.
    p = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[dtype]
    loss = 3.1 * 2.0**-p + K * 2.0**-24
    for got, want, magnitude in zip((x.grad, layer.weight.grad, layer.bias.grad), expected, magnitudes, strict=True):
        assert got is not None
        assert got.dtype == dtype
        assert torch.all((got.double() - want).abs() <= loss * magnitude + 2.0**-24)


def test_gradient_passes_where_rounding_and_clamping_are_flat() -> None:
    layer = BitLinear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[100.0, 1e-3, -100.0, 0.0]]))
    layer(torch.ones(1, 4)).backward(torch.ones(1, 1))
    assert layer.weight.grad is not None
    # q / s is 1 up to the roundings of s and of the division
    assert torch.all((layer.weight.grad - 1).abs() <= 3 * 2.0**-24)


def test_frozen_operands_get_no_gradient() -> None:
    layer, x = make(), grid(M, K)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


def test_gradients_reach_the_inner_norm() -> None:
    layer = make(rms_norm=True)
    layer(grid(M, K)).square().sum().backward()
    assert layer.rms_norm is not None
    assert layer.rms_norm.weight.grad is not None
    assert layer.rms_norm.weight.grad.abs().sum() > 0


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
@pytest.mark.parametrize("bits", [8, None])
def test_the_output_can_be_written_to_in_place(bits: int | None, shape: tuple[int, ...], compiled: bool) -> None:
    layer, x = BitLinear(8, 8, activation_bits=bits), torch.randn(shape)
    expected = torch.autograd.grad(layer(x).relu().sum(), list(layer.parameters()))
    run = torch.compile(lambda x: layer(x).relu_(), backend="aot_eager", fullgraph=True) if compiled else layer
    got = torch.autograd.grad(run(x).relu_().sum(), list(layer.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradient_checkpointing_changes_nothing() -> None:
    layer, x = make(), grid(M, K).requires_grad_()
    layer(x).square().sum().backward()
    expected = [t.grad.clone() for t in (x, layer.weight, layer.bias)]
    for t in (x, layer.weight, layer.bias):
        t.grad = None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert all(torch.equal(t.grad, e) for t, e in zip((x, layer.weight, layer.bias), expected, strict=True))


# Strength


@each_dtype
def test_strength_zero_is_nn_linear(dtype: torch.dtype) -> None:
    layer, x = make(dtype), torch.randn(M, K, dtype=dtype, requires_grad=True)
    set_strength(layer, 0)
    y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    got = layer.weight.grad
    assert got is not None
    assert torch.equal(got, torch.autograd.grad(F.linear(x, layer.weight, layer.bias).sum(), layer.weight)[0])


@each_weights
@each_scale
@each_bits
@pytest.mark.parametrize("strength", [0.25, 0.7])
def test_partial_strength_is_the_formula(weights: str, per_row: bool, bits: int | None, strength: float) -> None:
    layer = make(weights=weights, per_row=per_row, activation_bits=bits)
    set_strength(layer, strength)
    x, gy = grid(M, K).requires_grad_(), torch.randn(M, N)
    y = layer(x)
    y.backward(gy)

    codes, scale = oracle.weight(layer.weight, weights, per_row)
    w = layer.weight.detach().double()
    wq = torch.from_numpy(codes * scale.astype(np.float64)[:, None])
    w_size = w.abs() + strength * (wq.abs() + w.abs())
    w = w + strength * (wq - w)
    v = x.detach().double()
    v_size = v.abs()
    if bits is not None:
        q, s = oracle.activation(x, bits)
        vq = torch.from_numpy(q / s.astype(np.float64))
        v_size = v_size + strength * (vq.abs() + v_size)
        v = v + strength * (vq - v)
    # float32 rounds strength, codes * scale or q / s, the difference, its product and the sum: 5 of 2^-24 for each
    # operand, relative to the magnitudes that went in; the sum of K terms and bias adds K + 2
    loss = (2 * 5 + K + 2) * 2.0**-24
    bias = layer.bias.detach().double()
    assert torch.all((y.double() - (v @ w.T + bias)).abs() <= loss * (v_size @ w_size.T + bias.abs()))

    expected, _ = autograd_gradients(layer, x, gy, strength)
    a = gy.double().abs()
    magnitudes = [a @ w_size, a.T @ v_size, a.sum(0)]
    for got, want, magnitude in zip((x.grad, layer.weight.grad, layer.bias.grad), expected, magnitudes, strict=True):
        assert torch.all((got.double() - want).abs() <= loss * magnitude)


def test_evaluation_ignores_strength() -> None:
    layer, x = make(), grid(M, K)
    expected = expected_output(layer, x)
    for strength in (0, 0.5, 1):
        set_strength(layer, strength)
        assert torch.equal(layer.eval()(x), expected)
        assert torch.equal(layer.train()(x), expected) == (strength == 1)


@pytest.mark.parametrize("strength", [1, True, torch.tensor(0.5), 0.5], ids=repr)
def test_a_strength_of_another_type_is_not_taken_for_zero(strength: float | Tensor) -> None:
    layer, x = make(), grid(M, K)
    y = bit_linear(x, layer.weight, layer.bias, layer.spec, strength)
    expected = bit_linear(x, layer.weight, layer.bias, layer.spec, torch.tensor(0.5) if strength == 0.5 else 1.0)
    assert not torch.equal(y, F.linear(x, layer.weight, layer.bias))
    assert torch.equal(y, expected)


# Autocast and torch.compile


@each_bits
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_rounds_the_operands_and_nothing_else(bits: int | None, dtype: torch.dtype) -> None:
    """K is large enough that accumulators do not fit bfloat16: autocast inside the product would show."""
    layer = BitLinear(1536, 8, activation_bits=bits)
    with torch.no_grad():
        layer.weight.copy_(grid(8, 1536))
    x = (oracle.small_sums(M, 1536) if bits is None else grid(M, 1536)).requires_grad_()
    with torch.autocast("cpu", dtype):
        y = layer(x)
        linear = F.linear(x, layer.weight, layer.bias)
    assert y.dtype == linear.dtype == dtype
    assert torch.equal(y, expected_output(layer, x.to(dtype)))
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.float32


def test_autocast_at_partial_strength_gives_its_dtype() -> None:
    layer = make(rms_norm=True)
    for strength in (0, 0.5):
        set_strength(layer, strength)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(grid(M, K)).dtype == torch.bfloat16


def step(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients of one training step."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.fixture
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("bits", [8, None], ids=["a8", "float"])
def test_compiled_layer_equals_eager(bits: int | None) -> None:
    layer, x = make(activation_bits=bits, rms_norm=True), grid(M, K)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    eager = step(layer, x)
    assert all(torch.equal(a, b) for a, b in zip(step(compiled, x), eager, strict=True))
    layer.eval()
    eager = step(layer, x)
    assert all(torch.equal(a, b) for a, b in zip(step(compiled, x), eager, strict=True))
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@pytest.mark.usefixtures("_fresh_dynamo")
def test_a_strength_ramp_compiles_once() -> None:
    layer, x = make(), grid(M, K)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    outputs = []
    for strength in (0.1, 0.2, 0.5, 0.9):
        set_strength(layer, strength)
        got = step(compiled, x)
        assert all(torch.equal(a, b) for a, b in zip(got, step(layer, x), strict=True))
        outputs.append(got[0])
    assert counter.frame_count == 1
    assert not torch.equal(outputs[0], outputs[1]), "the strength was baked into the graph"


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler")
def test_inductor_keeps_the_accumulators() -> None:
    layer, x = make(), grid(M, K)
    x[:, 0] = 15 / 16  # the largest of every token, so that x * s = i * 127 / 15 is never a tie
    nn.init.zeros_(layer.bias)
    compiled = torch.compile(layer, fullgraph=True)
    got, want = step(compiled, x), expected_output(layer, x)
    # Fused code may contract or reorder the float32 epilogue, acc * (scale / s): two roundings of 2^-24, and as
    # many again for s = 127 * (1 / max|x|). An accumulator off by one would be off by 1 / |acc| >= 2^-12.
    assert torch.all((got[0] - want).abs() <= 4 * 2.0**-24 * want.abs())
    # the gradient of y^2 is 2 y with that error, then three roundings and a sum as in eager
    expected, magnitudes = autograd_gradients(layer, x, 2 * want)
    for gradient, exact, magnitude in zip(got[1:], expected, magnitudes, strict=True):
        assert torch.all((gradient.double() - exact).abs() <= (4 + 3.1 + K) * 2.0**-24 * magnitude)


# Life as an nn.Linear


def test_from_linear_keeps_object_parameters_keys_and_ties() -> None:
    linear = nn.Linear(K, N)
    model = nn.ModuleDict({"a": linear, "b": nn.Linear(K, N)})
    model["b"].weight = linear.weight
    weight, bias, keys = linear.weight, linear.bias, list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layer = BitLinear.from_linear(linear)
    assert layer is linear
    assert isinstance(layer, BitLinear)
    assert layer.weight is weight is model["b"].weight
    assert layer.bias is bias
    assert list(model.state_dict()) == keys
    before = weight.detach().clone()
    layer(grid(M, K)).sum().backward()
    optimizer.step()
    assert not torch.equal(layer.weight, before)
    model.load_state_dict(model.state_dict())


def test_a_norm_adds_one_key_in_the_weights_dtype() -> None:
    layer = BitLinear.from_linear(nn.Linear(K, N, dtype=torch.bfloat16), QuantSpec(rms_norm=True))
    assert list(layer.state_dict()) == ["weight", "bias", "rms_norm.weight"]
    assert layer.rms_norm is not None
    assert layer.rms_norm.weight.dtype == torch.bfloat16
    assert torch.equal(layer.rms_norm.weight, torch.ones(K, dtype=torch.bfloat16))


def test_hooks_survive_from_linear() -> None:
    linear, calls = nn.Linear(K, N), []
    linear.register_forward_pre_hook(lambda module, args: calls.append("before"))
    linear.register_forward_hook(lambda module, args, output: calls.append("after"))
    linear.register_full_backward_hook(lambda module, grad_input, grad_output: calls.append("backward"))
    BitLinear.from_linear(linear)(grid(M, K).requires_grad_()).sum().backward()
    assert calls == ["before", "after", "backward"]


class Doubling(ModelHook):
    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return 2 * output


def test_accelerates_hooked_forward_quantizes() -> None:
    linear, x = make(), grid(M, K)
    expected = expected_output(linear, x)
    linear.__class__ = nn.Linear  # type: ignore[assignment]
    add_hook_to_module(linear, Doubling())
    layer = BitLinear.from_linear(linear)
    assert torch.equal(layer(x), 2 * expected)
    remove_hook_from_module(layer)
    assert torch.equal(layer(x), expected)


def test_a_hook_that_accelerate_removed_leaves_no_float_forward_behind() -> None:
    linear, x = nn.Linear(K, N), grid(M, K)
    with torch.no_grad():
        linear.weight.copy_(grid(N, K))
    add_hook_to_module(linear, Doubling())
    remove_hook_from_module(linear)
    layer = BitLinear.from_linear(linear)
    assert torch.equal(layer(x), expected_output(layer, x))


def through_torch_save(layer: BitLinear) -> BitLinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), through_torch_save],
    ids=["deepcopy", "pickle", "torch_save"],
)
@pytest.mark.parametrize("strength", [1, 0.5])
def test_a_copy_computes_the_same_from_its_own_weight(clone: Callable[[BitLinear], BitLinear], strength: float) -> None:
    layer, x = make(weights="binary", per_row=True, rms_norm=True), grid(M, K)
    set_strength(layer, strength)
    twin = clone(layer)
    assert twin.spec == layer.spec
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        twin.weight.neg_()
    assert not torch.equal(twin(x), layer(x))


@each_bits
def test_meta_layer_has_shapes_and_comes_alive(bits: int | None) -> None:
    source, x = make(activation_bits=bits, rms_norm=True), grid(M, K)
    layer = BitLinear(K, N, device="meta", activation_bits=bits, rms_norm=True)
    assert all(p.is_meta for p in layer.parameters())
    y = layer(torch.empty(2, M, K, device="meta"))
    assert y.is_meta
    assert y.shape == (2, M, N)
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(layer(x), source(x))


def test_to_dtype_keeps_working() -> None:
    layer, x = make().to(torch.bfloat16), grid(M, K).bfloat16()
    assert torch.equal(layer(x), expected_output(layer, x))


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "int2"}, "weights must be 'ternary', 'binary', 'int8' or 'int4', got 'int2'"),
        ({"activation_bits": 5}, "activation_bits must be 16, 8, 4 or None, got 5"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be positive, got 0.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be positive, got nan"),
    ],
    ids=["weights", "bits", "eps", "nan_eps"],
)
def test_bad_options_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BitLinear(K, N, **options)


def test_an_unknown_option_raises() -> None:
    with pytest.raises(TypeError, match="block_size"):
        BitLinear(K, N, block_size=64)


def test_printout_names_the_options() -> None:
    text = repr(BitLinear(K, N, weights="binary", per_row=True, activation_bits=None))
    assert f"in_features={K}, out_features={N}, bias=True, binary, per-row scale, float activations" in text
    assert "ternary, int4 activations" in repr(BitLinear(K, N, activation_bits=4))
