"""Checks that the rows, the footer and the commit record of one part agree with each other and with the plan."""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.schema import RESULT_COLUMNS, RESULT_SCHEMA, plain_type
from pipeline.core.text import counted, one_line, printable
from pipeline.core.types import Totals, WorkUnit
from pipeline.maintenance.planned_units import PlannedUnits, sources
from pipeline.output.duplicate_ids import Hashes, IdCounter, hash_ids
from pipeline.output.job_records import PlanRecord
from pipeline.output.layout import part_name, record_name
from pipeline.output.part import tally
from pipeline.output.records import CommitRecord, NotOursError, OtherSchemaError, PartRecord, read_part
from pipeline.output.unit_store import PUT_BACK
from pipeline.planning.fingerprint import COLUMNS, column_types
from pipeline.planning.packing import Span, spans_of
from pipeline.storage.storage import FileInfo, Storage

BATCH_ROWS = 8192
HELD_BYTES = 256 << 20
"""Largest number of bytes of parts in memory, over all threads. A larger part is not held in memory: it is read twice
in pieces, once to hash it and once to decode it."""
AGAIN = "move it away and submit the job again"
"""The advice for a file (a part or its commit record) that the next run of the job writes again once it is gone."""
_READ = (
    *("id", "finish_reason", "prompt_tokens", "completion_tokens", "denoiser_forwards"),
    *("repetition", "source_file", "source_row"),
)
"""The columns of a part that _check_rows needs."""


@dataclass(frozen=True, slots=True)
class CheckedPart:
    """The result of checking one part."""

    name: str
    spans: Sequence[Span] | None
    """The rows that the record in its footer names, if the part has the name of its unit; None if the record cannot be
    read."""
    totals: Totals
    """The totals, counted from the rows of the part. They are too low, or 0, if a problem kept rows from being read."""
    problems: tuple[str, ...]
    """One line for each problem: the file, what is wrong, and what to do; empty if the part is sound."""
    planned: bool = True
    """Whether it is the part of a unit of the plan. If not, a problem says so."""


