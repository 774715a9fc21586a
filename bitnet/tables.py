"""Tables in a terminal, in a file and in a string."""

from collections.abc import Collection, Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text


def wide() -> Console:
    """A console for tables: as wide as the terminal, and in a file or a pipe as wide as they are."""
    console = Console()
    return console if console.is_terminal else Console(width=1000)


def grid(rows: Iterable[Iterable[str]], right: Collection[int] = ()) -> Table:
    """A table without borders; right: columns that are aligned there, of numbers say."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for number, row in enumerate(rows):
        cells = [Text(cell, no_wrap=True) for cell in row]
        if not number:
            for column in range(len(cells)):
                table.add_column(justify="right" if column in right else "left")
        table.add_row(*cells)
    return table


def text(rows: Iterable[Iterable[str]], right: Collection[int] = ()) -> str:
    """The same as plain text, a line a row, whatever its width."""
    console = Console(width=10_000, color_system=None, force_terminal=False, highlight=False)
    with console.capture() as capture:
        console.print(grid(rows, right))
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
