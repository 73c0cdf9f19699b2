"""Tests of `status`: it shows whether a job runs, what its replicas do and what failed, at any time."""

import io
import json
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import pipeline.monitoring.live
import pipeline.monitoring.pulse
import pipeline.monitoring.status
from pipeline.config.job import Job
from pipeline.core.error_kinds import ErrorCount
from pipeline.core.errors import OutputError
from pipeline.core.events import EngineRoom, ReplicaActive, ReplicaLost, ReplicaReady, ReplicaStats, SlotLeftOut
from pipeline.core.machine import uptime
from pipeline.core.types import Totals, UnitResult
from pipeline.maintenance.clean import find_leftovers
from pipeline.maintenance.verify import verify
from pipeline.monitoring.live import COMPLETE, DEAD_AFTER, INTERVAL_S, Live, LiveFile
from pipeline.monitoring.progress import LineDisplay, run_progress
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
    monkeypatch.setitem(STILL, "now", uptime())
    for clock in ("time", "uptime"):
        monkeypatch.setattr(pipeline.monitoring.live, clock, now)


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


def test_a_slot_that_is_left_out_is_shown_until_it_is_used_again(job: Job) -> None:
    """In the progress line, in live.json and in the status, also after the run has ended."""
    open_ledger(job, plan_of(job))
    run = Telemetry(25, total_units=3, fingerprint=plan_of(job).fingerprint.digest, wall_clock=now)
    display = LineDisplay(io.StringIO())
    for event in (ReplicaReady("r0"), SlotLeftOut("r1", "replica slot r1 on node n1 is left out, because …")):
        run.take(event)
        display.hear(event)
    assert run_progress(run.snapshot()).text.endswith("1 replica, 1 replica slot left out")
    for ended in (None, "it broke"):
        shown = list(lines(seen(job, run.picture(ended))))
        assert "slot     replica slot r1 on node n1 is left out, because …" in shown
    run.take(SlotLeftOut("r1", ""))
    assert run_progress(run.snapshot()).text.endswith("1 replica")
    assert run.picture().left_out == ()


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


class AnotherMachine:
    """A driver on another machine, and a reader whose sleeps let time pass on both. The clock of the driver's machine
    is `ahead_s` seconds ahead of the reader's."""

    def __init__(self, job: Job, monkeypatch: pytest.MonkeyPatch, ahead_s: float, *, writes: bool) -> None:
        self._job, self.writes = job, writes
        self.slept = 0.0
        monkeypatch.setattr(pipeline.monitoring.live, "boot_id", lambda: "the driver's")
        monkeypatch.setattr(pipeline.monitoring.live, "time", lambda: now() + ahead_s)
        monkeypatch.setattr(pipeline.monitoring.live, "uptime", lambda: 5.0)
        live = live_of(job)
        replicas = tuple(replace(replica, heard=replica.heard + ahead_s) for replica in live.replicas)
        self.live = replace(live, sampled=live.sampled + ahead_s, replicas=replicas)
        seen_at = seen(job, replace(self.live, ended="it ended"))  # a state that needs no wait
        assert seen_at.state == "stopped"
        self.write()

    def write(self, ended: str | None = None) -> None:
        file = LiveFile(self._job.output.path)
        file._writes = int(self.slept)
        file.show(replace(self.live, ended=ended))
        file.close(replace(self.live, ended=ended))

    def sleep(self, seconds: float) -> None:
        before, self.slept = self.slept, self.slept + seconds
        STILL["now"] += seconds
        if self.writes and before // INTERVAL_S != self.slept // INTERVAL_S:
            self.write()


HOUR_S = 3600.0
SKEWS = pytest.mark.parametrize("ahead_s", [-HOUR_S, 0.0, HOUR_S])


