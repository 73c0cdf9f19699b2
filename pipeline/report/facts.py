"""What a report says of a job as a whole: its plan, the footers of its parts, its manifest. No row is read."""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline.core.types import Totals
from pipeline.monitoring.live import Live, read_live
from pipeline.output.layout import PARTS, part_name
from pipeline.output.ledger import Ledger
from pipeline.output.records import NotOursError, PartRecord, PlanRecord, read_part
from pipeline.storage.storage import FileInfo, Storage

THREADS = 16


@dataclass(frozen=True, slots=True)
class Unit:
    """A published unit."""

    part: FileInfo
    id: str
    file: str
    first_row: int
    totals: Totals
    replica: str
    attempt: int
    seconds: float
    """From its start on the replica that published it; rows that earlier attempts had finished are among its rows."""
    ended: float | None
    """When it was published, seconds since 1970; None in a part of an earlier version."""

    @property
    def place(self) -> str:
        """The replica without the number of its process: r3 for r3.2, which replaced r3."""
        return self.replica.partition(".")[0]

    @property
    def tokens_per_s(self) -> float | None:
        """Completion tokens a second."""
        return self.totals.completion_tokens / self.seconds if self.seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Facts:
    """A job, finished or not."""

    plan: PlanRecord
    units: tuple[Unit, ...]
    totals: Totals
    complete: bool
    finished: str | None
    """ISO 8601 in UTC; None where it is not complete or has no manifest."""
    warnings: tuple[str, ...]
    strange_parts: int
    """Files under a part's name that are broken or another job's."""
    live: Live | None
    """What the driver of the last run said last; None where there is none of this version."""

    @property
    def name(self) -> str:
        """Of the job."""
        return str(self.plan.job.get("name") or "job")

    def setting(self, section: str, name: str) -> Any:
        """One setting of the job as plan.json has it; None where it has none."""
        found = self.plan.job.get(section)
        return found.get(name) if isinstance(found, Mapping) else None


def read_facts(output_path: str) -> Facts:
    """Reads the footer of each part: one request each. Raises OutputError where the folder is no job's output,
    StorageError."""
    ledger, storage = Ledger(output_path), Storage(output_path)
    plan = ledger.read_plan()
    parts = storage.list_files("", PARTS)
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(_reader(storage, plan.fingerprint.digest), parts)
        units = tuple(unit for unit in found if unit is not None)
    totals = sum((unit.totals for unit in units), Totals())
    complete = (totals.rows, len(units)) == (plan.rows, plan.units) and ledger.is_complete()
    return Facts(
        plan,
        units,
        totals,
        complete,
        finished=ledger.finished_at() if complete else None,
        warnings=ledger.warnings() if complete else (),
        strange_parts=len(parts) - len(units),
        live=read_live(storage, plan.fingerprint.digest),
    )


def _reader(storage: Storage, digest: str) -> Callable[[FileInfo], Unit | None]:
    def read(part: FileInfo) -> Unit | None:
        with suppress(NotOursError), storage.open(part.name, part.size) as source:
            record, totals = read_part(source)
            if (part_name(record.unit), record.fingerprint) == (part.name, digest):
                return _unit(part, record, totals)
        return None

    return read


def _unit(part: FileInfo, record: PartRecord, totals: Totals) -> Unit:
    ended = None
    with suppress(ValueError, OverflowError):
        ended = datetime.fromisoformat(record.published).timestamp()
    return Unit(
        part,
        record.unit,
        record.file,
        record.first_row,
        totals,
        record.replica,
        record.attempt,
        max(0.0, record.seconds) if math.isfinite(record.seconds) else 0.0,
        ended,
    )
