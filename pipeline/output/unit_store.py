"""Saves the finished rows of units in the output folder: first in segments, then in the part, with a commit record.

    _job/segments/<unit id>/<writer>-<number>-<checksum>.parquet
    part-<unit id>.parquet

A unit is finished if its part exists. If several attempts publish a part, the first one wins. The commit record is
written after the part, and the job does not depend on it. The segments are removed once the part exists. A segment is
written once, as a whole, under a unique name, so attempts at one unit never disturb each other.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from pipeline.config.job import Job
from pipeline.core.errors import OutputError, StorageError
from pipeline.core.schema import RESULT_SCHEMA
from pipeline.core.types import Totals, UnitResult, WorkUnit
from pipeline.input.unit_reader import UnitData, UnitReader
from pipeline.output.job_records import plan_digest
from pipeline.output.layout import JOB, PLAN, part_name, record_name
from pipeline.output.part import build_part
from pipeline.output.positions import positions
from pipeline.output.records import (
    RECORD_KEY,
    NotOursError,
    OtherSchemaError,
    PartRecord,
    commit_record,
    now,
    read_part,
    to_json,
    unit_fields,
)
from pipeline.output.segments import SegmentRows, folder_of, from_segment, segment_name, to_segment
from pipeline.prompts.setup import PromptSetup
from pipeline.storage.storage import Storage
from pipeline.storage.urls import safe_url

IO_THREADS = 8
"""The number of segments of one unit that are read or removed at the same time."""

PUT_BACK = (
    f"put back the {PLAN} that it was made with, or move {PLAN} away and submit the job again, which makes the plan "
    "again from the parts"
)
"""The advice for a part that is none of the units in plan.json. The part may be good, if plan.json was edited, or is an
older copy."""
SEGMENT_PATIENCE_S = 20.0
"""The most seconds for which reading a segment is tried again, twice, while other files of the output can be read. Its
rows can be generated again, and its unit must not wait for hours."""
CREATIONS = 3
"""The number of times that a part is created which is not there after the store has confirmed its creation."""


class UnitStore:
    """The input and the output folder of a job, as a replica reads its units and saves and publishes their rows.

    The methods may be called from several threads, but `input` (the reader of the units) only from one. They raise
    StorageError if the storage fails. `published` and `publish` raise OutputError if the unit's part is broken, or of
    another job, unit or version of the input file: a retry of the unit cannot help then.
    """

    def __init__(
        self, job: Job, fingerprint_digest: str, schema: pa.Schema, prompts: PromptSetup, replica: str
    ) -> None:
        """Open the input and the output folder of a job. `schema`: that of every part. `prompts`: how prompts are made.
        `replica`: the replica's name, which the parts record."""
        self.input = UnitReader(job.input, prompts, keep_prompt=job.output.keep_prompt)
        self._prompt_rules = prompts.rules
        self._prompt_date = prompts.chat.date if prompts.chat is not None else None
        self._digest, self._schema, self._replica = fingerprint_digest, schema, replica
        # An output folder that somebody removes meanwhile must not be created anew.
        self._storage = Storage(job.output.path, anchor=JOB)
        self._hasty = Storage(job.output.path, patience_s=SEGMENT_PATIENCE_S)
        self._shown = safe_url(job.output.path)

    def write_segment(self, unit: WorkUnit, rows: pa.Table, *, writer: str, number: int, attempt: int) -> None:
        """Write rows (RESULT_SCHEMA) of the unit as one segment.

        `writer` (32 hex digits, an id of the attempt) and `number` together must be unique. To call it again with the
        same arguments does no harm.
        """
        data = to_segment(
            unit,
            self._digest,
            rows,
            prompt_rules=self._prompt_rules,
            writer=writer,
            attempt=attempt,
            prompt_date=self._prompt_date,
        )
        name = f"{folder_of(unit.id)}/{segment_name(writer, number, data)}"
        # If the name exists already, it is this same segment: an earlier try succeeded, but its answer was lost. It is
        # empty if that try took the name on a file system without hard links and then failed.
        if not self._storage.create(name, data) and ((there := self._storage.stat(name)) is None or not there.size):
            self._storage.write(name, data)

    def read_segments(self, unit: WorkUnit) -> SegmentRows:
        """Return the rows of all segments of the unit. If several segments hold a row, the one that comes first by name
        counts.

        A segment that is damaged, cannot be read while other files of the output can, or is not of this job and unit is
        left out, and `ignored` of the result names it; its rows are generated again.
        """
        tables, ignored = [RESULT_SCHEMA.empty_table()], []
        files = self._storage.list_files(folder_of(unit.id), "*.parquet")
        with ThreadPoolExecutor(IO_THREADS, "segments") as pool:
            for file, data in zip(files, pool.map(self._read_segment, (f.name for f in files)), strict=True):
                if data is None:  # another attempt has published the part and removed the segment
                    continue
                if isinstance(data, StorageError):
                    ignored.append(f"segment {file.name} is left out: {data}; its rows are generated again")
                    continue
                try:
                    tables.append(from_segment(file.name.rpartition("/")[2], data, unit, self._digest))
                except NotOursError as error:
                    ignored.append(f"segment {file.name} is left out: {error}; its rows are generated again")
        rows = pa.concat_tables(tables)
        _, first = np.unique(positions(unit, rows), return_index=True)
        return SegmentRows(rows.take(first), tuple(ignored))

    def _read_segment(self, name: str) -> bytes | StorageError | None:
        """Return the content of a segment, None if it does not exist, or the error if this file alone cannot be read.

        Raises StorageError if the storage fails for other files too.
        """
        try:
            return self._hasty.read_if_exists(name)
        except StorageError:
            # If the storage fails as a whole, these requests wait until it works again, or fail.
            if self._storage.stat(name) is None:
                return None
            if (plan := self._storage.stat(PLAN)) is not None and plan.size:
                self._storage.read_range(PLAN, 0, 1)
        try:
            return self._hasty.read_if_exists(name)
        except StorageError as error:
            return error

    def remove_segments(self, unit: WorkUnit) -> None:
        """Remove the segments of a unit that has its part. A failure of the storage is ignored, because segments that
        are left do no harm."""
        with contextlib.suppress(StorageError), ThreadPoolExecutor(IO_THREADS, "segments") as pool:
            names = [file.name for file in self._storage.list_files(folder_of(unit.id), "*.parquet")]
            list(pool.map(self._storage.remove, names))

    def make_part(
        self, data: UnitData, rows: Sequence[pa.Table], *, writer: str, attempt: int, seconds: float
    ) -> bytes:
        """Return the bytes of a unit's part, for `publish`. Nothing is written.

        `rows` are tables with RESULT_SCHEMA that hold each row of the unit exactly once. `writer` is an id of the
        attempt and must be the same whenever the attempt makes its part again. `seconds`: time from when the unit had
        been read until now. Raises ValueError, which ends the replica, if a row has no result or more than one.
        """
        record = PartRecord(
            **unit_fields(data.unit, self._prompt_rules),
            fingerprint=self._digest,
            writer=writer,
            replica=self._replica,
            attempt=attempt,
            seconds=seconds,
            published=now("milliseconds"),
            prompt_date=self._prompt_date,
        )
        header = {RECORD_KEY: json.dumps(record.fields())}
        return build_part(data, rows, self._schema, header)[0]

    def publish(self, unit: WorkUnit, part: bytes) -> UnitResult:
        """Publish a part made by `make_part`, write its commit record, remove the segments and return the result.

        The first writer wins: if another attempt's part exists already, this one is dropped and the result describes
        the existing one, with `published_by_other` set. May be called again after a StorageError.
        """
        started, name = time.monotonic(), part_name(unit.id)
        ours, _ = check_part(self._storage, self._digest, unit, pa.BufferReader(part))
        for _ in range(CREATIONS):
            if not self._storage.create(name, part) and (there := self._storage.read_if_exists(name)):
                return self._settle(unit, there, ours.writer, started)
            # Two writers may both have filled a name that a killed one had left empty, and a store may lose a file.
            if (stored := self._storage.stat(name)) is not None and not stored.size:
                self._storage.write(name, part)
                stored = self._storage.stat(name)
            if stored is not None and stored.size:
                mine = self._writer_of(name, stored.size) == ours.writer
                return self._settle(unit, part if mine else self._storage.read(name), ours.writer, started)
        raise StorageError(
            f"output {self._shown}: {name} is not there, though the store confirmed {CREATIONS} times that it was "
            "written: check the store"
        )

    def _writer_of(self, name: str, size: int) -> str | None:
        """Return the writer that the footer of a stored part names; None if it cannot be read."""
        with contextlib.suppress(NotOursError), self._storage.open(name, size) as source:
            return read_part(source)[0].writer
        return None

    def published(self, unit: WorkUnit) -> UnitResult | None:
        """Return the result of the unit's part with `published_by_other` set; None if the unit has no part yet.

        If there is a part, its commit record is written again and the unit's segments are removed.
        """
        data = self._storage.read_if_exists(part_name(unit.id))
        # An empty file is the name that a killed writer took on a file system without hard links.
        return self._settle(unit, data, None, time.monotonic()) if data else None

    def _settle(self, unit: WorkUnit, stored: bytes, writer: str | None, started: float) -> UnitResult:
        """Write the commit record of a stored part, remove the unit's segments and return the part's result.

        `writer`: this attempt's id, or None if it made no part. `started`: when its publication began.
        """
        record, totals = check_part(self._storage, self._digest, unit, pa.BufferReader(stored))
        # If the part has our own writer id although `create` found it there, an earlier call wrote it, but its answer
        # was lost.
        by_other = record.writer != writer
        seconds = record.seconds + (0 if by_other else time.monotonic() - started)
        sha256 = hashlib.sha256(stored).hexdigest()
        result = UnitResult(unit.id, totals, seconds, sha256, record.replica, record.attempt, by_other)
        write_record(self._storage, record, result, len(stored))
        self.remove_segments(unit)
        return result


