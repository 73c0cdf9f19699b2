"""Writes a unit's results to the output folder, for the workers: segments first, then the part and its commit record.

Parts are the authoritative record: the first writer wins, and the commit record is written after the part, as an aid
only. The segments are removed once the part exists.
"""

import contextlib
import hashlib
import json
import time
import uuid
from dataclasses import asdict

import pyarrow as pa

from pipeline.core.errors import OutputError, StorageError
from pipeline.core.types import Totals, UnitResult, WorkUnit
from pipeline.output.layout import part_name, record_name
from pipeline.output.records import RECORD_KEY, NotOursError, PartRecord, commit_record, now, read_part, to_json
from pipeline.output.segments import SegmentRows, Segments
from pipeline.storage.storage import Storage
from pipeline.storage.urls import safe_url


class UnitOutput:
    """The output folder of one job. Methods raise OutputError if it is not valid, StorageError if the storage fails."""

    def __init__(self, output_path: str, fingerprint_digest: str) -> None:
        """Open the folder for the job with this fingerprint digest."""
        self._digest = fingerprint_digest
        self._storage = Storage(output_path)
        self._segments = Segments(self._storage, fingerprint_digest)
        self._shown = safe_url(output_path)

    def header(
        self, unit: WorkUnit, *, attempt: int, replica: str, seconds: float, writer: str | None = None
    ) -> dict[str, str]:
        """Return the header for build_part.

        `seconds`: time from the unit's start until now. `writer`: must be the same for each try to publish the part of
        one attempt.
        """
        record = PartRecord(
            unit=unit.id,
            file=unit.name,
            first_row=unit.first_row,
            rows=unit.row_count,
            fingerprint=self._digest,
            writer=writer or uuid.uuid4().hex,
            replica=replica,
            attempt=attempt,
            seconds=seconds,
            size=unit.size,
            stamp=unit.stamp,
            published=now("milliseconds"),
        )
        return {RECORD_KEY: json.dumps(asdict(record))}

    def read_segments(self, unit: WorkUnit) -> SegmentRows:
        """See Segments.read."""
        return self._segments.read(unit)

    def write_segment(self, unit: WorkUnit, rows: pa.Table, *, writer: str, number: int, attempt: int) -> None:
        """See Segments.write."""
        self._segments.write(unit, rows, writer=writer, number=number, attempt=attempt)

    def publish(self, unit: WorkUnit, data: bytes) -> UnitResult:
        """Publish a part that was made by build_part with this object's header; the first writer wins.

        If another attempt's part exists already, `data` is dropped and the result describes that part, with
        `published_by_other` set. Raises OutputError if that part is broken or belongs to another job. May be called
        again after a StorageError.
        """
        started = time.monotonic()
        ours, _ = check_part(self._shown, self._digest, unit, pa.BufferReader(data))
        if not self._storage.create(part_name(unit.id), data):
            data = self._storage.read(part_name(unit.id))
        return self._settle(unit, data, ours.writer, started)

    def published(self, unit: WorkUnit) -> UnitResult | None:
        """Return the result of a part that exists already, with `published_by_other` set; None if there is no part."""
        data = self._storage.read_if_exists(part_name(unit.id))
        return None if data is None else self._settle(unit, data, None, time.monotonic())

    def _settle(self, unit: WorkUnit, stored: bytes, writer: str | None, started: float) -> UnitResult:
        """Return the result of the stored part, whoever wrote it. Its commit record is written and its segments are
        removed."""
        record, totals = check_part(self._shown, self._digest, unit, pa.BufferReader(stored))
        # If the part has our own writer id, our first try to create it succeeded and only its answer was lost.
        by_other = record.writer != writer
        seconds = record.seconds + (0 if by_other else time.monotonic() - started)
        sha256 = hashlib.sha256(stored).hexdigest()
        result = UnitResult(unit.id, totals, seconds, sha256, record.replica, record.attempt, by_other)
        write_record(self._storage, record, result, len(stored))
        self._segments.remove(unit)
        return result


def check_part(shown: str, digest: str | None, unit: WorkUnit, source: pa.NativeFile) -> tuple[PartRecord, Totals]:
    """Return a part's record and totals.

    Raises OutputError if the part is broken, or is not the part of this unit in the job with fingerprint `digest`.
    `shown`: name of the output folder in messages.
    """
    name = part_name(unit.id)
    try:
        record, totals = read_part(source)
    except NotOursError as error:
        raise OutputError(
            f"output {shown}: {name} is broken: {error}; delete it to have its rows generated again"
        ) from None
    if record.fingerprint != digest:
        raise OutputError(f"output {shown}: {name} is another job's part: delete it")
    if (record.unit, record.rows) != (unit.id, unit.row_count):
        raise OutputError(f"output {shown}: {name} holds unit {record.unit}, not {unit.id}: delete it")
    if (record.size, record.stamp) != (unit.size, unit.stamp):
        raise OutputError(
            f"output {shown}: {name} was made of another version of {unit.name}: delete it to have its rows "
            "generated again"
        )
    return record, totals


def write_record(storage: Storage, record: PartRecord, result: UnitResult, part_bytes: int) -> None:
    """Write a unit's commit record. A failure here does not fail the unit: its part exists, and the next resume writes
    the record."""
    with contextlib.suppress(StorageError):
        storage.write(record_name(result.unit_id), to_json(commit_record(record, result, part_bytes)))
