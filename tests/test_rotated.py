"""GGUF files whose matrices were rotated (prism.hadamard): made here from the description, with a Hadamard matrix."""

import io
from contextlib import nullcontext
from enum import IntEnum
from pathlib import Path
from typing import Any

import gguf
import gguf_models
import numpy as np
import pytest
import torch
from ggml_blocks import IDS, PACKERS, matrix, retyped
from rich.console import Console
from safetensors.torch import load_file

import bitnet
from bitnet.convert.conversion.convert import convert_checkpoint
from bitnet.convert.files.gguf import padded, read_header, read_tensor
from bitnet.convert.inspection import inspect_checkpoint
from bitnet.convert.llama_cpp.header import header_bytes
from bitnet.convert.llama_cpp.source import GgufSource
from bitnet.convert.opening import open_source

QUIET = Console(quiet=True)
BLOCK = 128
FOLDED = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_qkv", "attn_gate", "ssm_out")  # not ssm_alpha, ssm_beta
FOLDED += ("ffn_gate", "ffn_up", "ffn_down", "output")


def rotation(width: int, signs: Any) -> Any:
    """The matrix R of x -> H (signs x), so that a folded weight is W R^T, and one is turned back by W R."""
    i = np.arange(BLOCK)
    bits = np.array([[bin(a & b).count("1") for b in i] for a in i])
    return np.kron(np.eye(width // BLOCK), (-1.0) ** bits / BLOCK**0.5) * signs


def signs_of(width: int) -> Any:
    return np.random.default_rng(width).choice([-1, 1], width)


def folded(source: Path, target: Path, kind: str = "PQ2_0", signed: bool = True, **keys: Any) -> dict[str, Any]:
    """A file of another type whose matrices, those of embedding and head too, are rotated; returns all of them as they
    were before, float64 by name, and the codes and scales of those that become layers. With Q1_0 embedding and head are
    floats.

    keys: entries of prism.hadamard.* that are to be others, or not there (None)
    """
    stored = retyped(source, target, kind)
    metadata, tensors = read_header(target)
    signs = {width: signs_of(width) if signed else np.ones(width) for width in (256, 512)}
    rng, before, parts, infos, end = np.random.default_rng(1), {}, [], {}, 0
    for name, info in tensors.items():
        data, part = read_tensor(target, info).tobytes(), name.split(".")[-2]
        if name in ("token_embd.weight", "output.weight") and kind == "Q1_0":
            before[name] = np.frombuffer(data, np.float32).reshape(info.shape).astype(np.float64)
            data = (before[name] @ rotation(256, signs[256]).T).astype(np.float32).tobytes()
        elif name in stored or name in ("token_embd.weight", "output.weight"):
            codes, scales = stored[name] if name in stored else matrix(kind, *info.shape, rng)
            values = (codes.reshape(*scales.shape, -1) * scales[..., None]).reshape(codes.shape).astype(np.float64)
            folds = part in (*FOLDED, "token_embd")
            before[name] = values @ rotation(values.shape[1], signs[values.shape[1]]) if folds else values
            if name not in stored:
                data = PACKERS[kind](codes, scales)
                info = info._replace(kind=IDS[kind], nbytes=len(data))
            if name == "output.weight":
                stored[name] = codes, scales
        parts.append(data.ljust(padded(info.nbytes), b"\0"))
        infos[name] = info._replace(offset=end)
        end += len(parts[-1])
    contract: dict[str, Any] = {
        "version": 1,
        "block_size": BLOCK,
        "transform": "normalized-sylvester-walsh-hadamard",
        "axis": "input-last-dimension",
        "sign_mode": "explicit" if signed else "identity",
        "weight_names": [name for name in tensors if name.split(".")[-2] in FOLDED],
        "inverse_weight_names": ["token_embd.weight"],
        "gdn_v_grouped": True,
    }
    if signed:
        contract |= {"sign_widths": [256, 512], "sign_values": [int(s) for w in signs.values() for s in w]}
    contract = {f"prism.hadamard.{key}": value for key, value in (contract | keys).items() if value is not None}
    target.write_bytes(header_bytes(metadata | contract, infos) + b"".join(parts))
    return {"before": before, "packed": stored, "signs": signs}


@pytest.fixture(scope="module", params=["llama", "qwen3_5"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head of its own, Q2_0."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp(request.param)
    changes = {"num_hidden_layers": 1} if request.param == "llama" else {"tie_word_embeddings": False}
    gguf_models.checkpoint(root / "hf", request.param, **changes)
    return convert_checkpoint(root / "hf", root / "m.gguf", "gguf-q2_0", console=QUIET)


@pytest.mark.parametrize(("kind", "signed"), [("PQ2_0", True), ("Q1_0", False)], ids=["signs", "binary, no signs"])
def test_rotated_matrices_are_layers_that_rotate(kind: str, signed: bool, exported: Path, tmp_path: Path) -> None:
    """Codes, scales and signs are the file's, bit for bit; floats, embedding and head among them, are turned back."""
    made = folded(exported, tmp_path / "m.gguf", kind, signed)
    source = GgufSource(tmp_path / "m.gguf")
    assert source.mismatches() == []
    layers, weights = source.layers(), source.weights()
    seen = 0
    for key, homes in source.homes.items():
        ((place, _), *_) = homes
        if place.name not in made["before"]:
            continue
        order = slice(None) if place.rows is None else place.rows.argsort()
        expected = torch.from_numpy(made["before"][place.name])[order]
        if place.name not in made["packed"]:
            found = source.tensor(key)
            assert found.dtype == torch.float32
            torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-6)
            continue
        seen += 1
        name = key.removesuffix(".weight")
        spec, k = weights[name].spec, expected.shape[1]
        rotates = place.name.split(".")[-2] in FOLDED
        assert (spec.hadamard, spec.hadamard_signs) == ((BLOCK, signed) if rotates else (None, False))
        assert spec.group_size == 128
        codes, scale = source.quantized(name)
        theirs, scales = (torch.from_numpy(t)[order] for t in made["packed"][place.name])
        assert torch.equal(codes, theirs)
        zero = scales == 0
        assert torch.equal(scale[~zero].float(), scales[~zero])
        if signed and rotates:
            assert torch.equal(source.tensor(f"{name}.signs"), torch.from_numpy(made["signs"][k]).to(torch.int8))
        assert layers[name].spec == spec
    assert seen == len(made["packed"])


def test_a_rotated_model_computes_what_it_did_before(exported: Path, tmp_path: Path) -> None:
    """Read, packed, saved, loaded and served, with float activations: the logits of the float model before."""
    made = folded(exported, tmp_path / "m.gguf")
    plain = convert_checkpoint(exported, tmp_path / "plain", "bf16", console=QUIET)
    expected = bitnet.load(plain, dtype=torch.float32)
    state, before = expected.state_dict(), GgufSource(exported)
    with torch.no_grad():
        for key, homes in GgufSource(tmp_path / "m.gguf").homes.items():
            place = homes[0][0]
            if place.name in made["before"]:
                order = slice(None) if place.rows is None else place.rows.argsort()
                state[key].copy_(torch.from_numpy(made["before"][place.name])[order])
            else:
                state[key].copy_(before.tensor(key))
        wanted = expected(gguf_models.IDS).logits
        model = bitnet.load(tmp_path / "m.gguf")
        served = model(gguf_models.IDS).logits
        bitnet.save(model, tmp_path / "again")
        assert torch.equal(bitnet.load(tmp_path / "again")(gguf_models.IDS).logits, served)
        assert float((served - wanted).norm() / wanted.norm()) < 0.1  # activations of 8 bits
        for module in model.modules():
            if isinstance(module, bitnet.PackedBitLinear):
                object.__setattr__(module.spec, "activation_bits", None)
                module.set_backend("reference")
        bitnet.native_decoding(model, None)
        torch.testing.assert_close(model(gguf_models.IDS).logits, wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))
    assert inspect_checkpoint(tmp_path / "m.gguf", QUIET).problems == []


def test_rotated_matrices_become_floats_of_the_plain_basis(exported: Path, tmp_path: Path) -> None:
    made = folded(exported, tmp_path / "m.gguf")
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "bf16", "bf16", console=QUIET)
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "hub", "hub", console=QUIET)
    convert_checkpoint(tmp_path / "hub", tmp_path / "again", "bf16", console=QUIET)
    found, again = (load_file(tmp_path / name / "model.safetensors") for name in ("bf16", "again"))
    for key, homes in GgufSource(tmp_path / "m.gguf").homes.items():
        place = homes[0][0]
        if place.name in made["before"]:
            order = slice(None) if place.rows is None else place.rows.argsort()
            expected = torch.from_numpy(made["before"][place.name])[order].float()
            for state in (found, again):
                torch.testing.assert_close(state[key].float(), expected, rtol=2**-8, atol=1e-6)


