"""`python -m pipeline run` as a process with a Ray cluster of its own: Ctrl-C on a terminal, and a dead address."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.ray

JOB = """
input: {{path: {folder}/in}}
output: {{path: {folder}/out, rows_per_file: 5}}
model: {{checkpoint: "builtin:noise", dtype: float32}}
engine: {{max_rows: 1}}
workers: {{gpus: 0, cpus: 1, replicas: 1}}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    prompts = [f"Lamp number {i} is lit." for i in range(200)]
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "in" / "a.parquet")
    file = tmp_path / "job.yaml"
    file.write_text(JOB.format(folder=tmp_path))
    return file


def start(job: Path, **variables: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TWOTOWER_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "run", str(job)],
        env={**clean, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_ctrl_c_stops_the_job_and_its_cluster(job: Path) -> None:
    process = start(job)
    deadline = time.monotonic() + 90
    while not list((job.parent / "out").glob("part-*.parquet")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the job
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    first, *progress, last = output.splitlines()
    assert first == f"job job: {job.parent}/in -> {job.parent}/out"
    assert last.endswith(" of 40 units are done; submit the same job again to resume")
    assert last.startswith("stopped; ")
    assert all("/200 rows" in line for line in progress), output  # Ray's own logs stay out of the way


def test_a_dead_ray_address_is_one_line(job: Path) -> None:
    process = start(job, RAY_ADDRESS="127.0.0.1:1")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert output.splitlines()[-1].startswith("error: RAY_ADDRESS is 127.0.0.1:1, and no Ray cluster answers there")


@pytest.mark.parametrize("delay_s", [0.0, 1.5, 3.0])
def test_sigterm_while_ray_starts_is_a_stop(job: Path, delay_s: float) -> None:
    process = start(job)
    deadline = time.monotonic() + 60
    while not (job.parent / "out/_job/plan.json").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.2 + delay_s)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    last = output.splitlines()[-1]
    assert last.startswith("stopped; ")
    assert last.endswith("; submit the same job again to resume")
    assert "Traceback" not in output
