"""replace_linear, pack and unpack on any module: what may be swapped, what must not, and what the report says."""

import copy
import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import bitnet
from bitnet import BitLinear, PackedBitLinear


class Block(nn.Module):
    """Names that contain one another."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("gate", "gate_proj", "aggregate", "fc1", "xfc1"):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.xfc1(self.fc1(x) * self.gate_proj(x)) + self.aggregate(x) * self.gate(x).sigmoid()


class Net(nn.Module):
    """Not from Hugging Face; the output layer is called as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


class Reader(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self, fc: nn.Linear) -> None:
        super().__init__()
        self.fc = fc

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight, self.fc.bias)


class Caller(nn.Module):
    def __init__(self, fc: nn.Linear) -> None:
        super().__init__()
        self.fc = fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class NestedReader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Caller(nn.Linear(8, 8))
        self.other = Caller(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.other(F.linear(x, self.mlp.fc.weight, self.mlp.fc.bias))


class Initialised(nn.Module):
    """Touches the weight while it is built, never afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        nn.init.orthogonal_(self.fc.weight)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Table(nn.Module):
    """An embedding that is no nn.Embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight[x]


class OwnLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def llama(**config: Any) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes, **config))


def low_bit(model: nn.Module) -> set[str]:
    return {name for name, m in model.named_modules() if isinstance(m, BitLinear | PackedBitLinear)}


def reasons(report: bitnet.Report) -> dict[str, str]:
    return {row.name: row.reason for row in report.rows if row.action == "kept"}


def both(*leaves: str) -> set[str]:
    return {f"blocks.{i}.{leaf}" for i in range(2) for leaf in leaves}


SWAPPED = both("gate_proj", "aggregate", "fc1", "xfc1")  # of a Net, without options


# Choosing layers


@pytest.mark.parametrize(
    ("pattern", "hit"),
    [
        ("fc1", both("fc1")),
        ("x?fc1", both("fc1", "xfc1")),
        ("gate_proj|aggregate", both("gate_proj", "aggregate")),
        (r"blocks\.1\.fc1", {"blocks.1.fc1"}),
        (r"1\.fc1", {"blocks.1.fc1"}),
        (r"blocks\.0\..*1", {name for name in both("fc1", "xfc1") if ".0." in name}),
        (re.compile("FC1", re.IGNORECASE), both("fc1")),
        (lambda name, module: name.endswith("fc1"), both("fc1", "xfc1")),
        (lambda name, module: type(module) is nn.Linear and name == "blocks.1.fc1", {"blocks.1.fc1"}),
        (["fc1", re.compile("xfc1"), lambda name, module: "agg" in name], both("fc1", "xfc1", "aggregate")),
    ],
    ids=lambda value: getattr(value, "pattern", value) if isinstance(value, str | re.Pattern) else "",
)
@pytest.mark.parametrize("which", ["skip", "include"])
def test_a_pattern_hits_the_layers_it_names_only(which: str, pattern: Any, hit: set[str]) -> None:
    net = Net()
    report = bitnet.replace_linear(net, **{which: pattern})
    assert low_bit(net) == (hit if which == "include" else SWAPPED - hit)
    why = "not included" if which == "include" else "skipped by request"
    left = {name for name, reason in reasons(report).items() if reason == why}
    assert left == ({"head", *both("gate"), *SWAPPED} - hit if which == "include" else hit)


def test_gate_hits_neither_gate_proj_nor_aggregate() -> None:
    net = Net()
    report = bitnet.replace_linear(net)
    assert low_bit(net) == SWAPPED
    assert reasons(report) == {"head": "task head", **dict.fromkeys(both("gate"), "router")}
    net = Net()
    bitnet.replace_linear(net, include="gate")
    assert low_bit(net) == both("gate")


def test_include_overrides_a_default() -> None:
    net = Net()
    bitnet.replace_linear(net, include=["head", "fc1"])
    assert low_bit(net) == {"head", *both("fc1")}
    model = llama()
    bitnet.replace_linear(model, include="lm_head")
    assert low_bit(model) == {"lm_head"}


def test_include_beats_skip() -> None:
    net = Net()
    bitnet.replace_linear(net, include="x?fc1", skip="xfc1")
    assert low_bit(net) == both("fc1")


