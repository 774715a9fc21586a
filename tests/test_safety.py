"""Layers whose weight other code uses stay float, however that code gets at it; and those that are only called do not.

A swap that is bypassed computes in float what the report calls ternary, and cannot run once it is packed.
"""

import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bitnet
from bitnet.linear import BitLayer, BitLinear


class Base(nn.Module):
    """Two layers by name, two in a list; subclasses use fc, or what is in net."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(8, 8), nn.Linear(8, 8)
        self.net = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.table = nn.ModuleDict({"a": nn.Linear(8, 8)})


def times(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def through(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def fc_of(module: Any, x: Tensor) -> Tensor:
    return x @ module.fc.weight


def decorated(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        return function(*args, **kwargs)

    return wrapper


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight


class Helper:
    """No module, and so in nobody's list of modules."""

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer

    def run(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)

    def pass_through(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Applies(nn.Module):
    def forward(self, x: Tensor, layer: nn.Linear) -> Tensor:
        return F.linear(x, layer.weight)


class AnIndex(Base):
    reads = ("net.0", "net.1")

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.net[0].weight), self.net[-1].weight)


class AVariableIndex(Base):
    reads = ("net.0", "net.1")

    def forward(self, x: Tensor) -> Tensor:
        for i in range(2):
            x = F.linear(x, self.net[i].weight)
        return x


class ALoop(Base):
    reads = ("net.0", "net.1")

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.net):
            x = F.linear(x, layer.weight, layer.bias) + i
        return x


class AComprehension(Base):
    reads = ("net.0", "net.1", "table.a")

    def forward(self, x: Tensor) -> Tensor:
        stacked = torch.stack([layer.weight for layer in self.net])
        return x @ stacked[0] @ sum(layer.weight for _, layer in self.table.items())


class ALocalName(Base):
    reads = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        first = self.fc
        x = self.out(x)
        return F.linear(x, first.weight, first.bias)


class ATuple(Base):
    reads = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        (w, b), y = (self.fc.weight, self.fc.bias), self.out(x)
        return F.linear(y, w, b)


class ANameGivenLater(Base):
    reads = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.out
        for _ in range(2):
            x = F.linear(x, layer.weight) if layer is not self.out else layer(x)
            layer = self.fc
        return x


class AWalrus(Base):
    reads = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        return x @ w if (w := self.fc.weight) is not None else x


class AHelper(Base):
    reads = ("fc", "out")

    def forward(self, x: Tensor) -> Tensor:
        return times(layer=self.out, x=times(self.fc, x))


class AHelperThatGetsAll(Base):
    reads = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        return fc_of(self, self.out(x))


class AHelperOfPartials(Base):
    reads = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        return functools.partial(times, self.fc)(x)


class AHelperThatAnotherCalls(Base):
    reads = ("fc", "net.0", "net.1")

    def forward(self, x: Tensor) -> Tensor:
        x = functools.reduce(lambda y, layer: F.linear(y, layer.weight), self.net, self.out(x))
        return checkpoint(times, self.fc, x, use_reentrant=False)


class AHelperInAnAttribute(Base):
    reads = ("fc",)

    def __init__(self) -> None:
        super().__init__()
        self.function = times

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.fc, x)


