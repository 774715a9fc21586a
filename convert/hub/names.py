"""The names that transformers gives stored tensors, and what it merges from several of them."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from .match import leftovers


def model_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """The names the model has for stored tensors, as from_pretrained finds them; what it drops is left out.

    Checkpoints of some families (ViT) keep older names, and some (gpt2, bloom) those of the base model, without its
    prefix; a task model's tensors have one that the base model lacks. Raises ValueError for two tensors of one name.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    state, modules = model.state_dict(), {name for name, _ in model.named_modules()}

    def fits(name: str) -> bool:  # a tensor of the model, or of what a module of it is once it is low-bit
        owner, _, leaf = name.rpartition(".")
        parts = leaf in ("weight_scale", "bias", "weight") and owner.rpartition(".")[2].startswith("packed_")
        return (
            name in state
            or (leaf == "weight_scale" and owner in modules)
            or (leaf == "weight" and owner.endswith(".rms_norm") and owner.removesuffix(".rms_norm") in modules)
            or (parts and owner.rpartition(".")[0] in modules)
        )

    names: dict[str, str] = {}
    prefix, dropped = f"{model.base_model_prefix}.", leftovers(model)
    for key in sorted(keys):
        name = key if fits(key) else rename_source_key(key, renamings, [])[0]
        if not fits(name) and prefix != ".":
            bare = name.removeprefix(prefix)
            name = bare if bare != name and fits(bare) else f"{prefix}{name}" if fits(f"{prefix}{name}") else name
        if dropped is None or fits(name) or not dropped.search(name) or rename_source_key(name, [], converters)[1]:
            names[key] = name
    if len({*names.values()}) < len(names):
        name, _ = Counter(names.values()).most_common(1)[0]
        twins = [key for key in names if names[key] == name]
        raise ValueError(f"the checkpoint holds {' and '.join(twins)}, which are one tensor of the model")
    return names


def forget_names(model: PreTrainedModel, names: Mapping[str, str]) -> None:
    """Save a model under its own names from now on, not under those of the files it was loaded from.

    names: the old ones, and those in the model, that from_pretrained was told
    """
    known = {f"^{re.escape(old)}$" for old in names}
    if kept := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [c for c in kept if not known.intersection(c._original_source_patterns)]


def stored_name(model: PreTrainedModel, key: str) -> str:
    """The name that save_pretrained gives a tensor of the model: model_names the other way."""
    renamings = [t for t in _when_saving(model)[::-1] if isinstance(t, WeightRenaming)]
    return rename_source_key(key, [transform.reverse_transform() for transform in renamings], [])[0]


def _when_saving(model: PreTrainedModel) -> list[Any]:
    """The conversions that save_pretrained reverts of a model that no from_pretrained gave others."""
    found = get_model_conversion_mapping(model, add_legacy=False)
    return [transform for transform in found if not isinstance(transform, PrefixChange)]


def keep_apart(model: PreTrainedModel, keys: Iterable[str]) -> None:
    """Save these tensors of a model, packed ones, one by one, also where a family's files hold several as one: packed
    bytes are not rows of floats, and each layer has scales of its own.
    """
    known = getattr(model, "_weight_conversions", None)
    known = _when_saving(model) if known is None else known
    joins = [(t, [t.reverse_transform()]) for t in known if isinstance(t, WeightConverter)]
    if touched := [t for t, back in joins if any(rename_source_key(key, [], back)[1] for key in keys)]:
        model._weight_conversions = [t for t in known if t not in touched]


def merged(model: nn.Module, headers: Iterable[str]) -> dict[str, list[str]]:
    """The tensors that transformers makes of stored ones on load, one of several (an expert each) or several of one
    (q, k and v), and those stored."""
    found: dict[str, list[str]] = {}
    if isinstance(model, PreTrainedModel):
        converters = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightConverter)]
        of = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        for key in sorted(headers, key=dot_natural_key):  # expert 10 after expert 9
            name, pattern = rename_source_key(key, [], converters)
            if pattern is not None:
                first, *others = of[pattern].target_patterns
                for target in (name, *(name.replace(first, other) for other in others)):
                    found.setdefault(target, []).append(key)
    return found


def merge(model: PreTrainedModel, target: str, parts: dict[str, Callable[[], Tensor]]) -> Tensor:
    """One of the tensors that `merged` finds, made of stored ones as transformers does; parts: how to read them."""
    converters = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightConverter)]
    for converter in converters:
        first = target
        for key, read in parts.items():
            name, pattern = rename_source_key(key, [], [converter])
            if pattern is not None:
                converter.add_tensor(name, key, pattern, read)
                first = name  # of all that are made of them
        if converter.collected_tensors:
            found = converter.convert(first, model=model, config=model.config)[target]
            return found[0] if isinstance(found, list) else found
    raise KeyError(target)
