"""Tiny random models of real architectures: what a swap changes, what it leaves and says so, and what survives disk.

Packed outputs are compared for equality: training in eval mode and serving compute the same integers.
"""

import copy
import importlib
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import transformers
from machine import said
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming
from transformers.integrations import bitnet as stock
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.falcon_h1 import modeling_falcon_h1
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizer_bitnet import BitNetHfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module
from transformers.utils.quantization_config import BitNetQuantConfig

import bitnet
from bitnet.convert.conversion.convert import convert_checkpoint
from bitnet.convert.hub.config import EXTENDED, config_of
from bitnet.convert.swap.kinds import FUSED, fuses_out_proj
from bitnet.experts import BitExperts, PackedExperts
from bitnet.kernels import reference
from bitnet.linear import BitConv1D, BitLayer

IDS = torch.arange(12).reshape(2, 6)
TEXT = {"input_ids": IDS, "labels": IDS}
CLASSES = {"labels": torch.tensor([0, 1])}
IMAGES = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), **CLASSES}
SOUND = {"input_features": torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0)), "labels": IDS}

SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LM = {**SIZE, "vocab_size": 40, "max_position_embeddings": 64}
GROUPED = {**LM, "num_key_value_heads": 2, "head_dim": 8}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WHISPER = {f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in (("layers", 2), ("ffn_dim", 48))}
WHISPER |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "vocab_size": 40, "d_model": 32}
WHISPER |= {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
WHISPER |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

MAMBA = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
FALCON = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4}
T5 = {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
GPT2 = {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
DEEPSEEK |= {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8}
DEEPSEEK |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4}
GPT_OSS = {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default"}}
GPT_OSS["rope_parameters"] |= {"rope_theta": 1e4}

# name: class, config, inputs
ZOO: dict[str, tuple[str, dict[str, Any], dict[str, Tensor]]] = {
    "llama": ("LlamaForCausalLM", GROUPED, TEXT),
    "qwen3": ("Qwen3ForCausalLM", GROUPED | {"tie_word_embeddings": True}, TEXT),
    "gpt_neox": ("GPTNeoXForCausalLM", LM, TEXT),
    "phi": ("PhiForCausalLM", LM, TEXT),
    "opt": ("OPTForCausalLM", LM | {"ffn_dim": 48, "word_embed_proj_dim": 32}, TEXT),
    "bert": ("BertForMaskedLM", LM, TEXT),
    "bert_classifier": ("BertForSequenceClassification", LM, {"input_ids": IDS, **CLASSES}),
    "vit": ("ViTForImageClassification", SIZE | {"image_size": 16, "patch_size": 8}, IMAGES),
    "whisper": ("WhisperForConditionalGeneration", WHISPER, SOUND),
    "t5": ("T5ForConditionalGeneration", T5 | {"decoder_start_token_id": 0}, TEXT),
    "mixtral": ("MixtralForCausalLM", GROUPED | {"num_local_experts": 4}, TEXT),
    "qwen3_moe": ("Qwen3MoeForCausalLM", GROUPED | MOE, TEXT),
    "mamba": ("MambaForCausalLM", MAMBA, TEXT),
    "falcon_h1": ("FalconH1ForCausalLM", GROUPED | FALCON, TEXT),
    "gemma3": ("Gemma3ForCausalLM", GROUPED | {"layer_types": ["sliding_attention", "full_attention"]}, TEXT),
    "phi3": ("Phi3ForCausalLM", LM | {"pad_token_id": 0, "eos_token_id": 0}, TEXT),
    "gpt2": ("GPT2LMHeadModel", GPT2, TEXT),
    "deepseek_v3": ("DeepseekV3ForCausalLM", LM | DEEPSEEK, TEXT),
    "gpt_oss": ("GptOssForCausalLM", GROUPED | GPT_OSS, TEXT),
    "falcon": ("FalconForCausalLM", LM, TEXT),
    "rwkv": ("RwkvForCausalLM", {**SIZE, "vocab_size": 40, "context_length": 16}, TEXT),
}
EXPERTS = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
OURS_ONLY = (*EXPERTS, "gpt2")  # stock transformers makes BitLinear of nn.Linear only
SPECIAL = (*OURS_ONLY, "phi3", "falcon_h1", "mamba")  # fused projections, too
PLAIN = ("llama", "qwen3", "gpt_neox", "phi", "opt", "bert", "bert_classifier", "vit", "whisper", "t5", "gemma3")

# All that stays besides lookups and convolutions: name with indices as *, and the reason given for it.
TIED = "tied to the embedding"
OUTPUT_HEAD = {"lm_head": "output embedding"}
KEPT: dict[str, dict[str, str]] = {
    "llama": OUTPUT_HEAD,
    "qwen3": {"lm_head": f"{TIED} model.embed_tokens"},
    "gpt_neox": OUTPUT_HEAD,
    "phi": OUTPUT_HEAD,
    "opt": {"lm_head": f"{TIED} model.decoder.embed_tokens"},
    "bert": {
        "cls.predictions.transform.dense": "task head (outside bert)",
        "cls.predictions.decoder": f"{TIED} bert.embeddings.word_embeddings",
    },
    "bert_classifier": {"bert.pooler.dense": "task head", "classifier": "task head (outside bert)"},
    "vit": {
        "classifier": "task head (outside vit)",
        "vit.embeddings.cls_token": "not an nn.Linear",
        "vit.embeddings.position_embeddings": "not an nn.Linear",
    },
    "whisper": {"proj_out": f"{TIED} model.decoder.embed_tokens"},
    "t5": {
        "encoder.block.*.layer.*.DenseReluDense.wo": "T5DenseActDense uses wo.weight directly",
        "decoder.block.*.layer.*.DenseReluDense.wo": "T5DenseActDense uses wo.weight directly",
        "lm_head": f"{TIED} shared",
    },
    "mixtral": {**OUTPUT_HEAD, "model.layers.*.mlp.gate.weight": "router"},
    "qwen3_moe": {**OUTPUT_HEAD, "model.layers.*.mlp.gate.weight": "router"},
    "deepseek_v3": {**OUTPUT_HEAD, "model.layers.*.mlp.gate.weight": "router"},
    "gpt_oss": {**OUTPUT_HEAD, "model.layers.*.mlp.router.weight": "router"},
    "mamba": {
        "lm_head": f"{TIED} backbone.embeddings",
        "backbone.layers.*.mixer.x_proj": "MambaMixer uses x_proj.weight directly",
        "backbone.layers.*.mixer.dt_proj": "MambaMixer uses dt_proj.weight directly",
        "backbone.layers.*.mixer.out_proj": "MambaMixer uses out_proj.weight directly",
        "backbone.layers.*.mixer.A_log": "not an nn.Linear",
    },
    "falcon_h1": OUTPUT_HEAD,
    "gemma3": {"lm_head": f"{TIED} model.embed_tokens"},
    "gpt2": {"lm_head": f"{TIED} transformer.wte"},
    "phi3": OUTPUT_HEAD,
    "falcon": {"lm_head": f"{TIED} transformer.word_embeddings"},
    "rwkv": {
        "head": "output embedding",
        "rwkv.blocks.*.attention.output": "RwkvModel uses blocks.*.attention.output.weight directly",
        "rwkv.blocks.*.feed_forward.value": "RwkvModel uses blocks.*.feed_forward.value.weight directly",
        **{f"rwkv.blocks.*.attention.time_mix_{name}": "not an nn.Linear" for name in ("key", "value", "receptance")},
        **{f"rwkv.blocks.*.feed_forward.time_mix_{name}": "not an nn.Linear" for name in ("key", "receptance")},
    },
}


def build(class_name: str, config: dict[str, Any]) -> transformers.PreTrainedModel:
    cls = getattr(transformers, class_name)
    return cls(cls.config_class(**config))


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def low_bit(model: nn.Module) -> dict[str, nn.Module]:
    kinds = BitLayer | bitnet.PackedBitLinear | PackedExperts
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model.eval()(**inputs).logits


@dataclass
class Case:
    """A model after replace_linear, and what it was before. Tests that change it work on a copy."""

    name: str
    inputs: dict[str, Tensor]
    model: transformers.PreTrainedModel
    report: bitnet.Report
    parameters: dict[str, nn.Parameter]
    types: dict[str, type]
    keys: list[str]


def swap(name: str) -> Case:
    class_name, config, inputs = ZOO[name]
    torch.manual_seed(0)
    model = build(class_name, config)
    before = parameters(model), {path: type(m) for path, m in model.named_modules()}, list(model.state_dict())
    return Case(name, inputs, model, bitnet.replace_linear(model), *before)


@pytest.fixture(scope="module", params=ZOO)
def case(request: pytest.FixtureRequest) -> Case:
    return swap(request.param)


def test_swap_changes_nothing_but_the_class_of_what_it_reports(case: Case) -> None:
    after = parameters(case.model)
    assert after.keys() == case.parameters.keys()
    assert all(after[name] is parameter for name, parameter in case.parameters.items())
    assert list(case.model.state_dict()) == case.keys
    swapped = {re.sub(r"\.experts\..*", ".experts", row.name) for row in case.report.rows if row.action == "ternary"}
    assert swapped
    assert swapped == low_bit(case.model).keys()
    becomes = {nn.Linear: bitnet.BitLinear, FalconLinear: bitnet.BitLinear, Conv1D: BitConv1D}
    for name, module in case.model.named_modules():
        assert type(module) is (becomes.get(case.types[name], BitExperts) if name in swapped else case.types[name]), (
            name
        )
    assert any(isinstance(module, BitExperts) for module in case.model.modules()) == (case.name in EXPERTS)
    if case.name == "gpt2":
        assert {type(module) for module in low_bit(case.model).values()} == {BitConv1D}


@pytest.mark.parametrize("name", KEPT)
def test_every_matrix_is_reported_once_and_what_stays_says_why(name: str) -> None:
    case = swap(name)
    seen = []
    for row in case.report.rows:
        matrix = case.parameters.get(row.name)
        matrix = case.parameters[f"{row.name}.weight"] if matrix is None else matrix
        seen.append(id(matrix))
        assert row.shape == tuple(matrix.shape)
        assert row.action in ("ternary", "kept")
        assert (row.action == "kept") == bool(row.reason), row
    matrices = {id(p) for name, p in case.parameters.items() if p.ndim > 1 and not name.endswith("bias")}
    assert sorted(seen) == sorted(matrices)
    elsewhere = ("a lookup, not a matrix product", "a convolution")
    kept = [row for row in case.report.rows if row.action == "kept" and row.reason not in elsewhere]
    index = re.compile(r"(?<=\.)\d+(?=\.)")
    assert {index.sub("*", row.name): index.sub("*", row.reason) for row in kept} == KEPT[name]


def test_training_reaches_the_latent_weights(case: Case) -> None:
    model = copy.deepcopy(case.model).train()
    loss = model(**case.inputs).loss
    assert loss.isfinite()
    loss.backward()
    for name, layer in low_bit(model).items():
        for m in layer.latent_weights():
            grad = layer.get_parameter(m.parameter).grad
            assert grad is not None, name
            assert grad.isfinite().all(), name
            assert grad.any(), name


def test_a_fused_kernel_does_not_take_the_weight_of_a_low_bit_out_proj(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mamba-2's, which in training would multiply by the latent weight; a float out_proj may go through it."""
    taken: list[nn.Module] = []

    def kernel(*_: object, outproj_weight: Tensor, **__: object) -> None:  # None: it does not run here
        taken.append(outproj_weight)

    monkeypatch.setattr(modeling_falcon_h1, "mamba2_split_conv1d_scan_combined", kernel)

    def trains(model: nn.Module) -> int:
        taken.clear()
        model.train()(**TEXT, use_cache=False).loss.backward()
        assert all(module.training for module in model.modules())
        return len(taken)

    model = build(*ZOO["falcon_h1"][:2])
    assert trains(model) == 2
    bitnet.replace_linear(model)
    assert isinstance(model.model.layers[0].mamba.out_proj, bitnet.BitLinear)
    assert trains(model) == 0
    assert trains(pickle.loads(pickle.dumps(copy.deepcopy(model)))) == 0
    bitnet.pack(model)
    assert trains(model) == 0
    bitnet.unpack(model)
    assert trains(model) == 2
    model = build(*ZOO["falcon_h1"][:2])
    bitnet.replace_linear(model, skip=["out_proj"])
    assert trains(model) == 2


def test_every_mixer_with_such_a_kernel_is_known() -> None:
    sources = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    found = [path for path in sources if FUSED in path.read_text()]
    assert found
    for path in found:
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
        classes = [cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, nn.Module)]
        assert any(map(fuses_out_proj, classes)), path


@pytest.mark.parametrize("case", PLAIN, indirect=True)
def test_most_of_a_plain_transformer_becomes_low_bit(case: Case) -> None:
    in_blocks = [row for row in case.report.rows if re.search(r"\.\d+\.", row.name)]
    assert case.report.low_bit_weights > sum(row.weights for row in in_blocks) / 2


def test_packing_leaves_the_output(case: Case) -> None:
    model = copy.deepcopy(case.model)
    trained = logits(model, case.inputs)
    report = bitnet.pack(model)
    assert not any(isinstance(m, BitLayer) for m in model.modules())
    assert low_bit(model).keys() == low_bit(case.model).keys()
    assert report.packed_bytes == case.report.packed_bytes
    assert torch.equal(logits(model, case.inputs), trained)


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
def test_stock_transformers_converts_the_same_layers_or_refuses(case: Case, packed: bool) -> None:
    model = copy.deepcopy(case.model)
    if packed:
        bitnet.pack(model)
    config = config_of(model)
    assert config is not None
    assert (config.linear_class == EXTENDED) == (case.name in OURS_ONLY)
    if case.name in OURS_ONLY:
        with pytest.raises(ValueError, match="pip install bitnet-toolkit"):
            BitNetQuantConfig.from_dict(json.loads(json.dumps(config.to_dict())))
        return
    theirs = BitNetQuantConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    with torch.device("meta"):
        fresh = build(*ZOO[case.name][:2])
    patterns = BitNetHfQuantizer.get_modules_to_not_convert(
        fresh, theirs.modules_to_not_convert, fresh._keep_in_fp32_modules
    )
    linears = [name for name, module in fresh.named_modules() if isinstance(module, nn.Linear)]
    assert {name for name in linears if should_convert_module(name, patterns)} == low_bit(model).keys()
    BitNetHfQuantizer(theirs)._process_model_before_weight_loading(fresh)
    converted = {n for n, m in fresh.named_modules() if isinstance(m, stock.BitLinear | stock.AutoBitLinear)}
    assert converted == low_bit(model).keys()


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
def test_a_saved_model_comes_back_the_same(case: Case, packed: bool, tmp_path: Path) -> None:
    model = copy.deepcopy(case.model)
    if packed:
        bitnet.pack(model)
    bitnet.save(model, tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert {n: type(m) for n, m in low_bit(loaded).items()} == {n: type(m) for n, m in low_bit(model).items()}
    assert torch.equal(logits(loaded, case.inputs), logits(model, case.inputs))


@pytest.mark.parametrize("bits", [2, 1.6])
@pytest.mark.parametrize("name", SPECIAL)
def test_a_trained_packed_and_loaded_model_generates_the_same(name: str, bits: float, tmp_path: Path) -> None:
    case = swap(name)
    model = case.model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(**case.inputs).loss.backward()
    optimizer.step()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    expected = model.eval().generate(IDS[:1], **options)
    bitnet.pack(model)
    bitnet.save(model, tmp_path / "model", weight_bits=bits)
    with said(bits):
        loaded = bitnet.load(tmp_path / "model", weight_bits=bits)
        result = logits(loaded, case.inputs)
    assert torch.equal(result, logits(model, case.inputs))
    assert torch.equal(loaded.generate(IDS[:1], **options), expected)
    bitnet.save(loaded, tmp_path / "again", weight_bits=bits)
    first, again = (load_file(tmp_path / save / "model.safetensors") for save in ("model", "again"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_a_model_without_data_gives_the_same_report(case: Case) -> None:
    with torch.device("meta"):
        model = build(*ZOO[case.name][:2])
    assert bitnet.replace_linear(model).rows == case.report.rows


def test_unpacking_gives_back_the_model_with_rounded_weights(case: Case) -> None:
    model = copy.deepcopy(case.model)
    latent = {name: p.detach().clone() for name, p in parameters(model).items()}
    specs = {name: (layer.spec, layer.latent_weights()) for name, layer in low_bit(model).items()}
    bitnet.pack(model)
    bitnet.unpack(model)
    assert {name: type(module) for name, module in model.named_modules()} == case.types
    after = parameters(model)
    assert after.keys() == latent.keys()
    quantized = {f"{name}.{m.parameter}": m for name, (_, matrices) in specs.items() for m in matrices}
    for name, values in latent.items():
        assert after[name].is_contiguous()
        if name not in quantized:
            assert torch.equal(after[name], values), name
            continue
        m = quantized[name]
        for got, matrix in zip(m.views(after[name]), m.views(values), strict=True):
            codes, scale = reference.quantize_weight(matrix)
            assert torch.equal(got, codes * scale), name
    assert logits(model, case.inputs).isfinite().all()


# Where the head has to stay float, and why; everywhere else int8 works.
NO_INT8_HEAD = {
    "bert": "its bias is tied to another module's",
    "bert_classifier": "needs a Hugging Face model with an nn.Linear output head",
    "vit": "needs a Hugging Face model with an nn.Linear output head",
    "t5": "tied to Embedding, Embedding, Embedding",
    "mamba": "MambaForCausalLM uses lm_head.weight directly",
}


@pytest.mark.parametrize("name", ZOO)
def test_an_int8_head_is_refused_or_runs_and_comes_back(name: str, tmp_path: Path) -> None:
    case = swap(name)
    model = case.model.eval()
    if name in NO_INT8_HEAD:
        with pytest.raises(ValueError, match=NO_INT8_HEAD[name]):
            bitnet.pack(model, head="int8")
        return
    exact = copy.deepcopy(model)
    bitnet.pack(exact)
    bitnet.pack(model, head="int8")
    expected, y = logits(exact, case.inputs), logits(model, case.inputs)
    assert 0 < (y - expected).norm() / expected.norm() < 0.05
    bitnet.save(model, tmp_path)
    assert torch.equal(logits(bitnet.load(tmp_path), case.inputs), y)


@pytest.mark.parametrize("to", ["hub", "latent", "bf16"])
def test_conversion_on_disk_is_what_it_is_in_memory(case: Case, to: str, tmp_path: Path) -> None:
    """Names, tensors, config: as if the model had been loaded, swapped, packed and saved."""
    kind, config, _ = ZOO[case.name]
    model = build(kind, config)
    model.save_pretrained(tmp_path / "float")
    convert_checkpoint(tmp_path / "float", tmp_path / "converted", to, console=Console(quiet=True))
    bitnet.replace_linear(model)
    if to == "bf16":
        bitnet.pack(model)
        bitnet.unpack(model, torch.bfloat16)
        loaded = type(model).from_pretrained(tmp_path / "converted")
        for key, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key].bfloat16(), tensor.bfloat16()), key
        return
    if to == "hub":
        bitnet.pack(model)
    bitnet.save(model, tmp_path / "saved")
    ours, saved = (load_file(tmp_path / folder / "model.safetensors") for folder in ("converted", "saved"))
    assert ours.keys() == saved.keys()
    assert all(ours[key].dtype == saved[key].dtype and torch.equal(ours[key], saved[key]) for key in saved)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("converted", "saved")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss"])
def test_a_model_with_nothing_to_swap_stays_as_it_was(name: str) -> None:
    model = build(*ZOO[name][:2])
    before, types = parameters(model), {path: type(module) for path, module in model.named_modules()}
    report = bitnet.replace_linear(model, skip=".*")
    assert not low_bit(model)
    assert report.low_bit_weights == report.packed_bytes == 0
    assert all(type(module) is types[path] for path, module in model.named_modules())
    assert all(parameters(model)[path] is parameter for path, parameter in before.items())
    assert config_of(model) is None
    assert not hasattr(model.config, "quantization_config")
    with pytest.raises(ValueError, match="no BitLinear layers"):
        bitnet.pack(model)


# Families whose files are of other names or of other tensors than the model: transformers makes several of one on load.
# Some only newer versions have.
HRM = GROUPED | {"num_key_value_heads": 4, "H_cycles": 1, "L_cycles": 1}
SARVAM = GROUPED | MOE | {"num_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
RENAMED = {
    "sarvam_moe": ("SarvamMoeForCausalLM", SARVAM),  # q, k and v in one tensor, split where each ends
    "hrm_text": ("HrmTextForCausalLM", HRM),  # gate, q, k and v in one, and gate and up, in equal parts
    "lara_mini": ("LaraMiniForCausalLM", GROUPED | MOE),  # projections of linear attention
    "exaone": ("ExaoneConfig", GROUPED),  # runs as a Llama, whose names its files have not
}
HERE = [name for name, (kind, _) in RENAMED.items() if hasattr(transformers, kind)]


def renamed(name: str) -> transformers.PreTrainedModel:
    kind, config = RENAMED[name]
    torch.manual_seed(0)
    if kind.endswith("Config"):
        return transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**config)).eval()
    return build(kind, config).eval()


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
@pytest.mark.parametrize("name", HERE)
def test_a_model_of_other_names_in_its_files_comes_back_and_again(name: str, packed: bool, tmp_path: Path) -> None:
    model = renamed(name)
    bitnet.replace_linear(model)
    if packed:
        bitnet.pack(model)
    expected = logits(model, {"input_ids": IDS})
    for folder in ("first", "second", "third"):
        bitnet.save(model, tmp_path / folder)
        auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        model = bitnet.load(tmp_path / folder)
        for loaded in (auto, model):
            assert torch.equal(logits(loaded, {"input_ids": IDS}), expected)


@pytest.mark.parametrize("to", ["hub", "latent", "bf16"])
@pytest.mark.parametrize("name", HERE)
def test_a_float_model_of_other_names_in_its_files_is_converted(name: str, to: str, tmp_path: Path) -> None:
    model = renamed(name)
    model.save_pretrained(tmp_path / "float")
    convert_checkpoint(tmp_path / "float", tmp_path / "converted", to, console=Console(quiet=True))
    loaded = bitnet.load(tmp_path / "converted", dtype=torch.float32)
    swapped = bitnet.replace_linear(model)
    if to != "latent":
        bitnet.pack(model)
    if to == "bf16":
        bitnet.unpack(model)
        model, loaded = model.bfloat16(), loaded.bfloat16()
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert swapped.low_bit_weights
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", [name for name in HERE if name != "exaone"])
def test_a_stored_tensor_that_does_not_make_up_several_is_named(name: str, tmp_path: Path) -> None:
    model = renamed(name)
    bitnet.replace_linear(model)
    bitnet.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(key for key in tensors if re.search(r"0\..*(query_key_value|gqkv_proj|in_proj)\.weight", key))
    tensors[key] = tensors[key][:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model.safetensors: .* is F32 .*, but has to be F32.*_proj"):
        bitnet.load(tmp_path)


class Sensitive(transformers.LlamaForCausalLM):
    """A model that is to keep some layers in float32, which transformers therefore does not quantize."""

    _keep_in_fp32_modules: ClassVar = ["self_attn.k_proj", "mlp.up_proj"]


@pytest.mark.parametrize("included", [False, True])
def test_layers_that_stay_float32_are_kept_unless_included(included: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Sensitive(transformers.LlamaConfig(**GROUPED))
    report = bitnet.replace_linear(model, include=".*_proj" if included else None)
    kept = {row.name.rpartition(".")[2] for row in report.rows if row.reason == "float32 whatever the model's dtype"}
    assert kept == (set() if included else {"k_proj", "up_proj"})
    bitnet.pack(model)
    assert (config_of(model).linear_class == EXTENDED) == included  # type: ignore[union-attr]
    bitnet.save(model, tmp_path)
    loaded = Sensitive.from_pretrained(tmp_path)
    assert {n: type(m) for n, m in low_bit(loaded).items()} == {n: type(m) for n, m in low_bit(model).items()}
    assert torch.equal(logits(loaded, TEXT), logits(model, TEXT))


class StrangeConfig(transformers.MixtralConfig):
    model_type = "strange"


class Strange(transformers.MixtralForCausalLM):
    """A class of the user's, registered with transformers, that does what single families of transformers do."""

    config_class = StrangeConfig
    _tied_weights_keys: ClassVar = {"model.layers.1.self_attn.o_proj.weight": "model.layers.0.self_attn.o_proj.weight"}
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"^model\.layers\.1"]  # of what a part of the model lacks

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if hasattr(module, "experts"):  # a block that initializes its experts
            transformers.initialization.zeros_(module.experts.down_proj)


transformers.AutoConfig.register("strange", StrangeConfig)
transformers.AutoModelForCausalLM.register(StrangeConfig, Strange)
register_checkpoint_conversion_mapping(
    "Strange",
    [
        WeightConverter("mlp.experts.down_proj", "mlp.experts.down_proj", [Transpose(1, 2, check_dims=True)]),
        WeightRenaming(r"qkv\.query\.weight", "self_attn.q_proj.weight"),  # the weight only, not its scale
    ],
)


def strange() -> Strange:
    torch.manual_seed(0)
    return Strange(StrangeConfig(**GROUPED, num_local_experts=4, tie_word_embeddings=True)).eval()


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
def test_strange_models_come_back(packed: bool, tmp_path: Path) -> None:
    model = strange()
    reasons = {row.name: row.reason for row in bitnet.replace_linear(model).rows}
    assert reasons["model.layers.0.self_attn.o_proj"] == "tied to model.layers.1.self_attn.o_proj.weight"
    assert not any(name.endswith("o_proj") for name in low_bit(model))
    if packed:
        bitnet.pack(model)
    bitnet.save(model, tmp_path)
    assert "model.layers.0.qkv.query.weight" in load_file(tmp_path / "model.safetensors")
    loaded = Strange.from_pretrained(tmp_path)
    assert {n: type(m) for n, m in low_bit(loaded).items()} == {n: type(m) for n, m in low_bit(model).items()}
    assert torch.equal(logits(loaded, TEXT), logits(model, TEXT))


def test_a_strange_models_files_are_converted(tmp_path: Path) -> None:
    model = strange()
    model.save_pretrained(tmp_path / "float")
    file = tmp_path / "float" / "model.safetensors"
    tensors = load_file(file)
    for key in [key for key in tensors if key.endswith("experts.down_proj")]:  # as such checkpoints have it
        tensors[key] = tensors[key].mT.contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(logits(bitnet.load(tmp_path / "float"), TEXT), logits(model, TEXT))
    convert_checkpoint(tmp_path / "float", tmp_path / "converted", console=Console(quiet=True))
    bitnet.replace_linear(model)
    bitnet.pack(model)
    assert torch.equal(logits(bitnet.load(tmp_path / "converted"), TEXT), logits(model, TEXT))


@pytest.mark.parametrize("packed", [False, True], ids=["latent", "packed"])
def test_a_model_says_that_it_is_quantized_as_it_will_once_loaded(packed: bool, tmp_path: Path) -> None:
    """FalconMamba computes its time steps in another way then, which a float32 sum or an adapter shows."""
    model = build("FalconMambaForCausalLM", MAMBA)
    bitnet.replace_linear(model)
    if packed:
        bitnet.pack(model)
    bitnet.save(model, tmp_path)
    for found in (model, bitnet.load(tmp_path), copy.deepcopy(model)):
        assert found.config._is_quantized
        assert found.backbone.config._is_quantized
    if packed:
        bitnet.unpack(model)
        assert not hasattr(model.config, "_is_quantized")
