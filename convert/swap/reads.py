"""Which code around a layer uses its parameters without calling it, so that a swapped layer would be bypassed.

The code of every module's forward is followed (not run), statement by statement, with the objects that the model
really holds: names, indexes, loops over ModuleLists, helper functions and methods lead to modules, and modules to
parameters. A parameter that is used other than by asking for its device, or whether it is None, is read. Branches are
all taken, and a name may be anything that was ever assigned to it. What cannot be followed counts against the layers
that it is given.
"""

import ast
import functools
import inspect
import re
import sys
import types
from typing import Any, NamedTuple

import torch
from torch import nn

from .frames import (
    MARKERS,
    NOTHING,
    OPAQUE,
    Bound,
    Frame,
    Nested,
    OneOf,
    Opaque,
    Some,
    Super,
    Value,
    dict_of,
    union,
    value_of,
)
from .functions import TELLTALE, TRUSTED, definition, mentions, root_of
from .kinds import FUSED, fuses_out_proj

# Methods that handle weights as such and may do so: they set, load, save, list or count them, or share them out.
ADMINISTRATIVE = re.compile(
    r"init|reset|__setstate__|load|save|export|state_dict|param|optim|group|decay|tie|num_|count"
)
# Gemma 4's, which finds out by comparing whose embeddings it got: with a packed table it finds none, and says so.
COMPARING = {"get_per_layer_inputs"}
FAST_PATHS = nn.TransformerEncoder.forward, nn.TransformerEncoderLayer.forward
BUILTIN_METHOD = types.MethodDescriptorType | types.WrapperDescriptorType | types.MethodWrapperType
BUILTIN_METHOD |= types.GetSetDescriptorType | types.ClassMethodDescriptorType
BUILTIN = types.BuiltinFunctionType | BUILTIN_METHOD


class Read(NamedTuple):
    """Why a layer's parameters count as used by other code, and whether that is sure."""

    why: str
    certain: bool


def find_reads(model: nn.Module, layers: dict[nn.Module, list[str]]) -> dict[nn.Module, Read]:
    """The layers whose parameters are used by code other than their own, and why it is thought so.

    layers: modules of the model, and the names of the parameters in question of each
    """
    follower = _Follower(model, layers)
    for name, module in model.named_modules():
        if module not in layers and root_of(type(module)) not in ("bitnet", "peft"):
            try:
                follower.follow_module(name, module)
            except Exception as error:  # whatever the objects of a stranger raise when they are looked at
                for layer in follower.layers_below(module):
                    why = f"{type(module).__name__} cannot be followed ({type(error).__name__}: {error})"
                    follower.found.setdefault(layer, Read(why, certain=False))
    for layer in layers:
        if layer not in follower.called and (owner := _caller(model, follower.names[layer])) is not None:
            why = f"nothing that can be followed in {type(owner).__name__} calls it"
            follower.found.setdefault(layer, Read(why, certain=False))
    return follower.found


