"""Gemma 3, Qwen3-MoE and Qwen3.5 in GGUF: what these families have that others do not, and files of other programs."""

from pathlib import Path
from typing import Any

import gguf
import gguf_models
import numpy as np
import pytest
import torch
from gguf_models import assemble, checkpoint, logits, rewritten, round_scales
from rich.console import Console
from torch import Tensor

import bitnet
from bitnet.convert.conversion.convert import convert_checkpoint
from bitnet.convert.files import ggml
from bitnet.convert.files.gguf import padded, read_header, read_tensor
from bitnet.convert.hub.source import FolderSource
from bitnet.convert.llama_cpp.header import header_bytes
from bitnet.convert.llama_cpp.source import GgufSource
from bitnet.convert.llama_cpp.writer import write_gguf
from bitnet.experts import PackedStack
from bitnet.kernels.reference import dequantize_weight
from bitnet.packed import PackedBitLinear
from bitnet.quantize import QuantSpec

NUMBERS: dict[str, dict[str, Any]] = {
    "gemma3": {"attention.sliding_window": 2, "rope.freq_base": 1e6, "attention.sliding_window_pattern": [True, False]},
    "qwen3moe": {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 256},
    "qwen35": {
        "ssm.conv_kernel": 4,
        "ssm.state_size": 64,
        "ssm.group_count": 2,
        "ssm.time_step_rank": 8,
        "ssm.inner_size": 512,
        "full_attention_interval": 2,
        "rope.dimension_sections": [11, 11, 10, 0],
        "rope.dimension_count": 32,
    },
}


def as_others_store(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A tensor as llama.cpp's converter gives it to the writer, and the name it looks up."""
    if name.endswith("norm.weight") and "linear_attn" not in name:
        return [(name, tensor + 1)]
    if name.endswith("gate_up_proj"):
        gate, up = tensor.chunk(2, dim=1)
        return [(name.replace("gate_up_proj", part), x) for part, x in (("gate_proj", gate), ("up_proj", up))]
    if "linear_attn" not in name:
        return [(name, tensor)]
    if name.endswith("A_log"):
        return [(name, -tensor.exp().view(2, 4).T.reshape(8))]
    if name.endswith("dt_bias"):
        return [(name.replace("dt_bias", "dt_proj"), tensor.view(2, 4).T.reshape(8))]
    if name.endswith(("in_proj_a.weight", "in_proj_b.weight")):
        return [(name, tensor.view(2, 4, 256).transpose(0, 1).reshape(8, 256))]
    if name.endswith("in_proj_z.weight"):
        return [(name, tensor.view(2, 4, 64, 256).transpose(0, 1).reshape(512, 256))]
    if name.endswith("out_proj.weight"):
        return [(name, tensor.view(256, 2, 4, 64).transpose(1, 2).reshape(256, 512))]
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        tensor = tensor.squeeze(1)
        values = tensor[256:].view(2, 4, 64, -1).transpose(0, 1).reshape(512, -1)
        return [(name, torch.cat([tensor[:256], values]))]
    return [(name, tensor)]


@pytest.mark.parametrize(("family", "arch"), [("gemma3", "gemma3"), ("qwen3_moe", "qwen3moe"), ("qwen3_5", "qwen35")])
def test_float_files_of_the_gguf_package_are_read(family: str, arch: str, tmp_path: Path) -> None:
    model = gguf_models.model(family)
    config, writer = model.config, gguf.GGUFWriter(tmp_path / "m.gguf", arch)
    names = gguf.get_tensor_name_map(next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), 2)
    for name, tensor in model.state_dict().items():
        if config.tie_word_embeddings and name == "lm_head.weight":
            continue
        for theirs, values in (
            as_others_store(name, tensor) if family != "qwen3_moe" or "norm" not in name else [(name, tensor)]
        ):
            found = names.get_name(theirs, try_suffixes=(".weight",))
            assert found is not None, theirs
            leaf = "" if theirs.endswith("A_log") else ".bias" if theirs.endswith("dt_proj") else ".weight"
            writer.add_tensor(found.removesuffix(".weight") + leaf, values.contiguous().numpy())
    writer.add_context_length(512)
    writer.add_embedding_length(256)
    writer.add_block_count(2)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    for key, value in NUMBERS[arch].items():
        add = {list: writer.add_array, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{arch}.{key}", value)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    source = GgufSource(tmp_path / "m.gguf")
    assert (source.mismatches(), source.weights()) == ([], {})
    assert torch.equal(logits(assemble(source)), logits(round_scales(model)))
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "hf", "bf16", tokenizer=False, console=Console(quiet=True))
    state = bitnet.load(tmp_path / "hf").state_dict()
    assert all(torch.equal(state[name], value.bfloat16()) for name, value in model.state_dict().items())