def check_part(
    storage: Storage, digest: str | None, unit: WorkUnit, source: pa.NativeFile
) -> tuple[PartRecord, Totals]:
    """Return the record and the totals in the footer of a unit's part; the data of its rows is not read.

    `storage`: the output folder. Raises OutputError if the footer is broken, or if it is not that of a part of this
    unit, of these versions of its input files, in the job with the fingerprint `digest`.
    """
    name, shown = part_name(unit.id), safe_url(storage.root)
    try:
        record, totals = read_part(source)
    except OtherSchemaError as error:
        raise OutputError(f"output {shown}: {name} {error}") from None
    except NotOursError as error:
        raise OutputError(
            f"output {shown}: {name} is broken: {error}; move it away and submit the job again, which generates its "
            "rows again"
        ) from None
    if record.fingerprint != digest:
        if plan_digest(storage) not in (None, digest):
            raise OutputError(
                f"output {shown} belongs to another job by now: its {PLAN} is that job's, and so is {name}; this "
                "driver ends, and nothing is to be done about that part"
            )
        raise OutputError(
            f"output {shown}: {name} is another job's part (its fingerprint is {record.fingerprint[:12]}…, this job's "
            f"is {str(digest)[:12]}…): move it away and submit the job again"
        )
    if wrong := record.difference(unit):
        raise OutputError(f"output {shown}: {name} is not the part of the plan's unit: {wrong}; {PUT_BACK}")
    return record, totals


def write_record(storage: Storage, record: PartRecord, result: UnitResult, part_bytes: int) -> None:
    """Write a unit's commit record. A failure of the storage is ignored, because the part exists, and the next resume
    writes the record."""
    with contextlib.suppress(StorageError):
        storage.write(record_name(result.unit_id), to_json(commit_record(record, result, part_bytes)))