class AHelperObject(Base):
    reads = ("fc",)

    def __init__(self) -> None:
        super().__init__()
        self.helper = Helper(self.fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.helper.run(x)


class AMethod(Base):
    reads = ("fc",)

    def apply_to(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return x @ layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_to(self.fc, self.out(x))


class ADecoratedMethod(Base):
    reads = ("fc",)

    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.fc.weight


class AMethodThatReturnsIt(Base):
    reads = ("fc",)

    def pick(self) -> nn.Linear:
        return self.fc

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.pick().weight


class AGenerator(Base):
    reads = ("net.0", "net.1")

    def each(self) -> Iterator[nn.Module]:
        yield from self.net

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.each():
            x = x @ layer.weight
        return x


class AProperty(Base):
    reads = ("fc",)

    @property
    def matrix(self) -> Tensor:
        return self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrix


class AClosure(Base):
    reads = ("fc", "out")

    def forward(self, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return F.linear(x, self.fc.weight)

        return (lambda x: x @ self.out.weight)(inner(x))


class ABaseClass(AnIndex):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.out(x))


class GetattrByName(Base):
    reads = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        return x @ getattr(getattr(self, "fc"), "weight")  # noqa: B009


class GetattrByAnyName(Base):
    reads = ("fc", "out")

    def forward(self, x: Tensor) -> Tensor:
        for name in ("f" + "c", "out"):
            x = x @ getattr(self, name).weight
        return x


class TheDictOfParameters(Base):
    reads = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.fc._parameters["weight"]


class GetParameter(Base):
    reads = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.get_parameter("fc.weight")


class AllParameters(Base):
    reads = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, *self.fc.parameters())


class TheStateDict(Base):
    reads = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.state_dict()["fc.weight"]


class AFunctionalCall(Base):
    reads = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        doubled = {name: 2 * parameter for name, parameter in self.fc.named_parameters()}
        return torch.func.functional_call(self.fc, doubled, (x,))


class AListOfParameters(Base):
    reads = ("net.0", "net.1")

    def __init__(self) -> None:
        super().__init__()
        self.matrices = [layer.weight for layer in self.net]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.matrices[0] @ self.matrices[1]


class ALayerInAPlainList(Base):
    reads = ("fc",)

    def __init__(self) -> None:
        super().__init__()
        self.unseen = [self.fc]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.unseen[0].weight


class AnotherModule(Base):
    reads = ("fc",)

    def __init__(self) -> None:
        super().__init__()
        self.applies = Applies()

    def forward(self, x: Tensor) -> Tensor:
        return self.applies(x, self.fc)


class AnAutogradFunction(Base):
    reads = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x, self.fc.weight)


class AnotherDtype(Base):
    """Packed, the layer would be given uint8."""

    reads = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.to(self.fc.weight.dtype))


class AllModules(Base):
    reads = ("fc", "net.0")

    def forward(self, x: Tensor) -> Tensor:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                x = F.linear(x, module.weight)
        return x


class AChoice(Base):
    reads = ("net.0", "net.1")

    def forward(self, x: Tensor) -> Tensor:
        return x @ random.choice(self.net).weight


class AnUnknownFunction(Base):
    """Whatever is passed in may read it."""

    reads = ("fc",)

    def forward(self, x: Tensor, function: Any = None) -> Tensor:
        return function(self.fc, x)


class Unused(Base):
    """Nothing calls fc, so nothing shows that a swap would do anything."""

    reads = ("fc",)

    def forward(self, x: Tensor) -> Tensor:
        return self.table["a"](self.net[1](self.net[0](self.out(x))))


READERS = [
    *Base.__subclasses__(),
    ABaseClass,
]


def also_called(cls: type[Any]) -> type[Any]:
    class Called(cls):
        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.fc, self.out, *self.net, *self.table.values()):
                x = layer(x)
            return super().forward(x)

    return Called


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("cls", READERS, ids=lambda cls: cls.__name__)
def test_a_weight_read_without_a_call_stays_float(cls: type[Any], called: bool) -> None:
    if called and cls is Unused:
        pytest.skip("nothing is unused then")
    model = nn.Sequential((also_called(cls) if called else cls)())
    report = bitnet.replace_linear(model)
    kept = {row.name: row.reason for row in report.rows if row.action == "kept"}
    for name in cls.reads:
        assert type(model.get_submodule(f"0.{name}")) is nn.Linear
        assert kept[f"0.{name}"]


@pytest.mark.parametrize("cls", [AnIndex, ALoop, ALocalName, AHelper, AMethod, AClosure, ABaseClass, AHelperObject])
def test_a_read_that_is_certain_cannot_be_overridden(cls: type[Any]) -> None:
    model = cls()
    report = bitnet.replace_linear(model, include=r".*\d|fc|out")
    for name in cls.reads:
        assert type(model.get_submodule(name)) is nn.Linear
        assert f"{cls.__name__} uses {name}.weight directly" in [row.reason for row in report.rows if row.name == name]


