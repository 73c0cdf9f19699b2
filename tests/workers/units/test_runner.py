"""Tests of the unit runner with a fake engine over real Parquet: each row is in the output once, and the engine never
waits for files."""

import functools
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest

from model.requests import Completion, EngineError
from pipeline.core.errors import OutputError
from pipeline.core.events import RangeDone, UnitDone, UnitFailed
from pipeline.core.types import Assignment, UnitResult, WorkUnit
from pipeline.input.fetcher import Fetch
from pipeline.input.unit_reader import UnitData
from pipeline.output.unit_store import UnitStore
from tests import memory
from tests.pipeline.cases import one_piece
from tests.waiting import PATIENCE_S
from tests.workers.fakes import TOO_LONG, FakeEngine, make_runner, work_all, work_on
from tests.workers.jobs import SmallJob, open_job, prompts_of
from tests.workers.units.resume_cases import segments_of
from workers.replica import build
from workers.replica.replica import Replica
from workers.units.runner import QUEUE_FACTOR, UnitRunner


def hold_up(store: UnitStore, held: WorkUnit) -> threading.Event:
    """Make reads of one unit wait for the event that is returned."""
    gate, read = threading.Event(), store.input.read

    def held_up(unit: WorkUnit, fetch: Fetch | None = None) -> UnitData:
        if unit == held:
            assert gate.wait(PATIENCE_S)
        return read(unit, fetch)

    store.input.read = held_up  # type: ignore[method-assign]
    return gate


def test_every_row_leaves_once_as_a_completion_or_an_error_row(tmp_path: Path) -> None:
    prompts: list[str | None] = [*prompts_of(10)]
    prompts[1], prompts[4], prompts[6], prompts[8] = None, "", "   ", "y" * (TOO_LONG + 5)
    small = open_job(tmp_path, prompts)
    runner = make_runner(small, FakeEngine())
    runner.add(Assignment(small.plan.units[0], 2))
    [done] = work_all(runner)
    assert isinstance(done, UnitDone)
    assert (done.result.totals.rows, done.result.totals.errors, done.result.attempt) == (10, 4, 2)
    rows = small.rows()
    for row, prompt in zip(rows, prompts, strict=True):
        if row["finish_reason"] != "error":
            assert prompt is not None
            assert row["completion"] == prompt[::-1]
            assert row["prompt_tokens"] == len(prompt)
    errors = {row["source_row"]: row["error"] for row in rows if row["error"]}
    assert errors == {
        1: "prompt is null",
        4: "prompt is empty",
        6: "the prompt has no tokens",
        8: f"{TOO_LONG + 5} prompt tokens exceed {TOO_LONG}",
    }
    assert rows[8]["prompt_tokens"] == TOO_LONG + 5
    assert {(row["replica"], row["attempt"]) for row in rows} == {("r0", 2)}


def test_few_units_are_open_if_their_rows_are_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver counts rows and gives many small units. Rows with large carried columns would fill the memory."""
    monkeypatch.setattr("workers.units.runner.HELD_BYTES", 1)
    small = open_job(tmp_path, prompts_of(40), rows_per_file=2)
    runner = make_runner(small, FakeEngine())
    for unit in small.plan.units:
        runner.add(Assignment(unit))
    outcomes, most = 0, 0
    while outcomes < len(small.plan.units):
        outcomes += len(runner.work(PATIENCE_S))
        most = max(most, len(runner.progress()))
    assert most == 2
    assert len(small.rows()) == 40


def test_a_unit_of_error_rows_alone_is_published(tmp_path: Path) -> None:
    small = open_job(tmp_path, [None, "", "z" * (TOO_LONG + 1)])
    runner = make_runner(small, FakeEngine())
    runner.add(Assignment(small.plan.units[0], 1))
    [done] = work_all(runner)
    assert isinstance(done, UnitDone)
    assert done.result.totals.errors == 3


def test_a_control_is_generated_and_leaves_nothing(tmp_path: Path) -> None:
    """Its prompt is fixed, its completion is thrown away, and it counts in `controls` only."""
    small = open_job(tmp_path, prompts_of(10))
    engine, (unit,) = FakeEngine(), small.plan.units
    runner = make_runner(small, engine)
    runner.add(Assignment(WorkUnit("control", unit.pieces[:1]), rows=(0, 0)))
    assert runner.doing() == "reading the control prompt"
    before = sorted(Path(small.job.output.path).rglob("*"))
    assert work_all(runner) == [RangeDone("r0", ("control", (0, 0)))]
    assert len(engine.order) == 1
    stats = runner.stats()
    assert (stats.rows, stats.tokens, stats.controls, stats.generated) == (0, 0, 1, 1)
    assert not runner.progress()
    assert sorted(Path(small.job.output.path).rglob("*")) == before


def test_a_control_that_the_engine_refuses_ends_the_replica_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows nothing about the replica, and its error row must not come to the output."""
    monkeypatch.setattr("tests.workers.fakes.TOO_LONG", 3)
    small = open_job(tmp_path, ["a"])
    runner = make_runner(small, FakeEngine())
    runner.add(Assignment(WorkUnit("control", small.plan.units[0].pieces[:1]), rows=(0, 0)))
    with pytest.raises(EngineError, match=r"the control prompt was refused: .* prompt tokens exceed 3"):
        work_all(runner)
    runner.stop(PATIENCE_S)
    runner.close()
    assert not list((tmp_path / "out").rglob("segments/control"))


