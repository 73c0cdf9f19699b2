"""Removes files that dead runs left in an output folder (`clean OUTPUT`), but no file whose rows are still needed."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from pipeline.core.errors import StorageError
from pipeline.core.text import counted
from pipeline.maintenance.inventory import Inventory, list_inventory
from pipeline.maintenance.planned_units import PlannedUnits
from pipeline.output.job_records import PlanRecord
from pipeline.output.layout import PROBE, SUCCESS
from pipeline.output.ledger import Ledger
from pipeline.output.records import NotOursError
from pipeline.output.segments import read_record
from pipeline.storage.storage import FileInfo, Storage

THREADS = 16
TEMPORARY_AGE_S = 3600.0
"""Age in seconds above which a temporary file is removed although the job is not complete. A younger file may be one
that is being written."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """The files of one kind that may be removed; at least one."""

    what: str
    """The kind in the plural, such as `temporary files`."""
    files: tuple[FileInfo, ...]

    def line(self) -> str:
        """Return text such as `segments of finished units (3 files, 1,234 bytes): _job/segments/… and 2 more`."""
        more = f" and {len(self.files) - 1:,} more" if len(self.files) > 1 else ""
        size = sum(file.size for file in self.files)
        return f"{self.what} ({counted(len(self.files), 'file')}, {size:,} bytes): {self.files[0].name}{more}"


def find_leftovers(output_path: str, clock: Callable[[], float] = time.time) -> list[Leftover]:
    """Return the files that `clean` removes, by kind; kinds without a file are left out. Removes nothing.

    Raises OutputError if the folder is not a job's output, StorageError if the storage fails.
    """
    ledger, storage = Ledger(output_path), Storage(output_path)
    ledger.read_plan()  # raises if the folder is not a job's output
    inventory = list_inventory(storage)
    # Read the plan again after the listing: if a run has added input files to the job, their segments are not foreign.
    plan = ledger.read_plan()
    finished = inventory.part_units
    others = [file for unit in inventory.segments.keys() - finished for file in inventory.segments[unit]]
    found = {
        "segments of finished units": [file for unit in finished for file in inventory.segments.get(unit, ())],
        "segments of another job": list(_foreign(storage, others, plan)),
        "temporary files": list(_abandoned(inventory, clock())),
        "driver claims": [file for number, file in inventory.drivers.items() if number < max(inventory.drivers)],
    }
    return [Leftover(what, tuple(sorted(files, key=lambda file: file.name))) for what, files in found.items() if files]


def remove_leftovers(output_path: str, leftovers: Sequence[Leftover]) -> None:
    """Remove these files. Raises StorageError if that fails; a file that is already gone is no failure."""
    storage = Storage(output_path)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(storage.remove, [file.name for leftover in leftovers for file in leftover.files]))


def _foreign(storage: Storage, segments: Sequence[FileInfo], plan: PlanRecord) -> Iterator[FileInfo]:
    """Yield those of the segments that no run of this job would use: they are of another job, of other rows than the
    plan's unit, or of another version of an input file.

    A segment that cannot be read is not among them: a run ignores it and removes it when its unit is finished.
    """
    units = PlannedUnits(plan)

    def is_foreign(segment: FileInfo) -> bool:
        try:
            with storage.open(segment.name, segment.size) as source:
                record, _ = read_record(source)
        except (NotOursError, StorageError):  # StorageError: the segment is gone, because its unit was finished
            return False
        unit = units.find(record)
        return record.fingerprint != plan.fingerprint.digest or unit is None or record.difference(unit) is not None

    with ThreadPoolExecutor(THREADS) as pool:
        for segment, foreign in zip(segments, pool.map(is_foreign, segments), strict=True):
            if foreign:
                yield segment


def _abandoned(inventory: Inventory, now: float) -> Iterator[FileInfo]:
    """Yield the temporary files that nobody is writing any more: all if the job is complete, else those older than
    TEMPORARY_AGE_S and the file of the write check (layout.PROBE). `now`: seconds since 1970."""
    complete = any(file.name == SUCCESS for file in inventory.own)
    for file in inventory.temporary:
        if complete or file.name == PROBE:
            yield file
            continue
        # ValueError: the stamp is not a time, so the file is not local, and only local writing makes temporary files.
        with suppress(ValueError):
            if now - float(file.stamp.removeprefix("mtime:")) > TEMPORARY_AGE_S:
                yield file
