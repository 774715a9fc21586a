"""The fused experts of a mixture (Mixtral, Qwen3-MoE, DeepSeek-V3, gpt_oss, ...), in training and packed.

transformers keeps the experts of a block in two stacks of matrices, `gate_up_proj` [E, 2I, H] (`up_proj` [E, I, H]
where nothing is gated) and `down_proj` [E, H, I]; gpt_oss has every matrix transposed and biases. Classes that
follow its experts interface (transformers/integrations/moe.py) say all of this in attributes and leave the gate to a
method, so one forward serves them all, in place of transformers' eager, batched_mm and grouped_mm ones.
Every matrix of a stack is a layer by itself: it has its own scale, activations are quantized per token before each of
the two products, and in the packed form it has its own place in the backend.
"""

from collections.abc import Callable
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .deprecated import renamed
from .kept import Packed
from .kernels import backends, observed, reference
from .linear import BitLayer, LatentWeight, become, cast_for_autocast, describe
from .packed import PackedBitLinear, check_backend, packed_zeros
from .quantize import QuantSpec, bit_linear

MOST_PAIRS = 64  # of a token and an expert: beyond, experts have several tokens, for which their weights are read once
Product = Callable[[int, Tensor], Tensor]  # (expert, x [M, K]) -> [M, N]


def stacks_of(module: nn.Module) -> list[str]:
    """The names of the two stacks of a module that follows transformers' experts interface; [] for other modules."""
    if not hasattr(type(module), "_apply_gate") or not hasattr(module, "is_transposed"):
        return []
    names = ["gate_up_proj" if getattr(module, "has_gate", False) else "up_proj", "down_proj"]
    found = [module._parameters.get(name) for name in names]
    return names if all(stack is not None and stack.ndim == 3 for stack in found) else []


class _Experts(nn.Module):
    """What experts in training and packed ones share: the route of tokens through them, and what of the model it uses.

    origin: the class they had, whose gate they use
    stacks: the two stacks of matrices
    """

    spec: QuantSpec
    origin: Any
    stacks: list[LatentWeight]
    # attributes that the model has given them
    has_gate: bool
    act_fn: Any
    post_expert_norm: Any

    def _products(self) -> tuple[Product, Product]:
        raise NotImplementedError

    @torch.compiler.disable  # how many tokens an expert gets is data: one graph break instead of endless recompilation
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum over each token's experts of their outputs times their weights.

        hidden_states: [M, H]; top_k_index: int64 [M, k], the experts; top_k_weights: [M, k]
        returns:       [M, H], in hidden_states' dtype

        The same order of operations as transformers' grouped_mm: expert by expert, then a sum over k.
        """
        up, down = self._products()
        experts = top_k_index.reshape(-1)
        order = experts.argsort(stable=True)  # pairs of a token and an expert, by expert
        counts = experts.bincount(minlength=self.stacks[0].experts or 0).tolist()
        inputs = hidden_states[order // top_k_index.shape[-1]].split(counts)
        outputs = [down(e, self._gate(up(e, x))) for e, x in enumerate(inputs) if len(x)]
        if not outputs:  # no token, so nothing is missing from the sum
            return hidden_states.clone()
        y = torch.cat(outputs)[order.argsort()]
        return self._sum(y, top_k_weights.reshape(-1, 1), top_k_index.shape, hidden_states.dtype)

    def _sum(self, y: Tensor, weights: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """From y [M k, H] of each token's experts, in turn, and their weights [M k, 1], to [M, H]."""
        if getattr(self, "has_post_expert_norm", False):
            y = self.post_expert_norm(y)
        return (y * weights).view(*shape, -1).sum(dim=1).to(dtype)

    def _gate(self, x: Tensor) -> Tensor:
        """The model's own code: its activation and how gate and up go together."""
        return self.origin._apply_gate(self, x) if self.has_gate else self.act_fn(x)

    def extra_repr(self) -> str:
        shapes = [f"{m.parameter}={m.experts}x{m.out_features}x{m.in_features}" for m in self.stacks]
        return f"{', '.join(shapes)}, {describe(self.spec)}"


