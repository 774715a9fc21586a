import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from oracle import DTYPES, grid
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from bitnet import BitLinear, PackedBitLinear
from bitnet.kernels import backends, layout
from bitnet.packing import quantize_packed

M, N, K = 5, 6, 24
BACKENDS = [row.name for row in backends.backends("cpu") if row.ready and "binary" not in row.name]

each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
each_bits = pytest.mark.parametrize("bits", [8, 4, None], ids=["a8", "a4", "float"])


def pack(layer: BitLinear, backend: str = "auto") -> PackedBitLinear:
    if backend in BACKENDS and (
        why := backends.BACKENDS[backend].missing(torch.device("cpu"), layer.spec.activation_bits, False)
    ):
        pytest.skip(why)
    return PackedBitLinear.from_bit_linear(layer, *quantize_packed(layer), backend=backend)


def make(backend: str = "auto", dtype: torch.dtype | None = None, **options: Any) -> PackedBitLinear:
    return pack(BitLinear(K, N, dtype=dtype, **options), backend)


# The promise: what you train is what you serve


@each_backend
@pytest.mark.parametrize("weights", ["ternary", "binary"])
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@each_bits
@pytest.mark.parametrize("rms_norm", [False, True], ids=["plain", "norm"])
@each_dtype
def test_packed_output_is_the_trained_layers(
    backend: str, weights: str, per_row: bool, bits: int | None, rms_norm: bool, dtype: torch.dtype
) -> None:
    layer = BitLinear(
        K, N, dtype=dtype, weights=weights, per_row=per_row, activation_bits=bits, rms_norm=rms_norm, rms_norm_eps=0.1
    )
    if layer.rms_norm is not None:
        nn.init.normal_(layer.rms_norm.weight)
    x = torch.randn(M, K).to(dtype)
    trained = layer.eval()(x).detach()
    packed = pack(layer, backend)
    assert packed is layer, "references to the layer would go stale"
    assert torch.equal(packed(x), trained)
    assert torch.equal(packed(x.requires_grad_()), trained)
    assert torch.equal(packed(x.reshape(1, M, K)), trained[None])


@each_backend
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (4, 1), (5, 7), (30, 130), (66, 129), (512, 1536)])
def test_packed_output_is_the_trained_layers_at_any_shape(backend: str, bias: bool, n: int, k: int) -> None:
    layer, x = BitLinear(k, n, bias=bias), torch.randn(3, k)
    trained = layer(x).detach()
    assert torch.equal(pack(layer, backend)(x), trained)
    assert layer(x[:0]).shape == (0, n)


def test_output_has_the_oracles_bits() -> None:
    layer, x = BitLinear(K, N, per_row=True), grid(M, K)
    with torch.no_grad():
        layer.weight.copy_(grid(N, K))
    codes, scale = oracle.weight(layer.weight, per_row=True)
    packed = pack(layer)
    assert packed.codes().tolist() == codes.tolist()
    assert packed.weight_scale.tolist() == scale.tolist()
    assert torch.equal(packed(x), oracle.linear(x, codes, scale, packed.bias, 8))


@each_bits
def test_autocast_gives_the_trained_layers_bits(bits: int | None) -> None:
    layer, x = BitLinear(1536, 8, activation_bits=bits), torch.randn(M, 1536)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        trained = layer(x)
        packed = pack(layer)
        packed.set_backend(activation_bits=None)  # float ones stay float
        served = packed(x)
    assert served.dtype == torch.bfloat16
    assert torch.equal(served, trained)


@pytest.mark.parametrize(("n", "k"), [(1, 3), (4, 8), (5, 8), (512, 1536)])
def test_weight_takes_two_bits(n: int, k: int) -> None:
    packed = pack(BitLinear(k, n))
    assert packed.weight.untyped_storage().nbytes() == (n + 3) // 4 * k
    assert not list(packed.parameters()), "the latent weight was kept"
    assert PackedBitLinear(k, n).weight.nbytes == (n + 3) // 4 * k


def test_a_fresh_layer_holds_zeros() -> None:
    layer = PackedBitLinear(K, N, bias=False)
    assert torch.equal(layer(torch.randn(M, K)), torch.zeros(M, N))
    assert torch.equal(layer.codes(), torch.zeros(N, K, dtype=torch.int8))


# Moving, copying, saving


