"""Tests of how much work a replica gets: rows enough for its engine, shared evenly, and no more than memory allows."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.events import ReplicaLost, ReplicaReady, UnitDone, UnitProgress
from pipeline.driver.holding import FINISHED_UNITS, MOST_UNITS, ROWS_AHEAD, UNITS_AHEAD
from pipeline.driver.retry import RetryPolicy
from pipeline.driver.work_queue import WorkQueue
from tests.pipeline.cases import one_piece
from tests.pipeline.driver.simulated_pool import make_units, result_of

MAX_ROWS = 16
FULL = ROWS_AHEAD * MAX_ROWS


class Replicas:
    """A work queue whose replicas finish rows in the order in which they got them."""

    def __init__(self, sizes: Sequence[int], replicas: int, max_rows: int = MAX_ROWS) -> None:
        self.units = {f"u{i}": one_piece(f"u{i}", "/in/a", "a", 0, rows) for i, rows in enumerate(sizes)}
        self.queue = WorkQueue(list(self.units.values()), {}, RetryPolicy(3, 1.0))
        self.left: dict[str, dict[str, int]] = {f"r{number}": {} for number in range(replicas)}
        """The rows that are left of each unit, by replica and unit."""
        self.given: list[str] = []
        for replica in self.left:
            self.queue.take(ReplicaReady(replica, max_rows))

    def hand_out(self) -> None:
        for replica, work in self.queue.hand_out():
            self.left[replica][work.unit.id] = work.unit.row_count
            self.given.append(work.unit.id)

    def finish(self, replica: str, rows: int, *, publish: bool = True) -> None:
        """Finish this many rows. A unit without rows left is published if `publish` is true."""
        for unit, left in list(self.left[replica].items()):
            done = min(rows, left)
            rows -= done
            self.left[replica][unit] -= done
            total = self.units[unit].row_count
            if done:
                self.queue.take(UnitProgress(replica, (unit, None), total - left + done, 0, 0))
            if publish and done == left:
                del self.left[replica][unit]
                self.queue.take(UnitDone(result_of(self.units[unit], replica, 1)))

    def rows(self, replica: str) -> int:
        return sum(self.left[replica].values())


def test_small_units_are_handed_out_until_their_rows_fill_the_engine() -> None:
    replicas = Replicas([1] * 1000, 2)
    replicas.hand_out()
    assert [len(held) for held in replicas.left.values()] == [FULL, FULL]
    replicas.finish("r1", 10)
    replicas.hand_out()
    assert [len(held) for held in replicas.left.values()] == [FULL, FULL]
    assert len(replicas.given) == 2 * FULL + 10


def test_rows_that_are_finished_in_a_unit_make_room_for_the_next_one() -> None:
    replicas = Replicas([100] * 9, 1)
    replicas.hand_out()
    assert len(replicas.given) == UNITS_AHEAD
    replicas.finish("r0", 136, publish=False)
    replicas.hand_out()
    assert len(replicas.given) == UNITS_AHEAD
    replicas.finish("r0", 1, publish=False)
    replicas.hand_out()
    assert len(replicas.given) == UNITS_AHEAD + 1


def test_a_replica_whose_row_limit_is_not_known_holds_two_units() -> None:
    replicas = Replicas([1] * 9, 1, max_rows=0)
    replicas.hand_out()
    assert len(replicas.given) == UNITS_AHEAD == 2


def test_further_work_goes_to_the_replica_with_the_fewest_rows_left() -> None:
    replicas = Replicas([1] * 1000, 3)
    replicas.hand_out()
    replicas.finish("r0", 3)
    replicas.finish("r1", 5)
    assert [replica for replica, _ in replicas.queue.hand_out()] == ["r1", "r1", "r0", "r1", "r0", "r1", "r0", "r1"]


@settings(max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 40), max_size=300),
    count=st.integers(1, 5),
    max_rows=st.integers(1, 32),
    seed=st.integers(0, 2**32),
)
def test_work_is_shared_evenly_and_nothing_waits_while_a_replica_is_idle(
    sizes: list[int], count: int, max_rows: int, seed: int
) -> None:
    """In any job: no replica is idle while units wait, each holds enough rows as long as there are enough, and no
    replica got a further unit while another one had fewer rows left and wanted more."""
    draw, replicas = random.Random(seed), Replicas(sizes, count, max_rows)
    largest = max(sizes, default=0)
    while replicas.queue.open:
        replicas.hand_out()
        waiting = [work.unit.row_count for work in replicas.queue._waiting]
        rows = [replicas.rows(replica) for replica in replicas.left]
        if waiting:
            assert min(rows) >= max_rows
            assert max(rows) < ROWS_AHEAD * max_rows + 2 * largest
        if sum(waiting) >= 2 * ROWS_AHEAD * max_rows * count:
            assert min(rows) >= ROWS_AHEAD * max_rows
        assert all(len(held) <= MOST_UNITS for held in replicas.left.values())
        busy = [replica for replica in replicas.left if replicas.rows(replica)]
        for replica in draw.sample(busy, draw.randint(1, len(busy))) if busy else []:
            replicas.finish(replica, draw.randint(1, 2 * max_rows))
    assert sorted(replicas.given) == sorted(replicas.units)


@pytest.mark.parametrize("speeds", [(8, 8), (8, 4), (16, 16, 16, 4)])
def test_at_the_end_no_replica_holds_rows_that_an_idle_one_could_compute(speeds: tuple[int, ...]) -> None:
    """When the first replica runs out of work, the rows of every other one fit into the slots of its engine, also if
    it is four times slower."""
    replicas = Replicas([1] * 2000, len(speeds))
    names = list(replicas.left)
    while True:
        replicas.hand_out()
        for name, rows in zip(names, speeds, strict=True):
            replicas.finish(name, rows)
        if any(not replicas.rows(name) for name in names) and not replicas.queue._waiting:
            break
    assert max(replicas.rows(name) for name in names) <= MAX_ROWS


def test_the_last_large_units_go_to_the_replicas_that_need_them() -> None:
    """Four replicas have two units each, and three more units wait. None of these is read in advance: the replica that
    finishes first gets the next one."""
    replicas = Replicas([1000] * 11, 4)
    replicas.hand_out()
    assert len(replicas.given) == 8
    for name in ("r0", "r1", "r2", "r3"):
        replicas.finish(name, 1000)
    replicas.hand_out()
    assert len(replicas.given) == 8
    replicas.finish("r2", 1000 - FULL + 1)
    replicas.hand_out()
    assert {name: len(held) for name, held in replicas.left.items()} == {"r0": 1, "r1": 1, "r2": 2, "r3": 1}


def test_finished_rows_that_cannot_be_published_bound_what_a_replica_gets() -> None:
    """During an outage of the storage they stay in memory."""
    for sizes in ([1] * 1000, [100] * 30, [1, 3, 50] * 100):
        replicas, held = Replicas(sizes, 1), -1
        while held != len(replicas.given):
            held = len(replicas.given)
            replicas.hand_out()
            replicas.finish("r0", 10**6, publish=False)
        kept = sum(replicas.units[unit].row_count for unit in replicas.left["r0"])
        assert kept < max(FULL, FINISHED_UNITS * max(sizes)) + FULL + max(sizes)


def test_a_replica_never_holds_more_than_the_most_units() -> None:
    replicas = Replicas([1] * 1000, 1, max_rows=1000)
    replicas.hand_out()
    assert len(replicas.given) == MOST_UNITS


def test_only_units_that_had_begun_are_suspects_after_a_loss() -> None:
    """The others go to the next replica that has room, all together."""
    queue = WorkQueue(make_units(200, 1), {}, RetryPolicy(3, 1.0))
    queue.take(ReplicaReady("a", MAX_ROWS))
    held = [work.unit.id for _, work in queue.hand_out()]
    assert len(held) == FULL
    for number, unit in enumerate(held):
        queue.take(UnitProgress("a", (unit, None), 0, 0, 0, begun=number < MAX_ROWS))
    for unit in held[:3]:  # finished, but not published yet
        queue.take(UnitProgress("a", (unit, None), 1, 0, 9))
    queue.take(ReplicaLost("a", "killed"))
    assert [work.unit.id for work in queue._suspects] == held[3:MAX_ROWS]
    assert [work.unit.id for work in queue._waiting][: FULL - 13] == [*held[:3], *held[MAX_ROWS:]]
