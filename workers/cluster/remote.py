"""Runs an object, such as a bench, in one Ray actor that has the resources of a replica, and follows its progress."""

import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError

from model.errors import TwoTowerError
from pipeline.calibration.bench import Tick
from pipeline.config.job import Job
from pipeline.core.errors import JobFailed
from pipeline.core.streams import say_traceback
from pipeline.core.text import one_line
from workers.cluster.actor import ReplicaActor, death_text, no_room
from workers.cluster.connection import check_cluster, connect, lost_cluster, shutdown

LOOK_S = 0.5
"""Seconds between two checks for room for the actor, and between two questions about its progress."""
Make = Callable[[Job], object]
"""A function that returns the object for a job, in the actor's process."""


class RemoteProcess:
    """The object in the actor's process. Only `progress` may be called while another call runs."""

    def __init__(self, make: Make, job: Job) -> None:
        self._object = make(job)
        self._progress = (0, 0)

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the object with these arguments and a tick, and return its result.

        A failure is returned as a JobFailed with one line of text, because Ray would turn it into a long text.
        """
        self._progress = (0, 0)
        try:
            return getattr(self._object, method)(*arguments, self._tick)
        except TwoTowerError as error:
            return JobFailed(one_line(error))
        except Exception as error:  # catches everything: the driver gets the reason
            say_traceback(error)
            return JobFailed(f"{type(error).__name__}: {one_line(error)}")

    def progress(self) -> tuple[int, int]:
        """Return (rows done, rows expected) of the running call."""
        return self._progress

    def _tick(self, done: int, expected: int) -> None:
        self._progress = done, expected


class RemoteObject:
    """The driver's side of an object in a Ray actor.

    If a tick raises, the actor's call still runs, so only `close` may follow.
    """

    def __init__(self, job: Job, make: Make, stopped: Callable[[], bool] = lambda: False) -> None:
        """Connect to Ray. `make` must be picklable; the actor calls it. `stopped`: see connect. Raises ClusterError if
        Ray cannot be used."""
        self._job, self._make = job, make
        self._ours = connect(stopped)
        self._actor: ReplicaActor | None = None

    def start(self, tick: Tick) -> None:
        """Wait until a node has room for the actor, and start it.

        Raises ClusterError if no node has room within workers.start_timeout_s, or if Ray is lost.
        """
        workers = self._job.workers
        give_up_at = time.monotonic() + workers.start_timeout_s
        with lost_cluster():
            self._actor = ReplicaActor(RemoteProcess, workers)
            while not self._actor.has_room():
                tick(0, 0)
                if time.monotonic() >= give_up_at:
                    raise no_room(workers, "or free the nodes")
                time.sleep(LOOK_S)
            self._actor.start(self._make, self._job)

    def call(self, method: str, *arguments: Any, tick: Tick) -> Any:
        """Call a method of the object with these arguments and a tick, and return its result. Meanwhile pass its
        progress to `tick`, or (0, 0) if the actor does not answer in time.

        Raises JobFailed if the actor dies or the method fails, and ClusterError if Ray is lost.
        """
        assert self._actor is not None, "not started"
        with lost_cluster():
            call = self._actor.call("call", method, *arguments)
            try:
                while not ray.wait([call], timeout=LOOK_S)[0]:
                    check_cluster()
                    look = self._actor.ask("progress")
                    # The actor answers late while its interpreter is in a long call, such as loading the model.
                    tick(*ray.get(look)) if ray.wait([look], timeout=LOOK_S)[0] else tick(0, 0)
                answer = ray.get(call)
            except RayActorError as error:
                raise JobFailed(f"the replica died: {death_text(error)}") from error
        if isinstance(answer, JobFailed):
            raise answer
        return answer

    def close(self) -> None:
        """Kill the actor, and shut down the Ray cluster if this object started it. May be called more than once."""
        if self._actor is not None and ray.is_initialized():
            self._actor.close()
        self._actor = None
        if self._ours:
            shutdown()
            self._ours = False
