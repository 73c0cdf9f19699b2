"""Real driver processes that are killed, stopped and started twice on one output: every row once, little done again."""

import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import pytest
import yaml

from tests.workers.jobs import prompts_of, write_prompts
from tests.workers.units.engines import finished_rows

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
ROWS = 240
MAX_ROWS = 4
FLUSH_ROWS = 10
SLOW_S = 0.01


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


Starter = Callable[[float], "subprocess.Popen[str]"]


@pytest.fixture
def start(folder: Path) -> Iterator[Starter]:
    started = []

    def start_one(step_s: float = 0.0) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "tests.workers.replica.driver", str(folder), str(step_s)]
        started.append(subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return started[-1]

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def finish(process: "subprocess.Popen[str]", code: int) -> str:
    text, _ = process.communicate(timeout=120)
    assert process.returncode == code, text
    assert "Traceback" not in text
    return text


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_under_way(folder: Path, rows: int) -> Callable[[], bool]:
    return lambda: (folder / "finished").exists() and len(finished_rows(folder)) >= rows


def check_output(folder: Path) -> None:
    with duckdb.connect() as connection:
        query = f"SELECT source_row, completion FROM '{folder}/out/part-*.parquet' ORDER BY 1"
        rows = connection.sql(query).fetchall()
    assert rows == list(enumerate(prompt[::-1] for prompt in prompts_of(ROWS)))
    assert (folder / "out/_SUCCESS").exists()
    assert not list((folder / "out/_job").glob("segments/*/*.parquet"))


def test_a_killed_driver_costs_what_was_not_written_down(folder: Path, start: Starter) -> None:
    """kill -9 twice, and submitted again at once each time."""
    for rows in (30, 120):
        process = start(SLOW_S)
        wait_for(is_under_way(folder, rows), process)
        process.send_signal(signal.SIGKILL)
    finish(start(0.0), 0)
    check_output(folder)
    again = len(finished_rows(folder)) - ROWS
    # a flush of flush.rows under way, as many collected meanwhile, what one step finishes; twice: two open units
    assert again <= 2 * 2 * (2 * FLUSH_ROWS + MAX_ROWS)


def test_a_stopped_driver_loses_nothing(folder: Path, start: Starter) -> None:
    process = start(SLOW_S)
    wait_for(is_under_way(folder, 25), process)
    process.terminate()
    assert re.search(r"stopped; [0-3] of 4 units are done; submit the same job again to resume", finish(process, 1))
    finish(start(0.0), 0)
    check_output(folder)
    assert set(Counter(finished_rows(folder)).values()) == {1}


def test_of_two_drivers_the_newer_goes_on_and_the_older_says_so_and_ends(folder: Path, start: Starter) -> None:
    older = start(SLOW_S * 10)
    wait_for(is_under_way(folder, 25), older)
    newer = start(SLOW_S * 10)
    text = finish(older, 1).splitlines()[-1]
    assert text.startswith(f"error: another driver of this job took over output {folder}/out (pid {newer.pid} on ")
    assert text.endswith("; it goes on with the job and this one ends; to stop the job, stop that one")
    newer.terminate()
    finish(newer, 1)
    finish(start(0.0), 0)
    check_output(folder)


def test_two_drivers_at_the_same_moment_leave_the_output_right(folder: Path, start: Starter) -> None:
    """Too fast for the watch: both may go through to the end, and the final look lets one of them complete."""
    drivers = [start(0.0), start(0.0)]
    texts = {driver.communicate(timeout=120)[0]: driver.returncode for driver in drivers}
    assert sorted(texts.values()) in ([0, 0], [0, 1])  # 0 twice: the second found the job complete
    check_output(folder)
    assert all("took over" in text for text, code in texts.items() if code)
