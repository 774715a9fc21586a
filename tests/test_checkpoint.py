"""Save and load on disk: modules that are not from Hugging Face, damaged files, and saves that are cut off."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import IDS, Mlp, llama, mixtral
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_utils

import bitnet
from bitnet.convert import checkpoint
from bitnet.experts import PackedStack
from bitnet.kernels import backends, ops
from bitnet.packed import PackedBitLinear

UP = "model.layers.1.mlp.up_proj"
X = torch.linspace(-1, 1, 48).view(3, 16)


def packed(model: nn.Module, **options: Any) -> nn.Module:
    bitnet.replace_linear(model, **options)
    bitnet.pack(model)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def copy_of(source: Path, target: Path) -> Path:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("form", ["packed", "training"])
@pytest.mark.parametrize(
    "options",
    [{}, {"per_row": True, "activation_bits": 4}, {"weights": "binary", "activation_bits": None}, {"rms_norm": True}],
    ids=["default", "per_row_4", "binary_none", "rms_norm"],
)
def test_a_plain_module_comes_back_as_it_was(options: dict[str, Any], form: str, tmp_path: Path) -> None:
    model = Mlp().eval()
    bitnet.replace_linear(model, **options)
    for parameter in model.parameters():  # norms and biases that are not where they started
        parameter.data += 0.1 * torch.randn_like(parameter)
    if form == "packed":
        bitnet.pack(model)
    assert bitnet.save(model, tmp_path / "out") == tmp_path / "out"
    fresh = Mlp()
    loaded = bitnet.load(tmp_path / "out", fresh)
    assert loaded is fresh
    assert not loaded.training
    assert type(loaded.up) is type(loaded.down) is (bitnet.PackedBitLinear if form == "packed" else bitnet.BitLinear)
    assert torch.equal(loaded(X), model(X))
    bitnet.save(loaded, tmp_path / "again")
    first, second = (load_file(tmp_path / name / checkpoint.WEIGHTS) for name in ("out", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_was_kept_float_stays_float(tmp_path: Path) -> None:
    model = packed(Mlp().eval(), skip="up")
    bitnet.save(model, tmp_path)
    loaded = bitnet.load(tmp_path, Mlp())
    assert type(loaded.up) is nn.Linear
    assert torch.equal(loaded(X), model(X))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_load_takes_dtype_device_and_backend(backend: str, tmp_path: Path) -> None:
    model = packed(Mlp().eval())
    bitnet.save(model, tmp_path)
    loaded = bitnet.load(tmp_path, Mlp(), device="cpu", dtype=torch.bfloat16, backend=backend)
    assert loaded.norm.weight.dtype == loaded.up.bias.dtype == torch.bfloat16
    assert loaded.up.backend == loaded.down.backend == backend
    assert torch.equal(loaded.up.weight_scale, model.up.weight_scale)
    assert torch.equal(loaded(X.bfloat16()), model.to(torch.bfloat16)(X.bfloat16()))


@pytest.mark.parametrize("options", [{}, {"weights": "binary", "per_row": True}], ids=["default", "binary_per_row"])
def test_a_base3_save_gives_the_same_model_from_a_fifth_fewer_bytes(options: dict[str, Any], tmp_path: Path) -> None:
    model = packed(llama(hidden_size=160, intermediate_size=330), **options)
    bitnet.save(model, tmp_path / "two_bits")
    bitnet.save(model, tmp_path / "base3", weight_bits=1.6)
    sizes = {}
    for name in ("two_bits", "base3"):
        headers = checkpoint.read_headers([tmp_path / name / checkpoint.WEIGHTS])
        shapes = [header.shape for header in headers.values() if header.dtype == "U8"]
        assert len(shapes) == 14
        sizes[name] = sum(rows * columns for rows, columns in shapes)
    assert sizes["base3"] == pytest.approx(0.8 * sizes["two_bits"], rel=0.01)  # 330 rows take 332 in two bits
    for loaded in (bitnet.load(tmp_path / "base3"), AutoModelForCausalLM.from_pretrained(tmp_path / "base3")):
        assert torch.equal(logits(loaded), logits(model))
        bitnet.save(loaded, tmp_path / "again")  # two bits again, unless asked
        again = load_file(tmp_path / "again" / checkpoint.WEIGHTS)
        first = load_file(tmp_path / "two_bits" / checkpoint.WEIGHTS)
        assert all(torch.equal(again[key], first[key]) for key in first)
    config = json.loads((tmp_path / "base3" / checkpoint.CONFIG).read_text())["quantization_config"]
    assert "pip install bitnet-toolkit" in config["linear_class"], "stock transformers would take it for its own"
    assert config_now(model) == json.loads((tmp_path / "two_bits" / checkpoint.CONFIG).read_text())


@pytest.mark.parametrize("options", [{}, {"per_row": True}, {"group_size": 32}], ids=["tensor", "row", "groups"])
def test_one_bit_holds_binary_layers_and_others_keep_two(options: dict[str, Any], tmp_path: Path) -> None:
    model = llama(hidden_size=160, intermediate_size=330)
    bitnet.replace_linear(model, skip="down_proj", weights="binary", **options)
    bitnet.replace_linear(model, include="down_proj", **options)
    model = packed(model)
    bitnet.save(model, tmp_path / "two_bits")
    bitnet.save(model, tmp_path / "one_bit", weight_bits=1)
    stored = load_file(tmp_path / "one_bit" / checkpoint.WEIGHTS)
    assert stored["model.layers.0.mlp.up_proj.weight"].shape == (330, 20)
    assert stored["model.layers.0.mlp.down_proj.weight"].shape == (40, 330)
    bitnet.convert_checkpoint(tmp_path / "two_bits", tmp_path / "converted", "binary", tokenizer=False)
    bitnet.convert_checkpoint(tmp_path / "one_bit", tmp_path / "back", "hub", tokenizer=False)
    for name in ("one_bit", "converted", "back"):
        loaded = bitnet.load(tmp_path / name)
        assert torch.equal(logits(loaded), logits(model)), name
        bitnet.save(loaded, tmp_path / "again", weight_bits=2 if name == "back" else 1)
        again = load_file(tmp_path / "again" / checkpoint.WEIGHTS)
        first = load_file(tmp_path / ("two_bits" if name == "back" else "one_bit") / checkpoint.WEIGHTS)
        assert all(torch.equal(again[key], first[key]) for key in first)
    assert not bitnet.diff_checkpoints(tmp_path / "one_bit", tmp_path / "two_bits").differences
    with pytest.raises(ValueError, match="this model has none"):
        bitnet.save(packed(llama()), tmp_path / "none", weight_bits=1)
    bitnet.save(packed(llama()), tmp_path / "ternary")
    with pytest.raises(ValueError, match="has no binary layers"):
        bitnet.convert_checkpoint(tmp_path / "ternary", tmp_path / "none", "binary", tokenizer=False)
    assert not (tmp_path / "none").exists()


def test_experts_of_one_bit_come_back(tmp_path: Path) -> None:
    model = packed(mixtral(), weights="binary")
    bitnet.save(model, tmp_path, weight_bits=1)
    assert torch.equal(logits(bitnet.load(tmp_path)), logits(model))


def config_now(model: PreTrainedModel) -> Any:
    """What save_pretrained would write as config.json now."""
    return json.loads(model.config.to_json_string())


def test_load_derives_each_layers_layout_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    derived: list[str] = []
    prepack = ops.prepack
    monkeypatch.setattr(
        ops, "prepack", lambda *a, **options: derived.append(options["backend"]) or prepack(*a, **options)
    )
    for name, model in (("llama", llama()), ("mixtral", mixtral()), ("module", Mlp().eval())):
        bitnet.save(packed(model), tmp_path / name)
        parts = [m for m in model.modules() if isinstance(m, PackedBitLinear | PackedStack)]
        layers = sum(len(part.layers()) if isinstance(part, PackedStack) else 1 for part in parts)
        for options in ({}, {"backend": "reference"}):
            derived.clear()
            target = None if isinstance(model, PreTrainedModel) else Mlp()
            loaded = bitnet.load(tmp_path / name, target, **options)
            assert len(derived) == layers
            loaded(X if target else IDS)
            assert len(derived) == layers
            assert set(derived) == (
                {"reference"} if options else {backends.choose_backend("auto", torch.device("cpu"))}
            )


def test_a_plain_module_comes_back_from_base3(tmp_path: Path) -> None:
    model = packed(Mlp().eval())
    bitnet.save(model, tmp_path, weight_bits=1.6)
    assert load_file(tmp_path / checkpoint.WEIGHTS)["down.weight"].shape == (6, 5)
    assert torch.equal(bitnet.load(tmp_path, Mlp())(X), model(X))


def test_a_damaged_base3_byte_is_named(tmp_path: Path) -> None:
    bitnet.save(packed(Mlp()), tmp_path, weight_bits=1.6)
    tensors = load_file(tmp_path / checkpoint.WEIGHTS)
    tensors["down.weight"][2, 1] = 250
    save_file(tensors, tmp_path / checkpoint.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"down: base-3 weight is corrupt: 1 bytes .* \[2, 1\] \(250\)"):
        bitnet.load(tmp_path, Mlp())


def test_a_config_that_lies_about_the_bits_is_refused(tmp_path: Path) -> None:
    bitnet.save(packed(Mlp()), tmp_path, weight_bits=1.6)
    config = json.loads((tmp_path / checkpoint.CONFIG).read_text())
    for bits, message in ((2, r"up\.weight is U8 \[24, 4\]"), (1.5, r"section is missing or damaged \(bits is 1\.5\)")):
        config["quantization_config"]["bitnet_toolkit"]["bits"] = bits
        (tmp_path / checkpoint.CONFIG).write_text(json.dumps(config))
        with pytest.raises(ValueError, match=message):
            bitnet.load(tmp_path, Mlp())


def test_base3_is_refused_for_latent_weights_and_other_bits_altogether(tmp_path: Path) -> None:
    model = Mlp()
    bitnet.replace_linear(model)
    with pytest.raises(ValueError, match=r"weight_bits=1\.6 is a form of packed weights; call bitnet\.pack"):
        bitnet.save(model, tmp_path / "out", weight_bits=1.6)
    with pytest.raises(ValueError, match=r"weight_bits must be 2, 1\.6 or 1, got 1\.58"):
        bitnet.save(model, tmp_path / "out", weight_bits=1.58)
    assert not (tmp_path / "out").exists()


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("form", ["packed", "training"])
def test_a_layer_under_two_names_stays_one_layer(form: str, tmp_path: Path) -> None:
    model = Shared().eval()
    bitnet.replace_linear(model)
    if form == "packed":
        bitnet.pack(model)
    bitnet.save(model, tmp_path)
    loaded = bitnet.load(tmp_path, Shared())
    assert loaded.first is loaded.second
    assert torch.equal(loaded(X), model(X))


def test_a_module_without_our_layers_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no BitLinear or PackedBitLinear layers"):
        bitnet.save(Mlp(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_load_without_a_module_needs_a_hugging_face_checkpoint(tmp_path: Path) -> None:
    bitnet.save(packed(Mlp()), tmp_path)
    with pytest.raises(ValueError, match=r"pass the module to fill: load\(path, model\)"):
        bitnet.load(tmp_path)


def test_load_into_another_architecture_names_what_is_missing(tmp_path: Path) -> None:
    bitnet.save(packed(Mlp()), tmp_path)
    other = Mlp()
    other.extra = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"extra\.weight"):
        bitnet.load(tmp_path, other)


# Damage, and the one error that each kind must give.


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that are as they should be."""
    root = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    model = llama()
    bitnet.replace_linear(model)
    bitnet.save(model, root / "training")
    bitnet.pack(model)
    bitnet.save(model, root / "packed")
    bitnet.save(model, root / "sharded", max_shard_size=3000)
    bitnet.save(packed(llama(), per_row=True), root / "extended")
    return root


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = directory / checkpoint.WEIGHTS
    state = load_file(file)
    change(state)
    save_file(state, file, {"format": "pt"})


