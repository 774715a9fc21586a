"""GGUF files of the types that forks and recent llama.cpp have, as models: read, refused by name, and Q1_0 written."""

import re
from pathlib import Path
from typing import Any

import ggml_blocks
import gguf
import gguf_models
import numpy as np
import pytest
import torch
from ggml_blocks import PACKERS, retyped
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

import bitnet
from bitnet.convert.conversion.convert import convert_checkpoint
from bitnet.convert.files import ggml
from bitnet.convert.files.damaged import Damaged
from bitnet.convert.files.gguf import TensorInfo, padded, read_header, read_tensor
from bitnet.convert.inspection import inspect_checkpoint
from bitnet.convert.llama_cpp.header import header_bytes
from bitnet.convert.llama_cpp.source import GgufSource
from bitnet.packed import PackedBitLinear, PackedEmbedding

QUIET = Console(quiet=True)
IDS = torch.tensor([[3, 41, 5, 17, 200, 511]])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with a head of its own, Q2_0, whose matrices the tests exchange for others."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("types")
    gguf_models.checkpoint(folder / "hf", num_hidden_layers=1, vocab_size=512)
    return convert_checkpoint(folder / "hf", folder / "m.gguf", "gguf-q2_0", console=QUIET)


def floats(codes: Any, scales: Any) -> Tensor:
    """codes * scale of matrix(), float32."""
    n, k = codes.shape
    return torch.from_numpy((codes.reshape(n, scales.shape[1], -1) * scales[..., None]).reshape(n, k))


def rows_of(source: GgufSource, name: str) -> Any:
    """The row of GGUF's matrix that stands in each row of transformers'."""
    order = source.homes[f"{name}.weight"][0][0].rows
    return slice(None) if order is None else order.argsort()


