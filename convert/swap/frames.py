"""A function while it is followed, statement by statement, with the objects that its names may be."""

import ast
import builtins
import inspect
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

# What a packed layer's bias still answers as before, and one parameter as well as another.
METADATA = {"dtype", "device", "is_cuda", "is_meta", "requires_grad", "shape", "ndim", "dim", "size", "numel"}
NAMED = {"named_parameters", "named_modules", "named_children", "named_buffers", "items"}  # give pairs with a name
INSPECTING = set(map(id, (isinstance, hasattr, id, len, type, print, callable, repr, str)))
PASSING = set(
    map(id, (enumerate, zip, reversed, list, tuple, iter, sorted, set, frozenset, dict, filter, next, min, max))
)


class Bound(NamedTuple):
    owner: Any
    function: Any  # a Python function, or a nested definition


class Nested(NamedTuple):
    node: Any
    frame: "Frame"


class Super(NamedTuple):
    owner: Any
    cls: type


class OneOf(NamedTuple):
    """One or several of the parameters under a module: it is not known which."""

    module: nn.Module


class Opaque:
    """What trusted code returned: calling it is no worse than calling trusted code."""


OPAQUE = Opaque()


class Some(NamedTuple):
    """One of the modules in a module."""

    module: nn.Module


MARKERS = Bound, Nested, Super, OneOf, Some
Value = dict[Any, Any]  # the objects that an expression may be, by identity
NOTHING: Value = {}


def key_of(thing: Any) -> Any:
    return (id(thing[0]), id(thing[1])) if isinstance(thing, Bound | Nested | Super) else id(thing)


def value_of(*things: Any) -> Value:
    return {key_of(thing): thing for thing in things if thing is not None}


def union(values: Iterable[Value]) -> Value:
    found: Value = {}
    for value in values:
        found |= value
    return found


def dict_of(thing: Any) -> dict[str, Any]:
    try:
        return object.__getattribute__(thing, "__dict__")
    except AttributeError:
        return {}


def _is_none(module: nn.Module, name: str) -> bool:
    """Is this attribute None, or is there none? Runs no property."""
    if isinstance(inspect.getattr_static(type(module), name, None), property):
        return False
    try:
        return getattr(module, name) is None
    except Exception:  # a stranger's __getattr__ may raise anything
        return True


