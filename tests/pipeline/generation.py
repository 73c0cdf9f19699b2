"""Runs what is left of a job in this process with a made-up engine, and says which rows the engine generated."""

import threading
from collections.abc import Callable, Iterator

from pipeline.config.job import Job
from pipeline.driver.run import Outcome, run_job
from pipeline.planning.plan import Plan
from tests.workers.fakes import FakeEngine, FakeMaker
from workers.replica.build import ReplicaSpec
from workers.replica.local_pool import LocalPool


class _Maker(FakeMaker):
    """A maker that keeps its engines."""

    def __init__(self, spec: ReplicaSpec) -> None:
        super().__init__(spec)
        self.engines: list[FakeEngine] = []

    def make_engine(self, replica: str) -> FakeEngine:
        """See FakeMaker."""
        self.engines.append(super().make_engine(replica))
        return self.engines[-1]

    def submitted(self) -> Iterator[str]:
        """Yield the keys of all rows that were submitted to the engines. An engine remembers the last 1,000."""
        for engine in self.engines:
            yield from engine.order


def generate(job: Job) -> tuple[Outcome, list[str]]:
    """Run what is left of the job. Return the outcome and the sorted keys of the rows that were generated.

    Raises what run_job raises.
    """
    makers: list[_Maker] = []

    def make_pool(plan: Plan, _units: int, _tell: Callable[[str], None]) -> LocalPool:
        makers.append(_Maker(ReplicaSpec(job, plan.fingerprint.digest, plan.schema, plan.prompts)))
        return LocalPool(makers[-1])

    outcome = run_job(job, make_pool, threading.Event())
    return outcome, sorted(key for maker in makers for key in maker.submitted())