@pytest.mark.parametrize(
    "convert",
    [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double(), lambda m: m.bfloat16().float()],
    ids=["to_bf16", "half", "double", "there_and_back"],
)
def test_scale_stays_float32_bit_for_bit(convert: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(make(per_row=True))
    layer = model[0]
    scale, weight = layer.weight_scale.clone(), layer.weight.clone()
    layer(torch.randn(M, K))
    convert(model)
    assert layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight_scale, scale)
    assert torch.equal(layer.weight, weight)
    assert "weight_scale" in layer.state_dict()


def test_bfloat16_model_rounds_only_its_output() -> None:
    layer, x = make(bias=False), grid(M, K)
    expected = layer(x).bfloat16()
    assert torch.equal(layer.to(torch.bfloat16)(x.bfloat16()), expected)


def through_torch_save(layer: PackedBitLinear) -> PackedBitLinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_backend
@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), through_torch_save],
    ids=["deepcopy", "pickle", "torch_save"],
)
def test_a_copy_computes_the_same_and_does_not_carry_the_backends_layout(
    backend: str, clone: Callable[[PackedBitLinear], PackedBitLinear]
) -> None:
    layer, x = make(backend, per_row=True, rms_norm=True), torch.randn(M, K)
    expected = layer(x)
    twin = clone(layer)
    assert (twin.spec, twin.backend) == (layer.spec, backend)
    assert twin._prepacked is None
    assert layer._prepacked is not None
    assert torch.equal(twin(x), expected)
    twin.weight.fill_(0b01010101)
    assert torch.equal(layer(x), expected)


@each_backend
def test_state_dict_loaded_after_a_forward_takes_effect(backend: str) -> None:
    source, layer, x = make(backend, rms_norm=True), make(backend, rms_norm=True), torch.randn(M, K)
    assert list(source.state_dict()) == ["weight", "weight_scale", "bias", "rms_norm.weight"]
    assert not torch.equal(layer(x), source(x))
    layer.load_state_dict(source.state_dict())
    assert torch.equal(layer(x), source(x))
    other = make(backend, rms_norm=True)
    nn.ModuleDict({"a": layer}).load_state_dict({f"a.{k}": v for k, v in other.state_dict().items()}, assign=True)
    assert torch.equal(layer(x), other(x))


@each_bits
def test_meta_layer_has_shapes_and_comes_alive(bits: int | None) -> None:
    source, x = make(activation_bits=bits, per_row=True), torch.randn(M, K)
    layer = PackedBitLinear(K, N, device="meta", activation_bits=bits, per_row=True)
    y = layer(torch.empty(2, M, K, device="meta"))
    assert y.is_meta
    assert y.shape == (2, M, N)
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(layer(x), source(x))


def test_accelerates_hooked_forward_serves_packed() -> None:
    class Doubling(ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return 2 * output

    linear, x = nn.Linear(K, N), torch.randn(M, K)
    add_hook_to_module(linear, Doubling())
    layer = BitLinear.from_linear(linear)
    trained = layer(x).detach()
    packed = pack(layer)
    assert torch.equal(packed(x), trained)
    remove_hook_from_module(packed)
    assert torch.equal(2 * packed(x), trained)


# Prepacking


def test_weight_is_unpacked_once_for_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(packed: Tensor, n: int, k: int) -> Tensor:
        calls.append(n)
        return layout.unpack_ternary(packed, n)

    monkeypatch.setitem(backends.BACKENDS, "torch", backends.BACKENDS["torch"]._replace(prepack=counting))
    layer, x = make("torch"), torch.randn(M, K)
    assert calls == []
    for _ in range(3):
        layer(x)
        layer(x.clone().requires_grad_()).sum().backward()
    assert calls == [N]
    layer.to(torch.bfloat16)
    layer(x.bfloat16())
    layer(x.bfloat16())
    assert calls == [N, N]


def test_prepack_names_the_backend_it_used() -> None:
    assert make("reference").prepack()[1] == "reference"
    assert make().prepack()[1] == backends.choose_backend("auto", torch.device("cpu"))


def test_unknown_backend_raises() -> None:
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        make("fast")(torch.randn(M, K))


# Gradients


@each_backend
@pytest.mark.parametrize("per_row", [False, True], ids=["tensor", "row"])
@each_bits
@each_dtype
def test_input_gradient_is_straight_through(backend: str, per_row: bool, bits: int | None, dtype: torch.dtype) -> None:
    layer = make(backend, dtype, per_row=per_row, activation_bits=bits)
    x, gy = torch.randn(2, M, K).to(dtype).requires_grad_(), torch.randn(2, M, N).to(dtype)
    layer(x).backward(gy)
    w = layer.codes().double() * layer.weight_scale.double()[:, None]
    # roundings to dtype (p bits: 2^-p relative) of scale, of gy * scale and of the result; the sum of N float32 terms
    # loses N * 2^-24 of the sum of |terms|; 2^-24 is float16's smallest step
    p = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}[dtype]
    loss = (3.1 * 2.0**-p + N * 2.0**-24) * (gy.double().abs() @ w.abs()) + 2.0**-24
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.all((x.grad.double() - gy.double() @ w).abs() <= loss)


