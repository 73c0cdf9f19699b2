"""Tests of the work queue: rows that kill replicas are found, all other rows are done, and no row is handed out twice
at a time."""

import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.driver.retry
import pipeline.driver.slots
from pipeline.core.errors import JobFailed
from pipeline.core.events import (
    Event,
    RangeDone,
    ReplicaActive,
    ReplicaLost,
    ReplicaNote,
    ReplicaReady,
    ReplicaStats,
    SlotLeftOut,
    UnitDone,
    UnitFailed,
    UnitProgress,
)
from pipeline.core.types import Assignment, Piece, UnitResult, WorkKey, WorkUnit
from pipeline.driver.dispatcher import dispatch
from pipeline.driver.retry import PIECES, RetryPolicy
from pipeline.driver.set_aside import SetAsideError
from pipeline.driver.slots import BARREN_LIVES, LIVES_ALONE
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
    losses = attempts + max(attempts, min(2, replicas)) + math.ceil(math.log(rows, PIECES))
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.driver.slots, "BARREN_LIVES", 10_000)  # so many losses by chance look like a sick slot
        results = run(pool, units, rows, attempts=40)
    assert results.keys() == pool.published.keys() == {f"u{i}" for i in range(units)}
    assert set(pool.published.values()) == {1}
    for unit in pool.published:
        attempts = [work.attempt for _, work in pool.assigned if work.unit.id == unit and work.rows is None]
        assert attempts == sorted(set(attempts))


@pytest.mark.slow
@settings(max_examples=200)
@given(
    units=st.integers(1, 8),
    rows=st.integers(1, 20),
    replicas=st.integers(1, 3),
    sick=st.integers(1, 3),
    attempts=st.integers(1, 3),
    seed=st.integers(0, 2**32),
    share=st.sampled_from([0, 0.05, 0.3]),
    max_rows=st.sampled_from([0, 4, 32]),
)
def test_a_sick_slot_condemns_no_healthy_row(
    units: int, rows: int, replicas: int, sick: int, attempts: int, seed: int, share: float, max_rows: int
) -> None:
    """Some slots kill whatever they get. All rows that kill in healthy slots are condemned, and no others, and every
    row is done."""
    slots = frozenset(f"r{number}" for number in range(sick))
    pool = SimulatedPool(replicas + sick, seed, max_rows=max_rows, sick=slots)
    pool.killers = {(f"u{u}", row) for u in range(units) for row in range(rows) if pool.random.random() < share}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.driver.retry, "CONDEMNED_IN_A_ROW", 10_000)
        run(pool, units, rows, attempts)
    assert {(unit, row) for unit, rows in pool.condemned.items() for row in rows} == pool.killers
    assert pool.published == {f"u{i}": 1 for i in range(units)}


@pytest.mark.parametrize("replicas", [1, 2, 5])
@pytest.mark.parametrize("attempts", [1, 3])
def test_an_environment_in_which_nothing_is_generated_ends_the_job_and_condemns_nothing(
    replicas: int, attempts: int
) -> None:
    pool = SimulatedPool(replicas, 1, sick=frozenset(f"r{number}" for number in range(replicas)))
    heard: list[Event | None] = []
    with pytest.raises(JobFailed, match="died one after the other before they generated a row"):
        run(pool, units=9, rows=20, attempts=attempts, heard=heard)
    assert not pool.condemned
    assert not any(work.rows and not work.control for _, work in pool.assigned), "no row was tried alone"
    assert min(pool.deaths.values()) == BARREN_LIVES, "it ends with the third death in the last slot"


