"""Tests of runs whose replicas cannot generate anything, for a reason outside the rows: no row is given up for it."""

import threading
from pathlib import Path
from typing import Any

import pytest

from model.requests import Completion, EngineError
from pipeline.core.errors import JobFailed
from pipeline.driver.run import Outcome, run_job
from pipeline.monitoring.progress import LineDisplay
from pipeline.planning.plan import Plan
from tests.workers.fakes import FakeEngine, FakeMaker
from tests.workers.jobs import SmallJob, open_job, prompts_of
from tests.workers.units.engines import segment_rows
from workers.replica.build import ReplicaSpec
from workers.replica.local_pool import LocalPool


class SickEngine(FakeEngine):
    """An engine whose steps fail while a file exists, after some rows that its process generates before."""

    def __init__(self, sick: Path, healthy_rows: int) -> None:
        super().__init__(max_rows=2)
        self.sick, self.healthy_rows = sick, healthy_rows

    def step(self) -> list[Completion]:
        if self.sick.exists() and self.ended >= self.healthy_rows:
            raise EngineError("cannot compile the kernel: no space left on device")
        return super().step()


class SickMaker(FakeMaker):
    """Makes runners with sick engines."""

    def __init__(self, spec: ReplicaSpec, sick: Path, healthy_rows: int) -> None:
        super().__init__(spec)
        self.sick, self.healthy_rows = sick, healthy_rows

    def make_engine(self, replica: str) -> FakeEngine:  # noqa: ARG002
        """See FakeMaker."""
        return SickEngine(self.sick, self.healthy_rows)


def submit(small: SmallJob, sick: Path, healthy_rows: int) -> Outcome:
    """Run the job as `run --local` does, with sick engines."""

    def make_pool(plan: Plan, *_: Any) -> LocalPool:
        spec = ReplicaSpec(small.job, plan.fingerprint.digest, plan.schema, plan.prompts)
        return LocalPool(SickMaker(spec, sick, healthy_rows))

    with sick.with_name("log").open("a") as out:
        return run_job(small.job, make_pool, threading.Event(), lambda: LineDisplay(out))


def test_bad_submissions_leave_no_error_rows_and_the_repaired_job_completes(tmp_path: Path) -> None:
    """The job is submitted three times while every forward fails. Then the environment is repaired."""
    prompts = prompts_of(60)
    small = open_job(tmp_path, prompts, rows_per_file=6, flush={"seconds": 0.05})
    sick = tmp_path / "sick"
    sick.touch()
    for _ in range(3):
        with pytest.raises(JobFailed, match=r"3 replicas died .* no space left on device.*no row was given up for it"):
            submit(small, sick, 0)
        assert not small.rows()
        assert not segment_rows(small)
    sick.unlink()
    assert submit(small, sick, 0).totals.errors == 0
    assert [row["completion"] for row in small.rows()] == [prompt[::-1] for prompt in prompts]


@pytest.mark.parametrize("healthy_rows", [1, 2, 3])
def test_replicas_that_die_after_some_rows_cost_no_row(tmp_path: Path, healthy_rows: int) -> None:
    """Every replica dies after the first rows that it generates, as if its memory ran full. Each of them adds a few
    rows, so that the job completes sooner or later; if it ends before that, submitting it again goes on."""
    prompts = prompts_of(20)
    small = open_job(tmp_path, prompts, rows_per_file=6, flush={"seconds": 0.05})
    (sick := tmp_path / "sick").touch()
    for _ in range(20):
        try:
            outcome = submit(small, sick, healthy_rows)
        except JobFailed as error:
            assert "no row was given up for it" in str(error)  # noqa: PT017 (both ends are right)
            continue
        assert outcome.totals.errors == 0
        break
    else:
        sick.unlink()
        assert submit(small, sick, healthy_rows).totals.errors == 0
    assert [row["completion"] for row in small.rows()] == [prompt[::-1] for prompt in prompts]
