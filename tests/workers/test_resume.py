"""What a replica has finished is kept, however it ends: segments, ranges, stop, and a store that is away."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from model.errors import EngineError
from model.params import Completion, GenerationParams
from pipeline.errors import StorageError
from pipeline.events import RangeDone, UnitDone, UnitFailed
from pipeline.segments import SegmentRows
from pipeline.types import Assignment, UnitResult, WorkUnit
from tests.unit.engine_cases import ScriptedBackend, make_loop
from tests.unit.engine_launches import Fault
from tests.unit.engine_scripts import FIRST, Script
from tests.workers.fakes import TOO_LONG, FakeEngine, make_runner, work_all
from tests.workers.jobs import SmallJob, open_job, prompts_of
from workers import open_unit
from workers.build import PartStore
from workers.unit_runner import UnitRunner

NEVER = {"checkpoint": {"seconds": 3600.0}}
EACH_ROW = {"checkpoint": {"seconds": 3600.0, "rows": 1}}
SAME = ("id", "completion", "finish_reason", "error", "prompt_tokens", "completion_tokens", "denoiser_forwards")


class Killed(Exception):  # noqa: N818
    """The process dies here: nothing after it happens."""


class MortalEngine(FakeEngine):
    """Dies in its step `dies_at`; each step waits until what the runner is writing is written."""

    def __init__(self, dies_at: int) -> None:
        super().__init__()
        self.dies_at = dies_at
        self.runner: UnitRunner | None = None
        self.finished: list[str] = []

    def step(self) -> list[Completion]:
        assert self.runner is not None
        wait([opened.flush for opened in self.runner._open.values() if opened.flush], 20)
        if self.steps == self.dies_at:
            raise Killed
        done = super().step()
        self.finished += [completion.key for completion in done]
        return done


class WatchedStore(PartStore):
    """Knows which rows segments held when a unit was opened; fails as it is told."""

    def __init__(self, small: SmallJob, replica: str = "r0") -> None:
        super().__init__(small.spec, replica)
        self.held: set[str] = set()
        self.refuse_segments = self.refuse_parts = 0
        self.answers_lost = False
        """Whether a part that is refused has arrived all the same."""
        self.tried = Counter[str]()

    def read_segments(self, unit: WorkUnit) -> SegmentRows:
        found = super().read_segments(unit)
        self.held |= {f"{row['source_file']}#{row['source_row']}" for row in found.table.to_pylist()}
        return found

    def write_segment(self, unit: WorkUnit, rows: pa.Table, **of_attempt: Any) -> None:
        self.tried["segment"] += 1
        if self.refuse_segments:
            self.refuse_segments -= 1
            raise StorageError("cannot create it: no route to the store")
        super().write_segment(unit, rows, **of_attempt)

    def publish(self, *args: Any, **of_attempt: Any) -> UnitResult:
        self.tried["part"] += 1
        if self.refuse_parts:
            self.refuse_parts -= 1
            if self.answers_lost:
                super().publish(*args, **of_attempt)
            raise StorageError("cannot create it: no route to the store")
        return super().publish(*args, **of_attempt)


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_unit, "PAUSES_S", (0.01,) * 5)


def same(rows: list[dict[str, Any]]) -> list[list[Any]]:
    return [[row[name] for name in SAME] for row in rows]


def segments_of(small: SmallJob) -> list[Path]:
    return sorted(Path(small.job.output.path).glob("_job/segments/*/*"))


def work_until(runner: UnitRunner, met: Callable[[], object]) -> list[Any]:
    """Works until something is so, 20 s at most -> what became of units meanwhile."""
    outcomes, deadline = [], time.monotonic() + 20
    while not met():
        assert time.monotonic() < deadline
        outcomes += runner.work(0.01)
    return outcomes


def wait_until(met: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def with_bad_rows(count: int) -> list[str | None]:
    prompts: list[str | None] = [*prompts_of(count)]
    prompts[2], prompts[count // 2], prompts[count - 1] = None, "y" * (TOO_LONG + 1), " "
    return prompts


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_any_point_nothing_is_lost_and_little_repeated(tmp_path: Path, seed: int) -> None:
    """Attempt after attempt dies after a random number of steps. The rows are those of a run that was left alone, and
    none that a segment held is generated again. A death costs less than checkpoint.rows rows a unit, and one step's."""
    draw = random.Random(seed)
    at_most = draw.choice([1, 3, 8])
    prompts = with_bad_rows(60)
    small = open_job(tmp_path, prompts, rows_per_file=30, checkpoint={"seconds": 3600.0, "rows": at_most})
    todo, finished, deaths = {unit.id: Assignment(unit) for unit in small.plan.units}, Counter[str](), 0
    while todo:
        store = WatchedStore(small, f"r{deaths}")
        engine = MortalEngine(draw.randrange(1, 25))
        runner = engine.runner = make_runner(small, engine, store, f"r{deaths}")
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


