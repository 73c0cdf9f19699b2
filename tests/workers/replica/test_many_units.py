"""Tests of a replica that holds many small units: its engine is as full as with one large unit, and they are looked up
in several threads but opened in order."""

import threading
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.events import UnitProgress
from pipeline.core.types import Assignment, WorkUnit
from pipeline.driver.holding import ROWS_AHEAD
from pipeline.output.segments import SegmentRows
from pipeline.output.unit_store import UnitStore
from tests.waiting import PATIENCE_S, wait_until
from tests.workers.fakes import FakeEngine, FakeMaker, make_runner, run_locally, work_all
from tests.workers.jobs import SmallJob, open_job, prompts_of
from workers.replica.local_pool import LocalPool
from workers.replica.replica import Replica
from workers.units.runner import LOOKERS, QUEUE_FACTOR, UnitRunner

MAX_ROWS = 16


class PunctualMaker(FakeMaker):
    """Makes runners whose engine waits for the files, as a busy machine may not read and write them in time."""

    def __call__(self, replica: str) -> UnitRunner:
        runner = super().__call__(replica)
        engine = runner._engine
        assert isinstance(engine, FakeEngine)

        def wait_for_files() -> None:
            under_way: list[Future[Any]] = list(runner._reading.values())
            under_way += [opened.publishing for opened in runner._open.values() if opened.publishing]
            assert not wait(under_way, PATIENCE_S).not_done

        engine.before_step = wait_for_files
        self.engine = engine
        return runner


@pytest.mark.parametrize("rows_per_file", [1, 5])
def test_small_units_fill_the_engine_as_one_large_unit_does(tmp_path: Path, rows_per_file: int) -> None:
    """The engine makes at most 5% more steps for the same rows, so the mean number of rows in a step is as large."""
    steps = {}
    for rows in (rows_per_file, 300):
        small = open_job(tmp_path / str(rows), prompts_of(300), rows_per_file=rows)
        maker = PunctualMaker(small.spec, max_rows=MAX_ROWS)
        assert len(run_locally(small, LocalPool(maker))) == 300 // rows
        assert len(small.rows()) == 300
        steps[rows] = maker.engine.steps
    assert steps[rows_per_file] <= 1.05 * steps[300], steps


def test_the_driver_gives_more_rows_than_the_engine_takes() -> None:
    """Otherwise nothing would be read in advance."""
    assert ROWS_AHEAD > 1 + QUEUE_FACTOR


class MeetingStore(UnitStore):
    """A store in which the look at a unit ends only when `together` looks are under way at the same time."""

    def __init__(self, small: SmallJob, together: int) -> None:
        super().__init__(small.job, small.plan.fingerprint.digest, small.plan.schema, small.plan.prompts, "r0")
        self.meeting = threading.Barrier(together, timeout=PATIENCE_S)

    def read_segments(self, unit: WorkUnit) -> SegmentRows:
        self.meeting.wait()
        return super().read_segments(unit)


def test_units_are_looked_up_together_and_opened_in_order(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(2 * LOOKERS), rows_per_file=1)
    engine = FakeEngine()
    runner = make_runner(small, engine, MeetingStore(small, LOOKERS))
    for unit in reversed(small.plan.units):
        runner.add(Assignment(unit))
    work_all(runner)
    assert list(engine.order) == [f"a.parquet#{row}" for row in reversed(range(2 * LOOKERS))]


def test_a_unit_whose_look_takes_long_keeps_its_place(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(3), rows_per_file=1)
    store, first = small.spec.open_store("r0"), small.plan.units[0]
    looked, read_segments = threading.Semaphore(0), store.read_segments

    def first_waits_for_the_others(unit: WorkUnit) -> SegmentRows:
        if unit == first:
            for _ in range(2):
                assert looked.acquire(timeout=PATIENCE_S)
        found = read_segments(unit)
        looked.release()
        return found

    store.read_segments = first_waits_for_the_others  # type: ignore[method-assign]
    engine = FakeEngine()
    runner = make_runner(small, engine, store)
    for unit in small.plan.units:
        runner.add(Assignment(unit))
    work_all(runner)
    assert list(engine.order) == [f"a.parquet#{row}" for row in range(3)]


def test_units_have_begun_when_their_rows_may_get_slots_and_that_is_reported_first(tmp_path: Path) -> None:
    """No step is made between the moment when a unit is marked and the report."""
    small = open_job(tmp_path, prompts_of(12), rows_per_file=1)
    engine = FakeEngine(max_rows=4)
    runner = make_runner(small, engine)
    reported: set[str] = set()

    def check() -> None:
        in_slots = [*engine.slots, *(request.key for request in list(engine.queue)[: 4 - len(engine.slots)])]
        units = {runner._in_engine[key][0].work.unit.id for key in in_slots}
        assert units <= reported

    engine.before_step = check
    for unit in small.plan.units:
        runner.add(Assignment(unit))
    assert runner.work(PATIENCE_S) == []
    assert 0 < sum(report.begun for report in runner.progress()) <= 4
    while runner.busy:
        reported |= {report.key[0] for report in runner.progress() if report.begun}
        runner.work(PATIENCE_S)
    assert len(reported) == 12
    runner.close()


def test_the_text_about_many_units_is_short(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(40), rows_per_file=1)
    runner = make_runner(small, FakeEngine())
    for unit in small.plan.units:
        runner.add(Assignment(unit))
    assert runner.doing() == f"reading unit {small.plan.units[0].id}; and 39 more"
    assert runner.work(0.1) == []
    work_all(runner)
    assert runner.doing() == "idle"


def test_a_replica_reports_the_progress_of_units_only_when_it_has_changed(tmp_path: Path) -> None:
    """With hundreds of units that wait for the engine, the reports would be long otherwise."""
    small = open_job(tmp_path, prompts_of(40), rows_per_file=1)
    replica = Replica("r0", FakeMaker(small.spec))
    assert replica.start().max_rows == 4
    for unit in small.plan.units:
        replica.assign(Assignment(unit))
    reports: list[list[UnitProgress]] = []

    def work() -> bool:
        events = replica.work(PATIENCE_S).events
        reports.append([event for event in events if isinstance(event, UnitProgress)])
        return replica._runner is not None and not replica._runner.busy

    wait_until(work, pause_s=0)
    last: dict[Any, UnitProgress] = {}
    for report in (report for reported in reports for report in reported):
        assert report != last.get(report.key)
        last[report.key] = report
    assert len(last) == 40
    replica.close()
