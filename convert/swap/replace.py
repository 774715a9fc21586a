"""Surgery on modules in memory, float -> in training, in place, and a report of it. kinds.py lists which modules.

What is left alone, and why, is decided here in one order: safety first (weights that something else uses too,
which nothing overrides), then the user's `skip`, then `include`, then what safety.py cannot know and the defaults for
heads, routers and adapters.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from bitnet.linear import BitLayer
from bitnet.quantize import QuantSpec

from ..hub import quantizer
from .kinds import misfit, rotate, settle_fast_paths, swappable, to_training
from .report import Report, report_on
from .safety import judge

Pattern = str | re.Pattern[str] | Callable[[str, nn.Module], bool]
Patterns = Pattern | Iterable[Pattern]


def replace_linear(
    model: nn.Module,
    *,
    skip: Patterns | None = None,
    include: Patterns | None = None,
    signs_seed: int = 0,
    **options: Any,
) -> Report:
    """Turn the linear layers of any model into BitLinear, in place, keeping the trained weights.

    So are GPT-2's Conv1D (BitConv1D) and the fused experts of a mixture, which a pattern names by their module,
    "mlp.experts" (BitExperts).

    model:   all of it, not an inner part such as model.model: a Hugging Face model's config, which the whole model
             shares, is written for the names inside what is passed
    skip:    what to leave alone besides the defaults (output embeddings, task heads, routers, adapters, what
             transformers keeps in float32, layers of up to three features in)
    include: swap only what matches; being named here overrides those defaults
    options: those of bitnet.QuantSpec: weights, per_row, group_size, activation_bits, rms_norm, hadamard, ...; with
             hadamard, weights are rotated (in place) so that the float model stays what it is, but for their rounding
    signs_seed: with hadamard_signs, which signs: they are drawn from it and the number of features, so that layers that
             share an input share them

    A pattern is a regular expression that must match the whole module name or its last dotted parts ("fc1" hits
    "layers.0.fc1", not "xfc1"), or a predicate (name, module) -> bool; give one or several. One that matches no
    layer raises ValueError, since a misspelt name would otherwise quantize what was to be kept.

    Layers whose weight is used by other code too (tied to an embedding or by transformers to another layer, read by a
    forward that does not call them, patched by tensor parallelism) are never swapped; nor are those that code which
    cannot be followed may use, unless they are included. Everything kept is listed in the report with the reason.
    Layers that were swapped already keep their options.
    """
    if isinstance(model, type) or not isinstance(model, nn.Module):
        raise TypeError(f"replace_linear: model must be a torch.nn.Module, got {model!r:.80}")
    spec = QuantSpec(**options)
    if signs_seed and not spec.hadamard_signs:
        raise ValueError(f"signs_seed={signs_seed} is an option of hadamard_signs=True, which is missing")
    skips, includes = _compile(skip), _compile(include)
    layers: dict[nn.Module, list[str]] = {}  # and all names of each
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, BitLayer) or swappable(module):
            layers.setdefault(module, []).append(name)
    for which, patterns in (("skip", skips), ("include", includes)):
        for pattern, matches in patterns:
            if not any(matches(name, module) for module, names in layers.items() for name in names):
                raise ValueError(
                    f"replace_linear: {which}={pattern!r} matches none of the {len(layers)} linear layers; "
                    f"names look like {', '.join(repr(names[0]) for names in list(layers.values())[:3])}"
                )
    verdicts = judge(model, {module: names for module, names in layers.items() if not isinstance(module, BitLayer)})
    reasons: dict[nn.Module, str] = {}
    for module, (reason, possible, default) in verdicts.items():
        names = layers[module]
        reason = reason or misfit(module, spec)
        if not reason and any(matches(name, module) for _, matches in skips for name in names):
            reason = "skipped by request"
        if not reason and include is not None:
            reason = "" if any(matches(name, module) for _, matches in includes for name in names) else "not included"
        elif not reason:
            reason = default or (f"{possible}; include= swaps it all the same" if possible else "")
        if reason:
            reasons[module] = reason
    _keep_together(verdicts, layers, reasons)
    for module in verdicts:
        if module not in reasons:
            rotate(to_training(module, spec), signs_seed)
    settle_fast_paths(model)
    quantizer.attach(model)
    return report_on(model, {layers[module][0]: reason for module, reason in reasons.items()})


def _keep_together(
    modules: Iterable[nn.Module], names: dict[nn.Module, list[str]], reasons: dict[nn.Module, str]
) -> None:
    """Add to the reasons: what has a parameter in common with a layer that stays float stays float, too."""
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in modules:
        for leaf, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((module, leaf))
    for sharing in owners.values():
        kept = next((module for module, _ in sharing if module in reasons), None)
        if kept is not None:
            for module, leaf in sharing:
                reasons.setdefault(module, f"shares its {leaf} with {names[kept][0]}, which stays float")


def _compile(patterns: Patterns | None) -> list[tuple[Any, Callable[[str, nn.Module], bool]]]:
    if patterns is None:
        return []
    if isinstance(patterns, str | re.Pattern) or callable(patterns):
        patterns = [patterns]
    compiled: list[tuple[Any, Callable[[str, nn.Module], bool]]] = []
    for pattern in patterns:
        if isinstance(pattern, str | re.Pattern):
            text = pattern if isinstance(pattern, str) else pattern.pattern
            regex = re.compile(rf"(?:.*\.)?(?:{text})", 0 if isinstance(pattern, str) else pattern.flags)
            compiled.append((text, lambda name, module, regex=regex: regex.fullmatch(name) is not None))  # type: ignore[misc]
        elif callable(pattern):
            compiled.append((pattern, pattern))
        else:
            raise TypeError(f"a pattern must be a regular expression or a predicate, got {pattern!r}")
    return compiled
