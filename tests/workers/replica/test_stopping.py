"""Tests of a replica that is stopped: it saves its finished rows. Its current work can be asked for at any time."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from model.requests import Completion
from pipeline.core.types import Assignment, UnitResult
from tests.waiting import PATIENCE_S, wait_until
from tests.workers.fakes import FakeEngine, make_runner, work_all
from tests.workers.jobs import open_job, prompts_of
from tests.workers.units.resume_cases import NEVER, WatchedStore, work_units, work_until
from workers.units.runner import UnitRunner


def told_to_stop(runner: UnitRunner) -> None:
    """Wait until the runner's `stop` has been called."""
    wait_until(lambda: runner._stopped, pause_s=0.001)


def test_stop_from_another_thread_saves_all_that_is_finished(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(400), rows_per_file=200, **NEVER)
    engine = FakeEngine(step_s=0.002)
    runner = make_runner(small, engine)
    for unit in small.plan.units:
        runner.add(Assignment(unit))
    flushed: list[int] = []
    stopper = threading.Thread(target=lambda: flushed.append(runner.stop(PATIENCE_S)))
    work_until(runner, lambda: sum(report.rows for report in runner.progress()) > 40)
    engine.before_step = lambda: told_to_stop(runner)  # it is stopped in the middle of a step
    stopper.start()
    assert runner.work(PATIENCE_S) == []
    stopper.join()
    finished = sum(report.rows for report in runner.progress())
    assert flushed == [finished]
    steps, started = engine.steps, time.monotonic()
    assert runner.work(PATIENCE_S) == []
    assert time.monotonic() - started < PATIENCE_S / 2  # it returned at once
    assert engine.steps == steps
    assert runner.stop(PATIENCE_S) == 0
    runner.close()
    again = FakeEngine()
    outcomes = work_units(small, again)
    assert sum(done.kept_rows for done in outcomes) == finished
    assert len(again.order) == 400 - finished
    assert [row["completion"] for row in small.rows()] == [prompt[::-1] for prompt in prompts_of(400)]


class Impatient(threading.Event):
    """An event that keeps the timeout of each wait, and does not wait."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[float | None] = []

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout)
        return self.is_set()


def test_stop_does_not_wait_for_a_step_that_hangs(tmp_path: Path) -> None:
    """It waits for half of its time only. The rows that were finished before are saved, and questions are answered
    meanwhile."""
    small = open_job(tmp_path, prompts_of(30), rows_per_file=30, **NEVER)
    engine, hang, hangs = FakeEngine(max_rows=2), threading.Event(), threading.Event()

    def hang_in_the_middle() -> None:
        if engine.steps == 20:
            hangs.set()
            assert hang.wait(PATIENCE_S)

    engine.before_step = hang_in_the_middle
    runner = make_runner(small, engine)
    idle = runner._idle = Impatient()
    runner.add(Assignment(small.plan.units[0]))
    assert runner.work(PATIENCE_S) == []  # it has read the unit
    assert runner.work(PATIENCE_S) == []  # it has generated its first row
    worker = threading.Thread(target=runner.work, args=(PATIENCE_S,))
    worker.start()
    assert hangs.wait(PATIENCE_S)
    (progress,) = runner.progress()
    assert progress.rows
    text = f"generating unit {small.plan.units[0].id}: {progress.rows} of 30 rows, "
    assert runner.doing().startswith(text)
    assert runner.stop(PATIENCE_S) == progress.rows
    assert idle.waits == [PATIENCE_S / 2]
    hang.set()
    worker.join()
    runner.close()
    assert small.spec.open_store("r1").read_segments(small.plan.units[0]).table.num_rows == progress.rows


def test_stop_waits_for_the_step_under_way(tmp_path: Path) -> None:
    """Rows that end in this step are saved, too."""
    small = open_job(tmp_path, prompts_of(30), rows_per_file=30, **NEVER)
    engine, stepping = FakeEngine(max_rows=30), threading.Event()
    step = engine.step

    def slow_step() -> Sequence[Completion]:
        stepping.set()
        told_to_stop(runner)
        time.sleep(0.2)  # `stop` is waiting by now, or comes later: it must wait in both cases
        return [row for _ in range(7) for row in step()]

    engine.step = slow_step  # type: ignore[method-assign,assignment]
    runner = make_runner(small, engine)
    runner.add(Assignment(small.plan.units[0]))
    assert runner.work(PATIENCE_S) == []  # it has read the unit
    worker = threading.Thread(target=runner.work, args=(PATIENCE_S,))
    worker.start()
    assert stepping.wait(PATIENCE_S)
    assert runner.stop(PATIENCE_S) == 30
    worker.join()
    runner.close()


@pytest.mark.parametrize("failures", [2, 10**6])
def test_stop_tries_until_its_time_is_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int) -> None:
    monkeypatch.setattr("workers.units.runner.STOP_PAUSE_S", 0.01)
    small = open_job(tmp_path, prompts_of(30), rows_per_file=30, **NEVER)
    store = WatchedStore(small)
    runner = make_runner(small, FakeEngine(step_s=0.002), store)
    runner.add(Assignment(small.plan.units[0]))
    work_until(runner, lambda: sum(report.rows for report in runner.progress()) > 5)
    finished = sum(report.rows for report in runner.progress())
    store.refuse_segments = failures
    assert runner.stop(PATIENCE_S if failures == 2 else 0.2) == (finished if failures == 2 else 0)
    runner.close()


def test_what_an_idle_runner_and_a_busy_one_are_doing(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(40), rows_per_file=20)
    store, gate = WatchedStore(small), threading.Event()
    publish = store.publish

    def publish_later(*args: Any, **of_attempt: Any) -> UnitResult:
        assert gate.wait(PATIENCE_S)
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
