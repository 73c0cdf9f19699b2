"""`verify OUTPUT`: whether an output folder holds every input row once, as it was made. Needs that folder alone.

Each part is fetched once and checked in a thread; the memory is bounded by part_check.HELD_BYTES and, where the job has
its own ids, by 8 bytes an id of the parts being checked. 2,000 parts with 10 million rows, 1.1 GB: 9 s and 230 MiB on
two cores that had other work, 24 s from SeaweedFS on the same machine (tests/benchmarks/resume.py).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.core.types import Totals
from pipeline.maintenance.inventory import Inventory, list_inventory
from pipeline.maintenance.part_check import CheckedPart, PartChecker
from pipeline.output.duplicate_ids import IdCounter
from pipeline.output.layout import MANIFEST, SUCCESS, part_name, record_name
from pipeline.output.ledger import Ledger
from pipeline.output.records import ADDED_LATER, NotOursError, PlanRecord, from_json
from pipeline.storage.scratch import scratch
from pipeline.storage.storage import Storage

THREADS = 8
ProgressHook = Callable[[int, int], None]
"""Called after each part with (parts checked, parts)."""


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found in an output folder."""

    problems: tuple[str, ...]
    """What is wrong, which file it is and what to do, a line each; none: all is as it must be."""
    totals: Totals
    """Counted from the rows of the parts."""
    parts: int
    part_bytes: int

    def summary(self) -> str:
        """One line, for an output without problems."""
        totals = self.totals
        return (
            f"verified: {totals.rows:,} rows in {self.parts:,} parts ({self.part_bytes:,} bytes), each input row once; "
            f"{totals.ok:,} ok, {totals.errors:,} errors, {totals.duplicate_ids:,} duplicate ids"
        )


def verify(output_path: str, progress: ProgressHook = lambda _done, _all: None) -> Verification:
    """Checks all of an output folder.

    Raises OutputError where it is no job's output or its plan cannot be read, StorageError.
    """
    plan = Ledger(output_path).read_plan()
    storage = Storage(output_path)
    inventory = list_inventory(storage)
    own_ids = plan.fingerprint.fields.get("input.id_column") is not None
    with ExitStack() as closing:
        ids = IdCounter(closing.enter_context(scratch()), plan.rows) if own_ids else None
        checker = PartChecker(storage, plan, set(inventory.records), ids)
        parts = []
        with ThreadPoolExecutor(THREADS) as pool:
            for part in pool.map(checker.check, inventory.parts):
                parts.append(part)
                progress(len(parts), len(inventory.parts))
        duplicates = ids.count()[0] if ids is not None else 0
    counted = sum((part.totals for part in parts), Totals())
    totals = Totals(**{**asdict(counted), "duplicate_ids": duplicates})  # the parts' own count those within each
    problems = [text for part in parts for text in part.problems]
    missing = list(_check_cover(plan, inventory, parts))
    problems += missing
    if not problems:  # else the sums say nothing new
        problems += _check_end(storage, plan, inventory, totals)
    problems += _check_leftovers(inventory, complete=not missing)
    size = sum(part.size for part in inventory.parts)
    return Verification(tuple(problems), totals, len(parts), size)


def _check_cover(plan: PlanRecord, inventory: Inventory, parts: Sequence[CheckedPart]) -> Iterator[str]:
    """Whether the parts' rows are those of the input files, each once."""
    ranges: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for checked in parts:
        record = checked.record
        if record is not None and record.file in plan.files and checked.name == part_name(record.unit):
            ranges[record.file].append((record.first_row, record.rows, checked.name))
    gaps = []
    for name, (_, _, rows) in plan.files.items():
        end, before = 0, ""
        for first, count, part in sorted(ranges[name]):
            if first > end:
                gaps.append(f"{name}, rows {end} to {first - 1}")
            elif first < end:
                yield f"{before} and {part} both hold row {first} of {name}: delete both and submit the job again"
            end, before = max(end, first + count), part
        if end < rows:
            gaps.append(f"{name}, rows {end} to {rows - 1}")
    there = len(inventory.part_units)
    if gaps and (there < plan.units or all(checked.record is not None for checked in parts)):
        said = f"{plan.units - there} of {plan.units} units have no part" if there < plan.units else "rows have no part"
        claimed = f", though {SUCCESS} is there" if _has(inventory, SUCCESS) else ""
        yield f"not complete{claimed}: {said}, such as {gaps[0]}; submit the job again"


def _check_end(storage: Storage, plan: PlanRecord, inventory: Inventory, totals: Totals) -> Iterator[str]:
    """The manifest and `_SUCCESS` of a job whose parts are all there."""
    if len(inventory.parts) != plan.units:
        yield f"the plan has {plan.units} units, and its rows stand in {len(inventory.parts)} parts: use another folder"
    if not _has(inventory, SUCCESS):
        yield f"{SUCCESS} is missing: the job did not end well; submit it again, and it ends or says why not"
    if not _has(inventory, MANIFEST):
        yield f"{MANIFEST} is missing: submit the job again to have it written"
        return
    try:
        said = {**ADDED_LATER, **from_json(storage.read(MANIFEST))}
    except NotOursError as error:
        yield f"{MANIFEST} is damaged: {error}; delete it and submit the job again"
        return
    expected: dict[str, Any] = {
        **asdict(totals),
        "units": plan.units,
        "files": len(plan.files),
        "fingerprint": plan.fingerprint.digest,
    }
    for name, value in expected.items():
        if said.get(name) != value:
            yield f"{MANIFEST} says {name} {said.get(name)!r}, it is {value!r}: delete it and submit the job again"


def _check_leftovers(inventory: Inventory, *, complete: bool) -> Iterator[str]:
    """What does not belong in the folder, or not any more."""
    units = inventory.part_units
    for file in inventory.strange:
        yield f"{file.name} is not of this project: move it away, readers of the folder may take it for output"
    for unit in sorted(inventory.records.keys() - units) if complete else ():
        yield f"{record_name(unit)} is the record of a part that is not there: delete it"
    left = {unit: files for unit, files in inventory.segments.items() if unit in units or complete}
    if left:
        example = next(iter(left.values()))[0].name
        count = sum(map(len, left.values()))
        yield f"{count} segment(s) of finished units, such as {example}: remove them with `clean`"
    for file in inventory.temporary:
        yield f"{file.name} was left by a writer that died, or is being written: remove it with `clean`"


def _has(inventory: Inventory, name: str) -> bool:
    return any(file.name == name for file in inventory.own)
