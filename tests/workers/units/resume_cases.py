"""Provides a store that is watched and fails on demand, and other helpers for the tests of interrupted units."""

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.core.errors import StorageError
from pipeline.core.types import Assignment, UnitResult, WorkUnit
from pipeline.output.segments import SegmentRows
from pipeline.output.unit_store import UnitStore
from tests.waiting import PATIENCE_S
from tests.workers.fakes import TOO_LONG, FakeEngine, make_runner, work_all
from tests.workers.jobs import SmallJob, prompts_of
from workers.units.runner import UnitRunner

NEVER: dict[str, Any] = {"flush": {"seconds": 3600.0}}
EACH_ROW: dict[str, Any] = {"flush": {"seconds": 3600.0, "rows": 1}}
SAME = ("id", "completion", "finish_reason", "error", "prompt_tokens", "completion_tokens", "denoiser_forwards")


class WatchedStore(UnitStore):
    """A store that knows which rows were in segments when a unit was opened, and that fails as often as it is told."""

    def __init__(self, small: SmallJob, replica: str = "r0") -> None:
        super().__init__(small.job, small.plan.fingerprint.digest, small.plan.schema, small.plan.prompts, replica)
        self.held: set[str] = set()
        self.refuse_segments = self.refuse_parts = 0
        self.answers_lost = False
        """Whether a part that is refused is written all the same."""
        self.tried = Counter[str]()

    def read_segments(self, unit: WorkUnit) -> SegmentRows:
        found = super().read_segments(unit)
        self.held |= {f"{row['source_file']}#{row['source_row']}" for row in found.table.to_pylist()}
        return found

    def write_segment(self, unit: WorkUnit, rows: pa.Table, **of_attempt: Any) -> None:
        self.tried["segment"] += 1
        if self.refuse_segments:
            self.refuse_segments -= 1
            raise StorageError("cannot create it: no route to the store")
        super().write_segment(unit, rows, **of_attempt)

    def publish(self, unit: WorkUnit, part: bytes) -> UnitResult:
        self.tried["part"] += 1
        if self.refuse_parts:
            self.refuse_parts -= 1
            if self.answers_lost:
                super().publish(unit, part)
            raise StorageError("cannot create it: no route to the store")
        return super().publish(unit, part)


def same(rows: list[dict[str, Any]]) -> list[list[Any]]:
    return [[row[name] for name in SAME] for row in rows]


def segments_of(small: SmallJob) -> list[Path]:
    return sorted(Path(small.job.output.path).glob("_job/segments/*/*"))


def work_until(runner: UnitRunner, met: Callable[[], object]) -> list[Any]:
    """Work until `met` returns true, for PATIENCE_S seconds at most. Return the outcomes of units meanwhile."""
    deadline = time.monotonic() + PATIENCE_S
    outcomes: list[Any] = []
    while not met():
        assert time.monotonic() < deadline, f"{runner.doing()}; ended: {outcomes}"
        outcomes += runner.work(0.01)
    return outcomes


def with_bad_rows(count: int) -> list[str | None]:
    prompts: list[str | None] = [*prompts_of(count)]
    prompts[2], prompts[count // 2], prompts[count - 1] = None, "y" * (TOO_LONG + 1), " "
    return prompts


def work_units(small: SmallJob, engine: FakeEngine) -> list[Any]:
    runner = make_runner(small, engine)
    for unit in small.plan.units:
        runner.add(Assignment(unit))
    return work_all(runner)
