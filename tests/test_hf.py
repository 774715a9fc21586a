"""Checkpoints against stock transformers, in both directions, and transformers' own doors into our layers."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import IDS, gpt2, gpt_oss, llama, mixtral, neox
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitNetQuantConfig, PreTrainedModel, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

import bitnet
from bitnet.convert.conversion.convert import convert_checkpoint
from bitnet.convert.hub import values
from bitnet.experts import BitExperts, PackedExperts
from bitnet.linear import BitConv1D, BitLayer

LOW_BIT = (bitnet.BitLinear, bitnet.PackedBitLinear)
# Both sides round in float32 and differ in the order of operations only: some ten roundings of 2^-24 a layer, eight
# layers deep, add up to 80 * 6e-8 = 5e-6 of the largest logit. A scale in the wrong direction is off by factors.
RTOL = 1e-5
# Stock computes x * s in bfloat16, whose spacing just below 127 is 1/2, so codes may be off by one: 1/127 of the
# largest activation, through eight layers. It also rounds scales and products, by 2^-9 each, which is less.
RTOL_BF16 = 8 / 127


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max() / b.float().abs().max())


def compare(theirs: tuple[Tensor, dict[str, str], dict[str, Tensor]], ours: nn.Module, rtol: float) -> None:
    """Run our model with each low-bit layer fed what stock's layer got, and compare those inputs and the logits.

    Rounding makes an int8 code of an activation that lies on a boundary, one in 1e5, fall to the other side, which
    moves the logits by far more than rtol. The common inputs keep such a step out of the comparison.
    """
    logits_there, classes, inputs = theirs
    ours = copy.deepcopy(ours).eval()
    names = {name for name, module in ours.named_modules() if isinstance(module, LOW_BIT)}
    assert names == {name for name, kind in classes.items() if kind in ("BitLinear", "AutoBitLinear")}
    assert names == inputs.keys()

    def feed(x: Tensor) -> Callable[[nn.Module, Any], Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor]) -> Tensor:
            assert distance(args[0], x) < rtol
            return x

        return hook

    for name in names:
        ours.get_submodule(name).register_forward_pre_hook(feed(inputs[name]))
    assert distance(logits(ours), logits_there) < rtol


def tensors(directory: Path) -> dict[str, Tensor]:
    return {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}


def same_tensors(a: Path, b: Path) -> bool:
    x, y = tensors(a), tensors(b)
    return x.keys() == y.keys() and all(x[k].dtype == y[k].dtype and torch.equal(x[k], y[k]) for k in x)


def quantization(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


# What we save and stock transformers must read: name -> (model, options of replace_linear, of save)
OURS: dict[str, tuple[Callable[[], PreTrainedModel], dict[str, Any], dict[str, Any]]] = {
    "llama": (llama, {}, {}),
    "tied": (lambda: llama(tie_word_embeddings=True), {}, {}),
    "biases": (neox, {}, {}),
    "rms_norm": (llama, {"rms_norm": True, "rms_norm_eps": 1e-3}, {}),
    "sharded": (llama, {}, {"max_shard_size": 3000}),
    "bf16": (lambda: llama().to(torch.bfloat16), {}, {}),
    "skip": (llama, {"skip": [r"layers\.1\..*", "o_proj"]}, {}),
    "skip_experts": (mixtral, {"skip": "mlp.experts"}, {}),
}
FORMS = ["packed", "training"]
# What stock transformers cannot express, most of it in both forms: options of replace_linear
EXTENDED: dict[str, dict[str, Any]] = {
    "per_row": {"per_row": True},
    "bits_4": {"activation_bits": 4},
    "bits_none": {"activation_bits": None},
    "mixed": {},
    "ragged": {},
    "binary": {"weights": "binary"},
    "conv1d": {},
    "experts": {},
    "transposed_experts": {"per_row": True},
}
OTHERS = {"conv1d": gpt2, "experts": mixtral, "transposed_experts": gpt_oss}  # the rest are llamas


def build(name: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model in training that OURS or EXTENDED names, and the options to save it with."""
    if name in OURS:
        make, options, save_options = OURS[name]
        model = make()
        bitnet.replace_linear(model, **options)
        return model, save_options
    model = llama(intermediate_size=26) if name == "ragged" else OTHERS.get(name, llama)()
    if name == "mixed":
        bitnet.replace_linear(model, include=[".*_proj"], skip=["down_proj", r"layers\.0\..*"])
        bitnet.replace_linear(model, include="down_proj", activation_bits=4, per_row=True, rms_norm=True)
    else:
        bitnet.replace_linear(model, **EXTENDED[name])
    return model, {}


