"""Reads the facts about a whole job from its plan, the footers of its parts, its manifest and `live.json`.

No row is read.
"""

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline.core.types import Totals
from pipeline.monitoring.live import Live, read_live
from pipeline.output.job_records import ManifestRecord, PlanRecord
from pipeline.output.layout import PARTS, part_name
from pipeline.output.ledger import Ledger
from pipeline.output.records import NotOursError, PartRecord, read_part
from pipeline.storage.storage import FileInfo, Storage

THREADS = 16
"""Number of footers that are read at the same time."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A work unit whose part is published, as the footer of the part describes it."""

    part: FileInfo
    id: str
    file: str
    """Path of the input file of the unit's first row, relative to the input root."""
    first_row: int
    """Number of the unit's first row in that file, from 0."""
    files: int
    """Number of input files with rows of the unit."""
    totals: Totals
    replica: str
    """Name of the replica that published the part."""
    attempt: int
    """Number of the attempt that published the part, from 1."""
    seconds: float
    """Seconds from when the replica that published the part had read the unit until the publication; 0 if the part has
    no valid number. `totals` also counts the rows that earlier attempts had saved."""
    ended: float | None
    """Time of the publication, in seconds since 1970; None if the part does not say, as in earlier versions."""

    @property
    def place(self) -> str:
        """Return the name of the replica without the number of its process: `r3` for `r3.2`, which replaced `r3`."""
        return self.replica.partition(".")[0]

    @property
    def tokens_per_s(self) -> float | None:
        """Return the completion tokens of all rows of the unit divided by `seconds`, or None if `seconds` is 0."""
        return self.totals.completion_tokens / self.seconds if self.seconds > 0 else None


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts about a job that need no reading of rows; the job may be finished or not."""

    plan: PlanRecord
    units: tuple[Unit, ...]
    """The units whose parts are published, in the order of the names of the parts."""
    totals: Totals
    """The sums over these units."""
    complete: bool
    """Whether all rows and units of the plan are in parts, and `_SUCCESS` and a manifest of this plan exist."""
    finished: str | None
    """Time of completion, ISO 8601 in UTC; None if the job is not complete or its manifest cannot be read."""
    warnings: tuple[str, ...]
    """Warnings in the manifest; empty if the job is not complete."""
    strange_parts: int
    """Number of files that have the name of a part but are broken or belong to another job; `units` leaves them out."""
    live: Live | None
    """The last state that the driver of the last run wrote to `live.json`; None if there is none, if it belongs to
    another job, or if this version cannot read it."""

    @property
    def name(self) -> str:
        """Return the name of the job in its plan, or `job` if the plan has none."""
        return str(self.plan.job.get("name") or "job")

    def setting(self, section: str, name: str) -> Any:
        """Return the setting `section.name` of the job from plan.json, or None if it is not there."""
        found = self.plan.job.get(section)
        return found.get(name) if isinstance(found, Mapping) else None


def read_facts(output_path: str) -> Facts:
    """Return the facts about the job with this output. Only the footer of each part is read, by THREADS threads.

    Raises OutputError if the folder is not a job's output, StorageError if the storage fails.
    """
    ledger, storage = Ledger(output_path), Storage(output_path)
    plan = ledger.read_plan()
    parts = [part for part in storage.list_files("", PARTS) if part.size]
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(_reader(storage, plan.fingerprint.digest), parts)
        units = tuple(unit for unit in found if unit is not None)
    totals = sum((unit.totals for unit in units), Totals())
    complete = (totals.rows, len(units)) == (plan.rows, plan.units) and ledger.is_complete()
    manifest = ledger.read_manifest() if complete else ManifestRecord()
    complete = complete and manifest.agrees(plan.fingerprint.digest, plan.rows, plan.units)
    return Facts(
        plan,
        units,
        totals,
        complete,
        finished=manifest.finished if complete else None,
        warnings=manifest.warnings if complete else (),
        strange_parts=len(parts) - len(units),
        live=read_live(storage, plan.fingerprint.digest),
    )


def _reader(storage: Storage, digest: str) -> Callable[[FileInfo], Unit | None]:
    """Return a function that reads the unit of a part. It returns None if the part is broken or of another job."""

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
        record.pieces[0].file,
        record.pieces[0].first_row,
        len(record.pieces),
        totals,
        record.replica,
        record.attempt,
        max(0.0, record.seconds) if math.isfinite(record.seconds) else 0.0,
        ended,
    )
