"""Runs the driver's loop, which hands work units to replicas and records what they report. It handles counts, not rows.

`Pool` is the interface to the replicas: workers.cluster.pool runs them on Ray, workers.replica.local_pool runs one in
this process, and tests use a scripted fake. `WorkQueue` (pipeline.driver.work_queue) holds the state and makes the
decisions.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from pipeline.core.errors import JobFailed
from pipeline.core.events import Event, ReplicaNote
from pipeline.core.types import Assignment, UnitResult, WorkUnit
from pipeline.driver.retry import RetryPolicy, describe
from pipeline.driver.stall import StallWatch
from pipeline.driver.work_queue import WorkQueue

POLL_S = 0.5
"""The longest time in seconds until the loop notices a stop signal."""


class Pool(Protocol):
    """A pool of replicas that work on units. A replica that replaces a lost one gets a new name."""

    def assign(self, replica: str, work: Assignment) -> None:
        """Give work to a ready replica without waiting. If the replica is gone, its ReplicaLost event follows."""

    def wait(self, timeout_s: float) -> Sequence[Event]:
        """Return the events since the last call in order, or [] if there are none within `timeout_s` seconds.

        Raises ClusterError if no replica can ever run.
        """

    def drop(self, replica: str, reason: str) -> None:
        """Throw a replica away, whatever it is doing. The next wait returns its ReplicaLost event with this reason."""

    def close(self) -> None:
        """Release all replicas after they have flushed their finished rows. Safe to call twice."""


def dispatch(
    units: Sequence[WorkUnit],
    finished: Mapping[str, UnitResult],
    pool: Pool,
    policy: RetryPolicy,
    stop: threading.Event,
    on_event: Callable[[Event | None], None] = lambda _event: None,
    stall: StallWatch | None = None,
) -> dict[str, UnitResult]:
    """Run every unit that is not in `finished`, and return the results of all units by unit id.

    `on_event` is called with every event, and with None once in each turn of the loop. `stall` finds replicas that make
    no progress, by a telemetry to which `on_event` passes every event. The caller has to close the pool. Raises
    JobFailed (attempts or error rate exceeded, no replica starts or makes progress, `stop` is set), ClusterError, and
    anything that `on_event` raises.
    """
    queue = WorkQueue(units, finished, policy)
    while queue.open:
        if stop.is_set():
            raise JobFailed(f"stopped; {queue.summary()}; submit the same job again to resume")
        for replica, work in queue.hand_out():
            if work.condemned is not None:
                on_event(ReplicaNote(replica, f"{describe(work)} is given up: {work.condemned}"))
            pool.assign(replica, work)
        for event in pool.wait(POLL_S):
            on_event(event)
            queue.take(event)
        if stall is not None:
            for replica, reason in stall.check(queue.busy):
                pool.drop(replica, reason)
        on_event(None)
    queue.check_end()
    return queue.results