def _caller(model: nn.Module, name: str) -> nn.Module | None:
    """The nearest module around a layer that has a forward of its own, and should call it; None if it is unknown."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1) if name else ():
        owner = model.get_submodule(".".join(parts[:depth]))
        if type(owner).forward is not nn.Module.forward:
            return None if root_of(type(owner)) in ("peft", "torch") else owner
    return None


class _Follower:
    def __init__(self, model: nn.Module, layers: dict[nn.Module, list[str]]) -> None:
        self.layers = layers
        self.names = {module: name for name, module in model.named_modules()}
        self.leaves = {leaf for leaves in layers.values() for leaf in leaves}
        self.holders: dict[int, list[nn.Module]] = {}  # the layers that hold a parameter
        for layer, leaves in layers.items():
            for leaf in (*leaves, "bias"):
                if (parameter := layer._parameters.get(leaf)) is not None:
                    self.holders.setdefault(id(parameter), []).append(layer)
        self.below: dict[nn.Module, list[nn.Module]] = {}
        self.found: dict[nn.Module, Read] = {}
        self.done: dict[Any, Value] = {}
        self.called: set[nn.Module] = set()
        self.stored: dict[tuple[int, str], Value] = {}  # what methods put into attributes
        self.root: tuple[str, nn.Module, str] = "", model, ""  # name and module that is followed, and its method

    def follow_module(self, name: str, module: nn.Module) -> None:
        cls = type(module)
        if root_of(cls) in TRUSTED and not self.layers_below(module):
            return
        if getattr(cls, "forward", None) in FAST_PATHS:
            return  # which settle_fast_paths turns off
        self.root = name, module, ""
        for forward in self.attribute(cls, "forward").values():
            self.call(forward, [value_of(module)], {})
        if "forward" in vars(module):
            self.call(vars(module)["forward"], [], {})
        for owner in cls.__mro__:
            if root_of(owner) in TRUSTED:
                continue
            for method, function in vars(owner).items():
                function = getattr(function, "fget", None) or function
                if (
                    isinstance(function, types.FunctionType)
                    and not ADMINISTRATIVE.search(method)
                    and method != "forward"
                ):
                    self.root = name, module, method
                    self.call(function, [value_of(module)], {})

    def settled(self, node: ast.If) -> bool:
        """Is it the branch that settle_fast_paths turns off in the module that is followed?"""
        return fuses_out_proj(type(self.root[1])) and FUSED in ast.unparse(node)

    def layers_below(self, module: nn.Module) -> list[nn.Module]:
        if module not in self.below:
            self.below[module] = [child for child in module.modules() if child in self.layers]
        return self.below[module]

    def read(self, value: Value, metadata: bool = False) -> None:
        """Record that the parameters in a value are used; metadata: only to ask for their dtype or shape."""
        for thing in value.values():
            if isinstance(thing, OneOf) and not metadata:
                self.suspect(value_of(thing.module), "code that takes parameters from a list of all")
            for layer in self.holders.get(id(thing), []):
                leaf = next(leaf for leaf, parameter in layer._parameters.items() if parameter is thing)
                if metadata and (leaf == "bias" or self.root[2]):
                    continue
                owner, path = self.where(layer)
                self.record(layer, f"{owner} uses {path}.{self.layers[layer][0]} directly", certain=True)

    def suspect(self, value: Value, what: str) -> None:
        """Record that code which cannot be followed has got these modules, or parameters."""
        if self.root[2]:
            return  # a method that forward does not call: counting or listing parameters is what most are for
        self.read({key: thing for key, thing in value.items() if not isinstance(thing, OneOf)})
        for thing in value.values():
            module = thing.module if isinstance(thing, OneOf | Some) else thing
            for layer in self.layers_below(module) if isinstance(module, nn.Module) else ():
                owner, path = self.where(layer)
                self.record(layer, f"{owner} gives {path} to {what}, which may use its weight directly", certain=False)

    def reach(self, thing: Any) -> None:
        """Note that a module may be called."""
        self.called |= set(self.layers_below(thing.module)) if isinstance(thing, Some) else set()
        if isinstance(thing, nn.Module):
            self.called.add(thing)

    def where(self, layer: nn.Module) -> tuple[str, str]:
        below = self.root[1].named_modules(remove_duplicate=False)
        path = next((path for path, module in below if module is layer), self.names[layer])
        return type(self.root[1]).__name__, path

    def record(self, layer: nn.Module, why: str, certain: bool) -> None:
        method = self.root[2]
        if method:
            why += f", in {method}"
        certain = certain and not method
        if layer not in self.found or (certain and not self.found[layer].certain):
            self.found[layer] = Read(why, certain)

    # Objects

    def attribute(self, thing: Any, name: str) -> Value:
        stored = self.stored.get((id(thing), name), NOTHING)
        if isinstance(thing, Some):
            return value_of(OneOf(thing.module)) if name in TELLTALE | self.leaves else NOTHING
        if isinstance(thing, OneOf | Nested | Bound | Opaque):
            return value_of(OPAQUE) if isinstance(thing, Opaque) else NOTHING
        if isinstance(thing, nn.Module):
            for members in (thing._parameters, thing._modules):
                if name in members:
                    return stored | value_of(members[name])
        if isinstance(thing, torch.Tensor):
            return NOTHING
        order: tuple[type, ...] = (thing if isinstance(thing, type) else type(thing)).__mro__
        if isinstance(thing, Super):
            order = type(thing.owner).__mro__
            thing, order = thing.owner, order[order.index(thing.cls) + 1 :] if thing.cls in order else ()
        elif not isinstance(thing, type) and name in (own := dict_of(thing)):
            return stored | self.unbound(own[name])
        for cls in order:
            if name not in vars(cls):
                continue
            found = vars(cls)[name]
            if isinstance(found, property | functools.cached_property):
                getter = found.fget if isinstance(found, property) else found.func
                return stored | self.call(getter, [value_of(thing)], {})
            if isinstance(found, staticmethod):
                return stored | self.unbound(found.__func__)
            if isinstance(found, classmethod):
                return stored | value_of(Bound(thing if isinstance(thing, type) else type(thing), found.__func__))
            if hasattr(found, "__get__") and callable(found) and not isinstance(thing, type):
                return stored | value_of(Bound(thing, found))
            return stored | value_of(found)
        if isinstance(thing, nn.Module) and type(thing).__getattr__ is not nn.Module.__getattr__:
            try:
                return stored | self.unbound(getattr(thing, name))  # a wrapper that passes on to what it wraps
            except Exception:  # a stranger's code; most often it has no such attribute
                return stored
        return stored

    def unbound(self, thing: Any) -> Value:
        return value_of(Bound(thing.__self__, thing.__func__) if isinstance(thing, types.MethodType) else thing)

    def elements(self, value: Value) -> Value:
        """What iterating or indexing may give: what a value holds, and, because pairs are not kept apart, itself."""
        found = dict(value)
        for thing in value.values():
            if isinstance(thing, nn.ParameterList | nn.ParameterDict):
                found |= value_of(*thing.parameters())
            elif isinstance(thing, nn.Module):
                if hasattr(type(thing), "__iter__") or hasattr(type(thing), "__getitem__"):
                    found |= value_of(*thing.children())
            elif isinstance(thing, dict):
                found |= value_of(*thing.values())
            elif isinstance(thing, list | tuple | set) and not isinstance(thing, MARKERS):
                found |= value_of(*thing)
        return found

    def item(self, value: Value, index: Any) -> Value:
        if isinstance(index, int | str):
            for thing in value.values() if len(value) == 1 else ():
                if isinstance(thing, OneOf):
                    try:
                        return value_of(thing.module.get_parameter(str(index)))
                    except AttributeError:
                        return value
                if isinstance(thing, nn.ModuleList | nn.Sequential | nn.ModuleDict | dict | list | tuple):
                    try:
                        return value_of(thing[index])  # type: ignore[index]
                    except (KeyError, IndexError, TypeError):
                        return NOTHING
        return self.elements(value)

    # Calls

    def call(self, function: Any, args: list[Value], kwargs: dict[str, Value]) -> Value:
        """Follow a call, as far as that is possible, and return what it may give back."""
        every: Value = union([*args, *kwargs.values()])
        if isinstance(function, functools.partial):
            given = {name: value_of(thing) for name, thing in function.keywords.items()}
            return self.call(function.func, [*(value_of(arg) for arg in function.args), *args], given | kwargs)
        if isinstance(function, types.MethodType):
            return self.call(function.__func__, [value_of(function.__self__), *args], kwargs)
        if isinstance(function, Bound):
            special = self.method(function, args)
            if special is not None:
                return special
            if isinstance(function.owner, nn.Module) and function.owner in self.layers:
                self.called.add(function.owner)
            return self.call(function.function, [value_of(function.owner), *args], kwargs)
        if isinstance(function, Nested):
            return self.body(function.node, function.frame.function, args, kwargs, function.frame)
        if isinstance(function, Some):
            self.reach(function)
            return NOTHING
        if isinstance(function, nn.Module):
            self.reach(function)
            if self.carries(every):
                forward = next(iter(self.attribute(type(function), "forward").values()), None)
                return self.call(forward, [value_of(function), *args], kwargs)
            return NOTHING
        if (
            isinstance(function, types.FunctionType)
            and root_of(function) in TRUSTED
            and hasattr(function, "__wrapped__")
        ):
            self.read({key: thing for key, thing in every.items() if not isinstance(thing, OneOf)})
            function = inspect.unwrap(function)  # which a decorator calls, or something else (a kernel) in its place
        if getattr(function, "__name__", "") in COMPARING and root_of(function).startswith("transformers."):
            return NOTHING
        own = self.attribute(type(self.root[1]), "forward")
        if isinstance(function, types.FunctionType) and (root_of(function) not in TRUSTED or id(function) in own):
            node = definition(function)
            if node is not None:
                return self.body(node, function, args, kwargs, None)
            if mentions(function, [type(thing) for thing in every.values()]):
                self.suspect(every, f"{function.__qualname__}, whose source cannot be read,")
            for thing in every.values():
                self.called |= set(thing.modules() if isinstance(thing, nn.Module) else ())
            return every
        if isinstance(function, Opaque | type | BUILTIN) or root_of(function) in TRUSTED:
            handling = isinstance(function, type | BUILTIN_METHOD) or root_of(function) in sys.stdlib_module_names
            self.read({k: thing for k, thing in every.items() if not (handling and isinstance(thing, OneOf))})
            callables = (thing.owner if isinstance(thing, Bound) else thing for thing in self.elements(every).values())
            for thing in callables:
                self.reach(thing)
            if "functional_call" in getattr(function, "__name__", ""):
                self.suspect(every, "functional_call")
            functions = {key: thing for key, thing in every.items() if isinstance(thing, types.FunctionType | Nested)}
            for callback in functions.values():  # which may be called with whatever stands beside them
                self.call(callback, [self.elements({k: v for k, v in every.items() if k not in functions})] * 8, {})
            if handling or isinstance(function, BUILTIN):
                return self.elements(every) | value_of(OPAQUE)
            return functions | value_of(OPAQUE)
        if (called := self.attribute(type(function), "__call__")) and function is not None:
            return union(self.call(each, [value_of(function), *args], kwargs) for each in called.values())
        self.suspect(every, "code that cannot be followed")
        return every

    def method(self, bound: Bound, args: list[Value]) -> Value | None:
        """What the methods of modules and containers give back that lead to other modules; None for other methods."""
        owner, name = bound.owner, getattr(bound.function, "__name__", "")
        const = next((thing for thing in args[0].values() if isinstance(thing, str | int)), None) if args else None
        if isinstance(owner, dict | list | tuple | nn.ModuleList | nn.ModuleDict | nn.Sequential) and name in (
            "values", "items", "get", "pop", "__getitem__", "__iter__", "children", "copy"
        ):  # fmt: skip
            return (
                self.item(value_of(owner), const) if name in ("get", "__getitem__") else self.elements(value_of(owner))
            )
        if not isinstance(owner, nn.Module) or root_of(bound.function) not in TRUSTED:
            return None
        if name in ("get_input_embeddings", "get_output_embeddings"):
            try:
                return value_of(bound.function(owner))
            except NotImplementedError:  # transformers', of models whose input is no text
                return NOTHING
        if name in ("children", "named_children"):
            return value_of(*owner.children())
        if name in ("modules", "named_modules"):
            return value_of(Some(owner))
        if name in ("parameters", "named_parameters", "state_dict", "_named_members"):
            return value_of(OneOf(owner)) if self.layers_below(owner) else NOTHING
        if name in ("get_submodule", "get_parameter"):
            try:
                return value_of(getattr(owner, name)(const))
            except (AttributeError, TypeError):
                return value_of(Some(owner) if name == "get_submodule" else OneOf(owner))
        if name in ("__call__", "_call_impl", "_wrapped_call_impl"):
            return self.call(owner, args, {})
        return None

    def carries(self, value: Value) -> bool:
        """Does a value give access to a layer?"""
        return any(
            isinstance(thing, OneOf | Some)
            or id(thing) in self.holders
            or (isinstance(thing, nn.Module) and self.layers_below(thing))
            for thing in self.elements(value).values()
        )

    def body(
        self, node: Any, function: Any, args: list[Value], kwargs: dict[str, Value], outer: "Frame | None"
    ) -> Value:
        frame = Frame(self, function, outer)
        names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
        rest = node.args.vararg.arg if node.args.vararg else None
        for i, value in enumerate(args):
            frame.bind(names[i] if i < len(names) else rest or "", value)
        for name, value in kwargs.items():
            known = name in names or any(arg.arg == name for arg in node.args.kwonlyargs)
            if name == "**":
                for every in names:
                    frame.bind(every, value)
            frame.bind(name if known else node.args.kwarg.arg if node.args.kwarg else "", value)
        for name, default in zip(names[::-1], (getattr(function, "__defaults__", None) or ())[::-1], strict=False):
            frame.bind(name, value_of(default))
        relevant = tuple((name, *sorted(map(str, value))) for name, value in sorted(frame.names.items()))
        key = (id(node), id(outer), self.root, relevant)
        if key in self.done:
            return self.done[key]
        self.done[key] = NOTHING  # what a recursive call adds
        frame.run(node.body)
        self.done[key] = frame.returned
        return frame.returned
