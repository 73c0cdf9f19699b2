"""Tests of publishing: a part is published once and whole, whatever fails, and then the segments are removed."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import OutputError, StorageError
from pipeline.input.unit_reader import UnitData
from pipeline.output.layout import part_name, record_name
from pipeline.output.part import result_table
from pipeline.output.unit_store import UnitStore
from pipeline.planning.plan import Plan
from pipeline.storage.storage import Storage
from tests.pipeline.cases import (
    complete_row,
    make_job,
    open_ledger,
    part_of,
    plan_of,
    prompts,
    store_of,
    with_stamp,
    write,
)

WRITER = "c" * 32


@pytest.fixture
def case(tmp_path: Path) -> tuple[Plan, UnitStore, UnitData]:
    """Make a job with one unit of five rows, of which two are in a segment."""
    write(tmp_path / "in/a.parquet", prompt=prompts(5))
    job = make_job(tmp_path / "in", tmp_path / "out")
    plan = plan_of(job)
    open_ledger(job, plan)
    store = store_of(job, plan)
    data = store.input.read(plan.units[0])
    rows = result_table(data.unit, [complete_row(row) for row in data.rows[:2]])
    store.write_segment(data.unit, rows, writer=WRITER, number=1, attempt=1)
    return plan, store, data


def test_the_segments_go_when_the_part_is_there(case: tuple[Plan, UnitStore, UnitData], tmp_path: Path) -> None:
    plan, store, data = case
    assert store.read_segments(data.unit).table.num_rows == 2
    assert store.published(data.unit) is None
    result = store.publish(data.unit, part_of(data, plan))
    assert not result.published_by_other
    assert not list((tmp_path / "out/_job/segments").rglob("*.parquet"))
    assert (tmp_path / "out" / record_name(data.unit.id)).exists()


def test_what_the_winner_left_undone_is_done_by_who_comes_after(
    case: tuple[Plan, UnitStore, UnitData], tmp_path: Path
) -> None:
    """The winner died after its part and before its record. The next attempt generates nothing, writes the record and
    removes the segments."""
    plan, store, data = case
    part = part_of(data, plan)
    Storage(str(tmp_path / "out")).create(part_name(data.unit.id), part)
    result = store.published(data.unit)
    assert result is not None
    assert result.published_by_other
    assert (result.totals.rows, result.replica) == (5, "replica-0")
    assert (tmp_path / "out" / record_name(data.unit.id)).exists()
    assert not list((tmp_path / "out/_job/segments").rglob("*.parquet"))
    late = store.publish(data.unit, part_of(data, plan, attempt=2))
    assert (late.published_by_other, late.attempt, late.sha256) == (True, 1, result.sha256)


@pytest.mark.parametrize("arrived", [False, True])
def test_publishing_again_after_a_failure(
    case: tuple[Plan, UnitStore, UnitData], monkeypatch: pytest.MonkeyPatch, arrived: bool
) -> None:
    """It works even if the first try did arrive: the writer id shows that the part is this attempt's own."""
    plan, store, data = case
    part, create = part_of(data, plan), Storage.create

    def fail(self: Storage, *args: Any) -> bool:
        if arrived:
            create(self, *args)
        raise StorageError("cannot create it: connection reset")

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "create", fail)
        with pytest.raises(StorageError):
            store.publish(data.unit, part)
    result = store.publish(data.unit, part)
    assert not result.published_by_other
    assert result.totals.rows == 5


def test_a_broken_part_is_an_error_not_a_result(case: tuple[Plan, UnitStore, UnitData], tmp_path: Path) -> None:
    """The broken part is not overwritten, and the segments stay, so that they can be used after it is deleted."""
    plan, store, data = case
    (tmp_path / "out" / part_name(data.unit.id)).write_bytes(b"half")
    with pytest.raises(OutputError, match="is broken"):
        store.published(data.unit)
    with pytest.raises(OutputError, match="is broken"):
        store.publish(data.unit, part_of(data, plan))
    assert store.read_segments(data.unit).table.num_rows == 2


def test_segments_that_cannot_be_removed_stop_nobody(
    case: tuple[Plan, UnitStore, UnitData], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store, data = case

    def fail(_self: Storage, name: str) -> None:
        raise StorageError(f"cannot delete {name}")

    monkeypatch.setattr(Storage, "remove", fail)
    assert store.publish(data.unit, part_of(data, plan)).totals.rows == 5


def test_a_part_of_another_version_of_the_input_file_is_refused(
    case: tuple[Plan, UnitStore, UnitData], tmp_path: Path
) -> None:
    """An old run publishes late, after the file was rewritten, so its rows are not those of the new run."""
    plan, store, data = case
    late = dataclasses.replace(data, unit=with_stamp(data.unit, "mtime:0"))
    Storage(str(tmp_path / "out")).create(part_name(data.unit.id), part_of(late, plan))
    with pytest.raises(OutputError, match=r"was made of another version of a\.parquet; put back"):
        store.published(data.unit)
