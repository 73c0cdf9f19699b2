"""Tests of `status`: it shows whether a job runs, what its replicas do and what failed, at any time."""

import io
import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import pipeline.monitoring.live
import pipeline.monitoring.status
from pipeline.config.job import Job
from pipeline.core.error_kinds import ErrorCount
from pipeline.core.errors import OutputError
from pipeline.core.events import EngineRoom, ReplicaActive, ReplicaLost, ReplicaReady, ReplicaStats
from pipeline.core.types import Totals, UnitResult
from pipeline.maintenance.clean import find_leftovers
from pipeline.maintenance.verify import verify
from pipeline.monitoring.live import COMPLETE, DEAD_AFTER, INTERVAL_S, Live, LiveFile
from pipeline.monitoring.status import JobStatus, lines, look_again, read_job
from pipeline.monitoring.status_view import show
from pipeline.monitoring.telemetry import Telemetry
from pipeline.output.layout import LIVE, part_name
from tests.pipeline.cases import make_job, open_ledger, out, plan_of, publish, two_files, write

STILL = {"now": 0.0}


def now() -> float:
    """Return the time of drivers, which stands still: an age is what a test makes it, however long the test takes."""
    return STILL["now"]


@pytest.fixture(autouse=True)
def _time_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STILL, "now", time.time())
    monkeypatch.setattr(pipeline.monitoring.live, "time", now)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return two_files(tmp_path)


def live_of(job: Job, *, ended: str | None = None) -> Live:
    """Return the live data of a driver whose first replica was lost and whose second one is working."""
    done = UnitResult("u0", Totals(), 1.0, "", "r0", 1)
    run = Telemetry(25, [done], total_units=3, fingerprint=plan_of(job).fingerprint.digest, wall_clock=now)
    room = EngineRoom(pages_used=30, pages=120)
    kinds = (ErrorCount("prompt is null", 1, "b.parquet#1: prompt is null"),)
    stats = ReplicaStats(rows=5, queue=7, active=4, max_rows=8, unsaved_rows=2, unsaved_s=12, room=room, errors=1)
    for event in (ReplicaReady("r0"), ReplicaReady("r1"), ReplicaLost("r0", "killed\x1b[2J")):
        run.take(event)
    run.take(ReplicaActive("r1", 1, "generating unit x", replace(stats, error_kinds=kinds, storage_retries=3)))
    return run.picture(ended)


def seen(job: Job, live: Live | None) -> JobStatus:
    if live is None:
        (out(job) / LIVE).unlink(missing_ok=True)
    else:
        file = LiveFile(job.output.path)
        file.show(live)
        file.close(live)
    return read_job(job.output.path, now)


def test_a_running_job_shows_what_each_replica_does(job: Job) -> None:
    open_ledger(job, plan_of(job))
    status = seen(job, live_of(job))
    text = "\n".join(lines(status))
    assert status.state == "running"
    assert "rows/s, 0 tokens/s, 4 of 8 rows, 7 queued, pages 25%, 2 rows unsaved for 12s; generating" in text
    assert "lost     1 replica, the last: r0: killed?[2J" in text
    assert "retries  3 of storage" in text
    assert "error    1 row: b.parquet#1: prompt is null" in text
    assert "submit" not in text


@pytest.mark.parametrize(
    ("ended", "age_s", "state", "said"),
    [
        (None, 0.0, "running", "running, last report 0s ago"),
        (None, DEAD_AFTER * INTERVAL_S + 60, "dead", "dead: last report of its driver 1m30s ago"),
        ("stopped; 1 of 3 units are done", 0.0, "stopped", "stopped 0s ago: stopped; 1 of 3 units are done"),
    ],
)
def test_a_driver_that_is_silent_is_dead_and_one_that_said_goodbye_is_stopped(
    job: Job, ended: str | None, age_s: float, state: str, said: str
) -> None:
    open_ledger(job, plan_of(job))
    seen(job, live_of(job, ended=ended))
    status = read_job(job.output.path, clock=lambda: now() + age_s)
    first, *_, last = lines(status)
    assert status.state == state
    assert first.startswith(f"state    {said[:-6]}")
    assert ("submit the same job again to resume" in last) == (state != "running")


