"""Ternary rounding of a trained checkpoint, calibrated on text: block by block, with the model never whole in memory.

Each decoder block is loaded alone, its low-bit layers are rounded so that their outputs on the text change least
(gptq.py has the arithmetic), and its outputs become the inputs of the next block. Within a block, layers are rounded in
the order in which they run, those that share an input together, so that each makes up for the errors before it.

The text runs through versions of the model side by side ("streams"): with float weights, with plain absmean rounding,
and with calibrated rounding. The last two quantize activations and multiply exactly as served.
"""

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bitnet.kernels import int8, layout, ops, reference
from bitnet.linear import BitLinear, become
from bitnet.packed import PackedBitLinear

from .gptq import ternarize
from .source import Quantized, Source

FLOAT, PLAIN, CALIBRATED = "float", "plain", "calibrated"
SETTINGS = "calibration.json"


@dataclass
class LayerReport:
    """Signal-to-noise ratio of a layer's outputs on the calibration text, against the float model's, in dB.

    plain, calibrated: with this layer rounded that way, behind calibrated earlier layers
    reason:            why it got plain rounding only (the ratios are then equal); empty for the others
    """

    name: str
    plain: float
    calibrated: float
    reason: str = ""


@dataclass
class Calibration:
    """What a calibration achieved; print it for a table.

    bits_per_byte, perplexity (per token): of held-out text, by stream: "float", "plain", "calibrated"
    tokens:                                how many were scored for them
    """

    layers: list[LayerReport]
    bits_per_byte: dict[str, float]
    perplexity: dict[str, float]
    tokens: int


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


class _Layer(BitLinear):
    """A low-bit layer that computes what the stream asks for."""

    context: "_Model"
    rounded: dict[str, Quantized]  # by stream

    def forward(self, input: Tensor) -> Tensor:
        if self.context.watch is not None:
            self.context.watch(self, input)
        return self.output(input, self.context.stream)

    def output(self, input: Tensor, stream: str) -> Tensor:
        """In float32, or exactly as it will be served."""
        if stream not in self.rounded:
            return F.linear(input, self.weight, self.bias)
        x = input.reshape(-1, self.in_features)
        y = int8.linear(x, *self.rounded[stream], self.bias, self.spec.activation_bits)
        return y.view(*input.shape[:-1], self.out_features)


class _Passage(nn.Module):
    """What a decoder block is turned into to learn how the model calls it, or to have its output replaced."""

    pass_on: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.pass_on(self, args, kwargs)


