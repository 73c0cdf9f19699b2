"""Holds the state of a run: how much is done, how fast rows and tokens are generated, and what each replica does.

It takes each event of the driver's loop once and decides nothing. The progress display, `_job/live.json`, sinks such as
Ray's metrics and the stall watch read this state.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from pipeline.core.error_kinds import ErrorKinds
from pipeline.core.events import (
    Event,
    RangeDone,
    ReplicaActive,
    ReplicaLost,
    ReplicaReady,
    ReplicaStats,
    SlotLeftOut,
    UnitDone,
    UnitFailed,
    UnitProgress,
)
from pipeline.core.types import UnitResult, WorkKey
from pipeline.monitoring.live import Live, LiveReplica

RATE_WINDOW_S = 60.0
"""Seconds over which rates are averaged: long enough to be steady, short enough to show a replica that joined."""
SAMPLE_EVERY_S = 0.5
"""Minimum seconds between two samples of the counts from which rates are computed."""
SHOWN_LOSSES = 5
"""Maximum number of losses, the last ones, that a report lists."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The progress of the job at one moment. Rows that an earlier run or attempt finished count in `rows`, but not in
    the rates."""

    rows: int
    total_rows: int
    errors: int
    tokens_per_s: float
    eta_s: float | None
    """Estimated seconds until the job is done; None if that is not known, as while no rows are finished."""
    replicas: int
    rows_per_s: float
    left_out: int = 0
    """The number of slots that are left out (SlotLeftOut)."""


@dataclass(slots=True)
class ReplicaState:
    """A replica that has loaded its model and is not lost."""

    heard: float
    """Time of its last report, or when it became ready, in seconds since 1970."""
    window: deque[tuple[float, ReplicaStats]]
    """(time, stats) of its reports in the last minute, oldest first. Before them is the last older report, or the
    moment when it became ready, with zero counts."""
    doing: str = "idle"
    since: float | None = None
    """Time when it last made progress or began to hold work; None if it holds none."""
    beats: int | None = None
    """The beats of its last report; None if it holds no work, or has not reported since it began to hold some."""

    def take(self, event: ReplicaActive, now: float, heard: float) -> None:
        """Record a report. `now`: the time by the clock of the run. `heard`: the same time in seconds since 1970."""
        self.heard, self.doing = heard, event.doing
        if self.since is not None and event.beats != self.beats:
            self.since, self.beats = now, event.beats
        if event.stats is not None:
            self.window.append((now, event.stats))
        while len(self.window) > 2 and now - self.window[1][0] >= RATE_WINDOW_S:
            self.window.popleft()

    def line(self, name: str, now: float) -> LiveReplica:
        """Return the state as live.json shows it, with the rates of the window. `now`: the time by the clock of the
        run."""
        (start, first), (_, last) = self.window[0], self.window[-1]
        elapsed = max(now - start, 1.0)  # at least 1 s, so that a report right after the start gives no huge rate
        padded = last.room.padded_tokens - first.room.padded_tokens
        filled = last.room.prefill_tokens - first.room.prefill_tokens
        return LiveReplica(
            name=name,
            doing=self.doing,
            heard=self.heard,
            rows_per_s=_ratio(last.rows - first.rows, elapsed),
            tokens_per_s=_ratio(last.tokens - first.tokens, elapsed),
            batch_rows=_ratio(last.batch_rows - first.batch_rows, last.batched - first.batched),
            tokens_per_forward=_ratio(last.tokens - first.tokens, last.forwards - first.forwards),
            padding_share=1 - filled / padded if padded else 0.0,
            stats=replace(last, error_kinds=()),
        )


def _ratio(above: float, below: float) -> float:
    return above / below if below > 0 else 0.0


class Telemetry:
    """The state of one run, built from its events. Rows reported by an attempt that fails or is lost no longer count as
    done."""

    def __init__(
        self,
        total_rows: int,
        finished: Iterable[UnitResult] = (),
        *,
        total_units: int = 0,
        fingerprint: str = "",
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """Begin a run. `finished`: the units that earlier runs have finished. `clock` gives the times by which rates
        and standstills are measured, `wall_clock` the seconds since 1970."""
        self.clock, self._wall_clock = clock, wall_clock
        self._total_rows, self._total_units, self._fingerprint = total_rows, total_units, fingerprint
        self._units = self._done_rows = self._done_errors = 0
        for result in finished:
            self._count(result)
        self._started = wall_clock()
        self.replicas: dict[str, ReplicaState] = {}
        self.row_at = clock()
        """Time when tokens of a finished row were last reported, or an assignment was done, by any replica; at first,
        the time when the run began."""
        self.tokens = 0
        """Number of completion tokens that this run generated, including those that were generated again after a
        loss."""
        self._computed_rows = 0
        self._samples: deque[tuple[float, int, int]] = deque([(self.row_at, 0, 0)])  # time, rows and tokens computed
        # By unit id, the last report on each assignment in progress. The report on a range that is done stays until its
        # unit is reported as a whole. It then has no replica, so that no loss takes it back.
        self._work: dict[str, dict[WorkKey, UnitProgress]] = {}
        self._open_rows = self._open_errors = 0  # the sums of these reports
        self._lost, self._losses = 0, deque[str](maxlen=SHOWN_LOSSES)
        self._lost_kinds = ErrorKinds()
        self._unit_retries = 0
        self._left_out: dict[str, str] = {}  # by slot, the reason

    def take(self, event: Event | None) -> None:
        """Record one event of the driver's loop, or the end of a turn of the loop (None)."""
        now = self.clock()
        match event:
            case ReplicaReady(replica):
                self.replicas[replica] = ReplicaState(self._wall_clock(), deque([(now, ReplicaStats())]))
            case ReplicaActive(replica) if state := self.replicas.get(replica):
                state.take(event, now, self._wall_clock())
            case ReplicaLost(replica, reason):
                self._lose(replica, reason)
            case UnitProgress():
                self._advance(event, now)
            case UnitFailed(_, work):
                self._unit_retries += 1
                self._drop(work.key)
            case RangeDone(replica, (_, rows) as key):
                first, end = rows or (0, 0)
                last = self._last(key) or UnitProgress(replica, key, 0, 0, 0)
                self._keep(replace(last, replica="", rows=end - first))
                self.row_at = now
            case UnitDone():
                self._end_unit(event, now)
            case SlotLeftOut(slot, ""):
                self._left_out.pop(slot, None)
            case SlotLeftOut(slot, reason):
                self._left_out[slot] = reason
        self._sample(now)

    def set_busy(self, busy: Iterable[str]) -> None:
        """Record which replicas hold work now: `busy` names them. The others are not expected to make progress."""
        now, holding = self.clock(), {*busy}
        for name, state in self.replicas.items():
            if name not in holding:
                state.since = state.beats = None
            elif state.since is None:
                state.since = now

    def snapshot(self) -> Snapshot:
        """Return the counts and rates as they are now."""
        rows = self._done_rows + self._open_rows
        start, start_rows, start_tokens = self._samples[0]
        elapsed = self.clock() - start
        rows_per_s = _ratio(self._computed_rows - start_rows, elapsed)
        return Snapshot(
            rows=rows,
            total_rows=self._total_rows,
            errors=self._done_errors + self._open_errors,
            tokens_per_s=_ratio(self.tokens - start_tokens, elapsed),
            eta_s=self._eta(rows, rows_per_s),
            replicas=len(self.replicas),
            rows_per_s=rows_per_s,
            left_out=len(self._left_out),
        )

    def _eta(self, rows: int, rows_per_s: float) -> float | None:
        """Return the estimated seconds until the job is done, or None if nobody knows. If all rows are finished and
        units are left, only their publishing is left, for example because the storage fails."""
        if rows >= self._total_rows:
            return 0.0 if self._units >= self._total_units else None
        return (self._total_rows - rows) / rows_per_s if rows_per_s > 0 else None

    def picture(self, ended: str | None = None) -> Live:
        """Return the whole state as it is now, for live.json and sinks.

        `ended`: COMPLETE, or the reason why the run ended. If None, the run is still in progress.
        """
        now, date, count = self.clock(), self._wall_clock(), self.snapshot()
        kinds = ErrorKinds(self._lost_kinds.counts())
        for state in self.replicas.values():
            kinds.merge(state.window[-1][1].error_kinds)
        return Live(
            time=date,
            sampled=date,
            fingerprint=self._fingerprint,
            started=self._started,
            ended=ended,
            rows=count.rows,
            total_rows=count.total_rows,
            errors=count.errors,
            units=self._units,
            total_units=self._total_units,
            rows_per_s=count.rows_per_s,
            tokens_per_s=count.tokens_per_s,
            eta_s=count.eta_s,
            replicas=tuple(state.line(name, now) for name, state in self.replicas.items()),
            replicas_lost=self._lost,
            losses=tuple(self._losses),
            unit_retries=self._unit_retries,
            error_kinds=kinds.counts(),
            left_out=tuple(self._left_out.values()),
        )

    def _count(self, result: UnitResult) -> None:
        self._units += 1
        self._done_rows += result.totals.rows
        self._done_errors += result.totals.errors

    def _advance(self, report: UnitProgress, now: float) -> None:
        before = self._last(report.key)
        if before is None and report.key[1] is None:  # a report on the whole unit includes the rows of its ranges
            self._forget(report.key[0])
        rows, tokens = report.rows - report.kept_rows, report.tokens - report.kept_tokens
        if before is None and rows and self._computed_rows == 0:
            # Rates are measured from the first rows on, so that the loading of the model does not count.
            self._samples = deque([self._samples[-1]])
        if before is not None:
            rows, tokens = rows - (before.rows - before.kept_rows), tokens - (before.tokens - before.kept_tokens)
        self._computed_rows += rows
        self.tokens += tokens
        if tokens > 0:
            self.row_at = now
        self._keep(report)

    def _end_unit(self, event: UnitDone, now: float) -> None:
        result = event.result
        if not result.published_by_other:
            totals, key = result.totals, (result.unit_id, None)
            counts = totals.rows, totals.errors, totals.completion_tokens
            self._advance(UnitProgress(result.replica, key, *counts, event.kept_rows, event.kept_tokens), now)
        self._forget(result.unit_id)
        self._count(result)
        self.row_at = now

    def _last(self, key: WorkKey) -> UnitProgress | None:
        return self._work.get(key[0], {}).get(key)

    def _keep(self, report: UnitProgress) -> None:
        """Keep a report in place of the last one on the same assignment."""
        self._drop(report.key)
        self._work.setdefault(report.key[0], {})[report.key] = report
        self._open_rows += report.rows
        self._open_errors += report.errors

    def _drop(self, key: WorkKey) -> None:
        """Drop the last report on an assignment, if there is one."""
        of_unit = self._work.get(key[0], {})
        if report := of_unit.pop(key, None):
            self._open_rows -= report.rows
            self._open_errors -= report.errors
            if not of_unit:
                del self._work[key[0]]

    def _forget(self, unit_id: str) -> None:
        for key in list(self._work.get(unit_id, ())):
            self._drop(key)

    def _lose(self, replica: str, reason: str) -> None:
        self._lost += 1
        self._losses.append(f"{replica}: {reason}")
        reports = [report for of_unit in self._work.values() for report in of_unit.values()]
        for report in reports:
            if report.replica == replica:
                self._drop(report.key)
                self._unit_retries += 1
        if state := self.replicas.pop(replica, None):
            self._lost_kinds.merge(state.window[-1][1].error_kinds)

    def _sample(self, now: float) -> None:
        if self._computed_rows == 0 and self.tokens == 0:
            self._samples[0] = (now, 0, 0)
            return
        if now - self._samples[-1][0] >= SAMPLE_EVERY_S:
            self._samples.append((now, self._computed_rows, self.tokens))
        while len(self._samples) > 1 and now - self._samples[1][0] >= RATE_WINDOW_S:
            self._samples.popleft()
