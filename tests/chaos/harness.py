"""Runs one job while replicas, nodes, the driver and requests to the store fail, and resubmits it until it is done."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from s3fs import S3FileSystem

from pipeline.config.job import Job
from tests.chaos.logs import Life, heads, log_bytes
from tests.clusters import start_patiently
from tests.end_to_end.s3.fault_proxy import FaultProxy, fault_proxy
from tests.end_to_end.s3.server import BUCKET, aws_variables, s3_server

ROOT = Path(__file__).parents[2]
REPLICAS, NODES, CPUS_A_NODE = 4, 3, 2
NODE_CONFIG = {"include_dashboard": False, "dashboard_port": 0, "object_store_memory": 80 << 20}
HEALTH = {"health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_timeout_ms": 2000}
ROWS_BYTES = 1_000
"""If a run has added more bytes than this to the logs, rows have ended: the first lines of the logs are shorter."""
MOST_EXITS = 5
"""The number of runs of a job that may fail by themselves before the suite gives up."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often each kind of fault hits a job, and the settings of the job that the faults depend on.

    `actor_s`, `node_s` and `driver_s` are the mean seconds between two faults of that kind; 0 means never.
    """

    rows_per_file: int = 500
    turn_s: float = 0.04
    """The seconds of a turn of the engine."""
    first_turn_s: float | None = None
    """The seconds of a turn in the first run; None: turn_s. A slow first run is not done before the faults begin."""
    flush_s: float = 0.4
    attempts: int = 3
    """The number of lost replicas after which a lone row becomes an error row (retry.attempts). It must be more than
    random kills cause for a good row."""
    actor_s: float = 6.0
    node_s: float = 40.0
    node_away_s: float = 3.0
    """The seconds until a new node replaces a killed one."""
    driver_s: float = 40.0
    actors: int = 1_000
    """The most faults of this kind. `nodes` and `drivers` limit the other two kinds."""
    nodes: int = 1_000
    drivers: int = 3
    """Only a few, because a new driver does not know which units were suspect."""
    storage_rate: float = 0.03
    """The share of all requests to the store that fail."""
    limit_s: float = 2_400.0
    """The seconds after which a job that is not done fails the suite."""


@dataclass(slots=True)
class Killed:
    """A process or a node that was killed."""

    kind: str
    """`actor` (SIGKILL to a replica), `spot` (SIGTERM to a replica), `node` or `driver`."""
    time: float
    """The seconds since the epoch."""
    lives: list[Life]
    """The replicas' processes that it ended; empty for a driver."""
    run: int
    """The number of the run that it hit, from 1."""


@dataclass(slots=True)
class History:
    """The folders that one job wrote to, and the events of its run."""

    output: str
    """The URL of the output folder."""
    logs: Path
    """The folder of the replicas' logs."""
    killed: list[Killed] = field(default_factory=list)
    injected: Counter[str] = field(default_factory=Counter)
    """The number of requests to the store that were made to fail, by kind of fault."""
    exits: list[str] = field(default_factory=list)
    """The last output of each run that ended by itself without finishing the job."""
    runs: int = 0
    """The number of times that the job was submitted."""
    seconds: float = 0.0


class World:
    """The place where the jobs run: an S3 server behind a proxy that can make requests fail, and a Ray cluster."""

    def __init__(self, cluster: Any, proxy: FaultProxy, folder: Path) -> None:
        self.cluster, self.proxy, self.folder = cluster, proxy, folder
        self.nodes = [self._add_node() for _ in range(NODES)]

    def _add_node(self) -> Any:
        # Without `wait`, because the node has joined when its constructor returns, and Ray's wait gives up after 30 s.
        return start_patiently(lambda: self.cluster.add_node(num_cpus=CPUS_A_NODE, wait=False, **NODE_CONFIG))

    def pick_node(self, rng: random.Random) -> Any:
        """Return a random node. The head is never drawn."""
        return rng.choice(self.nodes)

    def remove_node(self, node: Any) -> None:
        """Kill a node, as if its machine were gone."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def add_node(self) -> None:
        """Add a node in place of one that was removed."""
        self.nodes.append(self._add_node())


@contextmanager
def world(folder: Path) -> Iterator[World]:
    """Yield a World that lives as long as the `with` block. Its files go to the folder.

    The environment of this process gets the credentials of the store meanwhile, because Ray's nodes inherit it.
    """
    from ray.cluster_utils import Cluster

    (folder / "s3").mkdir(parents=True)
    with ExitStack() as stack:
        proxy = stack.enter_context(fault_proxy(stack.enter_context(s3_server(folder / "s3"))))
        stack.enter_context(environment(aws_variables(proxy.url)))
        head = {"num_cpus": 0, "_system_config": HEALTH, **NODE_CONFIG}
        cluster = start_patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        stack.callback(cluster.shutdown)
        yield World(cluster, proxy, folder)


@contextmanager
def environment(variables: dict[str, str]) -> Iterator[None]:
    """Set these variables of the environment for the `with` block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    S3FileSystem.clear_instance_cache()  # instances remember the endpoint that they were made with
    try:
        yield
    finally:
        S3FileSystem.clear_instance_cache()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def make_job(inputs: str, output: str, schedule: Schedule) -> Job:
    """Return the settings of the job that the faults hit."""
    return Job.model_validate(
        {
            "name": "chaos",
            "input": {"path": inputs},
            "output": {"path": output, "rows_per_file": schedule.rows_per_file},
            "model": {"checkpoint": "builtin:noise", "dtype": "float32"},
            "generation": {"max_new_tokens": 48},
            "workers": {"gpus": 0, "cpus": 1, "replicas": REPLICAS, "start_timeout_s": 300.0},
            "flush": {"seconds": schedule.flush_s},
            "retry": {"attempts": schedule.attempts},
        }
    )


