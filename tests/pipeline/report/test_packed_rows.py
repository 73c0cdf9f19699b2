"""Tests of `show` and of the report over an output whose units have rows of several files."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.config.job import Job
from pipeline.core.errors import OutputError
from pipeline.output import part
from pipeline.output.layout import part_name
from pipeline.report import row_search
from pipeline.report.facts import read_facts
from pipeline.report.html import make_html
from pipeline.report.rows import read_errors
from pipeline.report.summary import read_report, slowest
from pipeline.report.terminal import lines
from pipeline.storage.storage import Storage
from tests.pipeline.cases import (
    PACKED_ROWS,
    open_ledger,
    out,
    packed_files,
    plan_by_old_rules,
    plan_of,
    prompts,
    publish,
    run,
    write,
)
from tests.pipeline.report.test_row_search import found

IN_ORDER = [f"{name}{row}" for name in "abcedf" for row in range(PACKED_ROWS[name])]
"""The rows of packed_files in the order in which they are shown. Those of e are in a unit that begins before d."""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Run the job once, for tests that only read its output."""
    made = packed_files(tmp_path_factory.mktemp("packed"))
    run(made)
    return made


# show


@pytest.mark.parametrize("batch_rows", [1, 3, 1024])
def test_rows_of_several_files_in_one_part_are_found(
    job: Job, monkeypatch: pytest.MonkeyPatch, batch_rows: int
) -> None:
    """Rows of the same number are in many files. Batches end in the middle of a file."""
    monkeypatch.setattr(row_search, "BATCH_ROWS", batch_rows)
    assert found(job) == IN_ORDER
    for most in (1, 4, 9, 11):
        assert found(job, most) == IN_ORDER[:most]
    assert found(job, errors=True) == ["a1", "c1", "c2", "e0", "d1"]
    assert found(job, 3, errors=True) == ["a1", "c1", "c2"]
    assert found(job, where=["source_row=1"]) == ["a1", "c1", "e1", "d1"]
    assert found(job, where=["source_row=3"]) == ["c3", "d3"]
    assert found(job, 1, where=["source_row=3"]) == ["c3"]
    assert found(job, where=["source_file=c.parquet"]) == ["c0", "c1", "c2", "c3"]
    assert found(job, where=["source_file=c.parquet", "source_row=1"]) == ["c1"]
    assert found(job, where=["id=e.parquet#1"]) == ["e1"]
    assert found(job, where=["n=7", "source_row=3"]) == ["c3"]


def test_a_row_that_is_found_has_its_own_cells(job: Job) -> None:
    rows = list(row_search.RowSearch(job.output.path, where=["source_row=1"]).rows(9))
    assert [(row["id"], row["n"], row["error"]) for row in rows[:3]] == [
        ("a.parquet#1", 1, "prompt is null"),
        ("c.parquet#1", 5, "prompt is null"),
        ("e.parquet#1", 34, None),
    ]


def test_parts_of_an_output_that_grew_are_in_the_order_of_the_input(tmp_path: Path) -> None:
    """A file that sorts first and one between the others came later, so they are in units of their own."""
    for name in "bd":
        write(tmp_path / f"in/{name}.parquet", prompt=prompts(2), n=[0, 1])
    job = packed_files(tmp_path / "other")
    job = job.model_copy(
        update={
            "input": job.input.model_copy(update={"path": str(tmp_path / "in"), "on_change": "extend"}),
            "output": job.output.model_copy(update={"path": str(tmp_path / "out")}),
        }
    )
    run(job)
    for name in "ac":
        write(tmp_path / f"in/{name}.parquet", prompt=prompts(2), n=[0, 1])
    plan = plan_of(job)
    open_ledger(job, plan)
    publish(job, plan, plan.units[1:])
    assert found(job) == ["a0", "a1", "c0", "c1", "b0", "b1", "d0", "d1"]
    assert found(job, where=["source_row=1"]) == ["a1", "c1", "b1", "d1"]


