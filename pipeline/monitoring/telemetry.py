"""Adds up the reports of a run's replicas for `_job/live.json` and for sinks such as Ray's metrics.

It receives every event of the driver's loop and decides nothing. A sink that fails is reported once and removed; it
never ends a job.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pipeline.core.error_kinds import ErrorKinds
from pipeline.core.events import (
    Event,
    RangeDone,
    ReplicaActive,
    ReplicaLost,
    ReplicaReady,
    ReplicaStats,
    UnitDone,
    UnitFailed,
    UnitProgress,
)
from pipeline.core.types import WorkKey
from pipeline.monitoring.live import Live, LiveFile, LiveReplica
from pipeline.monitoring.meter import RATE_WINDOW_S, Meter

SAMPLE_S = 2.0
"""Seconds between two pictures of the run, the same as between two reports of a replica."""
SHOWN_LOSSES = 5
Sink = Callable[[Live], None]
"""A function that receives each picture of the run, for example workers.cluster.metrics."""


@dataclass(slots=True)
class _Seen:
    """A replica that has loaded its model and is not lost."""

    heard: float
    window: deque[tuple[float, ReplicaStats]]
    """(time, stats) of its reports in the last minute, after the last older report or a start with zero counts."""
    doing: str = "idle"
    holds: set[WorkKey] = field(default_factory=set)
    """Keys of the assignments that it has reported as in progress."""

    def take(self, now: float, event: ReplicaActive) -> None:
        self.heard, self.doing = now, event.doing
        if event.stats is not None:
            self.window.append((now, event.stats))
        while len(self.window) > 2 and now - self.window[1][0] >= RATE_WINDOW_S:
            self.window.popleft()

    def line(self, name: str, now: float) -> LiveReplica:
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


class Watch:
    """A summary of the whole run, called with every event after the meter, and with None once per turn of the loop."""

    def __init__(
        self,
        meter: Meter,
        file: LiveFile,
        *,
        fingerprint: str,
        units: int,
        total_units: int,
        sinks: Sequence[Sink] = (),
        tell: Callable[[str], None] = lambda _text: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Make the first picture. `units`: number of units finished before. `tell`: shows a message to the operator."""
        self._meter, self._file, self._clock, self._tell = meter, file, clock, tell
        self._fingerprint, self._units, self._total_units = fingerprint, units, total_units
        self._sinks = list(sinks)
        self._started = clock()
        self._seen: dict[str, _Seen] = {}
        self._lost, self._losses = 0, deque[str](maxlen=SHOWN_LOSSES)
        self._lost_kinds = ErrorKinds()
        self._unit_retries = 0
        self._show(self._started)

    def __call__(self, event: Event | None) -> None:
        now = self._clock()
        match event:
            case ReplicaReady(replica):
                self._seen[replica] = _Seen(now, deque([(now, ReplicaStats())]))
            case ReplicaActive(replica) if seen := self._seen.get(replica):
                seen.take(now, event)
            case UnitProgress(replica, key) if seen := self._seen.get(replica):
                seen.holds.add(key)
            case UnitDone(result):
                self._units += 1
                self._let_go((result.unit_id, None))
            case RangeDone(_, key):
                self._let_go(key)
            case UnitFailed(_, work):
                self._unit_retries += 1
                self._let_go(work.key)
            case ReplicaLost(replica, reason):
                self._lose(replica, reason)
        if event is None and not 0 <= now - self._sampled < SAMPLE_S:
            self._show(now)

    def close(self, ended: str | None) -> None:
        """Pass on the last picture, with how the run ended. None: write nothing, as another driver owns the job."""
        live = None if ended is None else self.picture(ended)
        if live is not None:
            self._pass_on(live)
        self._file.close(live)

    def picture(self, ended: str | None = None) -> Live:
        """Return the state of the run as it is now."""
        now, count = self._clock(), self._meter.snapshot()
        kinds = ErrorKinds(self._lost_kinds.counts())
        for seen in self._seen.values():
            kinds.merge(seen.window[-1][1].error_kinds)
        return Live(
            time=now,
            sampled=now,
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
            replicas=tuple(seen.line(name, now) for name, seen in self._seen.items()),
            replicas_lost=self._lost,
            losses=tuple(self._losses),
            unit_retries=self._unit_retries,
            error_kinds=kinds.counts(),
        )

    def _show(self, now: float) -> None:
        self._sampled = now
        live = self.picture()
        self._file.show(live)
        self._pass_on(live)

    def _pass_on(self, live: Live) -> None:
        for sink in list(self._sinks):
            try:
                sink(live)
            except Exception as error:  # whatever a sink raises, the job continues without it
                self._sinks.remove(sink)
                self._tell(f"metrics are off from now on: {type(error).__name__}: {' '.join(str(error).split())}")

    def _let_go(self, key: WorkKey) -> None:
        for seen in self._seen.values():
            seen.holds.discard(key)

    def _lose(self, replica: str, reason: str) -> None:
        self._lost += 1
        self._losses.append(f"{replica}: {reason}")
        if seen := self._seen.pop(replica, None):
            self._unit_retries += len(seen.holds)
            self._lost_kinds.merge(seen.window[-1][1].error_kinds)