class BitExperts(_Experts, BitLayer):
    """Experts in training: their Parameters are the latent weights and keep their names, layout and identity."""

    @staticmethod
    def from_experts(experts: nn.Module, spec: QuantSpec | None = None) -> "BitExperts":
        """Turn a module for which stacks_of finds stacks into BitExperts *in place* and return it."""
        spec, names, origin = spec or QuantSpec(), stacks_of(experts), type(experts)
        if spec.rms_norm or spec.hadamard is not None:
            what = "an RMSNorm" if spec.rms_norm else "a Hadamard transform"
            raise ValueError(f"fused experts cannot have {what} inside")
        stacks = []
        for name in names:
            count, n, k = experts.get_parameter(name).shape
            if experts.is_transposed:
                n, k = k, n
            stacks.append(LatentWeight(name, n, k, bool(experts.is_transposed), count, f"packed_{name}"))
        layer = become(experts, BitExperts)
        layer.spec, layer.strength, layer.origin, layer.stacks = spec, 1.0, origin, stacks
        return layer

    def latent_weights(self) -> list[LatentWeight]:
        return self.stacks

    def _products(self) -> tuple[Product, Product]:
        up, down = map(self._product, self.stacks)
        return up, down

    def _product(self, stack: LatentWeight) -> Product:
        weights = stack.views(getattr(self, stack.parameter))
        bias = getattr(self, f"{stack.parameter}_bias", None)
        biases = [None] * len(weights) if bias is None else bias.unbind()
        strength = self.strength if self.training else 1.0
        return lambda e, x: bit_linear(cast_for_autocast(x), weights[e], biases[e], self.spec, strength)


NEVER = None, -1, -1


def _state(tensor: Tensor | None) -> tuple[Tensor | None, int, int]:
    """What changes when a tensor is replaced, or written to in place (which inference tensors do not count)."""
    return (
        (None, 0, 0) if tensor is None else (tensor, 0 if tensor.is_inference() else tensor._version, tensor.data_ptr())
    )