def test_rows_of_an_earlier_version_are_in_the_order_of_the_input(tmp_path: Path) -> None:
    job = packed_files(tmp_path)
    run(job, plan_by_old_rules(job))
    assert found(job) == [f"{name}{row}" for name, rows in PACKED_ROWS.items() for row in range(rows)]
    assert found(job, errors=True) == ["a1", "c1", "c2", "d1", "e0"]


def damage(file: Path, *, group: int | None = None, column: str | None = None) -> None:
    """Damage the pages of a row group, or of all of them, in one column or in all."""
    metadata = pq.read_metadata(file)
    data = bytearray(file.read_bytes())
    for number in range(metadata.num_row_groups) if group is None else [group]:
        for index in range(metadata.num_columns):
            chunk = metadata.row_group(number).column(index)
            if column in (None, chunk.path_in_schema):
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                for place in range(start + 25, start + chunk.total_compressed_size):
                    data[place] ^= 0xFF
    file.write_bytes(data)


@pytest.fixture
def damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Job, Path]:
    """Run the job with at most five rows in a row group. Return it with the path of the part of several files."""
    monkeypatch.setattr(part, "GROUP_ROWS", 5)
    job = packed_files(tmp_path)
    return job, out(job, part_name(run(job)[0].units[3].id))


def test_row_groups_that_cannot_match_are_not_read(damaged: tuple[Job, Path]) -> None:
    """The second row group, c1 to e1, is damaged, so every read of it fails."""
    job, file = damaged
    damage(file, group=1)
    assert found(job, 5) == ["a0", "a1", "a2", "b0", "c0"]
    assert found(job, where=["n=3"]) == ["b0"]
    assert found(job, where=["source_file=a.parquet", "source_row=2"]) == ["a2"]
    assert found(job, where=["source_file=f.parquet"]) == ["f0"]
    for where in ([], ["source_row=3"], ["source_file=e.parquet"], ["n=34"]):
        with pytest.raises(OutputError, match=rf"{file.name}: .*; run `verify`"):
            found(job, where=where)


def test_row_groups_before_the_rows_that_are_found_are_not_read(damaged: tuple[Job, Path]) -> None:
    job, file = damaged
    damage(file, group=0)
    assert found(job, where=["source_file=e.parquet"]) == ["e0", "e1"]
    assert found(job, where=["n=7"]) == ["c3"]


def test_a_search_reads_only_the_columns_of_its_conditions(damaged: tuple[Job, Path]) -> None:
    job, file = damaged
    damage(file, column="completion")
    assert found(job, where=["n=33", "source_row=1"]) == []
    with pytest.raises(OutputError, match=file.name):
        found(job, where=["n=33", "source_row=0"])


# report


def test_a_unit_of_several_files_is_named_by_its_first_row_and_their_number(job: Job) -> None:
    facts = read_facts(job.output.path)
    [unit] = [unit for unit in facts.units if unit.files > 1]
    assert (unit.file, unit.first_row, unit.files) == ("a.parquet", 0, 4)
    assert sorted(cells[-1] for cells in slowest(facts)) == [
        "a.parquet#0 and 3 more files",
        "d.parquet#0",
        "d.parquet#16",
        "d.parquet#8",
        "f.parquet#0",
    ]
    report = read_report(job.output.path)
    assert "a.parquet#0 and 3 more files" in make_html(report).decode()
    assert any(line.endswith("  a.parquet#0 and 3 more files") for line in lines(report))


def test_error_examples_name_the_file_of_their_own_row(job: Job) -> None:
    """The empty prompt is in the third file of its unit."""
    errors = read_errors(Storage(job.output.path), read_facts(job.output.path).units)
    examples = {kind.kind: (kind.rows, kind.example) for kind in errors.kinds}
    assert examples["prompt is empty"] == (1, "c.parquet#2: prompt is empty")
    assert examples["prompt is null"][0] == 4
