"""Tests of `calibrate` on Ray, with a bench that computes nothing, and of `preview` with the real model."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
from typer.testing import CliRunner

from model.errors import CheckpointError
from pipeline.calibration.bench import Replica, Run, Task, Tick
from pipeline.calibration.points import AR, Point
from pipeline.cli.app import app
from pipeline.config.job import Job
from pipeline.core.errors import JobFailed
from tests.pipeline.calibration.cases import FakeBench, job_file, setup_of
from tests.waiting import wait_until
from workers.cluster.bench import RayBench
from workers.cluster.remote import RemoteProcess

pytestmark = pytest.mark.ray


def no_tick(_done: int, _expected: int) -> None:
    pass


class MortalBench(FakeBench):
    """A bench whose process is killed at 1 row. At 2 rows it says how far it is, and ends after this has been heard."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.heard = heard_file(job)

    def measure(self, task: Task, tick: Tick) -> Run:
        if task.point.max_rows == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if task.point.max_rows == 2:
            tick(3, 24)
            wait_until(self.heard.exists)
        return super().measure(task, tick)


def heard_file(job: Job) -> Path:
    """Return the path of a file that exists once the driver has heard how far the bench is."""
    return Path(job.output.path).parent / "heard"


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
def test_on_ray_one_actor_measures_and_its_death_is_one_line(tmp_path: Path) -> None:
    setup = setup_of(job_file(tmp_path))
    bench = RayBench(setup.measured, MortalBench)
    replica = bench.start(setup.sample.rows, (1, "auto"), no_tick)
    assert replica.row_limits == ((1, 1), ("auto", 32))
    run = bench.measure(Task(Point(AR, 32), True, 1.0), no_tick)
    assert [done.text for done in run.rows] == [row.prompt for row in setup.sample.rows]

    def stop(done: int, expected: int) -> None:
        if (done, expected) == (3, 24):
            heard_file(setup.measured).touch()
            raise TimeoutError

    with pytest.raises(TimeoutError):
        bench.measure(Task(Point(AR, 2), True, 1.0), stop)
    with pytest.raises(JobFailed, match="the replica died: ") as error:
        bench.measure(Task(Point(AR, 1), True, 1.0), no_tick)
    assert "\n" not in str(error.value)
    bench.close()
    bench.close()
    assert ray.is_initialized()  # it was not the bench's own cluster


def test_errors_of_a_bench_leave_its_process_as_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Refusing(FakeBench):
        def start(self, *_: Any) -> Replica:
            raise CheckpointError("2 shards\nare missing")

        def measure(self, *_: Any) -> Run:
            raise ZeroDivisionError("a fault of ours")

    job = setup_of(job_file(tmp_path)).measured
    process = RemoteProcess(lambda _: Refusing(), job)
    assert str(process.call("start", (), (1,))) == "2 shards are missing"
    assert not capsys.readouterr().err
    assert str(process.call("measure", Task(Point(AR, 32), True, 1.0))) == "ZeroDivisionError: a fault of ours"
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("ray_cluster")
def test_a_preview_on_ray_is_that_of_this_process_and_writes_nothing(tmp_path: Path) -> None:
    file = job_file(tmp_path, rows=4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    options = ["--rows", "2", "--set", "generation.max_new_tokens=20", "--set", "engine.max_context_tokens=512"]
    on_ray, here = (CliRunner().invoke(app, ["preview", str(file), *options, *more]) for more in ([], ["--local"]))
    assert (on_ray.exit_code, here.exit_code) == (0, 0), on_ray.output + here.output
    assert "generated  2 rows: 40 tokens" in on_ray.stdout
    times = re.compile(r", \d+\.\d\d s$", re.MULTILINE)
    assert times.sub("", on_ray.stdout) == times.sub("", here.stdout).replace(" --local\n", "\n")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert ray.is_initialized()  # it was not the preview's own cluster