def test_a_job_of_an_earlier_version_and_another_jobs_live_file(job: Job) -> None:
    open_ledger(job, plan_of(job))
    assert seen(job, None).state == "unknown"
    assert seen(job, replace(live_of(job), fingerprint="another's")).state == "unknown"


def test_a_loop_that_stands_still_and_a_silent_replica_are_named(job: Job) -> None:
    open_ledger(job, plan_of(job))
    live = live_of(job)
    live = replace(live, sampled=live.sampled - 200, replicas=(replace(live.replicas[0], heard=live.time - 90),))
    text = "\n".join(lines(seen(job, live)))
    assert "its loop has been stuck for 3m20s" in text
    assert "SILENT for 1m30s" in text


def test_errors_are_read_from_the_parts_where_the_driver_cannot_say(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job was resumed, and its last driver knows only the errors of its own run."""
    plan = plan_of(job)
    open_ledger(job, plan)
    publish(job, plan)
    bad = plan.units[2]  # the unit of b.parquet
    status = seen(job, None)
    assert [(count.kind, count.rows) for count in status.error_kinds] == [("prompt is empty", 1), ("prompt is null", 1)]
    assert status.error_kinds[1].example == "b.parquet#1: prompt is null"
    monkeypatch.setattr(pipeline.monitoring.status, "ERROR_PARTS", 0)
    assert read_job(job.output.path).error_kinds == ()
    out(job, part_name(bad.id)).write_bytes(b"PAR1 damaged")
    assert read_job(job.output.path).folder.units_done == 2


def test_the_live_file_is_the_jobs_own(job: Job) -> None:
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    totals = sum((result.totals for result in publish(job, plan)), Totals())
    ledger.complete(plan, job, totals, seconds=1.0)
    seen(job, live_of(job, ended=COMPLETE))
    assert verify(job.output.path).problems == ()
    assert find_leftovers(job.output.path) == []
    (out(job) / f"_job/.live.json.{'0' * 32}.tmp").touch()
    assert [leftover.what for leftover in find_leftovers(job.output.path)] == ["temporary files"]


def test_watching_ends_with_the_job_and_reads_one_file_a_look(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    live = live_of(job)
    seen(job, live)
    shown = io.StringIO()
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            totals = sum((result.totals for result in publish(job, plan)), Totals())
            ledger.complete(plan, job, totals, seconds=1.0)
            seen(job, replace(live, ended=COMPLETE))

    before = pipeline.monitoring.status.read_job
    calls = 0

    def counted(*given: Any) -> JobStatus:
        nonlocal calls
        calls += 1
        return before(*given)

    monkeypatch.setattr(pipeline.monitoring.status, "read_job", counted)
    assert show(job.output.path, watch=True, every_s=7, as_json=True, console=Console(file=shown), sleep=sleep)
    states = [json.loads(line)["state"] for line in shown.getvalue().splitlines()]
    assert states == ["running", "running", "running", "complete"]
    assert (looks, calls) == ([7, 7, 7], 1)  # the whole folder was read only after the driver had ended


def test_watching_a_job_that_died_says_so_and_is_no_success(job: Job) -> None:
    open_ledger(job, plan_of(job))
    seen(job, live_of(job, ended="it broke"))
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=80)
    assert not show(job.output.path, watch=True, console=terminal)
    assert re.search(r"stopped \w+ ago: it broke", shown.getvalue())
    assert show(job.output.path, console=Console(file=io.StringIO()))  # without watch it succeeds in any state


def test_a_look_at_a_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "in/a.parquet", prompt=["x"])
    job = make_job(tmp_path / "in", tmp_path / "out")
    open_ledger(job, plan_of(job))
    status = read_job(job.output.path)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(OutputError, match="does not exist"):
        look_again(job.output.path, status)
