"""Tests of `status`: it shows how far a job is, from its output folder alone."""

import os
import uuid
from pathlib import Path

import pytest

from pipeline.config.job import Job
from pipeline.core.errors import OutputError
from pipeline.core.types import Totals
from pipeline.output.claim import Claim
from pipeline.output.layout import part_name
from pipeline.output.ledger import read_status
from pipeline.output.part import result_table
from tests.pipeline.cases import complete_row, open_ledger, out, plan_of, publish, run, store_of, two_files


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return two_files(tmp_path)


def test_status_while_running_and_at_the_end(job: Job) -> None:
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    results = publish(job, plan, plan.units[:2])
    out(job, f"_job/units/{plan.units[1].id}.json").unlink()  # this is the state after a crash: the part itself is read
    status = read_status(job.output.path)
    assert (status.rows_done, status.rows_total, status.units_done, status.units_total) == (20, 25, 2, 3)
    assert (status.complete, status.finished) == (False, None)
    results += publish(job, plan, plan.units[2:])
    manifest = ledger.complete(plan, job, sum((r.totals for r in results), Totals()), seconds=1.0)
    status = read_status(job.output.path)
    assert (status.complete, status.finished, status.totals.errors) == (True, manifest["finished"], 2)


def test_status_says_what_is_saved_of_units_under_way_and_who_runs(job: Job) -> None:
    """Only segments of this job count, and only those of units without a part. A finished unit may have left some
    behind."""
    plan = plan_of(job)
    open_ledger(job, plan)
    assert read_status(job.output.path).driver is None
    claim = Claim(job.output.path)
    publish(job, plan, plan.units[:1])
    for unit, digest, rows in [(0, None, 4), (1, None, 3), (1, None, 2), (2, "other", 5)]:
        store = store_of(job, plan, digest)
        data = store.input.read(plan.units[unit])
        table = result_table(data.unit, [complete_row(row) for row in data.rows[:rows]])
        store.write_segment(data.unit, table, writer=uuid.uuid4().hex, number=1, attempt=1)
    status = read_status(job.output.path)
    assert (status.rows_done, status.rows_saved) == (10, 5)
    assert status.driver is not None
    assert f"pid {os.getpid()} on " in status.driver
    claim.check_now()


def test_status_counts_the_jobs_own_parts_alone(job: Job) -> None:
    plan, _, _ = run(job)
    part = out(job, part_name(plan.units[0].id))
    extra = out(job, "part-000000000000-0000000000.parquet")
    extra.write_bytes(part.read_bytes())
    status = read_status(job.output.path)
    assert (status.rows_done, status.units_done, status.complete) == (25, 3, True)
    part.unlink()
    status = read_status(job.output.path)
    assert (status.rows_done, status.units_done, status.complete, status.finished) == (15, 2, False, None)


@pytest.mark.parametrize("text", [None, "", "{}", '{"finished": 1}'])
def test_status_without_a_manifest(job: Job, text: str | None) -> None:
    _, ledger, manifest = run(job)
    assert ledger.read_manifest().finished == manifest["finished"]
    out(job, "_job/manifest.json").unlink()
    if text is not None:
        out(job, "_job/manifest.json").write_text(text)
    status = read_status(job.output.path)
    assert (status.complete, status.finished) == (True, None)


def test_status_of_folders_that_are_no_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file: give a folder"):
        read_status(str(tmp_path / "file"))
    with pytest.raises(OutputError, match="does not exist"):
        read_status(str(tmp_path / "absent"))
    with pytest.raises(OutputError, match=r"is not a job's output: it has no _job/plan\.json"):
        read_status(str(tmp_path))
