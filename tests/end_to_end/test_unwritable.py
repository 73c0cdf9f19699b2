"""Tests `python -m pipeline` as a process whose lines cannot be written: the work and its exit code are those of a
process whose lines can."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.waiting import PATIENCE_S, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROWS = 10
JOB = """
input: {{path: {folder}/in}}
output: {{path: {folder}/out, rows_per_file: 5}}
model: {{checkpoint: "builtin:noise", dtype: float32}}
generation: {{max_new_tokens: 16}}
engine: {{max_rows: 2}}
workers: {{gpus: 0}}
"""
COMMAND = [sys.executable, "-m", "pipeline"]


def write_job(folder: Path, rows: int = ROWS) -> Path:
    (folder / "in").mkdir()
    pq.write_table(pa.table({"prompt": [f"Lamp {i} is lit." for i in range(rows)]}), folder / "in/a.parquet")
    file = folder / "job.yaml"
    file.write_text(JOB.format(folder=folder))
    return file


@contextlib.contextmanager
def full_disk() -> Iterator[int]:
    with open("/dev/full", "w") as disk:
        yield disk.fileno()


@contextlib.contextmanager
def pipe_without_reader() -> Iterator[int]:
    """Yield a pipe whose reader has ended, like `| head -1` after its line."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


OUTPUTS = {"full disk": full_disk, "closed pipe": pipe_without_reader}


def close_streams() -> None:
    """Close stdin, stdout and stderr, as `<&- >&- 2>&-` does."""
    for number in range(3):
        os.close(number)


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_job_whose_lines_cannot_be_written_is_done(tmp_path: Path, output: str, log_format: str) -> None:
    """The disk of its log is full, or nobody reads its pipe; both for stdout and for stderr."""
    command = [*COMMAND, "run", str(write_job(tmp_path)), "--local", "--log-every", "0.1", "--log-format", log_format]
    with OUTPUTS[output]() as to:
        ended = subprocess.run(command, stdout=to, stderr=to, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 0
    assert (tmp_path / "out/_SUCCESS").exists()


def test_a_job_without_streams_is_done_and_writes_into_no_file_of_its_own(tmp_path: Path) -> None:
    """The numbers of closed streams go to the next files that are opened. Nothing that is meant for stderr may end up
    in them: the output is undamaged."""
    job = write_job(tmp_path)
    ended = subprocess.run(
        [*COMMAND, "run", str(job), "--local", "--log-every", "0.1"],
        preexec_fn=close_streams,
        timeout=PATIENCE_S,
        check=False,
    )
    assert ended.returncode == 0
    checked = subprocess.run(
        [*COMMAND, "verify", str(tmp_path / "out")], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert checked.stdout.startswith(f"verified: {ROWS} rows"), checked


def test_a_job_that_fails_keeps_its_exit_code(tmp_path: Path) -> None:
    """SIGTERM ends it with 143, and the line about that cannot be written."""
    job = write_job(tmp_path, rows=400)
    with pipe_without_reader() as to:
        process = subprocess.Popen([*COMMAND, "run", str(job), "--local"], stdout=to, stderr=to)
        wait_until(lambda: process.poll() is not None or list((tmp_path / "out").glob("part-*.parquet")))
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 143


@pytest.mark.parametrize(("words", "code"), [(["plan"], 0), (["run", "--local", "--set", "model.dtype=int3"], 1)])
@pytest.mark.parametrize("output", OUTPUTS)
def test_commands_that_end_by_themselves_keep_their_exit_code(
    tmp_path: Path, output: str, words: list[str], code: int
) -> None:
    command, *options = words
    with OUTPUTS[output]() as to:
        ended = subprocess.run(
            [*COMMAND, command, str(write_job(tmp_path)), *options],
            stdout=to,
            stderr=to,
            timeout=PATIENCE_S,
            check=False,
        )
    assert ended.returncode == code


def test_a_status_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    subprocess.run([*COMMAND, "run", str(write_job(tmp_path)), "--local"], timeout=PATIENCE_S, check=True)
    with full_disk() as to:
        command = [*COMMAND, "status", str(tmp_path / "out")]
        ended = subprocess.run(command, stdout=to, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 1
    assert ended.stderr == "error: cannot write to stdout: no space left on device\n"


def test_a_command_that_only_shows_something_ends_with_its_reader(tmp_path: Path) -> None:
    """`status --watch | head -1` must not go on for ever."""
    job = write_job(tmp_path)
    subprocess.run([*COMMAND, "run", str(job), "--local"], capture_output=True, timeout=PATIENCE_S, check=True)
    (tmp_path / "out/_SUCCESS").unlink()
    (tmp_path / "out/_job/live.json").unlink()  # nobody knows whether the job runs: it is watched without end
    with pipe_without_reader() as to:
        command = [*COMMAND, "status", str(tmp_path / "out"), "--watch", "--every", "0.1"]
        ended = subprocess.run(command, stdout=to, timeout=PATIENCE_S, check=False)
    assert ended.returncode == 1