class PackedStack(Packed):
    """E packed matrices of one shape, [N, K] each, and their biases: one stack of packed experts.

    weight:       uint8 [E, ceil(N/4), K], each in the Hub layout (kernels/layout.py); int8 [E, N, K] for weights="int8"
    weight_scale: float32 [E], or [E, N] with per_row, or float16 [E, N, G] with group_size; multiplies. Keeps
                  its dtype under .to(dtype)
    bias:         [E, N] or None

    Called with the number of an expert and its tokens [M, K], it returns [M, N].
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        spec: QuantSpec,
        backend: str = "auto",
        weight_bits: float = 2,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.spec = weight.shape[-1], out_features, spec
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("bias", bias)
        self._drop_derived()
        self.set_backend(backend, weight_bits)

    def forward(self, expert: int, input: Tensor) -> Tensor:
        return self.layers()[expert](input)

    def _drop_derived(self) -> None:
        self._layers: list[PackedBitLinear] = []
        self._chooses: backends.Chosen | Literal[False] | None = None  # False where there is no such kernel
        self._made_of: list[tuple[Tensor | None, int, int]] = []  # the buffers, their versions and where they are

    @renamed(bits="weight_bits")
    def set_backend(
        self, backend: str = "auto", weight_bits: float = 2, activation_bits: int | str | None = "auto"
    ) -> None:
        """See PackedBitLinear.set_backend."""
        check_backend(backend, weight_bits)
        self.backend, self.weight_bits, self._activation_bits = backend, weight_bits, activation_bits
        self._chooses = None
        for layer in self._layers:
            layer.set_backend(backend, weight_bits, activation_bits)

    def layers(self) -> list[PackedBitLinear]:
        """One layer for each matrix, over the same memory; each prepacks at its first call.

        They are made anew once a buffer has been replaced or written to.
        """
        buffers = self._buffers
        weight, scale, bias = buffers["weight"], buffers["weight_scale"], buffers["bias"]
        present = [_state(weight), _state(scale), _state(bias)]
        if any(a[0] is not b[0] or a[1:] != b[1:] for a, b in zip_longest(present, self._made_of, fillvalue=NEVER)):
            assert weight is not None
            assert scale is not None
            scales = scale if scale.ndim > 2 else scale.view(len(weight), -1)
            biases = [None] * len(weight) if bias is None else bias.unbind()
            self._layers = [
                PackedBitLinear.from_packed(*tensors, self.out_features, self.spec, self.backend, self.weight_bits)
                for tensors in zip(weight, scales, biases, strict=True)
            ]
            for layer in self._layers:
                layer.set_backend(self.backend, self.weight_bits, self._activation_bits)
            self._made_of, self._chooses = present, None
        return self._layers

    def choosing(self) -> "backends.Chosen | None":
        """A function of x [M, K] and experts int64 [P], P / M for each token, which a kernel reads: [P, N]; None where
        there is no such kernel."""
        layers = self.layers()
        if self._chooses is None:
            prepacked = [layer.prepack() for layer in layers]
            bind = backends.BACKENDS[prepacked[0][1]].bind_stack
            if bind is not None:
                with torch.inference_mode(False):
                    weight = torch.stack([one for one, _ in prepacked])
                    scale = torch.stack([layer.weight_scale for layer in layers])
                bits = layers[0].activation_bits
                self._chooses = bind(weight, scale, self.bias, self.out_features, self.in_features, bits)
            if self._chooses is None:
                self._chooses = False
            else:
                for layer, one in zip(layers, weight, strict=True):
                    layer.hold(one)  # what was prepacked for it is not needed beside the stack
        return self._chooses or None

    def codes(self) -> Tensor:
        """The weights as integers, int8 [E, N, K]."""
        return torch.stack([layer.codes() for layer in self.layers()])

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_layers": [], "_made_of": [], "_chooses": None}


class PackedExperts(_Experts):
    """Inference-only experts over packed weights; the output equals that of the BitExperts they came from.

    Its children `packed_gate_up_proj` (`packed_up_proj`) and `packed_down_proj` are PackedStacks: the names differ from
    those of the float stacks, since transformers merges and splits what is stored under those.
    """

    @staticmethod
    def from_bit_experts(
        layer: BitExperts, packed: list[tuple[Tensor, Tensor]] | None = None, backend: str = "auto"
    ) -> "PackedExperts":
        """Turn BitExperts into their packed form *in place* and return it; the latent weights are dropped.

        packed: what pack_layer(layer) returned; without it the experts hold zeros, to be loaded
        """
        stacks = []
        for i, m in enumerate(layer.stacks):
            weight, scale = packed[i] if packed else _zero_stack(m, layer.spec, layer.get_parameter(m.parameter).device)
            latent_bias = layer._parameters.pop(f"{m.parameter}_bias", None)
            bias = None if latent_bias is None else latent_bias.detach()
            delattr(layer, m.parameter)
            stacks.append(PackedStack(weight, scale, bias, m.out_features, layer.spec, backend))
        del layer.strength
        module = become(layer, PackedExperts)
        for m, stack in zip(module.stacks, stacks, strict=True):
            module.add_module(m.packed, stack.train(module.training))
        return module

    @torch.compiler.disable
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See BitExperts. Of a few tokens on a GPU, kernels read which experts there are, so that nothing waits."""
        pairs = top_k_index.numel()
        if 0 < pairs <= MOST_PAIRS and not observed.needs_operator(hidden_states, top_k_weights, None):
            experts, (up, down) = top_k_index.reshape(-1), (self.stack(m).choosing() for m in self.stacks)
            if up is not None and down is not None:
                y = self._gate(up(cast_for_autocast(hidden_states), experts))
                y = down(cast_for_autocast(y), experts)
                return self._sum(y, top_k_weights.reshape(-1, 1), top_k_index.shape, hidden_states.dtype)
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def stack(self, m: LatentWeight) -> PackedStack:
        """The packed form of one of `stacks`."""
        return getattr(self, m.packed)

    def to_experts(self, dtype: torch.dtype) -> nn.Module:
        """Turn packed experts back into float ones, in place, whose weights are exactly codes * scale, in `dtype`."""
        origin, stacks = self.origin, [(m, self.stack(m)) for m in self.stacks]
        for m, _ in stacks:
            delattr(self, m.packed)
        del self.spec, self.origin, self.stacks
        module: nn.Module = become(self, origin)
        for m, stack in stacks:
            weight = torch.stack(
                [reference.dequantize_weight(layer.codes(), layer.weight_scale, dtype) for layer in stack.layers()]
            )
            module.register_parameter(m.parameter, nn.Parameter((weight.mT if m.transposed else weight).contiguous()))
            if stack.bias is not None:
                module.register_parameter(f"{m.parameter}_bias", nn.Parameter(stack.bias.to(dtype)))
        return module

    def _products(self) -> tuple[Product, Product]:
        up, down = (self.stack(m).layers() for m in self.stacks)
        return lambda e, x: up[e](x), lambda e, x: down[e](x)


def _zero_stack(m: LatentWeight, spec: QuantSpec, device: Any) -> tuple[Tensor, Tensor]:
    packed, scale = packed_zeros(m.in_features, m.out_features, spec, device)
    count = m.experts or 0
    scales = scale.expand(count, *scale.shape).contiguous()
    return packed.repeat(count, 1, 1), scales if spec.per_row or scale.ndim > 1 else scales.view(count)
