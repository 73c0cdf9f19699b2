"""Tests of the search for ids that occur more than once, in bounded memory."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.output import duplicate_ids
from pipeline.output.duplicate_ids import find_duplicates
from pipeline.storage.storage import Storage
from tests.pipeline.cases import make_job, prompts, run, write


@pytest.mark.parametrize("as_text", [True, False])
def test_duplicates_across_parts_and_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_text: bool) -> None:
    """Duplicates are counted exactly with many buckets, for text and for numbers. At most ten examples are given, and
    nulls are no ids."""
    monkeypatch.setattr(duplicate_ids, "IDS_A_BUCKET", 50)
    monkeypatch.setattr(duplicate_ids, "BATCH_ROWS", 64)
    kind = pa.string() if as_text else pa.int64()
    ids = [list(range(300)), [*range(295, 500), None, None], [2**61 - 1, 0, 7, 7, -1]]
    for number, values in enumerate(ids):
        write(tmp_path / f"part-{number}.parquet", id=pa.array(values, pa.int64()).cast(kind))
    storage = Storage(str(tmp_path))
    parts = storage.list_files("", "part-*.parquet")
    count, examples = find_duplicates(storage, parts, rows=520)
    assert count == 5 + 3
    assert set(examples) == {"295", "296", "297", "298", "299", "0", "7"}
    for number in range(30):
        write(tmp_path / f"part-9{number}.parquet", id=pa.array([number], pa.int64()).cast(kind))
    count, examples = find_duplicates(storage, storage.list_files("", "part-*.parquet"), rows=550)
    assert count == 38
    assert len(examples) == 10
    assert len(set(examples)) == 10


def test_no_duplicates(tmp_path: Path) -> None:
    write(tmp_path / "part-0.parquet", id=["a", "b", None, None])
    storage = Storage(str(tmp_path))
    assert find_duplicates(storage, storage.list_files("", "part-*"), rows=4) == (0, ())


def test_ids_made_by_the_pipeline_are_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file and a row number cannot repeat, so the output is not read for such ids."""

    def unwanted(*_: object) -> None:
        raise AssertionError("the parts were read")

    monkeypatch.setattr("pipeline.output.ledger.find_duplicates", unwanted)
    write(tmp_path / "in/a.parquet", prompt=prompts(3))
    _, _, manifest = run(make_job(tmp_path / "in", tmp_path / "out"))
    assert manifest["duplicate_ids"] == 0
