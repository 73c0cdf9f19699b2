"""Converts finished rows of a unit that has no part yet to a segment and back; a later attempt continues from it."""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.schema import RESULT_SCHEMA
from pipeline.core.types import WorkUnit
from pipeline.output.layout import SEGMENTS
from pipeline.output.part import to_parquet
from pipeline.output.records import NotOursError, Record, unit_fields

RECORD_KEY = "twotower.segment"
_NAME = re.compile(r"[0-9a-f]{32}-[0-9]{6,}-(?P<checksum>[0-9a-f]{64})\.parquet")


class SegmentRecord(Record):
    """The unit and job of a segment's rows, kept in its key-value metadata beside the writer and the attempt."""

    unit: str
    file: str
    """Name of the input file (WorkUnit.name)."""
    first_row: int
    rows: int
    """Number of rows of the unit, not of the segment."""
    size: int
    stamp: str
    """Stamp of the input file, as in WorkUnit. Rows of an older version of the file are not used."""
    fingerprint: str
    schema_version: int

    @classmethod
    def of(cls, unit: WorkUnit, fingerprint: str) -> Self:
        """Return the record for segments of this unit."""
        return cls(**unit_fields(unit), fingerprint=fingerprint)


@dataclass(frozen=True, slots=True)
class SegmentRows:
    """The rows of all segments of a unit together."""

    table: pa.Table
    """Table with RESULT_SCHEMA: each row once, ordered by source_row."""
    ignored: tuple[str, ...] = ()
    """Segments that were left out and the reason, one line each."""


def folder_of(unit_id: str) -> str:
    """Return the folder of a unit's segments, relative to the output folder."""
    return f"{SEGMENTS}/{unit_id}"


def segment_name(writer: str, number: int, data: bytes) -> str:
    """Return the file name of a segment with this content. Its checksum covers the footer, unlike Parquet's
    checksums."""
    return f"{writer}-{number:06}-{hashlib.sha256(data).hexdigest()}.parquet"


def to_segment(unit: WorkUnit, fingerprint: str, rows: pa.Table, *, writer: str, attempt: int) -> bytes:
    """Return the rows as the Parquet bytes of a segment, whose metadata has unit, fingerprint, writer and attempt."""
    record = {**SegmentRecord.of(unit, fingerprint).model_dump(), "writer": writer, "attempt": attempt}
    return to_parquet(rows.replace_schema_metadata({RECORD_KEY: json.dumps(record)}))


def from_segment(name: str, data: bytes, unit: WorkUnit, fingerprint: str) -> pa.Table:
    """Return the rows of a segment (RESULT_SCHEMA). Raises NotOursError if it is damaged or of another job or unit."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise NotOursError("it has no segment's name")
    if hashlib.sha256(data).hexdigest() != match["checksum"]:
        raise NotOursError("it is truncated or damaged")
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            _check_record(_record_in(file.metadata), SegmentRecord.of(unit, fingerprint))
            if file.metadata.num_rows > unit.row_count:
                raise NotOursError(f"it has {file.metadata.num_rows} rows, the unit has {unit.row_count}")
            if not file.schema_arrow.remove_metadata().equals(RESULT_SCHEMA):
                raise NotOursError("its columns are others")
            table = file.read().replace_schema_metadata(None)
            table.validate(full=True)  # text that is not UTF-8 would make the part unreadable
    except NotOursError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise NotOursError(f"it cannot be read: {' '.join(str(error).split())}") from error
    _check_rows(table, unit)
    return table


def read_record(source: pa.NativeFile) -> tuple[SegmentRecord, int]:
    """Return a segment's record and its number of rows, read from its footer.

    Raises NotOursError if the footer cannot be read or has no such record.
    """
    try:
        footer = pq.read_metadata(source)
        return _record_in(footer), int(footer.num_rows)
    except NotOursError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise NotOursError(f"it cannot be read: {' '.join(str(error).split())}") from error


def _record_in(footer: pq.FileMetaData) -> SegmentRecord:
    pairs = footer.metadata or {}
    if RECORD_KEY.encode() not in pairs:
        raise NotOursError("its footer has no segment's record")
    return SegmentRecord.read(pairs[RECORD_KEY.encode()])


def _check_record(found: SegmentRecord, wanted: SegmentRecord) -> None:
    """Raise NotOursError with the first field that differs."""
    for name, value in wanted.model_dump().items():
        if (there := getattr(found, name)) != value:
            raise NotOursError(f"its {name} is {there!r}, not {value!r}")


def _check_rows(table: pa.Table, unit: WorkUnit) -> None:
    rows = table["source_row"]
    known = not rows.null_count and set(table["source_file"].unique().to_pylist()) <= {unit.name}
    positions = rows.to_numpy() - unit.first_row
    if not known or not ((positions >= 0) & (positions < unit.row_count)).all():
        raise NotOursError("it has rows that are not in the unit")