FAMILY_KEYS: dict[str, tuple[str, dict[str, Any], str]] = {
    "no experts": ("qwen3_moe", {"qwen3moe.expert_count": None}, r"qwen3moe\.expert_count is missing"),
    "scaled experts": ("qwen3_moe", {"qwen3moe.expert_weights_scale": 2.5}, r"qwen3moe\.expert_weights_scale"),
    "half a pattern": ("gemma3", {"gemma3.attention.sliding_window_pattern": [True]}, "for 2 layers"),
    "no pattern": ("gemma3", {"gemma3.attention.sliding_window_pattern": 0}, "which cannot be"),
    "capped scores": ("gemma3", {"gemma3.attn_logit_softcapping": 50.0}, r"gemma3\.attn_logit_softcapping"),
    "other widths": ("qwen3_5", {"qwen35.ssm.inner_size": 256}, "inner_size is 256, not 8 heads of 64"),
    "uneven heads": ("qwen3_5", {"qwen35.ssm.group_count": 3}, "not 8 heads of 64 in 3 groups"),
    "no sections": ("qwen3_5", {"qwen35.rope.dimension_sections": ["a"]}, "dimension_sections"),
    "only guesses": ("qwen3_5", {"qwen35.nextn_predict_layers": 2}, r"block_count is 0"),
}


@pytest.mark.parametrize(("family", "metadata", "reason"), FAMILY_KEYS.values(), ids=FAMILY_KEYS)
def test_what_a_family_does_not_understand_is_refused(
    family: str, metadata: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    checkpoint(tmp_path / "hf", family)
    file = write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", "gguf-tq2_0")
    with pytest.raises(ValueError, match=reason):
        GgufSource(rewritten(file, tmp_path / "n.gguf", metadata))


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5", "gemma3"])
@pytest.mark.parametrize("to", ["hub", "base3", "bf16", "gguf-tq1_0"])
def test_the_families_go_through_conversion(family: str, to: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path / "hf", family)
    quiet = Console(quiet=True)
    convert_checkpoint(tmp_path / "hf", tmp_path / "m.gguf", "gguf-tq2_0", console=quiet)
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "back", to, console=quiet)
    if to.startswith("gguf"):
        convert_checkpoint(tmp_path / "back", tmp_path / "again", "hub", console=quiet)
    back = bitnet.load(tmp_path / ("again" if to.startswith("gguf") else "back"))
    if to == "bf16":
        state = back.state_dict()
        bitnet.unpack(round_scales(model))
        assert all(torch.equal(state[key], value.bfloat16()) for key, value in model.state_dict().items())
        return
    for module in round_scales(model).modules():
        if isinstance(module, PackedBitLinear | PackedStack):
            module.weight_scale = 1 / (1 / module.weight_scale)  # folders hold 1 / scale
    assert torch.equal(logits(back), logits(model))
    assert bitnet.inspect_checkpoint(tmp_path / "m.gguf", Console(quiet=True)).problems == []


