"""Tests of input files that are added, removed or rewritten between two runs, and of runs that race for a folder."""

import contextlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import pipeline.output.ledger
from pipeline.config.job import Job
from pipeline.core.errors import OutputError
from pipeline.core.types import Totals
from pipeline.output.job_records import PlanRecord
from pipeline.output.layout import part_name
from pipeline.output.ledger import Ledger, read_status
from pipeline.output.part import build_part, result_table
from pipeline.output.records import RECORD_KEY, PartRecord, unit_fields
from tests.pipeline.cases import (
    complete_row,
    load,
    open_ledger,
    out,
    plan_of,
    prompts,
    publish,
    reader_of,
    run,
    two_files,
    with_stamp,
    write,
)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return two_files(tmp_path)


def extending(job: Job) -> Job:
    return job.model_copy(update={"input": job.input.model_copy(update={"on_change": "extend"})})


def test_added_files_are_refused_with_the_way_to_take_them(job: Job) -> None:
    run(job)
    before = {path: path.read_bytes() for path in out(job).rglob("*") if path.is_file()}
    for name in "cdef":
        write(Path(job.input.path) / f"{name}.parquet", prompt=["new"], key=[1])
    said = (
        r"c\.parquet is new, d\.parquet is new, e\.parquet is new and 1 more; set input\.on_change: extend to add them"
    )
    with pytest.raises(OutputError, match=said):
        open_ledger(job, plan_of(job))
    assert {path: path.read_bytes() for path in out(job).rglob("*") if path.is_file()} == before


def test_with_extend_the_new_files_alone_are_run_and_the_manifest_covers_all(job: Job) -> None:
    plan, _, first = run(job)
    parts = {path: path.read_bytes() for path in out(job).glob("part-*")}
    record = load(out(job, "_job/plan.json"))
    out(job, "_job/plan.json").write_text(json.dumps({**record, "created": "long ago"}))
    write(Path(job.input.path) / "c.parquet", prompt=prompts(12), key=range(100, 112))
    longer = plan_of(job)
    assert longer.fingerprint == plan.fingerprint
    ledger = open_ledger(extending(job), longer)
    assert not ledger.is_complete()  # _SUCCESS is removed before the longer plan is written
    assert not read_status(job.output.path).complete
    done = ledger.finished(longer)
    assert done.keys() == {unit.id for unit in plan.units}
    new = publish(job, longer, tuple(unit for unit in longer.units if unit.id not in done))
    totals = sum((result.totals for result in [*done.values(), *new]), Totals())
    manifest = ledger.complete(longer, extending(job), totals, seconds=1.0)
    assert (first["rows"], manifest["rows"], manifest["units"], manifest["files"]) == (25, 37, 5, 3)
    assert parts.items() <= {path: path.read_bytes() for path in out(job).glob("part-*")}.items()
    assert open_ledger(job, longer).is_complete()  # once taken, the new files belong to the job
    assert load(out(job, "_job/plan.json"))["created"] == "long ago"


def test_extend_takes_a_file_without_rows(job: Job) -> None:
    run(job)
    write(Path(job.input.path) / "c.parquet", prompt=pa.array([], pa.string()), key=pa.array([], pa.int64()))
    plan = plan_of(job)
    ledger = open_ledger(extending(job), plan)
    totals = sum((result.totals for result in ledger.finished(plan).values()), Totals())
    assert ledger.complete(plan, job, totals, seconds=1.0)["files"] == 3


@pytest.mark.parametrize("what", ["gone", "rewritten", "rewritten, added", "other rows, same size and stamp"])
def test_extend_takes_additions_alone(job: Job, what: str) -> None:
    plan, _, _ = run(job)
    if what == "gone":
        (Path(job.input.path) / "b.parquet").unlink()
    elif what.startswith("rewritten"):
        write(Path(job.input.path) / "b.parquet", prompt=prompts(5), key=range(5))
    if what.endswith("added"):
        write(Path(job.input.path) / "0.parquet", prompt=["new"], key=[1])
    changed = plan_of(job)
    if what.startswith("other"):
        files = (plan.files[0], replace(plan.files[1], rows=6))
        changed = replace(plan, files=files)
    said = r"was planned over other input files: b\.parquet (is gone|has changed).*; put the same files back"
    for settings in (job, extending(job)):
        with pytest.raises(OutputError, match=said):
            open_ledger(settings, changed)
    assert Ledger(job.output.path).is_complete()