WITHOUT_SOURCE = {
    "in forward": "def forward(self, x):\n    return x @ self.fc.weight",
    "in a method": "def forward(self, x):\n    return self.run(x)\n\ndef run(self, x):\n    return x @ self.fc.weight",
    "in a helper": "def forward(self, x):\n    return helper(self.fc, x)",
    "by getattr": "def forward(self, x):\n    return x @ getattr(self.fc, 'wei' + 'ght')",
    "in a list": "def forward(self, x):\n    return x @ self.fc.parameters().__next__()",
}


def without_source(text: str) -> type[Any]:
    names: dict[str, Any] = {"__name__": "elsewhere"}
    exec("def helper(layer, x):\n    return x @ layer.weight", names)
    exec(text, names)
    methods = {name: value for name, value in names.items() if name in ("forward", "run")}
    return type("WithoutSource", (Base,), methods)


@pytest.mark.parametrize("text", WITHOUT_SOURCE.values(), ids=WITHOUT_SOURCE)
def test_code_without_source_counts_as_reading_what_it_may_read(text: str) -> None:
    model = without_source(text)()
    report = bitnet.replace_linear(model)
    assert type(model.fc) is nn.Linear
    assert all("include=" in row.reason for row in report.rows if row.name == "fc")
    bitnet.replace_linear(model, include="fc")
    assert isinstance(model.fc, BitLayer)


def test_code_without_source_that_only_calls_is_swapped() -> None:
    model = without_source("def forward(self, x):\n    return self.out(self.fc(x).relu()) + self.net[0].in_features")()
    assert bitnet.replace_linear(model).low_bit_weights == 5 * 64


class Calls(Base):
    """All the ways to call that must not count as anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen = [self.fc]
        self.helper = Helper(self.out)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Sequential(nn.Linear(8, 8)))
        self.hook = None
        self.extra0, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    skipped = ("bias",)

    @property
    def size(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def optimizer(self) -> torch.optim.Optimizer:
        decayed = [parameter for _, parameter in self.named_parameters() if parameter.dim() > 1]
        return torch.optim.AdamW([{"params": decayed}])

    def forward(self, x: Tensor, function: Any = None) -> Tensor:
        x = self.norm(x).to(next(self.parameters()).dtype).to(self.fc.weight.device)
        for i, layer in enumerate(self.net):
            x = layer(x) * i
        for (name, layer), other in zip(self.table.items(), self.unseen, strict=True):
            x = through(layer, x) + other(x) + len(name)
        x = checkpoint(self.block, x, use_reentrant=False)
        x = self.helper.pass_through(x) if self.fc.bias is not None else x
        if function is not None:
            x = self.hook(self, function(x))
        if hasattr(self, "other_hook"):
            self.other_hook.run(self)
        if any(name in self.skipped for name, _ in self.named_parameters()):
            return x
        names = [f"extra{i}" for i in range(1)]
        return functools.reduce(lambda y, name: getattr(self, name)(y), names, x) / self.fc.in_features


def test_layers_that_are_only_called_are_swapped() -> None:
    model, x = Calls().eval(), torch.randn(3, 8)
    before = model(x)
    report = bitnet.replace_linear(model)
    assert report.low_bit_weights == report.weights == 8 * 64
    assert not torch.equal(model(x), before)
    trained = model(x)
    bitnet.pack(model)
    assert torch.equal(model(x), trained)


def test_containers_that_are_called_from_outside_are_swapped() -> None:
    model = nn.ModuleDict({"encoder": nn.ModuleList([nn.Linear(8, 8)]), "decoder": nn.Linear(8, 8)})
    assert bitnet.replace_linear(model).low_bit_weights == 2 * 64


class Fused(nn.Module):
    """As diffusers' Attention: a method that nobody calls reads the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.to_q(x)

    def fuse(self) -> Tensor:
        return torch.cat([self.to_q.weight, self.to_q.weight])


def test_a_method_that_nobody_calls_keeps_a_layer_unless_it_is_included() -> None:
    model = Fused()
    (row,) = bitnet.replace_linear(model).rows
    assert row.reason == "Fused uses to_q.weight directly, in fuse; include= swaps it all the same"
    bitnet.replace_linear(model, include="to_q")
    assert isinstance(model.to_q, BitLayer)


