"""Checks that the rows, the footer and the commit record of one part agree with each other and with the plan."""

import hashlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.schema import RESULT_COLUMNS, RESULT_SCHEMA, plain_type
from pipeline.core.text import one_line
from pipeline.core.types import Totals
from pipeline.output.duplicate_ids import Hashes, IdCounter, hash_ids
from pipeline.output.layout import part_name, record_name
from pipeline.output.part import tally
from pipeline.output.records import CommitRecord, NotOursError, PartRecord, PlanRecord, read_part
from pipeline.planning.fingerprint import COLUMNS, column_types
from pipeline.planning.plan import unit_id
from pipeline.storage.storage import FileInfo, Storage

BATCH_ROWS = 8192
HELD_BYTES = 256 << 20
"""Largest number of bytes of parts in memory, over all threads. A larger part is not held in memory: it is read twice
in pieces, once to hash it and once to decode it."""
AGAIN = "delete it and submit the job again"
"""The advice for a file (a part or its commit record) that the next run of the job writes again once it is deleted."""
_READ = (
    *("id", "finish_reason", "prompt_tokens", "completion_tokens", "denoiser_forwards"),
    *("repetition", "source_file", "source_row"),
)
"""The columns of a part that _check_rows needs."""


@dataclass(frozen=True, slots=True)
class CheckedPart:
    """The result of checking one part."""

    name: str
    record: PartRecord | None
    """The record in the footer of the part; None if it cannot be read."""
    totals: Totals
    """The totals, counted from the rows of the part. They are too low, or 0, if a problem kept rows from being read."""
    problems: tuple[str, ...]
    """One line for each problem: the file, what is wrong, and what to do; empty if the part is sound."""


class PartChecker:
    """A checker for the parts of one output folder: it finds parts that are damaged, or that do not agree with the plan
    or their commit record. `check` may be called from many threads."""

    def __init__(self, storage: Storage, plan: PlanRecord, records: set[str], ids: IdCounter | None) -> None:
        """Set up the checks. `records`: ids of the units that have a commit record.

        `ids` receives the hashed ids of all parts; it is None if the job generates its ids.
        """
        self._storage, self._plan, self._records, self._ids = storage, plan, records, ids
        self._memory = _Budget(HELD_BYTES)

    def check(self, part: FileInfo) -> CheckedPart:
        """Read and check one part. Damage becomes a problem in the result. Raises StorageError if the storage fails."""
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
        except NotOursError as error:
            said = f"{part.name} is truncated, damaged or no part: {error}; {AGAIN}"
            return CheckedPart(part.name, None, Totals(), (said,))
        unproven = list(self._check_commit(part, record, totals, digest))
        misplaced = list(self._check_record(part, record))
        if misplaced:  # its rows cannot match the plan, so they are not checked
            return CheckedPart(part.name, record, Totals(), (*misplaced, *unproven))
        # If the checksum of the whole file was not confirmed, read all columns, to check the checksum of every page.
        columns = None if unproven else list(_READ)
        counted = Totals()
        try:
            with pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True) as file:
                wrong = self._check_schema(file.schema_arrow)
                if not wrong:
                    counted, wrong = self._check_rows(file, record, columns)
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            wrong = [f"its data is damaged: {one_line(error)}"]
        if not wrong and counted != totals:
            wrong = [f"its footer says {_differing(asdict(totals), asdict(counted))}"]
        return CheckedPart(
            part.name, record, counted, (*unproven, *(f"{part.name}: {text}; {AGAIN}" for text in wrong))
        )

    def _check_record(self, part: FileInfo, record: PartRecord) -> Iterator[str]:
        """Yield a problem if the record in the part's footer does not agree with the part's name or with the plan."""
        planned = self._plan.listing.get(record.file)
        if record.fingerprint != self._plan.fingerprint.digest:
            yield f"{part.name} is another job's part: its fingerprint is {record.fingerprint[:12]}…; {AGAIN}"
        elif part.name != part_name(record.unit):
            yield f"{part.name} is a copy or was renamed: it holds unit {record.unit}; delete it"
        elif planned is None:
            yield f"{part.name} holds rows of {record.file}, which is not an input file of the plan; delete it"
        elif record.unit != unit_id(record.file, record.first_row) or record.first_row + record.rows > planned[2]:
            last = record.first_row + record.rows - 1
            span = f"rows {record.first_row} to {last} of {record.file}"
            yield f"{part.name} holds {span}, which are not the rows of a unit; {AGAIN}"
        elif (record.size, record.stamp) != planned[:2]:
            yield f"{part.name} was made of another version of {record.file} than the plan's; {AGAIN}"

    def _check_commit(self, part: FileInfo, record: PartRecord, totals: Totals, digest: str) -> Iterator[str]:
        """Yield a problem if the commit record is missing, damaged or does not agree with the part."""
        name = record_name(record.unit)
        if part.name != part_name(record.unit):
            return  # the record belongs to another part
        data = self._storage.read_if_exists(name) if record.unit in self._records else None
        if data is None:
            yield f"{name} is missing: submit the job again to have it written"
            return
        try:
            commit = CommitRecord.read(data)
        except NotOursError as error:
            yield f"{name} is damaged: {error}; {AGAIN}"
            return
        # `seconds` in the commit record is measured again, after the part is published.
        said = commit.model_dump(exclude={"seconds", "sha256", "part_bytes"})
        found = {**record.model_dump(exclude={"seconds"}), **asdict(totals)}
        if (commit.sha256, commit.part_bytes) != (digest, part.size):
            yield f"{part.name} is not what was published: its sha256 or size differs from that in {name}; {AGAIN}"
        elif said != found or commit.seconds < record.seconds:
            yield f"{name} does not agree with the part: it says {_differing(said, found)}; {AGAIN}"

    def _check_schema(self, schema: pa.Schema) -> list[str]:
        """Return a problem if the names or types of the part's columns are not those of the plan; else []."""
        results = {field.name: str(plain_type(field.type)) for field in schema if field.name in RESULT_COLUMNS}
        wanted = {field.name: str(field.type) for field in RESULT_SCHEMA}
        planned = self._plan.fingerprint.fields.get(COLUMNS)
        if len(schema) == len(set(schema.names)) and (column_types(schema), results) == (planned, wanted):
            return []
        return ["its columns are not those of the plan"]

    def _check_rows(
        self, file: pq.ParquetFile, record: PartRecord, columns: list[str] | None
    ) -> tuple[Totals, list[str]]:
        """Read the rows in batches and return (totals, problems). With a problem the totals are not complete.

        `columns`: the columns to read; None for all.
        """
        generated = self._plan.fingerprint.fields.get("input.id_column") is None
        totals, row = Totals(), record.first_row
        hashes: list[Hashes] = []
        for batch in file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False):
            rows = np.arange(row, row + batch.num_rows)
            row += batch.num_rows
            if batch["source_row"].null_count or not np.array_equal(batch["source_row"].to_numpy(), rows):
                return totals, [f"source_row does not count up from {record.first_row}"]
            if not pc.all(pc.equal(batch["source_file"], pa.scalar(record.file)), skip_nulls=False).as_py():
                return totals, [f"source_file is not {record.file} in every row"]
            if generated:
                file_name, mark = pa.repeat(record.file, len(rows)), pa.repeat("#", len(rows))
                keys = pc.binary_join_element_wise(file_name, pa.array(rows).cast(pa.string()), mark)
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
