"""Plan, run, kill -9, resume, verify on a real S3 server: a real driver process, an engine that makes rows up."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.config.job import Job
from pipeline.storage.storage import Storage
from tests.chaos.check import read_output, verify
from tests.chaos.logs import read_lives, times_finished
from tests.chaos.rows import expected, make_prompts, upload
from tests.end_to_end.s3.fault_proxy import fault_proxy

pytestmark = [pytest.mark.server, pytest.mark.xdist_group("s3")]

ROOT = Path(__file__).parents[3]
ROWS, KILLS = 2_000, 2
FLUSH_S = 0.3
TURN_S = 0.02


def submit(job: Path, logs: Path, number: int, endpoint: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.chaos.driver", str(job), str(logs), str(number), str(TURN_S), "local"]
    environment = os.environ | {"AWS_ENDPOINT_URL": endpoint}
    with job.with_name("driver.log").open("ab") as said:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)


def finished(logs: Path) -> int:
    """Rows that any run has finished."""
    return len(times_finished(read_lives(logs)))


def test_a_killed_job_goes_on_where_its_segments_end(s3: str, s3_endpoint: str, tmp_path: Path) -> None:
    """Killed twice, among storage faults: every row once, as without faults, and few of them made twice."""
    prompts = make_prompts(ROWS, files=2, seed=1, killers=0)
    upload(Storage(f"{s3}/in"), prompts)
    job, logs = tmp_path / "job.json", tmp_path / "logs"
    logs.mkdir()
    settings = {
        "name": "killed",
        "input": {"path": f"{s3}/in"},
        "output": {"path": f"{s3}/out", "rows_per_file": 1_000},
        "model": {"checkpoint": "builtin:noise", "dtype": "float32"},
        "generation": {"max_new_tokens": 48},
        "workers": {"gpus": 0},
        "flush": {"seconds": FLUSH_S},
    }
    job.write_text(Job.model_validate(settings).model_dump_json())
    with fault_proxy(s3_endpoint) as proxy:
        proxy.fail_at_random(1, 0.05)
        for number in range(1, KILLS + 1):
            driver = submit(job, logs, number, proxy.url)
            deadline = time.monotonic() + 60
            while finished(logs) < number * ROWS // (KILLS + 1):
                assert driver.poll() is None, job.with_name("driver.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            driver.kill()
            driver.wait()
            assert list(Storage(f"{s3}/out").list_files("", "_SUCCESS")) == []
        driver = submit(job, logs, KILLS + 1, proxy.url)
        assert driver.wait(60) == 0, job.with_name("driver.log").read_text()
        assert sum(proxy.injected.values()) > 5
    whole, said = verify(f"{s3}/out")
    assert whole, said
    assert f"{ROWS:,} rows" in said
    rows = list(read_output(Storage(f"{s3}/out")))
    assert len(rows) == ROWS
    assert dict(rows) == expected(prompts)
    repeated = sum(count - 1 for count in times_finished(read_lives(logs)).values())
    assert repeated < 0.25 * ROWS  # a kill loses what was not flushed: about a third of a second of some 500 rows/s
    assert [info.name for info in Storage(f"{s3}/out").find() if "segments" in info.name] == []
