"""`clean OUTPUT`: removes what runs that died left behind, and nothing that holds rows of the output."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from pipeline.core.errors import StorageError
from pipeline.maintenance.inventory import Inventory, list_inventory
from pipeline.output.layout import PROBE, SUCCESS
from pipeline.output.ledger import Ledger
from pipeline.output.records import NotOursError, PlanRecord
from pipeline.output.segments import read_record
from pipeline.storage.storage import FileInfo, Storage

THREADS = 16
TEMPORARY_AGE_S = 3600.0
"""A temporary file that is younger may be one that is being written, where the job is not complete."""


@dataclass(frozen=True, slots=True)
class Leftover:
    """Files of one kind that may go."""

    what: str
    files: tuple[FileInfo, ...]

    def line(self) -> str:
        """`3 segments of finished units, 1,234 bytes: _job/segments/… and 2 more`."""
        more = f" and {len(self.files) - 1:,} more" if len(self.files) > 1 else ""
        size = sum(file.size for file in self.files)
        return f"{len(self.files):,} {self.what}, {size:,} bytes: {self.files[0].name}{more}"


def find_leftovers(output_path: str, clock: Callable[[], float] = time.time) -> list[Leftover]:
    """What `clean` would remove. Raises OutputError where the folder is no job's output, StorageError."""
    ledger, storage = Ledger(output_path), Storage(output_path)
    ledger.read_plan()  # refuses a folder that is none of ours
    inventory = list_inventory(storage)
    # after the listing: a run that takes more files meanwhile has planned those of its segments
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
    """Removes them. Raises StorageError where that fails; what is gone already is no failure."""
    storage = Storage(output_path)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(storage.remove, [file.name for leftover in leftovers for file in leftover.files]))


def _foreign(storage: Storage, segments: Sequence[FileInfo], plan: PlanRecord) -> Iterator[FileInfo]:
    """Those of another job or of another version of their input file; a run would not use them.

    One that cannot be read is left: a run ignores it, and removes it when its unit is done.
    """

    def is_foreign(segment: FileInfo) -> bool:
        try:
            with storage.open(segment.name, segment.size) as source:
                record, _ = read_record(source)
        except (NotOursError, StorageError):  # StorageError: its unit was finished meanwhile, and it is gone
            return False
        digest, version = plan.fingerprint.digest, plan.files.get(record.file, (None, None))[:2]
        return (record.fingerprint, (record.size, record.stamp)) != (digest, version)

    with ThreadPoolExecutor(THREADS) as pool:
        for segment, foreign in zip(segments, pool.map(is_foreign, segments), strict=True):
            if foreign:
                yield segment


def _abandoned(inventory: Inventory, now: float) -> Iterator[FileInfo]:
    complete = any(file.name == SUCCESS for file in inventory.own)
    for file in inventory.temporary:
        if complete or file.name == PROBE:
            yield file
            continue
        with suppress(ValueError):  # a stamp that is no time: no local file, and there nothing is written in two steps
            if now - float(file.stamp.removeprefix("mtime:")) > TEMPORARY_AGE_S:
                yield file
