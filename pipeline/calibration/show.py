"""What a calibration shows while it goes: a bar on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pipeline.progress import duration


class Show(Protocol):
    """Takes what is going on."""

    def tell(self, text: str) -> None:
        """A line that stays."""

    def begin(self, what: str, left_s: float | None) -> None:
        """The next piece of work; about how long all that is left takes."""

    def rows(self, done: int, expected: int) -> None:
        """How far the piece of work is. Called often."""

    def close(self) -> None: ...


class LogShow:
    """A line for each piece of work, and one every `interval_s` while it goes on."""

    def __init__(self, out: TextIO, interval_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._out, self._interval_s, self._clock = out, interval_s, clock
        self._what, self._said_at = "", clock()

    def tell(self, text: str) -> None:
        """See Show."""
        print(text, file=self._out, flush=True)

    def begin(self, what: str, left_s: float | None) -> None:
        """See Show."""
        self._what, self._said_at = what + _left(left_s), self._clock()
        self.tell(self._what)

    def rows(self, done: int, expected: int) -> None:
        """See Show."""
        if self._clock() - self._said_at >= self._interval_s:
            self._said_at = self._clock()
            self.tell(f"{self._what} · {done:,}/{expected:,} rows")

    def close(self) -> None:
        """See Show."""


class BarShow:
    """A live bar."""

    def __init__(self, console: Console) -> None:
        columns = BarColumn(bar_width=24), TextColumn("{task.description}", markup=False)
        self._bar = Progress(*columns, console=console, refresh_per_second=4, transient=True)
        self._task = self._bar.add_task("", total=None)
        self._what = ""
        self._bar.start()

    def tell(self, text: str) -> None:
        """See Show."""
        self._bar.print(text, markup=False, highlight=False)

    def begin(self, what: str, left_s: float | None) -> None:
        """See Show."""
        self._what = what + _left(left_s)
        self._bar.update(self._task, description=self._what, completed=0, total=None)

    def rows(self, done: int, expected: int) -> None:
        """See Show."""
        self._bar.update(self._task, description=f"{self._what} · {done:,}/{expected:,} rows", completed=done)
        self._bar.update(self._task, total=max(1, expected))

    def close(self) -> None:
        """See Show."""
        self._bar.stop()


def open_show(out: TextIO | None = None, interval_s: float = 5.0) -> LogShow | BarShow:
    """The bar where `out` (default: stderr) is a terminal, else lines."""
    out = out or sys.stderr
    return BarShow(Console(file=out)) if out.isatty() else LogShow(out, interval_s)


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f" · about {duration(seconds)} left"
