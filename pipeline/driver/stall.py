"""Finds replicas that make no progress. The driver's loop asks once in each turn, so no thread and no cluster is
needed."""

from collections.abc import Iterable

from pipeline.core.errors import JobFailed
from pipeline.monitoring.telemetry import Telemetry

SHOWN = 5
"""The maximum number of replicas that the error names if the job ends because none makes progress."""


class StallWatch:
    """A watch that finds the replicas which hold work but have made no progress for `stall_s` seconds, for the loop to
    drop them.

    If a replica was dropped and later another one makes no progress either, and for twice `stall_s` no row has been
    generated and no assignment finished anywhere, the job ends, because the replicas are then not the cause.
    """

    def __init__(self, telemetry: Telemetry, stall_s: float) -> None:
        self._telemetry, self._stall_s = telemetry, stall_s
        self._dropped: list[str] = []  # dropped since the last row: name and last activity of each
        self._dropped_at = float("-inf")

    def check(self, busy: Iterable[str]) -> list[tuple[str, str]]:
        """Return (name, reason) of each replica to drop now. `busy`: the replicas that hold work. Raises JobFailed if
        the job must end."""
        run, limit = self._telemetry, self._stall_s
        run.set_busy(busy)
        now = run.clock()
        stalled = [
            (replica, now - state.since, "no report since it got work" if state.beats is None else state.doing)
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
                f"no replica made progress for {(now - run.row_at) / 60:.3g} minutes (retry.stall_minutes is "
                f"{limit / 60:.3g}); what they were doing: {'; '.join(self._dropped[:SHOWN])}{more}; see the replicas' "
                "logs, and submit the job again"
            )
        return [
            (replica, f"no progress for {seconds / 60:.3g} minutes (retry.stall_minutes), last: {doing}")
            for replica, seconds, doing in stalled
        ]
