"""Tests of the Ray pool with a fake engine, on a real local cluster whose 4 CPUs and 4 GPUs are only declared."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

import workers.cluster.pool
from model.errors import CheckpointError
from pipeline.core.errors import ClusterError, JobFailed
from pipeline.core.events import Event, ReplicaActive, ReplicaLost, ReplicaReady, SlotLeftOut, UnitDone, UnitProgress
from pipeline.core.text import counted
from pipeline.core.types import Assignment, UnitResult
from pipeline.driver.dispatcher import dispatch
from pipeline.driver.retry import RetryPolicy
from pipeline.driver.stall import StallWatch
from pipeline.monitoring.telemetry import Telemetry
from tests.waiting import PATIENCE_S, wait_until
from tests.workers.fakes import FakeMaker, Gate, Turns
from tests.workers.jobs import SmallJob, open_job, prompts_of
from tests.workers.units.engines import BREAK, HANG, KILL, LOSE_GPU, MarkedMaker, finished_rows, segment_rows
from workers.cluster.pool import RayPool
from workers.replica.replica import ReplicaProcess
from workers.units.runner import UnitRunner

# processes start one after the other, and each wait has its own deadline
pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]


class Clock:
    """The pool's time, in place of the module `time`: it stands still until a test moves it on.

    Nothing is therefore due only because a machine is slow, and an hour passes when a test wants it.
    """

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        time.sleep(max(seconds, 0.05))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(workers.cluster.pool, "time", clock)
    monkeypatch.setattr(workers.cluster.pool, "CHECK_S", 0.0)
    return clock


class Watcher:
    """A listener that keeps the events of a run, and lets a test act on them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.told: list[str] = []

    def __call__(self, event: Event | None) -> None:
        if event is not None:
            self.events.append(event)

    def tell(self, text: str) -> None:
        """Keep a text that the pool reports to the operator."""
        self.told.append(text)

    def names(self, kind: type[ReplicaReady] | type[ReplicaLost]) -> list[str]:
        return [event.replica for event in self.events if isinstance(event, kind)]


def run(
    small: SmallJob,
    maker: FakeMaker,
    watcher: Watcher,
    attempts: int = 3,
    stop: threading.Event | None = None,
    stall: StallWatch | None = None,
) -> dict[str, UnitResult]:
    pool = RayPool(maker, small.job.workers, len(small.plan.units), watcher.tell)
    policy = RetryPolicy(attempts, 0.1)
    try:
        return dispatch(small.plan.units, {}, pool, policy, stop or threading.Event(), watcher, stall)
    finally:
        pool.close()


def check_rows(small: SmallJob, prompts: Sequence[str]) -> None:
    assert [row["completion"] for row in small.rows()] == [prompt[::-1] for prompt in prompts]


def folder(parent: Path, name: str) -> Path:
    """Make a new folder and return its path."""
    made = parent / name
    made.mkdir()
    return made


@pytest.mark.usefixtures("ray_cluster")
def test_two_gpu_replicas_get_distinct_pairs(tmp_path: Path) -> None:
    prompts = prompts_of(300)
    small = open_job(tmp_path, prompts, workers={"gpus": 2, "cpus": 1})
    trace = folder(tmp_path, "trace")
    watcher = Watcher()
    together = Turns(folder(tmp_path, "steps"), {"r0": "r1", "r1": "r0"})  # otherwise the first could do all the work
    results = run(small, FakeMaker(small.spec, trace, before_step=together), watcher)
    check_rows(small, prompts)
    assert {result.replica for result in results.values()} == {"r0", "r1"} == set(watcher.names(ReplicaReady))
    pairs = sorted(path.read_text().split()[1] for path in trace.iterdir())
    assert pairs == ["0,1", "2,3"]


class SlowFirst(FakeMaker):
    """A maker that makes only the first replica slow."""

    def pace(self, replica: str) -> dict[str, Any]:
        """See FakeMaker."""
        return super().pace(replica) if replica == "r0" else {}


class Killer(Watcher):
    """A watcher that kills the process of r0 when r0 reports rows."""

    signal = signal.SIGKILL

    def __init__(self, trace: Path) -> None:
        super().__init__()
        self.trace = trace
        self.killed = False

    def __call__(self, event: Event | None) -> None:
        super().__call__(event)
        if not self.killed and isinstance(event, UnitProgress) and event.replica == "r0" and event.rows:
            self.killed = True
            os.kill(int((self.trace / "r0").read_text().split()[0]), self.signal)


