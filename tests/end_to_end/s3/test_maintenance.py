"""Tests verify, retry-errors and clean on S3."""

from pathlib import Path

import pytest

from pipeline.config.loader import load_job
from pipeline.maintenance.clean import find_leftovers, remove_leftovers
from pipeline.maintenance.retry_errors import make_retry_job
from pipeline.maintenance.verify import verify
from pipeline.storage.storage import Storage
from tests.pipeline.cases import make_job, prompts, run, write

pytestmark = [pytest.mark.server]


def test_a_job_on_s3_is_verified_retried_and_cleaned(s3: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a b.parquet", prompt=[*prompts(20), None, ""], group=10)
    Storage(f"{s3}/in").write("a b.parquet", file.read_bytes())
    plan, _, _ = run(make_job(f"{s3}/in", f"{s3}/out", output={"rows_per_file": 5}))
    out = Storage(f"{s3}/out")
    assert verify(f"{s3}/out").problems == ()
    made = make_retry_job(f"{s3}/out", f"{s3}/retry/")
    assert (made.rows, made.job_file) == (2, f"{s3}/retry/job.yaml")
    (tmp_path / "job.yaml").write_bytes(Storage(f"{s3}/retry").read("job.yaml"))
    run(load_job(tmp_path / "job.yaml"))
    again = verify(f"{s3}/retry/output")
    assert (again.problems, again.totals.errors) == ((), 2)
    left = (f"_job/segments/{plan.units[0].id}/late.parquet", "_job/drivers/00000001.json", "_writable")
    for name in (*left, "_job/drivers/00000002.json"):
        out.write(name, b"x")
    part = out.read(f"part-{plan.units[1].id}.parquet")
    out.write(f"part-{plan.units[1].id}.parquet", part[:-1])
    assert len(verify(f"{s3}/out").problems) == 3
    out.write(f"part-{plan.units[1].id}.parquet", part)
    leftovers = find_leftovers(f"{s3}/out")
    assert {found.name for leftover in leftovers for found in leftover.files} == set(left)
    remove_leftovers(f"{s3}/out", leftovers)
    assert verify(f"{s3}/out").problems == ()
