"""Tests jobs/synth.yaml as it is shipped: prompts, checkpoint and completions on a real S3 server, replicas on Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.output.layout import REPORT
from pipeline.output.ledger import read_status
from pipeline.storage.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.server]

ROOT = Path(__file__).parents[3]
ROWS = 40
SOURCE = ["source_file", "source_row"]


@pytest.mark.timeout(900)
def test_the_production_job_runs_from_s3_to_s3(s3: str, tmp_path: Path) -> None:
    """The job runs from S3 to S3. Only GPUs, CPUs, the length of completions and the size of parts are overridden."""
    prompts = pq.read_table(ROOT / "jobs/demo_prompts.parquet").slice(0, ROWS)
    pq.write_table(prompts, tmp_path / "prompts.parquet")
    inputs, checkpoint = Storage(f"{s3}/prompts"), Storage(f"{s3}/checkpoint")
    inputs.write("one.parquet", (tmp_path / "prompts.parquet").read_bytes())
    inputs.write("more/two.parquet", (tmp_path / "prompts.parquet").read_bytes())
    for file in (ROOT / "model/builtin/checkpoints/noise").iterdir():
        checkpoint.write(file.name, file.read_bytes())

    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {
        "TWOTOWER_INPUT": f"{s3}/prompts/",
        "TWOTOWER_OUTPUT": f"{s3}/completions/",
        "TWOTOWER_CHECKPOINT": f"{s3}/checkpoint/",
    }
    small = ["workers.gpus=0", "workers.cpus=1", "generation.max_new_tokens=16", "output.rows_per_file=40"]
    command = [sys.executable, "-m", "pipeline", "run", "jobs/synth.yaml"]
    for setting in small:
        command += ["--set", setting]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert environment["AWS_SECRET_ACCESS_KEY"] not in done.stdout + done.stderr

    status = read_status(f"{s3}/completions/")
    assert status.complete
    assert (status.totals.rows, status.totals.errors) == (2 * ROWS, 0)
    output = Storage(f"{s3}/completions")
    assert b"Complete, finished " in output.read(REPORT)
    parts = [output.open(part.name, part.size) for part in output.list_files("", "part-*.parquet")]
    sources = [tuple(row.values()) for part in parts for row in pq.read_table(part, columns=SOURCE).to_pylist()]
    assert sorted(sources) == [(f, r) for f in ("more/two.parquet", "one.parquet") for r in range(ROWS)]
