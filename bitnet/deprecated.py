"""Old spellings of options, which are accepted for a while."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, cast

Function = TypeVar("Function", bound=Callable[..., Any])


def renamed(**spellings: str) -> Callable[[Function], Function]:
    """A function that takes options under old names, too, with a DeprecationWarning: renamed(old="new")."""

    def of(function: Function) -> Function:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            for old in spellings.keys() & options.keys():
                new = spellings[old]
                if new in options:
                    raise TypeError(f"{function.__qualname__}: {old} is the old name of {new}; give one of them")
                warnings.warn(f"{function.__qualname__}: {old} is now {new}", DeprecationWarning, stacklevel=2)
                options[new] = options.pop(old)
            return function(*args, **options)

        return cast(Function, run)

    return of
