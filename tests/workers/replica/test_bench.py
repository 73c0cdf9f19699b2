"""Tests of `calibrate` with the real model in one process."""

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

import pipeline.cli.compose
from model import Engine, Request, load_model
from pipeline.calibration.bench import Task
from pipeline.calibration.points import AR, Point, Setting
from pipeline.calibration.sample import SampleRow
from pipeline.cli.app import app
from pipeline.config.job import Job
from pipeline.config.loader import load_job
from tests.pipeline.calibration.cases import FakeBench, job_file, setup_of
from tests.pipeline.cases import load
from workers.replica.bench import ReplicaBench

pytestmark = pytest.mark.slow

OWN = Point(Setting("diffusion", 0.02, 4), 4)
SHORT = ["generation.max_new_tokens=8", "generation.confidence_threshold=0.02", "engine.max_context_tokens=512"]
FEW = {"sample": 6, "thresholds": (0.02,), "steps": (4,), "rows": (4,)}


def no_tick(_done: int, _expected: int) -> None:
    pass


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def arguments(file: Path) -> list[str]:
    sets = [part for setting in SHORT for part in ("--set", setting)]
    lists = ["--sample", "6", "--thresholds", "0.02", "--steps", "4", "--rows", "4"]
    return ["calibrate", str(file), *sets, *lists, "--set", "engine.max_rows=4", "--local"]


@pytest.fixture(autouse=True)
def _short_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.calibration.run.WINDOW_S", 0.01)


def test_the_command_measures_the_real_model(tmp_path: Path) -> None:
    file = job_file(tmp_path, rows=12)
    done = call(*arguments(file))
    assert done.exit_code == 0, done.output
    assert "chosen " in done.stdout
    assert "12 rows take " in done.stdout
    folder = tmp_path / "out-calibration"
    rows = pq.read_table(folder / "measurements.parquet").to_pylist()
    assert {row["point"] for row in rows} == {"ar-r4", "diffusion-g0.02-t4-r4", "diffusion-g0.02-t16-r4"}
    assert all(row["tokens_per_s"] > 0 and row["window_rows"] >= 8 for row in rows)
    assert load_job(folder / "job.yaml").generation.max_new_tokens == 8
    before = (folder / "measurements.parquet").stat().st_mtime_ns
    again = call(*arguments(file), "--min-agreement", "0")
    assert again.exit_code == 0, again.output
    assert "loading" not in again.stderr
    assert (folder / "measurements.parquet").stat().st_mtime_ns > before
    assert load(folder / "calibration.json")["chosen"]["mode"] in ("ar", "diffusion")


def test_its_completions_are_those_of_the_job(tmp_path: Path) -> None:
    """Each row is what the engine gives for the same prompt, settings and key, in AR and in diffusion."""
    setup = setup_of(job_file(tmp_path, rows=12), SHORT, **FEW)
    bench = ReplicaBench(setup.measured)
    replica = bench.start(setup.sample.rows, (4, "auto", 10**6), no_tick)
    assert replica.row_limits[0] == (4, 4)
    assert [limit for limit, _ in replica.refused] == [10**6]
    engine = Engine(load_model("builtin:noise"), setup.measured.engine.limits())
    for setting in (AR, OWN.setting):
        run = bench.measure(Task(Point(setting, 4), True, 0.01), no_tick)
        assert run.speed is not None
        assert run.greedy == ()
        requests = [request_of(row, setting) for row in setup.sample.rows]
        alone = engine.generate(requests)
        assert [done.token_ids for done in run.rows] == [done.token_ids for done in alone]
        assert [done.steps_per_block for done in run.rows] == [done.steps_per_block for done in alone]
    bench.close()


def request_of(row: SampleRow, setting: Setting) -> Request:
    params = replace(row.params, mode=setting.mode)
    if setting.threshold is not None and setting.steps is not None:
        params = replace(params, confidence_threshold=setting.threshold, steps_per_block=setting.steps)
    return Request(row.key, row.prompt_ids, params)


def test_a_job_that_samples_gives_both(tmp_path: Path) -> None:
    setup = setup_of(job_file(tmp_path, rows=12), [*SHORT, "generation.temperature=2.0"], **FEW)
    bench = ReplicaBench(setup.measured)
    bench.start(setup.sample.rows, (4,), no_tick)
    run = bench.measure(Task(OWN, True, 0.01), no_tick)
    bench.close()
    assert len(run.rows) == len(run.greedy) == 6
    assert [done.token_ids for done in run.rows] != [done.token_ids for done in run.greedy]


def test_a_signal_leaves_what_was_measured_and_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def terminate(task: Task) -> None:
        if task.point.name == "diffusion-g0.9-t16-r32":
            os.kill(os.getpid(), signal.SIGTERM)

    bench = FakeBench(before=terminate)

    def make_bench(_local: bool, signals: Any, _job: Job) -> FakeBench:
        signals.install()
        return bench

    monkeypatch.setattr(pipeline.cli.compose, "make_bench", make_bench)
    done = call("calibrate", job_file(tmp_path), "--local")
    assert done.exit_code == 128 + signal.SIGTERM, done.output
    assert "points, for these reasons: stopped while it was measured" in done.stdout
    assert bench.closed
    assert (tmp_path / "out-calibration/report.html").exists()


def test_a_replica_that_fails_is_an_error_with_all_that_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.cli.compose, "make_bench", lambda *_: FakeBench(dies_at="ar-r1"))
    done = call("calibrate", job_file(tmp_path))
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == (
        "error: the replica died: killed; the points measured so far are kept: run it again to continue"
    )
    assert (tmp_path / "out-calibration/job.yaml").exists()
    wrong = call("calibrate", tmp_path / "small.yaml", "--steps", "a")
    assert (wrong.exit_code, wrong.stderr) == (1, "error: --steps a: give whole numbers such as 4,16\n")
