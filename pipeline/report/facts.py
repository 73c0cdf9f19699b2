"""Reads the facts about a whole job from its plan, the footers of its parts and its manifest, without reading rows."""

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
from pipeline.output.records import ManifestRecord, NotOursError, PartRecord, PlanRecord, read_part
from pipeline.storage.storage import FileInfo, Storage

THREADS = 16


@dataclass(frozen=True, slots=True)
class Unit:
    """A work unit whose part is published."""

    part: FileInfo
    id: str
    file: str
    first_row: int
    totals: Totals
    replica: str
    attempt: int
    seconds: float
    """Seconds that the unit took on the replica that published it. The totals also count rows that earlier attempts had
    finished."""
    ended: float | None
    """Time at which it was published, in seconds since 1970; None if the part does not say, as in earlier versions."""

    @property
    def place(self) -> str:
        """Return the replica's name without the number of its process: r3 for r3.2, which replaced r3."""
        return self.replica.partition(".")[0]

    @property
    def tokens_per_s(self) -> float | None:
        """Return the completion tokens per second, or None if the seconds are 0."""
        return self.totals.completion_tokens / self.seconds if self.seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts about a job, which may be finished or not."""

    plan: PlanRecord
    units: tuple[Unit, ...]
    totals: Totals
    complete: bool
    finished: str | None
    """Time of completion, ISO 8601 in UTC; None if the job is not complete or its manifest cannot be read."""
    warnings: tuple[str, ...]
    strange_parts: int
    """Number of files with a part's name that are broken or belong to another job."""
    live: Live | None
    """The last state that the driver of the last run wrote; None if there is none or this version cannot read it."""

    @property
    def name(self) -> str:
        """Return the name of the job, or `job` if it has none."""
        return str(self.plan.job.get("name") or "job")

    def setting(self, section: str, name: str) -> Any:
        """Return one setting of the job from plan.json, or None if it is not there."""
        found = self.plan.job.get(section)
        return found.get(name) if isinstance(found, Mapping) else None


def read_facts(output_path: str) -> Facts:
    """Read the facts about the job, with one request for the footer of each part.

    Raises OutputError if the folder is not a job's output, StorageError if the storage fails.
    """
    ledger, storage = Ledger(output_path), Storage(output_path)
    plan = ledger.read_plan()
    parts = storage.list_files("", PARTS)
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(_reader(storage, plan.fingerprint.digest), parts)
        units = tuple(unit for unit in found if unit is not None)
    totals = sum((unit.totals for unit in units), Totals())
    complete = (totals.rows, len(units)) == (plan.rows, plan.units) and ledger.is_complete()
    manifest = ledger.read_manifest() if complete else ManifestRecord()
    return Facts(
        plan,
        units,
        totals,
        complete,
        finished=manifest.finished,
        warnings=manifest.warnings,
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