def work_units(small: SmallJob, engine: FakeEngine) -> list[Any]:
    runner = make_runner(small, engine)
    for unit in small.plan.units:
        runner.add(Assignment(unit))
    return work_all(runner)


KILL_SCRIPT = """
import sys
from pathlib import Path
from pipeline.types import Assignment
from tests.workers.fakes import FakeEngine, make_runner
from tests.workers.jobs import open_job, prompts_of

small = open_job(Path(sys.argv[1]), prompts_of(300), rows_per_file=300, checkpoint={"seconds": 0.01})
runner = make_runner(small, FakeEngine(step_s=0.005))
runner.add(Assignment(small.plan.units[0]))
while runner.busy:
    runner.work(1)
"""


def test_a_process_killed_by_sigkill_leaves_what_it_flushed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILL_SCRIPT, str(tmp_path)])
    folder = tmp_path / "out" / "_job" / "segments"
    wait_until(lambda: len(list(folder.glob("*/*.parquet"))) > 5 or process.poll() is not None)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
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
    assert runner.notes() == [
        f"unit {small.plan.units[0].id}: {len(kept)} of 300 rows were finished by earlier attempts"
    ]


@pytest.mark.parametrize("settings", [{"seconds": 0.001}, {"seconds": 3600.0, "rows": 5}], ids=["seconds", "rows"])
def test_a_unit_under_way_is_flushed_when_due(tmp_path: Path, settings: dict[str, float]) -> None:
    small = open_job(tmp_path, prompts_of(200), rows_per_file=200, checkpoint=settings)
    runner = make_runner(small, FakeEngine(step_s=0.002))
    runner.add(Assignment(small.plan.units[0]))
    work_until(runner, lambda: len(segments_of(small)) > 3)
    (progress,) = runner.progress()
    assert 3 < progress.rows < 200
    work_all(runner)
    assert not segments_of(small)


def test_a_suspect_is_reported_as_read_before_a_row_of_it_is_generated(tmp_path: Path) -> None:
    """Should it kill the replica, the driver knows that it had begun."""
    small = open_job(tmp_path, prompts_of(10))
    engine = FakeEngine()
    runner = make_runner(small, engine)
    runner.add(Assignment(small.plan.units[0], 4, (3, 4)))
    assert runner.work(20) == []
    assert [progress.key for progress in runner.progress()] == [(small.plan.units[0].id, (3, 4))]
    assert engine.steps == 0
    work_all(runner)
    assert engine.steps