def test_a_slot_is_left_out_after_three_barren_lives_and_used_again_after_a_control() -> None:
    queue = ready("r0", units=20)
    for life in range(4):
        queue.take(ReplicaReady(f"r1.{life}", node="n1"))
        given = [work for replica, work in queue.hand_out() if replica == f"r1.{life}"]
        assert given[0].control == (life > 0), "only the first life gets rows at once"
        assert life == 0 or len(given) == 1
        if life < 3:
            queue.take(ReplicaLost(f"r1.{life}", "sick"))
    [news] = queue.news()
    assert isinstance(news, SlotLeftOut)
    assert "replica slot r1 on node n1 is left out, because its last 3 replicas died before" in news.reason
    queue.take(RangeDone("r1.3", given[0].key))
    assert queue.news() == [SlotLeftOut("r1", "")]
    assert not any(work.control for replica, work in queue.hand_out() if replica == "r1.3")


def test_replicas_on_the_node_of_a_sick_slot_begin_with_a_control() -> None:
    queue = ready("r0", units=20)
    queue.take(ReplicaReady("r1", node="n1"))
    queue.take(ReplicaLost("r1", "sick"))
    for replica, node in (("r2", "n1"), ("r3", "n2")):
        queue.take(ReplicaReady(replica, node=node))
        given = [work for name, work in queue.hand_out() if name == replica]
        assert given[0].control == (node == "n1")


@pytest.mark.parametrize("starts", [False, True])
def test_a_sick_slot_ends_the_job_in_the_end_if_the_only_healthy_one_does_not_come_back(starts: bool) -> None:
    """The node of r0 is gone for good, and r1 is sick. A replica of r0 that is loading has time for that."""
    queue = ready("r0", units=20)
    queue.take(ReplicaReady("r1.0", node="n1"))
    for life in range(LIVES_ALONE + 3):  # while r0 is there, r1 may die as often as it likes
        queue.take(ReplicaLost(f"r1.{life}", "sick"))
        queue.take(ReplicaReady(f"r1.{life + 1}", node="n1"))
    queue.take(ReplicaLost("r0", "its node is gone"))
    for life in range(LIVES_ALONE + 3, 2 * LIVES_ALONE + 2):
        queue.take(ReplicaLost(f"r1.{life}", "sick"))
        queue.take(ReplicaReady(f"r1.{life + 1}", node="n1"))
        list(queue.hand_out())
        if starts:
            queue.take(ReplicaLost("r0.2", "its node is gone"))  # it does not become ready
    with pytest.raises(JobFailed, match="died one after the other before they generated a row"):
        queue.take(ReplicaLost(f"r1.{2 * LIVES_ALONE + 2}", "sick"))


def test_an_excused_loss_makes_no_slot_doubtful() -> None:
    queue = ready("r0", units=20)
    queue.take(ReplicaReady("r1"))
    list(queue.hand_out())
    queue.take(ReplicaLost("r1", "told to leave", excused=True))
    queue.take(ReplicaReady("r1.2"))
    assert not any(work.control for _, work in queue.hand_out())


def condemn_the_only_row() -> WorkQueue:
    """Return the queue of a job of one row, after every replica has died with it, each after a control."""
    queue = ready(units=1, rows=1, attempts=1)
    for life in range(2):
        queue.take(ReplicaReady(f"r0.{life}"))
        if life:
            pass_control(queue, f"r0.{life}")
        [(_, work)] = queue.hand_out()
        assert (work.rows, work.condemned) == ((0, 1) if life else None, ())
        begin(queue, f"r0.{life}", work.key)
        queue.take(ReplicaLost(f"r0.{life}", "killed"))
    return queue


def pass_control(queue: WorkQueue, replica: str) -> None:
    [(name, work)] = queue.hand_out()
    assert (name, work.control) == (replica, True)
    queue.take(RangeDone(replica, work.key))


def test_a_condemned_row_becomes_an_error_row_when_a_second_control_shows_that_the_row_was_the_cause() -> None:
    """The replica that died with the row had generated one control before, and nothing else. A second control after the
    first one, where the row would have been, is the judgement."""
    queue = condemn_the_only_row()
    queue.take(ReplicaReady("r0.2"))
    pass_control(queue, "r0.2")
    pass_control(queue, "r0.2")
    [(_, work)] = queue.hand_out()
    assert (work.rows, [position for position, _ in work.condemned]) == (None, [0])


