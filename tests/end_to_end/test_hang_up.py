"""Tests `python -m pipeline run --local` as a process that loses its terminal: it saves its rows and ends, or goes on
under nohup."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.waiting import PATIENCE_S

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = 24
JOB = """
input: {{path: {folder}/in}}
output: {{path: {folder}/out, rows_per_file: 12}}
model: {{checkpoint: "builtin:noise", dtype: float32}}
generation: {{max_new_tokens: 32}}
engine: {{max_rows: 1}}
flush: {{rows: 1000, seconds: 3600}}
workers: {{gpus: 0}}
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    pq.write_table(pa.table({"prompt": [f"Lamp number {i} is lit." for i in range(ROWS)]}), tmp_path / "in/a.parquet")
    file = tmp_path / "job.yaml"
    file.write_text(JOB.format(folder=tmp_path))
    return file


def start(job: Path, *, nohup: bool) -> "subprocess.Popen[str]":
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TWOTOWER_"))}
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)
    try:  # the process inherits whether the signal is ignored
        return subprocess.Popen(
            [sys.executable, "-m", "pipeline", "run", str(job), "--local", "--log-every", "0.1"],
            env=clean,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    finally:
        signal.signal(signal.SIGHUP, before)


def rows_shown(process: "subprocess.Popen[str]", more_than: int) -> None:
    """Read what the process prints until a progress line shows more finished rows than that."""
    assert process.stdout is not None
    for line in process.stdout:
        found = re.match(r"(\d+)/\d+ rows", line)
        if found and int(found[1]) > more_than:
            return
    raise AssertionError("the process ended before that")


def test_a_terminal_that_hangs_up_stops_the_job_like_sigterm(job: Path) -> None:
    """The finished rows of the unit in progress are saved, which nothing but the stop would do in this job. A shell and
    the kernel may both send the signal: the second one does not cut the saving short."""
    with start(job, nohup=False) as process:
        rows_shown(process, ROWS // 2)
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGHUP)
        assert process.stdout is not None
        text = process.stdout.read()
        assert process.wait(PATIENCE_S) == 129, text
    last = text.splitlines()[-1]
    assert last.startswith("stopped; ")
    assert last.endswith("submit the same job again to resume")
    assert "Traceback" not in text
    assert list((job.parent / "out").glob("_job/segments/*/*.parquet"))


def test_under_nohup_the_job_goes_on(job: Path) -> None:
    with start(job, nohup=True) as process:
        rows_shown(process, 0)
        process.send_signal(signal.SIGHUP)
        text, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, text
    assert (job.parent / "out/_SUCCESS").exists()
