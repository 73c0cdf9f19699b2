"""Measures the points of a calibration on a Ray cluster, in one actor that has the resources of the job's replica."""

import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError

from model.errors import TwoTowerError
from pipeline.calibration.bench import Bench, Replica, RowLimit, Run, Task, Tick
from pipeline.calibration.sample import SampleRow
from pipeline.config.job import Job
from pipeline.core.errors import JobFailed
from pipeline.core.text import one_line
from workers.cluster.actor import ReplicaActor, death_text, no_room
from workers.cluster.connection import connect, lost_cluster

T = TypeVar("T")
LOOK_S = 0.5
"""Seconds between two checks for room for the actor, and between two questions about its progress."""
MakeBench = Callable[[Job], Bench]
"""A function that returns the bench for a job, in the actor's process."""


class BenchProcess:
    """A bench in an actor's process, for RayBench. Only `progress` may be called while another call runs."""

    def __init__(self, make_bench: MakeBench, job: Job) -> None:
        self._bench = make_bench(job)
        self._progress = (0, 0)

    def start(self, rows: Sequence[SampleRow], limits: Sequence[RowLimit]) -> "Replica | JobFailed":
        """See Bench. Returns a failure as JobFailed instead of raising it."""
        return _answer(lambda: self._bench.start(rows, limits, self._tick))

    def measure(self, task: Task) -> "Run | JobFailed":
        """See Bench. Returns a failure as JobFailed instead of raising it."""
        self._progress = (0, 0)
        return _answer(lambda: self._bench.measure(task, self._tick))

    def progress(self) -> tuple[int, int]:
        """Return (rows done, rows expected) of the running call."""
        return self._progress

    def _tick(self, done: int, expected: int) -> None:
        self._progress = done, expected


class RayBench:
    """A pipeline.calibration.bench.Bench that measures points on one replica in a Ray actor.

    If a tick raises, the actor's call still runs, so only `close` may follow.
    """

    def __init__(self, job: Job, make_bench: MakeBench, stopped: Callable[[], bool] = lambda: False) -> None:
        """Connect to Ray. `make_bench` must be picklable; the actor calls it. `stopped`: see connect. Raises
        ClusterError if Ray cannot be used."""
        self._job, self._make_bench = job, make_bench
        self._ours = connect(stopped)
        self._actor: ReplicaActor | None = None

    def start(self, rows: Sequence[SampleRow], limits: Sequence[RowLimit], tick: Tick) -> Replica:
        """See Bench. Raises ClusterError if no node has room within workers.start_timeout_s, or if Ray is lost.

        Raises JobFailed if the actor dies or its bench fails.
        """
        workers = self._job.workers
        give_up_at = time.monotonic() + workers.start_timeout_s
        with lost_cluster():
            self._actor = ReplicaActor(BenchProcess, workers)
            while not self._actor.has_room():
                tick(0, 0)
                if time.monotonic() >= give_up_at:
                    raise no_room(workers, "or free the nodes")
                time.sleep(LOOK_S)
            self._actor.start(self._make_bench, self._job)
            found: Replica = self._call("start", (rows, limits), tick)
        return found

    def measure(self, task: Task, tick: Tick) -> Run:
        """See Bench. Raises JobFailed if the actor dies or its bench fails, and ClusterError if Ray is lost."""
        with lost_cluster():
            run: Run = self._call("measure", (task,), tick)
        return run

    def close(self) -> None:
        """See Bench. Also shuts down the Ray cluster if this bench started it."""
        if self._actor is not None and ray.is_initialized():
            self._actor.close()
        self._actor = None
        if self._ours:
            ray.shutdown()
            self._ours = False

    def _call(self, method: str, arguments: tuple[Any, ...], tick: Tick) -> Any:
        """Call a method of the actor and return its answer. Meanwhile pass the actor's progress to `tick`, or (0, 0) if
        the actor does not answer in time.

        Raises JobFailed if the actor dies or answers with a failure.
        """
        assert self._actor is not None, "not started"
        call = self._actor.call(method, *arguments)
        try:
            while not ray.wait([call], timeout=LOOK_S)[0]:
                look = self._actor.ask("progress")
                # The actor answers late while its interpreter is in a long call, such as loading the model.
                tick(*ray.get(look)) if ray.wait([look], timeout=LOOK_S)[0] else tick(0, 0)
            answer = ray.get(call)
        except RayActorError as error:
            raise JobFailed(f"the replica died: {death_text(error)}") from error
        if isinstance(answer, JobFailed):
            raise answer
        return answer


def _answer(function: Callable[[], T]) -> "T | JobFailed":
    """Return the result of the function. Return an exception as a JobFailed with one line of text, because Ray would
    turn it into a long text."""
    try:
        return function()
    except TwoTowerError as error:
        return JobFailed(one_line(error))
    except Exception as error:  # catches everything: the driver gets the reason
        traceback.print_exception(error)
        return JobFailed(f"{type(error).__name__}: {one_line(error)}")
