"""Layers whose activations are rotated (hadamard=BLOCK): kernels, gradients, surgery, files, conversion.

The oracle is a Sylvester matrix in float64.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny import IDS, Mlp, gpt2, llama
from torch import Tensor
from transformers import AutoModelForCausalLM

import bitnet
from bitnet import BitLinear, PackedBitLinear
from bitnet.cli import main
from bitnet.kernels import backends, reference, rotation
from bitnet.kernels.cpu import latent as cpu_latent
from bitnet.kernels.cpu import library as cpu_library

QUIET = Console(quiet=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OPTIONS: list[dict[str, Any]] = [
    {"hadamard": 32},
    {"hadamard": 16, "hadamard_signs": True},
    {"hadamard": 64, "group_size": 64, "activation_bits": 16},
    {"hadamard": 32, "per_row": True, "activation_bits": 4, "hadamard_signs": True},
    {"hadamard": 64, "weights": "binary", "group_size": 32, "centered": False},
    {"hadamard": 32, "activation_bits": None},
    {"hadamard": 32, "rms_norm": True},
]


def sylvester(block: int) -> Tensor:
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return torch.from_numpy(matrix / block**0.5)


def rotate(x: Tensor, block: int, signs: Tensor | None) -> Tensor:
    """H (signs x) in float64."""
    x = x.double() if signs is None else x.double() * signs
    return (x.unflatten(-1, (-1, block)) @ sylvester(block).T).flatten(-2)


def some_signs(k: int) -> Tensor:
    return torch.randint(0, 2, (k,), dtype=torch.int8) * 2 - 1


@pytest.mark.skipif(isinstance(cpu_library.load(), str), reason="the native library is not built")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "block"), [(2, 2), (12, 4), (24, 8), (48, 16), (8192, 8192), (3 * 128, 128)])
def test_the_native_transform_has_the_definitions_bits(dtype: torch.dtype, k: int, block: int) -> None:
    x = torch.randn(2, 3, k).to(dtype)
    x[0, 1, 0], x[1, 0, 1], x[1, 1, 0] = torch.inf, torch.nan, -torch.inf
    for signs in (None, some_signs(k)):
        for view in (x, x.transpose(0, 1), torch.cat([x, x], -1)[..., :k], x[:0]):
            got, expected = cpu_latent.hadamard(view, block, signs), reference.hadamard(view, block, signs)
            assert torch.equal(got.isnan(), expected.isnan())
            assert torch.equal(got.nan_to_num(0, 1, 2), expected.nan_to_num(0, 1, 2))


@pytest.mark.parametrize("signs", [None, some_signs(64)])
def test_its_gradient_is_that_of_the_matrix(signs: Tensor | None) -> None:
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    gy = torch.randn(3, 64)
    (gx,) = torch.autograd.grad(rotation.hadamard(x.float(), 16, signs), x, gy)
    leaf = x.detach().requires_grad_()
    (expected,) = torch.autograd.grad(rotate(leaf, 16, signs), leaf, gy.double())
    assert torch.allclose(gx, expected, atol=1e-6)


def test_blocks_that_cannot_be_are_refused_before_anything_runs() -> None:
    for block in (0, 1, 3, 16384, True, "16"):
        with pytest.raises(ValueError, match="power of two"):
            bitnet.QuantSpec(hadamard=block)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="96 features are no multiple of hadamard=64"):
        BitLinear(96, 8, hadamard=64)
    with pytest.raises(ValueError, match="96 features are no multiple of hadamard=64"):
        PackedBitLinear(96, 8, hadamard=64)
    with pytest.raises(ValueError, match="hadamard=BLOCK"):
        bitnet.QuantSpec(hadamard_signs=True)
    with pytest.raises(ValueError, match="no multiple of the block"):
        rotation.hadamard(torch.zeros(2, 20), 8)
    with pytest.raises(ValueError, match="signs must be int8"):
        rotation.hadamard(torch.zeros(2, 16), 8, torch.ones(16))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_trained_is_what_is_packed(options: dict[str, Any]) -> None:
    layer = BitLinear(192, 70, **options)
    packed = copy.deepcopy(layer)
    bitnet.pack(packed_model := torch.nn.Sequential(packed))
    for dtype in DTYPES:
        x = torch.randn(5, 192).to(dtype)
        x[0, 3] = 100
        layer.to(dtype), packed_model.to(dtype)
        codes, scale = packed.codes(), packed.weight_scale
        with torch.no_grad():
            y = x if layer.rms_norm is None else layer.rms_norm(x)
            y = reference.hadamard(y, options["hadamard"], layer.signs)
            expected = reference.ternary_linear(y, codes, scale, packed.bias, packed.spec.activation_bits)
            for backend in ("auto", "torch", "reference"):
                packed.set_backend(backend, activation_bits=None)
                assert torch.equal(packed(x), expected), backend
        if dtype == torch.float32:  # the latent weight was packed in float32
            assert torch.equal(layer.eval()(x), expected)


def test_a_swap_leaves_the_float_function_and_an_unpacking_gives_it_back() -> None:
    torch.manual_seed(0)
    for signs in (False, True):
        model = Mlp()
        x = torch.randn(4, model.up.in_features)
        expected = model(x)
        bitnet.replace_linear(model, hadamard=8, hadamard_signs=signs)
        bitnet.set_strength(model, 0.0)
        assert torch.allclose(model.train()(x), expected, atol=1e-5)
        assert not torch.allclose(model.eval()(x), expected, atol=1e-3)
        bitnet.pack(model)
        weight = model.up.codes() * model.up.weight_scale
        back = rotate(weight, 8, None)
        back = back if model.up.signs is None else back * model.up.signs
        bitnet.unpack(model)
        assert torch.allclose(model.up.weight.double(), back, atol=1e-6)


def test_layers_that_no_block_divides_stay_float_and_the_report_says_why() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(96, 64), torch.nn.Linear(64, 8))
    report = bitnet.replace_linear(model, hadamard=64)
    assert type(model[0]) is torch.nn.Linear
    assert isinstance(model[1], BitLinear)
    assert "96 features are no multiple of hadamard=64" in str(report)


@pytest.mark.parametrize("options", [{"hadamard": 16}, {"hadamard": 32, "hadamard_signs": True, "group_size": 32}])
def test_checkpoints_keep_the_rotation(tmp_path: Path, options: dict[str, Any]) -> None:
    model = llama(hidden_size=64, intermediate_size=96)
    bitnet.replace_linear(model, **options)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, BitLinear) and module.signs is not None:
                module.signs.copy_(some_signs(module.in_features))  # not those of a fresh layer
    latent_logits = model.eval()(IDS).logits
    bitnet.save(model, tmp_path / "latent")
    loaded = bitnet.load(tmp_path / "latent")
    assert torch.equal(loaded.eval()(IDS).logits, latent_logits)
    bitnet.pack(model)
    logits = model(IDS).logits
    bitnet.save(model, tmp_path / "packed")
    assert torch.equal(bitnet.load(tmp_path / "packed")(IDS).logits, logits)
    assert torch.equal(logits, latent_logits)
    bitnet.convert_checkpoint(tmp_path / "packed", tmp_path / "float", "bf16", tokenizer=False, console=QUIET)
    unpacked = bitnet.load(tmp_path / "packed")
    bitnet.unpack(unpacked, torch.bfloat16)
    floats = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.bfloat16)
    for name, tensor in floats.state_dict().items():
        assert torch.equal(tensor, unpacked.state_dict()[name].bfloat16()), name


def test_a_conversion_rotates_as_a_swap_does(tmp_path: Path) -> None:
    model = llama(hidden_size=64, intermediate_size=96)
    model.save_pretrained(tmp_path / "float")
    bitnet.replace_linear(model, hadamard=32, group_size=32)
    bitnet.convert_checkpoint(
        tmp_path / "float", tmp_path / "latent", "latent", tokenizer=False, console=QUIET, hadamard=32, group_size=32
    )
    assert torch.equal(bitnet.load(tmp_path / "latent").eval()(IDS).logits, model.eval()(IDS).logits)
    command = ["convert", str(tmp_path / "float"), str(tmp_path / "typed"), "--to", "latent", "--no-tokenizer"]
    assert main([*command, "--rotate", "32", "--group-size", "32"]) == 0
    assert torch.equal(bitnet.load(tmp_path / "typed").eval()(IDS).logits, model.eval()(IDS).logits)
    bitnet.pack(model)
    bitnet.convert_checkpoint(
        tmp_path / "float", tmp_path / "hub", "hub", tokenizer=False, console=QUIET, hadamard=32, group_size=32
    )
    assert torch.equal(bitnet.load(tmp_path / "hub")(IDS).logits, model(IDS).logits)
    with pytest.raises(ValueError, match="rotates its activations"):
        bitnet.convert_checkpoint(tmp_path / "hub", tmp_path / "x.gguf", "gguf-q2_0", tokenizer=False, console=QUIET)


@pytest.mark.parametrize("transposed", [False, True], ids=["llama", "gpt2"])
def test_a_conversion_draws_signs_as_a_swap_does(transposed: bool, tmp_path: Path) -> None:
    """The float model stays what it is; trained, packed, saved, loaded and served are one."""
    torch.manual_seed(0)
    model = gpt2() if transposed else llama(hidden_size=64, intermediate_size=96)
    model.save_pretrained(tmp_path / "float")
    expected = model.eval()(IDS).logits
    options: dict[str, Any] = {"hadamard": 8, "hadamard_signs": True, "signs_seed": 7, "group_size": 32}
    bitnet.replace_linear(model, **options)
    for to in ("latent", "hub"):
        bitnet.convert_checkpoint(tmp_path / "float", tmp_path / to, to, tokenizer=False, console=QUIET, **options)
    command = ["convert", str(tmp_path / "float"), str(tmp_path / "typed"), "--to", "latent", "--no-tokenizer"]
    assert main([*command, "--rotate", "8", "--rotate-signs", "7", "--group-size", "32"]) == 0
    quantized = model.eval()(IDS).logits
    for name in ("latent", "typed"):
        found = bitnet.load(tmp_path / name)
        assert torch.equal(found.eval()(IDS).logits, quantized)
        bitnet.set_strength(found.train(), 0.0)
        if not transposed:  # without dropout
            assert torch.allclose(found(IDS).logits, expected, atol=1e-5)
    state = bitnet.load(tmp_path / "hub").state_dict()
    bitnet.pack(model)
    assert torch.equal(model(IDS).logits, quantized)
    assert torch.equal(bitnet.load(tmp_path / "hub")(IDS).logits, quantized)
    bitnet.save(model, tmp_path / "saved")
    assert torch.equal(bitnet.load(tmp_path / "saved")(IDS).logits, quantized)
    signs = {key: value for key, value in state.items() if key.endswith(".signs")}
    assert signs
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in signs.items())


def test_signs_go_by_the_seed_and_the_number_of_features() -> None:
    def drawn(**options: Any) -> list[Tensor]:
        model = torch.nn.ModuleList([torch.nn.Linear(k, 8) for k in (64, 64, 96)])
        bitnet.replace_linear(model, hadamard=32, hadamard_signs=True, **options)
        return [layer.signs for layer in model]  # type: ignore[misc]

    one, other = drawn(signs_seed=1), drawn(signs_seed=2)
    assert torch.equal(one[0], one[1])
    assert not torch.equal(one[0], one[2][:64])
    assert all(map(torch.equal, one, drawn(signs_seed=1)))
    assert not any(map(torch.equal, one, other))
    assert all(
        map(torch.equal, drawn(), [BitLinear(k, 8, hadamard=32, hadamard_signs=True).signs for k in (64, 64, 96)])
    )
    with pytest.raises(ValueError, match="signs_seed=3 is an option of hadamard_signs=True, which is missing"):
        bitnet.replace_linear(torch.nn.Linear(64, 8), hadamard=32, signs_seed=3)


def test_a_rotated_layer_is_one_graph_for_the_compiler_and_for_export() -> None:
    layer = BitLinear(64, 48, hadamard=32, hadamard_signs=True)
    x = torch.randn(3, 64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = compiled(leaf), layer(other)
    assert torch.equal(y, expected)
    y.sum().backward(), expected.sum().backward()
    assert leaf.grad is not None
    assert other.grad is not None
    assert torch.equal(leaf.grad, other.grad)
    model = torch.nn.Sequential(layer.eval())
    bitnet.pack(model)
    program = torch.export.export(model, (x,)).module()
    with torch.no_grad():
        assert torch.equal(program(x), model(x))
    torch._dynamo.reset()


def test_a_model_is_loaded_with_the_activations_asked_for(tmp_path: Path) -> None:
    model = llama(hidden_size=64, intermediate_size=96)
    bitnet.replace_linear(model, activation_bits=None)
    trained = model.eval()(IDS).logits
    bitnet.pack(model)
    bitnet.save(model, tmp_path)
    assert torch.equal(bitnet.load(tmp_path, activation_bits=None)(IDS).logits, trained)
    found = bitnet.load(tmp_path, activation_bits=8)
    assert {m.activation_bits for m in found.modules() if isinstance(m, PackedBitLinear)} == {8}
    assert not torch.equal(found(IDS).logits, trained)
    with torch.no_grad():
        assert torch.allclose(bitnet.load(tmp_path)(IDS).logits, trained, rtol=1e-2, atol=1e-3)


def test_float_activations_are_served_in_16_bits_where_the_kernels_take_integers() -> None:
    layer = PackedBitLinear(96, 40, activation_bits=None)
    layer.weight.random_(0, 3).mul_(0x15)
    x = torch.randn(4, 96)
    exact = x.double() @ layer.codes().double().T
    native = backends.choose_backend("auto", torch.device("cpu")) == "cpu"
    with torch.no_grad():
        assert layer.activation_bits == (16 if native else None)
        assert ("run as int16" in repr(layer)) == native
        error = (layer(x) - exact).norm()
        layer.set_backend(activation_bits=8)
        assert torch.equal(layer(x), reference.ternary_linear(x, layer.codes(), layer.weight_scale, layer.bias, 8))
        layer.set_backend(activation_bits=None)
        assert layer.prepack()[1] == "torch"
        assert torch.equal(layer(x), reference.float_linear(x, layer.codes(), layer.weight_scale, layer.bias))
        bf16 = layer.to(torch.bfloat16)(x.bfloat16()).double()
    assert error < (bf16 - exact).norm() / 20
    with pytest.raises(ValueError, match="activation_bits must be"):
        layer.set_backend(activation_bits=4)