@pytest.mark.usefixtures("ray_cluster")
def test_a_killed_replica_is_replaced_and_every_row_leaves_once(tmp_path: Path) -> None:
    """r0 is slow from its 20th row on, so that it is killed at work. r1 waits until the replacement of r0 has begun."""
    prompts = prompts_of(400)
    small = open_job(tmp_path, prompts, rows_per_file=100, workers={"gpus": 0, "cpus": 2, "replicas": 2})
    watcher = Killer(folder(tmp_path, "trace"))
    order = Turns(folder(tmp_path, "steps"), {"r1": "r0.2"})
    results = run(small, SlowFirst(small.spec, watcher.trace, step_s=0.5, free_rows=20, before_step=order), watcher)
    check_rows(small, prompts)
    assert watcher.names(ReplicaLost) == ["r0"]
    assert "r0.2" in watcher.names(ReplicaReady)
    [reason] = [event.reason for event in watcher.events if isinstance(event, ReplicaLost)]
    assert "process has died" in reason
    assert "\n" not in reason
    assert {result.attempt for result in results.values()} == {1, 2}


@pytest.mark.usefixtures("ray_cluster")
def test_a_replica_that_loses_its_gpu_is_replaced_at_the_first_failure(tmp_path: Path) -> None:
    """No row is tried twice in a process that cannot use its GPU. The next process finishes all rows."""
    prompts = prompts_of(40)
    prompts[23] = LOSE_GPU
    small = open_job(tmp_path, prompts, rows_per_file=20, workers={"gpus": 0, "cpus": 2, "replicas": 1})
    watcher = Watcher()
    results = run(small, MarkedMaker(small.spec), watcher, attempts=2)
    check_rows(small, prompts)
    assert sum(result.totals.errors for result in results.values()) == 0
    assert watcher.names(ReplicaReady) == ["r0", "r0.2"]
    [reason] = [event.reason for event in watcher.events if isinstance(event, ReplicaLost)]
    assert reason.startswith("a GPU failed, and this process cannot use it any more: denoise of")
    assert len(list((tmp_path / "finished").iterdir())) == 2, "one process after the other"