def test_an_empty_include_swaps_nothing() -> None:
    net = Net()
    report = bitnet.replace_linear(net, include=[])
    assert not low_bit(net)
    assert set(reasons(report).values()) == {"not included"}


@pytest.mark.parametrize("which", ["skip", "include"])
@pytest.mark.parametrize("pattern", ["lm_head", re.compile("fc"), lambda name, module: False, ["fc1", "blocks"]])
def test_a_pattern_without_a_match_is_refused(which: str, pattern: Any) -> None:
    net = Net()
    with pytest.raises(ValueError, match=rf"{which}=.* none of the 11 linear layers; .* 'blocks\.0\.gate', ") as info:
        bitnet.replace_linear(net, **{which: pattern})
    if isinstance(pattern, str):
        assert repr(pattern) in str(info.value)
    assert not low_bit(net)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"weights": "quaternary"}, ValueError),
        ({"activation_bits": 5}, ValueError),
        ({"rms_norm_eps": 0}, ValueError),
        ({"weigths": "binary"}, TypeError),
        ({"skip": [3]}, TypeError),
        ({"include": 3}, TypeError),
    ],
)
def test_a_bad_option_is_refused_before_anything_changes(options: dict[str, Any], error: type[Exception]) -> None:
    net = Net()
    with pytest.raises(error):
        bitnet.replace_linear(net, **options)
    assert not low_bit(net)


@pytest.mark.parametrize("model", [nn.Linear, Net, "model", None])
def test_what_is_no_model_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module"):
        bitnet.replace_linear(model)


def test_options_of_an_earlier_call_stay() -> None:
    net = Net()
    bitnet.replace_linear(net, include="fc1", weights="binary")
    bitnet.replace_linear(net, skip=r"1\.xfc1", per_row=True)
    assert low_bit(net) == SWAPPED - {"blocks.1.xfc1"}
    for name in low_bit(net):
        spec = net.get_submodule(name).spec
        assert (spec.weights, spec.per_row) == (("binary", False) if name.endswith(".fc1") else ("ternary", True))


def test_a_layer_of_coordinates_stays_float_unless_included() -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({"place": nn.Linear(2, 8), "body": nn.Linear(8, 2)})

    model = build()
    assert reasons(bitnet.replace_linear(model)) == {"place": "takes 2 features, as of coordinates"}
    assert low_bit(model) == {"body"}
    model = build()
    bitnet.replace_linear(model, include="place")
    assert low_bit(model) == {"place"}


# Layers that something else uses: never swapped, whatever the user wants


def unsafe_models() -> dict[str, tuple[nn.Module, str, str]]:
    """model, the layer that must stay, what the reason says"""
    tied = nn.Sequential(OrderedDict(embed=nn.Embedding(6, 8), out=nn.Linear(8, 6)))
    tied.out.weight = tied.embed.weight
    table = nn.Sequential(OrderedDict(embed=Table(), out=nn.Linear(8, 6)))
    table.out.weight = table.embed.weight
    patched = nn.Sequential(nn.Linear(8, 8))
    patched[0].forward = lambda input: 2 * input
    shared = nn.Linear(8, 8)
    parametrized = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    hooked = nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 8)))
    return {
        "embedding": (tied, "out", "tied to the embedding embed"),
        "tied llama": (llama(tie_word_embeddings=True), "lm_head", "tied to the embedding model.embed_tokens"),
        "other table": (table, "out", "tied to embed"),
        "attention": (nn.MultiheadAttention(8, 2), "out_proj", "MultiheadAttention uses out_proj.weight directly"),
        "subclass": (nn.Sequential(OwnLinear(8, 8)), "0", "a subclass of nn.Linear (OwnLinear)"),
        "parametrized": (parametrized, "0", "ParametrizedLinear"),
        "computed weight": (hooked, "0", "its weight is computed"),
        "patched": (patched, "0", "its forward is patched"),
        "read": (Reader(nn.Linear(8, 8)), "fc", "Reader uses fc.weight directly"),
        "read by the grandparent": (NestedReader(), "mlp.fc", "NestedReader uses mlp.fc.weight directly"),
        "read under its second name": (nn.Sequential(Caller(shared), Reader(shared)), "0.fc", "Reader uses fc.weight"),
    }


