"""Notices replicas that stand still. No clock of its own and no cluster: the driver's loop asks it once a turn."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pipeline.core.errors import JobFailed
from pipeline.core.events import Event, RangeDone, ReplicaActive, UnitDone, UnitProgress
from pipeline.core.types import WorkKey

SHOWN = 5
"""Replicas named where the job ends."""


@dataclass(slots=True)
class _Seen:
    """A replica that holds work."""

    since: float
    """When it last got further, or began to hold work."""
    beats: int | None = None
    doing: str = "nothing heard of it"
    tokens: dict[WorkKey, int] = field(default_factory=dict)
    """Generated so far, of what it has reported."""


class StallWatch:
    """Drops a replica that holds work and does not get further for `stall_s` seconds.

    A replacement that stands still as well, with no row generated anywhere since, ends the job: then it is not the
    replica. That is twice `stall_s` after the last row at the earliest.
    """

    def __init__(self, stall_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_s, self._clock = stall_s, clock
        self._seen: dict[str, _Seen] = {}
        self._row_at = clock()
        self._dropped: list[str] = []  # since the last row: each replica, and what it was doing

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
        """The replicas to drop now, among those that hold work, and why. Raises JobFailed."""
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
