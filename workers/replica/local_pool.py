"""Provides a pool of one replica in the driver's process, for `--local` and for tests.

It implements the same protocol as the pool on Ray and reports failures in the same way.
"""

from collections.abc import Sequence

from pipeline.core.errors import JobFailed
from pipeline.core.events import Event, ReplicaLost, ReplicaReady
from pipeline.core.types import Assignment
from workers.replica.replica import FLUSH_S, MakeRunner, Replica, Report


class LocalPool:
    """A pipeline.driver.dispatcher.Pool of one replica, which works only during `wait`: if it hangs, the driver hangs.

    The next `wait` replaces a lost replica: local-1, then local-2.
    """

    def __init__(self, make_runner: MakeRunner) -> None:
        self._make_runner = make_runner
        self._replica: Replica | None = None
        self._lives = 0
        self._dropped: list[Event] = []

    @property
    def _name(self) -> str:
        return f"local-{self._lives}"

    def assign(self, replica: str, work: Assignment) -> None:
        """See Pool."""
        if self._replica is not None and replica == self._name:
            self._replica.assign(work)

    def wait(self, timeout_s: float) -> Sequence[Event]:
        """See Pool. If there is no replica, this makes one, and returns only when its model is loaded.

        Raises JobFailed if this process can no longer use its GPU, because a new replica in it would fail too.
        """
        if self._dropped:
            events, self._dropped = self._dropped, []
            return events
        if self._replica is None:
            self._lives += 1
            self._replica = Replica(self._name, self._make_runner)
            report = self._replica.start()
            return self._hear(report, ReplicaReady(self._name, report.max_rows))
        return self._hear(self._replica.work(timeout_s))

    def drop(self, replica: str, reason: str) -> None:
        """See Pool."""
        if self._replica is not None and replica == self._name:
            self.close()
            self._dropped.append(ReplicaLost(replica, reason))

    def close(self) -> None:
        """See Pool."""
        if self._replica is not None:
            self._replica.stop(FLUSH_S)
            self._replica.close()
            self._replica = None

    def _hear(self, report: Report, *first: Event) -> list[Event]:
        if report.fatal is None:
            return [*first, *report.events]
        if report.device_lost:
            raise JobFailed(
                f"{report.fatal}; finished rows are saved: submit the same job again to resume, and if it fails again, "
                "look for Xid errors in dmesg"
            )
        self._replica = None
        return [*report.events, ReplicaLost(self._name, report.fatal, report.refused)]
