"""A pool of one replica in this process: `--local`, and tests. The same protocol and failures as the Ray pool."""

from collections.abc import Sequence

from pipeline.dispatch import Event, ReplicaLost, ReplicaReady
from pipeline.types import Assignment
from workers.replica import MakeRunner, Replica


class LocalPool:
    """Implements pipeline.dispatch.Pool; the replica works during `wait`."""

    def __init__(self, make_runner: MakeRunner) -> None:
        self._make_runner = make_runner
        self._replica: Replica | None = None
        self._lives = 0

    @property
    def _name(self) -> str:
        return f"local-{self._lives}"

    def assign(self, replica: str, work: Assignment) -> None:
        """See Pool."""
        if self._replica is not None and replica == self._name:
            self._replica.assign(work)

    def wait(self, timeout_s: float) -> Sequence[Event]:
        """See Pool. The first call loads the model and takes as long as that does."""
        if self._replica is None:
            self._lives += 1
            replica = Replica(self._name, self._make_runner)
            report = replica.start()
            if report.fatal is not None:
                return [ReplicaLost(self._name, report.fatal, report.refused)]
            self._replica = replica
            return [ReplicaReady(self._name)]
        report = self._replica.work(timeout_s)
        events: list[Event] = [*report.progress, *report.outcomes]
        if report.fatal is not None:
            self._replica = None
            events.append(ReplicaLost(self._name, report.fatal))
        return events

    def drop(self, replica: str, reason: str) -> None:
        """See Pool."""
        raise NotImplementedError

    def close(self) -> None:
        """See Pool."""
        if self._replica is not None:
            self._replica.close()
            self._replica = None