def test_a_suspect_unit_is_flushed_at_once_and_others_are_not(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(120), rows_per_file=60, **NEVER)
    runner = make_runner(small, FakeEngine(step_s=0.001))
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
    """Two ranges, one condemned row, then the unit: every row once, bad ones of the input as ever."""
    small = open_job(tmp_path, with_bad_rows(10), **NEVER)
    (unit,) = small.plan.units
    engine = FakeEngine()
    runner = make_runner(small, engine)
    pieces = [(0, 4), (4, 5), (5, 10)]
    for attempt, rows in enumerate(pieces, 5):
        condemned = "row a.parquet#4 killed 3 replicas" if rows == (4, 5) else None
        runner.add(Assignment(unit, attempt, rows, condemned=condemned))
        outcomes = work_until(runner, lambda: not runner.busy)
        assert outcomes == [RangeDone("r0", (unit.id, rows))]
        assert not small.rows()
    assert sorted(engine.order) == [f"a.parquet#{i}" for i in (0, 1, 3, 6, 7, 8)]
    runner.add(Assignment(unit, 8))
    ((done,)) = work_all(runner)
    assert isinstance(done, UnitDone)
    assert (done.kept_rows, done.result.totals.errors, len(engine.order)) == (10, 4, 6)
    rows = small.rows()
    assert [row["attempt"] for row in rows] == [5, 5, 5, 5, 6, 7, 7, 7, 7, 7]
    assert {row["source_row"]: row["error"] for row in rows if row["error"]} == {
        2: "prompt is null",
        4: "row a.parquet#4 killed 3 replicas",
        5: f"{TOO_LONG + 1} prompt tokens exceed {TOO_LONG}",
        9: "the prompt has no tokens",
    }
    assert not segments_of(small)


def test_a_range_takes_only_what_segments_lack(tmp_path: Path) -> None:
    """A condemned row that was finished meanwhile stays what it was, and its file is not even opened."""
    small = open_job(tmp_path, prompts_of(10), **NEVER)
    (unit,) = small.plan.units
    runner = make_runner(small, FakeEngine())
    runner.add(Assignment(unit, 2, (2, 6)))
    work_all(runner)
    (tmp_path / "in" / "a.parquet").rename(tmp_path / "elsewhere.parquet")
    engine = FakeEngine()
    runner = make_runner(small, engine)
    runner.add(Assignment(unit, 3, (3, 4), condemned="it killed"))
    assert work_all(runner) == [RangeDone("r0", (unit.id, (3, 4)))]
    runner = make_runner(small, engine)
    runner.add(Assignment(unit, 4, (7, 8), condemned="it killed"))
    assert work_all(runner) == [RangeDone("r0", (unit.id, (7, 8)))]
    (tmp_path / "elsewhere.parquet").rename(tmp_path / "in" / "a.parquet")
    runner = make_runner(small, engine)
    runner.add(Assignment(unit, 5, (0, 8)))
    work_all(runner)
    assert sorted(engine.order) == ["a.parquet#0", "a.parquet#1", "a.parquet#6"]


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
    """A replica dies between its part and its report. A range of such a unit ends too; the whole unit follows it."""
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
    assert runner.notes() == [f"unit {unit.id}: its part is there, published by replica r0 in attempt 1"] * 2


def test_two_attempts_at_the_same_time(tmp_path: Path) -> None:
    """One wins, the other says so; every row is there once and no segment stays."""
    small = open_job(tmp_path, prompts_of(60), rows_per_file=60, **EACH_ROW)
    (unit,) = small.plan.units
    runners = [make_runner(small, FakeEngine(step_s=0.001), replica=f"r{i}") for i in range(2)]
    outcomes: list[Any] = []
    for attempt, runner in enumerate(runners, 1):
        runner.add(Assignment(unit, attempt))
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


# What is in the way of saving.


@pytest.mark.usefixtures("short_pauses")
def test_a_flush_that_fails_keeps_its_rows_until_it_succeeds(tmp_path: Path) -> None:
    """Told once when it begins and once when it ends."""
    small = open_job(tmp_path, prompts_of(30), rows_per_file=30, **NEVER)
    (unit,) = small.plan.units
    store = WatchedStore(small)
    store.refuse_segments = 4
    runner = make_runner(small, FakeEngine(), store)
    runner.add(Assignment(unit, 2, (0, 20)))
    assert work_all(runner) == [RangeDone("r0", (unit.id, (0, 20)))]
    assert store.read_segments(unit).table.num_rows == 20
    first, last = runner.notes()
    assert "rows 0-19 of unit" in first
    assert "finished rows stay in memory for now: cannot create it: no route" in first
    assert "its finished rows are saved again" in last


