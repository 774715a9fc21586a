"""bitnet inspect: what it says of a checkpoint must be so."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import llama
from torch import Tensor

import bitnet
from bitnet import cli
from bitnet.convert.conversion.convert import convert_checkpoint
from bitnet.convert.inspection import diff_checkpoints, inspect_checkpoint, runs_here
from bitnet.convert.opening import open_source

QUIET = Console(quiet=True)
UP, NORM = "model.layers.1.mlp.up_proj", "model.norm.weight"


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as float, latent and packed checkpoints, and in bf16 and base 3."""
    root = tmp_path_factory.mktemp("forms")
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(root / "float")
    bitnet.replace_linear(model)
    bitnet.save(model, root / "latent")
    bitnet.pack(model)
    bitnet.save(model, root / "hub")
    for to in ("base3", "bf16"):
        convert_checkpoint(root / "hub", root / to, to, console=QUIET)
    return root


def damaged(source: Path, target: Path, **changes: Any) -> Path:
    """A copy in which each tensor named is what its function makes of it; None drops it."""
    state = load_file(source / "model.safetensors")
    for key, change in changes.items():
        value = change(state.pop(key))
        if value is not None:
            state[key] = value
    target.mkdir()
    save_file(state, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


@pytest.mark.parametrize(("form", "bits"), [("latent", 32.0), ("hub", 2 + 32 / 384), ("base3", 8 * 4 / 16 + 32 / 384)])
def test_shares_scale_entropy_and_bits_are_those_of_the_codes(forms: Path, form: str, bits: float) -> None:
    found = inspect_checkpoint(forms / form, QUIET)
    layer = bitnet.load(forms / "hub").get_submodule(UP)
    codes = layer.codes().numpy()
    row = next(m for m in found.matrices if m.name == UP)
    shares = [np.mean(codes == value) for value in (-1, 0, 1)]
    assert row.shares == pytest.approx(shares)
    assert row.entropy == pytest.approx(-sum(p * math.log2(p) for p in shares))
    assert row.scale == (layer.weight_scale.item(), layer.weight_scale.item())
    assert row.kind == ("latent" if form == "latent" else "packed")
    assert row.shape == codes.shape
    assert row.weight_bits == pytest.approx(bits)
    assert len(found.matrices) == 16
    assert not found.problems
    assert UP in str(found)
    assert "no problems found" in str(found)


def test_all_bytes_of_the_weights_are_accounted_for(forms: Path) -> None:
    for form in ("float", "latent", "hub", "base3", "bf16"):
        found = inspect_checkpoint(forms / form, QUIET)
        size = sum(math.prod(m.shape) * m.weight_bits / 8 for m in found.matrices) + found.other_bytes
        assert size == pytest.approx(sum(t.nbytes for t in load_file(forms / form / "model.safetensors").values()))


@pytest.mark.parametrize(
    "options",
    [{}, {"group_size": 32, "activation_bits": None}, {"weights": "binary", "per_row": True, "activation_bits": 16}],
    ids=["8 bits", "groups, floats", "binary, 16 bits"],
)
def test_what_runs_each_kind_of_layer_is_what_runs_it_once_loaded(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = llama()
    bitnet.replace_linear(model, **options)
    bitnet.pack(model, head="int4")
    bitnet.save(model, tmp_path / "m")
    layers = [m for m in bitnet.load(tmp_path / "m").modules() if isinstance(m, bitnet.PackedBitLinear)]
    counts = Counter((layer.prepack()[1], layer.options()) for layer in layers)
    expected = {
        f"{n} {'matrices run' if n > 1 else 'matrix runs'} on cpu, backend {backend}: {options}"
        for (backend, options), n in counts.items()
    }
    found = inspect_checkpoint(tmp_path / "m", QUIET)
    assert set(found.runs) == expected
    assert len(expected) == 2
    assert all(line in str(found).splitlines() for line in expected)


def test_asking_what_runs_a_layer_reads_no_weight(forms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(forms / "hub")
    for name in ("tensor", "pieces", "quantized"):
        monkeypatch.setattr(type(source), name, lambda *args: pytest.fail("a tensor was read"))
    (line,) = runs_here(source.weights().values())
    assert "14 matrices run on" in line


def poke(value: float) -> Any:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


PROBLEMS: dict[str, tuple[dict[str, Any], str]] = {
    "zero_bytes": ({f"{UP}.weight": torch.zeros_like}, f"{UP}: every weight is -1"),
    "zero_codes": ({f"{UP}.weight": lambda t: torch.full_like(t, 0x55)}, f"{UP}: every weight is 0"),
    "code_3": ({f"{UP}.weight": poke(0xFF)}, f"{UP}: packed weight is corrupt"),
    "nan_scale": ({f"{UP}.weight_scale": lambda t: t * torch.nan}, f"{UP}: weight_scale must be positive and finite"),
    "far_scale": ({f"{UP}.weight_scale": lambda t: t * 1e3}, f"{UP}: its scale of .* is far from"),
    "nan": ({NORM: poke(torch.nan)}, f"{NORM}: 1 values are NaN or Inf"),
    "zero": ({"lm_head.weight": torch.zeros_like}, "lm_head.weight: every value is zero"),
    "missing": ({NORM: lambda t: None}, f"there is no tensor {NORM}"),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_damage_is_reported_and_the_rest_still_read(forms: Path, name: str, tmp_path: Path, capsys: Any) -> None:
    changes, message = PROBLEMS[name]
    source = damaged(forms / "hub", tmp_path / "damaged", **changes)
    found = inspect_checkpoint(source, QUIET)
    assert len(found.problems) == 1
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found.problems[0])
    assert len(found.matrices) == 16 - (name in ("code_3", "nan_scale"))
    assert cli.main(["inspect", str(source)]) == 1
    assert "1 problems found" in capsys.readouterr().out


def test_scales_in_the_wrong_direction_are_pointed_out(forms: Path, tmp_path: Path) -> None:
    state = load_file(forms / "hub" / "model.safetensors")
    source = damaged(forms / "hub", tmp_path / "wrong", **{k: torch.reciprocal for k in state if k.endswith("_scale")})
    problems = inspect_checkpoint(source, QUIET).problems
    assert len(problems) == 1
    assert "probably the reciprocals of what config.json says" in problems[0]


def test_the_same_weights_in_other_forms_are_equal(forms: Path) -> None:
    for one, other in (("hub", "base3"), ("hub", "latent"), ("latent", "base3")):
        comparison = diff_checkpoints(forms / one, forms / other, QUIET)
        assert comparison.differences == {}
        assert comparison.equal == 21
    assert len(diff_checkpoints(forms / "float", forms / "hub", QUIET).differences) == 14


def test_a_difference_is_named_and_measured(forms: Path, tmp_path: Path, capsys: Any) -> None:
    def turn(packed: Tensor) -> Tensor:
        packed[0, 0] ^= 0b11 if packed[0, 0] & 3 in (1, 2) else 0b10  # one code: 0 <-> +1, -1 -> +1
        return packed

    changes = {
        f"{UP}.weight": turn,
        "model.layers.0.mlp.up_proj.weight_scale": lambda t: t / 1.5,
        NORM: lambda t: t + 0.5,
        "lm_head.weight": lambda t: None,
    }
    source = damaged(forms / "hub", tmp_path / "other", **changes)
    found = diff_checkpoints(forms / "hub", source, QUIET).differences
    assert found.keys() == {f"{UP}.weight", "model.layers.0.mlp.up_proj.weight", NORM, "lm_head.weight"}
    assert found[f"{UP}.weight"].startswith("1 of 384 codes")
    assert found["model.layers.0.mlp.up_proj.weight"] == "scale by up to 33 %"
    assert "at most 0.5" in found[NORM]
    assert found["lm_head.weight"] == "only in the first"
    assert cli.main(["inspect", str(forms / "hub"), "--diff", str(source)]) == 1
    assert "17 equal, 4 different" in capsys.readouterr().out
    assert cli.main(["inspect", str(forms / "hub"), "--diff", str(forms / "base3")]) == 0


def test_the_plot_is_a_picture(forms: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["inspect", str(forms / "hub"), "--plot", str(tmp_path / "p.png")]) == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["inspect", str(forms / "float"), "--plot", str(tmp_path / "q.png")]) == 1
    assert "no ternary layers to plot" in capsys.readouterr().err


def test_a_truncated_file_is_one_error(forms: Path, tmp_path: Path, capsys: Any) -> None:
    source = damaged(forms / "hub", tmp_path / "cut")
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    assert cli.main(["inspect", str(source)]) == 1
    assert "cut short" in capsys.readouterr().err


@pytest.mark.parametrize("head", ["int8", "int4", "ternary"])
def test_packed_heads_and_models_without_layers_are_described(head: str, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    bitnet.replace_linear(model)
    bitnet.pack(model, head=head)
    bitnet.save(model, tmp_path / "head")
    found = inspect_checkpoint(tmp_path / "head", QUIET)
    rows = {m.name: m for m in found.matrices if "layers" not in m.name}
    assert list(rows) == ["model.embed_tokens"]
    assert (rows["model.embed_tokens"].kind, rows["model.embed_tokens"].shape) == ("packed", (64, 16))
    assert rows["model.embed_tokens"].what.startswith(f"{head}, ")
    assert not found.problems
    llama().save_pretrained(tmp_path / "float")
    kinds = {m.kind for m in inspect_checkpoint(tmp_path / "float", QUIET).matrices}
    assert kinds == {"float"}
    assert json.loads((tmp_path / "float" / "config.json").read_text())["model_type"] == "llama"


def test_scales_of_other_groups_are_compared_by_what_they_stand_for(tmp_path: Path) -> None:
    """One scale a row is one for the only group of its features; a file may say either."""
    torch.manual_seed(0)
    for name, options in (("rows", {"per_row": True}), ("groups", {"group_size": 64}), ("finer", {"group_size": 32})):
        model = llama()
        with torch.no_grad():
            for parameter in model.parameters():
                size = 0.5 ** (1 + torch.arange(len(parameter)) % 4)  # exact as float16, and so is its reciprocal
                signs = torch.randint(0, 2, parameter.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
                parameter.copy_(signs * size.view(-1, *[1] * (parameter.ndim - 1)))
        bitnet.replace_linear(model, **options)
        bitnet.pack(model)
        bitnet.save(model, tmp_path / name)
    for one, other in (("rows", "groups"), ("groups", "finer"), ("finer", "rows")):
        assert not diff_checkpoints(tmp_path / one, tmp_path / other, QUIET).differences


@pytest.mark.parametrize("signs", [False, True])
def test_a_rotated_layer_is_compared_with_its_float_twin_turned_back(signs: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = llama().bfloat16()
    bitnet.replace_linear(model, hadamard=8, hadamard_signs=signs)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "packed")
    convert_checkpoint(tmp_path / "packed", tmp_path / "floats", "bf16", tokenizer=False, console=QUIET)
    assert diff_checkpoints(tmp_path / "packed", tmp_path / "floats", QUIET).differences == {}
    if signs:
        layer = model.model.layers[0].mlp.up_proj
        layer.signs.neg_()  # which is another matrix, of the same codes
        bitnet.save(model, tmp_path / "turned")
        found = diff_checkpoints(tmp_path / "packed", tmp_path / "turned", QUIET).differences
        assert list(found) == ["model.layers.0.mlp.up_proj.weight"]
        assert "values by 2e+02 %" in found["model.layers.0.mlp.up_proj.weight"]
