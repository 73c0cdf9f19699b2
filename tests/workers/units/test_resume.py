"""Tests of a unit that is interrupted and continues where its segments end: it is killed anywhere, runs in ranges, or
runs twice at a time."""

import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from model.requests import Completion
from pipeline.core.events import RangeDone, UnitDone
from pipeline.core.types import ALONE, Assignment, RowResult
from pipeline.output.part import result_table
from tests.waiting import PATIENCE_S, wait_until
from tests.workers.fakes import TOO_LONG, FakeEngine, make_runner, work_all
from tests.workers.jobs import open_job, prompts_of
from tests.workers.units.engines import wait_for_flushes
from tests.workers.units.resume_cases import (
    EACH_ROW,
    NEVER,
    WatchedStore,
    same,
    segments_of,
    with_bad_rows,
    work_units,
    work_until,
)


class Killed(Exception):  # noqa: N818
    """Stands for the death of the process: nothing after it happens."""


class MortalEngine(FakeEngine):
    """An engine that dies in its step `dies_at`."""

    def __init__(self, dies_at: int) -> None:
        super().__init__()
        self.dies_at = dies_at
        self.finished: list[str] = []

    def step(self) -> list[Completion]:
        if self.before_step:
            self.before_step()
        if self.steps == self.dies_at:
            raise Killed
        done = super().step()
        self.finished += [completion.key for completion in done]
        return done


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_point_nothing_is_lost_and_little_repeated(tmp_path: Path, seed: int) -> None:
    """Each attempt dies after a random number of steps. The rows are those of an undisturbed run, and no row that a
    segment held is generated again. A death costs less than flush.rows rows per unit, and those of one step."""
    draw = random.Random(seed)
    at_most = draw.choice([1, 3, 8])
    prompts = with_bad_rows(60)
    small = open_job(tmp_path, prompts, rows_per_file=30, flush={"seconds": 3600.0, "rows": at_most})
    todo, finished, deaths = {unit.id: Assignment(unit) for unit in small.plan.units}, Counter[str](), 0
    while todo:
        store = WatchedStore(small, f"r{deaths}")
        engine = MortalEngine(draw.randrange(1, 25))
        runner = make_runner(small, engine, store, f"r{deaths}")
        wait_for_flushes(runner)
        for work in todo.values():
            runner.add(work)
        try:
            while runner.busy:
                for outcome in runner.work(0.5):
                    assert isinstance(outcome, UnitDone)
                    del todo[outcome.result.unit_id]
        except Killed:
            deaths += 1
            todo = {key: Assignment(work.unit, work.attempt + 1) for key, work in todo.items()}
        runner.close()
        assert not store.held & set(engine.order)
        finished.update(engine.finished)
        assert deaths < 100
    undisturbed = open_job(tmp_path / "alone", prompts, rows_per_file=30)
    work_units(undisturbed, FakeEngine())
    assert same(small.rows()) == same(undisturbed.rows())
    assert deaths
    assert finished.total() - len(finished) <= deaths * (2 * (at_most - 1) + 4)
    assert not segments_of(small)


KILL_SCRIPT = """
import sys
from pathlib import Path
from pipeline.core.types import ALONE, Assignment, RowResult
from pipeline.output.part import result_table
from tests.workers.fakes import FakeEngine, make_runner
from tests.workers.jobs import open_job, prompts_of

small = open_job(Path(sys.argv[1]), prompts_of(300), rows_per_file=300, flush={"seconds": 0.01})
runner = make_runner(small, FakeEngine(step_s=0.2))
runner.add(Assignment(small.plan.units[0]))
while runner.busy:
    runner.work(1)
"""


@pytest.mark.slow
def test_a_process_killed_by_sigkill_leaves_what_it_flushed(tmp_path: Path) -> None:
    """The whole unit would take a minute, so the process is killed before its end."""
    process = subprocess.Popen([sys.executable, "-c", KILL_SCRIPT, str(tmp_path)])
    folder = tmp_path / "out" / "_job" / "segments"
    try:
        wait_until(lambda: len(list(folder.glob("*/*.parquet"))) > 5 or process.poll() is not None)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended by itself"
    small = open_job(tmp_path, None, rows_per_file=300)
    store, engine = WatchedStore(small), FakeEngine()
    runner = make_runner(small, engine, store)
    runner.add(Assignment(small.plan.units[0], 2))
    (done,) = work_all(runner)
    assert isinstance(done, UnitDone)
    assert done.kept_rows == len(store.held) > 5
    assert len(engine.order) == 300 - done.kept_rows
    rows = small.rows()
    assert [row["completion"] for row in rows] == [prompt[::-1] for prompt in prompts_of(300)]
    kept = {row["id"] for row in rows if row["attempt"] == 1}
    assert kept == store.held
    assert done.kept_tokens == sum(row["completion_tokens"] for row in rows if row["attempt"] == 1)
    assert runner.notes() == [f"unit {small.plan.units[0].id}: rows finished by earlier attempts: {len(kept)} of 300"]


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"seconds": 0.001}, {"seconds": 3600.0, "rows": 5}], ids=["seconds", "rows"])
def test_a_unit_under_way_is_flushed_when_due(tmp_path: Path, settings: dict[str, float]) -> None:
    small = open_job(tmp_path, prompts_of(200), rows_per_file=200, flush=settings)
    runner = make_runner(small, FakeEngine(step_s=0.002))
    wait_for_flushes(runner)
    runner.add(Assignment(small.plan.units[0]))
    work_until(runner, lambda: len(segments_of(small)) > 3)
    (progress,) = runner.progress()
    assert 3 < progress.rows < 200
    work_all(runner)
    assert not segments_of(small)


