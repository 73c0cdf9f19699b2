"""Tests that the benchmarks of small files run on small jobs, and that their corpora are what they claim."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from tests.benchmarks import slow_store, small_files
from tests.benchmarks.small_files import FILES, ONE_FILE, UNITS
from workers.replica import build

ROWS = 6
SHORT = ["generation.max_new_tokens=1"]
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the check that every replica makes at its start, because it takes longer than these jobs."""
    monkeypatch.setattr(build, "self_check", lambda *_: "no self-check")


def test_files_of_every_size_give_the_same_units(tmp_path: Path) -> None:
    """Files of all sizes give the same units and parts; units of one row give one part for each row."""
    rows = pq.read_table(small_files.PROMPTS).slice(0, ROWS)
    found = {
        **small_files.compare(tmp_path, FILES, rows, 1, SHORT),
        **small_files.compare(tmp_path, UNITS, rows, 1, SHORT),
    }
    counts = {name: (run.files, run.units, run.parts) for name, (run,) in found.items()}
    assert counts == {
        ONE_FILE: (1, 1, 1),
        "files of 5 rows": (2, 1, 1),
        "files of one row": (6, 1, 1),
        "one file, rows_per_file 1": (1, 6, 6),
        "files of one row, old output": (6, 6, 6),
    }
    assert all(run.forwards > 0 and run.batch_rows >= 1 and run.rows_per_s > 0 for (run,) in found.values())


@pytest.mark.server
def test_a_store_with_latency(tmp_path: Path, s3_endpoint: str) -> None:
    """A small object costs one request for the plan and one for reading."""
    S3FileSystem.clear_instance_cache()  # instances remember the endpoint of the test that made them
    found = slow_store.compare(tmp_path, s3_endpoint, ROWS, 1, SHORT, delay_s=0.001)
    (one,), (small,) = found.values()
    assert small.plan_requests - one.plan_requests == ROWS - 1
    assert small.read_requests == ROWS
    assert all(run.plan_s > 0 and run.read_s > 0 and run.job_s > run.nothing_s > 0 for run in (one, small))