class Torment:
    """Runs one job from its first submission to its end, and injects the faults of a schedule at random times.

    `seed` determines the random choices.
    """

    def __init__(self, world: World, schedule: Schedule, inputs: str, seed: int) -> None:
        self._world, self._schedule, self._rng, self._seed = world, schedule, random.Random(seed), seed
        folder = world.folder / f"seed-{seed}"
        (folder / "logs").mkdir(parents=True)
        self.history = History(f"s3://{BUCKET}/out-{seed}", folder / "logs")
        self._job = folder / "job.json"
        self._job.write_text(make_job(inputs, self.history.output, schedule).model_dump_json())
        self._said, self._strikes = folder / "driver.log", folder / "strikes.log"
        self._driver: subprocess.Popen[bytes] | None = None
        self._next: dict[str, float] = {}
        self._struck = Counter[str]()
        self._bytes_before = 0  # size of the logs when the run began
        self._node_back: float | None = None

    def run(self) -> History:
        """Submit the job, and again whenever its driver has ended early, until it is done.

        Raises AssertionError if it takes longer than limit_s or more than MOST_EXITS runs fail by themselves.
        """
        history, schedule, began = self.history, self._schedule, time.monotonic()
        self._world.proxy.injected.clear()
        self._world.proxy.fail_at_random(self._seed, schedule.storage_rate)
        try:
            self._submit()
            while not self._ended():
                assert time.monotonic() - began < schedule.limit_s, (
                    f"not done after {schedule.limit_s:g} s: {self._tail()}"
                )
                time.sleep(0.05)
                self._strike()
        finally:
            self._world.proxy.fail_at_random(0, 0.0)
            if self._driver and self._driver.poll() is None:
                self._driver.kill()
                self._driver.wait()
            if self._node_back is not None:
                self._world.add_node()
        history.injected, history.seconds = Counter(self._world.proxy.injected), time.monotonic() - began
        return history

    def _submit(self) -> None:
        self.history.runs += 1
        turn_s = self._schedule.turn_s
        if self.history.runs == 1 and self._schedule.first_turn_s is not None:
            turn_s = self._schedule.first_turn_s
        command = [sys.executable, "-m", "tests.chaos.driver"]
        command += [str(self._job), str(self.history.logs), str(self.history.runs), str(turn_s)]
        with self._said.open("ab") as said:
            self._driver = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"RAY_ADDRESS": self._world.cluster.address},
                stdout=said,
                stderr=said,
            )
        self._bytes_before = log_bytes(self.history.logs)
        self._next.clear()

    def _ended(self) -> bool:
        """Return True if the job is done. If its driver failed, submit the job again."""
        assert self._driver is not None
        code = self._driver.poll()
        if code is None:
            return False
        if code == 0:
            return True
        self.history.exits.append(self._tail())
        assert len(self.history.exits) <= MOST_EXITS, self.history.exits
        self._submit()
        return False

    def _tail(self) -> str:
        return self._said.read_text()[-500:].strip()

    def _strike(self) -> None:
        """Inject the faults that are due. A run gets none before it has finished a row, so that it makes progress."""
        now = time.monotonic()
        if self._node_back is not None and now >= self._node_back:
            self._node_back = None
            self._world.add_node()
        if not self._next:
            if log_bytes(self.history.logs) > self._bytes_before + ROWS_BYTES:
                self._next = {kind: now + self._pause(kind) for kind in ("actor", "node", "driver")}
            return
        for kind, strike in (("actor", self._kill_actor), ("node", self._remove_node), ("driver", self._kill_driver)):
            if now >= self._next.get(kind, float("inf")):
                self._next[kind] = now + self._pause(kind)
                if self._struck[kind] < getattr(self._schedule, f"{kind}s"):
                    strike()

    def _pause(self, kind: str) -> float:
        mean: float = getattr(self._schedule, f"{kind}_s")
        return mean * self._rng.uniform(0.6, 1.4) if mean else float("inf")

    def _alive(self) -> list[Life]:
        return [life for life in heads(self.history.logs, self.history.runs) if life.alive()]

    def _kill_actor(self) -> None:
        """Send a replica SIGKILL or, one time in five, the SIGTERM that comes before a machine is taken away.

        The replica is drawn from all places, even those where none runs now. Otherwise the replicas that are left would
        be hit more often when others are missing.
        """
        place, spot = f"r{self._rng.randrange(REPLICAS)}", self._rng.random() < 0.2
        for life in self._alive():
            if life.slot != place:
                continue
            kind, number = ("spot", signal.SIGTERM) if spot else ("actor", signal.SIGKILL)
            self._note(kind, [life])
            with suppress(ProcessLookupError):  # it has just ended by itself
                os.kill(life.pid, number)

    def _remove_node(self) -> None:
        if self._node_back is None:
            node = self._world.pick_node(self._rng)
            self._note("node", [life for life in self._alive() if life.node == node.node_id])
            self._world.remove_node(node)
            self._node_back = time.monotonic() + self._schedule.node_away_s

    def _kill_driver(self) -> None:
        assert self._driver is not None
        self._note("driver", [])
        self._driver.kill()
        self._driver.wait()
        self._submit()

    def _note(self, kind: str, lives: list[Life]) -> None:
        self._struck["actor" if kind == "spot" else kind] += 1
        with self._strikes.open("a") as file:
            print(f"{time.time():.3f} {kind} {' '.join(f'{life.slot}.{life.number}' for life in lives)}", file=file)
        self.history.killed.append(Killed(kind, time.time(), lives, self.history.runs))
