"""Tests plan, run, kill -9, resume and verify on a real S3 server, with a real driver process and a made-up engine."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.job import Job
from pipeline.storage.storage import Storage
from tests.chaos.check import read_output, verify
from tests.chaos.logs import read_lives, times_finished
from tests.chaos.rows import expected, make_prompts, upload
from tests.end_to_end.s3.fault_proxy import fault_proxy
from tests.waiting import PATIENCE_S, wait_until

pytestmark = [pytest.mark.server]

ROOT = Path(__file__).parents[3]
ROWS = 2_000
SAVED = (200, 500)
"""Numbers of rows in segments and parts at which the job is killed, the first and the second time."""
FLUSH_S = 0.3
SLOW_TURN_S, TURN_S = 0.1, 0.01
"""Seconds of a turn of the engine. The slow one makes a run last above 20 s, so it is always killed before its end."""


def submit(job: Path, logs: Path, number: int, endpoint: str, turn_s: float) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "tests.chaos.driver", str(job), str(logs), str(number), str(turn_s), "local"]
    environment = os.environ | {"AWS_ENDPOINT_URL": endpoint}
    with job.with_name("driver.log").open("ab") as said:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)


def saved(output: Storage) -> set[str]:
    """Return the keys of the rows in segments and parts."""
    keys = {key for key, _ in read_output(output)}
    for info in output.find():
        if "/segments/" in info.name and (data := output.read_if_exists(info.name)) is not None:
            rows = pq.read_table(pa.BufferReader(data), columns=["source_file", "source_row"]).to_pylist()
            keys |= {f"{row['source_file']}#{row['source_row']}" for row in rows}
    return keys


def finished(logs: Path, run: int) -> set[str]:
    """Return the keys of the rows that this run and later ones have finished."""
    return set(times_finished([life for life in read_lives(logs) if life.run >= run]))


@pytest.mark.timeout(900)
def test_a_killed_job_goes_on_where_its_segments_end(s3: str, s3_endpoint: str, tmp_path: Path) -> None:
    """A job that is killed twice, with storage faults, ends with every row once and generates no saved row again."""
    prompts = make_prompts(ROWS, files=2, seed=1, killers=0)
    upload(Storage(f"{s3}/in"), prompts)
    job, logs, output = tmp_path / "job.json", tmp_path / "logs", Storage(f"{s3}/out")
    said = job.with_name("driver.log")
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
    before: list[set[str]] = []  # the rows saved at each kill
    with fault_proxy(s3_endpoint) as proxy:
        proxy.fail_at_random(1, 0.1)
        for number, enough in enumerate(SAVED, 1):
            driver = submit(job, logs, number, proxy.url, SLOW_TURN_S)
            try:

                def killable(driver: "subprocess.Popen[bytes]" = driver, enough: int = enough) -> bool:
                    assert driver.poll() is None, said.read_text()
                    return len(saved(output)) >= enough

                wait_until(killable, said.read_text, pause_s=0.2)
            finally:
                driver.kill()
                driver.wait()
            before.append(saved(output))
            assert not output.exists("_SUCCESS")
        driver = submit(job, logs, len(SAVED) + 1, proxy.url, TURN_S)
        try:
            assert driver.wait(PATIENCE_S) == 0, said.read_text()
        finally:
            driver.kill()
        assert sum(proxy.injected.values()) > 5
    whole, verified = verify(f"{s3}/out")
    assert whole, verified
    assert f"{ROWS:,} rows" in verified
    rows = list(read_output(output))
    assert len(rows) == ROWS
    assert dict(rows) == expected(prompts)
    for run, keys in enumerate(before, 2):
        assert not finished(logs, run) & keys, "rows that were saved were generated again"
    assert [info.name for info in output.find() if "segments" in info.name] == []