def test_a_finished_row_is_generated_once_more_as_a_control(tmp_path: Path) -> None:
    """It is the one with the most tokens, and nothing changes what is saved of it. Without a finished row the control
    fails, and the replica lives on."""
    small = open_job(tmp_path, prompts_of(10))
    (unit,) = small.plan.units
    [failed] = work_all(make_control(small, unit, FakeEngine()))
    assert isinstance(failed, UnitFailed)
    assert failed.reason == f"no row of unit {unit.id} is finished that could be generated once more"
    first = make_runner(small, FakeEngine())
    first.add(Assignment(unit, 1, (2, 7)))
    work_all(first)
    before = {path: path.read_bytes() for path in segments_of(small)}
    assert before
    engine = FakeEngine()
    assert work_all(make_control(small, unit, engine)) == [RangeDone("r0", (unit.id, (0, 0)))]
    longest = max(range(2, 7), key=lambda row: len(prompts_of(10)[row]))
    assert list(engine.order) == [f"a.parquet#{longest}"]
    assert {path: path.read_bytes() for path in segments_of(small)} == before


def make_control(small: SmallJob, unit: WorkUnit, engine: FakeEngine) -> UnitRunner:
    runner = make_runner(small, engine)
    runner.add(Assignment(unit, rows=(0, 0)))
    return runner


def test_a_control_that_ends_with_an_error_ends_the_replica(tmp_path: Path) -> None:
    """A replica whose every row would end with an error must not get rows that are suspected of killing replicas."""
    small = open_job(tmp_path, prompts_of(10))
    engine = FakeEngine()
    step = engine.step

    def spoilt() -> list[Completion]:
        return [replace(done, finish_reason="error", error="logits are not finite") for done in step()]

    engine.step = spoilt  # type: ignore[method-assign]
    runner = make_runner(small, engine)
    runner.add(Assignment(WorkUnit("control", small.plan.units[0].pieces[:1]), rows=(0, 0)))
    with pytest.raises(EngineError, match="the control prompt could not be generated: logits are not finite"):
        work_all(runner)


def test_rows_go_longest_first_and_the_engine_queue_stays_short(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(200), rows_per_file=200)
    engine = FakeEngine(max_rows=4)
    runner = make_runner(small, engine)
    runner.add(Assignment(small.plan.units[0], 1))
    work_all(runner)
    lengths = [len(prompts_of(200)[int(key.partition("#")[2])]) for key in engine.order]
    assert lengths == sorted(lengths, reverse=True)
    assert engine.most_waiting <= QUEUE_FACTOR * 4


def test_the_engine_does_not_drain_between_units(tmp_path: Path) -> None:
    """This holds if files are read and written in time. A busy machine may not do that, so here the engine waits for
    the files."""
    small = open_job(tmp_path, prompts_of(80), rows_per_file=20)
    engine = FakeEngine(max_rows=4, step_s=0.002)
    runner = make_runner(small, engine)

    def wait_for_files() -> None:
        under_way: list[Future[Any]] = list(runner._reading.values())
        under_way += [opened.publishing for opened in runner._open.values() if opened.publishing]
        assert not wait(under_way, PATIENCE_S).not_done

    engine.before_step = wait_for_files
    waiting = list(small.plan.units)
    for _ in range(2):
        runner.add(Assignment(waiting.pop(0), 1))
    while runner.busy:
        for _ in runner.work(0.5):
            if waiting:
                runner.add(Assignment(waiting.pop(0), 1))
    assert len(small.rows()) == 80
    assert engine.short_steps <= 8, f"{engine.short_steps} of {engine.steps} steps had a free slot"


def watch(event: threading.Event) -> list[tuple[float | None, bool]]:
    """Watch each later wait for the event. The returned list gets the timeout of each wait, and whether the event ended
    it."""
    waits: list[tuple[float | None, bool]] = []
    wait = event.wait

    def watched(timeout: float | None = None) -> bool:
        was_set = wait(timeout)
        waits.append((timeout, was_set))
        return was_set

    event.wait = watched  # type: ignore[method-assign]
    return waits