@each_backend
@pytest.mark.parametrize("name", ["weight_scale", "bias"])
@pytest.mark.parametrize("x_grad", [False, True], ids=["x_frozen", "x_grad"])
def test_a_gradient_of_the_packed_weight_is_refused(backend: str, name: str, x_grad: bool) -> None:
    layer, x = make(backend), torch.randn(M, K, requires_grad=x_grad)
    getattr(layer, name).requires_grad_()
    y = layer(x)
    with pytest.raises(RuntimeError, match=r"packed weights cannot be trained: train bitnet\.BitLinear .*LoRA"):
        y.sum().backward()


@each_backend
def test_inference_mode_gives_the_same_and_does_not_spoil_later_gradients(backend: str) -> None:
    layer, x = make(backend), torch.randn(M, K)
    with torch.inference_mode():
        y = layer(x)
    assert y.is_inference()
    x.requires_grad_()
    z = layer(x)
    assert torch.equal(z, y)
    z.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("prepacked", [False, True], ids=["cold", "prepacked"])
@each_backend
def test_compiled_layer_equals_eager(backend: str, prepacked: bool) -> None:
    torch._dynamo.reset()
    layer, x = make(backend, rms_norm=True), torch.randn(M, K)
    if prepacked:
        layer.prepack()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(a).square().sum().backward()
    layer(b).square().sum().backward()
    assert a.grad is not None
    assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


# Corrupt or misfitting


@pytest.mark.parametrize("shape", [(M, K + 1), (M, K - 1), (K, M), (1,)], ids=lambda s: "x".join(map(str, s)))
def test_a_wrong_number_of_features_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"input is \[.*, but this layer takes {K} features"):
        make()(torch.randn(shape))


def test_integer_input_is_refused() -> None:
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        make()(torch.ones(M, K, dtype=torch.int64))


@each_backend
def test_corrupt_bytes_are_refused(backend: str) -> None:
    layer = make(backend)
    layer.weight[1, 3] = 0b01110101
    with pytest.raises(ValueError, match=r"packed weight is corrupt: 1 bytes hold the code 3, the first at \[1, 3\]"):
        layer(torch.randn(M, K))


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_scale_is_refused(bad: float) -> None:
    layer = make(per_row=True)
    layer.weight_scale[2] = bad
    with pytest.raises(ValueError, match="weight_scale must be positive and finite"):
        layer(torch.randn(M, K))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_diverged_weight_is_not_packed(bad: float) -> None:
    layer = BitLinear(K, N)
    with torch.no_grad():
        layer.weight[1, 2] = bad
    with pytest.raises(ValueError, match="weight holds 1 NaN or Inf values"):
        pack(layer)
    assert type(layer) is BitLinear


def test_bad_options_raise() -> None:
    with pytest.raises(ValueError, match="weights must be 'ternary', 'binary', 'int8' or 'int4', got 'int2'"):
        PackedBitLinear(K, N, weights="int2")


def test_printout_names_options_and_backend() -> None:
    text = repr(make("reference", per_row=True))
    assert f"in_features={K}, out_features={N}, bias=True, ternary, per-row scale" in text
    assert "backend=reference" in text


# What was derived from the weight, and who watches


def trits(*shape: int) -> Tensor:
    return layout.pack_ternary(torch.randint(-1, 2, shape, dtype=torch.int8))