@pytest.mark.parametrize("name", PACKERS)
def test_a_model_of_any_type_is_read(name: str, exported: Path, tmp_path: Path) -> None:
    stored = retyped(exported, tmp_path / "m.gguf", name)
    source = GgufSource(tmp_path / "m.gguf")
    theirs = {source.family.modules.get(key, key): key for key in stored}
    layers = source.layers()
    assert len(theirs) == len(layers) == 7
    spec = layers["model.layers.0.mlp.up_proj"].spec
    assert (spec.weights, spec.activation_bits) == ("binary" if name == "Q1_0" else "ternary", 8)
    assert spec.group_size == ggml_blocks.GROUPS.get(name)
    assert spec.per_row is (name not in ggml_blocks.GROUPS)
    assert spec.centered is (name != "Q1_0")
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "hub", "hub", console=QUIET)
    model = bitnet.load(tmp_path / "hub")
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "bf16", "bf16", console=QUIET)
    dequantized = load_file(tmp_path / "bf16" / "model.safetensors")
    for key, (codes, scales) in stored.items():
        ours = key.replace("blk.0.", "model.layers.0.").replace(".weight", "")
        leaf = {"attn_q": "q_proj", "attn_k": "k_proj", "attn_v": "v_proj", "attn_output": "o_proj"}
        leaf |= {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
        part = ours.rpartition(".")[2]
        ours = f"model.layers.0.{'self_attn' if 'attn' in part else 'mlp'}.{leaf[part]}"
        rows = rows_of(source, ours)
        found = source.quantized(ours)
        assert torch.equal(found.codes, torch.from_numpy(codes)[rows])
        expected = floats(codes, scales)[rows]
        layer = model.get_submodule(ours)
        assert isinstance(layer, PackedBitLinear)
        assert torch.equal(layer.codes(), found.codes)
        values = bitnet.kernels.reference.dequantize_weight(layer.codes(), layer.weight_scale)
        assert torch.allclose(values, expected, rtol=1e-6, atol=0)  # scales of rows are stored as 1 / scale
        assert torch.equal(dequantized[f"{ours}.weight"], expected.bfloat16())
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
    report = inspect_checkpoint(tmp_path / "m.gguf", QUIET)
    assert sum(m.kind == "packed" for m in report.matrices) == 7


def test_the_older_q2_0_is_told_by_the_room_its_tensors_take(exported: Path, tmp_path: Path) -> None:
    retyped(exported, tmp_path / "new.gguf", "PQ2_0")
    retyped(exported, tmp_path / "old.gguf", "PQ2_0", number=42)
    new, old = (GgufSource(tmp_path / f"{name}.gguf") for name in ("new", "old"))
    assert {ggml.NAMES[info.kind] for homes in old.homes.values() for _, info in homes} == {"F32", "PQ2_0"}
    for name in old.layers():
        assert torch.equal(old.quantized(name).codes, new.quantized(name).codes)
        assert torch.equal(old.quantized(name).scale, new.quantized(name).scale)
    retyped(exported, tmp_path / "upstream.gguf", "Q2_0")
    assert GgufSource(tmp_path / "upstream.gguf").layers()["model.layers.0.mlp.up_proj"].spec.group_size == 64


def sized(file: Path, shapes: list[tuple[int, int]], block: int, size: int, kind: int = 42) -> Path:
    """A GGUF file of tensors of a type whose blocks are of that size."""
    infos, end = {}, 0
    for number, (n, k) in enumerate(shapes):
        infos[f"blk.{number}.ffn_up.weight"] = TensorInfo(kind, (n, k), end, n * k // block * size)
        end += padded(n * k // block * size)
    file.write_bytes(header_bytes({"general.architecture": "llama"}, infos) + bytes(end))
    return file


SIZED: dict[str, tuple[list[tuple[int, int]], int, int, int, str]] = {
    "sherry": ([(256, 256), (256, 512)], 256, 42, 42, "ggml type 42 is by its size STQ1_0 .Sherry., which is not read"),
    "too small": ([(4, 128)], 64, 18, 42, "ggml type 42 may be Q2_0 or PQ2_0; the file's tensors are too small"),
    "neither": ([(256, 256)], 64, 16, 42, "the file was cut short or is damaged"),
    "fv5": ([(4, 256)], 64, 17, 43, r"tensor blk\.0\.ffn_up\.weight: its ggml type 43 is FV5"),
    "unknown": ([(4, 256)], 64, 17, 999, r"tensor blk\.0\.ffn_up\.weight: its ggml type 999 is unknown here"),
    "rows": ([(6, 256)], 64, 17, 335, r"tensor blk\.0\.ffn_up\.weight: its 6 rows are no multiple of 4"),
}


@pytest.mark.parametrize(("shapes", "block", "size", "kind", "reason"), SIZED.values(), ids=SIZED)
def test_types_that_are_not_read_are_refused_by_name(
    shapes: list[tuple[int, int]], block: int, size: int, kind: int, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(Damaged, match=reason) as error:
        read_header(sized(tmp_path / "m.gguf", shapes, block, size, kind))
    assert str(tmp_path / "m.gguf") in str(error.value)


@pytest.mark.parametrize(("block", "size", "name"), [(64, 18, "Q2_0"), (128, 34, "PQ2_0")])
def test_one_large_tensor_tells_the_type_of_the_small_ones(block: int, size: int, name: str, tmp_path: Path) -> None:
    file = sized(tmp_path / "m.gguf", [(1, 128), (128, 128), (2, 128)], block, size)
    _, tensors = read_header(file)
    assert {ggml.NAMES[info.kind] for info in tensors.values()} == {name}
    last = 2 * 128 // block * size
    file.write_bytes(file.read_bytes()[: last - padded(last)])  # it ends with its last tensor, without padding
    assert {ggml.NAMES[info.kind] for info in read_header(file)[1].values()} == {name}


@pytest.mark.parametrize(("name", "number"), [("Q2_0", 42), ("PQ2_0", 142), ("PQ2_0", 42)])
def test_a_matrix_with_a_2_is_no_packed_layer_but_floats(
    name: str, number: int, exported: Path, tmp_path: Path
) -> None:
    stored = retyped(exported, tmp_path / "m.gguf", name, number)
    codes, scales = stored["blk.0.ffn_up.weight"]
    info = read_header(tmp_path / "m.gguf")[1]["blk.0.ffn_up.weight"]
    codes[0, :4] = 2
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[info.offset : info.offset + info.nbytes] = PACKERS[name](codes, scales)
    (tmp_path / "m.gguf").write_bytes(data)
    message = r"model\.layers\.0\.mlp\.up_proj: holds 4 weights \(0\.0031 %\) of \+2, so it is not ternary.*--to bf16"
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "m.gguf", tmp_path / "hub", "hub", console=QUIET)
    assert any(re.search(message, problem) for problem in inspect_checkpoint(tmp_path / "m.gguf", QUIET).problems)
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "bf16", "bf16", console=QUIET)
    found = load_file(tmp_path / "bf16" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(found, floats(codes, scales).bfloat16())
    source = GgufSource(tmp_path / "m.gguf", dequantize=True)
    assert torch.equal(source.tensor("model.layers.0.mlp.up_proj.weight"), floats(codes, scales))


def test_a_group_of_q1_0_without_a_scale_makes_the_layer_ternary(exported: Path, tmp_path: Path) -> None:
    stored = retyped(exported, tmp_path / "m.gguf", "Q1_0")
    info = read_header(tmp_path / "m.gguf")[1]["blk.0.ffn_up.weight"]
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[info.offset : info.offset + 2] = bytes(2)
    (tmp_path / "m.gguf").write_bytes(data)
    source = GgufSource(tmp_path / "m.gguf")
    kinds = {name: layer.spec.weights for name, layer in source.layers().items()}
    assert kinds.pop("model.layers.0.mlp.up_proj") == "ternary"
    assert set(kinds.values()) == {"binary"}
    codes, _ = stored["blk.0.ffn_up.weight"]
    codes[0, :128] = 0
    assert torch.equal(source.quantized("model.layers.0.mlp.up_proj").codes, torch.from_numpy(codes))


@pytest.mark.parametrize("name", ["Q1_0", "IQ2_BN", "Q4_1"])
def test_a_vector_of_a_low_bit_type_is_refused(name: str, exported: Path, tmp_path: Path) -> None:
    metadata, tensors = read_header(exported)
    infos, end = {}, 0
    for key, info in tensors.items():
        kind = next(n for n, known in ggml.NAMES.items() if known == name) if key == "output_norm.weight" else info.kind
        infos[key] = TensorInfo(kind, info.shape, end, ggml.nbytes(kind, info.shape))
        end += padded(infos[key].nbytes)
    (tmp_path / "m.gguf").write_bytes(header_bytes(metadata, infos) + bytes(end))
    with pytest.raises(Damaged, match=rf"tensor output_norm\.weight is no matrix, but {name}"):
        GgufSource(tmp_path / "m.gguf")


def with_head(source: Path, target: Path, name: str) -> Any:
    """The file with its output head quantized to Q4_0 by the `gguf` package; returns the blocks, [N, K / 32, 18]."""
    metadata, tensors = read_header(source)
    infos, data = {}, b""
    for key, info in tensors.items():
        part = read_tensor(source, info)
        if key == name:
            assert info.kind == 0
            part = gguf.quants.quantize(part.view(np.float32).reshape(info.shape), gguf.GGMLQuantizationType.Q4_0)
            blocks = part.reshape(info.shape[0], -1, 18)
            info = info._replace(kind=2, nbytes=part.nbytes)
        infos[key] = info._replace(offset=len(data))
        data += part.tobytes().ljust(padded(info.nbytes), b"\0")
    target.write_bytes(header_bytes(metadata, infos) + data)
    return blocks


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_head_in_q4_0_is_a_4_bit_one(tied: bool, tmp_path: Path) -> None:
    """Bit for bit, with the embedding where they are one tensor, and back."""
    gguf_models.checkpoint(tmp_path / "hf", num_hidden_layers=1, vocab_size=512, tie_word_embeddings=tied)
    first = convert_checkpoint(tmp_path / "hf", tmp_path / "first.gguf", "gguf-q2_0", console=QUIET)
    name = "token_embd.weight" if tied else "output.weight"
    blocks = with_head(first, tmp_path / "m.gguf", name)
    floats = torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_0)).view(512, 256)
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "hub", console=QUIET)
    model = bitnet.load(tmp_path / "hub")
    head, embedding = model.lm_head, model.model.embed_tokens
    assert isinstance(head, PackedBitLinear)
    assert (head.spec.weights, head.spec.group_size) == ("int4", 32)
    assert np.array_equal(head.weight.numpy(), blocks[..., 2:])
    assert np.array_equal(head.weight_scale.numpy(), blocks[..., :2].copy().view(np.float16)[..., 0])
    assert torch.equal(bitnet.kernels.reference.dequantize_weight(head.codes(), head.weight_scale), floats)
    assert isinstance(embedding, PackedEmbedding) is tied
    if tied:
        assert torch.equal(embedding(IDS), floats[IDS])
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()
    for source in ("hub", "m.gguf"):
        again = convert_checkpoint(tmp_path / source, tmp_path / f"{source}.back.gguf", "gguf-tq2_0", console=QUIET)
        info = read_header(again)[1][name]
        assert (info.kind, read_tensor(again, info).tobytes()) == (2, blocks.tobytes())
    report = inspect_checkpoint(tmp_path / "m.gguf", QUIET)
    assert report.problems == []
    assert sum("int4" in m.what for m in report.matrices) == 1
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "bf16", "bf16", console=QUIET)
    key = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert torch.equal(load_file(tmp_path / "bf16" / "model.safetensors")[key], floats.bfloat16())