@pytest.mark.parametrize(
    ("family", "changes", "options"),
    [
        ("llama", {}, {"activation_bits": None}),
        ("gemma3", {}, {"activation_bits": 4}),
        ("qwen3_moe", {"moe_intermediate_size": 96}, {"group_size": 32}),
    ],
    ids=["float activations", "4 bits", "small groups and odd rows"],
)
def test_bfloat16_holds_what_no_ternary_type_does(
    family: str, changes: dict[str, Any], options: dict[str, Any], tmp_path: Path
) -> None:
    model = gguf_models.model(family, **changes)
    bitnet.replace_linear(model, **options)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "hf")
    source = FolderSource(tmp_path / "hf")
    with pytest.raises(ValueError, match="cannot hold this model"):
        write_gguf(source, tmp_path / "m.gguf", "gguf-tq2_0", tokenizer=False)
    back = GgufSource(write_gguf(source, tmp_path / "m.gguf", "gguf-bf16", tokenizer=False))
    bitnet.unpack(model)
    for key, tensor in model.state_dict().items():
        if key in back.stored():
            stored = tensor.bfloat16().float() if "_proj" in key else tensor
            assert torch.allclose(back.tensor(key).float(), stored, rtol=0, atol=1e-6), key


GATE = "model.layers.0.mlp.experts.packed_gate_up_proj"


@pytest.mark.parametrize(
    ("options", "spec"), [({}, {"per_row": True}), ({"group_size": 64}, {"group_size": 64})], ids=["alone", "groups"]
)
def test_experts_whose_gate_and_up_differ_in_scale_come_back(
    options: dict[str, Any], spec: dict[str, Any], tmp_path: Path
) -> None:
    """In GGUF they are two matrices; other programs round each for itself."""
    model = gguf_models.model("qwen3_moe")
    bitnet.replace_linear(model, **options)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "hf")
    file = write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", "gguf-q2_0", tokenizer=False)
    data, info = bytearray(file.read_bytes()), read_header(file)[1]["blk.0.ffn_up_exps.weight"]
    blocks = np.frombuffer(data, np.uint8, info.nbytes, info.offset).reshape(4, -1, 18).copy()
    scales = blocks[..., :2].copy().view(np.float16)
    scales[2] *= 2  # of one expert
    blocks[..., :2] = scales.view(np.uint8)
    data[info.offset : info.offset + info.nbytes] = blocks.tobytes()
    file.write_bytes(data)
    source = GgufSource(file)
    assert source.weights()[GATE].spec == QuantSpec(**spec)
    before = [*FolderSource(tmp_path / "hf").matrices(source.weights()[GATE])]
    after = [*source.matrices(source.weights()[GATE])]
    for expert, (ours, theirs) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(ours.codes, theirs.codes)
        expected = dequantize_weight(
            ours.codes, ours.scale.half() if ours.scale.ndim > 1 else ours.scale.half().float()
        )
        expected[256:] *= 2 if expert == 2 else 1
        assert torch.equal(dequantize_weight(theirs.codes, theirs.scale), expected)
    convert_checkpoint(file, tmp_path / "back", tokenizer=False, console=Console(quiet=True))
    assert torch.isfinite(logits(bitnet.load(tmp_path / "back"))).all()


def test_experts_of_which_some_are_floats_are_floats(tmp_path: Path) -> None:
    """llama-quantize often gives ffn_down_exps more bits."""
    checkpoint(tmp_path / "hf", "qwen3_moe")
    first = write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", "gguf-q2_0")
    metadata, tensors = read_header(first)
    down = torch.randn(4, 256, 256)
    infos, parts, end = {}, [], 0
    for name, info in tensors.items():
        data = read_tensor(first, info).tobytes()
        if name == "blk.1.ffn_down_exps.weight":
            quantized = gguf.quants.quantize(down.numpy(), gguf.GGMLQuantizationType.Q8_0)
            data, info = quantized.tobytes(), info._replace(kind=8, nbytes=quantized.nbytes)
        infos[name] = info._replace(offset=end)
        parts.append(data.ljust(padded(len(data)), b"\0"))
        end += len(parts[-1])
    (tmp_path / "n.gguf").write_bytes(header_bytes(metadata, infos) + b"".join(parts))
    source = GgufSource(tmp_path / "n.gguf")
    assert {w.name.split(".")[2] for w in source.weights().values() if "experts" in w.name} == {"0"}
    assert source.missing() == []
    gate, before = source.tensor("model.layers.1.mlp.experts.gate_up_proj"), FolderSource(tmp_path / "hf")
    for expert, (codes, scale) in enumerate(before.matrices(before.weights()[GATE.replace("0", "1")])):
        assert torch.equal(gate[expert], codes * scale.half().float())
    expected = gguf.quants.dequantize(quantized, gguf.GGMLQuantizationType.Q8_0)
    assert torch.equal(source.tensor("model.layers.1.mlp.experts.down_proj"), torch.from_numpy(expected))