def test_an_embedding_that_is_the_head_too_is_turned_back(tmp_path: Path) -> None:
    gguf_models.checkpoint(tmp_path / "hf", num_hidden_layers=1, tie_word_embeddings=True)
    plain = convert_checkpoint(tmp_path / "hf", tmp_path / "plain.gguf", "gguf-q2_0", console=QUIET)
    made = folded(plain, tmp_path / "m.gguf", version=2, tied_output=True)
    found = GgufSource(tmp_path / "m.gguf").tensor("model.embed_tokens.weight")
    expected = torch.from_numpy(made["before"]["token_embd.weight"]).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    folded(plain, tmp_path / "n.gguf")
    with pytest.raises(ValueError, match="tied_output is False, which its tensors and inverse_weight_names are not"):
        GgufSource(tmp_path / "n.gguf")


UNKNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 3}, r"prism\.hadamard\.version is 3; known here: 1"),
    "tied version": ({"version": 3, "tied_output": True}, r"version is 3 with tied_output; known here: 2"),
    "no version": ({"version": None}, r"prism\.hadamard\.version is 'missing'"),
    "transform": ({"transform": "haar"}, r"prism\.hadamard\.transform is 'haar'; known here: normalized-sylvester"),
    "axis": ({"axis": "rows"}, r"prism\.hadamard\.axis is 'rows'"),
    "signs": ({"sign_mode": "seeded"}, r"sign_mode is 'seeded'; known here: identity, explicit"),
    "block": ({"block_size": 96}, r"prism\.hadamard\.block_size: a Hadamard block must be a power of two"),
    "wide block": ({"block_size": 512}, r"has 256 features, but prism\.hadamard\.block_size is 512"),
    "widths": ({"sign_widths": [512, 512]}, "sign_values are 768, but sign_widths"),
    "a width": ({"sign_widths": [768]}, r"has 256 features, but prism\.hadamard\.sign_widths lack that"),
    "values": ({"sign_values": [2] * 768}, "sign_values, others than 1 and -1"),
    "names": ({"weight_names": ["blk.9.ffn_up.weight"]}, r"blk\.9\.ffn_up\.weight, which is no matrix of the file"),
    "no names": ({"weight_names": None}, "or another list beside it, is none"),
    "inverse": ({"inverse_weight_names": ["output.weight"]}, r"token_embd\.weight alone is known here"),
    "more": ({"seed": 3}, r"prism\.hadamard\.seed is not known here"),
}


