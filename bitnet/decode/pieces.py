"""The pieces of a native plan: norms, layers, and products of layers that share an input."""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.cpu import library
from ..kernels.cpu import step as native
from ..kernels.cpu.linear import ROWS, prepared
from ..packed import PackedBitLinear
from .families import Family


class Unplanned(Exception):
    """Why a model, or something in it, is not what the native step computes."""


def eps_of(norm: nn.Module) -> Any:
    """The eps of a norm, under either of its names; None if it has none."""
    return getattr(
        norm, "variance_epsilon", getattr(norm, "eps", 1e-5 if type(norm).__name__ == "OlmoLayerNorm" else None)
    )


class Pieces:
    """Tied to the tensors and modules that they were made from, of a model of a family with so many hidden features."""

    def __init__(self, family: Family, hidden: int, isa: str | None) -> None:
        self.family, self.hidden, self._isa = family, hidden, isa
        self._watched: list[tuple[Any, str, Any, int]] = []
        self._hooks: list[dict[int, Any]] = []
        self.alive: list[Any] = []  # what the structures point to

    def watch_modules(self, base: nn.Module) -> None:
        """Watch which modules there are, and that they get no hooks. Raises Unplanned if one has."""
        for name, module in base.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                raise Unplanned(f"{name or 'the model'} has hooks")
            self._hooks += [module._forward_hooks, module._forward_pre_hooks]
            for part, child in module._modules.items():
                self._watched.append((module._modules, part, child, -1))

    def current(self) -> bool:
        """Whether the model still is what it was: the same modules and tensors, unwritten, without hooks."""
        if any(self._hooks):
            return False
        for holder, name, value, version in self._watched:
            if holder.get(name) is not value:
                return False
            if version >= 0 and value._version != version:
                return False
        return True

    def watch(self, module: nn.Module, *names: str) -> None:
        for name in names:
            holder: Any = module._parameters if name in module._parameters else module._buffers
            value: Any = holder.get(name)
            version = -1 if value is None or value.is_inference() else value._version
            self._watched.append((holder, name, value, version))

    def norm(self, module: Any, width: int | None = None) -> native.Norm:
        """A norm of so many features, by default of a token's."""
        weight, bias, eps = getattr(module, "weight", None), getattr(module, "bias", None), eps_of(module)
        self.watch(module, *(name for name in ("weight", "bias") if getattr(module, name, None) is not None))
        if not isinstance(eps, float):
            raise Unplanned(f"a norm of type {type(module).__name__} without eps")
        if weight is None:
            weight = torch.ones(width or self.hidden)
        values = weight.detach().float()
        values = (1 + values if self.family.plus_one else values).contiguous()
        shift = None if bias is None else bias.detach().float().contiguous()
        self.alive += [values, shift]
        centered = self.family.centered or isinstance(module, nn.LayerNorm)
        return native.Norm(values.data_ptr(), None if shift is None else shift.data_ptr(), eps, centered)

    def layer(
        self, name: str, module: nn.Module, rows: tuple[int, int] | None = None, watched: bool = True
    ) -> ctypes.Structure:
        """A layer, or the part of it that gives outputs [first, last)."""
        if not isinstance(module, PackedBitLinear):
            raise Unplanned(f"{name} is a {type(module).__name__}, not a packed layer")
        if (bits := module.activation_bits) is None:
            raise Unplanned(f"{name} takes float activations")
        weight, backend = module.prepack()
        if (form := library.form_of_backend(backend)) is None:
            raise Unplanned(f"{name} runs on backend {backend!r}")
        if watched:
            self.watch(module, "weight", "weight_scale", "bias", "signs")
        scale, bias, n = module.weight_scale, module.bias, module.out_features
        if rows is not None:
            first, last = rows
            if first % ROWS:
                raise Unplanned(f"{name} is {first} outputs and others, and {first} is no multiple of {ROWS}")
            weight, n = weight[first // ROWS : -(-last // ROWS)], last - first
            scale = scale if len(scale) == 1 else scale[first:last]
            bias = None if bias is None else bias[first:last]
        layer = prepared(weight, scale, bias, n, module.in_features, form, self._isa, bits)
        self.alive.append(layer)
        return layer

    def products(self, named: list[Any], norm: Any, into: Any) -> int:
        """Fill products with layers that share an input; layers that transform theirs alike share one. How many.

        named: for each its name, the module, and if it is a part of one its rows
        """
        outer = None if norm is None else self.norm(norm)
        count, previous = 0, None
        for name, module, *rows in named:
            layer = self.layer(name, module, *rows)
            inner, block, signs = module.rms_norm, module.spec.hadamard or 0, module.signs
            alike = inner is None and previous is not None and previous[0] == block and _equal(previous[1], signs)
            product = into[count - 1 if alike else count]
            if not alike:
                norms = [n for n in (outer, None if inner is None else self.inner_norm(inner)) if n is not None]
                for i, value in enumerate(norms):
                    product.norms[i] = value
                product.hadamard, product.signs = block, None if signs is None else signs.data_ptr()
                count += 1
            product.layers[product.count] = ctypes.pointer(layer)
            product.count += 1
            previous = (block, signs) if inner is None else None
        return count

    def inner_norm(self, norm: Any) -> native.Norm:
        self.watch(norm, "weight")
        weight = norm.weight.detach().float().contiguous()
        self.alive.append(weight)
        return native.Norm(weight.data_ptr(), None, eps_of(norm), False)


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b or (a is not None and b is not None and torch.equal(a, b))
