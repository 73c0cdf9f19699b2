"""Tests of the work queue: rows that kill replicas are found, all other rows are done, and no row is handed out twice
at a time."""

import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.driver.retry
from pipeline.core.errors import JobFailed
from pipeline.core.events import (
    Event,
    RangeDone,
    ReplicaLost,
    ReplicaNote,
    ReplicaReady,
    UnitDone,
    UnitFailed,
    UnitProgress,
)
from pipeline.core.types import Assignment, UnitResult, WorkKey
from pipeline.driver.dispatcher import dispatch
from pipeline.driver.retry import PIECES, RetryPolicy
from pipeline.driver.work_queue import WorkQueue
from tests.pipeline.driver.simulated_pool import SimulatedPool, make_units, result_of


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Split units in two, which keeps the tests short."""
    monkeypatch.setattr(pipeline.driver.retry, "PIECES", 2)


def run(
    pool: SimulatedPool, units: int, rows: int, attempts: int, heard: list[Event | None] | None = None
) -> dict[str, UnitResult]:
    hear = ([] if heard is None else heard).append
    return dispatch(make_units(units, rows), {}, pool, RetryPolicy(attempts, 1.0), threading.Event(), hear)


@pytest.mark.slow
@settings(max_examples=300)
@given(
    units=st.integers(1, 12),
    rows=st.integers(1, 40),
    replicas=st.integers(1, 4),
    attempts=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0, 0.01, 0.1, 0.5]),
    max_rows=st.sampled_from([0, 1, 4, 32]),
)
def test_rows_that_kill_are_condemned_and_no_others(
    units: int, rows: int, replicas: int, attempts: int, seed: int, share: float, max_rows: int
) -> None:
    """With any set of killers, exactly these rows become error rows, each unit is published once, and the losses are
    bounded. Replicas hold two units or many."""
    pool = SimulatedPool(replicas, seed, max_rows=max_rows)
    pool.killers = {(f"u{u}", row) for u in range(units) for row in range(rows) if pool.random.random() < share}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.driver.retry, "CONDEMNED_IN_A_ROW", 10_000)
        results = run(pool, units, rows, attempts)
    assert {(unit, row) for unit, rows in pool.condemned.items() for row in rows} == pool.killers
    assert pool.published == {f"u{i}": 1 for i in range(units)}
    assert sum(result.totals.errors for result in results.values()) == len(pool.killers)
    # the logarithm is rounded up, because pieces differ by a row
    losses = 2 * attempts + math.ceil(math.log(rows, PIECES))
    assert all(kills <= losses for kills in pool.kills.values())


@pytest.mark.slow
@settings(max_examples=200)
@given(
    units=st.integers(1, 8),
    rows=st.integers(1, 20),
    replicas=st.integers(1, 4),
    seed=st.integers(0, 2**32),
    faults=st.floats(0, 0.5),
    max_rows=st.sampled_from([0, 1, 4, 32]),
)
def test_losses_of_any_kind_leave_every_row_once(
    units: int, rows: int, replicas: int, seed: int, faults: float, max_rows: int
) -> None:
    """Replicas are lost at any point, are told to leave, and fail at storage, and one row kills, all in one run."""
    pool = SimulatedPool(replicas, seed, {("u0", rows // 2)}, faults, max_rows)
    results = run(pool, units, rows, attempts=40)
    assert results.keys() == pool.published.keys() == {f"u{i}" for i in range(units)}
    assert set(pool.published.values()) == {1}
    for unit in pool.published:
        attempts = [work.attempt for _, work in pool.assigned if work.unit.id == unit and work.rows is None]
        assert attempts == sorted(set(attempts))


def ready(*replicas: str, units: int = 1, rows: int = 8, attempts: int = 1) -> WorkQueue:
    queue = WorkQueue(make_units(units, rows), {}, RetryPolicy(attempts, 1.0))
    for replica in replicas:
        queue.take(ReplicaReady(replica))
    return queue


def given_out(queue: WorkQueue) -> list[tuple[str, str, tuple[int, int] | None]]:
    return [(replica, work.unit.id, work.rows) for replica, work in queue.hand_out()]


def lose(queue: WorkQueue, *replicas: str, **how: bool) -> None:
    """Lose the replicas. Before that, they report that all their work has begun."""
    for replica in replicas:
        begin(queue, replica, *(held.work.key for held in queue._held.get(replica, ())))
        queue.take(ReplicaLost(replica, "killed", **how))


def begin(queue: WorkQueue, replica: str, *keys: WorkKey) -> None:
    for key in keys:
        queue.take(UnitProgress(replica, key, 0, 0, 0))


def test_a_suspect_waits_for_a_replica_that_holds_nothing_and_has_it_alone() -> None:
    queue = ready("a", "b", units=9, attempts=3)
    assert given_out(queue) == [("a", "u0", None), ("b", "u1", None), ("a", "u2", None), ("b", "u3", None)]
    lose(queue, "a")
    for unit in ("u1", "u3"):
        assert given_out(queue) == []  # b gets nothing new, although units wait
        queue.take(UnitDone(result_of(make_units(9)[int(unit[1])], "b", 1)))
    assert given_out(queue) == [("b", "u0", None)]
    queue.take(ReplicaReady("a.2"))
    assert given_out(queue) == [("a.2", "u2", None)]
    queue.take(UnitDone(result_of(make_units(9)[0], "b", 2)))
    assert given_out(queue) == [("b", "u4", None), ("b", "u5", None)]


def test_only_as_many_replicas_run_dry_as_suspects_wait() -> None:
    queue = ready("a", "b", "c", units=12, attempts=3)
    list(queue.hand_out())
    queue.take(UnitFailed("c", Assignment(make_units(12)[2]), "no"))  # no suspect: the replica lives
    assert given_out(queue) == [("c", "u2", None)]
    lose(queue, "a")
    for i in (1, 4):
        queue.take(UnitDone(result_of(make_units(12)[i], "b", 1)))
    assert given_out(queue) == [("b", "u0", None)]
    queue.take(UnitDone(result_of(make_units(12)[5], "c", 1)))
    assert given_out(queue) == []  # c is kept free for u3


def test_a_loss_that_is_no_rows_fault_casts_no_suspicion() -> None:
    queue = ready("a", units=3, attempts=1)
    for life in ("b", "c", "d"):
        assert len(given_out(queue)) == 2
        lose(queue, sorted(queue.busy)[0], excused=True)
        queue.take(ReplicaReady(life))
    work = [work for _, work in queue.hand_out()]
    assert [(w.unit.id, w.rows, w.attempt, w.losses) for w in work] == [("u0", None, 4, 0), ("u1", None, 4, 0)]


@pytest.mark.usefixtures("halves")
def test_a_part_published_by_another_attempt_ends_the_ranges_of_its_unit() -> None:
    queue = ready("a")
    list(queue.hand_out())
    lose(queue, "a")
    for replica in ("b", "c"):
        queue.take(ReplicaReady(replica))
    assert given_out(queue) == [("b", "u0", (0, 4)), ("c", "u0", (4, 8))]
    lose(queue, "c")

    def is_open() -> bool:  # a function, because mypy assumes that an attribute stays what it was asserted to be
        return queue.open

    assert is_open()
    queue.take(UnitDone(result_of(make_units(1, 8)[0], "of another driver", 1)))
    assert not is_open()
    queue.take(RangeDone("b", ("u0", (0, 4))))
    queue.take(UnitProgress("b", ("u0", (0, 4)), 3, 3, 0))
    lose(queue, "b")
    assert not is_open()
    queue.check_end()


@pytest.mark.usefixtures("halves")
def test_the_errors_of_ranges_count_until_their_unit_does() -> None:
    queue = WorkQueue(make_units(1, 200), {}, RetryPolicy(1, 0.1))
    for replica in ("a", "b"):
        queue.take(ReplicaReady(replica))
        list(queue.hand_out())
        lose(queue, replica) if replica == "a" else None
    queue.take(UnitProgress("b", ("u0", (0, 100)), 100, 15, 0))
    queue.take(RangeDone("b", ("u0", (0, 100))))
    list(queue.hand_out())
    with pytest.raises(JobFailed, match="21 of 200 rows"):
        queue.take(UnitProgress("b", ("u0", (100, 200)), 50, 6, 0))


@pytest.mark.usefixtures("halves")
def test_the_errors_of_ranges_and_those_of_their_whole_unit_are_not_added_up() -> None:
    queue = WorkQueue(make_units(1, 200), {}, RetryPolicy(1, 0.1))
    queue.take(ReplicaReady("a"))
    list(queue.hand_out())
    lose(queue, "a")
    queue.take(ReplicaReady("b"))
    for rows in ((0, 100), (100, 200)):
        assert given_out(queue) == [("b", "u0", rows)]
        queue.take(UnitProgress("b", ("u0", rows), 100, 9, 0))
        queue.take(RangeDone("b", ("u0", rows)))
    assert given_out(queue) == [("b", "u0", None)]
    queue.take(UnitProgress("b", ("u0", None), 200, 18, 0, 200))  # 9%, all of them found in segments
    with pytest.raises(JobFailed, match="21 of 200 rows"):
        queue.take(UnitProgress("b", ("u0", None), 200, 21, 0, 200))


def test_a_row_that_kills_while_it_is_read_is_condemned_in_the_end() -> None:
    """A unit or a lone row that had not begun is not blamed for the first losses: something else may have been the
    cause. The replicas of the lone row that had begun it are counted apart from those that had not."""
    queue = WorkQueue(make_units(1, 1), {}, RetryPolicy(2, 1.0))
    given = []
    for replica, begins in zip("abcdefgh", (False, False, False, False, False, True, False, True), strict=True):
        queue.take(ReplicaReady(replica))
        given += [work for _, work in queue.hand_out()]
        if begins:
            begin(queue, replica, given[-1].key)
        queue.take(ReplicaLost(replica, "killed"))
    counts = [(work.rows, work.losses, work.early_losses) for work in given]
    unit, row = None, (0, 1)  # the unit may have shared its replica with other ones
    assert counts[:4] == [(unit, 0, 0), (unit, 0, 1), (unit, 0, 2), (unit, 1, 2)]
    assert counts[4:] == [(row, 0, 0), (row, 0, 1), (row, 1, 1), (row, 1, 2)]
    queue.take(ReplicaReady("i"))
    [(_, work)] = queue.hand_out()
    assert work.condemned is not None
    assert work.attempt == 9


def test_a_condemned_row_is_told_and_is_an_error_row() -> None:
    heard: list[Event | None] = []
    run(SimulatedPool(2, 1, {("u1", 3)}), units=2, rows=10, attempts=2, heard=heard)
    [note] = [event.text for event in heard if isinstance(event, ReplicaNote)]
    assert note.startswith(
        "unit u1 (a.parquet, rows 13 to 13) is given up: the replica died 2 times while it generated"
    )


def test_condemned_rows_count_as_errors_as_the_job_goes() -> None:
    pool = SimulatedPool(2, 1, {("u0", row) for row in range(0, 200, 20)})
    with pytest.raises(JobFailed, match="5 of 200 rows are error rows"):
        dispatch(make_units(1, 200), {}, pool, RetryPolicy(1, 0.02), threading.Event())
    assert not pool.published


def test_replicas_that_die_of_everything_end_the_job() -> None:
    """The job does not condemn 1,000 rows one by one first: the rows are not the cause."""
    pool = SimulatedPool(2, 1, {("u0", row) for row in range(1000)})
    with pytest.raises(JobFailed, match="10 rows one after the other killed every replica that had them"):
        run(pool, units=1, rows=1000, attempts=2)
    assert pool.started < 100


def test_many_rows_that_kill_are_no_reason_to_give_up_while_others_are_generated() -> None:
    pool = SimulatedPool(2, 1, {("u0", row) for row in range(0, 100, 4)})
    run(pool, units=1, rows=100, attempts=1)
    assert len(pool.condemned["u0"]) == 25


@pytest.mark.parametrize("rows", [1, 2])
def test_replicas_that_die_with_nothing_to_generate_end_the_job(rows: int) -> None:
    """The work is the error row of a condemned row, or a unit whose rows are all in segments: no row is to blame."""
    with pytest.raises(JobFailed, match="has no row left to generate, and yet 3 replicas died with it"):
        live(ready(rows=rows), 20)


@pytest.mark.parametrize("refused", [False, True])
def test_starts_that_fail_on_one_node_do_not_end_a_job_whose_other_replica_is_replaced(refused: bool) -> None:
    queue = ready("a", units=3)
    for _ in range(9):
        lose(queue, "b", refused=refused)
    lose(queue, "a")
    lose(queue, "b", "b", refused=refused)  # while the replacement of a is loading
    queue.take(ReplicaReady("a.2"))
    lose(queue, "a.2")
    lose(queue, "b", "b", refused=refused)
    with pytest.raises(JobFailed, match=r"no replica could start|3 replicas died while starting"):
        lose(queue, "b", refused=refused)


def live(queue: WorkQueue, lives: int) -> None:
    """Start `lives` replicas, one after the other. Each finishes the ranges that it is given, and dies with the
    rest."""
    for life in range(lives):
        queue.take(ReplicaReady(f"r{life}"))
        while ranges := [work for _, work in queue.hand_out() if work.rows and not work.condemned]:
            for work in ranges:
                queue.take(RangeDone(f"r{life}", work.key))
        lose(queue, f"r{life}")