@pytest.mark.parametrize("name", unsafe_models())
def test_an_unsafe_layer_is_kept(name: str) -> None:
    for include in (False, True):
        model, layer, why = unsafe_models()[name]
        before = type(model.get_submodule(layer))
        report = bitnet.replace_linear(model, **{"include": re.escape(layer)} if include else {})
        assert type(model.get_submodule(layer)) is before
        assert why in reasons(report)[layer]


def test_a_layer_that_a_constructor_initialises_is_swapped() -> None:
    model = Initialised()
    bitnet.replace_linear(model)
    assert low_bit(model) == {"fc"}


def test_the_neighbour_of_an_unsafe_layer_is_swapped() -> None:
    model = NestedReader()
    bitnet.replace_linear(model)
    assert low_bit(model) == {"other.fc"}


def test_a_layer_under_two_names_is_swapped_once_and_skipped_by_either() -> None:
    def build() -> nn.Module:
        shared = nn.Linear(8, 8)
        return nn.Sequential(OrderedDict(first=shared, between=nn.Linear(8, 8), second=shared))

    model = build()
    report = bitnet.replace_linear(model)
    assert type(model.first) is BitLinear
    assert model.first is model.second
    assert [row.name for row in report.rows] == ["first", "between"]
    x = torch.randn(3, 8)
    trained = model.eval()(x)
    bitnet.pack(model)
    assert model.first is model.second
    assert torch.equal(model(x), trained)
    for name in ("first", "second"):
        model = build()
        bitnet.replace_linear(model, skip=name)
        assert low_bit(model) == {"between"}


def test_linears_that_share_a_weight_go_on_sharing_it() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    bitnet.replace_linear(model)
    assert low_bit(model) == {"0", "1"}
    assert model[0].weight is model[1].weight
    x = torch.randn(3, 8)
    trained = model.eval()(x)
    bitnet.pack(model)
    assert torch.equal(model[0].codes(), model[1].codes())
    assert torch.equal(model(x), trained)


def test_a_layer_that_shares_a_weight_with_one_that_is_kept_is_kept() -> None:
    model = nn.ModuleDict({"body": nn.Linear(8, 8), "other": nn.Linear(8, 8), "score": nn.Linear(8, 8)})
    model.score.weight = model.body.weight
    assert reasons(bitnet.replace_linear(model)) == {"body": "shares its weight with score, which stays float"}
    assert low_bit(model) == {"other"}
    assert model.score.weight is model.body.weight


# What survives


def test_a_model_that_is_one_linear_is_swapped() -> None:
    model = nn.Linear(8, 6)
    x = torch.randn(3, 8)
    assert bitnet.replace_linear(model).low_bit_weights == 48
    assert type(model) is BitLinear
    trained = model.eval()(x)
    bitnet.pack(model)
    assert type(model) is PackedBitLinear
    assert torch.equal(model(x), trained)
    bitnet.unpack(model)
    assert type(model) is nn.Linear


def test_hooks_stay() -> None:
    net, x, calls = Net(), torch.randn(3, 8), []
    layer = net.blocks[0].fc1
    layer.register_forward_hook(lambda module, args, output: calls.append(type(module)))
    bitnet.replace_linear(net)
    net(x)
    bitnet.pack(net)
    net(x)
    assert net.blocks[0].fc1 is layer
    assert calls == [BitLinear, PackedBitLinear]


def test_accelerates_hooks_run_the_new_forward() -> None:
    net, x = Net().eval(), torch.randn(3, 8)
    hooked = copy.deepcopy(net)
    for module in hooked.modules():
        if isinstance(module, nn.Linear):
            add_hook_to_module(module, ModelHook())
    bitnet.replace_linear(net)
    bitnet.replace_linear(hooked)
    assert low_bit(hooked) == SWAPPED
    assert torch.equal(hooked(x), net(x))
    bitnet.pack(hooked)
    assert torch.equal(hooked(x), net(x))


