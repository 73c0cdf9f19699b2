"""The Ray pool on a real local cluster (4 CPUs and 4 GPUs by declaration only), with a fake engine."""

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

import workers.pool
from model.errors import CheckpointError
from pipeline.dispatch import Event, ReplicaLost, ReplicaReady, UnitProgress, dispatch
from pipeline.errors import ClusterError, JobFailed
from pipeline.retry import RetryPolicy
from pipeline.types import UnitResult
from tests.workers.fakes import FakeMaker
from tests.workers.jobs import SmallJob, open_job, prompts_of
from workers.pool import RayPool
from workers.unit_runner import UnitRunner


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 4, "num_gpus": 4, "include_dashboard": False, "object_store_memory": 100 << 20},
    )
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


class Watcher:
    """Keeps the events of a run, and lets a test act on them."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.told: list[str] = []

    def __call__(self, event: Event | None) -> None:
        if event is not None:
            self.events.append(event)

    def names(self, kind: type[ReplicaReady] | type[ReplicaLost]) -> list[str]:
        return [event.replica for event in self.events if isinstance(event, kind)]


def run(small: SmallJob, maker: FakeMaker, watcher: Watcher, attempts: int = 3) -> dict[str, UnitResult]:
    pool = RayPool(maker, small.job.workers, len(small.plan.units), watcher.told.append)
    try:
        return dispatch(small.plan.units, {}, pool, RetryPolicy(attempts, 0.1), threading.Event(), watcher)
    finally:
        pool.close()


def check_rows(small: SmallJob, prompts: Sequence[str]) -> None:
    assert [row["completion"] for row in small.rows()] == [prompt[::-1] for prompt in prompts]


@pytest.mark.usefixtures("cluster")
def test_two_gpu_replicas_get_distinct_pairs(tmp_path: Path) -> None:
    prompts = prompts_of(300)
    small = open_job(tmp_path, prompts, workers={"gpus": 2, "cpus": 1})
    trace = tmp_path / "trace"
    trace.mkdir()
    watcher = Watcher()
    results = run(small, FakeMaker(small.spec, trace, step_s=0.01), watcher)
    check_rows(small, prompts)
    assert {result.replica for result in results.values()} == {"r0", "r1"} == set(watcher.names(ReplicaReady))
    pairs = sorted(path.read_text().split()[1] for path in trace.iterdir())
    assert pairs == ["0,1", "2,3"]


class Killer(Watcher):
    """Kills the process of the first replica that reports rows."""

    def __init__(self, trace: Path) -> None:
        super().__init__()
        self.trace = trace
        self.killed: str | None = None

    def __call__(self, event: Event | None) -> None:
        super().__call__(event)
        if self.killed is None and isinstance(event, UnitProgress) and event.rows:
            self.killed = event.replica
            os.kill(int((self.trace / event.replica).read_text().split()[0]), signal.SIGKILL)


@pytest.mark.usefixtures("cluster")
def test_a_killed_replica_is_replaced_and_every_row_leaves_once(tmp_path: Path) -> None:
    prompts = prompts_of(400)
    small = open_job(tmp_path, prompts, rows_per_file=100, workers={"gpus": 0, "cpus": 2, "replicas": 2})
    trace = tmp_path / "trace"
    trace.mkdir()
    watcher = Killer(trace)
    results = run(small, FakeMaker(small.spec, trace, step_s=0.02), watcher)
    check_rows(small, prompts)
    assert watcher.names(ReplicaLost) == [watcher.killed]
    assert f"{watcher.killed}.2" in watcher.names(ReplicaReady)
    [reason] = [event.reason for event in watcher.events if isinstance(event, ReplicaLost)]
    assert "process has died" in reason
    assert "\n" not in reason
    assert {result.attempt for result in results.values()} == {1, 2}


class NodeAdder(Watcher):
    """Adds a node when the first replica is ready, and takes it away when a second one reports rows."""

    def __init__(self, cluster: Cluster) -> None:
        super().__init__()
        self.cluster = cluster
        self.node: Any = None
        self.removed = False

    def __call__(self, event: Event | None) -> None:
        super().__call__(event)
        if self.node is None and isinstance(event, ReplicaReady):
            self.node = self.cluster.add_node(num_cpus=3)
        if not self.removed and isinstance(event, UnitProgress) and event.replica == "r1" and event.rows:
            self.removed = True
            self.cluster.remove_node(self.node, allow_graceful=False)


def test_replicas_come_and_go_with_their_nodes(tmp_path: Path, cluster: Cluster) -> None:
    prompts = prompts_of(600)
    small = open_job(tmp_path, prompts, rows_per_file=50, workers={"gpus": 0, "cpus": 3})
    watcher = NodeAdder(cluster)
    run(small, FakeMaker(small.spec, step_s=0.02), watcher)
    check_rows(small, prompts)
    assert watcher.names(ReplicaReady)[:2] == ["r0", "r1"]
    assert watcher.removed


@pytest.mark.usefixtures("cluster")
def test_what_does_not_fit_is_said_and_the_job_runs_on_what_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.pool, "NOTICE_S", 0.5)
    small = open_job(tmp_path, prompts_of(100), workers={"gpus": 0, "cpus": 2, "replicas": 5})
    watcher = Watcher()
    results = run(small, FakeMaker(small.spec, step_s=0.05), watcher)
    assert len({result.replica for result in results.values()}) == 2  # Ray may give any two of the five their room
    [told] = watcher.told
    assert told.startswith("room for 2 of 5 replicas of 0 GPU, 2 CPU each; the cluster has ")
    assert "4 GPU, 4 CPU" in told


@pytest.mark.usefixtures("cluster")
def test_more_gpus_than_any_node_has_is_an_error_in_time(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(10), workers={"gpus": 8, "cpus": 1, "start_timeout_s": 2})
    started = time.monotonic()
    with pytest.raises(ClusterError, match=r"no node has room for a replica of 8 GPU, 1 CPU after 2 s .*4 GPU, 4 CPU"):
        run(small, FakeMaker(small.spec), Watcher())
    assert time.monotonic() - started < 10


class RefusingMaker(FakeMaker):
    def __call__(self, replica: str) -> UnitRunner:
        raise CheckpointError(f"shard 2 is missing on {replica}")


class DyingMaker(FakeMaker):
    def __call__(self, replica: str) -> UnitRunner:  # noqa: ARG002
        os._exit(1)


@pytest.mark.usefixtures("cluster")
def test_a_replica_that_cannot_start_ends_the_job_with_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers.pool, "BACKOFF_S", 0.1)
    small = open_job(tmp_path, prompts_of(10), workers={"gpus": 0, "cpus": 1, "replicas": 1})
    with pytest.raises(JobFailed, match="no replica could start: shard 2 is missing on r0"):
        run(small, RefusingMaker(small.spec), Watcher())
    with pytest.raises(JobFailed, match=r"3 replicas died while starting: .*process has died"):
        run(small, DyingMaker(small.spec), Watcher())


@pytest.mark.usefixtures("cluster")
def test_a_closed_pool_leaves_nothing_behind(tmp_path: Path) -> None:
    small = open_job(tmp_path, prompts_of(10), workers={"gpus": 2, "cpus": 1})
    run(small, FakeMaker(small.spec), Watcher())
    deadline = time.monotonic() + 10
    while ray.available_resources().get("GPU") != 4:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert ray.is_initialized()  # a cluster that was there before stays