class NodeAdder(Watcher):
    """A watcher that adds a node when the first replica is ready, and removes it when a second one has done
    something."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self.cluster = cluster
        self.node: Any = None
        self.removed = False

    def __call__(self, event: Event | None) -> None:
        super().__call__(event)
        if self.node is None and isinstance(event, ReplicaReady):
            self.node = self.cluster.add_node(num_cpus=3, wait=False)  # the node is there anyway when this returns
        rows = isinstance(event, UnitProgress) and event.replica == "r1" and event.rows
        if not self.removed and (rows or (isinstance(event, UnitDone) and event.result.replica == "r1")):
            self.removed = True
            self.cluster.remove_node(self.node, allow_graceful=False)


def test_replicas_come_and_go_with_their_nodes(tmp_path: Path, ray_cluster: Cluster) -> None:
    prompts = prompts_of(600)
    small = open_job(tmp_path, prompts, rows_per_file=50, workers={"gpus": 0, "cpus": 3})
    watcher = NodeAdder(ray_cluster)
    together = Turns(folder(tmp_path, "steps"), {"r0": "r1", "r1": "r0"})  # r0 does not end the job before r1 comes
    run(small, FakeMaker(small.spec, step_s=0.02, before_step=together), watcher)
    check_rows(small, prompts)
    assert watcher.names(ReplicaReady)[:2] == ["r0", "r1"]
    assert watcher.removed


ONE = {"gpus": 0, "cpus": 1, "replicas": 1}


@pytest.mark.usefixtures("ray_cluster")
def test_a_row_that_kills_its_process_becomes_an_error_row_and_no_other_does(tmp_path: Path) -> None:
    prompts = prompts_of(60)
    prompts[41] = KILL
    small = open_job(tmp_path, prompts, rows_per_file=30, workers=ONE)
    watcher = Watcher()
    results = run(small, MarkedMaker(small.spec), watcher, attempts=1)
    assert sum(result.totals.errors for result in results.values()) == 1
    rows = small.rows()
    assert rows.pop(41)["error"].startswith("the replica died once while it generated this row alone; the last time: ")
    assert [row["completion"] for row in rows] == [prompt[::-1] for prompt in prompts if prompt != KILL]
    assert len(watcher.names(ReplicaLost)) <= 1 + 5 + 1
    assert not segment_rows(small)


class StallWatcher(Watcher):
    """A watcher with a telemetry, which acts when r0 hangs. It moves the clock on until the pool has asked r0 twice and
    heard the same beats, and then by the time after which a replica counts as stalled."""

    STALL_S = 600.0

    def __init__(self, clock: Clock, hangs: Path) -> None:
        super().__init__()
        self.clock, self.hangs = clock, hangs
        self.telemetry = Telemetry(40, clock=clock.monotonic)
        self.beats: list[int] = []
        self.waited = False

    def __call__(self, event: Event | None) -> None:
        super().__call__(event)
        self.telemetry.take(event)
        if self.waited or not self.hangs.exists():
            return
        if isinstance(event, ReplicaActive):
            self.beats.append(event.beats)
        elif event is None:
            self.waited = len(self.beats) > 1 and self.beats[-1] == self.beats[-2]
            self.clock.now += self.STALL_S if self.waited else workers.cluster.pool.LOOK_S


@pytest.mark.usefixtures("ray_cluster")
def test_a_replica_that_hangs_is_replaced_and_its_rows_are_done_by_another(tmp_path: Path, clock: Clock) -> None:
    prompts = prompts_of(40)
    prompts[20] = HANG
    small = open_job(tmp_path, prompts, workers=ONE)
    watcher = StallWatcher(clock, tmp_path / "hangs")
    run(small, MarkedMaker(small.spec), watcher, stall=StallWatch(watcher.telemetry, watcher.STALL_S))
    check_rows(small, prompts)
    assert watcher.names(ReplicaLost) == ["r0"]
    [reason] = [event.reason for event in watcher.events if isinstance(event, ReplicaLost)]
    assert reason.startswith("no progress for 10")
    assert f"generating unit {small.plan.units[2].id}: " in reason  # it was asked while the call hung


class Stopper(Watcher):
    """A watcher that stops the job when a replica has reported rows."""

    def __init__(self) -> None:
        super().__init__()
        self.stop = threading.Event()

    def __call__(self, event: Event | None) -> None:
        super().__call__(event)
        if isinstance(event, UnitProgress) and event.rows:
            self.stop.set()


@pytest.mark.usefixtures("ray_cluster")
def test_a_stopped_job_writes_down_every_finished_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines are slow from their 20th row on, so that no unit is done before the job is stopped."""
    monkeypatch.setattr(workers.cluster.pool, "FLUSH_S", PATIENCE_S)
    small = open_job(tmp_path, prompts_of(200), rows_per_file=100, workers={"gpus": 0, "cpus": 1, "replicas": 2})
    stopper = Stopper()
    with pytest.raises(JobFailed, match="stopped; 0 of 2 units are done"):
        run(small, MarkedMaker(small.spec, step_s=0.5, free_rows=20), stopper, stop=stopper.stop)
    finished = finished_rows(tmp_path)
    assert 0 < len(finished) < 200
    assert sorted(segment_rows(small)) == sorted(finished)
    assert stopper.told == [f"saved {counted(len(finished), 'finished row')} of unfinished units"]


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second error: the process ended while its file was read
        return True


class Terminator(Killer):
    """A watcher that sends SIGTERM to the process instead, as a cloud does before it takes a spot machine away."""

    signal = signal.SIGTERM


@pytest.mark.usefixtures("ray_cluster")
def test_a_replica_that_is_told_to_leave_writes_down_its_rows_and_none_is_suspected(tmp_path: Path) -> None:
    prompts = prompts_of(200)
    small = open_job(tmp_path, prompts, rows_per_file=100, workers=ONE)
    watcher = Terminator(folder(tmp_path, "trace"))
    maker = MarkedMaker(small.spec, watcher.trace, step_s=0.5, free_rows=20, leave_s=PATIENCE_S / 4)
    run(small, maker, watcher, attempts=1)
    check_rows(small, prompts)
    [lost] = [event for event in watcher.events if isinstance(event, ReplicaLost)]
    assert (lost.replica, lost.reason, lost.excused) == ("r0", "it was told to leave (SIGTERM)", True)
    assert len(finished_rows(tmp_path)) == 200  # none twice


