"""The model that a config.json describes: its class, and its skeleton on the meta device.

Configurations come from strangers and go to transformers, whose classes take most of them on trust: what they raise is
turned into one error that names the file, and what would build something without end is refused first.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from ..files.damaged import Damaged
from ..files.mlx import is_mlx
from .config import BitNetConfig

# Options that say how many modules (or entries of a table) there are, and how many a model may have at least: with more
# layers than that, each must have a tensor of its own.
_LAYERS = re.compile(r"(.*_)?(?<!per_)(layers?|blocks?|depths?|stages?)")
_OTHERS = re.compile(r"(.*_)?(experts|labels)")
FEW_LAYERS, MANY = 256, 1 << 16
FEW_PARAMETERS = 20_000


def model_config(file: Path, config: dict[str, Any], tensors: int) -> Any:
    """The transformers config that the contents of a config.json stand for.

    file: for errors; tensors: how many the checkpoint stores
    Raises ValueError for model types that transformers does not know, and Damaged for options it cannot take.
    """
    if is_mlx(config):
        raise ValueError(f"{file}: MLX quantized it; convert it first: `bitnet convert {file.parent} OUT --to hub`")
    kind = config.get("model_type")
    if kind is None:
        raise ValueError(
            f"{file}: has no model_type. Is it a checkpoint of a plain torch module, not from Hugging Face? Then "
            "bitnet.load(path, module) reads it; conversion and inspection need to know the model"
        )
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"{file}: model_type {kind!r} is none of transformers {transformers.__version__}'s models")
    _check_counts(file, config, max(FEW_LAYERS, tensors))
    if config.get("architectures") is not None and not _is_names(config["architectures"]):
        raise Damaged(file, f"architectures is {config['architectures']!r:.80}, not a list of names")
    settings = config.get("quantization_config")
    if settings is not None and not (isinstance(settings, dict) and isinstance(settings.get("quant_method"), str)):
        raise Damaged(file, f"quantization_config is {settings!r:.80}, not an object with a quant_method")
    if settings is not None and settings["quant_method"] == "bitnet":
        try:
            BitNetConfig.from_dict(settings)
        except ValueError as error:
            raise ValueError(f"{file.parent}: {error}") from None
    with refusals(file):
        return CONFIG_MAPPING[kind].from_dict(_floats(config))


def model_class(config: Any, file: Path) -> type[PreTrainedModel]:
    """transformers' class for a config: the first of its architectures, or if it names none, a language model."""
    if config.architectures:
        name = config.architectures[0]
        try:
            cls = getattr(transformers, name, None)
        except Exception as error:  # a class whose module needs something that is not installed
            raise ValueError(f"{file}: transformers cannot import the model class {name!r} ({error})") from error
        if cls is None:  # a class of the user's, which is registered with transformers
            cls = next((found for found in _classes(config) if found.__name__ == name), None)
        if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
            raise ValueError(f"{file}: transformers {transformers.__version__} has no model class {name!r}")
        return cls
    if first := next(_classes(config), None):
        return first
    raise ValueError(f"{file}: transformers {transformers.__version__} has no model class for {type(config).__name__}")


def _classes(config: Any) -> Iterator[type[PreTrainedModel]]:
    """Those that transformers, or who registered them, gives a config: language models first."""
    for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModel):
        if type(config) in auto._model_mapping:
            found = auto._model_mapping[type(config)]
            yield from found if isinstance(found, tuple) else (found,)


def skeleton(config: Any, file: Path, tensors: int) -> PreTrainedModel:
    """The model that a transformers config describes, on the meta device; arguments as for model_config."""
    cls = model_class(config, file)
    with refusals(file), _at_most(FEW_PARAMETERS + 20 * tensors), torch.device("meta"):
        return cls._from_config(config)


def _check_counts(file: Path, value: Any, layers: int, key: str = "") -> None:
    """Refuse counts of modules so large that building them would not end."""
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_counts(file, inner, layers, name)
    elif isinstance(value, list):
        for inner in value:
            _check_counts(file, inner, layers, key)
    elif isinstance(value, int | float):
        limit = layers if _LAYERS.fullmatch(key) else MANY if _OTHERS.fullmatch(key) else 1 << 62
        if not value <= limit and value != float("inf"):
            raise Damaged(file, f"{key} is {value:,}, which the tensors of this checkpoint do not bear out")


def _floats(value: Any) -> Any:
    """transformers writes infinity as {"__float__": "Infinity"}."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _floats(item) for key, item in value.items()}
    return [_floats(item) for item in value] if isinstance(value, list) else value


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


@contextmanager
def refusals(file: Path, passing: tuple[type[Exception], ...] = (Damaged,)) -> Iterator[None]:
    """Whatever transformers raises about a config or a checkpoint, but for `passing`, as one error that names it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, passing) and not isinstance(error, RecursionError | UnicodeDecodeError | JSONDecodeError):
            raise
        words = f"{type(error).__name__}: {' '.join(str(error).split()):.500}"
        raise Damaged(
            file,
            f"transformers {transformers.__version__} cannot build a model of it ({words})",
            "correct it, or download it again",
        ) from error


@contextmanager
def _at_most(count: int) -> Iterator[None]:
    """Stop the building of a model that has more parameters than could be stored."""
    left = count

    def register(module: Any, name: str, parameter: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(
                f"it has more than {count:,} parameters, which the tensors of this checkpoint do not bear out"
            )

    handle = register_module_parameter_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()
