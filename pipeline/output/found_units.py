"""Finds out from parts and segments alone which units an output was begun with, after its plan.json was lost.

The footers of parts and segments name the job's fingerprint, the unit and its pieces with the versions of their input
files. If all of that agrees with the job, plan.json can be made again: `look` reads the footers, `stored_units` says
what the plan is made of, and `disagreement` says why it cannot be made.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.core.errors import StorageError
from pipeline.core.schema import SCHEMA_VERSION
from pipeline.core.types import UNIT_RULES
from pipeline.output.layout import PARTS, SEGMENTS, part_name
from pipeline.output.records import (
    NotOursError,
    OtherSchemaError,
    PartRecord,
    PieceRecord,
    UnitRecord,
    other_schema,
    read_part,
)
from pipeline.output.segments import read_record
from pipeline.planning.packing import ROWS_UNKNOWN, Span, StoredUnits, unit_id
from pipeline.planning.plan import Plan
from pipeline.planning.prompts import Begun, today
from pipeline.prompts.setup import RULES
from pipeline.storage.parallel import call_each
from pipeline.storage.storage import FileInfo, Storage

READ_THREADS = 16
"""The number of footers that are read at the same time."""
PATIENCE_S = 20.0
"""The most seconds for which reading a segment is tried again before it counts as one that cannot be read."""


@dataclass(frozen=True, slots=True)
class FoundUnits:
    """The units that the parts and segments of an output name."""

    records: tuple[tuple[str, UnitRecord], ...] = ()
    """(file, its record) for each unit: the unit's part, or else the first of its segments. Parts come first."""
    began: str = ""
    """The earliest time at which a part was published, ISO 8601 in UTC; "" if no part says."""
    jobs: Mapping[str, str] = field(default_factory=dict)
    """The first file of each job of which there are files, by the digest of the job's fingerprint."""
    flaw: str | None = None
    """The first other thing because of which no plan can be made of the files, and what to do; None if there is none.
    `records` is empty then."""


def look(storage: Storage) -> FoundUnits:
    """Return the units that the parts and segments of an output folder name.

    Empty files count as absent. Left out are segments that cannot be read, because their rows are generated again, and
    those whose rows a part or another unit's segment holds. Raises StorageError if the storage fails.
    """
    files = [file for file in storage.list_files("", PARTS) if file.size]
    parts: list[tuple[str, UnitRecord]] = []
    times = []
    for file, found in zip(files, call_each(lambda file: _read_part(storage, file), files, READ_THREADS), strict=True):
        if isinstance(found, str):
            return FoundUnits(flaw=found)
        parts.append((file.name, found))
        times.extend([found.published] if found.published else [])
    segments = list(_segments(storage, {record.unit for _, record in parts}))
    if flaw := _schema_flaw([*parts, *segments]):
        return FoundUnits(flaw=flaw)
    rows, records = _Rows(), []
    for name, record in [*parts, *segments]:
        if (other := rows.take(name, record)) is None:
            records.append((name, record))
        elif len(records) < len(parts):
            first = record.pieces[0].file
            return FoundUnits(flaw=f"{other} and {name} both hold rows of {first}: move one of them away")
    jobs = {record.fingerprint: name for name, record in reversed([*parts, *segments])}
    return FoundUnits(tuple(records), min(times, default=""), jobs)


def stored_units(found: FoundUnits) -> tuple[Begun, StoredUnits]:
    """Return the facts from which the lost plan can be made again; those of a new output if the files do not agree with
    each other, which `disagreement` says."""
    if len(found.jobs) != 1:
        return Begun(), StoredUnits()
    records = [record for _, record in found.records]
    first = records[0]
    units, prompts = (first.rules.units, first.rules.prompts) if first.rules else (1, RULES)
    dates = (record.prompt_date for record in records if record.prompt_date)
    # Parts of earlier versions do not name the day. Their output was begun on the day of the first one, or before.
    date = next(dates, found.began[:10]) or today()
    packing = tuple(tuple(Span(piece.file, piece.first_row, piece.rows) for piece in each.pieces) for each in records)
    listing = {piece.file: (piece.size, piece.stamp, ROWS_UNKNOWN) for each in records for piece in each.pieces}
    begun = Begun(min(prompts, RULES), date, maybe_old=first.rules is None)
    return begun, StoredUnits(min(units, UNIT_RULES), packing, listing, first.fingerprint, incomplete=True)