@pytest.mark.usefixtures("ray_cluster")
def test_the_process_of_a_dead_engine_leaves_though_no_driver_kills_it(tmp_path: Path) -> None:
    prompts = prompts_of(10)
    prompts[5] = BREAK
    small = open_job(tmp_path, prompts)
    trace = folder(tmp_path, "trace")
    actor_class = ray.remote(concurrency_groups={"control": 1})(ReplicaProcess)  # type: ignore[call-overload]
    actor = actor_class.remote("r0", MarkedMaker(small.spec, trace))
    ray.get(actor.start.remote())
    ray.get(actor.assign.remote(Assignment(small.plan.units[0])))
    assert ray.get(actor.work.remote(PATIENCE_S)).fatal is None  # it has read the unit
    assert ray.get(actor.work.remote(PATIENCE_S)).fatal is None  # it has generated its first row
    assert ray.get(actor.work.remote(PATIENCE_S)).fatal == "RuntimeError: the device fell off the bus"
    pid = int((trace / "r0").read_text().split()[0])
    wait_until(lambda: gone(pid))
    assert sorted(segment_rows(small)) == sorted(finished_rows(tmp_path))


class RoomWatcher(Watcher):
    """A watcher that moves the clock on to the pool's notice when two replicas are ready, and lets their engines go
    after the notice."""

    def __init__(self, clock: Clock, go: Path) -> None:
        super().__init__()
        self.clock, self.go = clock, go

    def __call__(self, event: Event | None) -> None:
        super().__call__(event)
        if isinstance(event, ReplicaReady) and len(self.names(ReplicaReady)) == 2:
            self.clock.now += workers.cluster.pool.NOTICE_S

    def tell(self, text: str) -> None:
        """See Watcher."""
        super().tell(text)
        self.go.touch()


@pytest.mark.usefixtures("ray_cluster")
def test_what_does_not_fit_is_said_and_the_job_runs_on_what_does(tmp_path: Path, clock: Clock) -> None:
    small = open_job(tmp_path, prompts_of(100), workers={"gpus": 0, "cpus": 2, "replicas": 5})
    watcher = RoomWatcher(clock, tmp_path / "go")
    results = run(small, FakeMaker(small.spec, before_step=Gate(watcher.go)), watcher)
    assert len({result.replica for result in results.values()}) == 2  # Ray may give any two of the five their room
    [told] = watcher.told
    assert told.startswith("room for 2 of 5 replicas of 0 GPU, 2 CPU each; the cluster has ")
    assert "4 GPU, 4 CPU" in told


class MinuteWatcher(Watcher):
    """A watcher that makes each turn of the driver's loop take a minute."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.turns = clock, 0

    def __call__(self, event: Event | None) -> None:
        super().__call__(event)
        if event is None:
            self.turns += 1
            self.clock.now += 60


@pytest.mark.usefixtures("ray_cluster")
def test_more_gpus_than_any_node_has_is_an_error_in_time(tmp_path: Path, clock: Clock) -> None:
    small = open_job(tmp_path, prompts_of(10), workers={"gpus": 8, "cpus": 1, "start_timeout_s": 300})
    watcher = MinuteWatcher(clock)
    said = r"no node has room for a replica of 8 GPU, 1 CPU after 300 s .*4 GPU, 4 CPU"
    with pytest.raises(ClusterError, match=said):
        run(small, FakeMaker(small.spec), watcher)
    assert watcher.turns == 5


class RefusingMaker(FakeMaker):
    def __call__(self, replica: str) -> UnitRunner:
        raise CheckpointError(f"shard 2 is missing on {replica}")


class DyingMaker(FakeMaker):
    def __call__(self, replica: str) -> UnitRunner:  # noqa: ARG002
        os._exit(1)


@pytest.mark.usefixtures("ray_cluster")
def test_a_replica_that_cannot_start_ends_the_job_with_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.cluster.pool, "BACKOFF_S", 0.1)
    small = open_job(tmp_path, prompts_of(10), workers={"gpus": 0, "cpus": 1, "replicas": 1})
    with pytest.raises(JobFailed, match="no replica could start: shard 2 is missing on r0"):
        run(small, RefusingMaker(small.spec), Watcher())
    with pytest.raises(JobFailed, match=r"3 replicas died while starting: .*process has died"):
        run(small, DyingMaker(small.spec), Watcher())


class SickSlot:
    """Ends the process of every replica in slot r1 at its first step, and makes the other one wait until `lives` of
    them have died. It is called before each step."""

    def __init__(self, deaths: Path, lives: int) -> None:
        self.deaths, self.lives = deaths, lives

    def __call__(self, replica: str) -> None:
        if replica.startswith("r1"):
            (self.deaths / replica).touch()
            os._exit(1)
        wait_until(lambda: len(list(self.deaths.iterdir())) >= self.lives)


class SecondWatcher(Watcher):
    """A watcher that makes each turn of the driver's loop take a second, and keeps the times at which replicas of slot
    r1 are lost and start."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.lost_at: list[float] = []
        self.ready_at: list[float] = []

    def __call__(self, event: Event | None) -> None:
        super().__call__(event)
        if event is None:
            self.clock.now += 1
        elif isinstance(event, ReplicaLost | ReplicaReady) and event.replica.startswith("r1"):
            (self.lost_at if isinstance(event, ReplicaLost) else self.ready_at).append(self.clock.now)