def test_a_head_in_q4_0_of_a_float_model_is_floats(tmp_path: Path) -> None:
    gguf_models.checkpoint(tmp_path / "hf", num_hidden_layers=1, vocab_size=512)
    first = convert_checkpoint(tmp_path / "hf", tmp_path / "first.gguf", "gguf-bf16", console=QUIET)
    with_head(first, tmp_path / "m.gguf", "output.weight")
    source = GgufSource(tmp_path / "m.gguf")
    assert source.weights() == {}
    assert source.stored()["lm_head.weight"] == ("F32", (512, 256))


def test_a_head_in_q4_0_whose_scales_are_no_numbers_is_named(exported: Path, tmp_path: Path) -> None:
    with_head(exported, tmp_path / "m.gguf", "output.weight")
    data, info = bytearray((tmp_path / "m.gguf").read_bytes()), read_header(tmp_path / "m.gguf")[1]["output.weight"]
    data[info.offset : info.offset + 2] = np.float16("nan").tobytes()
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=r"m\.gguf: lm_head\.weight: its scales must be finite"):
        GgufSource(tmp_path / "m.gguf")


def with_metadata(source: Path, target: Path, **entries: Any) -> Path:
    metadata, tensors = read_header(source)
    first = min(info.offset for info in tensors.values())
    infos = {key: info._replace(offset=info.offset - first) for key, info in tensors.items()}
    target.write_bytes(header_bytes(metadata | entries, infos) + source.read_bytes()[first:])
    return target