def disagreement(found: FoundUnits, plan: Plan) -> str | None:
    """Return why the files are not those of this job, or not of its input files, and what to do; None if all agree."""
    if found.flaw is not None:
        return found.flaw
    ours = plan.fingerprint.digest
    if ours in found.jobs and len(found.jobs) > 1:
        other = next(name for digest, name in found.jobs.items() if digest != ours)
        return f"{found.jobs[ours]} is of this job, and {other} of another one: move the other job's files away"
    if len(found.jobs) > 1:
        one, other, *_ = found.jobs.values()
        return f"{one} and {other} are of two other jobs: use another output.path"
    listing, planned = plan.listing, {unit.id: unit for unit in plan.units}
    dates = {record.prompt_date: name for name, record in found.records if record.prompt_date}
    if len(dates) > 1:
        (day, one), (other_day, other), *_ = dates.items()
        return f"the prompts of {one} print the day {day}, those of {other} {other_day}: use another output.path"
    for name, record in found.records:
        if record.rules and (record.rules.units > UNIT_RULES or record.rules.prompts > RULES):
            return f"{name} was made by a later version: finish it with that one, or use another output.path"
        if record.fingerprint != ours:
            return (
                f"{name} is of a job with other settings or another checkpoint (its fingerprint is "
                f"{record.fingerprint[:12]}…, this job's is {ours[:12]}…): submit that job, or use another output.path"
            )
        for piece in record.pieces:
            size, stamp, rows = listing.get(piece.file, (-1, "", -1))
            if piece.file not in listing:
                return f"{piece.file}, of which {name} holds rows, is gone: {_RESTORE}"
            if (piece.size, piece.stamp) != (size, stamp):
                return f"{piece.file} has changed since {name} was made: {_RESTORE}"
            if piece.first_row + piece.rows > rows:
                return f"{name} holds {piece}, which has only {rows} rows: use another output.path"
        if record.unit not in planned or (wrong := record.difference(planned[record.unit])):
            said = wrong if record.unit in planned else f"it holds unit {record.unit}, which this job does not have"
            return f"{name} is not the file of a unit of this job: {said}; use another output.path"
    return None


_RESTORE = "put the same files back (cp -p), or use another output.path"


def _read_part(storage: Storage, file: FileInfo) -> PartRecord | str:
    """Return the record of a part, or what is wrong with it and what to do."""
    try:
        with storage.open(file.name, file.size) as source:
            record, _ = read_part(source)
    except OtherSchemaError as error:
        return f"{file.name} {error}"
    except NotOursError as error:
        return (
            f"{file.name} is broken: {error}; move it away and submit the same job again, which generates its rows "
            "again"
        )
    if file.name != part_name(record.unit):
        return f"{file.name} is a copy or was renamed, as it holds unit {record.unit}: move it away"
    return record


def _segments(storage: Storage, published: set[str]) -> Iterator[tuple[str, UnitRecord]]:
    """Yield (file, record) of the segments of units that have no part. Those that cannot be read are left out."""
    hasty = Storage(storage.root, patience_s=PATIENCE_S)
    found = Storage(f"{storage.root.rstrip('/')}/{SEGMENTS}").find()
    files = [file for file in found if file.size and file.name.partition("/")[0] not in published]

    def read(file: FileInfo) -> UnitRecord | None:
        name = f"{SEGMENTS}/{file.name}"
        try:
            with hasty.open(name, file.size) as source:
                record, _ = read_record(source)
        except NotOursError:
            return None
        except StorageError:
            storage.stat(name)  # raises if the storage fails for other files too
            return None
        return record if record.unit == file.name.partition("/")[0] else None

    for file, record in zip(files, call_each(read, files, READ_THREADS), strict=True):
        if record is not None:
            yield f"{SEGMENTS}/{file.name}", record


def _schema_flaw(records: Sequence[tuple[str, UnitRecord]]) -> str | None:
    for name, record in records:
        if record.schema_version != SCHEMA_VERSION:
            return f"{name} {other_schema(record.schema_version)}"
        first = record.pieces[0]
        if record.unit != unit_id(first.file, first.first_row):
            return f"{name} names {first} as the first of unit {record.unit}, which is another unit's: move it away"
    return None


class _Rows:
    """The rows of input files that units hold."""

    def __init__(self) -> None:
        self._units: dict[str, str] = {}
        self._taken: dict[str, list[tuple[int, int, str]]] = {}

    def take(self, name: str, record: UnitRecord) -> str | None:
        """Add the rows of the unit that a file is of, and return None, or the name of a file that holds some of them.

        Nothing is added then.
        """
        if record.unit in self._units:
            return self._units[record.unit]
        for piece in record.pieces:
            if (other := self._holder(piece)) is not None:
                return other
        self._units[record.unit] = name
        for piece in record.pieces:
            insort(self._taken.setdefault(piece.file, []), (piece.first_row, piece.first_row + piece.rows, name))
        return None

    def _holder(self, piece: PieceRecord) -> str | None:
        ranges = self._taken.get(piece.file, [])
        place = bisect_left(ranges, (piece.first_row + piece.rows,))
        if place and ranges[place - 1][1] > piece.first_row:
            return ranges[place - 1][2]
        return None