@pytest.mark.parametrize(("keys", "reason"), UNKNOWN.values(), ids=UNKNOWN)
def test_rotations_that_are_not_known_are_refused_by_name(
    keys: dict[str, Any], reason: str, tmp_path: Path, llama: Path
) -> None:
    folded(llama, tmp_path / "m.gguf", **keys)
    with pytest.raises(ValueError, match=reason) as error:
        GgufSource(tmp_path / "m.gguf")
    assert str(tmp_path / "m.gguf") in str(error.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("one")
    gguf_models.checkpoint(root / "hf", num_hidden_layers=1)
    return convert_checkpoint(root / "hf", root / "m.gguf", "gguf-q2_0", console=QUIET)


def test_heads_in_an_order_that_was_not_said_are_refused(exported: Path, tmp_path: Path) -> None:
    folded(exported, tmp_path / "m.gguf", gdn_v_grouped=None)
    heads = "qwen3_5" in str(exported)
    with pytest.raises(ValueError, match="rotated in an order of heads") if heads else nullcontext():
        GgufSource(tmp_path / "m.gguf")


WRITTEN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "signs": ("llama", "PQ2_0", {"hadamard": 128, "hadamard_signs": True, "signs_seed": 3, "group_size": 128}),
    "no signs": ("qwen3", "PTQ1_0", {"hadamard": 64, "group_size": 128}),
    "heads": ("qwen3_5", "PQ2_0", {"hadamard": 128, "hadamard_signs": True, "group_size": 128, "skip": "in_proj_[ab]"}),
    "scales of rows": ("llama", "PTQ1_0", {"hadamard": 256, "per_row": True, "hadamard_signs": True}),
    "binary": ("llama", "PQ2_0", {"hadamard": 32, "weights": "binary", "centered": False, "group_size": 128}),
}


