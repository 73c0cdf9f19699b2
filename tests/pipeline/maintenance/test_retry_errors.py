"""Tests of retry-errors: the rows that failed become a job of their own, with the same settings and the same ids."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.job import Job
from pipeline.config.loader import load_job
from pipeline.core.errors import InputError, OutputError
from pipeline.maintenance import retry_errors
from pipeline.maintenance.retry_errors import make_retry_job
from pipeline.maintenance.verify import verify
from tests.pipeline.cases import make_job, not_utf8, open_ledger, plan_of, prompts, publish, run, write


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Make a job over two files with 30 rows, of which six become error rows."""
    texts: list[str | None] = [*prompts(20)]
    texts[3] = texts[11] = None
    write(tmp_path / "in/a.parquet", group=7, prompt=texts, key=[f"k{i}" for i in range(20)], n=list(range(20)))
    bad = not_utf8(*[b"ok"] * 5, b"\xff", b"", b"", None, b"ok")
    write(tmp_path / "in/b.parquet", prompt=bad, key=[f"m{i}" for i in range(10)], n=list(range(10)))
    return make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 8}, input={"carry": ["n"]})


def retried(path: Path) -> list[dict[str, Any]]:
    """Return the input rows of the new job, with text as bytes."""
    tables = [pq.read_table(file) for file in sorted((path / "input").iterdir())]
    table = pa.concat_tables(tables)
    binary = [pa.field(f.name, pa.binary() if pa.types.is_string(f.type) else f.type) for f in table.schema]
    return table.cast(pa.schema(binary)).to_pylist()


def test_the_failed_rows_become_a_job_that_runs(job: Job, tmp_path: Path) -> None:
    run(job)
    made = make_retry_job(job.output.path, str(tmp_path / "retry"))
    assert (made.rows, made.units_left, made.job_file) == (6, 0, str(tmp_path / "retry/job.yaml"))
    assert made.reasons[0] == ("prompt is null", 3)
    assert dict(made.reasons) == {
        "prompt is null": 3,
        "prompt is empty": 2,
        "column 'prompt' holds bytes that are not UTF-N (byte N)": 1,
    }
    assert retried(tmp_path / "retry") == [
        {"prompt": None, "n": 3, "original_id": b"a.parquet#3"},
        {"prompt": None, "n": 11, "original_id": b"a.parquet#11"},
        {"prompt": b"\xff", "n": 5, "original_id": b"b.parquet#5"},
        {"prompt": b"", "n": 6, "original_id": b"b.parquet#6"},
        {"prompt": b"", "n": 7, "original_id": b"b.parquet#7"},
        {"prompt": None, "n": 8, "original_id": b"b.parquet#8"},
    ]
    new = load_job(made.job_file)
    assert new.name == "job-retry"
    assert new.output.path == str(tmp_path / "retry/output")
    same = {"engine", "workers", "generation", "model", "flush"}
    assert new.model_dump(include=same) == job.model_dump(include=same)
    # the new job must not end because all of its rows fail again
    assert new.retry == job.retry.model_copy(update={"max_error_rate": 1.0})
    run(new)
    assert verify(new.output.path).problems == ()
    rows = [
        row for part in sorted((tmp_path / "retry/output").glob("part-*")) for row in pq.read_table(part).to_pylist()
    ]
    old = [row for part in (tmp_path / "out").glob("part-*") for row in pq.read_table(part).to_pylist()]
    assert {row["id"]: (row["n"], row["error"]) for row in rows} == {
        row["id"]: (row["n"], row["error"]) for row in old if row["finish_reason"] == "error"
    }


def test_given_ids_stay_in_their_column(job: Job, tmp_path: Path) -> None:
    job = job.model_copy(update={"input": job.input.model_copy(update={"id_column": "key", "carry": ()})})
    run(job)
    made = make_retry_job(job.output.path, str(tmp_path / "retry"))
    assert load_job(made.job_file).input.id_column == "key"
    assert [row["key"] for row in retried(tmp_path / "retry")] == [b"k3", b"k11", b"m5", b"m6", b"m7", b"m8"]


@pytest.mark.slow
def test_a_job_with_a_template_keeps_it_and_its_columns(tmp_path: Path) -> None:
    """Columns that only the template reads may have another type in another file."""
    template = "{% if n %}${price} {{ n + 1 }}: {{ original_id }}{% endif %}\n\u2028\u00e9\U0001f600"
    write(tmp_path / "in/a.parquet", n=[1, None, 3], original_id=["x", "y", "z"])
    write(tmp_path / "in/b.parquet", n=["1", "2"], original_id=[None, None])
    job = make_job(
        tmp_path / "in", tmp_path / "out", input={"template": template}, generation={"stop": ["1e3", "null"]}
    )
    run(job)
    made = make_retry_job(job.output.path, str(tmp_path / "retry"))
    new = load_job(made.job_file)
    assert new.input.template == template
    assert new.input.prompt_column is None
    assert new.input.id_column == "original_id_"
    assert new.generation == job.generation
    assert made.rows == 2
    assert len(list((tmp_path / "retry/input").iterdir())) == 1
    assert [row["original_id_"] for row in retried(tmp_path / "retry")] == [b"b.parquet#0", b"b.parquet#1"]
    run(new)
    assert verify(new.output.path).totals.errors == 2


