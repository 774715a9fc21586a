"""How far a long job has got: a bar on a terminal; elsewhere, in a log file or a pipe, a plain line now and then."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Self, TypeVar

from rich import progress as bars
from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

T = TypeVar("T")
SHARE = 0.1  # of the job from one line to the next, but
SHORTEST, LONGEST = 1, 30  # seconds between two lines, as long as the job reports


class Progress:
    """Shows one job while it runs: `with Progress("training", 1250, "steps", console) as bar: ... bar.advance()`.

    what:      the job's name
    total:     how much there is to do, in `unit`, a plural: "steps"; "bytes" are shown as kB, MB, GB
    console:   where to show it; a quiet one shows nothing
    done:      how much an earlier run did; it counts for the share, and not for the rate
    transient: leave nothing behind: no bar in the end, and no line before the job has taken LONGEST seconds
    """

    def __init__(
        self, what: str, total: float, unit: str, console: Console, *, done: float = 0, transient: bool = False
    ) -> None:
        self.what, self.total, self.unit, self.console, self.transient = what, total, unit, console, transient
        self.done = self.before = min(done, total)
        self.fields: tuple[str, ...] = ()
        self.bar: bars.Progress | None = None

    def __enter__(self) -> Self:
        self.start = self.shown_at = self.console.get_time()
        self.shown = self.done
        if self.console.is_interactive:
            columns = bars.TextColumn("{task.description}", markup=False), bars.BarColumn(20), _Status(self)
            self.bar = bars.Progress(*columns, console=self.console, transient=self.transient)
            self.task = self.bar.add_task(self.what, total=self.total)
            self.bar.update(self.task, completed=self.done)
            self.bar.start()
        else:
            self._line()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.done = self.total
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
            self.bar.stop()
        elif kind is None:
            self._line()

    def advance(self, amount: float = 1, *fields: str) -> None:
        """Say that `amount` more is done; `fields` are what else to show, "loss 0.5"."""
        self.update(self.done + amount, *fields)

    def update(self, done: float, *fields: str) -> None:
        """The same with all that is done."""
        self.done, self.fields = min(done, self.total), fields
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)
            return
        waited = self.console.get_time() - self.shown_at
        due = waited >= LONGEST or (waited >= SHORTEST and self.done - self.shown >= SHARE * self.total)
        if due and self.done < self.total:  # else the last line is about to come
            self._line()

    def status(self) -> str:
        """Done, total, time left, fields, rate and time taken: in this order, since a narrow terminal cuts the end."""
        elapsed = self.console.get_time() - self.start
        rate = (self.done - self.before) / elapsed if elapsed > 0 else 0
        share = self.done / self.total if self.total else 1
        parts = [f"{self._amount(self.done)}/{self._amount(self.total, self.unit)} ({100 * share:.0f} %)"]
        if rate and share < 1:
            parts.append(f"{_clock((self.total - self.done) / rate)} left")
        parts += self.fields
        if rate:
            parts += [f"{self._amount(rate, self.unit)}/s", f"{_clock(elapsed)} elapsed"]
        return ", ".join(parts)

    def _amount(self, number: float, unit: str = "") -> str:
        if self.unit == "bytes":
            return decimal(int(number))
        digits = f"{number:,.0f}" if number >= 100 or number == int(number) else f"{number:.3g}"
        return f"{digits} {unit}".rstrip()

    def _line(self) -> None:
        self.shown, self.shown_at = self.done, self.console.get_time()
        if self.transient and self.shown_at - self.start < LONGEST:
            return
        text = f"{self.what}: {self.status()}"
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)  # flushes


def track(items: Collection[T], what: str, unit: str, console: Console) -> Iterator[T]:
    """The items one by one, with a transient Progress that counts them."""
    with Progress(what, len(items), unit, console, transient=True) as progress:
        for item in items:
            yield item
            progress.advance()


@contextmanager
def without_bars() -> Iterator[None]:
    """transformers shows no bars of its own: for files that take milliseconds."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class _Status(bars.ProgressColumn):
    """Progress.status as it is at each refresh, so that the clock goes on while the job does not report."""

    def __init__(self, job: Progress) -> None:
        super().__init__()
        self.job = job

    def render(self, task: bars.Task) -> Text:
        return Text(self.job.status(), no_wrap=True, overflow="ellipsis")


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
