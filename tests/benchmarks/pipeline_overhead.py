"""Measures where a replica's time goes: the demo runs with `builtin:tiny` in this process, else like a real job."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from model.requests import Completion, Request
from pipeline.config.loader import load_job
from pipeline.driver.run import run_job
from pipeline.planning.plan import Plan
from tests.benchmarks.pipeline_results import Overhead
from workers.replica.build import ReplicaSpec, make_runner
from workers.replica.local_pool import LocalPool
from workers.units.protocols import EngineLike
from workers.units.runner import UnitRunner


class TimedEngine:
    """An engine whose steps are timed: (wall clock, processor) in seconds."""

    def __init__(self, engine: EngineLike) -> None:
        self._engine = engine
        self.began = _now()
        self.inside = 0.0, 0.0

    @property
    def waiting(self) -> int:
        """See EngineLike."""
        return self._engine.waiting

    @property
    def max_rows(self) -> int:
        """See EngineLike."""
        return self._engine.max_rows

    def submit(self, request: Request) -> None:
        """See EngineLike."""
        self._engine.submit(request)

    def step(self) -> Sequence[Completion]:
        """See EngineLike."""
        began = _now()
        try:
            return self._engine.step()
        finally:
            ended = _now()
            self.inside = self.inside[0] + ended[0] - began[0], self.inside[1] + ended[1] - began[1]


def measure_overhead(folder: Path, job_file: str = "jobs/demo.yaml", overrides: Sequence[str] = ()) -> Overhead:
    """Run the job with one replica in this process, with its output in `folder`."""
    job = load_job(job_file, [f"output.path={folder / 'overhead'}", *overrides])
    engines: list[TimedEngine] = []
    ended: list[tuple[float, float]] = []

    def make(spec: ReplicaSpec, replica: str) -> UnitRunner:
        runner = make_runner(spec, replica)
        engines.append(TimedEngine(runner._engine))
        runner._engine = engines[-1]
        return runner

    class Pool(LocalPool):
        def close(self) -> None:
            ended.append(_now())
            super().close()

    def make_pool(plan: Plan, _units: int, _tell: Callable[[str], None]) -> LocalPool:
        spec = ReplicaSpec(job, plan.fingerprint.digest, plan.schema, plan.prompts)
        return Pool(lambda replica: make(spec, replica))

    # Imports pandas if it is installed, as it is for tests. Later the import would count as part of a replica's start.
    pa.array([])
    run_job(job, make_pool, threading.Event())
    (wall, processor), engine = ended[0], engines[0]
    return Overhead(
        1 - engine.inside[0] / (wall - engine.began[0]), 1 - engine.inside[1] / (processor - engine.began[1])
    )


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.thread_time()
