"""Shows the progress of a run: rows, tokens per second, errors and time left. It shows counts only, never a prompt.

`Meter` (pipeline.monitoring.meter) adds up the events of the dispatch loop. `LogProgress` prints a plain line every few
seconds, `BarProgress` keeps a live bar on a terminal, and `JsonProgress` logs JSON records. Each of them is called with
every event, and with None once per turn of the loop. A calibration has its own displays, `BarShow` and `LogShow`.
"""

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pipeline.core.events import Event, ReplicaLost, ReplicaNote, UnitFailed
from pipeline.core.text import duration
from pipeline.monitoring.logs import event_record, log, use_json
from pipeline.monitoring.meter import Meter, Snapshot


def line(now: Snapshot) -> str:
    """Return a snapshot as one line of text."""
    share = now.rows / now.total_rows if now.total_rows else 1.0
    eta = "?" if now.eta_s is None else duration(now.eta_s)
    return (
        f"{now.rows:,}/{now.total_rows:,} rows ({share:.1%}) · {now.tokens_per_s:,.0f} tokens/s · "
        f"{now.errors:,} errors · ETA {eta} · {now.replicas} {'replica' if now.replicas == 1 else 'replicas'}"
    )


class LogProgress:
    """A progress display for log files: a plain line every `interval_s` seconds, and messages as they come."""

    def __init__(
        self, meter: Meter, out: TextIO, interval_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._meter, self._out, self._interval_s, self._clock = meter, out, interval_s, clock
        self._printed_at = clock()
        self._printed = ""

    def __call__(self, event: Event | None) -> None:
        self._meter.take(event)
        tell_news(event, self.tell)
        if self._clock() - self._printed_at >= self._interval_s:
            self._print()

    def tell(self, text: str) -> None:
        """Print a message between the progress lines."""
        print(text, file=self._out, flush=True)

    def close(self) -> None:
        """Print the state at the end."""
        self._print()

    def _print(self) -> None:
        self._printed_at = self._clock()
        text = line(self._meter.snapshot())
        if text != self._printed:
            print(text, file=self._out, flush=True)
            self._printed = text


class BarProgress:
    """A live bar on a terminal, updated once per turn of the dispatch loop."""

    def __init__(self, meter: Meter, console: Console) -> None:
        self._meter = meter
        columns = BarColumn(bar_width=24), TextColumn("{task.description}", markup=False)
        self._bar = Progress(*columns, console=console, refresh_per_second=4)
        self._task = self._bar.add_task(line(meter.snapshot()), total=1)
        self._bar.start()

    def __call__(self, event: Event | None) -> None:
        self._meter.take(event)
        tell_news(event, self.tell)
        if event is None:
            self._update()

    def tell(self, text: str) -> None:
        """Print a message above the bar."""
        self._bar.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Draw the bar a last time and leave it on the screen."""
        self._update()
        self._bar.stop()

    def _update(self) -> None:
        now = self._meter.snapshot()
        self._bar.update(self._task, description=line(now), completed=now.rows, total=max(now.total_rows, 1))


class JsonProgress:
    """A progress display of JSON records: one for each notable event, and the counts every `interval_s` seconds."""

    def __init__(
        self, meter: Meter, out: TextIO, interval_s: float = 5.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._meter, self._interval_s, self._clock = meter, interval_s, clock
        self._logged_at = clock()
        use_json(out)

    def __call__(self, event: Event | None) -> None:
        self._meter.take(event)
        log(event_record(event), source="driver")
        if self._clock() - self._logged_at >= self._interval_s:
            self._log()

    def tell(self, text: str) -> None:
        """Log a message."""
        log((logging.INFO, "note", {"text": text}), source="driver")

    def close(self) -> None:
        """Log the state at the end."""
        self._log()

    def _log(self) -> None:
        self._logged_at = self._clock()
        counts = {name: round(value, 1) for name, value in asdict(self._meter.snapshot()).items() if value is not None}
        log((logging.INFO, "progress", counts), source="driver")


ShownProgress = LogProgress | BarProgress | JsonProgress


def tell_news(event: Event | None, tell: Callable[[str], None]) -> None:
    """Pass lost replicas, failed units and the notes of replicas to `tell`, as text for the operator."""
    match event:
        case ReplicaNote(replica, text):
            tell(f"{replica}: {text}")
        case ReplicaLost(replica, reason):
            tell(f"replica {replica} was lost: {reason}")
        case UnitFailed(replica, work, reason):
            tell(f"unit {work.unit.id} failed on replica {replica}: {reason}")


def open_progress(
    meter: Meter, out: TextIO | None = None, interval_s: float = 5.0, *, as_json: bool = False
) -> ShownProgress:
    """Return a bar if `out` (default: stderr) is a terminal, else lines every `interval_s` seconds, or JSON on
    request."""
    out = out or sys.stderr
    if as_json:
        return JsonProgress(meter, out, interval_s)
    if out.isatty():
        return BarProgress(meter, Console(file=out))
    return LogProgress(meter, out, interval_s)


class Show(Protocol):
    """A display of the progress of a calibration."""

    def tell(self, text: str) -> None:
        """Show a line that stays on the screen."""

    def begin(self, what: str, left_s: float | None) -> None:
        """Show the next piece of work. `left_s`: estimated seconds for all remaining work, None if not known."""

    def rows(self, done: int, expected: int) -> None:
        """Show how many rows of the current piece of work are done. Called often."""

    def close(self) -> None: ...


class LogShow:
    """A display in plain text: a line for each piece of work, and one every `interval_s` seconds while it runs."""

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
    """A display with a live bar on a terminal."""

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
    """Return a bar if `out` (default: stderr) is a terminal, else a display in plain text."""
    out = out or sys.stderr
    return BarShow(Console(file=out)) if out.isatty() else LogShow(out, interval_s)


def _left(seconds: float | None) -> str:
    return "" if seconds is None else f" · about {duration(seconds)} left"