class _Model:
    """A model in float32 whose tensors are read when a module that holds them is called, and dropped by `unload`.

    stream: which version of the model runs
    watch:  called with each low-bit layer and its input before it runs
    """

    def __init__(self, source: Source, device: torch.device) -> None:
        config = copy.deepcopy(source.model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with init_empty_weights(include_buffers=False):  # tables such as rotary frequencies get their values
            self.model = type(source.model)._from_config(config, dtype=torch.float32).eval()
        self.source, self.device, self.rest = source, device, None
        self.stored = set(source.keys())
        self.stream = FLOAT
        self.watch: Callable[[_Layer, Tensor], None] | None = None
        self.names: dict[nn.Module, str] = {}
        for name, module in source.model.named_modules():
            if isinstance(module, BitLinear):
                layer = become(BitLinear.from_linear(self.model.get_submodule(name), module.spec), _Layer)
                layer.context, layer.rounded = self, {}
        for name, module in self.model.named_modules():
            self.names[module] = name
            module.register_forward_pre_hook(lambda module, _: self.load(module))
            for leaf, buffer in module._buffers.items():
                module._buffers[leaf] = None if buffer is None else buffer.to(device)
        self.blocks = self._blocks()
        inside = {module for block in self.blocks for module in block.modules()}
        self.outside = {module for module in self.names if isinstance(module, _Layer) and module not in inside}

    def _blocks(self) -> list[nn.Module]:
        """The decoder blocks: the one outermost nn.ModuleList that holds low-bit layers."""
        lists: dict[str, nn.ModuleList] = {}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and any(isinstance(m, _Layer) for m in module.modules()):
                if not any(name.startswith(f"{other}.") for other in lists):
                    lists[name] = module
        if len(lists) != 1:
            found = f"it has {len(lists)} such lists ({', '.join(lists)})" if lists else "it has none"
            raise ValueError(
                f"calibrate: {type(self.model).__name__} needs exactly one list of decoder blocks with low-bit layers; "
                f"{found}. Convert it without calibration"
            )
        return list(*lists.values())

    def load(self, module: nn.Module) -> None:
        """Read the parameters and stored buffers that this module itself holds."""
        name = self.names[module]
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = self.read(f"{name}.{leaf}" if name else leaf, parameter.shape)
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        for leaf, buffer in module._buffers.items():
            if buffer is not None and f"{name}.{leaf}" in self.stored:
                module._buffers[leaf] = self.read(f"{name}.{leaf}", buffer.shape).to(buffer.dtype)
        if isinstance(module, _Layer) and PLAIN not in module.rounded:
            codes, scale = ops.quantize_weight(module.weight, kind=module.spec.weights, per_row=module.spec.per_row)
            module.rounded[PLAIN] = Quantized(codes, scale)
            if module in self.outside:
                module.rounded[CALIBRATED] = module.rounded[PLAIN]

    def read(self, key: str, shape: torch.Size) -> Tensor:
        """A stored tensor in float32."""
        if key not in self.stored:
            key = self.model.all_tied_weights_keys.get(key, key)
        if key not in self.stored:
            raise ValueError(
                f"calibrate: {self.source.path} stores no tensor {key} (fused expert weights are not supported); "
                "convert it without calibration"
            )
        tensor = self.source.tensor(key)
        if tensor.shape != shape:
            raise ValueError(f"calibrate: {key} is {list(tensor.shape)}, but the model needs {list(shape)}")
        tensor = tensor.to(self.device, torch.float32)
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"calibrate: {key} holds NaN or Inf; the checkpoint is damaged or its training diverged")
        return tensor

    def unload(self) -> None:
        """Drop all tensors that were read."""
        for module in self.names:
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)
            if isinstance(module, _Layer):
                module.rounded.clear()

    def embed(self, ids: Tensor, stream: str) -> Tensor:
        """What enters the first block: [1, tokens, hidden], for ids [tokens]."""
        self.stream = stream
        return self._pass(ids, last=self.blocks[0])

    def logits(self, ids: Tensor, hidden: Tensor, stream: str) -> Tensor:
        """What the model makes of the last block's output: [1, tokens, vocabulary]."""
        self.stream = stream
        return self._pass(ids, feed=hidden.to(self.device)).logits

    def block(self, index: int, hidden: Tensor, stream: str) -> Tensor:
        """A block's output for one text, called as the model calls it."""
        self.stream = stream
        args, kwargs = self.calls[index]
        hidden = hidden.to(self.device)
        if args is None:
            out = self.blocks[index](**kwargs, hidden_states=hidden)
        else:
            out = self.blocks[index](hidden, *args, **kwargs)
        self.rest = out[1:] if isinstance(out, tuple) else None
        return out if self.rest is None else out[0]

    def learn_calls(self, texts: Tensor) -> None:
        """See with which arguments the model calls its blocks; they must not depend on the text."""
        seen = []
        hidden = self.embed(texts[0], FLOAT)
        self.calls = self._calls[:1]
        self.block(0, hidden, FLOAT)  # for the form of its output
        for ids in texts[:2]:
            self._pass(ids, last=self.blocks[-1])
            seen.append(self._calls)
        self.unload()
        self.calls = seen[0]
        texts_agree = all(
            type(a) is type(b) and (torch.equal(a, b) if isinstance(a, Tensor) else True)
            for a, b in zip(*map(tree_leaves, seen), strict=True)
        )
        if len(self.calls) != len(self.blocks) or not texts_agree:
            raise ValueError(
                f"calibrate: the blocks of {type(self.model).__name__} cannot be run one by one: they are not called "
                "once each, or with arguments that depend on the text. Convert it without calibration"
            )

    def _pass(self, ids: Tensor, last: nn.Module | None = None, feed: Tensor | None = None) -> Any:
        """Run the model around its blocks, which pass their input on, or `feed`; up to the block `last`'s input."""
        self._calls: list[Any] = []
        classes = [type(block) for block in self.blocks]

        def pass_on(block: nn.Module, args: Any, kwargs: Any) -> Any:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            self._calls.append((args[1:] if args else None, kwargs))
            if block is last:
                raise _Stop(hidden)
            hidden = hidden if feed is None else feed
            return hidden if self.rest is None else (hidden, *self.rest)

        for block in self.blocks:
            become(block, _Passage).pass_on = pass_on
        try:
            return self.model(input_ids=ids[None].to(self.device), use_cache=False)
        except _Stop as stop:
            return stop.args[0]
        finally:
            for block, cls in zip(self.blocks, classes, strict=True):
                del block.pass_on
                become(block, cls)

    def inputs(self, index: int, hidden: Tensor, stream: str, layer: _Layer) -> Tensor:
        """The input [tokens, K] of one layer of a block for one text."""

        def watch(module: _Layer, input: Tensor) -> None:
            if module is layer:
                raise _Stop(input)

        try:
            self.watch = watch
            self.block(index, hidden, stream)
        except _Stop as stop:
            return stop.args[0].reshape(-1, layer.in_features)
        finally:
            self.watch = None
        raise AssertionError(f"{self.names[layer]} ran for the first text only")

    def groups(self, index: int, hidden: Tensor) -> tuple[list[list[_Layer]], dict[_Layer, str]]:
        """The layers of a block in the order in which they run, those that share an input together; and those that
        cannot be calibrated, with the reason."""
        calls: list[tuple[_Layer, Tensor]] = []
        try:
            self.watch = lambda layer, input: calls.append((layer, input))
            self.block(index, hidden, FLOAT)
        finally:
            self.watch = None
        ran = [layer for layer, _ in calls]
        tokens = hidden.shape[-2]
        reasons, groups, last = {}, [], None
        for layer in self.blocks[index].modules():
            if isinstance(layer, _Layer):
                if layer.spec.weights != "ternary":
                    reasons[layer] = f"{layer.spec.weights} weights"
                elif ran.count(layer) != 1:
                    reasons[layer] = f"ran {ran.count(layer)} times for the first text, not once"
        for layer, input in calls:
            if layer not in reasons and input.numel() != tokens * layer.in_features:
                reasons[layer] = "does not see every token"
            if layer in reasons:
                continue
            key = (input.data_ptr(), input.shape, input.stride())
            if key != last:
                groups.append([])
            groups[-1].append(layer)
            last = key
        return groups, reasons


