"""Checkpoints on disk: save, load, and the checks that keep a damaged file from becoming a wrong model."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import nn

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"


class TensorHeader(NamedTuple):
    """What a safetensors file says about a tensor without reading it."""

    dtype: str  # as safetensors spells it: "BF16", "U8"
    shape: tuple[int, ...]
    file: Path
    offset: int  # of its first byte in the file


def read_headers(files: Iterable[str | Path]) -> dict[str, TensorHeader]:
    """Names, dtypes and shapes in safetensors files. Raises ValueError for a file that is cut short or another kind."""
    headers: dict[str, TensorHeader] = {}
    for file in map(Path, files):
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise ValueError(f"{file}: not a complete safetensors file ({size:,} bytes); copy or download it again")
            try:
                header = json.loads(stream.read(length))
                header.pop("__metadata__", None)
                described = {
                    name: TensorHeader(
                        entry["dtype"], tuple(entry["shape"]), file, 8 + length + entry["data_offsets"][0]
                    )
                    for name, entry in header.items()
                }
                end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                raise ValueError(f"{file}: its safetensors header is damaged; copy or download it again") from None
        if size != 8 + length + end:
            raise ValueError(
                f"{file}: is {size:,} bytes, but its header describes {8 + length + end:,}; it was cut short, so "
                "copy or download it again"
            )
        headers |= described
    return headers


def weight_files(directory: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint directory. Raises FileNotFoundError naming what is missing."""
    directory = Path(directory)
    if not (directory / CONFIG).is_file():
        raise FileNotFoundError(f"{directory}: no {CONFIG} there; is it a checkpoint directory?")
    if (directory / INDEX).is_file():
        shards = sorted(set(read_json(directory / INDEX)["weight_map"].values()))
        missing = [shard for shard in shards if not (directory / shard).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{directory}: {len(missing)} of the {len(shards)} files that {INDEX} lists are missing: "
                f"{', '.join(missing[:5])}; copy or download them again"
            )
        return [directory / shard for shard in shards]
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    raise FileNotFoundError(f"{directory}: neither {WEIGHTS} nor {INDEX} is there")


def save(model: nn.Module, directory: str | Path, *, bits: float = 2, **kwargs: Any) -> Path:
    """Write a model's weights and config to `directory`, packed or in training; returns it.

    A Hugging Face model becomes a checkpoint that from_pretrained reads, stock transformers' included wherever
    its format can say what the layers are. Any other module becomes model.safetensors and config.json, for
    load(directory, model). Everything is written beside the target first and then moved into place, so a full
    disk or an interrupt leaves an earlier save as it was; other files in the directory stay.

    bits:   of a packed weight in the files: 2, or 1.6 for files a fifth smaller that load only with this package
    kwargs: passed to save_pretrained, for instance max_shard_size="2GB"
    """
    from transformers import PreTrainedModel

    from bitnet.experts import PackedStack
    from bitnet.packed import PackedBitLinear

    from . import hf

    if bits not in (2, 1.6):
        raise ValueError(f"save: bits must be 2 or 1.6, got {bits!r}")
    if bits == 1.6 and not any(isinstance(module, PackedBitLinear | PackedStack) for module in model.modules()):
        raise ValueError("save: bits=1.6 is a form of packed weights; call bitnet.pack(model) first")
    model = hf.unwrapped(model)
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"save: {directory} is a file")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-saving-") as scratch:
        new = Path(scratch) / "checkpoint"
        if isinstance(model, PreTrainedModel):
            hf.attach(model, bits)
            try:
                model.save_pretrained(new, **kwargs)
            finally:
                hf.attach(model)
        else:
            new.mkdir()
            config = hf.config_of(model, bits)
            if config is None:
                raise ValueError("save: the model has no BitLinear or PackedBitLinear layers; nothing here needs us")
            state = {
                key: tensor.detach().cpu().contiguous().clone() for key, tensor in hf.stored_state(model, bits).items()
            }
            save_file(state, new / WEIGHTS, metadata={"format": "pt"})
            text = json.dumps({"quantization_config": config.to_dict()}, indent=2) + "\n"
            (new / CONFIG).write_text(text)
        _move_into_place(new, directory)
    return directory


def load(
    directory: str | Path,
    model: nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    backend: str = "auto",
    bits: float = 2,
) -> Any:
    """Read what save wrote, or any Hugging Face `bitnet` checkpoint; returns the model in evaluation mode.

    directory: the checkpoint
    model:     for a module that is not from Hugging Face: a freshly built float one, which is filled in place
    device:    where the weights go
    dtype:     of the float weights; "auto" takes the stored one
    backend:   of the packed layers (see bitnet.backends)
    bits:      a packed weight takes in the backend's memory: 2, or 1.6 where the CPU can (see PackedBitLinear)

    Raises FileNotFoundError or ValueError naming the file or tensor that is missing, damaged or contradicts the
    config, where transformers itself would fill the gap with random values.
    """
    import transformers

    from bitnet.experts import PackedStack
    from bitnet.packed import PackedBitLinear

    from . import hf

    files = weight_files(directory)
    headers = read_headers([str(file) for file in files])
    config = read_json(Path(directory) / CONFIG)
    if model is None:
        if not config.get("architectures"):
            raise ValueError(
                f"load: {directory} is not a Hugging Face model; pass the module to fill: load(path, model)"
            )
        modern, names = hf.modernize(config, headers)
        cls = getattr(transformers, modern["architectures"][0], transformers.AutoModelForCausalLM)
        options: dict[str, Any] = {"dtype": dtype, "device_map": device, "output_loading_info": True}
        if modern is not config:
            options["config"] = transformers.CONFIG_MAPPING[modern["model_type"]].from_dict(modern)
            options["key_mapping"] = {f"^{re.escape(key)}$": name for key, name in names.items() if key != name}
        model, info = cls.from_pretrained(directory, **options)
        _complete(directory, info["missing_keys"])
    else:
        settings = hf.BitNetConfig.from_dict(config["quantization_config"])
        hf.swap_for_loading(model, settings, headers)
        state: dict[str, torch.Tensor] = {}
        for file in files:
            state |= load_file(file)
        _complete(directory, model.state_dict().keys() - state.keys())
        model.load_state_dict(state)
        model.to(device)
        if isinstance(dtype, torch.dtype):
            model.to(dtype)
        hf.finish_loading(model, settings)
    assert model is not None
    for module in model.modules():
        if isinstance(module, PackedBitLinear | PackedStack):
            module.set_backend(backend, bits)
    return model.eval()


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error}); copy or download it again") from None


def write_whole(file: Path, data: bytes) -> None:
    """All of it or nothing, whenever the process is killed."""
    scratch = file.with_suffix(".part")
    scratch.write_bytes(data)
    os.replace(scratch, file)


def _complete(directory: str | Path, missing: Iterable[str]) -> None:
    if names := sorted(missing):
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        raise ValueError(f"{directory}: the checkpoint has no tensor {names[0]}{more}, which the model needs")


def _move_into_place(new: Path, directory: Path) -> None:
    """Move a finished checkpoint to its name; files of an earlier one that it does not replace are removed last."""
    if not directory.exists():
        os.replace(new, directory)
        return
    names = {path.name for path in new.iterdir()}
    stale = [path for path in directory.glob("model*.safetensors*") if path.name not in names]
    for path in sorted(new.iterdir(), key=lambda path: path.suffix != ".safetensors"):  # weights before index, config
        os.replace(path, directory / path.name)
    for path in stale:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