def float_model(folder: Path, family: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    built = gguf_models.model(family, **{"num_hidden_layers": 1} | changes if family != "qwen3_5" else changes)
    built.save_pretrained(folder)
    gguf_models.tokenizer().save_pretrained(folder)
    return built


def independently(file: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata, and the bytes of each tensor with its shape [N, K], as the gguf package reads a file."""
    kinds = {"PQ2_0": (142, (128, 34)), "PTQ1_0": (143, (128, 28))}  # which its version need not know
    known = {kind.name: kind.value for kind in gguf.GGMLQuantizationType}
    extended = IntEnum("GGMLQuantizationType", known | {name: number for name, (number, _) in kinds.items()})
    monkeypatch.setattr(gguf.gguf_reader, "GGMLQuantizationType", extended)
    for number, size in kinds.values():
        monkeypatch.setitem(gguf.GGML_QUANT_SIZES, number, size)
    reader = gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {t.name: (t.data.tobytes(), tuple(int(n) for n in t.shape[::-1])) for t in reader.tensors}


@pytest.mark.parametrize(("family", "kind", "options"), WRITTEN.values(), ids=WRITTEN)
def test_a_rotated_model_comes_back_from_a_file_bit_for_bit(
    family: str, kind: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    float_model(tmp_path / "float", family)
    convert_checkpoint(tmp_path / "float", tmp_path / "hub", "hub", console=QUIET, **options)
    said = Console(record=True, quiet=False, file=io.StringIO(), width=300)
    convert_checkpoint(tmp_path / "hub", tmp_path / "m.gguf", f"gguf-{kind.lower()}", console=said)
    assert f"PrismML's llama.cpp reads {kind}, and applies the rotation" in (text := said.export_text())
    assert "stock llama.cpp does not know the type and refuses it" in text
    before, after = (open_source(tmp_path / name) for name in ("hub", "m.gguf"))
    assert after.layers().keys() == before.layers().keys()
    rotates = 0
    for name, weight in before.weights().items():
        ours, theirs = weight.spec, after.weights()[name].spec
        assert (theirs.hadamard, theirs.hadamard_signs) == (ours.hadamard, ours.hadamard_signs)
        codes, scale = before.quantized(name)
        found = after.quantized(name)
        assert torch.equal(found.codes, codes)
        scale = scale.half() if scale.ndim > 1 else scale.half().float()  # as all blocks hold them
        assert torch.equal(found.scale, scale)
        signs = [source.signs(name, weight.in_features, spec) for source, spec in ((before, ours), (after, theirs))]
        assert (signs[0] is None) == (signs[1] is None) == (not options.get("hadamard_signs"))
        assert signs[0] is None or torch.equal(*signs)
        rotates += ours.hadamard is not None
    # the same by another reader, whose blocks are compared with those of another packer
    fields, tensors = independently(tmp_path / "m.gguf", monkeypatch)
    assert fields["prism.hadamard.version"] == 1
    assert fields["prism.hadamard.block_size"] == options["hadamard"]
    assert fields.get("prism.hadamard.gdn_v_grouped", False) is (family == "qwen3_5")
    names = fields["prism.hadamard.weight_names"]
    assert len(names) == rotates == len(set(names))
    for key, homes in after.homes.items():
        for place, _ in homes:
            if (name := key.removesuffix(".weight")) not in before.weights():
                assert place.name not in names
                continue
            codes, scale = after.quantized(name)
            order = slice(None) if place.rows is None else place.rows
            scale = scale.float() if scale.ndim > 1 else scale[:, None].float().expand(len(codes), 1)
            data, shape = tensors[place.name]
            assert shape == tuple(codes.shape)
            groups = scale.repeat_interleave(codes.shape[1] // 128 // scale.shape[1], dim=1)[order].numpy()
            assert data == PACKERS[kind](codes[order].numpy(), groups)
    if options.get("hadamard_signs"):
        widths = fields["prism.hadamard.sign_widths"]
        values = torch.tensor(fields["prism.hadamard.sign_values"], dtype=torch.int8).split(widths)
        by_width = dict(zip(widths, values, strict=True))
        for name, weight in before.weights().items():
            if weight.spec.hadamard is not None:
                assert torch.equal(before.tensor(f"{name}.signs"), by_width[weight.in_features])
    if "group_size" in options:
        logits = bitnet.load(tmp_path / "hub")(gguf_models.IDS).logits
        assert torch.equal(bitnet.load(tmp_path / "m.gguf")(gguf_models.IDS).logits, logits)


def test_floats_for_llama_cpp_are_turned_back(tmp_path: Path) -> None:
    float_model(tmp_path / "float", "llama")
    options: dict[str, Any] = {"hadamard": 64, "hadamard_signs": True, "group_size": 32, "activation_bits": None}
    convert_checkpoint(tmp_path / "float", tmp_path / "hub", "hub", console=QUIET, **options)
    convert_checkpoint(tmp_path / "hub", tmp_path / "bf16", "bf16", console=QUIET)
    convert_checkpoint(tmp_path / "hub", tmp_path / "m.gguf", "gguf-bf16", console=QUIET)
    assert not any(key.startswith("prism.") for key in read_header(tmp_path / "m.gguf")[0])
    expected = load_file(tmp_path / "bf16" / "model.safetensors")
    source = GgufSource(tmp_path / "m.gguf")
    for name in open_source(tmp_path / "hub").weights():
        assert torch.equal(source.tensor(f"{name}.weight").bfloat16(), expected[f"{name}.weight"]), name


UNWRITABLE: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "stock": ("llama", "gguf-q2_0", {}, "and would misread in Q2_0; take gguf-pq2_0, which PrismML's llama.cpp reads"),
    "mlx": ("llama", "mlx", {}, "rotates its activations .hadamard., which mlx's layers do not"),
    "family": ("qwen2", "gguf-pq2_0", {}, "PrismML's llama.cpp applies that to llama, qwen3, qwen3moe, qwen35 only"),
    "matrix": ("qwen3_5", "gguf-pq2_0", {}, r"in_proj_[ab] is blk\.0\.ssm_(alpha|beta)\.weight there, whose input"),
    "groups": ("llama", "gguf-pq2_0", {"group_size": 64}, "has scales of groups of 64, and PQ2_0 of 128"),
    "8 bits": ("llama", "gguf-ptq1_0", {"weights": "int8", "group_size": None}, "and has int8 weights"),
}


@pytest.mark.parametrize(("family", "to", "options", "reason"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_no_reader_would_rotate_is_not_written(
    family: str, to: str, options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    float_model(tmp_path / "float", family)
    chosen = {"hadamard": 64, "group_size": 128} | options
    with pytest.raises(ValueError, match=reason):
        convert_checkpoint(tmp_path / "float", tmp_path / "out", to, console=QUIET, **chosen)
    assert not (tmp_path / "out").exists()


def test_rotations_that_one_contract_cannot_hold_are_refused(tmp_path: Path) -> None:
    """By layers in memory, which can differ."""
    changes: dict[str, tuple[dict[str, Any], str]] = {
        "blocks": ({"hadamard": 64}, "rotates in blocks of 64 and .*q_proj of 32, where one size is for all"),
        "some signs": ({"hadamard": 32, "hadamard_signs": True}, "down_proj has signs, unlike .*q_proj"),
    }
    for what, (options, reason) in changes.items():
        model = float_model(tmp_path / f"float {what}", "llama")
        bitnet.replace_linear(model, group_size=128, include="down_proj", **options)
        bitnet.replace_linear(model, group_size=128, skip="down_proj", hadamard=32)
        bitnet.pack(model)
        bitnet.save(model, tmp_path / what)
        with pytest.raises(ValueError, match=reason):
            convert_checkpoint(tmp_path / what, tmp_path / "m.gguf", "gguf-pq2_0", tokenizer=False, console=QUIET)
    model = float_model(tmp_path / "float", "llama")
    bitnet.replace_linear(model, group_size=128, hadamard=32, hadamard_signs=True)
    signs = model.model.layers[0].mlp.up_proj.signs
    signs[5] = -signs[5]
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "other signs")
    with pytest.raises(ValueError, match=r"up_proj has other signs than .*q_proj, where they go by the number of"):
        convert_checkpoint(tmp_path / "other signs", tmp_path / "m.gguf", "gguf-pq2_0", tokenizer=False, console=QUIET)