class ByHand(NamedTuple):
    """A checkpoint in a stock format that no code of ours has touched, and what must be read from it."""

    codes: dict[str, Tensor]
    scale: dict[str, Tensor]
    float_model: PreTrainedModel


def pack_by_hand(codes: Tensor) -> Tensor:
    """The Hub layout, bit by bit, from its description."""
    rows = codes.shape[0] // 4
    packed = torch.zeros(rows, codes.shape[1], dtype=torch.uint8)
    for n, row in enumerate(codes.tolist()):
        for k, code in enumerate(row):
            packed[n % rows, k] |= (code + 1) << 2 * (n // rows)
    return packed


def write_by_hand(directory: Path, form: str, settings: dict[str, Any]) -> ByHand:
    model = llama()
    state, codes, scale = model.state_dict(), {}, {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name == "lm_head" or form == "online":
            continue
        codes[name] = torch.randint(-1, 2, module.weight.shape)
        scale[name] = 0.05 + 0.1 * torch.rand(1)
        state[f"{name}.weight"] = codes[name].float() if form == "float_codes" else pack_by_hand(codes[name])
        state[f"{name}.weight_scale"] = 1 / scale[name] if form == "divides" else scale[name]
        if form == "divides":
            scale[name] = 1 / state[f"{name}.weight_scale"]
    directory.mkdir()
    save_file(
        {key: tensor.contiguous() for key, tensor in state.items()}, directory / "model.safetensors", {"format": "pt"}
    )
    config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    config["quantization_config"] = {"quant_method": "bitnet", **settings}
    (directory / "config.json").write_text(json.dumps(config))
    return ByHand(codes, scale, model)


OFFLINE = {"linear_class": "autobitlinear", "quantization_mode": "offline"}  # microsoft/bitnet-b1.58-2B-4T
BY_HAND: dict[str, tuple[str, dict[str, Any]]] = {
    "bitlinear": ("divides", {"linear_class": "bitlinear", "modules_to_not_convert": ["lm_head"]}),
    "no_linear_class": ("divides", {"modules_to_not_convert": ["lm_head"]}),  # tiiuae/Falcon3-1.58bit
    "nothing_but_null": ("divides", {"modules_to_not_convert": None}),  # HF1BitLLM/Llama3-8B-1.58
    "offline": ("packed", {**OFFLINE, "modules_to_not_convert": ["lm_head"]}),
    "offline_null": ("packed", OFFLINE),
    "float_codes": ("float_codes", OFFLINE),
    "online": ("online", {"linear_class": "autobitlinear", "quantization_mode": "online"}),
}


class Written(NamedTuple):
    root: Path
    models: dict[str, PreTrainedModel]  # as they were before the save
    by_hand: dict[str, ByHand]
    stock: dict[str, Any]  # results of stock_transformers.py

    def logits(self, name: str) -> Tensor:
        return logits(self.models[name])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """All checkpoints of this file, and what one stock transformers process made of them."""
    root = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    models: dict[str, PreTrainedModel] = {}
    for name in [*OURS, *EXTENDED]:
        model, options = build(name)
        bitnet.save(model, root / f"{name}-training", **options)
        if name in OTHERS:
            shutil.copytree(root / f"{name}-training", root / f"{name}-float")
            config = json.loads((root / f"{name}-float" / "config.json").read_text())
            del config["quantization_config"]
            (root / f"{name}-float" / "config.json").write_text(json.dumps(config))
        models[f"{name}-training"] = copy.deepcopy(model)
        bitnet.pack(model)
        bitnet.save(model, root / f"{name}-packed", **options)
        models[f"{name}-packed"] = model
    by_hand = {name: write_by_hand(root / name, *arguments) for name, arguments in BY_HAND.items()}
    for name in by_hand:
        convert_checkpoint(root / name, root / f"{name}-hub", console=Console(quiet=True))
    saves = {"online", "bitlinear"}  # stock cannot save the packed offline form
    jobs = {
        name: {"load": str(root / name), "save": str(root / f"{name}-by-stock") if name in saves else None}
        for name in [*models, *by_hand, *(f"{name}-hub" for name in by_hand), *(f"{name}-float" for name in OTHERS)]
    }
    (root / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("stock_transformers.py")
    # eager: stock compiles its helpers on first call, which takes a minute and changes no value
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(script), str(root / "jobs.json"), str(root / "results.pt")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return Written(root, models, by_hand, torch.load(root / "results.pt"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [name for name in OURS if name != "bf16"])
def test_stock_transformers_computes_what_we_do(written: Written, name: str, form: str) -> None:
    result = written.stock[f"{name}-{form}"]
    assert not isinstance(result, str), result
    assert ("BitLinear" if form == "packed" else "AutoBitLinear") in result[1].values()
    compare(result, written.models[f"{name}-{form}"], RTOL)


@pytest.mark.parametrize("form", FORMS)
def test_stock_transformers_runs_our_bf16(written: Written, form: str) -> None:
    result = written.stock[f"bf16-{form}"]
    assert not isinstance(result, str), result
    assert result[0].dtype == torch.bfloat16
    compare(result, written.models[f"bf16-{form}"], RTOL_BF16)


def test_sharded_saves_have_several_files_and_an_index(written: Written) -> None:
    for form in FORMS:
        directory = written.root / f"sharded-{form}"
        files = sorted(path.name for path in directory.glob("*.safetensors"))
        weight_map = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(files) > 2
        assert sorted(set(weight_map.values())) == files
        assert torch.equal(logits(bitnet.load(directory)), written.logits(f"sharded-{form}"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*OURS, *EXTENDED])
def test_from_pretrained_gives_back_the_same_model(written: Written, name: str, form: str) -> None:
    directory = written.root / f"{name}-{form}"
    for model in (AutoModelForCausalLM.from_pretrained(directory), bitnet.load(directory)):
        kinds = {type(module) for module in written.models[f"{name}-{form}"].modules()}
        assert {type(module) for module in model.modules()} == kinds
        assert any(issubclass(kind, BitLayer) for kind in kinds) == (form == "training")
        assert bool(kinds & {bitnet.PackedBitLinear, PackedExperts}) == (form == "packed")
        assert torch.equal(logits(model), written.logits(f"{name}-{form}"))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*OURS, *EXTENDED])
def test_saving_again_changes_no_bit(written: Written, name: str, form: str, tmp_path: Path) -> None:
    directory = written.root / f"{name}-{form}"
    model = AutoModelForCausalLM.from_pretrained(directory)
    model.save_pretrained(tmp_path / "by_transformers")
    bitnet.save(model, tmp_path / "by_us")
    for again in (tmp_path / "by_transformers", tmp_path / "by_us"):
        assert same_tensors(directory, again)
        assert quantization(again) == quantization(directory)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", EXTENDED)
def test_stock_transformers_refuses_what_it_would_get_wrong(written: Written, name: str, form: str) -> None:
    if (name, form) in {("binary", "packed"), ("ragged", "training")}:
        # codes -1 and 1 are ternary; latent weights have any number of rows
        compare(written.stock[f"{name}-{form}"], written.models[f"{name}-{form}"], RTOL)
        return
    refusal = written.stock[f"{name}-{form}"]
    assert isinstance(refusal, str), "stock transformers loaded it"
    assert "pip install bitnet-toolkit" in refusal
    assert "import bitnet" in refusal


@pytest.mark.parametrize("name", OTHERS)
def test_latent_weights_are_no_float_checkpoint_of_the_family(written: Written, name: str) -> None:
    """Stock transformers, once it is not told of the quantization, reads the very tensors it would have written."""
    model = copy.deepcopy(written.models[f"{name}-training"]).train()
    kinds = {module.origin if isinstance(module, BitExperts) else type(module) for module in model.modules()}
    result = written.stock[f"{name}-float"]
    assert not isinstance(result, str), result
    changed = {bitnet.BitLinear: nn.Linear, BitConv1D: Conv1D}
    assert set(result[1].values()) == {changed.get(kind, kind).__name__ for kind in kinds}
    bitnet.set_strength(model, 0)  # the float model, but for the order of sums in its experts
    assert distance(logits(model), result[0]) < RTOL


@pytest.mark.parametrize("name", [name for name, (form, _) in BY_HAND.items() if form != "online"])
def test_codes_and_scales_of_stock_formats_are_read_exactly(written: Written, name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(written.root / name)
    codes, scale, _ = written.by_hand[name]
    packed = {name: module for name, module in model.named_modules() if isinstance(module, bitnet.PackedBitLinear)}
    assert packed.keys() == codes.keys()
    for layer, module in packed.items():
        assert torch.equal(module.codes(), codes[layer].to(torch.int8))
        assert torch.equal(module.weight_scale, scale[layer])


@pytest.mark.parametrize("name", BY_HAND)
def test_stock_formats_compute_what_stock_transformers_computes(written: Written, name: str) -> None:
    assert not isinstance(written.stock[name], str), written.stock[name]
    compare(written.stock[name], AutoModelForCausalLM.from_pretrained(written.root / name), RTOL)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_converted_stock_format_computes_what_the_original_does_in_stock(written: Written, name: str) -> None:
    compare(written.stock[name], bitnet.load(written.root / f"{name}-hub"), RTOL)
    assert not isinstance(written.stock[f"{name}-hub"], str), written.stock[f"{name}-hub"]
    compare(written.stock[f"{name}-hub"], bitnet.load(written.root / f"{name}-hub"), RTOL)
    if name != "online":
        codes, scale, _ = written.by_hand[name]
        model = bitnet.load(written.root / f"{name}-hub")
        for layer in codes:
            assert torch.equal(model.get_submodule(layer).codes(), codes[layer].to(torch.int8))
            assert torch.equal(model.get_submodule(layer).weight_scale, scale[layer])


@pytest.mark.parametrize("name", ["online", "bitlinear"])
def test_what_stock_transformers_saves_loads_here(written: Written, name: str) -> None:
    by_stock = written.root / f"{name}-by-stock"
    assert torch.equal(logits(bitnet.load(by_stock)), logits(bitnet.load(written.root / name)))


def test_offline_becomes_a_format_that_stock_can_save(written: Written, tmp_path: Path) -> None:
    model = bitnet.load(written.root / "offline")
    model.save_pretrained(tmp_path)
    assert quantization(tmp_path)["linear_class"] == "bitlinear"  # the direction of the scale goes with it
    again = bitnet.load(tmp_path)
    for name, module in model.named_modules():
        if isinstance(module, bitnet.PackedBitLinear):
            # 0.05 + 0.1 * rand is no reciprocal of a float32: one rounding each way, 2^-24 relative
            stored = again.get_submodule(name)
            assert torch.equal(stored.weight, module.weight)
            assert torch.allclose(stored.weight_scale, module.weight_scale, rtol=2**-23, atol=0)


def test_stored_scale_is_lossless_over_a_binade() -> None:
    inv = torch.arange(2**23, 2**24, dtype=torch.int32).float() / 2**23  # every float32 in [1, 2)
    scale = 1 / inv
    assert torch.equal(1 / values.stored_scale(scale), scale)


def test_stored_scale_is_lossless_for_trained_scales() -> None:
    scale = 1 / (1 / torch.rand(100_000).clamp(min=1e-5))
    assert torch.equal(1 / values.stored_scale(scale), scale)
    assert values.stored_scale(scale).dtype == torch.float32


@pytest.fixture
def both(written: Written) -> tuple[PreTrainedModel, Path]:
    """The packed llama, loaded, and its directory."""
    directory = written.root / "llama-packed"
    return AutoModelForCausalLM.from_pretrained(directory), directory


def scales(model: nn.Module) -> Iterator[Tensor]:
    return (module.weight_scale for module in model.modules() if isinstance(module, bitnet.PackedBitLinear))


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_a_device_map_changes_nothing(written: Written, device_map: str) -> None:
    for form in FORMS:
        model = AutoModelForCausalLM.from_pretrained(written.root / f"llama-{form}", device_map=device_map)
        assert torch.equal(logits(model), written.logits(f"llama-{form}"))


def test_disk_offload_of_packed_layers_is_refused(written: Written, tmp_path: Path) -> None:
    where = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    with pytest.raises(ValueError, match="cannot be offloaded to disk"):
        AutoModelForCausalLM.from_pretrained(
            written.root / "llama-packed", device_map=where | {"model.rotary_emb": "cpu"}, offload_folder=tmp_path
        )


@pytest.mark.parametrize("name", ["llama", "bf16"])
def test_float32_scales_survive_another_dtype(written: Written, name: str, tmp_path: Path) -> None:
    directory = written.root / f"{name}-packed"
    exact = list(scales(bitnet.load(directory)))
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        assert model.lm_head.weight.dtype == logits(model).dtype == dtype
        cast = bitnet.load(directory).to(dtype)
        bitnet.save(model, tmp_path / "again")
        again = bitnet.load(tmp_path / "again")
        assert again.dtype == dtype
        for found in (model, cast, again):
            for got, wanted in zip(scales(found), exact, strict=True):
                assert got.dtype == torch.float32
                assert torch.equal(got, wanted)


def test_trained_scales_survive_a_save_bit_for_bit(written: Written, tmp_path: Path) -> None:
    model = llama()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path)
    for got, wanted in zip(scales(bitnet.load(tmp_path)), scales(model), strict=True):
        assert torch.equal(got, wanted)


def test_save_pretrained_after_pack_needs_no_help(tmp_path: Path) -> None:
    model = llama()
    bitnet.replace_linear(model)
    model.save_pretrained(tmp_path / "training")
    bitnet.pack(model)
    model.save_pretrained(tmp_path / "packed")
    for form in FORMS:
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / form)), logits(model))


