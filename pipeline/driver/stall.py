"""Finds replicas that make no progress. The driver's loop asks it once in each turn; it needs no thread and no
cluster."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pipeline.core.errors import JobFailed
from pipeline.core.events import Event, RangeDone, ReplicaActive, UnitDone, UnitProgress
from pipeline.core.types import WorkKey

SHOWN = 5
"""The number of replicas that the error names when the job ends."""


@dataclass(slots=True)
class _Seen:
    """The progress of a replica that holds work."""

    since: float
    """The clock's time in seconds when it last made progress or began to hold work."""
    beats: int | None = None
    doing: str = "nothing heard of it"
    tokens: dict[WorkKey, int] = field(default_factory=dict)
    """Completion tokens that it has generated so far, by the work that it has reported."""


class StallWatch:
    """A watch that drops a replica which holds work and makes no progress for `stall_s` seconds.

    If a replacement makes no progress either, and no row has been generated anywhere since, the job ends, because the
    cause is then not the replica. This happens at least twice `stall_s` after the last row.
    """

    def __init__(self, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_s, self._clock = stall_s, clock
        self._seen: dict[str, _Seen] = {}
        self._row_at = clock()
        self._dropped: list[str] = []  # each replica since the last row, with its last activity

    def take(self, event: Event) -> None:
        """Record one event of the dispatch loop."""
        match event:
            case ReplicaActive(replica, beats, doing) if seen := self._seen.get(replica):
                if beats != seen.beats:
                    seen.since = self._clock()
                seen.beats, seen.doing = beats, doing
            case UnitProgress(replica, key) if seen := self._seen.get(replica):
                generated = event.tokens - event.kept_tokens
                if generated > seen.tokens.get(key, 0):
                    self._row()
                seen.tokens[key] = generated
            case UnitDone(result):
                self._end((result.unit_id, None))
            case RangeDone(_, key):
                self._end(key)

    def check(self, busy: Iterable[str]) -> list[tuple[str, str]]:
        """Return the replicas to drop now, each with the reason, among the ones in `busy`, which hold work. Raises
        JobFailed if the job must end."""
        now = self._clock()
        self._seen = {replica: self._seen.get(replica) or _Seen(now) for replica in busy}
        stalled = {replica: seen for replica, seen in self._seen.items() if now - seen.since >= self._stall_s}
        if not stalled:
            return []
        before = len(self._dropped)
        self._dropped += [f"{replica}: {seen.doing}" for replica, seen in stalled.items()]
        if before and now - self._row_at >= 2 * self._stall_s:
            more = f"; and {len(self._dropped) - SHOWN} more" if len(self._dropped) > SHOWN else ""
            raise JobFailed(
                f"no replica got further for {(now - self._row_at) / 60:.3g} minutes (retry.stall_minutes is "
                f"{self._stall_s / 60:.3g}); what they were doing: {'; '.join(self._dropped[:SHOWN])}{more}; see the "
                "replicas' logs, and submit the job again"
            )
        return [
            (
                replica,
                f"no progress for {(now - seen.since) / 60:.3g} minutes (retry.stall_minutes), last: {seen.doing}",
            )
            for replica, seen in stalled.items()
        ]

    def _end(self, key: WorkKey) -> None:
        for seen in self._seen.values():
            seen.tokens.pop(key, None)
        self._row()

    def _row(self) -> None:
        self._row_at = self._clock()
        self._dropped.clear()
