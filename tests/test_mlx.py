"""Folders that MLX quantized: read as packed layers or floats, refused by the tensor's name, and written."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_models
import mlx_models
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file

import bitnet
from bitnet import cli
from bitnet.convert.conversion.convert import convert_checkpoint
from bitnet.convert.files import mlx
from bitnet.convert.files.damaged import Damaged
from bitnet.convert.inspection import diff_checkpoints, inspect_checkpoint
from bitnet.convert.mlx.source import MlxSource
from bitnet.convert.opening import open_source
from bitnet.kernels.reference import dequantize_weight
from bitnet.packed import PackedBitLinear

QUIET = Console(quiet=True)
IDS = torch.tensor([[3, 41, 5, 17, 200, 511]])
UP = "model.layers.0.mlp.up_proj"


def rng() -> Any:
    return np.random.default_rng(0)


def qwen3(**changes: Any) -> Any:
    torch.manual_seed(0)
    return gguf_models.model("qwen3", num_hidden_layers=1, **changes)


def folder(path: Path, make: str = "ternary", group: int = 128, **options: Any) -> tuple[Path, dict[str, Any]]:
    """A small Qwen 3 whose linear layers are made by that function of mlx_models; and its tensors."""
    generator = rng()
    makers = {"embed_tokens": lambda n, k: mlx_models.affine(n, k, 64, 8, generator)}
    makers["lm_head"] = lambda n, k: mlx_models.affine(n, k, 64, 4, generator)
    build = getattr(mlx_models, make)
    tensors, config = mlx_models.model(qwen3(), generator, lambda n, k: build(n, k, group, rng=generator, **options))
    for name, maker in makers.items():
        key = next(key for key in tensors if f"{name}.weight" in key)
        tensors[key] = maker(*tensors[key].shape)
    bits = 1 if make == "binary" else 2
    section = {"group_size": group, "bits": bits, "mode": "affine"}
    section |= {"model.embed_tokens": {"group_size": 64, "bits": 8}, "lm_head": {"group_size": 64, "bits": 4}}
    return mlx_models.save(path, tensors, config, section), tensors


@pytest.mark.parametrize("dtype", mlx_models.DTYPES)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [1, 2])
def test_codes_and_scales_are_those_that_were_stored(bits: int, group: int, dtype: str) -> None:
    build = mlx_models.binary if bits == 1 else mlx_models.ternary
    stored = build(6, 384, group, rng(), mlx_models.DTYPES[dtype])
    words = torch.from_numpy(mlx_models.words(stored.q, bits).view(np.int32))
    how = mlx.Affine(group, bits)
    assert (tuple(words.shape), tuple(stored.scales.shape)) == how.shapes(6, 384)
    codes = mlx.codes_of(words, stored.scales, stored.biases, how)
    assert torch.equal(codes, torch.from_numpy(stored.q.astype(np.int8)) * (2 if bits == 1 else 1) - 1)
    assert torch.equal(mlx.dequantize(words, stored.scales, stored.biases, how), stored.floats)
    if dtype == "float32":  # which float16 does not hold
        with pytest.raises(ValueError, match="has scales of groups that float16"):
            mlx.scale_of(stored.scales, stored.biases, how)
        return
    scale, binary = mlx.scale_of(stored.scales, stored.biases, how)
    assert binary is (bits == 1)
    assert scale.dtype == torch.float16
    assert torch.equal(dequantize_weight(codes, scale), stored.floats)


@pytest.mark.parametrize("bits", mlx.BITS)
def test_every_width_comes_out_of_its_words(bits: int) -> None:
    stored = mlx_models.affine(5, 192, 64, bits, rng())
    words = torch.from_numpy(mlx_models.words(stored.q, bits).view(np.int32))
    assert np.array_equal(mlx.unpack(words, bits), stored.q)
    how = mlx.Affine(64, bits)
    assert torch.equal(mlx.dequantize(words, stored.scales, stored.biases, how), stored.floats)


def test_a_group_without_a_scale_is_zeros() -> None:
    for build, bits in ((mlx_models.ternary, 2), (mlx_models.binary, 1)):
        stored = build(4, 256, 128, rng())
        stored.scales[1, 0] = stored.biases[1, 0] = 0
        stored.q[1, :128] = 2**bits - 1
        words = torch.from_numpy(mlx_models.words(stored.q, bits).view(np.int32))
        codes = mlx.codes_of(words, stored.scales, stored.biases, mlx.Affine(128, bits))
        scale, binary = mlx.scale_of(stored.scales, stored.biases, mlx.Affine(128, bits))
        assert not binary, "zeros are none of a binary layer's"
        assert torch.equal(dequantize_weight(codes, scale), stored.floats)


@pytest.mark.parametrize(("make", "group"), [("ternary", 128), ("ternary", 64), ("ternary", 32), ("binary", 128)])
def test_a_model_is_read(make: str, group: int, tmp_path: Path) -> None:
    path, tensors = folder(tmp_path / "mlx", make, group)
    source = open_source(path)
    assert isinstance(source, MlxSource)
    assert len(source.layers()) == 7
    spec = source.layers()[UP].spec
    assert (spec.weights, spec.group_size) == (make, group)
    assert (spec.activation_bits, spec.centered) == (8, make == "ternary")
    assert not source.mismatches()
    convert_checkpoint(path, tmp_path / "hub", "hub", tokenizer=False, console=QUIET)
    convert_checkpoint(path, tmp_path / "bf16", "bf16", tokenizer=False, console=QUIET)
    model, floats = bitnet.load(tmp_path / "hub"), load_file(tmp_path / "bf16" / "model.safetensors")
    assert "quantization" not in json.loads((tmp_path / "hub" / "config.json").read_text())
    state = model.state_dict()
    for name, stored in tensors.items():
        value = stored.floats if isinstance(stored, mlx_models.Matrix) else stored.float()
        assert torch.equal(floats[name], value.bfloat16()), name
        layer = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(layer, PackedBitLinear):
            assert torch.equal(dequantize_weight(layer.codes(), layer.weight_scale), value)
        else:
            assert torch.equal(state[name].float(), value.to(state[name].dtype).float()), name
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scales_of_rows_are_float32(dtype: str, tmp_path: Path) -> None:
    path, tensors = folder(tmp_path / "mlx", dtype=mlx_models.DTYPES[dtype], per_row=True)
    source = open_source(path)
    assert source.layers()[UP].spec.per_row
    found = source.quantized(UP)
    assert torch.equal(found.scale, tensors[f"{UP}.weight"].scales[:, 0].float())
    assert torch.equal(dequantize_weight(found.codes, found.scale), tensors[f"{UP}.weight"].floats)


def test_the_commands_take_a_folder_of_mlx(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, _ = folder(tmp_path / "mlx")
    gguf_models.tokenizer().save_pretrained(path)
    assert cli.main(["inspect", str(path)]) == 0
    assert re.search(rf"{re.escape(UP)} +packed +512x256", capsys.readouterr().out)
    for to in ("hub", "bf16", "base3"):
        assert cli.main(["convert", str(path), str(tmp_path / to), "--to", to]) == 0
        assert (tmp_path / to / "tokenizer.json").exists()
    assert cli.main(["convert", str(path), str(tmp_path / "m.gguf"), "--to", "gguf-q2_0"]) == 0
    assert str(diff_checkpoints(path, tmp_path / "hub", QUIET)).endswith(" 0 different")
    source, back = open_source(path), open_source(tmp_path / "m.gguf")
    for name in source.layers():
        assert all(map(torch.equal, source.quantized(name), back.quantized(name)))


def test_the_older_config_of_mlx_is_one_too(tmp_path: Path) -> None:
    path, _ = folder(tmp_path / "mlx")
    config = json.loads((path / "config.json").read_text())
    del config["quantization"]
    (path / "config.json").write_text(json.dumps(config))
    assert isinstance(open_source(path), MlxSource)


def test_loading_says_how_to_convert(tmp_path: Path) -> None:
    path, _ = folder(tmp_path / "mlx")
    with pytest.raises(
        ValueError, match=r"config\.json: MLX quantized it; convert it first: `bitnet convert .*mlx OUT"
    ):
        bitnet.load(path)


# What is refused


def changed(path: Path, name: str, change: Callable[[mlx_models.Matrix], Any]) -> Path:
    """The folder with one matrix changed."""
    _, tensors = folder(path)
    config = json.loads((path / "config.json").read_text())
    change(tensors[f"{name}.weight"])
    section = config.pop("quantization")
    config.pop("quantization_config")
    return mlx_models.save(path, tensors, config, section)


def threes(matrix: mlx_models.Matrix) -> None:
    matrix.q[7, :3] = 3


def other_bias(matrix: mlx_models.Matrix) -> None:
    matrix.biases = matrix.biases * 1.5


def set_scale(value: float) -> Callable[[mlx_models.Matrix], None]:
    def change(matrix: mlx_models.Matrix) -> None:
        matrix.scales[3, 1], matrix.biases[3, 1] = value, -value

    return change


def test_weights_of_2_are_counted_and_kept_as_floats(tmp_path: Path) -> None:
    path = changed(tmp_path / "mlx", UP, threes)
    message = rf"{re.escape(UP)}: holds 3 weights \(0\.0023 %\) of \+2, so it is not ternary.*--to bf16"
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(path, tmp_path / "hub", "hub", tokenizer=False, console=QUIET)
    assert any(re.search(message, problem) for problem in inspect_checkpoint(path, QUIET).problems)
    convert_checkpoint(path, tmp_path / "bf16", "bf16", tokenizer=False, console=QUIET)
    weight = load_file(tmp_path / "bf16" / "model.safetensors")[f"{UP}.weight"]
    scale = load_file(path / "model.safetensors")[f"{UP}.scales"]
    assert torch.equal(weight[7, :3], (2 * scale[7, :1].float()).bfloat16().expand(3))


AFFINE: dict[str, tuple[Callable[[mlx_models.Matrix], Any], str]] = {
    "another bias": (other_bias, "holds 2-bit weights that are not ternary: its scales and biases are those of other"),
    "negative": (set_scale(-0.5), "holds 2-bit weights that are not ternary"),
    "nan": (set_scale(float("nan")), "has a scale or bias that is infinite or NaN"),
    "infinite": (set_scale(float("inf")), "has a scale or bias that is infinite or NaN"),
}


@pytest.mark.parametrize(("change", "reason"), AFFINE.values(), ids=AFFINE)
def test_what_is_affine_only_is_refused_by_the_tensors_name(
    change: Callable[[mlx_models.Matrix], Any], reason: str, tmp_path: Path
) -> None:
    path = changed(tmp_path / "mlx", UP, change)
    with pytest.raises(ValueError, match=rf"mlx: tensor {re.escape(UP)}\.weight: {reason}"):
        open_source(path)
    if "NaN" in reason:
        with pytest.raises(ValueError, match=rf"{re.escape(UP)}\.weight: {reason}"):
            convert_checkpoint(path, tmp_path / "bf16", "bf16", tokenizer=False, console=QUIET)
        return
    source = open_source(path, floats=True)
    assert not source.layers()
    stored = load_stored(path, UP)
    assert torch.equal(source.tensor(f"{UP}.weight"), stored.floats)


def load_stored(path: Path, name: str) -> mlx_models.Matrix:
    with safe_open(path / "model.safetensors", "np") as stream:
        words, scales, biases = (stream.get_tensor(f"{name}.{leaf}") for leaf in ("weight", "scales", "biases"))
    fields = (words[..., None] >> np.arange(0, 32, 2, dtype=np.uint32) & 3).reshape(len(words), -1)
    return mlx_models.Matrix(fields, torch.from_numpy(scales), torch.from_numpy(biases), 2)


def edit(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Path:
    """Change the state and the config of the folder."""
    folder(path)
    with safe_open(path / "model.safetensors", "np") as stream:
        state = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
    config = json.loads((path / "config.json").read_text())
    change(state, config["quantization"])
    (path / "config.json").write_text(json.dumps(config))
    mlx_models._write(path / "model.safetensors", state)
    return path


BROKEN: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "mode": (lambda s, q: q.update(mode="mxfp4"), "its quantization is of the mode 'mxfp4'; affine is read here"),
    "own mode": (lambda s, q: q["lm_head"].update(mode="nvfp4"), "its quantization of lm_head is of the mode 'nvfp4'"),
    "bits": (lambda s, q: q.update(bits=7), "in groups of 128 and 7 bits, which MLX does not have"),
    "bool": (lambda s, q: q.update(bits=True), "in groups of 128 and True bits"),
    "group": (lambda s, q: q.update(group_size=100), "in groups of 100 and 2 bits, which MLX does not have"),
    "no bits": (lambda s, q: q.pop("bits"), "in groups of 128 and None bits"),
    "other group": (lambda s, q: q.update(group_size=64), r"_proj\.weight is U32 .* but config\.json means U32"),
    "other bits": (lambda s, q: q.update(bits=1), r"_proj\.weight is U32 .* but config\.json means U32"),
    "own bits": (lambda s, q: q["lm_head"].update(bits=8), r"lm_head\.weight is U32 .* but config\.json means U32"),
    "false": (
        lambda s, q: q.update(lm_head=False),
        r"lm_head\.weight is quantized, but config\.json says that it is not",
    ),
    "no biases": (lambda s, q: s.pop(f"{UP}.biases"), rf"has {re.escape(UP)}\.scales without its weight or its biases"),
    "no weight": (lambda s, q: s.pop(f"{UP}.weight"), rf"has {re.escape(UP)}\.scales without its weight or its biases"),
    "no scales": (lambda s, q: s.pop(f"{UP}.scales"), rf"{re.escape(UP)}\.weight is stored as U32, and has no scales"),
    "words only": (
        lambda s, q: [s.pop(f"{UP}.{leaf}") for leaf in ("scales", "biases")],
        rf"{re.escape(UP)}\.weight is stored as U32, and has no scales",
    ),
    "half words": (
        lambda s, q: s.update({f"{UP}.weight": s[f"{UP}.weight"].view(np.int32)}),
        rf"{re.escape(UP)}\.weight is I32 \[512, 16\].*means U32 \[512, 16\]",
    ),
    "rows": (
        lambda s, q: s.update({f"{UP}.scales": s[f"{UP}.scales"][:-1]}),
        rf"{re.escape(UP)}\.weight is U32 .*\[511, 2\] and \[512, 2\], but",
    ),
    "whole scales": (
        lambda s, q: s.update({f"{UP}.{leaf}": s[f"{UP}.{leaf}"].astype(np.int16) for leaf in ("scales", "biases")}),
        rf"the scales of {re.escape(UP)}\.weight are I16",
    ),
    "two kinds": (
        lambda s, q: s.update({f"{UP}.biases": s[f"{UP}.biases"].astype(np.float32)}),
        rf"{re.escape(UP)}\.weight is U32",
    ),
    "stranger": (
        lambda s, q: s.update({"model.layers.0.mlp.switch.weight": np.zeros((2, 2), np.float32)}),
        r"tensor model\.layers\.0\.mlp\.switch\.weight has no place in Qwen3ForCausalLM",
    ),
    "norm": (
        lambda s, q: s.update({f"model.norm.{leaf}": s[f"{UP}.{leaf}"] for leaf in ("weight", "scales", "biases")}),
        r"model\.norm\.weight is quantized, but is no matrix",
    ),
}


@pytest.mark.parametrize(("change", "reason"), BROKEN.values(), ids=BROKEN)
def test_files_that_contradict_themselves_are_one_error(
    change: Callable[[dict[str, Any], dict[str, Any]], Any], reason: str, tmp_path: Path
) -> None:
    path, out = edit(tmp_path / "mlx", change), tmp_path / "out"
    for read in (inspect_checkpoint, lambda path: convert_checkpoint(path, out, "bf16", tokenizer=False)):
        with pytest.raises(ValueError, match=reason) as error:
            read(path)
        assert str(path) in str(error.value)


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    path, _ = folder(tmp_path / "mlx")
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-1000])
    with pytest.raises(Damaged, match="it was cut short"):
        open_source(path)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    path = edit(tmp_path / "mlx", lambda s, q: [s.pop(f"{UP}.{leaf}") for leaf in ("weight", "scales", "biases")])
    with pytest.raises(ValueError, match=rf"there is no tensor {re.escape(UP)}\.weight"):
        convert_checkpoint(path, tmp_path / "out", tokenizer=False, console=QUIET)


def test_rotated_weights_are_refused(tmp_path: Path) -> None:
    path, _ = folder(tmp_path / "mlx")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"hadamard_config": "hadamard.json"}))
    with pytest.raises(ValueError, match=r"its weights are rotated \(hadamard_config\), which is not read here"):
        open_source(path)


# Written


def packed(path: Path, family: str = "qwen3", head: str | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = gguf_models.model(family, num_hidden_layers=1, hidden_size=512, intermediate_size=768)
    bitnet.replace_linear(model, **options)
    bitnet.pack(model, head=head)
    bitnet.save(model, path)
    gguf_models.tokenizer().save_pretrained(path)
    return model


SCALES: list[tuple[dict[str, Any], int]] = [
    ({}, 128),
    ({"per_row": True}, 128),
    ({"group_size": 32}, 32),
    ({"group_size": 64}, 64),
    ({"group_size": 128}, 128),
    ({"group_size": 256}, 128),
    ({"weights": "binary", "centered": False, "group_size": 128}, 128),
]


@pytest.mark.parametrize(("options", "size"), SCALES)
def test_what_is_written_is_exact_and_comes_back(options: dict[str, Any], size: int, tmp_path: Path) -> None:
    model = packed(tmp_path / "hub", **options)
    convert_checkpoint(tmp_path / "hub", tmp_path / "mlx", "mlx", console=QUIET)
    config = json.loads((tmp_path / "mlx" / "config.json").read_text())
    assert config["quantization"] == {"group_size": size, "bits": 2, "mode": "affine"}
    assert config["quantization_config"] == config["quantization"]
    assert (tmp_path / "mlx" / "tokenizer.json").exists()
    for name, layer in model.named_modules():
        if isinstance(layer, PackedBitLinear):
            stored = load_stored(tmp_path / "mlx", name)
            assert stored.q.max() <= 2
            assert torch.equal(stored.floats, dequantize_weight(layer.codes(), layer.weight_scale)), name
    assert str(diff_checkpoints(tmp_path / "hub", tmp_path / "mlx", QUIET)).endswith(" 0 different")
    convert_checkpoint(tmp_path / "mlx", tmp_path / "back", console=QUIET)
    with torch.no_grad():
        assert torch.equal(bitnet.load(tmp_path / "back")(IDS).logits, model(IDS).logits)
    convert_checkpoint(tmp_path / "mlx", tmp_path / "again", "mlx", console=QUIET)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("mlx", "again")]
    assert files[0] == files[1]


def test_layers_of_other_groups_are_named(tmp_path: Path) -> None:
    model = gguf_models.model("llama", num_hidden_layers=1, intermediate_size=288)
    bitnet.replace_linear(model, group_size=128)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "hub")
    convert_checkpoint(tmp_path / "hub", tmp_path / "mlx", "mlx", tokenizer=False, console=QUIET)
    section = json.loads((tmp_path / "mlx" / "config.json").read_text())["quantization"]
    assert section.pop("model.layers.0.mlp.down_proj") == {"group_size": 32, "bits": 2, "mode": "affine"}
    assert section == {"group_size": 128, "bits": 2, "mode": "affine"}
    source = open_source(tmp_path / "mlx")
    down = model.model.layers[0].mlp.down_proj
    floats = dequantize_weight(*source.quantized("model.layers.0.mlp.down_proj"))
    assert torch.equal(floats, dequantize_weight(down.codes(), down.weight_scale))


def test_a_float_model_and_a_gguf_file_are_written_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = gguf_models.model("llama", num_hidden_layers=1)
    model.save_pretrained(tmp_path / "float")
    gguf_models.tokenizer().save_pretrained(tmp_path / "float")
    convert_checkpoint(tmp_path / "float", tmp_path / "mlx", "mlx", group_size=128, console=QUIET)
    convert_checkpoint(tmp_path / "float", tmp_path / "m.gguf", "gguf-q2_0", group_size=128, console=QUIET)
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "other", "mlx", console=QUIET)
    assert str(diff_checkpoints(tmp_path / "mlx", tmp_path / "other", QUIET)).endswith(" 0 different")


NOT_WRITTEN: dict[str, tuple[dict[str, Any], str]] = {
    "head": ({"head": "int8"}, r"lm_head has 8-bit codes, which are not written for mlx"),
    "norm": ({"rms_norm": True}, r"has a norm inside, or is no plain linear layer"),
    "family": ({"family": "bitnet"}, r"mlx is written for llama, mistral, qwen2, qwen3; .* is a bitnet"),
}


@pytest.mark.parametrize(("options", "reason"), NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_what_mlx_cannot_express_is_refused_before_a_byte_is_written(
    options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    packed(tmp_path / "hub", **options)
    with pytest.raises(ValueError, match=reason):
        convert_checkpoint(tmp_path / "hub", tmp_path / "mlx", "mlx", console=QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["hub"]


def test_rows_that_no_group_fits_are_refused(tmp_path: Path) -> None:
    model = gguf_models.model("llama", num_hidden_layers=1, intermediate_size=300)
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "hub")
    with pytest.raises(
        ValueError, match=r"down_proj has rows of 300 weights, which are no whole number of groups of 32"
    ):
        convert_checkpoint(tmp_path / "hub", tmp_path / "mlx", "mlx", tokenizer=False, console=QUIET)
