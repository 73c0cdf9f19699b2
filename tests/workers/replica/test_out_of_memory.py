"""Tests of memory that runs out, with the engine's own loop: no row is lost, whether the engine recovers or not."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from model.requests import EngineError, GenerationParams
from pipeline.core.events import UnitDone
from pipeline.core.types import Assignment, Row
from tests.model.engine.cases import ScriptedBackend, make_loop
from tests.model.engine.launches import Fault
from tests.model.engine.scripts import FIRST, Script
from tests.waiting import PATIENCE_S
from tests.workers.fakes import FakeEngine, make_runner, work_all
from tests.workers.jobs import SmallJob, open_job, prompts_of
from tests.workers.units.resume_cases import NEVER, WatchedStore
from workers.units.runner import UnitRunner


class FixedEncoder:
    """An encoder that gives each prompt forty tokens, which depend on its length."""

    def encode(self, rows: Sequence[Row]) -> list[list[int]]:
        return [[5000 + len(row.prompt or "") + i for i in range(40)] for row in rows]


def scripted_runner(small: SmallJob, faults: dict[int, Fault]) -> tuple[UnitRunner, ScriptedBackend]:
    scripts = {f"a.parquet#{i}": Script((1 + i % 3,)) for i in range(20)}
    loop, backend = make_loop(scripts, rows=8, faults=faults)
    params = GenerationParams(max_new_tokens=20, block_size=8, steps_per_block=8)
    flush, store = small.job.flush, small.spec.open_store("r0")
    return UnitRunner(loop, FixedEncoder(), store, params, replica="r0", flush=flush), backend


@pytest.mark.parametrize("kind", ["launch oom", "collect oom"])
def test_memory_that_runs_out_costs_no_row(tmp_path: Path, kind: Fault) -> None:
    """The engine halves its limits and requeues the rows itself. The runner notices this and reports it."""
    small = open_job(tmp_path, prompts_of(20), rows_per_file=20)
    runner, _ = scripted_runner(small, dict.fromkeys((3, 7, 12), kind))
    runner.add(Assignment(small.plan.units[0]))
    (done,) = work_all(runner)
    assert isinstance(done, UnitDone)
    told = "".join(chr(FIRST + i) for i in range(20))
    assert [(row["completion"], row["error"]) for row in small.rows()] == [(told, None)] * 20
    assert any("memory ran out: the engine lowered its max_rows from" in note for note in runner.notes())


def test_memory_that_runs_out_for_good_ends_the_replica_and_loses_nothing(tmp_path: Path) -> None:
    """The same row fails twice. `work` raises, so that the unit goes to another replica, and `stop` saves the finished
    rows."""
    small = open_job(tmp_path, prompts_of(20), rows_per_file=20, **NEVER)
    runner, backend = scripted_runner(small, dict.fromkeys(range(20, 1000), "launch oom"))
    runner.add(Assignment(small.plan.units[0]))
    with pytest.raises(EngineError):
        work_all(runner)
    (progress,) = runner.progress()
    assert 0 < progress.rows < 20
    assert runner.stop(PATIENCE_S) == progress.rows
    runner.close()
    assert len(backend.launches) < 200
    runner, _ = scripted_runner(small, {})
    runner.add(Assignment(small.plan.units[0], 2))
    (done,) = work_all(runner)
    assert isinstance(done, UnitDone)
    assert done.kept_rows == progress.rows
    assert len(small.rows()) == 20


def test_rows_that_ended_in_the_step_that_failed_for_good_are_kept(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(12), rows_per_file=12, **NEVER)
    engine = FakeEngine(fail_at=range(3, 100))
    runner = make_runner(small, engine)
    runner.add(Assignment(small.plan.units[0]))
    with pytest.raises(EngineError) as caught:
        work_all(runner)
    ended = {completion.key for completion in caught.value.completions}
    assert runner.stop(PATIENCE_S) > 0
    runner.close()
    store = WatchedStore(small)
    store.read_segments(small.plan.units[0])
    assert ended <= store.held
    assert not store.held & set(caught.value.keys)
