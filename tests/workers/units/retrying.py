"""Makes runners that generate degenerate rows again, and lets them work until all units are done."""

from typing import Any

from model.requests import GenerationParams
from pipeline.core.types import Assignment
from tests.workers.fakes import FakeEncoder, work_all
from tests.workers.jobs import SmallJob
from workers.units.protocols import EngineLike
from workers.units.runner import UnitRunner


def runner_of(
    small: SmallJob, engine: EngineLike, params: GenerationParams, encoder: Any = None, retry: bool = True
) -> UnitRunner:
    return UnitRunner(
        engine,
        encoder or FakeEncoder(),
        small.spec.open_store("r0"),
        params,
        replica="r0",
        flush=small.job.flush,
        retry_degenerate=retry,
    )


def run_units(small: SmallJob, runner: UnitRunner, attempt: int = 1) -> list[dict[str, Any]]:
    for unit in small.plan.units:
        runner.add(Assignment(unit, attempt))
    work_all(runner)
    return small.rows()
