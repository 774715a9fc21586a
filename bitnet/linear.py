"""BitLinear: nn.Linear that trains for 1 or 1.58 bits; and what all layers in training have in common."""

from types import MethodType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .kernels.rotation import hadamard
from .quantize import QuantSpec, bit_linear

M = TypeVar("M", bound=nn.Module)
SEEDS = 0x9E3779B1  # odd, so that every seed makes other signs of a number of features


def become(module: nn.Module, cls: type[M]) -> M:
    """Change a module's class in place; whoever holds the object, and its hooks, keep working."""
    if getattr(vars(module).get("forward"), "__func__", None) is type(module).forward:
        del module.forward  # accelerate leaves the old class's forward here when it removes a hook
    module.__class__ = cls
    if "_old_forward" in vars(module):  # accelerate's hooks call the original forward through this
        vars(module)["_old_forward"] = MethodType(cls.forward, module)
    return module  # type: ignore[return-value]


class LatentWeight(NamedTuple):
    """A parameter of a layer in training that is quantized: one matrix [N, K], or a stack of them, one per expert.

    Every matrix has a scale of its own (one, or one a row) and is packed by itself; see BitLayer.latent_weights.
    """

    parameter: str  # its name in the layer
    out_features: int  # N
    in_features: int  # K
    transposed: bool = False  # stored as [K, N], as GPT-2's Conv1D and gpt_oss do
    experts: int | None = None  # the length of a stack [E, N, K]; None for one matrix
    packed: str = ""  # the child of the packed layer that holds weight and weight_scale; "" for the layer itself

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter."""
        n, k = self.out_features, self.in_features
        return (*(() if self.experts is None else (self.experts,)), *((k, n) if self.transposed else (n, k)))

    def views(self, values: Tensor) -> tuple[Tensor, ...]:
        """Each matrix [N, K] of the parameter's values, as a view."""
        values = values.mT if self.transposed else values
        return (values,) if self.experts is None else values.unbind()


class BitLayer(nn.Module):
    """What layers in training share. Surgery, checkpoints and set_strength see no more of them than this.

    strength: how far training forward passes quantize: 1 fully, 0 not at all; bitnet.set_strength sets it.
        Evaluation mode always quantizes fully, because that is what packing and serving compute.
    """

    spec: QuantSpec
    strength: float | Tensor  # a 0-d tensor strictly between 0 and 1, so that a compiled ramp is one graph

    def latent_weights(self) -> list[LatentWeight]:
        """The parameters that are quantized; also right on the meta device."""
        raise NotImplementedError


class _OneMatrix(BitLayer):
    """A layer with one weight, a bias or None, and perhaps an RMSNorm."""

    in_features: int
    out_features: int
    weight: Tensor
    bias: Any  # [N] or None
    rms_norm: nn.RMSNorm | None
    signs: Tensor | None  # int8 [K], with hadamard_signs
    transposed = False  # weight is [K, N]

    def _configure(self, spec: QuantSpec) -> None:
        check_features(self.in_features, spec)
        self.spec = spec
        self.strength = 1.0
        self.rms_norm = None
        if spec.rms_norm:
            self.rms_norm = nn.RMSNorm(
                self.in_features, spec.rms_norm_eps, device=self.weight.device, dtype=self.weight.dtype
            )

        self.register_buffer("signs", random_signs(self.in_features, spec, self.weight.device))

    def latent_weights(self) -> list[LatentWeight]:
        return [LatentWeight("weight", self.out_features, self.in_features, self.transposed)]

    def forward(self, input: Tensor) -> Tensor:
        x = input
        if self.rms_norm is not None:
            x = self.rms_norm(x)
        x = cast_for_autocast(x)
        if self.spec.hadamard is not None:
            x = hadamard(x, self.spec.hadamard, self.signs)
        weight = self.weight.T if self.transposed else self.weight
        return bit_linear(x, weight, self.bias, self.spec, self.strength if self.training else 1.0)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {describe(self.spec)}"


class BitLinear(_OneMatrix, nn.Linear):
    """A drop-in nn.Linear whose product runs on quantized weights and activations.

    Takes nn.Linear's arguments, then the options of QuantSpec. `weight` [N, K] stays the float *latent* weight
    that optimizers update; every forward pass quantizes it afresh. Names and state_dict keys are those of
    nn.Linear (plus `rms_norm.weight` if that option is on).
    """

    origin: type[nn.Linear]

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._configure(QuantSpec(**options))

    @staticmethod
    def from_linear(linear: nn.Linear, spec: QuantSpec | None = None) -> "BitLinear":
        """Turn an nn.Linear into a BitLinear *in place* and return it.

        The object stays the same: Parameters, ties, hooks, device and references to it are untouched.
        """
        origin = type(linear)
        layer = become(linear, BitLinear)
        if origin is not nn.Linear:
            layer.origin = origin  # a subclass that computes the same; unpacking gives it back
        layer._configure(spec or QuantSpec())
        return layer


class BitConv1D(_OneMatrix):
    """BitLinear for transformers' Conv1D (GPT-2): the same, with a latent weight that is stored as [K, N].

    What is quantized is weight.T; the weight itself and its name stay those of a GPT-2 checkpoint.
    """

    nf: int
    nx: int
    origin: type[nn.Module]  # unpacking gives it back
    transposed = True

    @staticmethod
    def from_conv1d(conv1d: nn.Module, spec: QuantSpec | None = None) -> "BitConv1D":
        """Turn a transformers.pytorch_utils.Conv1D into a BitConv1D *in place* and return it."""
        origin = type(conv1d)
        layer = become(conv1d, BitConv1D)
        layer.origin = origin
        layer.in_features, layer.out_features = layer.nx, layer.nf
        layer._configure(spec or QuantSpec())
        return layer


def check_features(in_features: int, spec: QuantSpec) -> None:
    """Raise ValueError if a layer of so many features cannot have these options."""
    if spec.hadamard is not None and in_features % spec.hadamard:
        raise ValueError(f"its {in_features} features are no multiple of hadamard={spec.hadamard}")


def random_signs(in_features: int, spec: QuantSpec, device: Any, seed: int = 0) -> Tensor | None:
    """The signs of a fresh layer: the same for all layers with as many features, so that layers can share an input."""
    if not spec.hadamard_signs:
        return None
    draw = torch.Generator().manual_seed((in_features + SEEDS * seed) % 2**32)  # torch takes no more of a seed
    bits = torch.randint(0, 2, (in_features,), generator=draw, device="cpu", dtype=torch.int8)
    return (2 * bits - 1).to(device)


def cast_for_autocast(x: Tensor) -> Tensor:
    """x in the dtype autocast asks for, where it is on; custom functions are not on its lists."""
    if not torch._C._is_any_autocast_enabled():  # the rest costs a microsecond
        return x
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):  # "meta" has no autocast
        return x.to(torch.get_autocast_dtype(device))
    return x


def describe(spec: QuantSpec) -> str:
    """The options in a few words, as module printouts show them."""
    words: list[str] = [spec.weights]
    if spec.per_row:
        words.append("per-row scale")
    if spec.group_size is not None:
        words.append(f"scales of groups of {spec.group_size}")
    if not spec.centered:
        words.append("not centered")
    if spec.hadamard is not None:
        words.append(f"Hadamard blocks of {spec.hadamard}{' with signs' * spec.hadamard_signs}")
    words.append("float activations" if spec.activation_bits is None else f"int{spec.activation_bits} activations")
    return ", ".join(words)