def test_a_control_that_is_reported_twice_is_no_judgement() -> None:
    queue = condemn_the_only_row()
    queue.take(ReplicaReady("r0.2"))
    [(_, work)] = queue.hand_out()
    queue.take(RangeDone("r0.2", work.key))
    queue.take(RangeDone("r0.2", work.key))
    [(_, work)] = queue.hand_out()
    assert work.control


def test_a_condemned_row_is_dropped_when_the_second_control_kills_as_well() -> None:
    queue = condemn_the_only_row()
    for life in range(2, 5):
        queue.take(ReplicaReady(f"r0.{life}"))
        pass_control(queue, f"r0.{life}")
        [(_, work)] = queue.hand_out()
        assert work.control
        if life < 4:
            queue.take(ReplicaLost(f"r0.{life}", "killed"))
    with pytest.raises(JobFailed, match=r"1 row killed every replica .* 3 replicas died with a control prompt"):
        queue.take(ReplicaLost("r0.4", "killed"))


def test_a_control_that_kills_when_nothing_is_to_be_judged_any_more_is_no_failed_judgement() -> None:
    """Three replicas get a control for the judgement at the same time. A part of another driver ends the judgement, and
    then they die."""
    queue = condemn_the_only_row()
    for slot in ("r1", "r2", "r3"):
        queue.take(ReplicaReady(slot))
    for replica, work in list(queue.hand_out()):
        queue.take(RangeDone(replica, work.key))
    assert [work.control for _, work in queue.hand_out()] == [True] * 3
    queue.take(UnitDone(result_of(make_units(1, 1)[0], "of another driver", 1)))
    for slot in ("r1", "r2", "r3"):
        queue.take(ReplicaLost(slot, "killed"))
    assert not queue.open


def test_a_unit_of_many_files_loses_only_the_one_that_cannot_be_read() -> None:
    """All other rows of the unit go to segments, and the end names what is missing."""
    pieces = tuple(Piece(f"/in/{n}.parquet", f"{n}.parquet", 0, 2, 1, "s") for n in range(20))
    unit, other = WorkUnit("packed", pieces), make_units(1)[0]
    queue = WorkQueue([unit, other], {}, RetryPolicy(2, 1.0))
    join(queue, "a")
    done: set[int] = set()
    while queue.open:
        for replica, work in list(queue.hand_out()):
            first, end = work.span
            if work.unit.id == other.id:
                queue.take(UnitDone(result_of(other, replica, 1)))
            elif first <= 14 < end:  # position 14 is in 7.parquet
                queue.take(UnitFailed(replica, work, "a page is corrupt"))
            else:
                done |= set(range(first, end))
                queue.take(RangeDone(replica, work.key))
    assert done == set(range(40)) - {14, 15}
    [note] = queue.news()
    assert isinstance(note, ReplicaNote)
    assert note.warning == "unit packed (7.parquet, rows 0 to 1) is set aside: a page is corrupt"
    with pytest.raises(SetAsideError, match=r"1 of 2 units .* 2 rows cannot be read: 7\.parquet, rows 0 to 1 of unit"):
        queue.check_end()


def test_a_unit_whose_rows_are_all_saved_is_set_aside_if_its_files_cannot_be_read_any_more() -> None:
    """Its ranges end without a read, because their rows are in segments. The unit is not split again and again."""
    pieces = tuple(Piece(f"/in/{n}.parquet", f"{n}.parquet", 0, 2, 1, "s") for n in range(4))
    queue = WorkQueue([WorkUnit("packed", pieces)], {}, RetryPolicy(2, 1.0))
    join(queue, "a")
    given: list[tuple[int, int] | None] = []
    while queue.open and len(given) < 100:
        [(replica, work)] = list(queue.hand_out())[:1]
        given.append(work.rows)
        failed = UnitFailed(replica, work, "a page is corrupt")
        queue.take(failed if work.rows is None else RangeDone(replica, work.key))
    assert given == [None, None, (0, 2), (2, 4), (4, 6), (6, 8), None, None]
    with pytest.raises(SetAsideError, match=r"1 of 1 unit .* 8 rows cannot be read: .*: a page is corrupt"):
        queue.check_end()