def calibrate(
    source: Source,
    text: str | Path,
    store: str | Path,
    *,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    device: str | torch.device = "cpu",
    resume: bool = False,
    progress: Progress | None = None,
    asym: bool = True,
    kw: dict = {},
) -> Calibration:
    device, store = torch.device(device), Path(store)
    texts, held_out, held_bytes = read_text(source, Path(text), samples, length, seed)
    model = _Model(source, device)
    _open_store(store, source, texts, held_out, resume, len(model.blocks))
    model.learn_calls(texts)
    streams = {("texts", s): torch.cat([model.embed(ids, s).cpu() for ids in texts]) for s in (FLOAT, CALIBRATED)}
    streams |= {("held", s): torch.cat([model.embed(ids, s).cpu() for ids in held_out]) for s in (FLOAT, PLAIN, CALIBRATED)}
    model.unload()
    reports = []
    for index in range(len(model.blocks)):
        groups, reasons = model.groups(index, streams["texts", FLOAT][0:1])
        for group in groups:
            h = c = None
            for i in range(len(texts)):
                xq = model.inputs(index, streams["texts", CALIBRATED][i:i+1], CALIBRATED, group[0])
                if group[0].spec.activation_bits:
                    q, s = reference.quantize_activation(xq, group[0].spec.activation_bits)
                    xq = q / s
                h = xq.T @ xq if h is None else h.addmm_(xq.T, xq)
                if asym:
                    x = model.inputs(index, streams["texts", FLOAT][i:i+1], FLOAT, group[0])
                    c = xq.T @ x if c is None else c.addmm_(xq.T, x)
            for layer in group:
                target = layer.weight
                if asym:
                    lam = kw.get("lam", 0.01) * h.diagonal().mean() * torch.eye(len(h))
                    target = torch.linalg.solve((h + lam).double(), ((c + lam) @ layer.weight.T).double()).T.float()
                    target = layer.weight + kw.get("mix", 1.0) * (target - layer.weight)
                k2 = {k: v for k, v in kw.items() if k not in ("lam", "mix")}
                layer.rounded[CALIBRATED] = Quantized(*ternarize(target, h, layer.spec.per_row, **k2))
        energy: dict = {}

        def compare(layer, input):
            if model.stream == FLOAT:
                outputs[layer] = layer.output(input, FLOAT)
            else:
                y = outputs[layer]
                e = energy.setdefault(layer, [0.0, 0.0, 0.0])
                e[0] += float(y.double().square().sum())
                e[1] += float((y - layer.output(input, PLAIN)).double().square().sum())
                e[2] += float((y - layer.output(input, CALIBRATED)).double().square().sum())

        for i in range(len(texts)):
            model.watch, outputs = compare, {}
            for s in (FLOAT, CALIBRATED):
                streams["texts", s][i:i+1] = model.block(index, streams["texts", s][i:i+1], s).cpu()
        model.watch = None
        for i in range(len(held_out)):
            for s in (FLOAT, PLAIN, CALIBRATED):
                streams["held", s][i:i+1] = model.block(index, streams["held", s][i:i+1], s).cpu()
        for layer, (a, b, d) in energy.items():
            reports.append(LayerReport(model.names[layer], 10 * math.log10(a / b), 10 * math.log10(a / d)))
        model.unload()
    out = {}
    for s in (FLOAT, PLAIN, CALIBRATED):
        nll = 0.
        for i, ids in enumerate(held_out):
            logits = model.logits(ids, streams["held", s][i:i+1], s)[0].float()
            nll += F.cross_entropy(logits[:-1], ids[1:].to(device), reduction="sum").item()
        out[s] = nll / held_bytes / math.log(2)
    model.unload()
    return Calibration(reports, out, {}, 0)


def read_text(source, text, samples, length, seed):
    tok = AutoTokenizer.from_pretrained(source.path)
    ids = torch.tensor(tok(text.read_text()[:4_000_000], add_special_tokens=False).input_ids)
    n = len(ids) // length
    ids = ids[: n * length].view(n, length)
    held = samples // 4
    g = torch.Generator().manual_seed(seed)
    pick = torch.randperm(n, generator=g)[: samples + held]
    return ids[pick[:samples]], ids[pick[samples:]], held * (length - 1)


def _open_store(*a): pass