def configure(directory: Path, **settings: Any) -> None:
    """Change quantization_config; None as a value removes the key."""
    config = json.loads((directory / checkpoint.CONFIG).read_text())
    settings = config["quantization_config"] | settings
    config["quantization_config"] = {key: value for key, value in settings.items() if value is not None}
    (directory / checkpoint.CONFIG).write_text(json.dumps(config))


def truncate(directory: Path, size: int) -> None:
    file = directory / checkpoint.WEIGHTS
    file.write_bytes(file.read_bytes()[:size])


def replace_header(directory: Path, header: bytes) -> None:
    (directory / checkpoint.WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header)


def set_first_byte(state: dict[str, Tensor]) -> None:
    state[f"{UP}.weight"][2, 5] = 0b01110101


def scale_of(value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda state: state.update({f"{UP}.weight_scale": torch.tensor([value])})


W, S = f"{UP}.weight", f"{UP}.weight_scale"
ONLINE = {"linear_class": "autobitlinear", "quantization_mode": "online"}
OFFLINE = {"linear_class": "autobitlinear", "quantization_mode": "offline"}

# name: (checkpoint, damage, parts of the message)
FILES: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "cut_short": ("packed", lambda d: truncate(d, -100), ["model.safetensors", "cut short", "download it again"]),
    "cut_in_header": ("packed", lambda d: truncate(d, 500), ["model.safetensors", "not a complete safetensors file"]),
    "cut_to_nothing": ("packed", lambda d: truncate(d, 4), ["model.safetensors", "not a complete safetensors file"]),
    "not_json": ("packed", lambda d: replace_header(d, b"\xff{garbage"), ["model.safetensors", "header is damaged"]),
    "not_a_table": ("packed", lambda d: replace_header(d, b"[1, 2]"), ["model.safetensors", "header is damaged"]),
    "not_offsets": ("packed", lambda d: replace_header(d, b'{"a":{}}'), ["model.safetensors", "header is damaged"]),
    "pickle": ("packed", lambda d: torch.save({}, d / "model.safetensors"), ["model.safetensors", "not a complete"]),
    "no_config": ("packed", lambda d: (d / "config.json").unlink(), ["no config.json there"]),
    "no_weights": ("packed", lambda d: (d / "model.safetensors").unlink(), ["neither model.safetensors nor"]),
    "no_shard": (
        "sharded",
        lambda d: next(d.glob("model-00002*")).unlink(),
        ["1 of the", "model-00002-of-", "model.safetensors.index.json"],
    ),
    "bad_config": ("packed", lambda d: (d / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
    "bad_index": (
        "sharded",
        lambda d: (d / checkpoint.INDEX).write_text('{"weight_map"'),
        ["model.safetensors.index.json", "not valid JSON"],
    ),
    "no_norm": (
        "packed",
        lambda d: rewrite(d, lambda s: s.pop("model.norm.weight")),
        ["model.norm.weight", "no tensor"],
    ),
    "no_embedding": (
        "training",
        lambda d: rewrite(d, lambda s: s.pop("model.embed_tokens.weight")),
        ["model.embed_tokens.weight", "no tensor"],
    ),
}
TENSORS: dict[str, tuple[str, Callable[[Path], object], list[str]]] = {
    "float_but_packed": (
        "packed",
        lambda d: rewrite(d, lambda s: s.update({W: torch.zeros(24, 16)})),
        ["model.safetensors", W, "F32 [24, 16]", "stores U8 [6, 16]"],
    ),
    "all_float_but_packed": (
        "training",
        lambda d: configure(d, linear_class="bitlinear"),
        ["q_proj.weight", "F32", "U8"],
    ),
    "packed_but_online": ("packed", lambda d: configure(d, **ONLINE), ["q_proj.weight", "U8", "F32, BF16 or F16"]),
    "wrong_shape": (
        "packed",
        lambda d: rewrite(d, lambda s: s.update({W: s[W].T.contiguous()})),
        [W, "U8 [16, 6]", "U8 [6, 16]"],
    ),
    "wrong_latent_shape": (
        "training",
        lambda d: rewrite(d, lambda s: s.update({W: s[W][:-1].clone()})),
        [W, "[23, 16]", "[24, 16]"],
    ),
    "scale_per_row": (
        "packed",
        lambda d: rewrite(d, lambda s: s.update({S: torch.ones(24)})),
        [S, "F32 [24]", "[1]"],
    ),
    "no_scale": ("packed", lambda d: rewrite(d, lambda s: s.pop(S)), ["no tensor", S, "PackedBitLinear"]),
    "no_weight": ("training", lambda d: rewrite(d, lambda s: s.pop(W)), ["no tensor", W, "BitLinear"]),
    "packed_but_kept": (
        "packed",
        lambda d: configure(d, modules_to_not_convert=["lm_head", "up_proj"]),
        ["keeps model.layers.0.mlp.up_proj", "modules_to_not_convert", "model.safetensors", "packed bytes"],
    ),
    "code_3": ("packed", lambda d: rewrite(d, set_first_byte), [UP, "code 3", "[2, 5]", "0x75"]),
    "nan_scale": ("packed", lambda d: rewrite(d, scale_of(float("nan"))), [UP, "weight_scale", "positive and finite"]),
    "inf_scale": ("packed", lambda d: rewrite(d, scale_of(float("inf"))), [UP, "weight_scale", "positive and finite"]),
    "zero_scale": ("packed", lambda d: rewrite(d, scale_of(0.0)), [UP, "weight_scale", "positive and finite"]),
    "negative_scale": ("packed", lambda d: rewrite(d, scale_of(-2.0)), [UP, "weight_scale", "positive and finite"]),
    "zero_scale_offline": (
        "packed",
        lambda d: (configure(d, **OFFLINE), rewrite(d, scale_of(0.0))),
        [UP, "weight_scale", "positive and finite"],
    ),
    "offline_not_ternary": (
        "training",
        lambda d: (configure(d, **OFFLINE), rewrite(d, add_scales)),
        ["model.layers.0.self_attn.q_proj", "offline", "other than -1, 0, 1"],
    ),
    "no_section": ("extended", lambda d: configure(d, bitnet_toolkit=None), ["`bitnet_toolkit` section", "damaged"]),
}


def add_scales(state: dict[str, Tensor]) -> None:
    state.update({key.replace("weight", "weight_scale"): torch.ones(1) for key in state if "_proj" in key})


@pytest.mark.parametrize("damage", [*FILES, *TENSORS])
def test_damage_is_one_clear_error(good: Path, damage: str, tmp_path: Path) -> None:
    source, apply, parts = (FILES | TENSORS)[damage]
    directory = copy_of(good / source, tmp_path / "damaged")
    apply(directory)
    doors = [bitnet.load, AutoModelForCausalLM.from_pretrained] if damage in TENSORS else [bitnet.load]
    for door in doors:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            door(directory)
        for part in parts:
            assert part in str(caught.value)


@pytest.mark.parametrize(
    "damage",
    [
        "cut_short",
        "not_json",
        "no_config",
        "bad_config",
        "code_3",
        "zero_scale",
        "no_scale",
        "no_norm",
        "float_but_packed",
    ],
)
def test_damage_is_found_in_plain_modules_too(damage: str, tmp_path: Path) -> None:
    _, apply, parts = (FILES | TENSORS)[damage]
    module = nn.ModuleDict({"model": llama().model})  # the same names, but not a Hugging Face model
    bitnet.save(packed(module), tmp_path)
    apply(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        bitnet.load(tmp_path, nn.ModuleDict({"model": llama().model}))
    for part in parts:
        assert part in str(caught.value)


def test_weights_of_all_zero_bytes_are_pointed_out(good: Path, tmp_path: Path) -> None:
    directory = copy_of(good / "packed", tmp_path / "zeros")
    rewrite(directory, lambda state: state[W].zero_())
    with pytest.warns(UserWarning, match=rf"{UP}: every packed byte is zero"):
        bitnet.load(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bitnet.load(good / "packed")


def test_headers_describe_tensors_without_reading_them(good: Path) -> None:
    file = good / "packed" / checkpoint.WEIGHTS
    headers = checkpoint.read_headers([file])
    state = load_file(file)
    assert headers.keys() == state.keys()
    assert all(headers[key].shape == tuple(state[key].shape) for key in state)
    assert {headers[key].dtype for key in state if state[key].dtype == torch.uint8} == {"U8"}
    assert {header.file for header in headers.values()} == {file}


# Saves that are cut off, and saves over other saves.


def test_save_onto_a_file_is_refused_and_leaves_it(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(NotADirectoryError, match=r"notes\.txt is a file"):
        bitnet.save(packed(Mlp()), file)
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


def disk_full(monkeypatch: pytest.MonkeyPatch, after: int = 0) -> None:
    """Let `after` safetensors files be written whole, and half of the next one."""
    written = 0

    def save_half(state: dict[str, Tensor], file: str | Path, *args: Any, **kwargs: Any) -> None:
        nonlocal written
        save_file(state, file, {"format": "pt"})
        written += 1
        if written > after:
            Path(file).write_bytes(Path(file).read_bytes()[:-100])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", save_half)
    monkeypatch.setattr(modeling_utils, "safe_save_file", save_half)


@pytest.mark.parametrize("after", [0, 2])
def test_a_full_disk_leaves_the_earlier_save(
    good: Path, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_of(good / "packed", tmp_path / "out")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    disk_full(monkeypatch, after)
    with pytest.raises(OSError, match="No space left"):
        bitnet.save(packed(llama()), directory, max_shard_size=3000)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert list(tmp_path.iterdir()) == [directory]


def test_a_full_disk_leaves_the_earlier_plain_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(Mlp().eval())
    bitnet.save(model, tmp_path / "out")
    with monkeypatch.context() as patch:
        disk_full(patch)
        for target in ("out", "new"):
            with pytest.raises(OSError, match="No space left"):
                bitnet.save(packed(Mlp()), tmp_path / target)
    assert torch.equal(bitnet.load(tmp_path / "out", Mlp())(X), model(X))
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_saves_over_saves_leave_no_stale_shard_and_no_foreign_file_is_lost(good: Path, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / "README.md").write_text("mine")
    models: list[tuple[PreTrainedModel, dict[str, Any]]] = [
        (packed(llama()), {"max_shard_size": 3000}),
        (packed(llama()), {}),
        (packed(llama()), {"max_shard_size": 6000}),
    ]
    for model, options in models:
        bitnet.save(model, directory, **options)
        assert torch.equal(logits(bitnet.load(directory)), logits(model))
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(directory)), logits(model))
        index = directory / checkpoint.INDEX
        names = set(json.loads(index.read_text())["weight_map"].values()) if options else {checkpoint.WEIGHTS}
        assert {path.name for path in directory.glob("*.safetensors")} == names
        assert index.exists() == bool(options)
    assert (directory / "README.md").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_saved_directories_can_be_read_by_others(tmp_path: Path) -> None:
    bitnet.save(packed(Mlp()), tmp_path / "out")
    (tmp_path / "made").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "made").stat().st_mode


def test_saving_where_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = packed(Mlp().eval())
    bitnet.save(model, ".")
    bitnet.save(model, "deep/below")
    for directory in (".", "deep/below"):
        assert torch.equal(bitnet.load(directory, Mlp())(X), model(X))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "deep", "model.safetensors"]
