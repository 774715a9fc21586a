"""The float modules that have a low-bit form, and what they become in training.

    nn.Linear                       BitLinear    weight [N, K]
    transformers' Conv1D (GPT-2)    BitConv1D    weight [K, N]
    fused experts of a mixture      BitExperts   gate_up_proj [E, 2I, H] (or up_proj), down_proj [E, H, I]; or as [K, N]

What is quantized in each, and how, its matrices() say; bitnet.experts.to_packed gives the packed forms.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from bitnet.experts import BitExperts, stacks_of
from bitnet.kernels import rotation
from bitnet.linear import BitConv1D, BitLayer, BitLinear, check_features, random_signs
from bitnet.packed import PackedBitLinear
from bitnet.quantize import QuantSpec

# Last name components that are kept by default, whole (so "gate" is not "gate_proj"): what decides between
# classes, tokens or experts is small and does not survive 1.58 bits.
HEADS = {"lm_head", "ctc_head", "embed_out", "head", "classifier", "score", "qa_outputs", "proj_out", "pooler"}
ROUTERS = {"router", "gate", "wg", "router_gate", "modality_router", "shared_expert_gate"}


# What transformers' Mamba-2 mixers say to their fused kernel in training.
FUSED = "outproj_weight=self.out_proj.weight"


def swappable(module: nn.Module) -> bool:
    """Whether there is a low-bit layer to put in this float module's place."""
    return isinstance(module, nn.Linear | Conv1D) or bool(stacks_of(module))


def to_training(module: nn.Module, spec: QuantSpec) -> BitLayer:
    """Turn a module that is swappable into its layer in training, in place."""
    if isinstance(module, nn.Linear):
        return BitLinear.from_linear(module, spec)
    return BitConv1D.from_conv1d(module, spec) if isinstance(module, Conv1D) else BitExperts.from_experts(module, spec)


def misfit(module: nn.Module, spec: QuantSpec) -> str:
    """Why a module cannot have these options; empty if it can."""
    if stacks_of(module):
        if spec.rms_norm or spec.hadamard is not None:
            return f"{'an RMSNorm' if spec.rms_norm else 'a Hadamard transform'} inside fused experts is not supported"
        if spec.weights == "int4":
            return "4-bit weights of fused experts are not supported"
        return ""
    try:
        check_features(module.nx if isinstance(module, Conv1D) else module.in_features, spec)  # type: ignore[arg-type]
    except ValueError as error:
        return str(error)
    return ""


def rotate(layer: BitLayer, seed: int = 0) -> None:
    """Take the float weights of a fresh layer into the basis that its activations are transformed to, in place.

    seed: of its signs
    """
    if isinstance(layer, BitLinear | BitConv1D) and layer.spec.hadamard is not None and not layer.weight.is_meta:
        layer.signs = random_signs(layer.in_features, layer.spec, layer.weight.device, seed)
        (weight,) = layer.latent_weights()[0].views(layer.weight.detach())
        weight.copy_(rotation.hadamard(weight.contiguous(), layer.spec.hadamard, layer.signs))


def computes_linear(module: nn.Module) -> bool:
    """Whether a Linear or Conv1D computes what its base class does, as Falcon's FalconLinear.

    A subclass may replace forward only, and that is tried: with a small weight in place of its own, in training and
    evaluation, its outputs must be those of F.linear.
    """
    if type(module) in (nn.Linear, Conv1D):
        return True
    order = type(module).__mro__
    if nn.Linear not in order or module._modules or module._buffers or set(module._parameters) - {"weight", "bias"}:
        return False
    added = {name for cls in order[: order.index(nn.Linear)] for name in vars(cls)}
    if added - vars(nn.Linear).keys() - vars(type("Empty", (), {})).keys() - {"__static_attributes__"}:
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    twin = type(module).__new__(type(module))
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 5, generator=random, device="cpu") * torch.tensor([1.0, 1000.0], device="cpu")[:, None, None]
    weight = torch.randn(3, 5, generator=random, device="cpu")
    bias = None if module.bias is None else torch.randn(3, generator=random, device="cpu")
    parameters = {name: None if t is None else nn.Parameter(t) for name, t in (("weight", weight), ("bias", bias))}
    vars(twin).update(vars(module), _parameters=parameters, in_features=5, out_features=3)
    with torch.no_grad():
        expected = F.linear(x, weight, bias)
        for training, rows in ((True, x), (False, x), (False, x[0])):
            twin.training = training
            try:
                y = type(module).forward(twin, rows)
            except Exception:  # whatever a stranger's code raises on these inputs
                return False
            like = expected if rows is x else expected[0]
            if not isinstance(y, torch.Tensor) or y.shape != like.shape or y.dtype != like.dtype:
                return False
            magnitude = F.linear(rows.abs(), weight.abs(), None if bias is None else bias.abs())
            # five products and a bias, each rounded in float32, in any order
            if not bool(((y - like).abs() <= 6 * torch.finfo(torch.float32).eps * magnitude).all()):
                return False
    return True


def settle_fast_paths(model: nn.Module) -> None:
    """Turn off the fused paths that read the weights of layers, where these are low-bit; the other path calls them.

    They are torch's own Transformer layers' in inference, and Mamba-2's in training.
    """
    for module in model.modules():
        if fuses_out_proj(type(module)):
            unfused = isinstance(vars(module).get("forward"), Unfused)
            if _low_bit(module.out_proj) and not unfused:  # type: ignore[arg-type]
                vars(module)["forward"] = Unfused(module)
            elif unfused and not _low_bit(module.out_proj):  # type: ignore[arg-type]
                del vars(module)["forward"]
        if isinstance(module, nn.TransformerEncoderLayer):
            activation = module.activation
            relu = activation is F.relu or isinstance(activation, nn.ReLU)
            gelu = activation is F.gelu or isinstance(activation, nn.GELU)
            module.activation_relu_or_gelu = 0 if _low_bit(module) else 1 if relu else 2 if gelu else 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and isinstance(module.layers[0], nn.TransformerEncoderLayer):
            layer = module.layers[0]
            fast = layer.activation_relu_or_gelu and layer.self_attn.batch_first and not layer.norm_first
            fast = fast and layer.self_attn._qkv_same_embed_dim and layer.self_attn.in_proj_bias is not None
            fast = fast and layer.norm1.eps == layer.norm2.eps and layer.self_attn.num_heads % 2 == 0
            module.use_nested_tensor = bool(module.enable_nested_tensor and fast and not _low_bit(module))


def fuses_out_proj(cls: type[nn.Module]) -> bool:
    """Is it a Mamba-2 mixer of transformers, which in training gives the weight of its out_proj to a fused kernel, and
    asks for nothing else whether it is training?"""
    return cls.__module__.startswith("transformers.models.") and _fuses(cls.forward)


@functools.cache
def _fuses(forward: Callable[..., Any]) -> bool:
    try:
        source = inspect.getsource(forward)
    except (OSError, TypeError):
        return False
    return FUSED in source and source.count("self.training") == 1


class Unfused:
    """The forward of such a mixer, without the fused kernel."""

    def __init__(self, mixer: nn.Module) -> None:
        self._mixer = mixer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mixer = self._mixer
        training, mixer.training = mixer.training, False
        try:
            return type(mixer).forward(mixer, *args, **kwargs)
        finally:
            mixer.training = training


def _low_bit(module: nn.Module) -> bool:
    return any(isinstance(child, BitLayer | PackedBitLinear) for child in module.modules())
