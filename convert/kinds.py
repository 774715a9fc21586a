"""The float modules that have a low-bit form, and what they become in training.

    nn.Linear                       BitLinear    weight [N, K]
    transformers' Conv1D (GPT-2)    BitConv1D    weight [K, N]
    fused experts of a mixture      BitExperts   gate_up_proj [E, 2I, H] (or up_proj), down_proj [E, H, I]; or as [K, N]

What is quantized in each, and how, its matrices() say; bitnet.experts.to_packed gives the packed forms. A file of its
own because swap.py and hf.py need it, and the import of transformers in either imports hf.py.
"""

from torch import nn
from transformers.pytorch_utils import Conv1D

from bitnet.experts import BitExperts, stacks_of
from bitnet.linear import BitConv1D, BitLayer, BitLinear
from bitnet.quantize import QuantSpec


def swappable(module: nn.Module) -> bool:
    """Whether there is a low-bit layer to put in this float module's place."""
    return isinstance(module, nn.Linear | Conv1D) or bool(stacks_of(module))


def to_training(module: nn.Module, spec: QuantSpec) -> BitLayer:
    """Turn a module that is swappable into its layer in training, in place."""
    if isinstance(module, nn.Linear):
        return BitLinear.from_linear(module, spec)
    return BitConv1D.from_conv1d(module, spec) if isinstance(module, Conv1D) else BitExperts.from_experts(module, spec)
