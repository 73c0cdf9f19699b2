"""Tests of the search for rows: it finds the right ones in input order, and reads no more of the parts than it must."""

import datetime
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.job import Job
from pipeline.core.errors import JobError, OutputError
from pipeline.output import part
from pipeline.output.part import result_table, row_key
from pipeline.prompts.values import CellError
from pipeline.report.row_search import RowSearch
from pipeline.storage.storage import Storage
from tests.pipeline.cases import (
    complete_row,
    make_job,
    open_ledger,
    out,
    plan_of,
    prompts,
    publish,
    run,
    store_of,
    write,
)


def found(job: Job, most: int = 1000, **which: Any) -> list[str]:
    """Return the places of the rows that are found."""
    rows = RowSearch(job.output.path, **which).rows(most)
    return [f"{row['source_file'].removesuffix('.parquet')}{row['source_row']}" for row in rows]


def files(folder: Path, count: int = 6, rows: int = 4) -> Job:
    """Make a job over files a.parquet, b.parquet, … in which the third row of each has no prompt, two rows to a
    part."""
    for number in range(count):
        texts: list[str | None] = [*prompts(rows)]
        texts[2] = None
        write(folder / f"in/{chr(97 + number)}.parquet", prompt=texts, n=list(range(rows)))
    return make_job(folder / "in", folder / "out", output={"rows_per_file": 2}, input={"carry": ["n"]})


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Run the job over six files once, for tests that only read its output."""
    made = files(tmp_path_factory.mktemp("files"))
    run(made)
    return made


def test_rows_come_in_the_order_of_the_input(job: Job) -> None:
    """The names of the parts have another order, because they begin with a hash."""
    every = [f"{file}{row}" for file in "abcdef" for row in range(4)]
    assert found(job) == every
    assert [found(job, most) for most in (1, 3, 23)] == [every[:1], every[:3], every[:23]]
    parts = [pq.read_table(file) for file in sorted(out(job).glob("part-*"))]
    assert [str(table["source_file"][0]) for table in parts] != [f"{file}.parquet" for file in "aabbccddeeff"]


def test_error_rows_alone_are_found_and_conditions_must_all_hold(job: Job) -> None:
    assert found(job, errors=True) == [f"{file}2" for file in "abcdef"]
    assert found(job, 2, errors=True) == ["a2", "b2"]
    assert found(job, errors=True, where=["source_file=c.parquet"]) == ["c2"]
    assert found(job, where=["n=3", "source_file=b.parquet"]) == ["b3"]
    assert found(job, where=["n=3", "n=1"]) == []
    assert found(job, errors=True, where=["error=null"]) == []


DAY = datetime.date(2026, 1, 31)
COLUMNS: dict[str, Any] = {
    "text": ["null", "", None, "a=b ⏎\n"],
    "whole": pa.array([1, -2, None, 200], pa.int16()),
    "real": pa.array([0.1, float("nan"), None, 1e30], pa.float32()),
    "flag": [True, False, None, True],
    "day": [DAY, None, DAY, None],
    "money": pa.array([None, None, "1.50", "2.00"]).cast(pa.decimal128(9, 2)),
    "tags": [["x"], [], None, None],
    "a=b": ["x", "y", "z", None],
    "a.b": [1, 2, 3, 4],
    "far": pa.array([None, 10**15, None, None], pa.int64()).cast(pa.timestamp("s")),  # no datetime of Python holds it
}


@pytest.fixture(scope="module")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Job:
    folder = tmp_path_factory.mktemp("typed")
    write(folder / "in/r.parquet", prompt=prompts(4), **COLUMNS)
    job = make_job(folder / "in", folder / "out", input={"carry": list(COLUMNS)})
    run(job)
    return job


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("text=null", [2]),  # a text `null` is not to be found
        ("text=", [1]),
        ("text=a=b ⏎\n", [3]),
        ("whole=-2", [1]),
        ("whole=null", [2]),
        ("whole=7", []),
        ("real=0.1", [0]),  # 0.1 in the type of the column
        ("real=1e30", [3]),
        ("real=nan", [1]),
        ("flag=true", [0, 3]),
        ("flag=False", [1]),
        ("day=2026-01-31", [0, 2]),
        ("money=1.5", [2]),
        ("tags=null", [2, 3]),
        ("a=b=y", [1]),
        ("a.b=3", [2]),
        ("id=r.parquet#3", [3]),
        ("finish_reason=length", [1, 3]),
        ("latency_s=0.5", [0, 1, 2, 3]),
    ],
)
def test_a_value_is_compared_with_the_type_of_its_column(typed: Job, condition: str, rows: list[int]) -> None:
    assert found(typed, where=[condition]) == [f"r{row}" for row in rows]


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("whole=x", r"--where whole=x: the column holds int16, and x is no such value"),
        ("whole=", r"whole=: the column holds int16, and an empty text is no such value"),
        ("whole=70000", "the column holds int16, and 70000"),
        ("flag=x", "the column holds bool, and x"),
        (
            "tags=x",
            r"the column holds list<element: string>, which has no value to compare; only null can be asked for",
        ),
        ("text=\udc80", r"text=\\udc80: the column holds string"),
        ("Text=x", r"no column 'Text'; its columns: id, text, whole, .*, a\.b, far, completion, .*, source_row$"),
        ("\x1b[2J=x", r"no column '\\x1b\[2J'"),
        ("prompt=x", "no column 'prompt'"),
    ],
)
def test_a_condition_that_cannot_be_is_one_line(typed: Job, condition: str, said: str) -> None:
    with pytest.raises(JobError, match=said) as refused:
        found(typed, where=[condition])
    assert "\n" not in str(refused.value)


def test_rows_have_their_cells(typed: Job) -> None:
    search = RowSearch(typed.output.path)
    first, second = search.rows(2)
    assert search.carried == tuple(COLUMNS)
    shown = {
        "id": "r.parquet#0",
        "text": "null",
        "day": DAY,
        "a.b": 1,
        "completion": "answer to prompt 0",
        "attempt": 1,
    }
    assert {name: first[name] for name in shown} == shown
    assert isinstance(second["far"], CellError)


def test_a_folder_that_is_no_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"it has no _job/plan\.json"):
        RowSearch(str(tmp_path))


def test_parts_that_are_not_the_jobs_and_saved_rows_are_left_out(tmp_path: Path) -> None:
    """One part is another job's, one is a copy under a wrong name, one is truncated, two have no name of a unit, and
    one unit has only a segment."""
    job = files(tmp_path, count=5, rows=3)
    plan = plan_of(job)
    units = plan.units
    open_ledger(job, plan)
    assert found(job) == []
    publish(job, plan, (units[0], *units[2:8]))
    folder, store = out(job), store_of(job, plan, digest="0" * 64)
    data = store.input.read(units[1])
    rows = result_table(units[1], [complete_row(row) for row in data.rows])
    store.publish(units[1], store.make_part(data, [rows], writer="w", attempt=1, seconds=1.0))
    shutil.copy(folder / f"part-{units[2].id}.parquet", folder / f"part-{units[8].id}.parquet")
    cut = folder / f"part-{units[3].id}.parquet"
    cut.write_bytes(cut.read_bytes()[:-1])
    for name in ("part-x.parquet", f"part-{units[0].id}x.parquet"):
        shutil.copy(folder / f"part-{units[0].id}.parquet", folder / name)
    saved = result_table(units[9], [complete_row(row) for row in store.input.read(units[9]).rows])
    store_of(job, plan).write_segment(units[9], saved, writer="a" * 32, number=0, attempt=1)
    kept = [unit for number, unit in enumerate(units) if number in (0, 2, 4, 5, 6, 7)]
    search = RowSearch(job.output.path)
    places = [row_key(unit, index) for unit in kept for index in range(unit.row_count)]
    assert [row["id"] for row in search.rows(100)] == places
    assert (search.published, search.planned) == (len(places), 15)


def test_a_search_that_finds_nothing_has_counted_all_rows(job: Job) -> None:
    search = RowSearch(job.output.path, where=["n=9"])
    assert list(search.rows(5)) == []
    assert search.published == search.planned == 24


def test_only_the_parts_that_are_needed_are_opened(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = Storage.open

    def watched(self: Storage, name: str, size: int) -> pa.NativeFile:
        opened.append(name)
        return real(self, name, size)

    monkeypatch.setattr(Storage, "open", watched)
    assert found(job, 2) == ["a0", "a1"]
    assert len(set(opened)) == 1
    opened.clear()
    assert found(job, 1, where=["n=2"]) == ["a2"]
    assert len(set(opened)) <= 5  # the first part and one round of the others
    opened.clear()
    assert found(job, errors=True, where=["n=1"]) == []
    assert len(opened) == 12


def test_a_row_group_that_cannot_match_is_not_read_and_a_damaged_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages of the last of four row groups are damaged, so every read of them fails."""
    monkeypatch.setattr(part, "GROUP_ROWS", 10)
    write(tmp_path / "in/a.parquet", prompt=prompts(40), n=list(range(40)))
    job = make_job(tmp_path / "in", tmp_path / "out", input={"carry": ["n"]})
    run(job)
    [file] = out(job).glob("part-*")
    last = pq.read_metadata(file).row_group(3)
    data = bytearray(file.read_bytes())
    for index in range(last.num_columns):
        chunk = last.column(index)
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        for place in range(start + 25, start + chunk.total_compressed_size):
            data[place] ^= 0xFF
    file.write_bytes(data)
    assert found(job, 30) == [f"a{row}" for row in range(30)]
    assert found(job, 1, where=["n=12"]) == ["a12"]
    assert found(job, where=["source_row=29"]) == ["a29"]
    assert found(job, 3, where=["finish_reason=length"]) == ["a1", "a3", "a5"]
    for where in ([], ["n=35"], ["completion=answer to prompt 35"]):
        with pytest.raises(OutputError, match=rf"{file.name}: .*; run `verify`"):
            found(job, where=where)


def test_an_output_behind_a_url(job: Job) -> None:
    remote = Storage("memory://rows-to-show")
    for file in Storage(job.output.path).find():
        remote.write(file.name, Storage(job.output.path).read(file.name))
    rows = RowSearch("memory://rows-to-show", where=["n=1"]).rows(2)
    assert [row["id"] for row in rows] == ["a.parquet#1", "b.parquet#1"]


def test_nan_is_found_although_the_statistics_of_a_row_group_leave_it_out(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=["x", "y"], real=[1.5, float("nan")])
    job = make_job(tmp_path / "in", tmp_path / "out", input={"carry": ["real"]})
    run(job)
    assert found(job, where=["real=nan"]) == ["a1"]
