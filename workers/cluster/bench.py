"""Measures the points of a calibration, and generates the rows of a preview, on a replica in a Ray actor."""

from collections.abc import Callable, Sequence

from model.requests import Completion, Request
from pipeline.calibration.bench import Bench, Replica, RowLimit, Run, Task, Tick
from pipeline.calibration.sample import SampleRow
from pipeline.config.job import Job
from pipeline.preview.generator import Generator
from workers.cluster.remote import RemoteObject


class RayBench:
    """A pipeline.calibration.bench.Bench that measures points on one replica in a Ray actor.

    If a tick raises, the actor's call still runs, so only `close` may follow.
    """

    def __init__(
        self, job: Job, make_bench: Callable[[Job], Bench], stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Connect to Ray, as RemoteObject does. `make_bench` makes the bench in the actor."""
        self._remote = RemoteObject(job, make_bench, stopped)

    def start(self, rows: Sequence[SampleRow], limits: Sequence[RowLimit], tick: Tick) -> Replica:
        """See Bench. Raises what RemoteObject raises."""
        self._remote.start(tick)
        found: Replica = self._remote.call("start", rows, limits, tick=tick)
        return found

    def measure(self, task: Task, tick: Tick) -> Run:
        """See Bench. Raises what RemoteObject.call raises."""
        run: Run = self._remote.call("measure", task, tick=tick)
        return run

    def close(self) -> None:
        """See Bench. Also shuts down the Ray cluster if this bench started it."""
        self._remote.close()


class RayGenerator:
    """A pipeline.preview.generator.Generator that generates rows on one replica in a Ray actor.

    If a tick raises, the actor's call still runs, so only `close` may follow.
    """

    def __init__(
        self, job: Job, make_generator: Callable[[Job], Generator], stopped: Callable[[], bool] = lambda: False
    ) -> None:
        """Connect to Ray, as RemoteObject does. `make_generator` makes the generator in the actor."""
        self._remote = RemoteObject(job, make_generator, stopped)

    def start(self, tick: Tick) -> str:
        """See Generator. Raises what RemoteObject raises."""
        self._remote.start(tick)
        checked: str = self._remote.call("start", tick=tick)
        return checked

    def generate(self, requests: Sequence[Request], tick: Tick) -> Sequence[Completion]:
        """See Generator. Raises what RemoteObject.call raises."""
        completions: Sequence[Completion] = self._remote.call("generate", requests, tick=tick)
        return completions

    def close(self) -> None:
        """See Generator. Also shuts down the Ray cluster if this generator started it."""
        self._remote.close()
