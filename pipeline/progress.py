"""What a run shows while it goes: rows, tokens a second, errors, time left. Counts only, never a prompt.

`Meter` adds up the dispatch loop's events; `LogProgress` prints a plain line every few seconds, `BarProgress` keeps a
live bar on a terminal, `JsonProgress` logs records. All are called with every event, and with None once a turn.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from pipeline.events import (
    Event,
    RangeDone,
    ReplicaLost,
    ReplicaNote,
    ReplicaReady,
    UnitDone,
    UnitFailed,
    UnitProgress,
)
from pipeline.logs import event_record, log, use_json
from pipeline.types import UnitResult, WorkKey

RATE_WINDOW_S = 60.0
"""Rates are means over this long: steady enough to read, and new enough to show a replica that joined."""
SAMPLE_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Snapshot:
    """How far the job is. Rates are of this run; rows that an earlier run or attempt finished count as done only."""

    rows: int
    total_rows: int
    errors: int
    tokens_per_s: float
    eta_s: float | None
    """None before there is a rate."""
    replicas: int
    rows_per_s: float


class Meter:
    """Counts of one run. Rows of units that are taken back (a lost replica) are taken back here too."""

    def __init__(
        self, total_rows: int, finished: Iterable[UnitResult] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._total_rows = total_rows
        self._done_rows = self._done_errors = 0
        for result in finished:
            self._done_rows += result.totals.rows
            self._done_errors += result.totals.errors
        self._live: dict[WorkKey, UnitProgress] = {}  # what is under way -> its last report
        self._ranges: dict[str, list[UnitProgress]] = {}  # unit -> its ranges that are done, while it is not
        self._replicas: set[str] = set()
        self._computed_rows = self._computed_tokens = 0
        self._samples: deque[tuple[float, int, int]] = deque([(clock(), 0, 0)])  # time, rows and tokens computed

    @property
    def tokens(self) -> int:
        """Completion tokens that this run generated, repeated work included."""
        return self._computed_tokens

    def take(self, event: Event | None) -> None:
        """Record one event of the dispatch loop."""
        match event:
            case ReplicaReady(replica):
                self._replicas.add(replica)
            case ReplicaLost(replica):
                self._replicas.discard(replica)
                self._live = {k: live for k, live in self._live.items() if live.replica != replica}
            case UnitProgress():
                self._advance(event)
            case UnitFailed(_, work):
                self._live.pop(work.key, None)
            case RangeDone(replica, key):
                self._end_range(replica, key)
            case UnitDone():
                self._end_unit(event)
        self._sample()

    def snapshot(self) -> Snapshot:
        """The state now."""
        under_way = [*self._live.values(), *(done for ranges in self._ranges.values() for done in ranges)]
        rows = self._done_rows + sum(live.rows for live in under_way)
        start, start_rows, start_tokens = self._samples[0]
        elapsed = self._clock() - start
        rows_per_s = (self._computed_rows - start_rows) / elapsed if elapsed > 0 else 0.0
        return Snapshot(
            rows=rows,
            total_rows=self._total_rows,
            errors=self._done_errors + sum(live.errors for live in under_way),
            tokens_per_s=(self._computed_tokens - start_tokens) / elapsed if elapsed > 0 else 0.0,
            eta_s=(self._total_rows - rows) / rows_per_s if rows_per_s > 0 else None,
            replicas=len(self._replicas),
            rows_per_s=rows_per_s,
        )

    def _advance(self, now: UnitProgress) -> None:
        before = self._live.get(now.key)
        if now.key[1] is None:  # it has the rows of its ranges
            self._ranges.pop(now.key[0], None)
        rows, tokens = now.rows - now.kept_rows, now.tokens - now.kept_tokens
        if before is None and rows and self._computed_rows == 0:
            # The clock of the rates starts with the first rows, not with the loading of the model.
            self._samples = deque([self._samples[-1]])
        self._computed_rows += rows - (before.rows - before.kept_rows if before else 0)
        self._computed_tokens += tokens - (before.tokens - before.kept_tokens if before else 0)
        self._live[now.key] = now

    def _end_range(self, replica: str, key: WorkKey) -> None:
        unit_id, (first, end) = key[0], key[1] or (0, 0)
        last = self._live.pop(key, UnitProgress(replica, key, 0, 0, 0))
        self._ranges.setdefault(unit_id, []).append(replace(last, rows=end - first))

    def _end_unit(self, event: UnitDone) -> None:
        result = event.result
        totals, key = result.totals, (result.unit_id, None)
        if not result.published_by_other:
            counts = totals.rows, totals.errors, totals.completion_tokens
            self._advance(UnitProgress(result.replica, key, *counts, event.kept_rows, event.kept_tokens))
        self._live = {known: live for known, live in self._live.items() if known[0] != result.unit_id}
        self._ranges.pop(result.unit_id, None)
        self._done_rows += totals.rows
        self._done_errors += totals.errors

    def _sample(self) -> None:
        now = self._clock()
        if self._computed_rows == 0 and self._computed_tokens == 0:
            self._samples[0] = (now, 0, 0)
            return
        if now - self._samples[-1][0] >= SAMPLE_EVERY_S:
            self._samples.append((now, self._computed_rows, self._computed_tokens))
        while len(self._samples) > 1 and now - self._samples[1][0] >= RATE_WINDOW_S:
            self._samples.popleft()


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 48s, 3m20s, 2h05m, 4d03h."""
    whole = round(seconds)
    for size, unit, smaller, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // smaller:02d}{small_unit}"
    return f"{whole}s"