@pytest.mark.usefixtures("short_pauses")
def test_a_range_that_cannot_be_saved_fails_in_the_end(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(10), **NEVER)
    store = WatchedStore(small)
    store.refuse_segments = 10**6
    runner = make_runner(small, FakeEngine(), store)
    work = Assignment(small.plan.units[0], 2, (0, 5))
    runner.add(work)
    (failed,) = work_all(runner)
    assert isinstance(failed, UnitFailed)
    assert failed.work == work
    assert "no route to the store (" in failed.reason


@pytest.mark.usefixtures("short_pauses")
def test_a_part_that_cannot_be_published_for_a_while(tmp_path: Path) -> None:
    """Its rows are in memory, and in a segment at once; then it is published, and they are not generated again."""
    small = open_job(tmp_path, prompts_of(20), rows_per_file=20, **NEVER)
    store, engine = WatchedStore(small), FakeEngine()
    store.refuse_parts = 5
    runner = make_runner(small, engine, store)
    runner.add(Assignment(small.plan.units[0]))
    (done,) = work_all(runner)
    assert isinstance(done, UnitDone)
    assert not done.result.published_by_other
    assert (store.tried["part"], store.tried["segment"], len(engine.order)) == (6, 1, 20)
    assert [row["completion"] for row in small.rows()] == [prompt[::-1] for prompt in prompts_of(20)]
    assert not segments_of(small)
    notes = runner.notes()
    assert len(notes) == 5
    assert all("its part is tried again in 0.01 s: cannot create it" in note for note in notes)


@pytest.mark.usefixtures("short_pauses")
def test_a_part_that_arrived_without_an_answer_is_ones_own(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(10))
    store = WatchedStore(small)
    store.refuse_parts, store.answers_lost = 2, True
    runner = make_runner(small, FakeEngine(), store)
    runner.add(Assignment(small.plan.units[0]))
    (done,) = work_all(runner)
    assert isinstance(done, UnitDone)
    assert not done.result.published_by_other


@pytest.mark.usefixtures("short_pauses")
def test_a_part_that_cannot_be_published_at_all_is_left_to_others_with_its_rows(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(10), **NEVER)
    store = WatchedStore(small)
    store.refuse_parts = 6
    (unit,) = small.plan.units
    runner = make_runner(small, FakeEngine(), store)
    runner.add(Assignment(unit))
    (failed,) = work_all(runner)
    assert failed == UnitFailed("r0", Assignment(unit), "cannot create it: no route to the store (6 times)")
    engine = FakeEngine()
    runner = make_runner(small, engine)
    runner.add(Assignment(unit, 2, failures=1))
    (done,) = work_all(runner)
    assert isinstance(done, UnitDone)
    assert not engine.order


