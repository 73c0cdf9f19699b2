"""Tests of a replica that dies, with the pool in this process: the reported reason, and who does its work then."""

from pathlib import Path

import pytest

from model.errors import CheckpointError
from pipeline.core.errors import JobFailed
from pipeline.core.events import (
    ReplicaActive,
    ReplicaLost,
    ReplicaNote,
    ReplicaReady,
    ReplicaStats,
    UnitDone,
    UnitProgress,
)
from pipeline.core.types import Assignment
from tests.waiting import PATIENCE_S, wait_until
from tests.workers.fakes import FakeEngine, FakeMaker, make_runner, run_locally
from tests.workers.jobs import open_job, prompts_of
from tests.workers.units.engines import BREAK, MarkedMaker, finished_rows, segment_rows
from workers.replica.local_pool import LocalPool
from workers.replica.replica import Replica
from workers.units.runner import UnitRunner


def begin(replica: Replica) -> None:
    """Let the replica read its unit. It reports that before it generates a row."""
    progress, _ = replica.work(PATIENCE_S).events
    assert isinstance(progress, UnitProgress)
    assert (progress.rows, progress.begun) == (0, True)


def test_what_the_engine_raises_ends_the_replica_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = open_job(tmp_path, prompts_of(10))
    replica = Replica("r0", lambda _name: make_runner(small, FakeEngine(fail_at=range(2, 100))))
    assert replica.start().fatal is None
    replica.assign(Assignment(small.plan.units[0], 1))
    begin(replica)
    assert replica.work(PATIENCE_S).fatal is None  # it has generated its first row
    report = replica.work(PATIENCE_S)
    assert (report.fatal, report.refused) == ("the forward failed", False)
    assert replica.work(1).fatal == "the forward failed"
    assert "EngineError: the forward failed" in capsys.readouterr().err


def test_a_unit_assigned_twice_ends_the_replica(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = open_job(tmp_path, prompts_of(10))
    replica = Replica("r0", lambda _name: make_runner(small, FakeEngine()))
    replica.start()
    for attempt in (1, 2):
        replica.assign(Assignment(small.plan.units[0], attempt))
    assert "is already on replica r0" in (replica.work(1).fatal or "")
    assert "ValueError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "text", "refused"),
    [
        (CheckpointError("shard 2 is missing"), "shard 2 is missing", True),
        (ZeroDivisionError("1/0"), "ZeroDivisionError: 1/0", False),
    ],
)
def test_what_start_up_raises_is_reported(
    error: Exception, text: str, refused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """A traceback is printed only if the error is a fault of the program."""

    def fail(_name: str) -> UnitRunner:
        raise error

    report = Replica("r0", fail).start()
    assert (report.fatal, report.refused) == (text, refused)
    assert ("Traceback" in capsys.readouterr().err) != refused


class UnluckyMaker(FakeMaker):
    """A maker whose first `lives` replicas get an engine that breaks after a few steps."""

    lives = 2

    def __call__(self, replica: str) -> UnitRunner:
        runner = super().__call__(replica)
        if self.lives:
            self.lives -= 1
            runner._engine.fail_at = range(5, 10_000)  # type: ignore[attr-defined]
        return runner


def test_local_pool_repeats_what_a_dead_engine_held(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(95))
    results = run_locally(small, LocalPool(UnluckyMaker(small.spec)))
    assert sum(result.totals.rows for result in results.values()) == 95
    assert [row["completion"] for row in small.rows()] == [prompt[::-1] for prompt in prompts_of(95)]
    assert max(result.attempt for result in results.values()) > 1


def test_local_pool_finds_the_row_that_breaks_the_engine(tmp_path: Path) -> None:
    prompts = prompts_of(40)
    prompts[23] = BREAK
    small = open_job(tmp_path, prompts, rows_per_file=20)
    results = run_locally(small, LocalPool(MarkedMaker(small.spec)), attempts=2)
    assert sum(result.totals.errors for result in results.values()) == 1
    rows = small.rows()
    assert rows.pop(23)["error"].startswith(
        "the replica died 2 times while it generated this row alone; the last time: "
    )
    assert [row["completion"] for row in rows] == [prompt[::-1] for prompt in prompts if prompt != BREAK]


def test_a_dead_replica_has_written_down_what_it_finished(tmp_path: Path) -> None:
    prompts = prompts_of(10)
    prompts[5] = BREAK
    small = open_job(tmp_path, prompts)
    replica = Replica("r0", MarkedMaker(small.spec, max_rows=2))
    replica.start()
    replica.assign(Assignment(small.plan.units[0]))
    begin(replica)
    assert replica.work(PATIENCE_S).fatal is None  # it has generated its first row
    assert replica.work(PATIENCE_S).fatal == "RuntimeError: the device fell off the bus"
    finished = finished_rows(tmp_path)
    assert finished
    assert sorted(segment_rows(small)) == sorted(finished)


def test_a_stopped_replica_writes_down_what_it_finished_and_does_no_more(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(100), rows_per_file=100)
    pool = LocalPool(MarkedMaker(small.spec, step_s=0.02))
    [ready, *_] = pool.wait(PATIENCE_S)
    assert isinstance(ready, ReplicaReady)
    pool.assign(ready.replica, Assignment(small.plan.units[0]))

    def some_rows() -> list[str]:
        pool.wait(0.05)
        return finished_rows(tmp_path)

    wait_until(some_rows)
    pool.close()
    assert len(finished_rows(tmp_path)) < 100
    assert sorted(segment_rows(small)) == sorted(finished_rows(tmp_path))


def test_a_report_says_how_far_and_what_for_the_operator(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(10))
    replica = Replica("r0", lambda _name: make_runner(small, FakeEngine(fail_at={2})))
    replica.start()
    [active] = replica.work(0).events
    assert active == ReplicaActive("r0", 0, "idle", ReplicaStats(max_rows=4))
    replica.assign(Assignment(small.plan.units[0]))
    begin(replica)
    first, second = (replica.work(PATIENCE_S).events for _ in range(2))  # with its first row, and with its last one
    assert [type(event) for event in first] == [UnitProgress, ReplicaActive, ReplicaNote]
    assert [type(event) for event in second] == [UnitDone, ReplicaActive]
    note, active = first[2], second[1]
    assert isinstance(active, ReplicaActive)
    assert isinstance(note, ReplicaNote)
    assert active.beats > 0
    stats = active.stats
    assert stats is not None
    assert (stats.rows, stats.errors, stats.forwards, stats.queue, stats.active) == (10, 0, 30, 0, 0)
    assert stats.tokens == sum(map(len, prompts_of(10)))
    assert 1 <= stats.forward_retries <= 4
    assert "the forward failed; rows that are submitted once more" in note.text


def test_a_dropped_local_replica_is_lost_with_the_reason_given(tmp_path: Path) -> None:
    pool = LocalPool(FakeMaker(open_job(tmp_path, prompts_of(10)).spec))
    pool.wait(PATIENCE_S)
    pool.drop("local-1", "it stood still")
    assert pool.wait(PATIENCE_S) == [ReplicaLost("local-1", "it stood still")]
    assert ReplicaReady("local-2", max_rows=4) in pool.wait(PATIENCE_S)
    pool.close()


def test_local_pool_says_why_it_cannot_start(tmp_path: Path) -> None:
    def fail(_name: str) -> UnitRunner:
        raise CheckpointError("shard 2 is missing")

    with pytest.raises(JobFailed, match="no replica could start: shard 2 is missing"):
        run_locally(open_job(tmp_path, prompts_of(20)), LocalPool(fail))