def test_a_suspect_is_reported_as_read_before_a_row_of_it_is_generated(tmp_path: Path) -> None:
    """If it kills the replica, the driver knows that the row had begun."""
    small = open_job(tmp_path, prompts_of(10))
    engine = FakeEngine()
    runner = make_runner(small, engine)
    runner.add(Assignment(small.plan.units[0], 4, (3, 4)))
    assert runner.work(PATIENCE_S) == []
    assert [progress.key for progress in runner.progress()] == [(small.plan.units[0].id, (3, 4))]
    assert engine.steps == 0
    work_all(runner)
    assert engine.steps


def test_a_suspect_unit_is_flushed_at_once_and_others_are_not(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(120), rows_per_file=60, **NEVER)
    runner = make_runner(small, FakeEngine(step_s=0.001))
    wait_for_flushes(runner)
    first, second = small.plan.units
    runner.add(Assignment(first, 2, losses=1))
    runner.add(Assignment(second))
    seen = set[str]()
    while runner.busy:
        runner.work(0.005)
        seen |= {path.parent.name for path in segments_of(small)}
    runner.close()
    assert seen == {first.id}


def test_a_range_ends_in_segments_alone_and_the_whole_unit_after_it_generates_nothing(tmp_path: Path) -> None:
    """Two ranges come before the unit, and the row between them is condemned. Every row is there once, with the bad
    rows of the input as usual."""
    small = open_job(tmp_path, with_bad_rows(10), **NEVER)
    (unit,) = small.plan.units
    engine = FakeEngine()
    runner = make_runner(small, engine)
    for attempt, rows in ((5, (0, 4)), (7, (5, 10))):
        runner.add(Assignment(unit, attempt, rows))
        outcomes = work_until(runner, lambda: not runner.busy)
        assert outcomes == [RangeDone("r0", (unit.id, rows))]
        assert not small.rows()
    assert sorted(engine.order) == [f"a.parquet#{i}" for i in (0, 1, 3, 6, 7, 8)]
    runner.add(Assignment(unit, 8, condemned=((4, "row a.parquet#4 killed 3 replicas"),)))
    ((done,)) = work_all(runner)
    assert isinstance(done, UnitDone)
    assert (done.kept_rows, done.result.totals.errors, len(engine.order)) == (9, 4, 6)
    made = small.rows()
    assert [row["attempt"] for row in made] == [5, 5, 5, 5, 8, 7, 7, 7, 7, 7]
    assert {row["source_row"]: row["error"] for row in made if row["error"]} == {
        2: "prompt is null",
        4: "row a.parquet#4 killed 3 replicas",
        5: f"{TOO_LONG + 1} prompt tokens exceed {TOO_LONG}",
        9: "the prompt has no tokens",
    }
    assert not segments_of(small)


def test_a_range_takes_only_what_segments_lack(tmp_path: Path) -> None:
    """If segments hold all rows of a range, it ends although the input file is gone."""
    small = open_job(tmp_path, prompts_of(10), **NEVER)
    (unit,) = small.plan.units
    runner = make_runner(small, FakeEngine())
    runner.add(Assignment(unit, 2, (2, 6)))
    work_all(runner)
    (tmp_path / "in" / "a.parquet").rename(tmp_path / "elsewhere.parquet")
    engine = FakeEngine()
    runner = make_runner(small, engine)
    runner.add(Assignment(unit, 3, (3, 4)))
    assert work_all(runner) == [RangeDone("r0", (unit.id, (3, 4)))]
    (tmp_path / "elsewhere.parquet").rename(tmp_path / "in" / "a.parquet")
    runner = make_runner(small, engine)
    runner.add(Assignment(unit, 5, (0, 8)))
    work_all(runner)
    assert sorted(engine.order) == ["a.parquet#0", "a.parquet#1", "a.parquet#6", "a.parquet#7"]


