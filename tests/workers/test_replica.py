"""A replica that dies, with the pool that lives in this process: why it did, and who does its work then."""

from pathlib import Path

import pytest

from model.errors import CheckpointError
from pipeline.errors import JobFailed
from pipeline.types import Assignment
from tests.workers.fakes import FakeEngine, FakeMaker, make_runner, run_locally
from tests.workers.jobs import open_job, prompts_of
from workers.local_pool import LocalPool
from workers.replica import Replica
from workers.unit_runner import UnitRunner


def test_what_the_engine_raises_ends_the_replica_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = open_job(tmp_path, prompts_of(10))
    replica = Replica("r0", lambda _name: make_runner(small, FakeEngine(fail_at=range(2, 100))))
    assert replica.start().fatal is None
    replica.assign(Assignment(small.plan.units[0], 1))
    report = replica.work(10)
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
    """With a traceback beside it only where it is a fault of ours."""

    def fail(_name: str) -> UnitRunner:
        raise error

    report = Replica("r0", fail).start()
    assert (report.fatal, report.refused) == (text, refused)
    assert ("Traceback" in capsys.readouterr().err) != refused


class UnluckyMaker(FakeMaker):
    """The engine of its first `lives` replicas breaks after a few steps."""

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
    assert max(result.attempt for result in results.values()) == 3


def test_local_pool_gives_up_after_the_attempts_allowed(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(20))
    with pytest.raises(JobFailed, match=r"failed 2 of 2 attempts .*: replica local-2 was lost: the forward failed"):
        run_locally(small, LocalPool(UnluckyMaker(small.spec)), attempts=2)


def test_local_pool_says_why_it_cannot_start(tmp_path: Path) -> None:
    def fail(_name: str) -> UnitRunner:
        raise CheckpointError("shard 2 is missing")

    with pytest.raises(JobFailed, match="no replica could start: shard 2 is missing"):
        run_locally(open_job(tmp_path, prompts_of(20)), LocalPool(fail))
