"""Tests of the dispatch loop with a fake pool: every unit is done exactly once, whatever is lost on the way."""

import random
import threading
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import ClusterError, JobFailed
from pipeline.core.events import (
    Event,
    RangeDone,
    ReplicaActive,
    ReplicaLost,
    ReplicaReady,
    UnitDone,
    UnitFailed,
    UnitProgress,
)
from pipeline.core.types import Assignment, UnitResult, WorkUnit
from pipeline.driver.dispatcher import dispatch
from pipeline.driver.holding import UNITS_AHEAD
from pipeline.driver.retry import RetryPolicy
from pipeline.driver.stall import StallWatch
from pipeline.driver.work_queue import WorkQueue
from pipeline.monitoring.telemetry import Telemetry
from tests.pipeline.driver.simulated_pool import make_units, result_of


class FakePool:
    """A pool whose units are done or fail by chance, and whose replicas can be lost and are then replaced."""

    def __init__(
        self, replicas: int, seed: int, faults: float = 0.0, tell_twice: bool = False, failing: float = 0.5
    ) -> None:
        self.random = random.Random(seed)
        self.faults, self.tell_twice, self.failing = faults, tell_twice, failing
        self.held: dict[str, list[Assignment]] = {}
        self.lives = 0
        self.events: list[Event] = []
        self.assigned: list[tuple[str, str, int]] = []
        for _ in range(replicas):
            self.start()

    def start(self) -> None:
        self.lives += 1
        self.held[f"r{self.lives}"] = []
        self.events.append(ReplicaReady(f"r{self.lives}"))

    def assign(self, replica: str, work: Assignment) -> None:
        assert work.unit.id not in [held.unit.id for held in self.held[replica]]
        self.held[replica].append(work)
        assert len(self.held[replica]) <= UNITS_AHEAD
        if not work.control:
            self.assigned.append((replica, work.unit.id, work.attempt))

    def wait(self, timeout_s: float) -> Sequence[Event]:  # noqa: ARG002
        events, self.events = self.events, []
        busy = [replica for replica, held in self.held.items() if held]
        if events or not busy:
            return events
        replica = self.random.choice(busy)
        work = self.held[replica].pop(self.random.randrange(len(self.held[replica])))
        unit, attempt = work.unit, work.attempt
        draw = self.random.random()
        if work.control:
            self.events.append(RangeDone(replica, work.key))
        elif draw < self.faults * self.failing:
            self.events.append(UnitFailed(replica, work, "storage said no", "save"))
        elif draw < self.faults:
            del self.held[replica]
            self.events.append(ReplicaLost(replica, "killed"))
            if self.tell_twice:  # the part was published just before, and the report is late
                self.events.append(UnitDone(result_of(unit, replica, attempt)))
            self.start()
        else:
            self.events.append(UnitDone(result_of(unit, replica, attempt)))
        return []

    def drop(self, replica: str, reason: str) -> None:
        del self.held[replica]
        self.events.append(ReplicaLost(replica, reason))

    def close(self) -> None:
        pass


def run(units: list[WorkUnit], pool: FakePool, attempts: int = 3, **finished: UnitResult) -> dict[str, UnitResult]:
    return dispatch(units, finished, pool, RetryPolicy(attempts, 0.1), threading.Event())


def test_every_unit_is_done_once_and_finished_ones_are_not_repeated() -> None:
    units, pool = make_units(20), FakePool(3, seed=1)
    results = run(units, pool, u4=result_of(units[4], "earlier", 1))
    assert results.keys() == {unit.id for unit in units}
    assert results["u4"].replica == "earlier"
    assert sorted(unit for _, unit, _ in pool.assigned) == sorted(unit.id for unit in units if unit.id != "u4")


def test_each_replica_gets_one_unit_before_any_gets_two() -> None:
    queue = WorkQueue(make_units(3), {}, RetryPolicy(3, 0.1))
    for replica in ("a", "b"):
        queue.take(ReplicaReady(replica))
    assert [(replica, work.unit.id) for replica, work in queue.hand_out()] == [("a", "u0"), ("b", "u1"), ("a", "u2")]


@settings(max_examples=200)
@given(
    units=st.integers(0, 25),
    replicas=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    faults=st.floats(0, 0.6),
    tell_twice=st.booleans(),
)
def test_any_interleaving_of_losses_gives_every_unit_exactly_once(
    units: int, replicas: int, seed: int, faults: float, tell_twice: bool
) -> None:
    pool = FakePool(replicas, seed, faults, tell_twice)
    results = run(make_units(units), pool, attempts=1000)
    assert results.keys() == {f"u{i}" for i in range(units)}
    for i in range(units):
        attempts = [attempt for _, unit, attempt in pool.assigned if unit == f"u{i}"]
        assert attempts == list(range(1, len(attempts) + 1))


