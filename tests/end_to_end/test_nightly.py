"""Tests jobs/nightly.yaml as it is shipped: every night, run again, beside the night before, without prompts."""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import pipeline.cli.app
import pipeline.cli.compose
from pipeline.output.ledger import read_status
from tests.pipeline.cli.test_app import fake_pool, files_of
from tests.waiting import PATIENCE_S, wait_for
from tests.workers.jobs import prompts_of, write_prompts
from tests.workers.units.engines import finished_rows
from workers.replica.local_pool import LocalPool

ROOT = Path(__file__).parents[2]
NIGHTLY = ROOT / "jobs/nightly.yaml"
SATURDAY, SUNDAY = "2026-01-31", "2026-02-01"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that the variables of the job point to, with the prompts of Saturday; DATE is Saturday."""
    monkeypatch.setenv("TWOTOWER_INPUT", f"{tmp_path}/prompts/")
    monkeypatch.setenv("TWOTOWER_OUTPUT", f"{tmp_path}/completions/")
    monkeypatch.setenv("TWOTOWER_CHECKPOINT", "builtin:noise")
    monkeypatch.setenv("DATE", SATURDAY)
    monkeypatch.setattr(pipeline.cli.compose, "make_pool", functools.partial(fake_pool, LocalPool))
    add(tmp_path, SATURDAY, "a", 20)
    return tmp_path


def add(folder: Path, day: str, name: str, rows: int) -> None:
    write_prompts(folder / f"prompts/{day}/{name}.parquet", prompts_of(rows))


def call(verb: str, job: Path = NIGHTLY) -> Result:
    return CliRunner().invoke(pipeline.cli.app.app, [verb, str(job)])


def test_a_night_is_shown_recorded_and_not_run_again(folder: Path) -> None:
    prompts, completions = folder / "prompts" / SATURDAY, folder / "completions" / SATURDAY
    shown = call("plan").stdout
    assert f"job        nightly-{SATURDAY}\n" in shown
    assert f"input      {prompts}: 1 file, 20 rows\n" in shown
    assert not (folder / "completions").exists()
    first = call("run")
    assert (first.exit_code, first.stdout.splitlines()[:2]) == (
        0,
        [
            f"job nightly-{SATURDAY}: {prompts} -> {completions}",
            f"job nightly-{SATURDAY} is complete: 20 rows: 20 ok, 0 errors",
        ],
    )
    settings = json.loads((completions / "_job/plan.json").read_text())["job"]
    assert (settings["name"], settings["input"]["path"]) == (f"nightly-{SATURDAY}", str(prompts))
    assert json.loads((completions / "_job/manifest.json").read_text())["job"] == settings
    before = {path: path.stat().st_mtime_ns for path in completions.rglob("*")}
    again = call("run")
    assert (again.exit_code, again.stderr) == (0, "")
    assert f"job nightly-{SATURDAY} was complete already, nothing was run: 20 rows" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in completions.rglob("*")}


def test_files_that_came_late_are_run_alone(folder: Path) -> None:
    call("run")
    add(folder, SATURDAY, "late", 7)
    assert "added      1 file, 7 rows since the last run: late.parquet" in call("plan").stdout
    assert (
        f"job nightly-{SATURDAY} is complete: 27 rows: 27 ok, 0 errors (1 of 2 units done before)" in call("run").stdout
    )


@pytest.mark.slow
def test_a_day_without_a_folder_as_cron_sees_it(folder: Path) -> None:
    """The job file, started as a program as cron does, reports a missing input folder in one line."""
    environment = {**os.environ, "DATE": SUNDAY, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([str(NIGHTLY)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stderr) == (
        1,
        f"error: input {folder}/prompts/{SUNDAY} does not exist: give a Parquet file, a folder or a glob\n",
    )
    assert not (folder / "completions").exists()


@pytest.mark.parametrize("what", ["no file", "no row", "no Parquet"])
def test_a_day_without_prompts_is_an_error_that_names_the_folder(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A day without prompts is an error, so that cron, systemd and Kubernetes retry it or show it as failed."""
    monkeypatch.setenv("DATE", SUNDAY)
    sunday = folder / "prompts" / SUNDAY
    sunday.mkdir()
    if what == "no row":
        add(folder, SUNDAY, "a", 0)
    if what == "no Parquet":
        (sunday / "_SUCCESS").touch()
        (sunday / "a.csv").touch()
    before = files_of(folder)
    refused = call("run")
    assert refused.exit_code == 1
    [line] = refused.stderr.splitlines()
    assert line.startswith(f"error: input {sunday} ")
    assert files_of(folder) == before
    add(folder, SUNDAY, "a", 5)
    assert f"job nightly-{SUNDAY} is complete: 5 rows" in call("run").stdout


def test_one_growing_folder_takes_what_was_added_since_the_last_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the two commented lines of the file in use, days that were left out are taken by the next run."""
    lines = NIGHTLY.read_text().splitlines(keepends=True)
    commented = [number for number, line in enumerate(lines) if line.startswith("  # path: ")]
    assert len(commented) == 2
    for number in commented:
        lines[number] = lines[number].replace("# path:", "path:")
    dated = [number for number, line in enumerate(lines) if line.startswith("  path: ") and "${DATE" in line]
    job = folder / "growing.yaml"
    job.write_text("".join(line for number, line in enumerate(lines) if number not in dated))
    assert "is complete: 20 rows" in call("run", job).stdout
    monkeypatch.setenv("DATE", SUNDAY)
    assert f"job nightly-{SUNDAY} was complete already, nothing was run: 20 rows" in call("run", job).stdout
    add(folder, SUNDAY, "a", 5)
    add(folder, SATURDAY, "late", 7)
    ran = call("run", job)
    said = f"job nightly-{SUNDAY} is complete: 32 rows: 32 ok, 0 errors (1 of 2 units done before)"
    assert (ran.exit_code, ran.stdout.splitlines()[1]) == (0, said)
    assert read_status(f"{folder}/completions/nightly").complete


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_tonights_run_leaves_last_nights_alone_and_both_complete(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tonight's run does not disturb last night's, a slow process, which resumes when it is started with its date."""
    (folder / "job.yaml").write_text(NIGHTLY.read_text())
    add(folder, SATURDAY, "b", 2000)  # far more than finish before it is stopped
    add(folder, SUNDAY, "a", 5)
    completions = folder / "completions"
    command = [sys.executable, "-m", "tests.workers.replica.driver", str(folder), "0.5", "10"]
    last_night = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(last_night, lambda: (completions / "finished").exists() and len(finished_rows(completions)) >= 5)
        monkeypatch.setenv("DATE", SUNDAY)
        assert f"job nightly-{SUNDAY} is complete: 5 rows: 5 ok, 0 errors" in call("run").stdout
        assert last_night.poll() is None
        last_night.terminate()
        said, _ = last_night.communicate(timeout=PATIENCE_S)
    finally:
        last_night.kill()
        last_night.wait()
    assert re.search("stopped; 0 of 1 units are done", said), said
    monkeypatch.setenv("DATE", SATURDAY)
    assert f"job nightly-{SATURDAY} is complete: 2,020 rows" in call("run").stdout
    assert read_status(f"{completions}/{SUNDAY}").rows_done == 5