def test_reading_the_next_unit_does_not_hold_up_the_engine(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(20))
    store, (first, second) = small.spec.open_store("r0"), small.plan.units
    gate = hold_up(store, second)
    runner = make_runner(small, FakeEngine(), store)
    runner.add(Assignment(first, 1))
    runner.add(Assignment(second, 1))
    [done] = work_on(runner)
    assert isinstance(done, UnitDone)
    assert done.result.unit_id == first.id
    waits = watch(runner._wake)
    assert runner.work(0.1) == []  # it only waits, and no longer than it was told
    assert waits
    assert all(seconds is not None and 0 <= seconds <= 0.1 for seconds, _ in waits)
    waits.clear()
    threading.Timer(0.1, gate.set).start()
    assert runner.work(PATIENCE_S) == []  # it has read the unit, and says so before it generates
    [done] = work_on(runner)
    assert isinstance(done, UnitDone)
    assert done.result.unit_id == second.id
    assert all(was_set for _, was_set in waits), "it was not woken by the reader"
    runner.close()


def test_waiting_for_files_costs_nothing(tmp_path: Path) -> None:
    """The runner sleeps until something has ended; it does not ask again and again."""
    small = open_job(tmp_path, prompts_of(10))
    store, (unit,) = small.spec.open_store("r0"), small.plan.units
    gate = hold_up(store, unit)
    runner = make_runner(small, FakeEngine(), store)
    asked = 0

    def clock() -> float:
        nonlocal asked
        asked += 1
        return time.monotonic()

    runner._clock = clock
    runner.add(Assignment(unit, 1))
    assert runner.work(0.3) == []
    assert asked < 30
    gate.set()
    work_all(runner)


def test_a_unit_cannot_be_in_twice(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(10))
    runner = make_runner(small, FakeEngine())
    runner.add(Assignment(small.plan.units[0], 1))
    with pytest.raises(ValueError, match=r"is already on replica r0"):
        runner.add(Assignment(small.plan.units[0], 2))
    work_all(runner)
    runner.close()


def test_a_unit_that_cannot_be_read_or_published_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = open_job(tmp_path, prompts_of(30))
    units, publish = small.plan.units, UnitStore.publish
    gone = one_piece("gone", str(tmp_path / "in" / "gone.parquet"), "gone.parquet", 0, 10)

    def refuse(self: UnitStore, unit: WorkUnit, part: bytes) -> UnitResult:
        if unit == units[1]:
            raise OutputError("the part is broken")
        return publish(self, unit, part)

    monkeypatch.setattr(UnitStore, "publish", refuse)
    runner = make_runner(small, FakeEngine())
    for unit in (gone, *units):
        runner.add(Assignment(unit, 1))
    outcomes = work_all(runner)
    failed = {outcome.work.unit.id: outcome.reason for outcome in outcomes if isinstance(outcome, UnitFailed)}
    assert failed.keys() == {"gone", units[1].id}
    assert "gone.parquet is gone" in failed["gone"]
    assert failed[units[1].id] == "the part is broken"
    assert len(small.rows()) == 20


def test_a_part_that_another_attempt_published_first_stays(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(10))
    for attempt in (1, 2):
        runner = make_runner(small, FakeEngine())
        runner.add(Assignment(small.plan.units[0], attempt))
        [done] = work_all(runner)
        assert isinstance(done, UnitDone)
        assert done.result.published_by_other == (attempt == 2)
    assert {row["attempt"] for row in small.rows()} == {1}


def test_progress_counts_from_the_units_start(tmp_path: Path) -> None:
    small = open_job(tmp_path, [None, *prompts_of(50)], rows_per_file=100)
    runner = make_runner(small, FakeEngine(max_rows=2, step_s=0.005))
    runner.add(Assignment(small.plan.units[0], 1))
    seen = []
    while runner.busy:
        runner.work(0.02)
        seen += [(report.rows, report.errors, report.tokens) for report in runner.progress()]
    assert seen == sorted(seen)
    assert {errors for _, errors, _ in seen} == {1}
    assert len(seen) > 2
    runner.close()


def test_rows_that_a_failed_step_took_down_are_submitted_once_more(tmp_path: Path) -> None:
    """Every row is in the output once: the rows that ended in the failed step, those that it lost, and those that were
    waiting."""
    small = open_job(tmp_path, prompts_of(40), rows_per_file=20)
    engine = FakeEngine(fail_at={2, 30})
    runner = make_runner(small, engine)
    for unit in small.plan.units:
        runner.add(Assignment(unit, 1))
    assert all(isinstance(outcome, UnitDone) for outcome in work_all(runner))
    assert [row["completion"] for row in small.rows()] == [prompt[::-1] for prompt in prompts_of(40)]
    said = [note for note in runner.notes() if "the forward failed; rows that are submitted once more" in note]
    again = sum(int(line.split()[-1]) for line in said)
    assert len(said) == 2
    assert len(engine.order) == 40 + again > 42