def test_what_failed_waits_before_it_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that refuses at once is not asked in a loop, and the engine goes on meanwhile."""
    monkeypatch.setattr(open_unit, "PAUSES_S", (3600.0,))
    small = open_job(tmp_path, prompts_of(20), **NEVER)
    store, engine = WatchedStore(small), FakeEngine()
    store.refuse_segments = store.refuse_parts = 1
    runner = make_runner(small, engine, store)
    first, second = small.plan.units
    runner.add(Assignment(first, 2, (0, 10)))
    runner.add(Assignment(second))
    work_until(runner, lambda: len(engine.order) == 20 and not engine.slots)
    assert runner.work(0.2) == []
    assert store.tried == {"segment": 2, "part": 1}, "the second one's rows were saved when its part was refused"
    assert runner.doing() == f"saving rows 0-9 of unit {first.id}; publishing unit {second.id}"
    runner.close()


class ResetStore(PartStore):
    """The first readings of a unit break off."""

    def __init__(self, small: SmallJob, failures: int, cause: OSError) -> None:
        super().__init__(small.spec, "r0")
        self.failures, self.cause = failures, cause

    def published(self, unit: WorkUnit) -> UnitResult | None:
        if self.failures:
            self.failures -= 1
            raise StorageError("cannot read it") from self.cause
        return super().published(unit)


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    ("failures", "cause", "ends"),
    [
        (5, ConnectionResetError(), UnitDone),
        (6, ConnectionResetError(), UnitFailed),
        (1, PermissionError(), UnitFailed),
    ],
)
def test_reading_is_tried_again_where_that_can_help(tmp_path: Path, failures: int, cause: OSError, ends: type) -> None:
    small = open_job(tmp_path, prompts_of(10))
    runner = make_runner(small, FakeEngine(), ResetStore(small, failures, cause))
    runner.add(Assignment(small.plan.units[0]))
    (outcome,) = work_all(runner)
    assert isinstance(outcome, ends)


# Stopping.


def test_stop_from_another_thread_saves_all_that_is_finished(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(400), rows_per_file=200, **NEVER)
    engine = FakeEngine(step_s=0.002)
    runner = make_runner(small, engine)
    for unit in small.plan.units:
        runner.add(Assignment(unit))
    flushed: list[int] = []
    stopper = threading.Thread(target=lambda: flushed.append(runner.stop(20)))
    work_until(runner, lambda: sum(report.rows for report in runner.progress()) > 40)
    stopper.start()
    assert runner.work(20) == []
    stopper.join()
    finished = sum(report.rows for report in runner.progress())
    assert flushed == [finished]
    started = time.monotonic()
    assert runner.work(20) == []
    assert time.monotonic() - started < 10
    assert runner.stop(20) == 0
    runner.close()
    again = FakeEngine()
    outcomes = work_units(small, again)
    assert sum(done.kept_rows for done in outcomes) == finished
    assert len(again.order) == 400 - finished
    assert [row["completion"] for row in small.rows()] == [prompt[::-1] for prompt in prompts_of(400)]


def test_stop_does_not_wait_for_a_step_that_hangs(tmp_path: Path) -> None:
    """What was finished before it is saved, and whoever asks meanwhile is answered."""
    small = open_job(tmp_path, prompts_of(30), rows_per_file=30, **NEVER)
    engine, hang, hangs = FakeEngine(max_rows=2), threading.Event(), threading.Event()
    step = engine.step

    def step_or_hang() -> Sequence[Completion]:
        if engine.steps == 20:
            hangs.set()
            assert hang.wait(20)
        return step()

    engine.step = step_or_hang  # type: ignore[method-assign,assignment]
    runner = make_runner(small, engine)
    runner.add(Assignment(small.plan.units[0]))
    worker = threading.Thread(target=runner.work, args=(20,))
    worker.start()
    assert hangs.wait(20)
    (progress,) = runner.progress()
    assert progress.rows
    text = f"generating unit {small.plan.units[0].id}: {progress.rows} of 30 rows, "
    assert runner.doing().startswith(text)
    assert runner.stop(1) == progress.rows
    hang.set()
    worker.join()
    runner.close()
    assert PartStore(small.spec, "r1").read_segments(small.plan.units[0]).table.num_rows == progress.rows


def test_stop_waits_for_the_step_under_way(tmp_path: Path) -> None:
    """Rows that end in it are saved, too."""
    small = open_job(tmp_path, prompts_of(30), rows_per_file=30, **NEVER)
    engine, stepping = FakeEngine(max_rows=30), threading.Event()
    step = engine.step

    def slow_step() -> Sequence[Completion]:
        stepping.set()
        time.sleep(0.5)
        return [row for _ in range(7) for row in step()]

    engine.step = slow_step  # type: ignore[method-assign,assignment]
    runner = make_runner(small, engine)
    runner.add(Assignment(small.plan.units[0]))
    worker = threading.Thread(target=runner.work, args=(20,))
    worker.start()
    assert stepping.wait(20)
    assert runner.stop(30) == 30
    worker.join()
    runner.close()


@pytest.mark.parametrize("failures", [2, 10**6])
def test_stop_tries_until_its_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    monkeypatch.setattr("workers.unit_runner.STOP_PAUSE_S", 0.01)
    small = open_job(tmp_path, prompts_of(30), rows_per_file=30, **NEVER)
    store = WatchedStore(small)
    runner = make_runner(small, FakeEngine(step_s=0.002), store)
    runner.add(Assignment(small.plan.units[0]))
    work_until(runner, lambda: sum(report.rows for report in runner.progress()) > 5)
    finished = sum(report.rows for report in runner.progress())
    store.refuse_segments = failures
    assert runner.stop(20 if failures == 2 else 0.2) == (finished if failures == 2 else 0)
    runner.close()


def test_what_an_idle_runner_and_a_busy_one_are_doing(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(40), rows_per_file=20)
    store, gate = WatchedStore(small), threading.Event()
    publish = store.publish

    def publish_later(*args: Any, **of_attempt: Any) -> UnitResult:
        assert gate.wait(20)
        return publish(*args, **of_attempt)

    store.publish = publish_later  # type: ignore[method-assign]
    runner = make_runner(small, FakeEngine(), store)
    first, second = small.plan.units
    assert (runner.doing(), runner.beats, runner.stop(0.01)) == ("idle", 0, 0)
    runner = make_runner(small, FakeEngine(), store)
    runner.add(Assignment(first))
    assert runner.doing() == f"reading unit {first.id}"
    beats = [runner.beats]
    work_until(runner, lambda: "publishing" in runner.doing())
    beats.append(runner.beats)
    runner.add(Assignment(second, 2, (3, 9)))
    assert runner.doing() == f"publishing unit {first.id}; reading rows 3-8 of unit {second.id}"
    gate.set()
    work_all(runner)
    beats.append(runner.beats)
    assert beats[0] < beats[1] < beats[2]
    assert runner.doing() == "idle"


# Memory that runs out, with the engine's own loop.


class FixedTokenizer:
    """Forty tokens, different for each prompt."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [[5000 + len(text) + i for i in range(40)] for text in texts]