def line(now: Snapshot) -> str:
    """One line that says it all."""
    share = now.rows / now.total_rows if now.total_rows else 1.0
    eta = "?" if now.eta_s is None else duration(now.eta_s)
    return (
        f"{now.rows:,}/{now.total_rows:,} rows ({share:.1%}) · {now.tokens_per_s:,.0f} tokens/s · "
        f"{now.errors:,} errors · ETA {eta} · {now.replicas} {'replica' if now.replicas == 1 else 'replicas'}"
    )


class LogProgress:
    """A plain line every `interval_s`, for logs; and what else is to be told, as it comes."""

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
        """A message beside the progress."""
        print(text, file=self._out, flush=True)

    def close(self) -> None:
        """Print where things stand at the end."""
        self._print()

    def _print(self) -> None:
        self._printed_at = self._clock()
        text = line(self._meter.snapshot())
        if text != self._printed:
            print(text, file=self._out, flush=True)
            self._printed = text


class BarProgress:
    """A live bar on a terminal. It stands still until the first event."""

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
        """A message above the bar."""
        self._bar.print(text, markup=False, highlight=False)

    def close(self) -> None:
        """Draw the bar a last time and leave it."""
        self._update()
        self._bar.stop()

    def _update(self) -> None:
        now = self._meter.snapshot()
        self._bar.update(self._task, description=line(now), completed=now.rows, total=max(now.total_rows, 1))


class JsonProgress:
    """JSON records: of what happens, and of how far the job is every `interval_s`."""

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
        """A message beside the progress."""
        log((logging.INFO, "note", {"text": text}), source="driver")

    def close(self) -> None:
        """Log where things stand at the end."""
        self._log()

    def _log(self) -> None:
        self._logged_at = self._clock()
        counts = {name: round(value, 1) for name, value in asdict(self._meter.snapshot()).items() if value is not None}
        log((logging.INFO, "progress", counts), source="driver")


ShownProgress = LogProgress | BarProgress | JsonProgress


def tell_news(event: Event | None, tell: Callable[[str], None]) -> None:
    """Say what went wrong on the way and is being repeated, and what replicas want the operator to know."""
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
    """The bar where `out` (default: stderr) is a terminal, else lines every `interval_s` seconds; JSON if asked for."""
    out = out or sys.stderr
    if as_json:
        return JsonProgress(meter, out, interval_s)
    if out.isatty():
        return BarProgress(meter, Console(file=out))
    return LogProgress(meter, out, interval_s)