def test_a_file_whose_columns_do_not_fit_does_not_extend(job: Job) -> None:
    """All parts of a job have one schema."""
    carrying = job.model_copy(update={"input": job.input.model_copy(update={"id_column": None, "carry": ("note",)})})
    for name in "ab":
        path = Path(job.input.path) / f"{name}.parquet"
        write(path, prompt=["x"], note=pa.nulls(1))
    run(carrying)
    write(Path(job.input.path) / "c.parquet", prompt=["x"], note=["text"])
    with pytest.raises(OutputError, match=r'output columns: \{.*"note": "null"\} -> \{.*"note": "string"\}'):
        open_ledger(extending(carrying), plan_of(carrying))


def test_a_plan_that_grew_meanwhile_is_not_completed_by_the_older_run(job: Job) -> None:
    """One of two runs is planned over more files. The run whose plan is not the one in the folder ends."""
    plan = plan_of(job)
    older = open_ledger(job, plan)
    totals = sum((result.totals for result in publish(job, plan)), Totals())
    write(Path(job.input.path) / "c.parquet", prompt=["x"], key=[1])
    longer = plan_of(job)
    open_ledger(extending(job), longer)
    with pytest.raises(
        OutputError,
        match=r"belongs to another run by now, whose input files differ: c\.parquet is gone; submit the job again",
    ):
        older.complete(plan, job, totals, seconds=1.0)
    assert not older.is_complete()


def test_a_plan_that_grows_while_ids_are_counted_is_not_completed_by_the_older_run(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting can take minutes on a large output. The older run's `_SUCCESS` would then cover the newer run's parts as
    well."""
    plan = plan_of(job)
    older = open_ledger(job, plan)
    totals = sum((result.totals for result in publish(job, plan)), Totals())
    write(Path(job.input.path) / "c.parquet", prompt=["x"], key=[1])

    def count_slowly(*_: Any) -> tuple[int, tuple[str, ...]]:
        open_ledger(extending(job), plan_of(job))
        return 0, ()

    monkeypatch.setattr(pipeline.output.ledger, "find_duplicates", count_slowly)
    with pytest.raises(OutputError, match="belongs to another run by now"):
        older.complete(plan, job, totals, seconds=1.0)
    assert not older.is_complete()
    assert not out(job, "_job/manifest.json").exists()


def test_a_part_beyond_the_plan_keeps_a_job_from_completing(job: Job) -> None:
    """If two runs extend at the same time, the plan written last may be the shorter one."""
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    totals = sum((result.totals for result in publish(job, plan)), Totals())
    write(Path(job.input.path) / "c.parquet", prompt=["x"], key=[1])
    longer = plan_of(job)
    publish(job, longer, longer.units[3:])
    with pytest.raises(OutputError, match=f"{part_name(longer.units[3].id)} is no part of this job's plan"):
        ledger.complete(plan, job, totals, seconds=1.0)
    assert not ledger.is_complete()


def test_runs_that_race_for_a_folder_leave_one_plan(job: Job) -> None:
    """Runs of two jobs and two listings start at the same time. Each gets the folder or an error, and the plan is that
    of one of them."""
    other = job.model_copy(update={"generation": job.generation.model_copy(update={"seed": 4})})
    shorter = plan_of(job)
    write(Path(job.input.path) / "c.parquet", prompt=["x"], key=[1])
    tries = [(job, shorter), (extending(job), plan_of(job)), (other, plan_of(other))] * 4
    with ThreadPoolExecutor(len(tries)) as pool:
        for future in [pool.submit(open_ledger, settings, plan) for settings, plan in tries]:
            with contextlib.suppress(OutputError):
                future.result()
    record = PlanRecord.read(out(job, "_job/plan.json").read_bytes())
    assert (record.fingerprint, record.listing) in [(plan.fingerprint, plan.listing) for _, plan in tries]


def test_a_part_of_an_older_version_of_its_file_is_named(job: Job) -> None:
    """A run that was thought dead publishes after the file was rewritten and a new run took the folder."""
    plan = plan_of(job)
    units = tuple(with_stamp(unit, "mtime:1") for unit in plan.units)
    ledger = open_ledger(job, plan)
    unit = units[0]
    record = PartRecord(
        **unit_fields(unit, 2), fingerprint=plan.fingerprint.digest, writer="w", replica="r", attempt=1, seconds=1.0
    )
    data = replace(reader_of(job).read(plan.units[0]), unit=unit)
    results = result_table(unit, [complete_row(row) for row in data.rows])
    part, _ = build_part(data, [results], plan.schema, {RECORD_KEY: json.dumps(record.fields())})
    out(job, part_name(unit.id)).write_bytes(part)
    with pytest.raises(
        OutputError, match=r"is not the part of the plan's unit: it was made of another version of a\.p"
    ):
        ledger.finished(plan)
