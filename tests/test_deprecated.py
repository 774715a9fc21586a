"""Old spellings of options work for a while, and say what they are called now."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Mlp

import bitnet
from bitnet import PackedBitLinear
from bitnet.kernels import ops


def packed() -> Any:
    model = Mlp()
    bitnet.replace_linear(model)
    bitnet.pack(model)
    return model


@pytest.mark.parametrize(
    ("call", "new"),
    [
        (lambda path, **bits: bitnet.save(packed(), path / "out", **bits), "weight_bits"),
        (lambda path, **bits: bitnet.load(bitnet.save(packed(), path / "out"), Mlp(), **bits), "weight_bits"),
        (lambda path, **bits: PackedBitLinear(8, 4, **bits), "weight_bits"),
        (lambda path, **bits: PackedBitLinear(8, 4).set_backend(**bits), "weight_bits"),
    ],
    ids=["save", "load", "PackedBitLinear", "set_backend"],
)
def test_the_old_name_of_an_option_is_accepted_and_named(call: Callable[..., Any], new: str, tmp_path: Path) -> None:
    with pytest.warns(DeprecationWarning, match=f"bits is now {new}"):
        call(tmp_path, bits=2)
    with pytest.raises(TypeError, match=f"bits is the old name of {new}; give one of them"):
        call(tmp_path, bits=2, **{new: 2})


def test_it_does_what_the_new_one_does(tmp_path: Path) -> None:
    x = torch.randn(3, 8)
    with pytest.warns(DeprecationWarning, match="quantize_activation: bits is now activation_bits"):
        old = ops.quantize_activation(x, bits=4)
    assert all(torch.equal(a, b) for a, b in zip(old, ops.quantize_activation(x, activation_bits=4), strict=True))
    with pytest.warns(DeprecationWarning, match="bits is now weight_bits"):
        layer = PackedBitLinear(8, 4, bits=1.6)
    assert layer.weight_bits == 1.6
    with pytest.warns(DeprecationWarning, match="PackedBitLinear.bits is now weight_bits"):
        assert layer.bits == 1.6
