"""Tests of bytes of the input that are damaged, on their way here or in the store: no row is ever changed unnoticed."""

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.config.job import Job
from pipeline.core.errors import InputError, StorageError
from pipeline.input import parquet_rows
from pipeline.input.unit_reader import UnitData
from pipeline.planning.plan import Plan
from pipeline.storage import retrying
from pipeline.storage.storage import Storage
from tests.pipeline.cases import make_job, plan_of, reader_of

ROWS, GROUP = 300, 60
TIMES = 60
"""The number of times that a prompt repeats its text: pyarrow reads the last 64 KiB of a file for the footer."""


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("FIRST_WAIT_S", 0.001), ("LONGEST_WAIT_S", 0.001), ("LOCAL_PATIENCE_S", 0.02)):
        monkeypatch.setattr(retrying, name, seconds)
    monkeypatch.setattr(parquet_rows, "DAMAGED_PATIENCE_S", 0.5)
    # a memory:// file system gives the time of a file in two forms
    monkeypatch.setattr("pipeline.storage.storage._stamp", lambda *_: "mtime:1")


def parquet(first: int = 0, rows: int = ROWS) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table(
        {"prompt": [f"prompt {i} " * TIMES for i in range(first, first + rows)], "n": range(first, first + rows)}
    )
    # without a dictionary and compression, so that a flip changes a value and nothing else notices it
    pq.write_table(
        table, sink, row_group_size=GROUP, compression="none", use_dictionary=False, write_page_checksum=True
    )
    return sink.getvalue().to_pybytes()


def flipped(data: bytes, place: int, bit: int = 0) -> bytes:
    return data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :]


def place_in(data: bytes, group: int) -> int:
    """Return a place in the middle of the prompts of a row group."""
    chunk = pq.read_metadata(pa.BufferReader(data)).row_group(group).column(0)
    return int(chunk.data_page_offset) + chunk.total_compressed_size // 2


def read_all(job: Job, plan: Plan) -> list[tuple[str | None, Any]]:
    """Return prompt and column `n` of all rows, none of which may have an error."""
    reader = reader_of(job)
    try:
        found: list[UnitData] = [reader.read(unit) for unit in plan.units]
    finally:
        reader.close()
    assert not any(row.error for data in found for row in data.rows)
    return [(row.prompt, n) for data in found for row, n in zip(data.rows, data.columns["n"].to_pylist(), strict=True)]


def job_of(folder: str, tmp_path: Path, rows: int = 100) -> Job:
    return make_job(folder, tmp_path / "out", input={"carry": ["n"]}, output={"rows_per_file": rows})


@pytest.mark.parametrize("group", [0, 1, 4])
def test_damage_that_stays_is_an_error_that_names_file_and_row_group(tmp_path: Path, group: int) -> None:
    """It is a failure of the storage. The wrong text must never become a prompt."""
    data = parquet()
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.parquet").write_bytes(flipped(data, place_in(data, group)))
    job = job_of(str(tmp_path / "in"), tmp_path, ROWS)
    with pytest.raises(
        StorageError,
        match=rf"^cannot read {tmp_path}/in/a.parquet, row group {group}: the checksum of a page is wrong: copy the "
        r"file again if this stays so \(tried \d+ times in 0.02 s\)$",
    ):
        read_all(job, plan_of(job))


def answers_with(monkeypatch: pytest.MonkeyPatch, change: Callable[[bytes, int], bytes]) -> None:
    """Let `change(bytes, first byte of the file)` alter what every request for the content of a file returns."""
    cat_file = MemoryFileSystem.cat_file

    def changed(
        self: MemoryFileSystem, path: str, start: int | None = None, end: int | None = None, **options: Any
    ) -> bytes:
        return change(cat_file(self, path, start=start, end=end, **options), start or 0)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", changed)  # every thread has an object of its own


@pytest.mark.parametrize("files", [1, 5])
@pytest.mark.parametrize("times", [1, 3])
def test_damage_on_the_way_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, files: int, times: int
) -> None:
    """The bytes come from the store again, also those of small files, which are fetched whole (5 files). Nothing of the
    rows changes, and a warning says which data it was."""
    folder = f"memory:///{tmp_path.name}"
    store = Storage(folder)
    datas = [parquet(ROWS * number) for number in range(files)]
    for number, data in enumerate(datas):
        store.write(f"{number}.parquet", data)
    monkeypatch.setattr("pipeline.input.fetcher.WHOLE_ALONE_BYTES", 10)  # a file alone is read as it is decoded
    left, place = [times], place_in(datas[0], 2)

    def damage(data: bytes, start: int) -> bytes:
        if left[0] and start <= place < start + len(data) and b"prompt 130 " in data:
            left[0] -= 1
            return flipped(data, place - start)
        return data

    job = job_of(folder, tmp_path, 2000)
    plan = plan_of(job)
    answers_with(monkeypatch, damage)
    expected = [(f"prompt {i} " * TIMES, i) for i in range(ROWS * files)]
    assert read_all(job, plan) == expected
    assert left == [0]
    (warning,) = [text for text in caplog.messages if "checksum" in text]
    assert re.fullmatch(
        rf"input {folder}/0.parquet, row groups? [\d to]+: the checksum of a page was wrong, and right when it was "
        "read again",
        warning,
    )


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_on_the_way_changes_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """One answer in five has a flipped bit somewhere, in pages, page headers or the footer. A read that goes through
    gives the right rows; most go through."""
    folder, chance = f"memory://{tmp_path.name}-{seed}", random.Random(seed)
    Storage(folder).write("a.parquet", parquet())
    expected = [(f"prompt {i} " * TIMES, i) for i in range(ROWS)]
    job = job_of(folder, tmp_path)
    plan, reads = plan_of(job), [0, 0]
    answers_with(
        monkeypatch,
        lambda data, _: (
            flipped(data, chance.randrange(len(data)), chance.randrange(8)) if data and chance.random() < 0.2 else data
        ),
    )
    for _ in range(60):
        reader = reader_of(job)
        try:
            found = [row.prompt for unit in plan.units for row in reader.read(unit).rows]
        except (InputError, StorageError):
            reads[1] += 1
        else:
            reads[0] += 1
            assert found == [prompt for prompt, _ in expected]
        finally:
            reader.close()
    assert reads[0] > 30


def test_a_footer_damaged_on_the_way_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, data = f"memory://{tmp_path.name}-footer", parquet()
    Storage(folder).write("a.parquet", data)
    damaged = [True]

    def damage(answer: bytes, start: int) -> bytes:
        if damaged and start + len(answer) == len(data):
            damaged.pop()
            return answer[:-1] + b"?"
        return answer

    answers_with(monkeypatch, damage)
    assert plan_of(job_of(folder, tmp_path)).rows == ROWS
    assert not damaged
