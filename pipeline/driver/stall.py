"""Finds replicas that make no progress. The driver's loop asks it once in each turn; it needs no thread and no
cluster."""

from collections.abc import Iterable

from pipeline.core.errors import JobFailed
from pipeline.monitoring.telemetry import Telemetry

SHOWN = 5
"""The number of replicas that the error names when the job ends."""


class StallWatch:
    """A watch that drops a replica which holds work and makes no progress for `stall_s` seconds.

    If a replacement makes no progress either, and no row has been generated anywhere since, the job ends, because the
    cause is then not the replica. This happens at least twice `stall_s` after the last row.
    """

    def __init__(self, telemetry: Telemetry, stall_s: float) -> None:
        self._telemetry, self._stall_s = telemetry, stall_s
        self._dropped: list[str] = []  # each replica since the last row, with its last activity
        self._dropped_at = float("-inf")

    def check(self, busy: Iterable[str]) -> list[tuple[str, str]]:
        """Return the replicas to drop now, each with the reason, among the ones in `busy`, which hold work. Raises
        JobFailed if the job must end."""
        run, limit = self._telemetry, self._stall_s
        run.set_busy(busy)
        now = run.clock()
        stalled = [
            (replica, now - state.since, "nothing heard of it" if state.beats is None else state.doing)
            for replica, state in run.replicas.items()
            if state.since is not None and now - state.since >= limit
        ]
        if not stalled:
            return []
        if run.row_at > self._dropped_at:
            self._dropped.clear()
        before, self._dropped_at = len(self._dropped), now
        self._dropped += [f"{replica}: {doing}" for replica, _, doing in stalled]
        if before and now - run.row_at >= 2 * limit:
            more = f"; and {len(self._dropped) - SHOWN} more" if len(self._dropped) > SHOWN else ""
            raise JobFailed(
                f"no replica got further for {(now - run.row_at) / 60:.3g} minutes (retry.stall_minutes is "
                f"{limit / 60:.3g}); what they were doing: {'; '.join(self._dropped[:SHOWN])}{more}; see the replicas' "
                "logs, and submit the job again"
            )
        return [
            (replica, f"no progress for {seconds / 60:.3g} minutes (retry.stall_minutes), last: {doing}")
            for replica, seconds, doing in stalled
        ]
