"""The workers' side of the output folder: a unit's segments, then its part and its commit record, published once.

Parts are the truth: the first writer wins, and a commit record is written after the part and only helps. Segments go
once the part is there.
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
    """One job's output folder. Methods raise OutputError where it is not as it must be, StorageError where it fails."""

    def __init__(self, output_path: str, fingerprint_digest: str) -> None:
        """`fingerprint_digest` names the job that may write here."""
        self._digest = fingerprint_digest
        self._storage = Storage(output_path)
        self._segments = Segments(self._storage, fingerprint_digest)
        self._shown = safe_url(output_path)

    def header(
        self, unit: WorkUnit, *, attempt: int, replica: str, seconds: float, writer: str | None = None
    ) -> dict[str, str]:
        """The header for build_part. `seconds`: from the unit's start until now; `writer`: the same for each try to
        publish what one attempt has made."""
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
        """Publishes a part made by build_part with this ledger's header; the first writer wins.

        Where another attempt's part is there already, `data` is dropped and the result is that part's, with
        `published_by_other`. Raises OutputError where that part is broken or another job's. May be called again after
        a StorageError.
        """
        started = time.monotonic()
        ours, _ = check_part(self._shown, self._digest, unit, pa.BufferReader(data))
        if not self._storage.create(part_name(unit.id), data):
            data = self._storage.read(part_name(unit.id))
        return self._settle(unit, data, ours.writer, started)

    def published(self, unit: WorkUnit) -> UnitResult | None:
        """What publish would say of a part that is there already; None where there is none."""
        data = self._storage.read_if_exists(part_name(unit.id))
        return None if data is None else self._settle(unit, data, None, time.monotonic())

    def _settle(self, unit: WorkUnit, stored: bytes, writer: str | None, started: float) -> UnitResult:
        """The result of the part that is stored, whoever wrote it; its record is written and its segments go."""
        record, totals = check_part(self._shown, self._digest, unit, pa.BufferReader(stored))
        # Our own writer id where a create was refused: the first try arrived, only its acknowledgement was lost.
        by_other = record.writer != writer
        seconds = record.seconds + (0 if by_other else time.monotonic() - started)
        sha256 = hashlib.sha256(stored).hexdigest()
        result = UnitResult(unit.id, totals, seconds, sha256, record.replica, record.attempt, by_other)
        write_record(self._storage, record, result, len(stored))
        self._segments.remove(unit)
        return result


def check_part(shown: str, digest: str | None, unit: WorkUnit, source: pa.NativeFile) -> tuple[PartRecord, Totals]:
    """A part's record and totals. Raises OutputError where it is broken or not the unit's part in the job `digest`.

    `shown`: the output folder, for messages.
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
    """Writes a unit's commit record. A failure is none of the unit: its part is there, the next resume writes it."""
    with contextlib.suppress(StorageError):
        storage.write(record_name(result.unit_id), to_json(commit_record(record, result, part_bytes)))