def test_blocks_that_guess_further_tokens_are_dropped(tmp_path: Path) -> None:
    """Qwen3.5's own files have one behind the model; transformers drops it, too."""
    model = checkpoint(tmp_path / "hf", "qwen3_5")
    file = write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", "gguf-tq2_0")
    metadata, tensors = read_header(file)
    data = [read_tensor(file, info).tobytes() for info in tensors.values()]
    infos, parts, end = {}, [], 0
    drafts = ["blk.2.attn_norm.weight", "blk.2.nextn.eh_proj.weight"]
    for name, part in zip([*tensors, *drafts], [*data, *data[-1:], *data[-1:]], strict=True):
        infos[name] = tensors.get(name, tensors[[*tensors][-1]])._replace(offset=end)
        parts.append(part.ljust(padded(len(part)), b"\0"))
        end += len(parts[-1])
    metadata |= {"qwen35.block_count": 3, "qwen35.nextn_predict_layers": 1}
    metadata["qwen35.attention.recurrent_layers"].append(False)
    (tmp_path / "n.gguf").write_bytes(header_bytes(metadata, infos) + b"".join(parts))
    source = GgufSource(tmp_path / "n.gguf")
    assert source.model.config.num_hidden_layers == 2
    assert torch.equal(logits(assemble(source)), logits(round_scales(model)))


def test_experts_that_stay_floats_are_written_as_floats(tmp_path: Path) -> None:
    """The checkpoint holds a tensor an expert, which transformers merges, and GGUF splits at another place."""
    model = gguf_models.model("qwen3_moe")
    bitnet.replace_linear(model, skip="mlp.experts")
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "hf")
    source = FolderSource(tmp_path / "hf")
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in source.merged["model.layers.0.mlp.experts.gate_up_proj"]
    file = write_gguf(source, tmp_path / "m.gguf", "gguf-tq2_0", tokenizer=False)
    assert ggml.NAMES[read_header(file)[1]["blk.0.ffn_up_exps.weight"].kind] == "F32"
    assert torch.equal(logits(assemble(GgufSource(file))), logits(round_scales(model)))


def test_a_missing_part_of_a_stack_is_named(tmp_path: Path) -> None:
    checkpoint(tmp_path / "hf", "qwen3_moe")
    file = write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", "gguf-tq2_0")
    source = GgufSource(rewritten(file, tmp_path / "n.gguf", without="blk.1.ffn_up_exps.weight"))
    assert source.missing() == ["there is no tensor model.layers.1.mlp.experts.gate_up_proj"]


def test_routers_are_float32_whatever_the_model_is(tmp_path: Path) -> None:
    model = gguf_models.model("qwen3_moe").bfloat16()
    bitnet.replace_linear(model)
    bitnet.save(model, tmp_path / "hf")
    file = write_gguf(FolderSource(tmp_path / "hf"), tmp_path / "m.gguf", "gguf-tq2_0", tokenizer=False)
    kinds = {name.split(".")[-2]: ggml.NAMES[info.kind] for name, info in read_header(file)[1].items()}
    assert (kinds["ffn_gate_inp"], kinds["token_embd"], kinds["ffn_gate_exps"]) == ("F32", "BF16", "TQ2_0")
