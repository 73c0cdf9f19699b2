"""Tests of how a replica is built from the sections of a job."""

import re
from pathlib import Path

import pytest

from model.memory.planner import AUTO_MAX_ROWS
from pipeline.core.errors import JobError
from pipeline.core.types import Assignment
from tests.workers.fakes import work_all
from tests.workers.jobs import open_job, prompts_of
from workers.replica import build


def test_gpus_that_are_not_there_are_named_by_the_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job file for GPUs is run with --local on a machine with fewer of them. The one line says what to change."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    small = open_job(tmp_path, prompts_of(1), workers={"gpus": 2})
    with pytest.raises(JobError, match=r"workers\.gpus is 2, but torch finds 1 here; lower it \(0: the CPU\)"):
        build.make_runner(small.spec, "r0")


@pytest.mark.slow
def test_a_replica_says_where_its_memory_goes(tmp_path: Path) -> None:
    """It also says how fast each tower was loaded. The engine runs as many rows as the memory plan gives."""
    engine = {"max_rows": "auto", "max_context_tokens": 256}
    small = open_job(tmp_path, prompts_of(1), engine=engine, workers={"gpus": 0})
    runner = build.make_runner(small.spec, "r0")
    runner.close()
    lines = runner.notes()
    of_a_tower = r"{} \d+\.\d MB in \d+\.\d s \(\d+\.\d [MG]B/s\)".format
    assert re.fullmatch(f"model loaded: {of_a_tower('context tower')}, {of_a_tower('denoiser')}", lines[0]), lines[0]
    rows = AUTO_MAX_ROWS["cpu"]
    assert lines[-1] == f"max_rows {rows}, kv_tokens {rows * 256:,}"
    assert runner._engine.max_rows == rows
    assert runner.notes() == []


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "tries"), [("keep", 1), ("retry", 3)])
def test_a_replica_tries_again_where_the_job_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, tries: int
) -> None:
    monkeypatch.setattr("workers.units.tries.repetition", lambda *_: 1.0)
    generation = {"on_degenerate": setting, "max_new_tokens": 4}
    small = open_job(tmp_path, prompts_of(2), generation=generation, engine={"max_context_tokens": 128})
    runner = build.make_runner(small.spec, "r0")
    runner.add(Assignment(small.plan.units[0], 1))
    work_all(runner)
    assert [(row["attempt"], row["mode"], row["repetition"]) for row in small.rows()] == [(tries, "diffusion", 1.0)] * 2
    stats = runner.stats()
    assert (stats.rows, stats.batched, stats.loop_retries) == (2, 2, 2 * (tries - 1))
    assert stats.batch_rows >= stats.batched
    assert 0 < stats.room.prefill_tokens <= stats.room.padded_tokens
    assert 0 == stats.room.slots_used < stats.room.slots
    assert 0 == stats.room.pages_used < stats.room.pages
