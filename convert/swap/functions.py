"""Whose code a function is, and its source: what following code needs to know about functions."""

import ast
import functools
import inspect
import linecache
import sys
import types
from collections.abc import Iterator
from typing import Any

# Code that calls the modules it is given and does not look inside: its functions are not followed.
TRUSTED = {"torch", "transformers", "accelerate", "peft", "bitnet", "numpy", "einops"} | set(sys.stdlib_module_names)
# Where source is missing, a function whose code mentions none of these reads no parameter.
TELLTALE = {"weight", "bias", "parameters", "named_parameters", "get_parameter", "_parameters", "state_dict"}
TELLTALE |= {"getattr", "vars", "__dict__", "attrgetter", "functional_call", "__getattr__", "__getattribute__"}


def root_of(thing: Any) -> str:
    """The package a class or function belongs to; families of models in transformers do not belong to it."""
    home = thing.__globals__.get("__name__") if hasattr(thing, "__globals__") else getattr(thing, "__module__", None)
    home = str(home or "")
    return home if home.startswith("transformers.models.") else home.partition(".")[0]


@functools.lru_cache(maxsize=256)
def _definitions(lines: tuple[str, ...]) -> dict[tuple[str, int], Any]:
    """The function definitions in a source text by name and first line, decorators included."""
    try:
        tree = ast.parse("".join(lines))
    except (SyntaxError, ValueError):
        return {}
    found: dict[tuple[str, int], Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name, first] = node
        elif isinstance(node, ast.Lambda):
            found["<lambda>", node.lineno] = node
    return found


def definition(function: types.FunctionType) -> Any:
    """The source of a function, parsed; None if there is none, or if it is another text than the function's."""
    code = function.__code__
    node = _definitions(_lines(code.co_filename)).get((code.co_name, code.co_firstlineno))
    if node is None:
        return None
    arguments = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
    return node if tuple(arguments) == code.co_varnames[: code.co_argcount] else None


@functools.lru_cache(maxsize=256)
def _lines(filename: str) -> tuple[str, ...]:
    return tuple(linecache.getlines(filename))


def mentions(function: types.FunctionType, classes: list[type]) -> bool:
    """May code without source read a parameter? Looks at the names it uses, and those its helpers and methods use."""
    seen: set[Any] = set()

    def look(function: Any) -> bool:
        if not isinstance(function, types.FunctionType) or function in seen or root_of(function) in TRUSTED:
            return False
        seen.add(function)
        names = {name for code in _codes(function.__code__) for name in (*code.co_names, *map(str, code.co_consts))}
        if names & TELLTALE:
            return True
        helpers = [function.__globals__.get(name) for name in names]
        helpers += [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
        helpers += [inspect.getattr_static(cls, name, None) for name in names for cls in classes]
        return any(look(getattr(helper, "fget", None) or getattr(helper, "__func__", helper)) for helper in helpers)

    return look(function)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