class PartChecker:
    """A checker for the parts of one output folder: it finds parts that are damaged, or that do not agree with the plan
    or their commit record. `check` may be called from many threads."""

    def __init__(self, storage: Storage, plan: PlanRecord, records: set[str], ids: IdCounter | None) -> None:
        """Set up the checks. `records`: ids of the units that have a commit record.

        `ids` receives the hashed ids of all parts; it is None if the job generates its ids.
        """
        self._storage, self._plan, self._records, self._ids = storage, plan, records, ids
        self._units = PlannedUnits(plan)
        self._memory = _Budget(HELD_BYTES)

    def check(self, part: FileInfo) -> CheckedPart:
        """Read and check one part. Damage becomes a problem in the result. Raises StorageError if the storage fails."""
        if not part.size:  # the name that a killed writer took on a file system without hard links
            empty = f"{part.name} is empty (0 bytes): submit the job again, which writes it"
            return CheckedPart(part.name, None, Totals(), (empty,))
        if part.size > HELD_BYTES:
            digest = self._storage.sha256(part.name, part.size)
            with self._storage.open(part.name, part.size) as source:
                return self._check(part, source, digest)
        with self._memory.hold(part.size):
            data = self._storage.read(part.name)
            return self._check(part, pa.BufferReader(data), hashlib.sha256(data).hexdigest())

    def _check(self, part: FileInfo, source: pa.NativeFile, digest: str) -> CheckedPart:
        try:
            record, totals = read_part(source)
        except OtherSchemaError as error:
            return CheckedPart(part.name, None, Totals(), (f"{part.name} {error}",))
        except NotOursError as error:
            broken = f"{part.name} is truncated, damaged or no part: {error}; {AGAIN}"
            return CheckedPart(part.name, None, Totals(), (broken,))
        unproven = list(self._check_commit(part, record, totals, digest))
        unit = self._find_unit(part, record)
        if isinstance(unit, str):  # its rows cannot match the plan, so they are not checked
            spans = [Span(piece.file, piece.first_row, piece.rows) for piece in record.pieces]
            own = part.name == part_name(record.unit)
            return CheckedPart(part.name, spans if own else (), Totals(), (unit, *unproven), planned=False)
        # If the checksum of the whole file was not confirmed, read all columns, to check the checksum of every page.
        columns = None if unproven else list(_READ)
        found = Totals()
        try:
            with pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True) as file:
                wrong = self._check_schema(file.schema_arrow)
                if not wrong:
                    found, wrong = self._check_rows(file, unit, columns)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            wrong = [f"its data is damaged: {one_line(error)}"]
        if not wrong and found != totals:
            wrong = [f"its footer says {_differing(asdict(totals), asdict(found))}"]
        said = (f"{part.name}: {text}; {AGAIN}" for text in wrong)
        return CheckedPart(part.name, spans_of(unit), found, (*unproven, *said))

    def _find_unit(self, part: FileInfo, record: PartRecord) -> WorkUnit | str:
        """Return the plan's unit of a part, or what is wrong if the record in the part's footer does not agree with the
        part's name or with the plan."""
        if record.fingerprint != self._plan.fingerprint.digest:
            return f"{part.name} is another job's part: its fingerprint is {record.fingerprint[:12]}…; {AGAIN}"
        if part.name != part_name(record.unit):
            own = part_name(record.unit)
            return (
                f"{part.name} is a copy or was renamed: it holds unit {record.unit}; move it away, or, if {own} is "
                "missing, give it that name"
            )
        unit, first = self._units.find(record), record.pieces[0]
        if unit is None and first.file not in self._plan.listing:
            return f"{part.name} holds rows of {first.file}, which is not an input file of the plan; move it away"
        if unit is None:
            more = f" and of {counted(len(record.pieces) - 1, 'more file')}" if len(record.pieces) > 1 else ""
            return f"{part.name} holds {first}{more}, which are not the rows of a unit; {PUT_BACK}"
        wrong = record.difference(unit)
        return f"{part.name} is not the part of the plan's unit: {wrong}; {PUT_BACK}" if wrong else unit

    def _check_commit(self, part: FileInfo, record: PartRecord, totals: Totals, digest: str) -> Iterator[str]:
        """Yield a problem if the commit record is missing, damaged or does not agree with the part."""
        name = record_name(record.unit)
        if part.name != part_name(record.unit):
            return  # the record belongs to another part
        data = self._storage.read_if_exists(name) if record.unit in self._records else None
        if not data:  # an empty one counts as missing, and a run writes it again
            yield f"{name} is missing: submit the job again to have it written"
            return
        try:
            commit = CommitRecord.read(data)
        except NotOursError as error:
            yield f"{name} is damaged: {error}; {AGAIN}"
            return
        if (commit.sha256, commit.part_bytes) != (digest, part.size):
            if commit.writer != record.writer:  # the part was deleted, and the run died before it wrote a new record
                yield f"{name} is the record of another attempt's part; {AGAIN}"
                return
            yield f"{part.name} is not what was published: its sha256 or size differs from that in {name}; {AGAIN}"
            return
        # `seconds` in the commit record is measured again, after the part is published.
        said = commit.model_dump(exclude={"seconds", "sha256", "part_bytes", "pieces"})
        found = {**record.model_dump(exclude={"seconds", "pieces"}), **asdict(totals)}
        if commit.pieces != record.pieces:
            said, found = _numbered(commit), _numbered(record)
        if said != found or commit.seconds < record.seconds:
            yield f"{name} does not agree with the part: it says {_differing(said, found)}; {AGAIN}"

    def _check_schema(self, schema: pa.Schema) -> list[str]:
        """Return a problem if the names or types of the part's columns are not those of the plan; else []."""
        results = {field.name: str(plain_type(field.type)) for field in schema if field.name in RESULT_COLUMNS}
        wanted = {field.name: str(field.type) for field in RESULT_SCHEMA}
        planned = self._plan.fingerprint.fields.get(COLUMNS)
        if len(schema) == len(set(schema.names)) and (column_types(schema), results) == (planned, wanted):
            return []
        return ["its columns are not those of the plan"]

    def _check_rows(self, file: pq.ParquetFile, unit: WorkUnit, columns: list[str] | None) -> tuple[Totals, list[str]]:
        """Read the rows in batches and return (totals, problems). With a problem the totals are not complete.

        `columns`: the columns to read; None for all.
        """
        generated = self._plan.fingerprint.fields.get("input.id_column") is None
        totals, place = Totals(), 0
        hashes: list[Hashes] = []
        for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            if wrong := _check_sources(batch, unit, place):
                return totals, [wrong]
            place += batch.num_rows
            if generated:
                numbers = batch["source_row"].cast(pa.string())
                keys = pc.binary_join_element_wise(batch["source_file"], numbers, pa.repeat("#", batch.num_rows))
                if not pc.all(pc.equal(batch["id"], keys), skip_nulls=False).as_py():
                    return totals, ["id is not `<file>#<row>` in every row"]
            else:
                hashes.append(hash_ids(batch["id"].drop_null()))
            totals += tally(batch) + Totals(null_ids=batch["id"].null_count)
        if hashes:
            ids = np.concatenate(hashes)
            totals += Totals(duplicate_ids=len(ids) - len(np.unique(ids)))
            if self._ids is not None:
                self._ids.add(ids)
        return totals, []


def _check_sources(batch: pa.RecordBatch, unit: WorkUnit, place: int) -> str | None:
    """Return what is wrong if the rows of a batch are not those of the unit from position `place` on, in order."""
    files, numbers = sources(unit, place, batch.num_rows)
    same_file: Any = pc.equal(batch["source_file"], files).fill_null(False)
    found = batch["source_row"].fill_null(-1).to_numpy()
    if np.array_equal(found, numbers) and pc.all(same_file).as_py():
        return None
    index = int(np.argmin(same_file.to_numpy(zero_copy_only=False) & (found == numbers)))
    there = f"{batch['source_file'][index]}#{batch['source_row'][index]}"
    piece, row = unit.locate(place + index)
    return f"its row {place + index} is {printable(there)}, not {piece.name}#{row}"


class _Budget:
    """A number of bytes of memory that threads share. A thread that needs more than is free waits."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Take `size` bytes while the `with` block runs. `size` must not exceed the whole budget, or this never
        returns."""
        with self._changed:
            self._changed.wait_for(lambda: self._left >= size)
            self._left -= size
        try:
            yield
        finally:
            with self._changed:
                self._left += size
                self._changed.notify_all()


def _differing(said: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Return text such as `rows 9, not 10, …` for up to three values that differ: the said value, then the found one.

    The text is `other seconds` if none differs: the seconds of a commit record are compared by the caller.
    """
    names = [name for name in dict.fromkeys([*said, *found]) if said.get(name) != found.get(name)]
    return ", ".join(f"{name} {said.get(name)!r}, not {found.get(name)!r}" for name in names[:3]) or "other seconds"


def _numbered(record: PartRecord) -> dict[str, str]:
    """Return the pieces of a record as values with names such as `piece 3`, for a message about those that differ."""
    return {f"piece {number}": f"{piece}, {piece.size}, {piece.stamp}" for number, piece in enumerate(record.pieces, 1)}
