"""Shows the progress of a run or of a calibration, as lines, as a bar or as JSON records. It shows counts only, never a
prompt.

A line or a bar that cannot be written, because a disk is full or nobody reads it, is left out: no method of a display
raises for that, so that it never ends a job.
"""

import contextlib
import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

import rich.progress
from rich.console import Console

from pipeline.core.events import Event, ReplicaLost, ReplicaNote, SlotLeftOut, UnitFailed
from pipeline.core.streams import UNWRITABLE, say
from pipeline.core.text import counted, time_left
from pipeline.monitoring.logs import event_record, log, use_json
from pipeline.monitoring.telemetry import Snapshot, Telemetry


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run, or of one piece of a calibration, at one moment: as a line of text, as numbers for a bar,
    and as the fields of a JSON record."""

    text: str
    """One line for people."""
    done: int = 0
    total: int | None = None
    """The value of `done` at the end, at least 1. None if it is not known yet: a bar then keeps the one it has."""
    fields: dict[str, Any] = field(default_factory=dict)
    """The fields of the JSON record."""


class Display(ABC):
    """A display of progress and of messages for the operator, on a terminal, in a log file or as JSON."""

    def __init__(self, interval_s: float, clock: Callable[[], float]) -> None:
        self._interval_s, self._clock = interval_s, clock
        self._shown_at = clock()

    def due(self) -> bool:
        """Return whether the last progress was shown at least `interval_s` seconds ago."""
        return self._clock() - self._shown_at >= self._interval_s

    def show(self, progress: Progress) -> None:
        """Show the progress now, whether it is due or not."""
        self._shown_at = self._clock()
        self._put(progress)

    def hear(self, event: Event | None) -> None:
        """Show an event of the driver's loop if it matters to the operator: a note, a lost replica or a failed unit."""
        match event:
            case ReplicaNote(replica, text):
                self.tell(f"{replica}: {text}")
            case ReplicaLost(replica, reason):
                self.tell(f"replica {replica} was lost: {reason}")
            case SlotLeftOut(slot, reason):
                self.tell(reason or f"replica slot {slot} is used again: a replica there has generated a prompt")
            case UnitFailed(replica, work, reason):
                self.tell(f"unit {work.unit.id} failed on replica {replica}: {reason}")

    @abstractmethod
    def tell(self, text: str) -> None:
        """Show a message, which later progress does not replace."""

    @abstractmethod
    def _put(self, progress: Progress) -> None: ...

    def close(self) -> None:  # noqa: B027 (only a bar has something to end)
        """End the display. Only a bar has something to end."""


class LineDisplay(Display):
    """A display for log files: plain lines. Unless `repeats`, a progress line that equals the last one is left out."""

    def __init__(
        self,
        out: TextIO,
        interval_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        *,
        repeats: bool = False,
    ) -> None:
        super().__init__(interval_s, clock)
        self._out, self._repeats, self._last = out, repeats, ""

    def tell(self, text: str) -> None:
        """See Display."""
        say(text, self._out)

    def _put(self, progress: Progress) -> None:
        if self._repeats or progress.text != self._last:
            self._last = progress.text
            self.tell(progress.text)


class BarDisplay(Display):
    """A display on a terminal: a bar with messages above it. If `transient`, the bar vanishes at the end."""

    def __init__(self, console: Console, *, transient: bool = False) -> None:
        super().__init__(0.0, time.monotonic)  # always due: rich draws it a few times a second
        columns = rich.progress.BarColumn(bar_width=24), rich.progress.TextColumn("{task.description}", markup=False)
        self._bar = rich.progress.Progress(*columns, console=console, refresh_per_second=4, transient=transient)
        self._task = self._bar.add_task("", total=None)

    def tell(self, text: str) -> None:
        """See Display."""
        with contextlib.suppress(*UNWRITABLE):
            self._bar.print(text, markup=False, highlight=False)

    def _put(self, progress: Progress) -> None:
        with contextlib.suppress(*UNWRITABLE):
            self._bar.update(self._task, description=progress.text, completed=progress.done, total=progress.total)
            self._bar.start()  # does nothing from the second time on

    def close(self) -> None:
        """See Display."""
        with contextlib.suppress(*UNWRITABLE):
            self._bar.stop()


class JsonDisplay(Display):
    """A display as JSON records, one per line: progress, messages, and each event that is not only progress."""

    def __init__(self, out: TextIO, interval_s: float = 5.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(interval_s, clock)
        use_json(out)

    def hear(self, event: Event | None) -> None:
        """See Display."""
        log(event_record(event), source="driver")

    def tell(self, text: str) -> None:
        """See Display."""
        log((logging.INFO, "note", {"text": text}), source="driver")

    def _put(self, progress: Progress) -> None:
        log((logging.INFO, "progress", progress.fields), source="driver")


def open_display(
    out: TextIO | None = None, interval_s: float = 5.0, *, as_json: bool = False, in_pieces: bool = False
) -> Display:
    """Return the display for `out` (default: stderr): a bar if it is a terminal, else lines every `interval_s` seconds.

    `as_json`: JSON records every `interval_s` seconds instead. `in_pieces`: the progress begins again with each piece
    of the work, as in a calibration. A bar then vanishes at the end, and lines may repeat.
    """
    out = out or sys.stderr
    if as_json:
        return JsonDisplay(out, interval_s)
    if out.isatty():
        return BarDisplay(Console(file=out), transient=in_pieces)
    return LineDisplay(out, interval_s, repeats=in_pieces)


def run_progress(now: Snapshot) -> Progress:
    """Return the progress of a run, with text such as `5/10 rows (50.0%) · 40 tokens/s · 0 errors · ETA 8s · …`."""
    share = now.rows / now.total_rows if now.total_rows else 1.0
    text = (
        f"{now.rows:,}/{now.total_rows:,} rows ({share:.1%}) · {now.tokens_per_s:,.0f} tokens/s · "
        f"{counted(now.errors, 'error')} · ETA {time_left(now.eta_s)} · {counted(now.replicas, 'replica')}"
    )
    if now.left_out:
        text += f", {counted(now.left_out, 'replica slot')} left out"
    fields = {name: round(value, 1) for name, value in asdict(now).items() if value is not None}
    return Progress(text, now.rows, max(now.total_rows, 1), fields)


def show_run(display: Display, telemetry: Telemetry, event: Event | None) -> None:
    """Show an event, which the telemetry must have taken already, and then the progress of the run if it is due."""
    display.hear(event)
    if display.due():
        display.show(run_progress(telemetry.snapshot()))