@pytest.mark.usefixtures("ray_cluster")
def test_a_sick_slot_is_left_out_with_growing_pauses_and_costs_no_row(tmp_path: Path, clock: Clock) -> None:
    """Four replicas of one slot die at their first step. The first one had rows, and the others only a control."""
    prompts = prompts_of(60)
    small = open_job(tmp_path, prompts, workers={"gpus": 0, "cpus": 2, "replicas": 2})
    deaths, watcher = folder(tmp_path, "deaths"), SecondWatcher(clock)
    results = run(small, FakeMaker(small.spec, before_step=SickSlot(deaths, lives=4)), watcher, attempts=1)
    check_rows(small, prompts)
    assert sum(result.totals.errors for result in results.values()) == 0
    pauses = [ready - lost for lost, ready in zip(watcher.lost_at, watcher.ready_at[1:], strict=False)]
    assert all(pause >= wanted for pause, wanted in zip(pauses[:3], (2, 4, 8), strict=True)), pauses
    [left_out] = [event for event in watcher.events if isinstance(event, SlotLeftOut)]
    assert left_out.reason.startswith("replica slot r1 on node ")


class HangingMaker(FakeMaker):
    """A maker whose first replica hangs while it loads. The file `loading` then exists."""

    def __call__(self, replica: str) -> UnitRunner:
        if replica == "r0":
            (Path(self.spec.job.output.path).parent / "loading").touch()
            time.sleep(3600)
        return super().__call__(replica)


class LoadWatcher(Watcher):
    """A watcher that acts when a model hangs while it loads: it moves the clock on by the time that loading may take,
    and then to the next start."""

    def __init__(self, clock: Clock, loading: Path) -> None:
        super().__init__()
        self.clock, self.loading = clock, loading
        self.waited = False

    def __call__(self, event: Event | None) -> None:
        super().__call__(event)
        if not self.waited and self.loading.exists():
            self.waited = True
            self.clock.now += workers.cluster.pool.START_S
        if isinstance(event, ReplicaLost):
            self.clock.now += workers.cluster.pool.BACKOFF_S


@pytest.mark.usefixtures("ray_cluster")
def test_a_replica_that_hangs_while_it_loads_is_replaced(tmp_path: Path, clock: Clock) -> None:
    small = open_job(tmp_path, prompts_of(10), workers={"gpus": 0, "cpus": 1, "replicas": 1})
    watcher = LoadWatcher(clock, tmp_path / "loading")
    run(small, HangingMaker(small.spec), watcher)
    check_rows(small, prompts_of(10))
    [lost] = [event for event in watcher.events if isinstance(event, ReplicaLost)]
    assert (lost.replica, lost.reason) == ("r0", "its model was not loaded within 60 minutes")


@pytest.mark.usefixtures("ray_cluster")
def test_a_closed_pool_leaves_nothing_behind(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(10), workers={"gpus": 2, "cpus": 1})
    run(small, FakeMaker(small.spec), Watcher())
    wait_until(lambda: ray.available_resources().get("GPU") == 4)  # type: ignore[no-untyped-call]  # no types
    assert ray.is_initialized()  # a cluster that was there before stays
