"""A model that runs block by block, out of a Source, with the rest of it on the meta device.

What the model does before, between and after its blocks is learned by running it with the blocks replaced; the
blocks then run alone, called as the model called them.

Three versions run side by side, the streams: with float weights; with plain rounding; and with calibrated
rounding. The last two quantize activations and multiply exactly as served.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitnet.kernels import quantizers
from bitnet.linear import BitLinear, become
from bitnet.train.blocks import low_bit_blocks

from ..rounding import Quantized, rotated, rounded
from ..source import Source

FLOAT, PLAIN, CALIBRATED = STREAMS = "float", "plain", "calibrated"


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


class ObservedLinear(BitLinear):
    """A low-bit layer that computes what the stream asks for."""

    context: "BlockModel"
    rounded: dict[str, Quantized]  # by stream

    def forward(self, input: Tensor) -> Tensor:
        if self.context.watch is not None:
            self.context.watch(self, input)
        return self.output(input, self.context.stream)

    def output(self, input: Tensor, stream: str) -> Tensor:
        """In float32, or exactly as it will be served."""
        input = rotated(input, self.spec, self.signs)
        if stream not in self.rounded:
            return F.linear(input, self.weight, self.bias)
        x = input.reshape(-1, self.in_features)
        y = quantizers.codes_linear(x, *self.rounded[stream], self.bias, self.spec.activation_bits, self.spec.wide)
        return y.view(*input.shape[:-1], self.out_features)


class _Passage(nn.Module):
    """What a block is turned into to learn how the model calls it, or to have its output replaced."""

    pass_on: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.pass_on(self, args, kwargs)


def _tables(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.children() if isinstance(child, nn.Embedding)]


class BlockModel:
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
        # what is run: of a model that writes all of it, else what is below its task's head
        self.body = self.model if self.model.can_generate() else self.model.base_model
        self.source, self.device = source, device
        self.rest: tuple[Any, ...] | None = None  # what a block returns after its hidden states
        self.calls: list[Any] = []  # of each block: itself, positional and other arguments but for hidden states
        self.stream = FLOAT
        self.watch: Callable[[ObservedLinear, Tensor], None] | None = None
        self.names: dict[nn.Module, str] = {}
        for name, module in source.model.named_modules():
            if isinstance(module, BitLinear):
                layer = become(BitLinear.from_linear(self.model.get_submodule(name), module.spec), ObservedLinear)
                layer.context, layer.rounded = self, {}
                layer.signs = source.signs(name, layer.in_features, layer.spec)
        for name, module in self.model.named_modules():
            self.names[module] = name
            for leaf, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:  # those made of weights are meta, and stored
                    module._buffers[leaf] = buffer.to(device)
        try:
            self.blocks = list(low_bit_blocks(self.model)[1])
        except ValueError as error:
            raise self.refusal(str(error)) from None
        # modules without values may be of every model in the process, as OpenAI GPT's activations are
        for module in self.names:
            if module._parameters or module._buffers or _tables(module) or module in self.blocks:
                module.register_forward_pre_hook(self._about_to_run)
        inside = {module for block in self.blocks for module in block.modules()}
        self.outside = {module for module in self.names if isinstance(module, ObservedLinear) and module not in inside}

    def _about_to_run(self, module: nn.Module, args: Any) -> None:
        if not isinstance(module, _Passage):
            # a block whole, and tables, since some modules use the weights of others without calling them
            for part in module.modules() if module in self.blocks else (module, *_tables(module)):
                self.load(part)

    def load(self, module: nn.Module) -> None:
        """Read the parameters and stored buffers that this module itself holds."""
        name = self.names[module]
        for leaf, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                value = self.read(f"{name}.{leaf}" if name else leaf, parameter.shape)
                if isinstance(module, ObservedLinear) and leaf == "weight":
                    value = rotated(value, module.spec, module.signs)
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        for leaf, buffer in module._buffers.items():
            if buffer is not None and (buffer.is_meta or self.source.parts(f"{name}.{leaf}")):
                module._buffers[leaf] = self.read(f"{name}.{leaf}", buffer.shape).to(buffer.dtype)
        if isinstance(module, ObservedLinear) and PLAIN not in module.rounded:
            module.rounded[PLAIN] = rounded(module.weight.detach(), module.spec)
            if module in self.outside:
                module.rounded[CALIBRATED] = module.rounded[PLAIN]

    def read(self, key: str, shape: torch.Size) -> Tensor:
        """A stored tensor in float32."""
        if not self.source.parts(key):
            key = self.model.all_tied_weights_keys.get(key, key)
        if not self.source.parts(key):
            raise ValueError(f"calibrate: {self.source.path} stores no tensor {key}; convert it without calibration")
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
            if isinstance(module, ObservedLinear):
                module.rounded.clear()

    def embed(self, ids: Tensor, stream: str) -> Tensor:
        """What enters the first block: [1, tokens, hidden], for ids [tokens]."""
        self.stream = stream
        hidden: Tensor = self._pass(ids, enter=True)
        return hidden.cpu()

    def output(self, ids: Tensor, hidden: Tensor, stream: str) -> Tensor:
        """What the model makes of the last block's output: logits, or the last hidden states of one without a head."""
        self.stream = stream
        output: Tensor = self._pass(ids, feed=hidden.to(self.device))[0]
        return output

    def block(self, index: int, hidden: Tensor, stream: str) -> Tensor:
        """A block's output for one text, called as the model calls it."""
        self.stream = stream
        _, args, kwargs = self.calls[index]
        hidden = hidden.to(self.device)
        if args is None:
            out = self.blocks[index](**kwargs, hidden_states=hidden)
        else:
            out = self.blocks[index](hidden, *args, **kwargs)
        self.rest = out[1:] if isinstance(out, tuple) else None
        return out if self.rest is None else out[0]

    def learn_calls(self, texts: Tensor) -> None:
        """See from two texts [2, tokens] with which arguments the model calls its blocks; they must be the same."""
        seen = []
        try:
            hidden = self.embed(texts[0], FLOAT)
            self.calls = self._calls
            self.block(0, hidden, FLOAT)  # for the form of what blocks return
            self.unload()
            for ids in texts:
                self._pass(ids)
                seen.append(self._calls)
        except (RuntimeError, NotImplementedError, AttributeError, IndexError) as error:
            # a weight is used without calling its module, or the model wants more of a block than a call
            raise self.refusal(str(error)) from error
        self.unload()
        self.calls = seen[0]
        if [block for block, *_ in self.calls] != self.blocks:
            raise self.refusal("they are not called one after the other")
        first, second = map(tree_leaves, seen)
        if any(leaf is other for leaf in first for other in tree_leaves(self.rest) if isinstance(leaf, Tensor)):
            raise self.refusal("they hand each other more than hidden states")
        if any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in zip(first, second, strict=True)):
            raise self.refusal("they are called with values that depend on the text")

    def refusal(self, reason: str) -> ValueError:
        return ValueError(
            f"calibrate: the blocks of {type(self.model).__name__} cannot be run one by one ({reason}); "
            "convert it without calibration"
        )

    def _pass(self, ids: Tensor, feed: Tensor | None = None, enter: bool = False) -> Any:
        """Run the model around its blocks, which pass their input on, or `feed`; with `enter` up to what the first
        block is given, which is returned."""
        self._calls: list[Any] = []
        classes = [type(block) for block in self.blocks]

        def pass_on(block: nn.Module, args: Any, kwargs: Any) -> Any:
            kwargs = dict(kwargs)
            if not args and "hidden_states" not in kwargs:
                raise self.refusal("they do not take hidden states first")
            hidden = args[0] if args else kwargs.pop("hidden_states")
            self._calls.append((block, args[1:] if args else None, kwargs))
            if enter:
                raise _Stop(hidden)
            hidden = hidden if feed is None else feed
            return hidden if self.rest is None else (hidden, *self.rest)

        for block in self.blocks:
            become(block, _Passage).pass_on = pass_on
        try:
            return self.body(input_ids=ids[None].to(self.device), use_cache=False)
        except _Stop as stop:
            return stop.args[0]
        finally:
            for block, cls in zip(self.blocks, classes, strict=True):
                del block.pass_on
                become(block, cls)

    def layers(self, index: int) -> list[ObservedLinear]:
        """The low-bit layers of a block."""
        return [module for module in self.blocks[index].modules() if isinstance(module, ObservedLinear)]

    def restore(self, index: int, results: dict[str, Quantized]) -> None:
        """Give the layers of a block what an earlier run found."""
        for layer in self.layers(index):
            self.load(layer)
            codes, scale = results.get(self.names[layer], layer.rounded[PLAIN])
            layer.rounded[CALIBRATED] = Quantized(codes.to(self.device), scale.to(self.device))

    def inputs(self, index: int, hidden: Tensor, stream: str, layer: ObservedLinear) -> Tensor:
        """The input [tokens, K] of one layer of a block for one text."""

        def watch(module: ObservedLinear, input: Tensor) -> None:
            if module is layer:
                raise _Stop(input)

        try:
            self.watch = watch
            self.block(index, hidden, stream)
        except _Stop as stop:
            return rotated(stop.args[0], layer.spec, layer.signs).reshape(-1, layer.in_features)
        finally:
            self.watch = None
        raise self.refusal(f"{self.names[layer]} does not run for every text")

    def groups(self, index: int, hidden: Tensor) -> tuple[list[list[ObservedLinear]], dict[ObservedLinear, str]]:
        """The layers of a block in the order in which they run, those that share an input together; and those that
        cannot be calibrated, with the reason."""
        calls: list[tuple[ObservedLinear, Tensor]] = []
        try:
            self.watch = lambda layer, input: calls.append((layer, input))
            self.block(index, hidden, FLOAT)
        finally:
            self.watch = None
        ran = [layer for layer, _ in calls]
        tokens = hidden.shape[-2]
        reasons: dict[ObservedLinear, str] = {}
        groups: list[list[ObservedLinear]] = []
        last = None
        for layer in self.layers(index):
            if layer.spec.wide:
                reasons[layer] = f"{layer.spec.weights} weights"
            elif self.names[layer] in self.source.ternary:
                reasons[layer] = "ternary already"
            elif ran.count(layer) != 1:
                reasons[layer] = f"ran {ran.count(layer)} times for the first text, not once"
        for layer, input in calls:
            if layer not in reasons and input.numel() != tokens * layer.in_features:
                reasons[layer] = "does not see every token"
            if layer in reasons:
                continue
            key = (input.data_ptr(), input.shape, input.stride(), layer.spec)
            if key != last:
                groups.append([])
            groups[-1].append(layer)
            last = key
        return groups, reasons
