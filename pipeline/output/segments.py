"""Converts finished rows of a unit that has no part yet to the bytes of a segment and back.

A later attempt at the unit reads the segments and generates only the rows that are in none of them.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.schema import RESULT_SCHEMA
from pipeline.core.text import counted, one_line
from pipeline.core.types import WorkUnit
from pipeline.output.layout import SEGMENTS
from pipeline.output.part import to_parquet
from pipeline.output.records import NotOursError, Record, unit_fields

RECORD_KEY = "twotower.segment"
"""The key of a segment's SegmentRecord in the key-value metadata of the Parquet file."""
_NAME = re.compile(r"[0-9a-f]{32}-[0-9]{6,}-(?P<checksum>[0-9a-f]{64})\.parquet")


class SegmentRecord(Record):
    """The record in a segment's key-value metadata that says which unit of which job its rows belong to.

    The metadata also holds the writer and the attempt, which are for people only and are not read.
    """

    unit: str
    """The unit's id."""
    file: str
    """The name of the input file (WorkUnit.name)."""
    first_row: int
    rows: int
    """The number of rows of the unit, not of the segment."""
    size: int
    """The size of the input file in bytes, as in WorkUnit."""
    stamp: str
    """The stamp of the input file, as in WorkUnit. Rows of another version of the file are not used."""
    fingerprint: str
    """The digest of the job's fingerprint."""
    schema_version: int

    @classmethod
    def of(cls, unit: WorkUnit, fingerprint: str) -> Self:
        """Return the record for segments of this unit in the job with this fingerprint digest."""
        return cls(**unit_fields(unit), fingerprint=fingerprint)


@dataclass(frozen=True, slots=True)
class SegmentRows:
    """The rows in all segments of a unit together."""

    table: pa.Table
    """A table with RESULT_SCHEMA that holds each row once, sorted by source_row."""
    ignored: tuple[str, ...] = ()
    """One line for each segment that was left out, with the reason."""


def folder_of(unit_id: str) -> str:
    """Return the folder of a unit's segments, relative to the output folder."""
    return f"{SEGMENTS}/{unit_id}"


def segment_name(writer: str, number: int, data: bytes) -> str:
    """Return the file name of a segment with these bytes: `<writer>-<number>-<SHA-256>.parquet`.

    The checksum in the name covers the whole file, while those of Parquet leave out the footer.
    """
    return f"{writer}-{number:06}-{hashlib.sha256(data).hexdigest()}.parquet"


def to_segment(unit: WorkUnit, fingerprint: str, rows: pa.Table, *, writer: str, attempt: int) -> bytes:
    """Return the bytes of a segment with these rows of the unit (RESULT_SCHEMA).

    Its metadata holds the SegmentRecord, the writer and the attempt.
    """
    record = {**SegmentRecord.of(unit, fingerprint).model_dump(), "writer": writer, "attempt": attempt}
    return to_parquet(rows.replace_schema_metadata({RECORD_KEY: json.dumps(record)}))


def from_segment(name: str, data: bytes, unit: WorkUnit, fingerprint: str) -> pa.Table:
    """Return the rows of a segment as a table with RESULT_SCHEMA. `name`: its file name without the folder.

    Raises NotOursError if it is damaged, or if its name or record is not that of a segment of this unit, of this
    version of the input file, in the job with this fingerprint digest.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise NotOursError("its name is not that of a segment")
    if hashlib.sha256(data).hexdigest() != match["checksum"]:
        raise NotOursError("it is truncated or damaged")
    try:
        with pq.ParquetFile(pa.BufferReader(data)) as file:
            _check_record(_record_in(file.metadata), SegmentRecord.of(unit, fingerprint))
            if file.metadata.num_rows > unit.row_count:
                raise NotOursError(f"it has {counted(file.metadata.num_rows, 'row')}, the unit has {unit.row_count}")
            if not file.schema_arrow.remove_metadata().equals(RESULT_SCHEMA):
                raise NotOursError("its columns are not those of a segment")
            table = file.read().replace_schema_metadata(None)
            table.validate(full=True)  # finds text that is not UTF-8, which would make the part unreadable
    except NotOursError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise NotOursError(f"it cannot be read: {one_line(error)}") from error
    _check_rows(table, unit)
    return table


def read_record(source: pa.NativeFile) -> tuple[SegmentRecord, int]:
    """Return (the record of a segment, its number of rows), read from the footer of an open file.

    The rows and the checksum are not checked. Raises NotOursError if the footer cannot be read or has no such record.
    """
    try:
        footer = pq.read_metadata(source)
        return _record_in(footer), int(footer.num_rows)
    except NotOursError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise NotOursError(f"it cannot be read: {one_line(error)}") from error


def _record_in(footer: pq.FileMetaData) -> SegmentRecord:
    pairs = footer.metadata or {}
    if RECORD_KEY.encode() not in pairs:
        raise NotOursError("its footer has no record of a segment")
    return SegmentRecord.read(pairs[RECORD_KEY.encode()])


def _check_record(found: SegmentRecord, wanted: SegmentRecord) -> None:
    """Raise NotOursError, which names the first field that differs, if the records are not equal."""
    for name, value in wanted.model_dump().items():
        if (there := getattr(found, name)) != value:
            raise NotOursError(f"its {name} is {there!r}, not {value!r}")


def _check_rows(table: pa.Table, unit: WorkUnit) -> None:
    """Raise NotOursError if a row has no number, or is of another file or outside the unit."""
    rows = table["source_row"]
    known = not rows.null_count and set(table["source_file"].unique().to_pylist()) <= {unit.name}
    positions = rows.to_numpy() - unit.first_row
    if not known or not ((positions >= 0) & (positions < unit.row_count)).all():
        raise NotOursError("it has rows that are not in the unit")