REWRITES: dict[str, Callable[[PackedBitLinear, Tensor], object]] = {
    "written": lambda layer, packed: layer.weight.copy_(packed),
    "written_through_a_view": lambda layer, packed: layer.weight[:3].copy_(packed[:3]),
    "replaced": lambda layer, packed: setattr(layer, "weight", packed),
    "registered": lambda layer, packed: layer.register_buffer("weight", packed),
    "loaded": lambda layer, packed: layer.load_state_dict({"weight": packed}, strict=False),
    "assigned": lambda layer, packed: layer.load_state_dict({"weight": packed}, strict=False, assign=True),
}


@pytest.mark.parametrize("rewrite", REWRITES.values(), ids=REWRITES.keys())
@pytest.mark.parametrize("grad", [False, True], ids=["eager", "operator"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_changed_weight_is_not_answered_from_a_derived_copy(
    backend: str, grad: bool, rewrite: Callable[[PackedBitLinear, Tensor], object]
) -> None:
    layer, x = PackedBitLinear(40, 12, bias=False, backend=backend), grid(2, 40).requires_grad_(grad)
    assert torch.equal(layer(x), torch.zeros(2, 12))
    packed = trits(12, 40)
    with torch.no_grad():
        rewrite(layer, packed)
    expected = PackedBitLinear(40, 12, bias=False, backend="reference")
    expected.weight = packed
    assert torch.equal(layer(x), expected(x))
    if grad:
        assert torch.equal(*(torch.autograd.grad(m(x).sum(), x)[0] for m in (layer, expected)))


def test_layers_made_in_inference_mode_run_outside_of_it_and_may_get_new_weights() -> None:
    with torch.inference_mode():
        layer = PackedBitLinear(40, 12)
    x = grid(2, 40)
    assert torch.equal(layer(x), torch.zeros(2, 12))
    layer.weight = trits(12, 40)
    expected = PackedBitLinear(40, 12, backend="reference")
    expected.weight = layer.weight
    assert torch.equal(layer(x), expected(x))


@pytest.fixture(params=["cold", "called"])
def watched(request: pytest.FixtureRequest) -> PackedBitLinear:
    """A layer that native kernels have, or have not, run already."""
    layer = PackedBitLinear(40, 12, bias=False)
    layer.weight = trits(12, 40)
    if request.param == "called":
        layer(grid(2, 40))
    return layer


def test_a_trace_by_make_fx_computes_the_same(watched: PackedBitLinear) -> None:
    traced = make_fx(watched)(torch.zeros(2, 40))
    x = grid(2, 40)
    assert torch.equal(traced(x), watched(x))


@pytest.mark.parametrize("training", [False, True], ids=["packed", "training"])
def test_forward_differentiation_is_refused(training: bool, watched: PackedBitLinear) -> None:
    """Fails if the tangent is dropped without a word."""
    layer = BitLinear(40, 12, bias=False) if training else watched
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match=r"forward|jvp"):
        layer(forward_ad.make_dual(grid(2, 40), grid(2, 40)))


def test_second_derivatives_are_refused() -> None:
    """Fails if a gradient penalty has a zero where the derivative of the weight should be."""
    layer, x = BitLinear(8, 4), torch.randn(3, 8, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        slope.square().sum().backward()


@pytest.mark.parametrize("training", [False, True], ids=["packed", "training"])
def test_operations_are_counted(training: bool, watched: PackedBitLinear) -> None:
    layer = BitLinear(40, 12, bias=False) if training else watched
    with FlopCounterMode(display=False) as counter:
        layer(grid(2, 40))
    assert counter.get_total_flops() == 2 * 2 * 40 * 12


def test_an_exported_program_holds_the_stored_bytes(watched: PackedBitLinear) -> None:
    exported = torch.export.export(watched, (torch.zeros(2, 40),))
    held = [*exported.state_dict.values(), *exported.constants.values()]
    assert any(torch.equal(t, watched.weight) for t in held if t.shape == watched.weight.shape)
    assert not any(t.numel() > watched.weight.numel() for t in held)
    x = grid(2, 40)
    assert torch.equal(exported.module()(x), watched(x))


def test_vmap_gives_the_same_or_says_no(watched: PackedBitLinear) -> None:
    x = grid(3, 2, 40)
    try:
        y = torch.func.vmap(watched)(x)
    except (RuntimeError, NotImplementedError):
        return
    assert torch.equal(y, watched(x))
