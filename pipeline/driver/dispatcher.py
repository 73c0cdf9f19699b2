"""The driver's loop: hands work to replicas and hears what became of it. It sees counts, never rows.

`Pool` is the seam: workers.cluster.pool runs replicas on Ray, workers.replica.local_pool one in this process, tests a
scripted fake. `Board` (pipeline.driver.work_queue) is the state and decides.
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
"""The longest that a stop signal waits for the loop, in seconds."""


class Pool(Protocol):
    """Replicas that work on units. A name is used for one life of a replica; its replacement has a new one."""

    def assign(self, replica: str, work: Assignment) -> None:
        """Give work to a ready replica. Never waits; where the replica is gone, its ReplicaLost follows."""

    def wait(self, timeout_s: float) -> Sequence[Event]:
        """What happened since the last call, in order; [] after `timeout_s`.

        Raises ClusterError where no replica can ever run.
        """

    def drop(self, replica: str, reason: str) -> None:
        """Throw a replica away, whatever it does; its ReplicaLost, with this reason, comes from the next wait."""

    def close(self) -> None:
        """Let go of all replicas, once they have flushed the rows that they finished; safe to call twice."""


def dispatch(
    units: Sequence[WorkUnit],
    finished: Mapping[str, UnitResult],
    pool: Pool,
    policy: RetryPolicy,
    stop: threading.Event,
    on_event: Callable[[Event | None], None] = lambda _event: None,
    stall: StallWatch | None = None,
) -> dict[str, UnitResult]:
    """Run every unit that is not in `finished`; returns the results of all of them by unit id.

    `on_event` hears every event, and None once a turn. `stall` finds replicas that stand still. Raises JobFailed
    (attempts or error rate exceeded, no replica starts or gets further, `stop` set), ClusterError, and what `on_event`
    raises. Closing the pool is the caller's.
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
                stall.take(event)
        if stall is not None:
            for replica, reason in stall.check(queue.busy):
                pool.drop(replica, reason)
        on_event(None)
    queue.check_end()
    return queue.results
