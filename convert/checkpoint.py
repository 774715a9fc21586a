"""Checkpoints on disk: save, load, and the checks that keep a damaged file from becoming a wrong model."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from bitnet.deprecated import renamed
from bitnet.experts import PackedStack
from bitnet.kernels.cpu import pages
from bitnet.packed import PackedBitLinear, keep_prepacked
from bitnet.quantize import is_sharded
from bitnet.train.fsdp import unwrapped

from .files.folder import CONFIG, WEIGHTS, variant, weight_files
from .files.folder import INDEX as INDEX
from .files.json_object import read_json
from .files.safetensors import read_headers
from .folders import find_folder
from .hub.config import config_of, module_config
from .hub.legacy import modernize
from .hub.loading import check_values, compare_all, finish_loading, prepacked_next, swap_for_loading
from .hub.match import computed
from .hub.models import model_config, refusals, skeleton
from .hub.names import forget_names
from .hub.quantizer import attach
from .hub.values import stored_state
from .swap.pack import pack_quickly
from .writing import replacing


@renamed(bits="weight_bits")
def save(model: nn.Module, directory: str | Path, *, weight_bits: float = 2, **kwargs: Any) -> Path:
    """Write a model's weights and config to `directory`, packed or in training; returns it.

    A Hugging Face model becomes a checkpoint that from_pretrained reads, stock transformers' included wherever
    its format can say what the layers are. Any other module becomes model.safetensors and config.json, for
    load(directory, model). Whatever happens, a full disk, an interrupt or a kill, the directory holds the earlier
    save, if there was one, or this one, whole; other files in it stay. Two saves to one directory take turns.

    weight_bits: of a packed weight in the files: 2; 1.6 for files a fifth smaller; 1 of binary layers (others keep 2).
                 What is not 2 loads only with this package
    kwargs:      passed to save_pretrained, for instance max_shard_size="2GB"
    """
    if weight_bits not in (2, 1.6, 1):
        raise ValueError(f"save: weight_bits must be 2, 1.6 or 1, got {weight_bits!r}")
    kinds = {module.spec.weights for module in model.modules() if isinstance(module, PackedBitLinear | PackedStack)}
    if weight_bits != 2 and not kinds:
        raise ValueError(f"save: weight_bits={weight_bits} is a form of packed weights; call bitnet.pack(model) first")
    if weight_bits == 1 and "binary" not in kinds:
        raise ValueError("save: weight_bits=1 is a form of binary weights, and this model has none; take 1.6 or 2")
    model = unwrapped(model)
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(f"save: {name} is sharded; save what bitnet.gather(model) gives the first process")
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"save: {directory} is a file")
    with replacing(directory) as new:
        if isinstance(model, PreTrainedModel):
            attach(model, weight_bits)
            try:
                model.save_pretrained(new, **kwargs)
            finally:
                attach(model)
        else:
            config = config_of(model, weight_bits)
            if config is None:
                raise ValueError("save: the model has no BitLinear or PackedBitLinear layers; nothing here needs us")
            state = {
                key: tensor.detach().cpu().contiguous().clone()
                for key, tensor in stored_state(model, weight_bits).items()
            }
            save_file(state, new / WEIGHTS, metadata={"format": "pt"})
            text = json.dumps({"quantization_config": config.to_dict()}, indent=2) + "\n"
            (new / CONFIG).write_text(text)
    return directory


@renamed(bits="weight_bits")
def load(
    directory: str | Path,
    model: nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    weight_bits: float = 2,
    activation_bits: int | str | None = "auto",
    head: str | None = None,
) -> Any:
    """Read what save wrote, or any Hugging Face `bitnet` checkpoint; returns the model in evaluation mode.

    directory: the checkpoint: a folder, a GGUF file, or a name on the Hub (org/name, org/name@revision)
    model:     for a module that is not from Hugging Face: a freshly built float one, which is filled in place
    device:    where the weights go
    dtype:     of the float weights; "auto" takes the stored one
    backend:   of the packed layers (see bitnet.backends)
    weight_bits: a packed weight takes in the backend's memory: 2, or 1.6 or 1 where it can (see PackedBitLinear)
    activation_bits: how layers run whose options say float activations: see PackedBitLinear.set_backend
    head:      the output head in fewer bits, and layers in training packed: pack(model, head=...). Its rows are taken
               from the files a few at a time, so that a float head is never in memory (on a CPU, in the stored dtype)

    Raises FileNotFoundError or ValueError naming the file or tensor that is missing, damaged or contradicts the
    config, where transformers itself would fill the gap with random values.
    """
    directory = find_folder(directory)
    files = weight_files(directory)
    headers = read_headers(files)
    file = Path(directory) / CONFIG
    config = read_json(file)
    if model is None:
        if "model_type" not in config:
            raise ValueError(
                f"load: {directory} is not a Hugging Face model; pass the module to fill: load(path, model)"
            )
        modern, names = modernize(config, headers)
        described = model_config(file, modern, len(headers))
        empty = skeleton(described, file, len(headers))  # what transformers cannot build or fill is found here
        renamed = {name: headers[key] for key, name in names.items()}
        compare_all(directory, empty, renamed, modern.get("quantization_config"))
        options: dict[str, Any] = {"dtype": dtype, "device_map": device, "variant": variant(Path(directory))}
        options["config"] = described  # the class's own may be of another type: EXAONE runs as a Llama
        if modern is not config:
            options["key_mapping"] = {f"^{re.escape(key)}$": name for key, name in names.items() if key != name}
        passing = ValueError, OSError, RuntimeError, ImportError, MemoryError
        with prepacked_next(), refusals(Path(directory), passing):
            model, info = type(empty).from_pretrained(directory, output_loading_info=True, **options)
        assert model is not None
        forget_names(model, names)
        _complete(directory, (key for key in info["missing_keys"] if not computed(model, key)))
    else:
        settings = module_config(file, config)
        swap_for_loading(model, settings, headers)
        compare_all(directory, model, headers)
        _complete(directory, model.state_dict().keys() - headers.keys())
        if unknown := sorted(headers.keys() - model.state_dict().keys()):
            raise ValueError(f"{directory}: has a tensor {unknown[0]}, which {type(model).__name__} does not")
        state: dict[str, torch.Tensor] = {}
        for path in files:
            state |= load_file(path)
        model.load_state_dict(state)
        model.to(device)
        if isinstance(dtype, torch.dtype):
            model.to(dtype)
        with prepacked_next():
            finish_loading(model, settings)
    made = None if head is None else pack_quickly(model, backend, head, weight_bits=weight_bits)
    modules = [(name, m) for name, m in model.named_modules() if isinstance(m, PackedBitLinear | PackedStack)]
    for _, module in modules:
        module.set_backend(backend, weight_bits, activation_bits)
    if made is not None and made.prepacked is not None:
        keep_prepacked(made.layer, made.tied, made.prepacked)
    for name, module in modules:
        if not module.weight_scale.is_meta and module._kept is None:  # offloaded; a head
            check_values(name, module, PackedBitLinear.prepack)
    pages.trim()
    return model.eval()


def add_adapter(model: Any, folder: str | Path) -> None:
    """Put a LoRA adapter that PEFT saved beside the layers of a Hugging Face model, to run.

    Raises ImportError without PEFT, FileNotFoundError for a folder without an adapter, and ValueError for one of
    another model, where transformers itself would leave out what does not fit.
    """
    if not (Path(folder) / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{folder}: no adapter there; it must have an adapter_config.json, as PEFT saves it")
    try:
        import peft  # noqa: F401  transformers uses it
    except ImportError:
        raise ImportError("--adapter needs PEFT: pip install 'bitnet-toolkit[lora]'") from None
    try:
        info = model.load_adapter(str(folder))
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: cannot go beside this model: {' '.join(str(error).split()):.300}") from None
    missing, unknown = sorted(info.missing_keys), sorted(info.unexpected_keys)
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which the model does not"
        raise ValueError(f"{folder}: an adapter of another model: it {what}")


def dtype_to_run(folder: Path, device: str | torch.device) -> str | torch.dtype:
    """What bitnet.load is to be told for a model that is to run: float32 for a float checkpoint on a CPU which has no
    products of bfloat16, where those of many tokens take several times as long; else "auto", the stored one."""
    slow = torch.device(device).type == "cpu" and not _multiplies_bfloat16()
    return torch.float32 if slow and "quantization_config" not in read_json(folder / CONFIG) else "auto"


def _multiplies_bfloat16() -> bool:
    """Has torch products of bfloat16 for this CPU (AVX512 or newer)?"""
    able: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return able


def _complete(directory: str | Path, missing: Iterable[str]) -> None:
    if names := sorted(missing):
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        raise ValueError(f"{directory}: the checkpoint has no tensor {names[0]}{more}, which the model needs")