def test_an_engine_that_runs_out_of_memory_says_so_once(tmp_path: Path) -> None:
    """The job continues with fewer rows together and is slower from then on, so the operator must learn why."""
    small = open_job(tmp_path, prompts_of(40))
    engine = FakeEngine(max_rows=8)
    step = engine.step

    def shrink() -> list[Completion]:
        done = step()
        engine.max_rows = {3: 4, 5: 2}.get(engine.steps, engine.max_rows)
        return done

    engine.step = shrink  # type: ignore[method-assign]
    runner = make_runner(small, engine)
    for unit in small.plan.units:
        runner.add(Assignment(unit, 1))
    assert all(isinstance(outcome, UnitDone) for outcome in work_all(runner))
    assert runner.notes() == [
        f"memory ran out: the engine lowered its max_rows from {before} to {rows}; set engine.max_rows to {rows}"
        for rows, before in ((4, 8), (2, 4))
    ]


@pytest.mark.parametrize("fail_at", [{2, 3}, {1, 2}], ids=["the same rows", "rows of the first step"])
def test_a_row_that_fails_twice_is_an_error_that_names_it(tmp_path: Path, fail_at: set[int]) -> None:
    """The row ends nowhere else: the unit is not published, and the owner of the replica learns the reason."""
    small = open_job(tmp_path, prompts_of(3))
    runner = make_runner(small, FakeEngine(fail_at=fail_at))
    runner.add(Assignment(small.plan.units[0], 1))
    with pytest.raises(EngineError, match="the forward failed") as caught:
        work_all(runner)
    assert caught.value.keys
    assert not small.rows()
    runner.close()


def test_an_engine_error_that_names_no_row_is_raised(tmp_path: Path) -> None:
    """Nothing would count such failures, so they could go on for ever."""
    small = open_job(tmp_path, prompts_of(3))
    engine = FakeEngine()
    engine.step = functools.partial(_raise, EngineError("no rows"))  # type: ignore[method-assign]
    runner = make_runner(small, engine)
    runner.add(Assignment(small.plan.units[0], 1))
    with pytest.raises(EngineError, match="no rows"):
        work_all(runner)
    runner.close()


def _raise(error: Exception) -> NoReturn:
    raise error


@pytest.mark.parametrize("engine", [{"kv_tokens": 10**15}, {"kv_tokens": 10**15, "max_rows": 7}])
def test_an_engine_too_large_for_memory_is_refused_by_name(tmp_path: Path, engine: dict[str, int]) -> None:
    small = open_job(tmp_path, prompts_of(1), engine=engine)
    report = Replica("r0", functools.partial(build.make_runner, small.spec)).start()
    assert report.refused
    assert report.fatal is not None
    rows = engine.get("max_rows", 16)
    assert f"engine.max_rows {rows} and engine.kv_tokens {10**15}; lower them" in report.fatal
    assert "\n" not in report.fatal


@pytest.mark.slow
def test_more_cpus_than_there_are_make_no_more_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    small = open_job(tmp_path, prompts_of(1), workers={"gpus": 0, "cpus": 2**40})
    build.make_runner(small.spec, "r0").close()
    assert asked == [os.cpu_count()]


MEMORY_SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path
from pipeline.core.types import Assignment
from tests.workers.fakes import FakeMaker
from tests.workers.jobs import open_job

small = open_job(Path(sys.argv[1]), ["word " * 30] * 60_000, rows_per_file=1000)
runner = FakeMaker(small.spec, max_rows=64)("r0")
waiting, done = list(small.plan.units), 0
while runner.busy or waiting:
    while waiting and len(runner._units) < 2:
        runner.add(Assignment(waiting.pop(0), 1))
    done += len(runner.work(5))
    if done in (10, 60):
        print(done, int(Path("/proc/self/statm").read_text().split()[1]) * 4, flush=True)
        if done == 60:
            break
runner.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_with_the_number_of_units(tmp_path: Path) -> None:
    """After 10 units of 1,000 rows, 50 more of them leave less than 2 MiB behind."""
    environment = memory.environment()
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)]
    output = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=PATIENCE_S
    ).stdout
    after = {int(units): int(kib) for units, kib in (line.split() for line in output.splitlines())}
    assert after[60] - after[10] < 2 << 10, f"KiB after so many units: {after}"


def test_engine_errors_keep_their_rows_through_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(EngineError("failed", keys=("a#1",))))
    assert (str(error), error.keys) == ("failed", ("a#1",))
