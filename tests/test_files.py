"""Bytes from strangers: what is read is what transformers and safetensors read, or one error that says what to do."""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_models
import pytest
import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import IDS, Mlp, gpt2, llama, mixtral, randomize
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    MarianConfig,
    MarianMTModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
)

import bitnet
from bitnet.convert.files import ggml
from bitnet.convert.files.damaged import Damaged
from bitnet.convert.files.folder import weight_files
from bitnet.convert.files.gguf import TensorInfo, padded, read_header
from bitnet.convert.files.safetensors import read_headers
from bitnet.convert.hub.legacy import modernize
from bitnet.convert.hub.models import model_config
from bitnet.convert.hub.source import FolderSource
from bitnet.convert.llama_cpp.header import header_bytes

QUIET = Console(quiet=True)
UP = "model.layers.1.mlp.up_proj.weight"


def convert(source: Path, target: Path, to: str = "hub", **options: Any) -> Path:
    return bitnet.convert_checkpoint(source, target, to, console=QUIET, **options)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def split_file(file: Path) -> tuple[dict[str, Any], bytes]:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_file(file: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model: float, in training, packed, and the first two in shards."""
    root = tmp_path_factory.mktemp("forms")
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(root / "float")
    model.save_pretrained(root / "shards", max_shard_size=4000)
    bitnet.replace_linear(model)
    bitnet.save(model, root / "latent")
    bitnet.pack(model)
    bitnet.save(model, root / "packed")
    return root


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


# Wrong values


def with_state(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


CONTRADICTIONS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "transposed": lambda state: state.update({UP: state[UP].T}),
    "flat": lambda state: state.update({UP: state[UP].view(-1)}),
    "uint32": lambda state: state.update({UP: state[UP].view(torch.uint32)}),
    "int8": lambda state: state.update({UP: state[UP].to(torch.int8)}),
    "norm_as_integers": lambda state: state.update({"model.norm.weight": state["model.norm.weight"].view(torch.int32)}),
    "embedding_as_float8": lambda state: state.update(
        {"model.embed_tokens.weight": state["model.embed_tokens.weight"].to(torch.float8_e4m3fn)}
    ),
}


@pytest.mark.parametrize("form", ["float", "latent"])
@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_tensor_that_is_not_the_models_is_refused(forms: Path, form: str, name: str, tmp_path: Path) -> None:
    source = with_state(copied(forms / form, tmp_path / "source"), CONTRADICTIONS[name])
    tensor = {"norm_as_integers": "model.norm.weight", "embedding_as_float8": "model.embed_tokens.weight"}.get(name, UP)
    with pytest.raises(ValueError, match=re.escape(tensor)):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=re.escape(tensor)):
        bitnet.load(source)


def shifted(header: dict[str, Any], by: int) -> None:
    header[UP]["data_offsets"] = [offset + by for offset in header[UP]["data_offsets"]]


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "overlap": (lambda header: shifted(header, -64), "another tensor's"),
    "gap": (lambda header: shifted(header, 64), "belong to no tensor"),
    "same_bytes": (
        lambda header: header[UP].update(data_offsets=header[UP.replace("1", "0", 1)]["data_offsets"]),
        "begins at byte",
    ),
    "lost": (lambda header: header.pop(UP), "begins at byte"),
    "size": (lambda header: header[UP].update(shape=[24, 15]), "takes 1,440 bytes as F32"),
    "dtype": (lambda header: header[UP].update(dtype="F99"), "'F99', which there is not"),
    "bool_offsets": (lambda header: header[UP].update(data_offsets=[True, False]), "data_offsets"),
    "metadata": (lambda header: header.update(__metadata__={"format": ["pt"]}), "__metadata__"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_safetensors_refuses_is_refused(forms: Path, name: str, tmp_path: Path) -> None:
    change, message = HEADERS[name]
    source = copied(forms / "float", tmp_path / "source")
    file = source / "model.safetensors"
    header, data = split_file(file)
    change(header)
    join_file(file, header, data)
    with pytest.raises(SafetensorError):
        load_file(file)
    for read in (FolderSource, bitnet.load, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(Damaged, match=re.escape(message)) as error:
            read(source)
        assert str(file) in str(error.value)


def test_a_tensor_in_two_shards_is_taken_only_if_it_is_the_same(forms: Path, tmp_path: Path) -> None:
    source = copied(forms / "shards", tmp_path / "source")
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    home = source / index["model.norm.weight"]
    other = next(source / name for name in index.values() if source / name != home)
    state = load_file(other) | {"model.norm.weight": load_file(home)["model.norm.weight"]}
    save_file(state, other, {"format": "pt"})
    expected = load_file(forms / "float" / "model.safetensors")
    assert all(torch.equal(FolderSource(source).tensor(key), value) for key, value in expected.items())
    save_file(state | {"model.norm.weight": state["model.norm.weight"] + 1}, other, {"format": "pt"})
    for read in (bitnet.load, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(Damaged, match=r"another model\.norm\.weight than"):
            read(source)


def test_weights_in_two_forms_are_those_that_from_pretrained_takes(forms: Path, tmp_path: Path) -> None:
    source = copied(forms / "shards", tmp_path / "source")
    llama().save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "model.safetensors", source)
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    found = FolderSource(source)
    assert all(torch.equal(found.tensor(key), expected[key]) for key in found.stored())


# Files outside of the folder


@pytest.mark.parametrize("entry", ["../other/model.safetensors", "/{}", "a/../../x.safetensors", "link.safetensors", 7])
def test_an_index_cannot_lead_out_of_the_folder(forms: Path, entry: Any, tmp_path: Path) -> None:
    source = copied(forms / "shards", tmp_path / "source")
    other = copied(forms / "float", tmp_path / "other") / "model.safetensors"
    (source / "link.safetensors").symlink_to(other)
    entry = f"{other}" if entry == "/{}" else entry
    index = source / "model.safetensors.index.json"
    edit_json(index, weight_map=json.loads(index.read_text())["weight_map"] | {UP: entry})
    for read in (weight_files, bitnet.load, FolderSource):
        with pytest.raises(Damaged, match=r"index\.json: .*(out of|outside of|no safetensors file)"):
            read(source)


def test_links_into_the_hubs_cache_and_to_the_folder_itself_are_followed(forms: Path, tmp_path: Path) -> None:
    home = tmp_path / "models--a--b"
    (home / "snapshots" / "c0ffee").mkdir(parents=True)
    (home / "blobs").mkdir()
    for number, file in enumerate(sorted((forms / "shards").iterdir())):
        shutil.copy(file, home / "blobs" / str(number))
        (home / "snapshots" / "c0ffee" / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    (tmp_path / "link").symlink_to(home / "snapshots" / "c0ffee")
    for path in (home / "snapshots" / "c0ffee", tmp_path / "link"):
        assert len(FolderSource(path).stored()) == len(load_file(forms / "float" / "model.safetensors"))


def test_a_folder_may_be_named_from_anywhere_but_its_index_names_nothing_outside(
    forms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(forms / "packed", tmp_path / "model")
    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path / "beside")
    for read in (bitnet.load, AutoModelForCausalLM.from_pretrained):
        assert read("../model").config.model_type == "llama"
    weights = tmp_path / "model" / "model.safetensors"
    names = dict.fromkeys(load_file(weights), "../beside/model.safetensors")
    weights.rename(tmp_path / "beside" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names, "metadata": {}}))
    for read in (bitnet.load, AutoModelForCausalLM.from_pretrained):
        for path in ("../model", str(tmp_path / "model")):
            with pytest.raises(Damaged):
                read(path)


# Configurations


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "million_layers": ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1,000,000"),
    "million_layers_inside": ({"text_config": {"n_layer": 10**6}}, "n_layer is 1,000,000"),
    "many_labels": ({"num_labels": 10**9}, "num_labels is 1,000,000,000"),
    "no_heads": ({"num_attention_heads": 0}, "cannot build a model of it"),
    "text": ({"hidden_size": "16"}, "cannot build a model of it"),
    "list": ({"rms_norm_eps": [1e-6]}, "cannot build a model of it"),
    "null": ({"rms_norm_eps": None}, "cannot build a model of it"),
    "unknown_activation": ({"hidden_act": "nonesuch"}, "cannot build a model of it"),
    "unknown_dtype": ({"dtype": "float99"}, "cannot build a model of it"),
    "labels": ({"id2label": [1]}, "cannot build a model of it"),
    "architectures": ({"architectures": {"a": 1}}, "architectures is"),
    "not_a_model": ({"architectures": ["AutoTokenizer"]}, "no model class 'AutoTokenizer'"),
    "model_type": ({"model_type": ["llama"]}, "model_type ['llama'] is none of"),
    "wider": ({"hidden_size": 32}, "is F32 [64, 16], but"),
}


@pytest.mark.parametrize("form", ["float", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_describes_no_model_is_one_error(forms: Path, form: str, name: str, tmp_path: Path) -> None:
    changes, message = CONFIGS[name]
    source = copied(forms / form, tmp_path / "source")
    edit_json(source / "config.json", **changes)
    for read in (bitnet.load, lambda path: convert(path, tmp_path / "out", "hub" if form == "float" else "base3")):
        with pytest.raises(ValueError, match=re.escape(message) if name != "wider" else r"\[") as error:
            read(source)
        assert str(source) in str(error.value) or name == "wider"


SECTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"quant_method": None}, "not an object with a quant_method"),
    "class": ({"linear_class": 5}, "linear_class is 5"),
    "other_class": ({"linear_class": "bytelinear"}, "linear_class is 'bytelinear'"),
    "mode": ({"linear_class": "autobitlinear", "quantization_mode": ["offline"]}, "quantization_mode is ['offline']"),
    "skips": ({"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is 'lm_head'"),
    "skip": ({"modules_to_not_convert": ["lm_head", None]}, "modules_to_not_convert holds None"),
    "pattern": (
        {"modules_to_not_convert": ["(lm_head"]},
        "modules_to_not_convert holds '(lm_head', which is no pattern",
    ),
    "norm": ({"use_rms_norm": "false"}, "use_rms_norm is 'false'"),
    "eps": ({"use_rms_norm": True, "rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
    "no_eps": ({"use_rms_norm": True, "rms_norm_eps": None}, "rms_norm_eps is None"),
    "section": ({"bitnet_toolkit": None}, "(it is None)"),
    "section_list": ({"bitnet_toolkit": [1]}, "(it is [1])"),
    "overrides": ({"bitnet_toolkit": {"overrides": []}}, "(overrides is [], not an object)"),
    "override": ({"bitnet_toolkit": {"overrides": {"a": 1}}}, "(a must say whether they are packed"),
    "packed": ({"bitnet_toolkit": {"packed": 1}}, "(the layers must say whether they are packed"),
    "spec": (
        {"bitnet_toolkit": {"spec": {"weights": "ternary", "per_row": "no"}}},
        "per_row is 'no', not of type bool",
    ),
    "spec_key": ({"bitnet_toolkit": {"spec": {"widths": 1}}}, "not an object of weights, per_row"),
    "activations": ({"bitnet_toolkit": {"spec": {"activation_bits": 8.0}}}, "activation_bits is 8.0, not of type int"),
    "weights": ({"bitnet_toolkit": {"spec": {"weights": "quaternary"}}}, "weights must be"),
    "bits": ({"bitnet_toolkit": {"bits": "2"}}, "(bits is '2')"),
    "embedding": ({"bitnet_toolkit": {"embedding": {}}}, "(embedding is {}, not a name)"),
}


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = llama()
    bitnet.replace_linear(model, per_row=True)
    bitnet.pack(model)
    return bitnet.save(model, tmp_path_factory.mktemp("extended") / "m")


@pytest.mark.parametrize("name", SECTIONS)
def test_options_of_the_layers_that_say_nothing_are_one_error(
    forms: Path, extended: Path, name: str, tmp_path: Path
) -> None:
    changes, message = SECTIONS[name]
    source = copied(extended if "bitnet_toolkit" in changes else forms / "packed", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    settings = config["quantization_config"]
    if isinstance(section := changes.get("bitnet_toolkit"), dict):
        section = settings["bitnet_toolkit"] | section
        changes = {"bitnet_toolkit": section}
    edit_json(source / "config.json", quantization_config=settings | changes)
    for read in (bitnet.load, FolderSource):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            read(source)
        assert str(source) in str(error.value)
    if name != "method":
        with pytest.raises(ValueError, match=re.escape(message)):
            AutoModelForCausalLM.from_pretrained(source)


def test_infinity_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    """FalconH1's and Mamba2's limits of a time step are."""
    config = {"model_type": "mamba2", "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert tuple(model_config(tmp_path / "config.json", config, 10).time_step_limit) == (0.0, float("inf"))


def test_options_that_are_null_and_decide_nothing_are_none(forms: Path, tmp_path: Path) -> None:
    source = copied(forms / "packed", tmp_path / "source")
    settings = json.loads((source / "config.json").read_text())["quantization_config"]
    edit_json(source / "config.json", quantization_config=settings | {"rms_norm_eps": None, "use_rms_norm": None})
    assert torch.equal(bitnet.load(source)(IDS).logits, bitnet.load(forms / "packed")(IDS).logits)


@pytest.mark.parametrize("text", [b"[1]", b"\xff\xfe", b"{", b"null", b"[" * 10**5, b'{"a":' * 10**5, b""])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_other_bytes_than_a_json_object_are_one_error(forms: Path, name: str, text: bytes, tmp_path: Path) -> None:
    source = copied(forms / "shards", tmp_path / "source")
    (source / name).write_bytes(text)
    for read in (bitnet.load, FolderSource, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(Damaged, match=re.escape(str(source / name))):
            read(source)


def test_an_index_without_a_map_is_one_error(forms: Path, tmp_path: Path) -> None:
    source = copied(forms / "shards", tmp_path / "source")
    for text in ("{}", '{"weight_map": []}', '{"weight_map": {}}'):
        (source / "model.safetensors.index.json").write_text(text)
        with pytest.raises(Damaged, match="weight_map"):
            bitnet.load(source)


def test_a_module_is_filled_from_what_was_saved_of_one_only(forms: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no low-bit layers to put into the module"):
        bitnet.load(forms / "float", Mlp())
    module = Mlp()
    bitnet.replace_linear(module)
    bitnet.pack(module)
    bitnet.save(module, tmp_path / "m")
    with pytest.raises(ValueError, match=r"module.*bitnet\.load\(path, module\)"):
        bitnet.inspect_checkpoint(tmp_path / "m", QUIET)
    with_state(tmp_path / "m", lambda state: state.update(extra=torch.ones(1)))
    with pytest.raises(ValueError, match="has a tensor extra"):
        bitnet.load(tmp_path / "m", Mlp())


# Checkpoints as the Hub has them


def test_names_without_the_base_models_prefix(tmp_path: Path) -> None:
    model = gpt2()
    model.save_pretrained(tmp_path / "gpt2")
    with_state(
        tmp_path / "gpt2",
        lambda state: (
            [state.update({key.removeprefix("transformer."): state.pop(key)}) for key in list(state)]
            + [state.update({f"h.{i}.attn.bias": torch.ones(32, 32).tril()[None, None]}) for i in range(2)]
        ),
    )
    assert not bitnet.inspect_checkpoint(tmp_path / "gpt2", QUIET).problems
    bitnet.replace_linear(model)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "saved")
    convert(tmp_path / "gpt2", tmp_path / "out")
    for read in (bitnet.load, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(read(tmp_path / "out").eval()(IDS).logits, model(IDS).logits)
    assert not bitnet.diff_checkpoints(tmp_path / "out", tmp_path / "saved", QUIET).differences
    twice = copied(tmp_path / "gpt2", tmp_path / "twice")
    with_state(twice, lambda state: state.update({"transformer.ln_f.bias": state["ln_f.bias"] + 1}))
    with pytest.raises(ValueError, match=r"ln_f\.bias and transformer\.ln_f\.bias, which are one tensor"):
        FolderSource(twice)


SIZES = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 64}
SIZES |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
SIZES |= {"pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": None}


@pytest.mark.parametrize("name", ["marian", "pegasus"])
def test_parameters_that_are_never_stored_are_not_missed(name: str, tmp_path: Path) -> None:
    model: Any = {
        "marian": lambda: MarianMTModel(MarianConfig(**SIZES, decoder_vocab_size=64)),
        "pegasus": lambda: PegasusForConditionalGeneration(PegasusConfig(**SIZES)),
    }[name]()
    positions = {key: value.clone() for key, value in model.state_dict().items() if "embed_positions" in key}
    randomize(model).load_state_dict(positions, strict=False)
    model.final_logits_bias.zero_()
    model.save_pretrained(tmp_path / "float")
    never = ("embed_positions.weight", "final_logits_bias")
    with_state(tmp_path / "float", lambda state: [state.pop(key) for key in list(state) if key.endswith(never)])
    bitnet.replace_linear(model)
    bitnet.pack(model)
    loaded = bitnet.load(convert(tmp_path / "float", tmp_path / "out"))
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("shard", [{}, {"max_shard_size": 4000}], ids=["one_file", "shards"])
def test_the_only_variant_there_is_is_read(shard: dict[str, Any], tmp_path: Path) -> None:
    model = llama()
    bitnet.replace_linear(model)
    bitnet.save(model, tmp_path / "m", variant="fp16", **shard)
    assert not (tmp_path / "m" / "model.safetensors").exists()
    out = convert(tmp_path / "m", tmp_path / "out")
    assert not list(out.glob("*fp16*"))
    bitnet.pack(model)
    assert torch.equal(bitnet.load(out)(IDS).logits, model(IDS).logits)
    assert torch.equal(bitnet.load(tmp_path / "m")(IDS).logits, model(IDS).logits)
    model.save_pretrained(tmp_path / "m", variant="other")
    with pytest.raises(ValueError, match="fp16, other"):
        bitnet.load(tmp_path / "m")


@pytest.mark.parametrize("form", ["float", "latent", "packed"])
def test_a_config_without_architectures_is_a_language_model(forms: Path, form: str, tmp_path: Path) -> None:
    source = copied(forms / form, tmp_path / "source")
    edit_json(source / "config.json", architectures=None)
    assert torch.equal(bitnet.load(source)(IDS).logits, bitnet.load(forms / form)(IDS).logits)
    convert(source, tmp_path / "out", "hub" if form == "float" else "bf16")


def test_every_byte_of_a_file_is_where_safetensors_finds_it(forms: Path) -> None:
    file = forms / "packed" / "model.safetensors"
    expected, source = load_file(file), FolderSource(forms / "packed")
    assert read_headers([file]).keys() == expected.keys()
    assert all(torch.equal(source.tensor(key), value) for key, value in expected.items())


# What fuzzing found


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model with a tokenizer, as a folder and as a GGUF file."""
    root = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    gguf_models.checkpoint(root / "hf", num_hidden_layers=1)
    return convert(root / "hf", root / "m.gguf", "gguf-q2_0")


def test_an_embedding_that_is_none_is_one_error(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    bitnet.replace_linear(model)
    bitnet.pack(model, head="int8")
    bitnet.save(model, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for name in ("nowhere", "model.norm"):
        config["quantization_config"]["bitnet_toolkit"]["embedding"] = name
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        for read in (FolderSource, bitnet.load):
            with pytest.raises(ValueError, match=f"'{name}' is the packed embedding, but the model has none there"):
                read(tmp_path / "m")


def test_layers_that_the_config_leaves_out_are_one_error(forms: Path, tmp_path: Path) -> None:
    for form in ("float", "latent", "packed"):
        source = copied(forms / form, tmp_path / form)
        edit_json(source / "config.json", num_hidden_layers=1)
        for read in (bitnet.load, lambda path: convert(path, tmp_path / "out", "bf16")):
            with pytest.raises(ValueError, match=r"model\.layers\.1\..* is of a layer that the model does not have"):
                read(source)


def test_an_index_that_only_transformers_cannot_take_is_one_error(forms: Path, tmp_path: Path) -> None:
    source = copied(forms / "shards", tmp_path / "source")
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    assert convert(source, tmp_path / "out")
    try:
        bitnet.load(source)
    except Damaged as error:
        assert str(source) in str(error)  # noqa: PT017  (versions of transformers differ)


def test_a_shard_that_links_to_itself_is_missing(forms: Path, tmp_path: Path) -> None:
    source = copied(forms / "shards", tmp_path / "source")
    shard = next(iter(source.glob("*.safetensors")))
    shard.unlink()
    shard.symlink_to(shard)
    for read in (bitnet.load, FolderSource):
        with pytest.raises(FileNotFoundError, match=shard.name):
            read(source)


TOKENIZER: dict[str, tuple[str, Any, str]] = {
    "id": ("tokenizer.json", lambda text: re.sub(r'"!": \d+', '"!": 2147483648', text), "token the number 2147483648"),
    "length": (
        "tokenizer_config.json",
        lambda text: json.dumps(json.loads(text) | {"model_max_length": [1]}),
        "its tokenizer cannot be read",
    ),
    "positions": (
        "config.json",
        lambda text: json.dumps(json.loads(text) | {"max_position_embeddings": 2**31}),
        "",
    ),
    "too_many_positions": (
        "config.json",
        lambda text: json.dumps(json.loads(text) | {"max_position_embeddings": 2**40}),
        r"llama\.context_length: 1099511627776 is no number",
    ),
}


@pytest.mark.parametrize("name", TOKENIZER)
def test_numbers_that_no_gguf_file_holds_are_one_error(exported: Path, name: str, tmp_path: Path) -> None:
    file, change, message = TOKENIZER[name]
    source = copied(exported.parent / "hf", tmp_path / "source")
    text = (source / file).read_text()
    assert change(text) != text
    (source / file).write_text(change(text))
    if not message:
        convert(source, tmp_path / "m.gguf", "gguf-q2_0")
        return
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "m.gguf", "gguf-q2_0")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


NUMBERS: dict[str, tuple[str, bytes, str]] = {
    "heads": ("llama.attention.head_count", u32(4) + u32(9), "cannot build a model of it"),
    "no_heads": ("llama.attention.head_count", u32(4) + u32(0), "llama.attention.head_count is 0, which cannot be"),
    "float": ("llama.block_count", u32(6) + struct.pack("<f", 1.0), "llama.block_count is 1.0, which cannot be"),
    "layers": ("llama.block_count", u32(4) + u32(10**6), "llama.block_count is 1,000,000, for"),
    "nested": ("llama.block_count", u32(9) + u32(9), "has an array of type 9"),
    "eps": (
        "llama.attention.layer_norm_rms_epsilon",
        u32(6) + struct.pack("<f", float("nan")),
        "epsilon is nan, which",
    ),
    "architecture": ("general.architecture", u32(4), "its architecture is"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_a_gguf_file_whose_numbers_cannot_be_is_one_error(exported: Path, name: str, tmp_path: Path) -> None:
    key, value, message = NUMBERS[name]
    data = exported.read_bytes()
    at = data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key)
    (tmp_path / "m.gguf").write_bytes(data[:at] + value + data[at + len(value) :])
    for read in (bitnet.inspect_checkpoint, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(ValueError, match=message if name != "architecture" else r"m\.gguf: ") as error:
            read(tmp_path / "m.gguf")
        assert str(tmp_path / "m.gguf") in str(error.value)


def test_a_gguf_alignment_that_is_none_is_one_error(exported: Path, tmp_path: Path) -> None:
    metadata, _ = read_header(exported)
    for value in (0, 3, "32", [32]):
        head = header_bytes(metadata | {"general.alignment": value}, {})
        (tmp_path / "m.gguf").write_bytes(head)
        with pytest.raises(Damaged, match=r"general\.alignment is"):
            read_header(tmp_path / "m.gguf")


def test_gguf_tensors_that_overlap_are_refused(exported: Path, tmp_path: Path) -> None:
    """As llama.cpp does; and Q2_0 in blocks of 128, which older files have, shows by the sizes of its tensors."""
    metadata, tensors = read_header(exported)
    for shift in (-32, 32):
        infos, end = {}, 0
        for number, (name, info) in enumerate(tensors.items()):
            infos[name] = TensorInfo(info.kind, info.shape, end + shift * (number == 3), info.nbytes)
            end += padded(info.nbytes)
        (tmp_path / "m.gguf").write_bytes(header_bytes(metadata, infos) + bytes(end + 64))
        with pytest.raises(Damaged, match="is the next free"):
            read_header(tmp_path / "m.gguf")


def test_an_expert_of_another_shape_is_one_error(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "m")
    name = next(key for key in load_file(tmp_path / "m" / "model.safetensors") if ".experts.1." in key)
    with_state(tmp_path / "m", lambda state: state.update({name: state[name].T}))
    for read in (bitnet.load, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"but as a part of .* it must be") as error:
            read(tmp_path / "m")
        assert str(tmp_path / "m") in str(error.value)


def test_a_gguf_type_that_nothing_here_reads_is_one_error(exported: Path, tmp_path: Path) -> None:
    metadata, tensors = read_header(exported)
    infos, end = {}, 0
    for name, info in tensors.items():
        kind = 9 if name == "output.weight" else info.kind  # Q8_1, which only llama.cpp's kernels use
        infos[name] = TensorInfo(kind, info.shape, end, ggml.nbytes(kind, info.shape))
        end += padded(infos[name].nbytes)
    (tmp_path / "m.gguf").write_bytes(header_bytes(metadata, infos) + bytes(end))
    with pytest.raises(ValueError, match=r"tensor output\.weight is Q8_1, which is not read here"):
        bitnet.inspect_checkpoint(tmp_path / "m.gguf", QUIET)


def test_names_of_1bitllms_tensors_mean_nothing_in_other_models() -> None:
    config, keys = {"model_type": "kosmos-2"}, ["text.layers.0.self_attn.inner_attn_ln.weight"]
    assert modernize(config, keys) == (config, {key: key for key in keys})


def test_widths_per_stage_are_no_counts_of_stages() -> None:
    assert model_config(Path("config.json"), {"model_type": "llama", "embed_dim_per_stage": [384]}, 10)
    with pytest.raises(Damaged, match="num_stages is 384"):
        model_config(Path("config.json"), {"model_type": "llama", "num_stages": [384]}, 10)
