"""bitnet.functional.bit_linear is a BitLinear layer's forward and backward pass, without the layer."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bitnet import BitLinear
from bitnet.functional import bit_linear


@pytest.mark.parametrize("strength", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("options", [{}, {"per_row": True, "activation_bits": 4}, {"weights": "binary"}], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_values_and_gradients_are_the_layers(strength: float, options: dict[str, Any], autocast: bool) -> None:
    layer = BitLinear(70, 9, **options)
    layer.strength = strength
    results = []
    for run in (layer, lambda x: bit_linear(x, layer.weight, layer.bias, strength=strength, **options)):
        layer.zero_grad()
        x = torch.randn(2, 5, 70, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = run(x)
        y.float().square().sum().backward()
        results.append([y, x.grad, layer.weight.grad, layer.bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_can_be_left_out_and_the_bias_too() -> None:
    x, weight = torch.randn(3, 8), torch.randn(4, 8, requires_grad=True)
    bit_linear(x, weight).sum().backward()
    assert weight.grad is not None
    assert bit_linear(x.bfloat16(), weight).dtype == torch.bfloat16


X, W = torch.zeros(2, 8), torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[:, :7], W), {}, ValueError, r"x is \[2, 7\], but the weight takes K = 8 features"),
        ((X.long(), W), {}, TypeError, "x must be floating point, got torch.int64"),
        ((X, W.int()), {}, TypeError, "weight must be floating point, got torch.int32"),
        ((X, W[0]), {}, ValueError, r"weight must be \[N, K\] and not empty, got \[8\]"),
        ((X, W, torch.zeros(5)), {}, ValueError, r"bias must be \[4\], got \[5\]"),
        ((X, W), {"rms_norm": True}, ValueError, "an RMSNorm has a weight of its own"),
        ((X, W), {"activation_bits": 5}, ValueError, "activation_bits must be 8, 4 or None, got 5"),
    ],
)
def test_arguments_that_do_not_fit_are_named(
    arguments: tuple[Tensor, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        bit_linear(*arguments, **options)