def test_a_column_without_values_takes_its_type_from_the_other_files(tmp_path: Path) -> None:
    """All failed rows come from the file in which the prompts are all null."""
    write(tmp_path / "in/a.parquet", prompt=prompts(3), key=[1, 2, 3], n=[1, 2, 3])
    write(tmp_path / "in/b.parquet", prompt=pa.nulls(3), key=pa.nulls(3), n=pa.nulls(3))
    job = make_job(tmp_path / "in", tmp_path / "out", input={"id_column": "key", "carry": ["n"]})
    run(job)
    made = make_retry_job(job.output.path, str(tmp_path / "retry"))
    run(load_job(made.job_file))
    schemas = [pq.read_schema(next((tmp_path / folder).glob("part-*"))) for folder in ("out", "retry/output")]
    assert schemas[0] == schemas[1]


def test_many_rows_go_to_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_errors, "ROWS_A_FILE", 100)
    monkeypatch.setattr(retry_errors, "READ_ROWS", 30)
    texts = [None if i % 3 else f"prompt {i}" for i in range(600)]
    write(tmp_path / "in/a.parquet", group=250, prompt=texts)
    job = make_job(tmp_path / "in", tmp_path / "out", output={"rows_per_file": 97})
    run(job)
    made = make_retry_job(job.output.path, str(tmp_path / "retry"))
    files = sorted((tmp_path / "retry/input").iterdir())
    assert made.rows == 400
    assert [pq.read_metadata(file).num_rows for file in files] == [100] * 4
    ids = [row["original_id"] for row in retried(tmp_path / "retry")]
    assert ids == [f"a.parquet#{i}".encode() for i in range(600) if i % 3]


def test_nothing_is_written_where_nothing_failed_or_the_folder_is_taken(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=prompts(3))
    job = make_job(tmp_path / "in", tmp_path / "out")
    run(job)
    assert make_retry_job(job.output.path, str(tmp_path / "retry")).rows == 0
    assert not (tmp_path / "retry").exists()


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("full", "full is not an empty folder: give a new one"),
        ("full/file", "file is not an empty folder: give a new one"),
        ("out/retry", "retry lies inside output .*out: give a folder elsewhere"),
        ("in/retry", "retry lies inside input .*in: give a folder elsewhere"),
    ],
)
def test_folders_that_cannot_take_it(job: Job, tmp_path: Path, folder: str, said: str) -> None:
    run(job)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OutputError, match=said):
        make_retry_job(job.output.path, str(tmp_path / folder))
    assert sorted(tmp_path.rglob("*")) == before


def test_input_that_changed_is_refused_where_its_rows_are_needed(job: Job, tmp_path: Path) -> None:
    """The failed rows are found by their number, and row 3 of a changed file is another row."""
    run(job)
    write(tmp_path / "in/c.parquet", prompt=["added"], n=[1], key=["c"])
    data = (tmp_path / "in/a.parquet").read_bytes()
    write(tmp_path / "in/a.parquet", prompt=prompts(20), key=prompts(20), n=list(range(20)))
    for _ in range(2):
        with pytest.raises(InputError, match=r"1 file with rows that failed, such as a\.parquet, changed"):
            make_retry_job(job.output.path, str(tmp_path / "retry"))
        (tmp_path / "in/a.parquet").unlink(missing_ok=True)
    assert not (tmp_path / "retry").exists()
    (tmp_path / "in/a.parquet").write_bytes(data)  # its time is new, so nobody can tell that it is the same file
    with pytest.raises(InputError, match=r"a\.parquet"):
        make_retry_job(job.output.path, str(tmp_path / "retry"))


def test_of_an_unfinished_job_the_units_left_are_counted(job: Job, tmp_path: Path) -> None:
    plan = plan_of(job)
    open_ledger(job, plan)
    publish(job, plan, plan.units[:1])
    made = make_retry_job(job.output.path, str(tmp_path / "retry"))
    assert (made.rows, made.units_left) == (1, len(plan.units) - 1)


def test_a_broken_part_and_settings_that_cannot_be_read(job: Job, tmp_path: Path) -> None:
    run(job)
    part = next((tmp_path / "out").glob("part-*"))
    data = part.read_bytes()
    part.write_bytes(data[:-9])
    with pytest.raises(OutputError, match=rf"{part.name}: .*run `verify`"):
        make_retry_job(job.output.path, str(tmp_path / "retry"))
    part.write_bytes(data)
    plan = tmp_path / "out/_job/plan.json"
    content = json.loads(plan.read_text().replace('"rows_per_file": 8,', '"rows_per_file": 0,'))
    plan.write_text(json.dumps({**content, "checksum": None}))
    with pytest.raises(OutputError, match="the job settings in its plan cannot be read: "):
        make_retry_job(job.output.path, str(tmp_path / "retry"))
