"""Measures the points of a calibration on a Ray cluster, in one actor that has the resources of the job's replica."""

import contextlib
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from model.errors import TwoTowerError
from pipeline.calibration.bench import Bench, Replica, RowLimit, Run, Task, Tick
from pipeline.calibration.sample import SampleRow
from pipeline.config.job import Job, WorkersSection
from pipeline.core.errors import ClusterError, JobFailed
from pipeline.core.text import one_line
from workers.cluster.connection import amounts, connect, describe_nodes, ray_text
from workers.cluster.pool import death_of

T = TypeVar("T")
LOOK_S = 0.5
"""Seconds between two questions to the actor about its progress."""
MakeBench = Callable[[Job], Bench]


@dataclass(frozen=True, slots=True)
class Failure:
    """The reason why a call failed. It is returned as a value, because Ray would turn an exception into a long text."""

    text: str


class BenchProcess:
    """A bench in an actor's process. Only `progress` may be called while another call runs."""

    def __init__(self, make_bench: MakeBench, job: Job) -> None:
        self._bench = make_bench(job)
        self._progress = (0, 0)

    def start(self, rows: Sequence[SampleRow], limits: Sequence[RowLimit]) -> "Replica | Failure":
        """See Bench."""
        return _answer(lambda: self._bench.start(rows, limits, self._tick))

    def measure(self, task: Task) -> "Run | Failure":
        """See Bench."""
        self._progress = (0, 0)
        return _answer(lambda: self._bench.measure(task, self._tick))

    def progress(self) -> tuple[int, int]:
        """Return (rows done, rows expected) of the running call."""
        return self._progress

    def _tick(self, done: int, expected: int) -> None:
        self._progress = done, expected


class RayBench:
    """A pipeline.calibration.bench.Bench on Ray. After a tick has raised, the bench can only be closed."""

    def __init__(self, job: Job, make_bench: MakeBench, stopped: Callable[[], bool] = lambda: False) -> None:
        """Connect to Ray. `make_bench` must be picklable; the actor calls it. Raises ClusterError."""
        self._job, self._make_bench = job, make_bench
        self._ours = connect(stopped)
        self._group: PlacementGroup | None = None
        self._actor: Any = None

    def start(self, rows: Sequence[SampleRow], limits: Sequence[RowLimit], tick: Tick) -> Replica:
        """See Bench. Raises ClusterError if no node has room within workers.start_timeout_s, or if Ray is lost.

        Raises JobFailed if the actor dies or its bench fails.
        """
        workers = self._job.workers
        try:
            self._group = _wait_for_room(workers, tick)
            self._actor = (
                ray.remote(concurrency_groups={"control": 1})(BenchProcess)  # type: ignore[call-overload]
                .options(
                    num_cpus=workers.cpus,
                    num_gpus=workers.gpus,
                    max_restarts=0,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, 0),
                )
                .remote(self._make_bench, self._job)
            )
            found: Replica = self._call(self._actor.start, (rows, limits), tick)
        except RayError as error:
            raise ClusterError(f"the Ray cluster was lost: {ray_text(error)}") from error
        return found

    def measure(self, task: Task, tick: Tick) -> Run:
        """See Bench. Raises JobFailed if the actor dies or its bench fails, and ClusterError if Ray is lost."""
        try:
            run: Run = self._call(self._actor.measure, (task,), tick)
        except RayError as error:
            raise ClusterError(f"the Ray cluster was lost: {ray_text(error)}") from error
        return run

    def close(self) -> None:
        """See Bench. Also shuts down the Ray cluster if this bench started it."""
        if ray.is_initialized():
            with contextlib.suppress(RayError):
                if self._actor is not None:
                    ray.kill(self._actor, no_restart=True)
                if self._group is not None:
                    remove_placement_group(self._group)
        self._actor = self._group = None
        if self._ours:
            ray.shutdown()
            self._ours = False

    def _call(self, method: Any, arguments: tuple[Any, ...], tick: Tick) -> Any:
        """Call a method of the actor and return its answer; meanwhile ask the actor for its progress for `tick`.

        Raises JobFailed if the actor dies or answers with a failure.
        """
        call = method.remote(*arguments)
        try:
            while not ray.wait([call], timeout=LOOK_S)[0]:
                look = self._actor.progress.options(concurrency_group="control").remote()
                # The actor answers late while its interpreter is in a long call, such as loading the model.
                tick(*ray.get(look)) if ray.wait([look], timeout=LOOK_S)[0] else tick(0, 0)
            answer = ray.get(call)
        except RayActorError as error:
            raise JobFailed(f"the replica died: {death_of(error)}") from error
        if isinstance(answer, Failure):
            raise JobFailed(answer.text)
        return answer


def _wait_for_room(workers: WorkersSection, tick: Tick) -> PlacementGroup:
    bundle = {"CPU": float(workers.cpus)} | ({"GPU": float(workers.gpus)} if workers.gpus else {})
    group: PlacementGroup = placement_group([bundle], strategy="STRICT_PACK")
    give_up_at = time.monotonic() + workers.start_timeout_s
    while not group.wait(LOOK_S):
        tick(0, 0)
        if time.monotonic() >= give_up_at:
            remove_placement_group(group)
            raise ClusterError(
                f"no node has room for a replica of {amounts({'GPU': workers.gpus, 'CPU': workers.cpus})} after "
                f"{workers.start_timeout_s:g} s (workers.start_timeout_s); the cluster has {describe_nodes()}; lower "
                "workers.gpus or workers.cpus, or free the nodes"
            )
    return group


def _answer(function: Callable[[], T]) -> "T | Failure":
    try:
        return function()
    except Exception as error:  # catches everything: the driver gets the reason
        text = one_line(error)
        if isinstance(error, TwoTowerError):
            return Failure(text)
        traceback.print_exception(error)
        return Failure(f"{type(error).__name__}: {text}")