def test_a_copy_shares_no_state_with_its_original() -> None:
    net, x = Net().eval(), torch.randn(3, 8)
    bitnet.replace_linear(net)
    trained, keys = net(x), list(net.state_dict())
    twin = copy.deepcopy(net)
    bitnet.pack(twin)
    packed_twin = copy.deepcopy(twin)
    assert list(net.state_dict()) == keys
    assert all(type(net.get_submodule(name)) is BitLinear for name in SWAPPED)
    for model in (net, twin, packed_twin):
        assert torch.equal(model(x), trained)
    packed_twin.blocks[0].fc1.weight.fill_(0b01010101)
    assert torch.equal(twin(x), trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_packing_leaves_the_output_in_any_dtype(dtype: torch.dtype) -> None:
    net, x = Net().to(dtype).eval(), torch.randn(3, 8, dtype=dtype)
    bitnet.replace_linear(net)
    trained = net(x)
    assert trained.dtype == dtype
    bitnet.pack(net)
    assert torch.equal(net(x), trained)


def test_a_model_without_data_is_swapped_and_packed_once_it_has_some() -> None:
    with torch.device("meta"):
        net = Net()
    bitnet.replace_linear(net)
    assert low_bit(net) == SWAPPED
    assert all(parameter.is_meta for parameter in net.parameters())
    with pytest.raises(ValueError, match=r"blocks\.0\.gate_proj.*meta"):
        bitnet.pack(net)
    assert all(type(net.get_submodule(name)) is BitLinear for name in SWAPPED)
    net.to_empty(device="cpu").load_state_dict(Net().state_dict())
    bitnet.pack(net)


# pack and unpack


def test_nothing_to_pack_or_unpack_is_an_error() -> None:
    net = Net()
    with pytest.raises(ValueError, match="no BitLinear layers; call"):
        bitnet.pack(net)
    with pytest.raises(ValueError, match="no PackedBitLinear layers"):
        bitnet.unpack(net)
    bitnet.replace_linear(net)
    bitnet.pack(net)
    with pytest.raises(ValueError, match="no BitLinear layers"):
        bitnet.pack(net)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_layer_is_named_and_the_model_stays_as_it_was(value: float) -> None:
    net = Net()
    bitnet.replace_linear(net)
    with torch.no_grad():
        net.blocks[1].xfc1.weight[2, 3] = value
    state = {key: tensor.data_ptr() for key, tensor in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"blocks\.1\.xfc1: .* 1 NaN or Inf"):
        bitnet.pack(net)
    assert all(type(net.get_submodule(name)) is BitLinear for name in SWAPPED)
    assert {key: tensor.data_ptr() for key, tensor in net.state_dict().items()} == state


@pytest.mark.parametrize("options", [{}, {"per_row": True}, {"weights": "binary"}], ids=str)
def test_unpacked_weights_are_codes_times_scale(options: dict[str, Any]) -> None:
    net = Net()
    bitnet.replace_linear(net, **options)
    biases = {name: net.get_submodule(name).bias.detach().clone() for name in SWAPPED}
    bitnet.pack(net)
    expected = {}
    for name in SWAPPED:
        layer = net.get_submodule(name)
        expected[name] = layer.codes().float() * layer.weight_scale.reshape(-1, 1)
    report = bitnet.unpack(net)
    assert not low_bit(net)
    assert report.low_bit_weights == 0
    assert list(net.state_dict()) == list(Net().state_dict())
    for name in SWAPPED:
        linear = net.get_submodule(name)
        assert type(linear) is nn.Linear
        assert torch.equal(linear.weight, expected[name])
        assert torch.equal(linear.bias, biases[name])
    net(torch.randn(2, 8)).sum().backward()
    assert all(net.get_submodule(name).weight.grad is not None for name in SWAPPED)


def test_unpack_drops_the_quantization_config() -> None:
    model = llama()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    assert model.config.quantization_config.linear_class == "bitlinear"
    assert model.is_quantized
    bitnet.unpack(model)
    assert not hasattr(model.config, "quantization_config")
    assert not model.is_quantized
    assert model.hf_quantizer is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unpacked_model_runs(dtype: torch.dtype) -> None:
    model = llama().to(dtype)
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.unpack(model)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(torch.arange(4)[None]).logits.isfinite().all()


def test_unpack_refuses_to_drop_an_rms_norm() -> None:
    net = Net()
    bitnet.replace_linear(net, include="fc1", rms_norm=True)
    bitnet.replace_linear(net)
    bitnet.pack(net)
    with pytest.raises(ValueError, match=r"blocks\.0\.fc1 has an RMSNorm"):
        bitnet.unpack(net)
    assert all(type(net.get_submodule(name)) is PackedBitLinear for name in SWAPPED)


# The report


@pytest.mark.parametrize("options", [{}, {"per_row": True}, {"rms_norm": True}, {"skip": "fc1"}], ids=str)
def test_the_report_counts_weights_and_bytes(options: dict[str, Any]) -> None:
    net = Net()
    net.append = nn.Linear(8, 7, bias=False)  # N % 4 != 0: packed rows are rounded up
    before = bitnet.replace_linear(net, **options)
    matrices = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    assert before.weights == sum(matrix.numel() for matrix in matrices)
    swapped = [net.get_submodule(name) for name in low_bit(net)]
    assert before.low_bit_weights == sum(layer.weight.numel() for layer in swapped)
    after = bitnet.pack(net)
    packed = [net.get_submodule(name).weight for name in low_bit(net)]
    assert before.packed_bytes == after.packed_bytes == sum(weight.nbytes for weight in packed)
    assert (after.weights, after.low_bit_weights) == (before.weights, before.low_bit_weights)
    assert after.packed_bytes + after.kept_bytes == sum(tensor.nbytes for tensor in net.state_dict().values())


def test_the_table_is_straight_and_lists_blocks_once() -> None:
    net = Net()
    lines = str(bitnet.replace_linear(net, skip=r"0\.fc1")).splitlines()
    header, rows, total = lines[0], lines[1:-1], lines[-1]
    starts = [match.start() for match in re.finditer(r"(?<!\S)\S", header.replace("weight matrix", "weight_matrix"))]
    cells = [[row[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for row in rows]
    for row in rows:
        assert all(row[start - 1] == " " for start in starts[1:] if start < len(row)), row
    table = {(name, now): (kind, shape, count, why) for name, kind, shape, count, now, why in cells}
    assert len(table) == len(rows) == 7
    assert table["blocks.*.gate_proj", "ternary"] == ("BitLinear", "8x8", "2", "")
    assert table["blocks.*.fc1", "ternary"] == ("BitLinear", "8x8", "1", "")
    assert table["blocks.*.fc1", "kept"] == ("Linear", "8x8", "1", "skipped by request")
    assert table["blocks.*.gate", "kept"] == ("Linear", "8x8", "2", "router")
    assert table["head", "kept"] == ("Linear", "6x8", "1", "task head")
    assert "448 of 688 weights" in total


def test_a_reason_that_names_layers_names_blocks_once() -> None:
    class Looping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Caller(nn.Linear(4, 4)) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = F.linear(x, block.fc.weight)
            return x

    (row, _) = str(bitnet.replace_linear(Looping())).splitlines()[1:]
    assert row.split(maxsplit=5)[3:] == ["3", "kept", "Looping uses blocks.*.fc.weight directly"]


def test_indices_and_parameters_at_the_root_have_names() -> None:
    class Root(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(*(Caller(nn.Linear(4, 4)) for _ in range(12)))
            self.table = nn.Parameter(torch.zeros(2, 2))

    report = bitnet.replace_linear(Root())
    first, second = (line.split() for line in str(report).splitlines()[1:-1])
    assert first == ["*.fc", "BitLinear", "4x4", "12", "ternary"]
    assert second[0] == "table"


def test_a_model_without_linears_has_a_report() -> None:
    report = bitnet.replace_linear(nn.Sequential(nn.Conv1d(2, 2, 1)))
    assert report.low_bit_weights == 0
    assert reasons(report) == {"0": "a convolution"}
    assert "0 of 4 weights (0.0 %)" in str(report)


def test_the_report_of_pack_says_why_a_linear_layer_stays() -> None:
    model = llama()
    bitnet.replace_linear(model, skip="o_proj")
    kept = {row.name: row.reason for row in bitnet.pack(model).rows if row.kind == "Linear"}
    assert set(kept) == {"lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"}
    assert set(kept.values()) == {"not a BitLinear, so not packed"}