def test_units_that_are_known_to_be_unreadable_are_not_handed_out() -> None:
    units = make_units(2)
    queue = WorkQueue(units, {}, RetryPolicy(2, 1.0), {"u0": {(0, 10): "gone"}})
    join(queue, "a")
    assert given_out(queue) == [("a", "u1", None)]
    queue.take(UnitDone(result_of(units[1], "a", 1)))
    assert not queue.open
    with pytest.raises(SetAsideError, match=r"1 of 2 units .* 10 rows .*: gone"):
        queue.check_end()


def ready(*replicas: str, units: int = 1, rows: int = 8, attempts: int = 1) -> WorkQueue:
    queue = WorkQueue(make_units(units, rows), {}, RetryPolicy(attempts, 1.0))
    for replica in replicas:
        join(queue, replica)
    return queue


def join(queue: WorkQueue, replica: str) -> None:
    """Add a replica that has generated a row already."""
    queue.take(ReplicaReady(replica))
    queue.take(ReplicaActive(replica, 1, "idle", ReplicaStats(rows=1)))


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
    join(queue, "c")
    assert given_out(queue) == [("c", "u2", None)]
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
        join(queue, replica)
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
        join(queue, replica)
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
    join(queue, "a")
    list(queue.hand_out())
    lose(queue, "a")
    join(queue, "b")
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
        join(queue, replica)
        given += [work for _, work in queue.hand_out()]
        if begins:
            begin(queue, replica, given[-1].key)
        queue.take(ReplicaLost(replica, "killed"))
    counts = [(work.rows, work.losses, work.early_losses) for work in given]
    unit, row = None, (0, 1)  # the unit may have shared its replica with other ones
    assert counts[:4] == [(unit, 0, 0), (unit, 0, 1), (unit, 0, 2), (unit, 1, 2)]
    assert counts[4:] == [(row, 0, 0), (row, 0, 1), (row, 1, 1), (row, 1, 2)]
    join(queue, "i")  # which has generated a row of the job since: the judgement
    [(_, work)] = queue.hand_out()
    assert (work.rows, [position for position, _ in work.condemned], work.attempt) == (None, [0], 10)


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


def test_other_suspects_are_tried_before_too_many_neighbours_are_given_up() -> None:
    """A dozen rows beside each other kill the only replica, and nothing but suspects is left."""
    pool = SimulatedPool(1, 1, {("u0", row) for row in range(50, 62)})
    run(pool, units=1, rows=200, attempts=3)
    assert pool.condemned["u0"] == set(range(50, 62))


@pytest.mark.parametrize("replicas", [1, 3])
def test_a_job_of_which_only_rows_that_kill_are_left_completes(replicas: int) -> None:
    """All other rows are in segments, so none can be generated for the first time. A finished one is generated once
    more after ten rows that were given up, which shows that the replicas are not the cause."""
    pool = SimulatedPool(replicas, 1, {("u0", row) for row in range(50)})
    pool.segments["u0"] = set(range(50, 200))
    results = run(pool, units=1, rows=200, attempts=2)
    assert results["u0"].totals.errors == 50
    assert pool.condemned["u0"] == set(range(50))


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
        join(queue, f"r{life}")
        while ranges := [work for _, work in queue.hand_out() if work.rows]:
            for work in ranges:
                queue.take(RangeDone(f"r{life}", work.key))
        lose(queue, f"r{life}")