YARN: dict[str, Any] = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 128,
}


def test_the_rotary_embedding_of_long_qwens_is_read(tmp_path: Path) -> None:
    """Bonsai's files say YaRN, as its config.json does."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    model = gguf_models.model("qwen3", num_hidden_layers=1)
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "hub")
    file = convert_checkpoint(tmp_path / "hub", tmp_path / "m.gguf", "gguf-q2_0", tokenizer=False, console=QUIET)
    keys = {f"qwen3.{key}": value for key, value in YARN.items()}
    file = with_metadata(file, tmp_path / "yarn.gguf", **keys)
    convert_checkpoint(file, tmp_path / "back", "bf16", tokenizer=False, console=QUIET)
    back = AutoConfig.from_pretrained(tmp_path / "back")
    assert {key: back.rope_parameters[key] for key in rope} == rope
    scaled = gguf_models.model("qwen3", num_hidden_layers=1, rope_parameters=rope)
    found, expected = (type(scaled.model.rotary_emb)(c)(torch.zeros(1), IDS) for c in (back, scaled.config))
    assert all(map(torch.equal, found, expected))
    for change, reason in (
        ({"qwen3.rope.scaling.yarn_beta_fast": 16.0}, r"not understood here: qwen3\.rope\.scaling\.yarn_beta_fast"),
        ({"qwen3.rope.scaling.factor": 1.0}, "not understood here"),
        ({"qwen3.rope.scaling.original_context_length": 0}, "original_context_length is 0, which cannot be"),
    ):
        with pytest.raises(ValueError, match=reason):
            GgufSource(with_metadata(file, tmp_path / "bad.gguf", **change))


# Q1_0 written


def binary(folder: Path, group_size: int | None = 128, **options: Any) -> Any:
    model = gguf_models.model("llama", num_hidden_layers=1)
    options = {"weights": "binary", "centered": False} | options
    bitnet.replace_linear(model, group_size=group_size, **options)
    bitnet.pack(model)
    bitnet.save(model, folder)
    return model


def test_a_binary_model_comes_back_from_q1_0(tmp_path: Path) -> None:
    model = binary(tmp_path / "hf")
    convert_checkpoint(tmp_path / "hf", tmp_path / "m.gguf", "gguf-q1_0", tokenizer=False, console=QUIET)
    metadata, tensors = read_header(tmp_path / "m.gguf")
    assert metadata["general.file_type"] == 40
    info = tensors["blk.0.ffn_up.weight"]
    assert (info.kind, info.nbytes) == (41, 512 * 2 * 18)
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    expected = ggml_blocks.q1_0(layer.codes().numpy(), layer.weight_scale.float().numpy())
    assert (tmp_path / "m.gguf").read_bytes()[info.offset : info.offset + info.nbytes] == expected
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "back", tokenizer=False, console=QUIET)
    back = bitnet.load(tmp_path / "back")
    assert back.get_submodule("model.layers.0.mlp.up_proj").spec == layer.spec
    with torch.no_grad():
        assert torch.equal(back(IDS).logits, model(IDS).logits)
    convert_checkpoint(tmp_path / "back", tmp_path / "again.gguf", "gguf-q1_0", tokenizer=False, console=QUIET)
    _, again = read_header(tmp_path / "again.gguf")
    for name, info in tensors.items():
        parts = [
            np.fromfile(file, np.uint8, i.nbytes, offset=i.offset)
            for file, i in ((tmp_path / "m.gguf", info), (tmp_path / "again.gguf", again[name]))
        ]
        assert np.array_equal(*parts), name


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"weights": "ternary", "centered": True}, "is ternary, and Q1_0 holds -1 and .1 only; take gguf-q2_0"),
        ({"group_size": 64}, "has scales of groups of 64, and Q1_0 of 128; take gguf-q2_0"),
        ({"group_size": 32}, "has scales of groups of 32, and no type of llama.cpp has such small ones"),
    ],
)
def test_what_q1_0_cannot_hold_is_refused_before_a_byte_is_written(
    options: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    binary(tmp_path / "hf", **options)
    with pytest.raises(ValueError, match=reason):
        convert_checkpoint(tmp_path / "hf", tmp_path / "m.gguf", "gguf-q1_0", tokenizer=False, console=QUIET)
    assert not (tmp_path / "m.gguf").exists()
