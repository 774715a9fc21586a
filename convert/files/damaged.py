"""The error of every reader here."""

from pathlib import Path


class Damaged(ValueError):
    """A file is not what it should be: damaged, cut short, contradictory, or made to do harm. Says what to do.

    file:   the file
    what:   is wrong with it, as the rest of a sentence that starts with its name
    remedy: what the user can do
    """

    def __init__(self, file: str | Path, what: str, remedy: str = "copy or download it again") -> None:
        super().__init__(f"{file}: {what}; {remedy}")
