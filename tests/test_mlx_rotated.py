"""PrismML's packs for MLX: made here from their description, with a Hadamard matrix; read, and refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_models
import mlx_models
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.numpy import save_file
from test_rotated import BLOCK, rotation, signs_of

import bitnet
from bitnet import cli
from bitnet.convert.conversion.convert import convert_checkpoint
from bitnet.convert.inspection import inspect_checkpoint
from bitnet.convert.opening import open_source

QUIET = Console(quiet=True)
PLAIN = ("in_proj_a", "in_proj_b")  # in float, and not rotated
UP = "model.layers.0.mlp.up_proj"


def pack(folder: Path, change: Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], Any] | None = None) -> Any:
    """Write a pack of a small Qwen 3.5, after `change(config, manifest, tensors)`; returns what the float model's
    tensors are, and the fields and scales of the rotated ones."""
    torch.manual_seed(0)
    model = gguf_models.model("qwen3_5", tie_word_embeddings=False)
    rng, tensors, floats, stored, modules = np.random.default_rng(0), {}, {}, {}, []
    for name, value in model.state_dict().items():
        path, leaf = name.removesuffix(".weight"), name.split(".")[-2]
        if value.ndim == 2 and leaf not in PLAIN:
            matrix = mlx_models.ternary(*value.shape, 128, rng)
            k = value.shape[1]
            key = f"language_model.{path}"
            tensors[f"{key}.weight"] = mlx_models.words(matrix.q, 2)
            tensors[f"{key}.scales"], tensors[f"{key}.biases"] = matrix.scales.numpy(), matrix.biases.numpy()
            tensors[f"{key}.signs"] = signs_of(k).astype(np.float32)
            modules.append({"path": path, "block": BLOCK, "embedding": leaf == "embed_tokens", "dtype": "float16"})
            stored[name] = matrix
            floats[name] = torch.from_numpy(matrix.floats.double().numpy() @ rotation(k, signs_of(k))).float()
            continue
        floats[name] = value.float()
        kept = value.float().numpy()
        if name.endswith("conv1d.weight"):
            kept = np.ascontiguousarray(kept.transpose(0, 2, 1))
        elif name.endswith("norm.weight") and "linear_attn" not in name:
            kept = 1 + kept
            floats[name] = torch.from_numpy(kept) - 1  # rounded as stored
        tensors[f"language_model.{name}"] = kept
    tensors["vision_tower.blocks.0.weight"] = np.ones((2, 2), np.float32)
    names = {m["path"]: f"language_model.{m['path']}.weight" for m in modules}
    manifest = {
        "version": 1,
        "block_size": BLOCK,
        "transform": "normalized-sylvester-walsh-hadamard",
        "axis": "input-last-dimension",
        "sign_mode": "explicit",
        "weight_names": [name for path, name in names.items() if "embed" not in path],
        "inverse_weight_names": [names["model.embed_tokens"]],
        "sign_widths": [256, 512],
        "sign_values": [float(s) for width in (256, 512) for s in signs_of(width)],
        "gdn_v_grouped": True,
    }
    config = {
        "schema_version": 2,
        "model_type": "prism_hadamard_qwen35",
        "base_model_type": "qwen3_5",
        "tensor_namespace": "mlx-vlm-qwen3_5",
        "requires_runtime": "runtime/artifact.py",
        "hadamard_config": "hadamard.json",
        "gdn_activation_layout": "grouped",
        "components": {"text": True, "vision": True, "mtp": False},
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": modules,
        "text_config": json.loads(model.config.to_json_string()),
    }
    if change is not None:
        change(config, manifest, tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    keys = {f"prism.hadamard.{key}": value for key, value in manifest.items()}
    (folder / "hadamard.json").write_text(json.dumps(keys))
    (folder / "files.json").write_text("{}")
    gguf_models.tokenizer().save_pretrained(folder)
    return model, floats, stored


def test_a_pack_is_read_exactly(tmp_path: Path) -> None:
    _, floats, stored = pack(tmp_path / "pack")
    source = open_source(tmp_path / "pack")
    assert source.mismatches() == []
    weights = source.weights()
    assert weights.keys() == {name.removesuffix(".weight") for name in stored if "embed" not in name}
    for name, weight in weights.items():
        spec, matrix = weight.spec, stored[f"{name}.weight"]
        assert (spec.hadamard, spec.hadamard_signs, spec.group_size) == (BLOCK, True, 128)
        codes, scale = source.quantized(name)
        assert torch.equal(codes, torch.from_numpy(matrix.q.astype(np.int8)) - 1)
        assert torch.equal(scale, matrix.scales)
        signs = torch.from_numpy(signs_of(weight.in_features)).to(torch.int8)
        assert torch.equal(source.tensor(f"{name}.signs"), signs)
    for name, expected in floats.items():
        if name.removesuffix(".weight") in weights:
            continue
        found, described = source.tensor(name), source.stored()[name]
        assert (found.dtype, tuple(found.shape)) == (torch.float32, described[1])
        assert described[0] == "F32"
        tolerance = 1e-6 if name in stored else 0
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_a_pack_computes_what_its_float_model_does(tmp_path: Path) -> None:
    """Converted, loaded and served; to floats, turned back; and to a GGUF file of the same codes and signs."""
    model, floats, _ = pack(tmp_path / "pack")
    model.load_state_dict(floats)
    said = Console(record=True, file=None, quiet=False, width=300, stderr=True)
    convert_checkpoint(tmp_path / "pack", tmp_path / "hub", "hub", console=said)
    assert "its vision tower (1 tensors) is left out" in said.export_text()
    assert not (tmp_path / "hub" / "hadamard.json").exists()
    convert_checkpoint(tmp_path / "pack", tmp_path / "bf16", "bf16", console=QUIET)
    convert_checkpoint(tmp_path / "pack", tmp_path / "m.gguf", "gguf-pq2_0", console=QUIET)
    again = bitnet.load(tmp_path / "bf16", dtype=torch.float32).state_dict()
    for name, expected in floats.items():
        torch.testing.assert_close(again[name], expected.bfloat16().float(), rtol=2**-7, atol=1e-5)
    served = bitnet.load(tmp_path / "hub", dtype=torch.float32)
    back = bitnet.load(tmp_path / "m.gguf", dtype=torch.float32)
    with torch.no_grad():
        wanted, found = model(gguf_models.IDS).logits, served(gguf_models.IDS).logits
        torch.testing.assert_close(back(gguf_models.IDS).logits, found, rtol=0, atol=1e-4 * float(found.abs().max()))
        assert float((found - wanted).norm() / wanted.norm()) < 0.1  # activations of 8 bits
        for module in served.modules():
            if isinstance(module, bitnet.PackedBitLinear):
                object.__setattr__(module.spec, "activation_bits", None)
                module.set_backend("reference")
        exact = served(gguf_models.IDS).logits
        torch.testing.assert_close(exact, wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))
    for name, layer in served.named_modules():
        if isinstance(layer, bitnet.PackedBitLinear):
            other = back.get_submodule(name)
            assert torch.equal(layer.codes(), other.codes())
            assert torch.equal(layer.weight_scale, other.weight_scale)
            assert torch.equal(layer.signs, other.signs)
    report = inspect_checkpoint(tmp_path / "pack", QUIET)
    assert report.problems == []
    assert "its vision tower (1 tensors) is left out" in str(report)


def entry(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], None]:
    return lambda config, manifest, tensors: config.update({key: value})


def rotated(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], None]:
    return lambda config, manifest, tensors: manifest.update({key: value})


def other_signs(config: dict[str, Any], manifest: dict[str, Any], tensors: dict[str, Any]) -> None:
    tensors[f"language_model.{UP}.signs"][3] *= -1


def unsigned(config: dict[str, Any], manifest: dict[str, Any], tensors: dict[str, Any]) -> None:
    manifest.update(sign_mode="identity")
    del manifest["sign_widths"], manifest["sign_values"]


UNKNOWN: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any], dict[str, Any]], Any], str]] = {
    "schema": (entry("schema_version", 3), r"config\.json: schema_version is 3; known of prism_hadamard_qwen35: 2"),
    "base": (entry("base_model_type", "llama"), "base_model_type is 'llama'"),
    "namespace": (entry("tensor_namespace", None), "tensor_namespace is None; known of .*: mlx-vlm-qwen3_5"),
    "heads": (entry("gdn_activation_layout", "tiled"), "gdn_activation_layout is 'tiled'"),
    "text": (entry("text_config", {"model_type": "llama"}), "text_config is no qwen3_5_text"),
    "tied": (lambda c, m, t: c["text_config"].update(tie_word_embeddings=True), "tie_word_embeddings is True"),
    "drafts": (lambda c, m, t: c["text_config"].update(mtp_num_hidden_layers=1), "mtp_num_hidden_layers is 1"),
    "modules": (entry("modules", {}), "modules is no list of objects with a path"),
    "fewer modules": (lambda c, m, t: c["modules"].pop(), r"hadamard\.json: names other matrices than config\.json's"),
    "block": (lambda c, m, t: c["modules"][1].update(block=64), "block_size is 128, but 64 of model"),
    "version": (rotated("version", 2), r"hadamard\.json: .*prism\.hadamard\.version is 2; known here: 1"),
    "transform": (rotated("transform", "haar"), r"prism\.hadamard\.transform is 'haar'"),
    "no signs": (unsigned, "sign_mode is identity, which is not known"),
    "grouped": (rotated("gdn_v_grouped", False), "gdn_v_grouped is not true"),
    "names": (rotated("weight_names", [["x"]]), "weight_names, or another list beside it, is none"),
    "widths": (rotated("sign_widths", [256, 256]), "sign_values are 768, but sign_widths"),
    "more": (rotated("seed", 3), r"prism\.hadamard\.seed is not known here"),
    "own signs": (other_signs, rf"the signs of {UP}\.weight are not those of hadamard\.json"),
    "no own signs": (lambda c, m, t: t.pop(f"language_model.{UP}.signs"), rf"the signs of {UP}\.weight are not those"),
    "stranger": (lambda c, m, t: t.update(x=np.ones(2, np.float32)), "tensor x is neither in language_model nor in"),
}


@pytest.mark.parametrize(("change", "reason"), UNKNOWN.values(), ids=UNKNOWN)
def test_packs_that_are_not_known_are_refused_by_name(change: Any, reason: str, tmp_path: Path) -> None:
    pack(tmp_path / "pack", change)
    with pytest.raises(ValueError, match=reason) as error:
        open_source(tmp_path / "pack")
    assert str(tmp_path / "pack") in str(error.value)


def test_a_pack_without_its_manifest_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(tmp_path / "pack")
    (tmp_path / "pack" / "hadamard.json").unlink()
    assert cli.main(["convert", str(tmp_path / "pack"), str(tmp_path / "out"), "--to", "hub"]) != 0
    assert "has no hadamard.json, which says how its weights are rotated" in capsys.readouterr().err
