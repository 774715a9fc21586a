"""Python's collector of cyclic garbage, which a command does without while it imports and loads what then stays."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collector_off() -> Iterator[Callable[[], None]]:
    """Nothing is collected until the function given is called, which may be again, or the block ends.

    The collector goes through all that there is again and again: a fifth of the time that torch's and transformers'
    modules take. What is there in the end is not gone through before the block ends, either.
    """
    on = gc.isenabled()
    gc.disable()

    def resume() -> None:
        if on and not gc.isenabled():
            gc.freeze()
            gc.enable()

    try:
        yield resume
    finally:
        resume()
        gc.unfreeze()