def test_condemned_rows_are_in_no_segment_and_those_of_earlier_versions_are_generated_again(tmp_path: Path) -> None:
    """A new run tries a condemned row once more. Earlier versions saved the error rows of condemned rows in segments,
    also when the replicas were the cause."""
    small = open_job(tmp_path, prompts_of(10), **NEVER)
    (unit,) = small.plan.units
    text = f"the replica died 3 times {ALONE}; the last time: the disk was full"
    store, engine = WatchedStore(small), FakeEngine()
    errors = [
        RowResult(index, Completion(key=f"a.parquet#{index}", finish_reason="error", error=error), "diffusion", 1, "r9")
        for index, error in enumerate((text, text, "prompt is null"))
    ]
    store.write_segment(unit, result_table(unit, errors), writer="0" * 32, number=1, attempt=1)
    store.refuse_parts = 10**6
    runner = make_runner(small, engine, store)
    runner.add(Assignment(unit, 2, condemned=((7, text),)))
    work_until(runner, lambda: len(segments_of(small)) > 1)
    runner.close()
    assert sorted(engine.order) == [f"a.parquet#{i}" for i in (0, 1, 3, 4, 5, 6, 8, 9)]
    saved = store.read_segments(unit).table["source_row"].to_pylist()
    assert saved == [0, 1, 2, 3, 4, 5, 6, 8, 9], "the condemned row is in no segment"


def test_progress_tells_kept_rows_from_generated_ones(tmp_path: Path) -> None:
    small = open_job(tmp_path, [None, *prompts_of(39)], rows_per_file=40, **NEVER)
    (unit,) = small.plan.units
    runner = make_runner(small, FakeEngine())
    runner.add(Assignment(unit, 1, (0, 11)))
    work_all(runner)
    kept_tokens = sum(map(len, prompts_of(10)))
    runner = make_runner(small, FakeEngine(max_rows=1, step_s=0.002))
    runner.add(Assignment(unit, 2))
    work_until(runner, lambda: runner.progress() and runner.progress()[0].rows > 11)
    (progress,) = runner.progress()
    assert (progress.key, progress.errors, progress.kept_rows, progress.kept_tokens) == (
        (unit.id, None),
        1,
        11,
        kept_tokens,
    )
    assert progress.tokens > kept_tokens
    runner.close()


def test_a_unit_that_was_published_meanwhile_is_not_generated_again(tmp_path: Path) -> None:
    """A replica died between its part and its report. A range of such a unit ends without generating, and so does the
    whole unit."""
    small = open_job(tmp_path, prompts_of(10))
    (unit,) = small.plan.units
    work_units(small, FakeEngine())
    engine = FakeEngine()
    runner = make_runner(small, engine, replica="r1")
    runner.add(Assignment(unit, 2, (0, 5)))
    assert work_until(runner, lambda: not runner.busy) == [RangeDone("r1", (unit.id, (0, 5)))]
    runner.add(Assignment(unit, 3))
    (done,) = work_all(runner)
    assert isinstance(done, UnitDone)
    assert (done.result.published_by_other, done.result.replica, done.result.attempt) == (True, "r0", 1)
    assert (done.kept_rows, done.kept_tokens) == (10, done.result.totals.completion_tokens)
    assert not engine.order
    assert runner.notes() == [f"unit {unit.id}: its part exists already, published by replica r0 in attempt 1"] * 2


def test_two_attempts_at_the_same_time(tmp_path: Path) -> None:
    """One of them wins, and the other says so. Every row is there once, and no segment stays."""
    small = open_job(tmp_path, prompts_of(60), rows_per_file=60, **EACH_ROW)
    (unit,) = small.plan.units
    both = threading.Barrier(2, timeout=PATIENCE_S)  # no first step before the other has read the unit, too
    runners = []
    outcomes: list[Any] = []
    for number in range(2):
        engine = FakeEngine(step_s=0.001)
        engine.before_step = lambda engine=engine: engine.steps or both.wait()
        runners.append(make_runner(small, engine, replica=f"r{number}"))
        runners[-1].add(Assignment(unit, number + 1))
    threads = [threading.Thread(target=lambda r=runner: outcomes.extend(work_all(r))) for runner in runners]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = (done.result for done in outcomes)
    assert sorted([first.published_by_other, second.published_by_other]) == [False, True]
    assert (first.sha256, first.totals) == (second.sha256, second.totals)
    assert [row["completion"] for row in small.rows()] == [prompt[::-1] for prompt in prompts_of(60)]
    said = [note for runner in runners for note in runner.notes() if "published its part first" in note]
    assert len(said) == 1
    assert not segments_of(small)


def test_a_damaged_segment_is_said_and_its_rows_are_generated_again(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(10), **NEVER)
    (unit,) = small.plan.units
    for rows in ((0, 3), (3, 6)):
        runner = make_runner(small, FakeEngine())
        runner.add(Assignment(unit, 1, rows))
        work_all(runner)
    broken = segments_of(small)[0]
    broken.write_bytes(broken.read_bytes()[:-1])
    store, engine = WatchedStore(small), FakeEngine()
    runner = make_runner(small, engine, store)
    runner.add(Assignment(unit, 2))
    work_all(runner)
    assert 0 < len(store.held) < 6
    assert len(engine.order) == 10 - len(store.held)
    assert f"{broken.name} is left out: it is truncated or damaged; its rows are generated again" in runner.notes()[0]
    assert [row["completion"] for row in small.rows()] == [prompt[::-1] for prompt in prompts_of(10)]
