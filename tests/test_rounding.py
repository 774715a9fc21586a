"""Float weights that are codes * scale already keep both through conversions; others are rounded as layers round."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny import IDS, gpt2, llama, mixtral
from torch import Tensor
from transformers import AutoModelForCausalLM

import bitnet
from bitnet.convert.hub.source import FolderSource
from bitnet.convert.rounding import exact

QUIET = Console(quiet=True)


def convert(source: Path, target: Path, to: str = "hub", **options: Any) -> Path:
    return bitnet.convert_checkpoint(source, target, to, console=QUIET, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("per_row", [False, True])
def test_codes_times_scale_are_found_whatever_the_dtype(per_row: bool, dtype: torch.dtype) -> None:
    codes = torch.randint(-1, 2, (300, 1000), dtype=torch.int8)
    codes[7] = 0
    scale = torch.rand(300 if per_row else 1) + 0.01
    floats = (codes * scale[:, None]).to(dtype)
    found = exact(floats, per_row)
    assert found is not None
    assert torch.equal(found.codes, codes)
    kept = torch.ones(len(scale), dtype=torch.bool)
    kept[7:8] = not per_row  # a row of zeros takes any scale
    assert torch.equal(found.scale[kept], scale.to(dtype).float()[kept])
    if per_row:
        assert exact(floats, per_row=False) is None
    for row, column in ((0, 0), (7, 3), (299, 999)):
        changed = floats.clone()
        changed[row, column] = 1.5
        assert exact(changed, per_row) is None or (row == 7 and per_row)  # alone in its row, 1.5 is its scale


@pytest.mark.parametrize("value", [0.0, torch.nan, torch.inf])
def test_zeros_and_damage_are_left_to_the_layers_rule(value: float) -> None:
    for per_row in (False, True):
        assert exact(torch.full((4, 8), value), per_row) is None


def matrices(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    source = FolderSource(folder)
    return {
        name: (torch.stack([codes for codes, _ in found]), torch.stack([scale for _, scale in found]))
        for name, weight in source.weights().items()
        if (found := list(source.matrices(weight)))
    }


@pytest.mark.parametrize("to", ["hub", "base3", "latent"])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("build", [llama, gpt2, mixtral])
def test_what_bf16_wrote_comes_back_with_codes_and_scales(build: Any, per_row: bool, to: str, tmp_path: Path) -> None:
    model = build()
    bitnet.replace_linear(model, per_row=per_row)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "hub")
    convert(tmp_path / "hub", tmp_path / "bf16", "bf16")
    # scales a row are found by themselves in nn.Linear; transposed and fused weights need to be told
    options = {} if build is llama else {"per_row": per_row}
    out = convert(tmp_path / "bf16", tmp_path / "out", to, **options)
    was, now = matrices(tmp_path / "hub"), matrices(out)
    assert was.keys() == now.keys()
    if to == "latent" and build is not llama:
        return  # its codes are, the scales shrink: latent weights of these layers are copied
    for name, (codes, scale) in was.items():
        assert torch.equal(now[name][0], codes)
        tolerance = 2**-7 if to == "latent" else 2**-8  # of bfloat16: rounded once, for latent weights twice
        torch.testing.assert_close(now[name][1], scale, rtol=tolerance, atol=0)
    if to != "latent":
        again = convert(out, tmp_path / "again", "bf16")
        a, b = (load_file(folder / "model.safetensors") for folder in (tmp_path / "bf16", again))
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_latent_checkpoint_is_rounded_as_its_layers_round(tmp_path: Path) -> None:
    """Weights in training that happen to be ternary: what the model computes has the scale of the mean."""
    model = llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.copy_(parameter.sign() * (parameter.abs() > 0.05))
    bitnet.replace_linear(model)
    bitnet.save(model, tmp_path / "latent")
    assert torch.equal(bitnet.load(convert(tmp_path / "latent", tmp_path / "out"))(IDS).logits, model(IDS).logits)


def test_one_weight_that_is_not_ternary_is_rounded(tmp_path: Path) -> None:
    """Three rows of it look ternary, but the fourth does not."""
    model = llama()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "hub")
    folder = convert(tmp_path / "hub", tmp_path / "bf16", "bf16")
    key = "model.layers.0.mlp.up_proj.weight"
    state = load_file(folder / "model.safetensors")
    state[key][1, 1] = 7
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    plain = AutoModelForCausalLM.from_pretrained(folder)
    bitnet.replace_linear(plain)
    bitnet.pack(plain)
    found = load_file(convert(folder, tmp_path / "out") / "model.safetensors")
    expected = plain.get_submodule(key.removesuffix(".weight"))
    assert torch.equal(found[key], expected.weight)
    assert torch.equal(1 / found[f"{key}_scale"], expected.weight_scale)
    assert torch.equal(load_file(convert(folder, tmp_path / "latent", "latent") / "model.safetensors")[key], state[key])


def test_calibration_leaves_ternary_layers_alone(tmp_path: Path) -> None:
    from bitnet.train.data import build_tokenizer

    model = llama(vocab_size=257, hidden_size=64)
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "hub")
    folder = convert(tmp_path / "hub", tmp_path / "bf16", "bf16")
    build_tokenizer().save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text("some words to calibrate on, " * 200)
    out = convert(folder, tmp_path / "out", calibrate=text, samples=4, length=16)
    for name, (codes, scale) in matrices(tmp_path / "hub").items():
        assert torch.equal(matrices(out)[name][0], codes)
        torch.testing.assert_close(matrices(out)[name][1], scale, rtol=2**-8, atol=0)
