"""Models and tokenizers that commands work on: new ones, checkpoints to train, and checkpoints to run."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..convert.checkpoint import add_adapter, dtype_to_run, load
from ..convert.folders import find_folder
from ..convert.hub.tokenizers import load_tokenizer
from ..experts import PackedExperts
from ..packed import PackedBitLinear
from ..progress import without_bars
from ..train.evaluate import evaluating
from ..train.options import nearest
from ..train.stdlib import build_tokenizer

TYPED = "architecture"  # in errors; a config.json has entries of all kinds, what is typed must be known


def new_model(architecture: str | Mapping[str, Any], tokenizer: Any, context: int, embedding_std: float | None) -> Any:
    """A language model of random weights, float32; the seed is torch's.

    architecture: a config.json, its folder, or a mapping of transformers' options with "model_type"; the vocabulary
                  and the ends of text are the tokenizer's unless it says otherwise
    Raises ValueError for what transformers does not know, with what is spelt like it.
    """
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    options, where = _read_architecture(architecture)
    kind = options.pop("model_type", None)
    if kind is None:
        raise ValueError(f"{where}: has no model_type; say which of transformers' models it is, 'model_type: llama'")
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{where}: transformers has no model_type {kind!r}; {nearest(str(kind), CONFIG_MAPPING)[:200]}"
        )
    known = CONFIG_MAPPING[kind]()
    for key in options:
        if where == TYPED and not hasattr(known, key):
            raise ValueError(f"{where}: {kind} has no option {key!r}; {nearest(key, vars(known))[:200]}")
    options.setdefault("vocab_size", len(tokenizer))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        options.setdefault(name, getattr(tokenizer, name))
    if options["vocab_size"] < len(tokenizer):
        raise ValueError(f"{where}: vocab_size {options['vocab_size']} is less than the tokenizer's {len(tokenizer)}")
    positions = known.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if hasattr(known, positions) and "max_position_embeddings" not in options:
        options.setdefault(positions, max(context, getattr(known, positions)))
    try:
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**options), dtype=torch.float32)
    except Exception as error:  # transformers' checks of what does not fit together are of every kind
        raise ValueError(f"{where}: transformers cannot build it: {' '.join(str(error).split()):.300}") from error
    if embedding_std is not None:
        nn.init.normal_(model.get_input_embeddings().weight, std=embedding_std)
    return model


def _read_architecture(architecture: str | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    if isinstance(architecture, str) and architecture.lstrip().startswith("{"):
        import yaml

        try:
            architecture = yaml.safe_load(architecture)
        except yaml.YAMLError as error:
            raise ValueError(f"--architecture: not YAML ({' '.join(str(error).split())})") from None
    if isinstance(architecture, Mapping):
        return dict(architecture), TYPED
    assert isinstance(architecture, str)
    file = Path(architecture)
    file = file / "config.json" if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; --architecture takes a config.json, its folder, or a mapping")
    try:
        options = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(options, dict):
        raise ValueError(f"{file}: not a config.json")
    for key in ("quantization_config", "architectures", "transformers_version", "dtype", "torch_dtype", "vocab_size"):
        options.pop(key, None)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        options.pop(key, None)
    return options, str(file)


def tokenizer_of(directory: str | Path | None, remedy: str = "") -> Any:
    """The tokenizer in a folder; None stands for bytes."""
    return build_tokenizer() if directory is None else load_tokenizer(find_folder(directory), remedy)


def trainable(name: str | Path) -> Any:
    """A checkpoint as a model to train, in float32: a float one, or one in training; `name` as of bitnet.load."""
    path = find_folder(name)
    with without_bars():
        model = load(path, dtype=torch.float32)
    if any(isinstance(module, PackedBitLinear | PackedExperts) for module in model.modules()):
        raise ValueError(
            f"{name}: its layers are packed, which cannot be trained; start from the checkpoint it was packed from, or "
            f"from what it encodes: bitnet convert {name} FOLDER --to bf16"
        )
    return model


def runnable(
    name: str | Path, *, device: str | torch.device, adapter: str | Path | None = None, **options: Any
) -> tuple[Any, Any]:
    """A checkpoint, packed or float, as a model to run, and its tokenizer; `name` and `options` as of bitnet.load.

    adapter: a folder with a LoRA adapter for it, as PEFT saves them
    """
    folder = find_folder(name)
    with without_bars():
        model = load(folder, device=device, dtype=dtype_to_run(folder, device), **options)
        if adapter is not None:
            add_adapter(model, adapter)
        return model, load_tokenizer(folder)


def check_causal(model: Any) -> None:
    """Raise ValueError for a model that sees the tokens it is to predict: an encoder, or one with an encoder."""
    kind = type(model).__name__
    ids = torch.arange(8)[None] % model.config.get_text_config().vocab_size
    other = ids.clone()
    other[0, 4:] = 0
    causal = not model.config.is_encoder_decoder
    if causal:
        with evaluating(model):
            found = [getattr(model(input_ids=x), "logits", None) for x in (ids, other)]
        one, two = found
        if one is None or two is None or one.ndim != 3:
            raise ValueError(f"{kind} does not predict tokens; bitnet train is for language models")
        causal = torch.allclose(one[0, :4], two[0, :4], rtol=1e-3, atol=1e-5)
    if not causal:
        raise ValueError(f"{kind} sees the tokens that it would have to predict; bitnet train is for causal models")