# Subclasses of nn.Linear


class Same(nn.Linear):
    """As Falcon's."""

    def forward(self, input: Tensor) -> Tensor:
        y = input @ self.weight.T
        return y if self.bias is None else y + self.bias


class Renamed(nn.Linear):
    pass


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Dropped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(super().forward(input), 0.05, self.training)


class Clamped(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-100, 100)


class Biasless(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


class Pair(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), self.bias


class Flat(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.flatten(0, 1))


class WithMore(nn.Linear):
    """Others may call what a BitLinear lacks."""

    def double(self) -> None: ...


class Scaled(nn.Linear):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.gain


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cls", [Same, Renamed])
def test_a_subclass_that_computes_the_same_is_swapped_and_comes_back(cls: type[nn.Linear], bias: bool) -> None:
    model, x = nn.Sequential(cls(8, 8, bias)).eval(), torch.randn(3, 8)
    state = torch.get_rng_state()
    assert bitnet.replace_linear(model).low_bit_weights == 64
    assert torch.equal(torch.get_rng_state(), state)
    trained = model(x)
    bitnet.pack(model)
    assert torch.equal(model(x), trained)
    bitnet.unpack(model)
    assert type(model[0]) is cls


@pytest.mark.parametrize("cls", [Doubled, Dropped, Clamped, Biasless, Pair, Flat, WithMore, Scaled])
def test_a_subclass_with_behaviour_of_its_own_is_kept(cls: type[nn.Linear]) -> None:
    model = nn.Sequential(cls(8, 8))
    report = bitnet.replace_linear(model, include="0")
    assert type(model[0]) is cls
    assert f"a subclass of nn.Linear ({cls.__name__})" in report.rows[0].reason


def test_a_lazy_layer_is_kept_and_the_rest_is_swapped() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    report = bitnet.replace_linear(model)
    assert [(row.action, row.weights) for row in report.rows] == [("ternary", 64), ("kept", 0)]
    assert "run the model once" in report.rows[1].reason
    assert "LazyLinear" in str(report)
    model(torch.randn(2, 8))
    assert bitnet.replace_linear(model).low_bit_weights == 128


# torch's own Transformer layers


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_torchs_transformer_layers_are_swapped_and_run_without_their_fast_path(
    norm_first: bool, activation: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"batch_first": True, "norm_first": norm_first, "activation": activation}

    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(8, 2, 16, **options)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()

    model, x, padding = build(), torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    report = bitnet.replace_linear(model)
    assert report.low_bit_weights == 2 * 2 * 8 * 16
    assert all("attention" in row.reason.lower() for row in report.rows if row.action == "kept")
    with torch.no_grad():
        fast, padded = model(x), model(x, src_key_padding_mask=padding)
        with monkeypatch.context() as patch:  # a hook would turn the fast path off by itself
            patch.setattr(BitLinear, "forward", lambda self, input: torch.zeros(*input.shape[:-1], self.out_features))
            assert not torch.equal(model(x), fast)
    bitnet.pack(model)
    with torch.no_grad():
        assert torch.equal(model(x), fast)
        assert torch.equal(model(x, src_key_padding_mask=padding), padded)
    bitnet.save(model, tmp_path / "model")
    loaded = bitnet.load(tmp_path / "model", build())
    with torch.no_grad():
        assert torch.equal(loaded(x), fast)
        assert torch.equal(loaded(x, src_key_padding_mask=padding), padded)
    fresh = build()
    bitnet.unpack(model)
    assert model.use_nested_tensor == fresh.use_nested_tensor
    assert model.layers[0].activation_relu_or_gelu == fresh.layers[0].activation_relu_or_gelu


def test_torchs_decoder_layers_are_swapped() -> None:
    model, x = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 3, 8)
    assert bitnet.replace_linear(model).low_bit_weights == 2 * 8 * 16
    trained = model(x, x)
    bitnet.pack(model)
    assert torch.equal(model(x, x), trained)
