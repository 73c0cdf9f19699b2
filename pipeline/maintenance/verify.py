"""Checks that an output folder holds every input row once and undamaged (`verify OUTPUT`), from that folder alone.

Several parts are checked at a time, each in a thread. The memory is bounded by part_check.HELD_BYTES and, if the ids
come from a column of the input, by 8 bytes for each id of the parts that are being checked.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.core.error_kinds import without_numbers
from pipeline.core.text import counted
from pipeline.core.types import Totals
from pipeline.maintenance.inventory import Inventory, list_inventory
from pipeline.maintenance.part_check import CheckedPart, PartChecker
from pipeline.output.duplicate_ids import IdCounter
from pipeline.output.job_records import PlanRecord
from pipeline.output.layout import MANIFEST, SET_ASIDE, SUCCESS, record_name
from pipeline.output.ledger import Ledger
from pipeline.output.records import NotOursError, from_json
from pipeline.storage.scratch import scratch
from pipeline.storage.storage import Storage

THREADS = 8
ProgressHook = Callable[[int, int], None]
"""A function that is called after each part with (number of parts checked, number of all parts)."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong with an output folder."""

    text: str
    """One line: what is wrong, in which file, and what to do."""
    kind: str
    """The same for findings that differ only in names and numbers, so that only some of them need to be shown."""
    leftover: bool = False
    """Whether it is only that files are in the folder which do not belong there. All rows are right nevertheless."""
    files: int = 1
    """Number of files that it is about."""


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of checking an output folder."""

    findings: tuple[Finding, ...]
    """Everything that is wrong. Empty if the output is sound."""
    totals: Totals
    """The totals, counted from the rows of the parts."""
    parts: int
    """Number of parts that were checked."""
    part_bytes: int
    """Size of all parts."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Return the text of each finding."""
        return tuple(finding.text for finding in self.findings)

    @property
    def wrong(self) -> int:
        """Return the number of findings about rows, parts, records, the manifest or what is missing: all but
        leftovers."""
        return sum(not finding.leftover for finding in self.findings)

    @property
    def leftovers(self) -> int:
        """Return the number of files that do not belong in the folder, or no longer do."""
        return sum(finding.files for finding in self.findings if finding.leftover)

    def lines(self, most: int | None = None) -> Iterator[str]:
        """Yield the texts by kind, at most `most` of each kind (None: all), and then how many more there are."""
        kinds: dict[str, list[Finding]] = defaultdict(list)
        for finding in self.findings:
            kinds[finding.kind].append(finding)
        for found in kinds.values():
            yield from (finding.text for finding in found[:most])
            if more := len(found[most:]) if most is not None else 0:
                yield f"… and {more:,} more like {'these' if most != 1 else 'this'}"

    def summary(self) -> str:
        """Return one line that describes an output whose rows are right."""
        totals = self.totals
        return (
            f"verified: {counted(totals.rows, 'row')} in {counted(self.parts, 'part')} ({self.part_bytes:,} bytes), "
            f"each input row once; {totals.ok:,} ok, {counted(totals.errors, 'error')}, "
            f"{counted(totals.duplicate_ids, 'duplicate id')}"
        )


