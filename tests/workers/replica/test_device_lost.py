"""Tests of a GPU that a process can no longer use: the process ends, its finished rows are kept, and nothing is retried
in vain."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

import workers.replica.replica
from model.requests import EngineError
from pipeline.core.errors import JobFailed
from pipeline.core.types import Assignment
from tests.waiting import PATIENCE_S
from tests.workers.fakes import FakeEngine, run_locally
from tests.workers.jobs import SmallJob, open_job, prompts_of
from tests.workers.units.engines import LOSE_GPU, MarkedMaker, finished_rows, segment_rows
from tests.workers.units.resume_cases import NEVER
from workers.replica.local_pool import LocalPool
from workers.replica.replica import DEAD_EXIT, Replica, ReplicaProcess
from workers.units.runner import UnitRunner

TOLD = (
    "a GPU failed, and this process cannot use it any more: denoise of 2 rows failed: RuntimeError: Triton Error "
    "[CUDA]: an illegal memory access was encountered"
)


def small_job(folder: Path) -> SmallJob:
    """Make a job of ten rows; at one in the middle, the GPU is lost."""
    prompts = prompts_of(10)
    prompts[5] = LOSE_GPU
    return open_job(folder, prompts, **NEVER)


def lose_it(small: SmallJob) -> None:
    """Run a replica in this process. The process leaves by itself, or with exit code 77 if that fails."""
    workers.replica.replica.LEAVE_S = 0.5
    replica = ReplicaProcess("r0", MarkedMaker(small.spec, max_rows=2))
    replica.start()
    replica.assign(Assignment(small.plan.units[0]))
    assert replica.work(PATIENCE_S).fatal is None  # it has read the unit
    assert replica.work(PATIENCE_S).fatal is None  # it has generated its first row
    assert replica.work(PATIENCE_S).fatal == TOLD
    time.sleep(PATIENCE_S)
    os._exit(77)


@pytest.mark.slow
def test_the_process_ends_and_has_written_down_what_it_finished(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    small = small_job(tmp_path)
    process = multiprocessing.get_context("spawn").Process(target=lose_it, args=(small,))
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == DEAD_EXIT
    assert finished_rows(tmp_path)
    assert sorted(segment_rows(small)) == sorted(finished_rows(tmp_path))
    assert f"r0: {TOLD}; the process ends\n" in capfd.readouterr().err


def test_its_engine_is_not_stepped_again_and_not_let_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """To free tensors of a GPU may call the GPU, so the engine is kept. The log has one line."""
    import torch  # not at the top, because the process of another test imports this file

    small, freed = small_job(tmp_path), list[str]()

    class Engine(FakeEngine):
        def step(self) -> list:  # type: ignore[type-arg]
            super().step()
            cause = torch.AcceleratorError("CUDA error: unspecified launch failure\nadvice")
            raise EngineError(f"context of 4 rows failed: {cause}", tuple(self.slots)) from cause

        def __del__(self) -> None:
            freed.append("engine")

    def make(name: str) -> UnitRunner:
        runner = MarkedMaker(small.spec)(name)
        runner._engine = Engine()
        return runner

    replica = Replica("r0", make)
    replica.start()
    replica.assign(Assignment(small.plan.units[0]))
    assert replica.work(PATIENCE_S).fatal is None  # it has read the unit
    first, second = replica.work(PATIENCE_S), replica.work(PATIENCE_S)
    assert first.fatal == second.fatal is not None
    assert (first.device_lost, second.device_lost) == (True, True)
    assert capsys.readouterr().err.count("\n") == 1
    assert not freed


def test_a_gpu_lost_while_the_model_loads_is_no_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    """A refusal ends the job. If a GPU fails, another process may still be able to load the model."""
    import torch

    def fail(_name: str) -> UnitRunner:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered\nadvice")

    report = Replica("r0", fail).start()
    assert (report.refused, report.device_lost) == (False, True)
    assert (report.fatal or "").endswith("AcceleratorError: CUDA error: uncorrectable ECC error encountered")
    assert "Traceback" not in capsys.readouterr().err


def test_in_one_process_the_job_ends_and_can_be_resumed(tmp_path: Path) -> None:
    """No row is condemned because of a GPU that no replica of this process can use. The next run makes all rows, each
    once."""
    small = small_job(tmp_path)
    with pytest.raises(JobFailed, match=r"illegal memory access was encountered; .*submit the same job again"):
        run_locally(small, LocalPool(MarkedMaker(small.spec, max_rows=2)))
    saved = set(finished_rows(tmp_path))
    assert saved
    assert not small.rows()
    results = run_locally(small, LocalPool(MarkedMaker(small.spec)))
    assert sum(result.totals.errors for result in results.values()) == 0
    rows = small.rows()
    assert [row["completion"][::-1] for row in rows] == [*prompts_of(5), LOSE_GPU, *prompts_of(10)[6:]]
    again = [key for key in finished_rows(tmp_path) if key in saved]
    assert len(again) == len(saved), "rows that were saved were generated again"