class Frame:
    """A function while it is followed: what its names may be."""

    def __init__(self, follower: Any, function: Any, outer: "Frame | None") -> None:
        self.follower, self.function, self.outer = follower, function, outer
        self.names: dict[str, Value] = {}
        self.returned: Value = {}

    def bind(self, name: str, value: Value) -> None:
        self.names[name] = self.names.get(name, NOTHING) | value

    def lookup(self, name: str) -> Value:
        frame: Frame | None = self
        while frame is not None:
            if name in frame.names:
                return frame.names[name]
            frame = frame.outer
        code = self.function.__code__
        if name in code.co_freevars:
            try:
                return self.follower.unbound(self.function.__closure__[code.co_freevars.index(name)].cell_contents)
            except ValueError:  # still empty
                return NOTHING
        if name in self.function.__globals__:
            return self.follower.unbound(self.function.__globals__[name])
        return value_of(getattr(builtins, name, None))

    # Statements

    def run(self, body: list[ast.stmt] | ast.expr) -> None:
        """Follow the body of a function, a block, or a lambda."""
        if isinstance(body, ast.expr):
            self.returned = self.evaluate(body)
            return
        for statement in body:
            self.statement(statement)

    def statement(self, node: ast.AST) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                found = self.evaluate(value)
                for target in targets:
                    self.assign(target, found)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self.assign(target, self.evaluate(value))
            case ast.AugAssign(target=target, value=value):
                self.use(value)
                self.use(target)
            case (
                ast.For(target=target, iter=iterated, body=body, orelse=orelse)
                | ast.AsyncFor(target=target, iter=iterated, body=body, orelse=orelse)
            ):
                for _ in range(2):  # the second time with what the first has assigned
                    self.loop(target, iterated)
                    self.run(body)
                self.run(orelse)
            case ast.While(test=test, body=body, orelse=orelse):
                for _ in range(2):
                    self.evaluate(test)
                    self.run(body)
                self.run(orelse)
            case ast.With(items=items, body=body) | ast.AsyncWith(items=items, body=body):
                for item in items:
                    entered = self.evaluate(item.context_expr)
                    if item.optional_vars is not None:
                        self.assign(item.optional_vars, entered)
                self.run(body)
            case ast.If(test=ast.BoolOp(values=[ast.Attribute(attr="training"), *_])) if self.follower.settled(node):
                pass
            case ast.Return(value=ast.expr() as value):
                self.returned = self.returned | self.evaluate(value)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                self.bind(name, value_of(Nested(node, self)))
                self.follower.body(node, self.function, [], {}, self)
            case ast.Expr(value=value):
                self.evaluate(value)
            case ast.ClassDef() | ast.Import() | ast.ImportFrom():
                self.imported(node)
            case ast.stmt() | ast.ExceptHandler() | ast.match_case():
                for child in ast.iter_child_nodes(node):
                    if isinstance(child, ast.expr):
                        self.evaluate(child)
                    else:
                        self.statement(child)

    def loop(self, target: ast.expr, iterated: ast.expr) -> None:
        match target, iterated:
            case ast.Tuple(elts=[_, second]), ast.Call(func=ast.Name(id="enumerate"), args=[counted, *_]):
                self.loop(second, counted)
            case ast.Tuple(elts=[_, second]), ast.Call(func=ast.Attribute(attr=method)) if method in NAMED:
                self.assign(second, self.follower.elements(self.evaluate(iterated)))
            case ast.Tuple(elts=targets), ast.Call(func=ast.Name(id="zip"), args=args) if len(targets) == len(args):
                for each, arg in zip(targets, args, strict=True):
                    self.loop(each, arg)
            case _:
                self.assign(target, self.follower.elements(self.evaluate(iterated)))

    def imported(self, node: ast.AST) -> None:
        for alias in getattr(node, "names", []):
            module = sys.modules.get(getattr(node, "module", None) or alias.name)
            found = getattr(module, alias.name, OPAQUE) if isinstance(node, ast.ImportFrom) else module or OPAQUE
            self.bind(alias.asname or alias.name, value_of(found))

    def assign(self, target: ast.AST, value: Value) -> None:
        match target:
            case ast.Name(id=name):
                self.bind(name, value)
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                for each in targets:
                    self.assign(each, self.follower.elements(value))
            case ast.Starred(value=each):
                self.assign(each, value)
            case ast.Attribute(value=owner, attr=name):
                for thing in self.evaluate(owner).values():
                    known = self.follower.stored.setdefault((id(thing), name), {})
                    known |= value
            case ast.Subscript(value=owner):
                if isinstance(owner, ast.Name):
                    self.bind(owner.id, value)

    # Expressions

    def use(self, node: ast.AST) -> Value:
        """The value of an expression that something is computed from."""
        value = self.evaluate(node)
        self.follower.read(value)
        return value

    def evaluate(self, node: ast.AST) -> Value:
        """What an expression may be, once what it uses inside has been recorded."""
        match node:
            case ast.Constant(value=constant):
                return value_of(constant) if isinstance(constant, int | str) else NOTHING
            case ast.Name(id=name):
                return self.lookup(name)
            case ast.Attribute(value=owner, attr=name):
                value = self.evaluate(owner)
                if name != "device" and hasattr(Tensor, name):
                    self.follower.read(value, metadata=name in METADATA)
                return union(self.follower.attribute(thing, name) for thing in value.values())
            case ast.Subscript(value=owner, slice=index):
                value = self.evaluate(owner)
                self.follower.read({key: thing for key, thing in value.items() if not isinstance(thing, OneOf)})
                self.use(index)
                try:
                    return self.follower.item(value, ast.literal_eval(index))
                except ValueError:
                    return self.follower.elements(value)
            case ast.Call():
                return self.call(node)
            case ast.Compare(left=left, ops=[ast.Is() | ast.IsNot()], comparators=[right]):
                self.evaluate(left)
                self.evaluate(right)
                return NOTHING
            case ast.BoolOp(values=parts) | ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
                return union(self.evaluate(part) for part in parts)
            case ast.Dict(values=parts):
                return union(self.evaluate(part) for part in parts)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                self.evaluate(test)
                return self.evaluate(body) | self.evaluate(orelse)
            case ast.NamedExpr(target=target, value=assigned):
                value = self.evaluate(assigned)
                self.assign(target, value)
                return value
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                for generator in node.generators:
                    self.loop(generator.target, generator.iter)
                    for condition in generator.ifs:
                        self.evaluate(condition)
                return self.evaluate(node.value if isinstance(node, ast.DictComp) else node.elt)
            case ast.Lambda():
                self.follower.body(node, self.function, [], {}, self)
                return value_of(Nested(node, self))
            case ast.Starred(value=each) | ast.Await(value=each):
                return self.evaluate(each)
            case ast.YieldFrom(value=each):
                self.returned = self.returned | self.follower.elements(self.evaluate(each))
                return NOTHING
            case ast.Yield(value=ast.expr() as each):
                self.returned = self.returned | self.evaluate(each)
                return NOTHING
            case ast.JoinedStr():
                return NOTHING
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.use(child)
        return NOTHING

    def call(self, node: ast.Call) -> Value:
        args: list[Value] = []
        for arg in node.args:
            value = self.evaluate(arg)
            args += [self.follower.elements(value)] * 8 if isinstance(arg, ast.Starred) else [value]
        kwargs = {keyword.arg or "**": self.evaluate(keyword.value) for keyword in node.keywords}
        functions = self.evaluate(node.func)
        every = union([*args, *kwargs.values()])
        match node.func:
            case ast.Attribute(value=ast.Name(id=name), attr="append" | "extend" | "insert" | "add" | "update"):
                self.bind(name, every)
                return NOTHING
        if not functions and isinstance(node.func, ast.Attribute) and self.missing(node.func):
            return NOTHING
        if not functions:  # a method of something unknown, such as a tensor, or an argument that is called
            self.follower.suspect(every, "code that cannot be followed")
            return every if self.follower.carries(every) else NOTHING
        if getattr in functions.values() and len(args) > 1:
            return self.getattr(node.args[1], args)
        return union(self.one_call(function, args, kwargs) for function in functions.values())

    def getattr(self, name: ast.expr, args: list[Value]) -> Value:
        things, default = args[0], args[2] if len(args) > 2 else NOTHING
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            return default | union(self.follower.attribute(thing, name.value) for thing in things.values())
        modules = [thing for thing in things.values() if isinstance(thing, nn.Module)]
        return default | value_of(*map(OneOf, modules), *(child for module in modules for child in module.children()))

    def missing(self, node: ast.Attribute) -> bool:
        """Is it an attribute that is None, or that is not there, as the model stands? Then it cannot be called."""
        owners = self.evaluate(node.value).values()
        if not owners:
            return isinstance(node.value, ast.Attribute) and self.missing(node.value)
        return all(isinstance(owner, nn.Module) and _is_none(owner, node.attr) for owner in owners)

    def one_call(self, function: Any, args: list[Value], kwargs: dict[str, Value]) -> Value:
        follower = self.follower
        if function is super:
            return self.super()
        if id(function) in INSPECTING:
            return NOTHING
        if function is vars:
            return value_of(*(getattr(thing, "__dict__", None) for thing in args[0].values())) if args else NOTHING
        if function is map and args:
            given = [follower.elements(arg) for arg in args[1:]]
            return union(self.one_call(each, given, {}) for each in args[0].values())
        if id(function) in PASSING:
            return follower.elements(union(args))
        return follower.call(function, args, kwargs)

    def super(self) -> Value:
        """What super() is; the class that it is called in stands in a cell of the function."""
        names = self.function.__code__.co_varnames
        owners = self.lookup(names[0]) if names else NOTHING
        classes = [cls for cls in self.lookup("__class__").values() if isinstance(cls, type)]
        return value_of(*(Super(owner, cls) for owner in owners.values() for cls in classes))
