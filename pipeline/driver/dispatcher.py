"""Runs the driver's loop, which hands work units to replicas and records what they report. It handles counts, not rows.

`Pool` is the interface to the replicas: workers.cluster.pool runs them on Ray, workers.replica.local_pool runs one in
this process, and tests use a scripted fake. `WorkQueue` (pipeline.driver.work_queue) holds the state and makes the
decisions.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from pipeline.core.errors import JobFailed
from pipeline.core.events import Event
from pipeline.core.types import Assignment, UnitResult, WorkUnit
from pipeline.driver.retry import RetryPolicy
from pipeline.driver.set_aside import Unread
from pipeline.driver.stall import StallWatch
from pipeline.driver.work_queue import WorkQueue

POLL_S = 0.5
"""The seconds for which each turn of the loop waits for events. Before each turn the loop looks at `stop`."""


class Pool(Protocol):
    """All replicas of a job, as the driver's loop sees them: it gives them work and receives their events.

    The pool replaces a lost replica by one with a new name.
    """

    def assign(self, replica: str, work: Assignment) -> None:
        """Give work to a ready replica and return at once. If the replica is gone, its ReplicaLost event follows."""

    def wait(self, timeout_s: float) -> Sequence[Event]:
        """Return the events since the last call in order, or [] if there are none within `timeout_s` seconds.

        Raises ClusterError or JobFailed if no replica can run any more.
        """

    def drop(self, replica: str, reason: str) -> None:
        """End a replica, whatever it is doing. The next wait returns its ReplicaLost event with this reason."""

    def close(self) -> None:
        """Release all replicas, after giving them some seconds to flush their finished rows. Safe to call twice."""


def dispatch(
    units: Sequence[WorkUnit],
    finished: Mapping[str, UnitResult],
    pool: Pool,
    policy: RetryPolicy,
    stop: threading.Event,
    on_event: Callable[[Event | None], None] = lambda _event: None,
    stall: StallWatch | None = None,
    unread: Unread | None = None,
) -> dict[str, UnitResult]:
    """Run every unit that is not in `finished`, and return the results of all units by unit id.

    `on_event` is called with every event, with those of WorkQueue.news, and with None once in each turn of the loop.
    `stall` finds the replicas that make no progress and are to be dropped; it reads a telemetry to which `on_event`
    must pass every event. If it is None, no replica is dropped. `unread`: the rows that are known to be unreadable. The
    caller has to close the pool. Raises JobFailed if `stop` is set, or if the retry policy or `stall` gives the job up:
    after too many attempts, error rows or condemned rows, or if no replica starts or makes progress. Raises
    SetAsideError if all else is done, but some rows cannot be read. Also raises ClusterError, and anything that
    `on_event` raises.
    """
    queue = WorkQueue(units, finished, policy, unread)
    while queue.open:
        if stop.is_set():
            raise JobFailed(f"stopped; {queue.summary()}; submit the same job again to resume")
        for replica, work in queue.hand_out():
            pool.assign(replica, work)
        for event in pool.wait(POLL_S):
            on_event(event)
            queue.take(event)
        for event in queue.news():
            on_event(event)
        if stall is not None:
            for replica, reason in stall.check(queue.busy):
                pool.drop(replica, reason)
        on_event(None)
    queue.check_end()
    return queue.results