def test_a_loaded_training_checkpoint_packs_and_saves(written: Written, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(written.root / "llama-training")
    bitnet.pack(model)
    model.save_pretrained(tmp_path)
    assert same_tensors(tmp_path, written.root / "llama-packed")


def test_a_model_without_low_bit_layers_carries_no_config(both: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, _ = both
    bitnet.unpack(model)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_dequantize_gives_plain_linears(both: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    model, _ = both
    unpacked = copy.deepcopy(model)
    bitnet.unpack(unpacked)
    model.dequantize()
    assert not any(isinstance(module, bitnet.PackedBitLinear) for module in model.modules())
    assert torch.equal(logits(model), logits(unpacked))


def test_the_quantizer_of_another_method_is_left_alone(tmp_path: Path) -> None:
    model = llama()
    model.config.quantization_config = foreign = {"quant_method": "fp8"}
    bitnet.save(model, tmp_path)
    assert model.config.quantization_config is foreign


@pytest.mark.parametrize("first", ["bitnet", "transformers"])
def test_either_import_order_registers_our_layers(first: str, written: Written) -> None:
    imports = {
        "bitnet": "import bitnet; assert not {'torch', 'transformers'} & {*sys.modules}, 'no light import'\n",
        "transformers": "from transformers import AutoModelForCausalLM; AutoModelForCausalLM; import bitnet\n",
    }
    script = (
        f"import sys\n{imports[first]}"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "assert type(model.model.layers[1].mlp.up_proj) is bitnet.PackedBitLinear\n"
    )
    command = [sys.executable, "-c", script, str(written.root / "llama-packed")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def rewrite_config(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a checkpoint whose quantization_config has other values; None removes a key."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((target / "config.json").read_text())
    settings = {**config["quantization_config"], **changes}
    config["quantization_config"] = {key: value for key, value in settings.items() if value is not None}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("packed", [False, True])
def test_a_stock_config_that_code_passes_loads_our_layers(packed: bool, tmp_path: Path) -> None:
    model = llama()
    bitnet.replace_linear(model)
    if packed:
        bitnet.pack(model)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="`quantization_config` from the model will be used"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitNetQuantConfig())
    assert isinstance(loaded.model.layers[0].mlp.up_proj, LOW_BIT)
    assert torch.equal(logits(loaded), logits(model))


def test_an_extended_config_without_its_section_is_damaged(written: Written, tmp_path: Path) -> None:
    directory = rewrite_config(written.root / "per_row-packed", tmp_path / "x", bitnet_toolkit=None)
    for load in (bitnet.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"`bitnet_toolkit` section is missing or damaged"):
            load(directory)


@pytest.mark.parametrize("form", FORMS)
def test_experts_of_a_stock_checkpoint_become_low_bit(written: Written, form: str, tmp_path: Path) -> None:
    """A stock config need not name the experts it keeps, since stock transformers swaps nn.Linear only."""
    name = f"skip_experts-{form}"
    directory = rewrite_config(written.root / name, tmp_path / "x", modules_to_not_convert=["lm_head"])
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(logits(model), written.logits(name))


def test_options_travel_with_every_layer(written: Written) -> None:
    original = written.models["mixed-training"]
    for form in FORMS:
        loaded = bitnet.load(written.root / f"mixed-{form}")
        for name, module in original.named_modules():
            if isinstance(module, bitnet.BitLinear):
                assert loaded.get_submodule(name).spec == module.spec
            elif isinstance(module, nn.Linear):
                assert type(loaded.get_submodule(name)) is nn.Linear
    specs = {module.spec for module in original.modules() if isinstance(module, bitnet.BitLinear)}
    assert specs == {bitnet.QuantSpec(), replace(bitnet.QuantSpec(), activation_bits=4, per_row=True, rms_norm=True)}


class Tokens(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": torch.arange(6) + i, "labels": torch.arange(6) + i}


def trainer(model: nn.Module, directory: Path) -> Trainer:
    arguments = TrainingArguments(
        str(directory), max_steps=3, per_device_train_batch_size=2, learning_rate=0.05, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=Tokens())


def test_trainer_trains_and_its_save_reloads_in_training(tmp_path: Path) -> None:
    model = llama()
    bitnet.replace_linear(model)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    run = trainer(model, tmp_path)
    run.train()
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    run.save_model(str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded.model.layers[0].mlp.up_proj) is bitnet.BitLinear
    assert torch.equal(logits(loaded), logits(model.eval()))
    trainer(loaded, tmp_path).train()  # and goes on


def test_trainer_refuses_a_packed_model(written: Written, tmp_path: Path) -> None:
    fresh = llama()
    bitnet.replace_linear(fresh)
    bitnet.pack(fresh)
    for model in (fresh, bitnet.load(written.root / "llama-packed"), bitnet.load(written.root / "per_row-packed")):
        with pytest.raises(ValueError, match="purely quantized"):
            trainer(model, tmp_path)


def test_lora_trains_beside_packed_layers(both: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, _ = both
    packed = {key: value.clone() for key, value in model.state_dict().items()}
    settings = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2)
    adapted = peft.get_peft_model(model, settings)
    before = logits(adapted.eval())
    trainer(adapted, tmp_path).train()
    assert not torch.equal(logits(adapted.eval()), before)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    for key, value in adapted.unload().state_dict().items():
        assert torch.equal(value, packed[key])
