"""Tests `doctor` on a real S3 server."""

import pytest

from pipeline.checks.findings import examine
from pipeline.checks.job import check_output
from pipeline.checks.machine import machine_checks
from pipeline.config.job import Job
from pipeline.storage.storage import Storage

pytestmark = [pytest.mark.server]


def test_s3_is_written_to_once_and_left_empty(s3: str) -> None:
    [found] = check_output(f"{s3}/out")
    assert found.level == "ok", found
    assert not Storage(s3).find()


def test_the_clock_is_compared_with_that_of_the_store(s3: str) -> None:
    sections = {
        "input": {"path": f"{s3}/in"},
        "output": {"path": f"{s3}/out"},
        "model": {"checkpoint": "builtin:noise"},
    }
    checks = [check for check in machine_checks(Job.model_validate(sections)) if check.name in ("clock", "credentials")]
    clock, credentials = examine(checks)
    assert (clock.level, credentials.level) == ("ok", "ok"), (clock, credentials)
    assert "s from http://" in clock.found
    assert credentials.found.startswith("S3: found by env")