def test_a_unit_that_no_replica_can_save_ends_the_job_after_the_attempts_allowed() -> None:
    pool = FakePool(2, seed=1, faults=1.0, failing=1.0)
    with pytest.raises(JobFailed, match=r"unit u\d .* failed 3 of 3 attempts .* the last time: storage said no"):
        run(make_units(8), pool)
    assert max(attempt for *_, attempt in pool.assigned) == 3


class ScriptedPool(FakePool):
    """A pool that returns the events it was given, turn by turn."""

    def __init__(self, *turns: Sequence[Event]) -> None:
        super().__init__(0, 0)
        self.turns = list(turns)
        self.held = {"a": [], "b": []}

    def wait(self, timeout_s: float) -> Sequence[Event]:  # noqa: ARG002
        if self.events:
            events, self.events = self.events, []
            return events
        if not self.turns:
            raise ClusterError("no node has room")
        return self.turns.pop(0)


def test_error_rate_is_checked_as_the_job_goes() -> None:
    units = make_units(10, rows=100)
    pool = ScriptedPool(
        [ReplicaReady("a")], [UnitProgress("a", ("u0", None), 90, 19, 5)], [UnitProgress("a", ("u0", None), 91, 21, 6)]
    )
    with pytest.raises(JobFailed, match="21 of 200 rows"):
        run(units, pool)
    assert not pool.turns


def test_known_bad_rows_at_the_head_of_a_unit_do_not_end_the_job() -> None:
    queue = WorkQueue(make_units(1, rows=1000), {}, RetryPolicy(3, 0.1))
    queue.take(ReplicaReady("a"))
    list(queue.hand_out())
    queue.take(UnitProgress("a", ("u0", None), 100, 100, 0))  # the first 100 rows: a tenth of the unit


def test_errors_reported_by_a_lost_replica_are_taken_back() -> None:
    queue = WorkQueue(make_units(1, rows=1000), {}, RetryPolicy(3, 0.1))
    for replica in ("a", "b"):
        queue.take(ReplicaReady(replica))
        list(queue.hand_out())
        queue.take(UnitProgress(replica, ("u0", None), 90, 90, 0))
        queue.take(ReplicaLost(replica, "killed"))


def test_error_rate_of_a_small_job_is_judged_at_its_end_resumed_rows_included() -> None:
    units = make_units(2)
    with pytest.raises(JobFailed, match="3 of 20 rows"):
        run(units, FakePool(1, seed=1), u0=result_of(units[0], "earlier", 1, errors=3))


def test_a_replica_that_stands_still_is_dropped_and_its_work_goes_to_another() -> None:
    pool = ScriptedPool([ReplicaReady("a")], *[[ReplicaActive("a", 7, "generating")]] * 40, [ReplicaReady("b")])
    heard: list[Event | None] = []
    telemetry = Telemetry(10, clock=lambda: 60.0 * heard.count(None))  # a turn takes a minute

    def hear(event: Event | None) -> None:
        telemetry.take(event)
        heard.append(event)

    with pytest.raises(ClusterError):
        dispatch(make_units(1), {}, pool, RetryPolicy(3, 0.1), threading.Event(), hear, StallWatch(telemetry, 600))
    [lost] = [event for event in heard if isinstance(event, ReplicaLost)]
    assert (lost.replica, lost.reason) == ("a", "no progress for 10 minutes (retry.stall_minutes), last: generating")
    assert [replica for replica, *_ in pool.assigned] == ["a", "b"]


def test_start_up_failures_end_the_job_with_their_reason() -> None:
    with pytest.raises(JobFailed, match="no replica could start: shard 2 is missing"):
        run(make_units(1), ScriptedPool([ReplicaLost("a", "shard 2 is missing", refused=True)]))
    with pytest.raises(JobFailed, match="3 replicas died while starting: out of memory"):
        run(make_units(1), ScriptedPool(*[[ReplicaLost(f"r{i}", "out of memory")] for i in range(3)]))


def test_a_cluster_without_room_ends_the_job() -> None:
    with pytest.raises(ClusterError, match="no node has room"):
        run(make_units(1), ScriptedPool())


def test_stop_ends_the_loop_and_says_how_to_resume() -> None:
    stop = threading.Event()
    units, pool = make_units(5), FakePool(1, seed=3)

    def stop_after_two(event: Event | None) -> None:
        done.extend([event] if isinstance(event, UnitDone) else [])
        if len(done) == 2:
            stop.set()

    done: list[Event] = []
    with pytest.raises(JobFailed, match="stopped; 2 of 5 units are done; submit the same job again to resume"):
        dispatch(units, {}, pool, RetryPolicy(3, 0.1), stop, stop_after_two)


def test_the_drivers_memory_does_not_grow_with_rows() -> None:
    """400 units of 1,000,000 rows need as much memory as 400 units of 10 rows. The larger numbers alone may add up to
    200 KB."""

    def peak(rows: int) -> int:
        tracemalloc.start()
        units = make_units(400, rows)
        dispatch(units, {}, FakePool(4, seed=1), RetryPolicy(3, 0.1), threading.Event())
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    peak(10)  # so that what is made only once is not counted
    assert peak(1_000_000) - peak(10) < 200_000
