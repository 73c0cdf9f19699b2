"""Tests of real driver processes that are killed, stopped and started twice on one output: every row is there once, and
little is done again."""

import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
import yaml

from tests.waiting import PATIENCE_S, last_words, wait_for
from tests.workers.jobs import prompts_of, write_prompts
from tests.workers.units.engines import finished_rows

# several drivers per test, and each wait has its own deadline
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[3]
ROWS = 240
MAX_ROWS = 4
FLUSH_ROWS = 10
SLOW_S = 0.5
"""Seconds of a step that is to be interrupted: the rest of a unit then takes half a minute, and the rest of the job
minutes."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_prompts(tmp_path / "in/a.parquet", prompts_of(ROWS))
    job = {
        "input": {"path": str(tmp_path / "in")},
        "output": {"path": str(tmp_path / "out"), "rows_per_file": 60},
        "model": {"checkpoint": "builtin:noise", "dtype": "float32"},
        "workers": {"gpus": 0},
        "flush": {"rows": FLUSH_ROWS},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    return tmp_path


Starter = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(folder: Path) -> Iterator[Starter]:
    started = []

    def start_one(step_s: float = 0.0, free_rows: int = 0) -> "subprocess.Popen[str]":
        """Start a driver. A step of its engine takes `step_s` seconds after `free_rows` rows."""
        command = [sys.executable, "-m", "tests.workers.replica.driver", str(folder), str(step_s), str(free_rows)]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def finish(process: "subprocess.Popen[str]", code: int) -> str:
    try:
        text, _ = process.communicate(timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"it does not end: {last_words(process)}") from None
    assert process.returncode == code, text
    assert "Traceback" not in text
    return text


def is_under_way(folder: Path, rows: int) -> Callable[[], bool]:
    return lambda: (folder / "finished").exists() and len(finished_rows(folder)) >= rows


def saved_rows(folder: Path) -> list[str]:
    """Return the keys of the rows that are in segments and parts."""
    files = [*folder.glob("out/_job/segments/*/*.parquet"), *folder.glob("out/part-*.parquet")]
    tables = [pq.read_table(file, columns=["source_file", "source_row"]).to_pylist() for file in files]
    return [f"{row['source_file']}#{row['source_row']}" for rows in tables for row in rows]


def check_output(folder: Path) -> None:
    with duckdb.connect() as connection:
        query = f"SELECT source_row, completion FROM '{folder}/out/part-*.parquet' ORDER BY 1"
        rows = connection.sql(query).fetchall()
    assert rows == list(enumerate(prompt[::-1] for prompt in prompts_of(ROWS)))
    assert (folder / "out/_SUCCESS").exists()
    assert not list((folder / "out/_job").glob("segments/*/*.parquet"))


def test_a_killed_driver_costs_what_was_not_written_down(folder: Path, start: Starter) -> None:
    """The driver is killed with SIGKILL twice, and the job is submitted again each time. No flushed row is generated
    again."""
    saved = Counter[str]()
    for rows in (30, 110):
        process = start(SLOW_S, free_rows=rows)
        wait_for(process, is_under_way(folder, rows))
        process.send_signal(signal.SIGKILL)
        process.wait()
        saved.update(set(saved_rows(folder)))
    finish(start(), 0)
    check_output(folder)
    times = Counter(finished_rows(folder))
    # A row that was saved at both kills was made once. If it was saved only at the second kill, the first run may have
    # made it and lost it.
    assert all(times[key] <= 3 - saved[key] for key in saved)
    assert len(saved) > FLUSH_ROWS
    again = times.total() - ROWS
    # two open units at two kills, each with less than flush.rows and what one step finishes
    assert again <= 2 * 2 * (FLUSH_ROWS + MAX_ROWS)


def test_a_stopped_driver_loses_nothing(folder: Path, start: Starter) -> None:
    process = start(SLOW_S, free_rows=25)
    wait_for(process, is_under_way(folder, 25))
    process.terminate()
    assert re.search(r"stopped; [0-3] of 4 units are done; submit the same job again to resume", finish(process, 1))
    finish(start(), 0)
    check_output(folder)
    assert set(Counter(finished_rows(folder)).values()) == {1}


def test_of_two_drivers_the_newer_goes_on_and_the_older_says_so_and_ends(folder: Path, start: Starter) -> None:
    older = start(SLOW_S, free_rows=25)
    wait_for(older, is_under_way(folder, 25))
    newer = start(SLOW_S)
    text = finish(older, 1).splitlines()[-1]
    assert text.startswith(f"error: another driver of this job took over output {folder}/out (pid {newer.pid} on ")
    assert text.endswith("; it continues the job and this one ends; to stop the job, stop that one")
    newer.terminate()
    finish(newer, 1)
    finish(start(), 0)
    check_output(folder)


def test_two_drivers_at_the_same_moment_leave_the_output_right(folder: Path, start: Starter) -> None:
    """Both are too fast for the watch: they may go through to the end, and the final check lets one of them
    complete."""
    drivers = [start(), start()]
    ends = [(driver.communicate(timeout=PATIENCE_S)[0], driver.returncode) for driver in drivers]
    assert sorted(code for _, code in ends) in ([0, 0], [0, 1]), ends  # 0 twice: the second found the job complete
    check_output(folder)
    assert all("took over" in text for text, code in ends if code)
