"""Counts the rows, tokens and errors of one run and computes its rates, from the events of the dispatch loop."""

import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from pipeline.core.events import (
    Event,
    RangeDone,
    ReplicaLost,
    ReplicaReady,
    UnitDone,
    UnitFailed,
    UnitProgress,
)
from pipeline.core.types import UnitResult, WorkKey

RATE_WINDOW_S = 60.0
"""Seconds over which rates are averaged: long enough to be steady, short enough to show a replica that joined."""

SAMPLE_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The progress of the job at one moment. Rows finished by an earlier run or attempt count as done, not in the
    rates."""

    rows: int
    total_rows: int
    errors: int
    tokens_per_s: float
    eta_s: float | None
    """Estimated seconds until the job is done; None before there is a rate."""
    replicas: int
    rows_per_s: float


class Meter:
    """The counts of one run. Rows reported by an attempt that fails or is lost no longer count as done."""

    def __init__(
        self, total_rows: int, finished: Iterable[UnitResult] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._total_rows = total_rows
        self._done_rows = self._done_errors = 0
        for result in finished:
            self._done_rows += result.totals.rows
            self._done_errors += result.totals.errors
        self._live: dict[WorkKey, UnitProgress] = {}  # assignment in progress -> its last report
        self._ranges: dict[str, list[UnitProgress]] = {}  # unfinished unit -> its finished ranges
        self._replicas: set[str] = set()
        self._computed_rows = self._computed_tokens = 0
        self._samples: deque[tuple[float, int, int]] = deque([(clock(), 0, 0)])  # time, rows and tokens computed

    @property
    def tokens(self) -> int:
        """Return the number of completion tokens that this run generated, repeated work included."""
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
        """Return the counts and rates as they are now."""
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
        if now.key[1] is None:  # a report on the whole unit includes the rows of its ranges
            self._ranges.pop(now.key[0], None)
        rows, tokens = now.rows - now.kept_rows, now.tokens - now.kept_tokens
        if before is None and rows and self._computed_rows == 0:
            # Rates are measured from the first rows on, so that the loading of the model does not count.
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