@SKEWS
def test_a_driver_on_another_machine_runs_whatever_the_clocks_say(
    job: Job, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    open_ledger(job, plan_of(job))
    driver = AnotherMachine(job, monkeypatch, ahead_s, writes=True)
    waits: list[float] = []
    status = read_job(job.output.path, now, driver.sleep, lambda: waits.append(driver.slept))
    assert (status.state, waits) == ("running", [0.0])
    assert 0 < driver.slept <= INTERVAL_S  # it does not wait for longer than it must
    first = next(lines(status))
    assert first == "state    running, last report 0s ago"
    assert "SILENT" not in "".join(lines(status))
    for _ in range(5):
        driver.sleep(7)
        status = look_again(job.output.path, status, now)
        assert status.state == "running"
    driver.writes = False
    driver.sleep(DEAD_AFTER * INTERVAL_S + 1)
    slept = driver.slept
    assert look_again(job.output.path, status, now).state == "dead"
    assert driver.slept == slept  # it was looked at for long enough


@SKEWS
def test_a_dead_driver_on_another_machine_is_dead_whatever_the_clocks_say(
    job: Job, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    open_ledger(job, plan_of(job))
    driver = AnotherMachine(job, monkeypatch, ahead_s, writes=False)
    status = read_job(job.output.path, now, driver.sleep)
    assert status.state == "dead"
    assert DEAD_AFTER * INTERVAL_S <= driver.slept <= DEAD_AFTER * INTERVAL_S + 2
    first, *_, last = lines(status)
    assert re.fullmatch(
        r"state    dead: no driver seems to be running: live\.json did not change for 3\ds; its last report is of "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC by the driver's clock",
        first,
    )
    assert last.endswith("submit the same job again to resume")
    assert status.to_dict()["heard_s_ago"] is None


@SKEWS
def test_a_job_on_another_machine_that_ends_while_it_is_looked_at(
    job: Job, monkeypatch: pytest.MonkeyPatch, ahead_s: float
) -> None:
    open_ledger(job, plan_of(job))
    driver = AnotherMachine(job, monkeypatch, ahead_s, writes=False)

    def sleep(seconds: float) -> None:
        driver.sleep(seconds)
        driver.write("it broke")

    status = read_job(job.output.path, now, sleep)
    assert (status.state, driver.slept) == ("stopped", 1.0)
    assert re.fullmatch(r"state    stopped 0s ago: it broke", next(lines(status)))
    later = read_job(job.output.path, now, sleep)
    assert driver.slept == 1.0  # the report says that the run has ended: nothing to wait for
    assert re.fullmatch(r"state    stopped \(a report of .* by the driver's clock\): it broke", next(lines(later)))


def test_a_complete_job_is_complete_at_once(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver was killed after `_SUCCESS`, before its last report."""
    plan = plan_of(job)
    ledger = open_ledger(job, plan)
    driver = AnotherMachine(job, monkeypatch, HOUR_S, writes=False)
    ledger.complete(plan, job, sum((result.totals for result in publish(job, plan)), Totals()), seconds=1.0)
    assert read_job(job.output.path, now, driver.sleep).state == "complete"
    assert driver.slept == 0


def test_a_report_of_an_earlier_version_is_looked_at(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names no machine and has no number."""
    open_ledger(job, plan_of(job))
    seen(job, live_of(job))
    fields = json.loads((out(job) / LIVE).read_bytes())
    for name in ("writes", "boot", "uptime"):
        del fields[name]
    (out(job) / LIVE).write_text(json.dumps(fields))
    monkeypatch.setattr(pipeline.monitoring.pulse, "boot_id", lambda: "")  # as on a system without such an id

    def sleep(seconds: float) -> None:
        STILL["now"] += seconds
        (out(job) / LIVE).write_text(json.dumps({**fields, "time": fields["time"] + STILL["now"]}))

    assert read_job(job.output.path, now, sleep).state == "running"


def test_a_job_that_is_not_complete_is_not_called_so(job: Job) -> None:
    """A driver that another one replaced has written it into live.json."""
    open_ledger(job, plan_of(job))
    first, *_, last = lines(seen(job, live_of(job, ended="complete")))
    assert first.startswith("state    stopped 0s ago: it was complete then, or another driver took over; now")
    assert last == "not complete: submit the same job again to resume"


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

    before = pipeline.monitoring.status._read_all
    calls = 0

    def counted(*given: Any) -> JobStatus:
        nonlocal calls
        calls += 1
        return before(*given)

    monkeypatch.setattr(pipeline.monitoring.status, "_read_all", counted)
    assert show(job.output.path, watch=True, every_s=7, as_json=True, console=Console(file=shown), sleep=sleep)
    states = [json.loads(line)["state"] for line in shown.getvalue().splitlines()]
    assert states == ["running", "running", "running", "complete"]
    # the whole folder was read only at first and after the driver had ended, and once by `seen` here
    assert (looks, calls) == ([7, 7, 7], 3)


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


def test_a_report_that_gets_no_thread_is_written_by_the_next_one(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit on threads is reached for a moment. live.json only informs people: it must not end the job."""
    open_ledger(job, plan_of(job))
    file = LiveFile(job.output.path)
    with monkeypatch.context() as limited:

        def refused(_thread: object) -> None:
            raise RuntimeError("can't start new thread")

        limited.setattr(threading.Thread, "start", refused)
        file.show(live_of(job))
    file.show(live_of(job))
    file.close(live_of(job))
    assert read_job(job.output.path, now).state == "running"


@pytest.mark.parametrize("eta", ["NaN", "Infinity", "-5.0", "null"])
def test_a_report_with_odd_numbers_is_shown(job: Job, eta: str) -> None:
    """Any program may have written it."""
    open_ledger(job, plan_of(job))
    seen(job, live_of(job))
    file = out(job) / LIVE
    text = re.sub(r'"eta_s": ?null', f'"eta_s": {eta}', file.read_text())
    file.write_text(re.sub(r'"time": ?[0-9.]+', '"time": Infinity', text))
    status = read_job(job.output.path, now)
    shown = "\n".join(lines(status))
    assert status.state == "running"
    assert "; ETA ?" in shown
    assert "-5" not in shown