def scripted_runner(small: SmallJob, faults: dict[int, Fault]) -> tuple[UnitRunner, ScriptedBackend]:
    scripts = {f"a.parquet#{i}": Script((1 + i % 3,)) for i in range(20)}
    loop, backend = make_loop(scripts, rows=8, faults=faults)
    params = GenerationParams(max_new_tokens=20, block_size=8, steps_per_block=8)
    checkpoint, store = small.job.checkpoint, PartStore(small.spec, "r0")
    return UnitRunner(loop, FixedTokenizer(), store, params, replica="r0", checkpoint=checkpoint), backend


@pytest.mark.parametrize("kind", ["launch oom", "collect oom"])
def test_memory_that_runs_out_costs_no_row(tmp_path: Path, kind: Fault) -> None:
    """The engine halves its limits and requeues the rows itself; the runner hears of it and says so."""
    small = open_job(tmp_path, prompts_of(20), rows_per_file=20)
    runner, _ = scripted_runner(small, dict.fromkeys((3, 7, 12), kind))
    runner.add(Assignment(small.plan.units[0]))
    (done,) = work_all(runner)
    assert isinstance(done, UnitDone)
    told = "".join(chr(FIRST + i) for i in range(20))
    assert [(row["completion"], row["error"]) for row in small.rows()] == [(told, None)] * 20
    assert any("memory ran out: engine.max_rows is" in note for note in runner.notes())


def test_memory_that_runs_out_for_good_ends_the_replica_and_loses_nothing(tmp_path: Path) -> None:
    """The same row fails twice: work raises, so that the unit goes elsewhere; stop saves what was finished."""
    small = open_job(tmp_path, prompts_of(20), rows_per_file=20, **NEVER)
    runner, backend = scripted_runner(small, dict.fromkeys(range(20, 1000), "launch oom"))
    runner.add(Assignment(small.plan.units[0]))
    with pytest.raises(EngineError):
        work_all(runner)
    (progress,) = runner.progress()
    assert 0 < progress.rows < 20
    assert runner.stop(20) == progress.rows
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
    assert runner.stop(20) > 0
    runner.close()
    store = WatchedStore(small)
    store.read_segments(small.plan.units[0])
    assert ended <= store.held
    assert not store.held & set(caught.value.keys)
