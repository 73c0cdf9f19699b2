"""Tests of publishing: a part is published once and whole, whatever fails, and then the segments are removed."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import OutputError, StorageError
from pipeline.input.unit_reader import UnitData
from pipeline.maintenance.verify import verify
from pipeline.output.layout import part_name, record_name
from pipeline.output.part import result_table
from pipeline.output.records import RECORD_KEY
from pipeline.output.unit_store import UnitStore
from pipeline.planning.plan import Plan
from pipeline.storage import retrying
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


# Faults of the store


def test_a_segment_that_alone_cannot_be_read_is_left_out(
    case: tuple[Plan, UnitStore, UnitData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every answer with it is damaged on the way, and all other files can be read."""
    _, store, data = case
    rows = result_table(data.unit, [complete_row(row) for row in data.rows[2:3]])
    store.write_segment(data.unit, rows, writer="d" * 32, number=1, attempt=1)
    read = Storage._read_whole

    def damaged(self: Storage, path: str) -> bytes:
        if WRITER in path:
            raise OSError(5, "checksum mismatch")
        return read(self, path)

    monkeypatch.setattr(Storage, "_read_whole", damaged)
    monkeypatch.setattr(retrying, "LOCAL_PATIENCE_S", 0.01)
    found = store.read_segments(data.unit)
    assert found.table["source_row"].to_pylist() == [2]
    [said] = found.ignored
    assert said.startswith(f"segment _job/segments/{data.unit.id}/{WRITER}-")
    assert "checksum mismatch" in said
    assert said.endswith("its rows are generated again")


def test_an_outage_of_all_files_is_waited_for(
    case: tuple[Plan, UnitStore, UnitData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only reading fails, and names can be listed. No segment is left out for that."""
    _, store, data = case

    def fail(*_: object, **__: object) -> bytes:
        raise OSError(5, "503")

    monkeypatch.setattr(retrying, "LOCAL_PATIENCE_S", 0.01)
    with monkeypatch.context() as patch:
        patch.setattr(Storage, "_read_whole", fail)
        patch.setattr(Storage, "_read_range", fail)
        with pytest.raises(StorageError, match=r"plan\.json: 503"):
            store.read_segments(data.unit)
    assert store.read_segments(data.unit).table.num_rows == 2


def test_a_short_outage_costs_no_segment(
    case: tuple[Plan, UnitStore, UnitData], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is over when the store is asked whether it works for other files."""
    _, store, data = case
    read, probe, broken = Storage._read_whole, Storage._read_range, [True]

    def failing(self: Storage, path: str) -> bytes:
        if broken[0]:
            raise OSError(5, "503")
        return read(self, path)

    def heal(self: Storage, path: str, start: int, end: int) -> bytes:
        broken[0] = False
        return probe(self, path, start, end)

    monkeypatch.setattr(retrying, "LOCAL_PATIENCE_S", 0.01)
    monkeypatch.setattr(Storage, "_read_whole", failing)
    monkeypatch.setattr(Storage, "_read_range", heal)
    found = store.read_segments(data.unit)
    assert (found.table.num_rows, found.ignored) == (2, ())


def test_an_empty_part_is_absent_and_is_filled(case: tuple[Plan, UnitStore, UnitData], tmp_path: Path) -> None:
    """A killed writer has taken the name and nothing more, on a file system without hard links."""
    plan, store, data = case
    path = tmp_path / "out" / part_name(data.unit.id)
    path.touch()
    job = make_job(tmp_path / "in", tmp_path / "out")
    assert open_ledger(job, plan).finished(plan) == {}
    assert store.published(data.unit) is None
    part = part_of(data, plan)
    result = store.publish(data.unit, part)
    assert not result.published_by_other
    assert path.read_bytes() == part


@pytest.mark.parametrize("told", [True, False])
def test_of_two_writers_that_fill_an_empty_part_the_one_whose_content_stays_wins(
    case: tuple[Plan, UnitStore, UnitData], tmp_path: Path, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store, data = case
    path = tmp_path / "out" / part_name(data.unit.id)
    ours, theirs = part_of(data, plan), part_of(data, plan)

    def filled_by_both(_self: Storage, name: str, _data: bytes) -> bool:
        assert name == part_name(data.unit.id)
        path.write_bytes(theirs)
        return told

    monkeypatch.setattr(Storage, "create", filled_by_both)
    result = store.publish(data.unit, ours)
    assert result.published_by_other
    assert path.read_bytes() == theirs
    assert result.sha256 == hashlib.sha256(theirs).hexdigest()


@pytest.mark.parametrize("times", [1, 99])
def test_a_part_whose_write_is_confirmed_and_lost_is_written_again(
    case: tuple[Plan, UnitStore, UnitData], tmp_path: Path, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, store, data = case
    create, left = Storage.create, [times]

    def lossy(self: Storage, name: str, content: bytes) -> bool:
        left[0] -= 1
        return True if left[0] >= 0 else create(self, name, content)

    monkeypatch.setattr(Storage, "create", lossy)
    if times == 1:
        assert not store.publish(data.unit, part_of(data, plan)).published_by_other
        assert (tmp_path / "out" / part_name(data.unit.id)).exists()
    else:
        with pytest.raises(StorageError, match=r"part-.* is not there, though the store confirmed"):
            store.publish(data.unit, part_of(data, plan))


def test_an_empty_segment_of_an_earlier_try_is_filled(case: tuple[Plan, UnitStore, UnitData], tmp_path: Path) -> None:
    _, store, data = case
    [path] = (tmp_path / "out/_job/segments").rglob("*.parquet")
    path.write_bytes(b"")
    rows = result_table(data.unit, [complete_row(row) for row in data.rows[:2]])
    store.write_segment(data.unit, rows, writer=WRITER, number=1, attempt=1)
    assert store.read_segments(data.unit).table.num_rows == 2


def test_a_part_of_another_schema_is_left_to_its_own_version(
    case: tuple[Plan, UnitStore, UnitData], tmp_path: Path
) -> None:
    plan, store, data = case
    path = tmp_path / "out" / part_name(data.unit.id)
    path.write_bytes(part_of(data, plan))
    table = pq.read_table(path)
    metadata = dict(table.schema.metadata or {})
    for change in ({"schema_version": 2}, {"schema_version": 2, "rows": "seven"}):
        record = {**json.loads(metadata[RECORD_KEY.encode()]), **change}
        changed = table.replace_schema_metadata({**metadata, RECORD_KEY.encode(): json.dumps(record).encode()})
        pq.write_table(changed, path)
        with pytest.raises(OutputError, match=r"version 2 of the schema of parts.*: finish it with"):
            store.published(data.unit)
        [said] = [text for text in verify(str(tmp_path / "out")).problems if path.name in text]
        assert "move" not in said
        assert "finish it with the version that began it" in said
