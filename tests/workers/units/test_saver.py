"""Tests of a store that cannot be reached: finished rows stay in memory and are saved later."""

from pathlib import Path

import pytest

from pipeline.core.errors import StorageError
from pipeline.core.events import RangeDone, UnitDone, UnitFailed
from pipeline.core.types import Assignment, UnitResult, WorkUnit
from pipeline.output.unit_store import UnitStore
from tests.workers.fakes import FakeEngine, make_runner, work_all
from tests.workers.jobs import SmallJob, open_job, prompts_of
from tests.workers.units.resume_cases import NEVER, WatchedStore, segments_of, work_until
from workers.units import unit as open_unit


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_unit, "PAUSES_S", (0.01,) * 5)


@pytest.mark.usefixtures("short_pauses")
def test_a_flush_that_fails_keeps_its_rows_until_it_succeeds(tmp_path: Path) -> None:
    """The operator is told once when it begins and once when it ends."""
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
    assert "finished rows kept in memory, as saving failed: cannot create it: no route" in first
    assert "the storage works again, and its finished rows are saved" in last


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
    """Its rows stay in memory, and are saved in a segment at once. Later it is published, and no row is generated
    again."""
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
    assert all("its part could not be published; next try in 0.01 s: cannot create it" in note for note in notes)


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
    assert failed == UnitFailed("r0", Assignment(unit), "cannot create it: no route to the store (6 times)", "save")
    engine = FakeEngine()
    runner = make_runner(small, engine)
    runner.add(Assignment(unit, 2, failures=1))
    (done,) = work_all(runner)
    assert isinstance(done, UnitDone)
    assert not engine.order


def test_what_failed_waits_before_it_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that refuses at once is not asked again and again, and the engine continues meanwhile."""
    monkeypatch.setattr(open_unit, "PAUSES_S", (3600.0,))
    small = open_job(tmp_path, prompts_of(20), **NEVER)
    store, engine = WatchedStore(small), FakeEngine()
    store.refuse_segments = store.refuse_parts = 1
    runner = make_runner(small, engine, store)
    first, second = small.plan.units
    runner.add(Assignment(first, 2, (0, 10)))
    runner.add(Assignment(second))
    waiting = f"saving rows 0-9 of unit {first.id}; publishing unit {second.id}"

    def refused() -> bool:
        """Return whether the flush of the first and the part of the second were refused, and the rows of the second
        saved."""
        return store.tried == {"segment": 2, "part": 1} and runner.doing() == waiting

    assert work_until(runner, refused) == []
    assert len(engine.order) == 20
    assert not engine.slots
    assert runner.work(0.2) == []
    assert refused(), (store.tried, runner.doing())
    runner.close()


class ResetStore(UnitStore):
    """A store in which the first reads of a unit break off."""

    def __init__(self, small: SmallJob, failures: int, cause: OSError) -> None:
        super().__init__(small.job, small.plan.fingerprint.digest, small.plan.schema, small.plan.prompts, "r0")
        self.failures, self.cause = failures, cause

    def published(self, unit: WorkUnit) -> UnitResult | None:
        if self.failures:
            self.failures -= 1
            raise StorageError("cannot read it") from self.cause
        return super().published(unit)


@pytest.mark.usefixtures("short_pauses")
@pytest.mark.parametrize(
    ("before", "failures", "cause", "ends"),
    [
        (0, 5, ConnectionResetError(), UnitDone),
        (0, 6, ConnectionResetError(), UnitFailed),
        (0, 5, PermissionError(), UnitDone),
        (0, 6, PermissionError(), UnitFailed),
        (1, 2, ConnectionResetError(), UnitDone),
        (1, 3, ConnectionResetError(), UnitFailed),
    ],
)
def test_a_read_that_fails_at_the_storage_is_tried_again(
    tmp_path: Path, before: int, failures: int, cause: OSError, ends: type
) -> None:
    """It is tried as often as a write, whatever the store says; less often if the same work has failed `before`."""
    small = open_job(tmp_path, prompts_of(10))
    runner = make_runner(small, FakeEngine(), ResetStore(small, failures, cause))
    runner.add(Assignment(small.plan.units[0], failures=before))
    (outcome,) = work_all(runner)
    assert isinstance(outcome, ends)


def test_an_outage_is_told_once_and_not_for_each_of_many_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_unit, "PAUSES_S", (3600.0,))
    small = open_job(tmp_path, prompts_of(40), rows_per_file=1)
    store = WatchedStore(small)
    store.refuse_parts = 10**6
    published = store.published

    def fail_for_the_last(unit: WorkUnit) -> UnitResult | None:
        if unit in small.plan.units[20:]:
            raise StorageError("cannot read it") from ConnectionResetError()
        return published(unit)

    store.published = fail_for_the_last  # type: ignore[method-assign]
    runner = make_runner(small, FakeEngine(), store)
    for unit in small.plan.units:
        runner.add(Assignment(unit))
    assert work_until(runner, lambda: runner.stats().storage_retries == 40) == []
    assert len(runner.notes()) == 2
    runner.close()