def verify(output_path: str, progress: ProgressHook = lambda _done, _all: None) -> Verification:
    """Check all files of an output folder and whether they agree with each other. `progress` is called after each part.

    Problems are in the result; they raise nothing. Raises OutputError if the folder is not a job's output or its plan
    cannot be read, StorageError if the storage fails.
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
    summed = sum((part.totals for part in parts), Totals())
    totals = Totals(**{**asdict(summed), "duplicate_ids": duplicates})  # each part counts only its own duplicates
    problems = [text for part in parts for text in part.problems]
    missing = list(_check_cover(plan, inventory, parts))
    problems += missing
    if not problems:  # with other problems the totals differ anyway
        problems += _check_end(storage, plan, inventory, totals)
    findings = [Finding(text, _kind(text)) for text in problems]
    findings += _check_leftovers(inventory, complete=not missing)
    size = sum(part.size for part in inventory.parts)
    return Verification(tuple(findings), totals, len(parts), size)


def _kind(text: str) -> str:
    """Return the kind of a problem: the three words after the name of the file, which every text begins with."""
    return " ".join(without_numbers(text).split()[1:4])


def _check_cover(plan: PlanRecord, inventory: Inventory, parts: Sequence[CheckedPart]) -> Iterator[str]:
    """Yield a problem for each two parts of the plan with the same row, and one if rows of the input files are in no
    part."""
    ranges: dict[str, list[tuple[int, int, str, bool]]] = defaultdict(list)
    for checked in parts:
        for span in checked.spans or ():
            ranges[span.file].append((span.first_row, span.rows, checked.name, checked.planned))
    gaps: list[str] = []
    doubled: set[tuple[str, str]] = set()
    for name, (_, _, rows) in plan.listing.items():
        end = end_planned = 0
        before = ""
        for first, count, part, planned in sorted(ranges.get(name, ())):
            if first > end:
                gaps.append(f"{name}, rows {end} to {first - 1}")
            end = max(end, first + count)
            if not planned:  # it is to be moved away in any case, but not the good part that has the same rows
                continue
            if first < end_planned and (before, part) not in doubled:
                doubled.add((before, part))
                yield f"{before} and {part} both hold row {first} of {name}: move both away and submit the job again"
            end_planned, before = max(end_planned, first + count), part
        if end < rows:
            gaps.append(f"{name}, rows {end} to {rows - 1}")
    there = len(inventory.part_units)
    if gaps and (there < plan.units or all(checked.spans is not None for checked in parts)):
        said = f"{plan.units - there} of {plan.units} units have no part" if there < plan.units else "rows have no part"
        claimed = f", though {SUCCESS} is there" if _has(inventory, SUCCESS) else ""
        unread = f"; {SET_ASIDE} names rows that the last run could not read" if _has(inventory, SET_ASIDE) else ""
        yield f"not complete{claimed}: {said}, such as {gaps[0]}{unread}; submit the job again"


def _check_end(storage: Storage, plan: PlanRecord, inventory: Inventory, totals: Totals) -> Iterator[str]:
    """Yield the problems of the manifest and `_SUCCESS`, for an output whose parts hold every row once."""
    if len(inventory.parts) != plan.units:
        there = f"its rows are in {counted(len(inventory.parts), 'part')}"
        yield f"the plan has {counted(plan.units, 'unit')}, and {there}: use another folder"
    if not _has(inventory, SUCCESS):
        yield f"{SUCCESS} is missing: the job did not complete; submit it again, and it completes or says why not"
    if not _has(inventory, MANIFEST):
        yield f"{MANIFEST} is missing: submit the job again to have it written"
        return
    try:
        said = {"degenerate": 0, **from_json(storage.read(MANIFEST))}  # earlier versions did not count it
    except NotOursError as error:
        yield f"{MANIFEST} is damaged: {error}; submit the job again to have it written"
        return
    expected: dict[str, Any] = {
        **asdict(totals),
        "units": plan.units,
        "files": len(plan.files),
        "fingerprint": plan.fingerprint.digest,
    }
    for name, value in expected.items():
        if said.get(name) != value:
            yield f"{MANIFEST} says {name} {said.get(name)!r}, not {value!r}: move it away and submit the job again"


def _check_leftovers(inventory: Inventory, *, complete: bool) -> Iterator[Finding]:
    """Yield what is to be said about files that do not belong in the folder, or do not belong there any more."""
    units = inventory.part_units
    for file in inventory.strange:
        said = f"{file.name} is not from this project: move it away, because readers may take it for output"
        yield Finding(said, "foreign", leftover=True)
    for unit in sorted(inventory.records.keys() - units) if complete else ():
        said = f"{record_name(unit)} is the commit record of a part that is not there: move it away"
        yield Finding(said, "record", leftover=True)
    left = {unit: files for unit, files in inventory.segments.items() if unit in units or complete}
    if left:
        example = next(iter(left.values()))[0].name
        count = sum(map(len, left.values()))
        said = f"{counted(count, 'segment')} of finished units, such as {example}: remove with `clean`"
        yield Finding(said, "segments", leftover=True, files=count)
    for file in inventory.temporary:
        said = f"{file.name} was left by a writer that died, or is still being written: remove it with `clean`"
        yield Finding(said, "temporary", leftover=True)


def _has(inventory: Inventory, name: str) -> bool:
    return any(file.name == name for file in inventory.own)
