"""Converts finished rows of a unit that has no part yet to the bytes of a segment and back.

A later attempt at the unit reads the segments and generates only the rows that are in none of them.
"""

import hashlib
import json
import re
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core.schema import RESULT_SCHEMA, SCHEMA_VERSION
from pipeline.core.text import counted, one_line
from pipeline.core.types import ALONE, WorkUnit
from pipeline.output.layout import SEGMENTS
from pipeline.output.part import to_parquet
from pipeline.output.positions import positions
from pipeline.output.records import NotOursError, UnitRecord, unit_fields

RECORD_KEY = "twotower.segment"
"""The key of a segment's SegmentRecord in the key-value metadata of the Parquet file."""
_NAME = re.compile(r"[0-9a-f]{32}-[0-9]{6,}-(?P<checksum>[0-9a-f]{64})\.parquet")


class SegmentRecord(UnitRecord):
    """The record in a segment's key-value metadata that says which unit of which job its rows belong to.

    `rows` is the number of rows of the unit, not of the segment. The metadata also holds the writer and the attempt,
    which are for people only and are not read.
    """


@dataclass(frozen=True, slots=True)
class SegmentRows:
    """The rows in all segments of a unit together."""

    table: pa.Table
    """A table with RESULT_SCHEMA that holds each row once, in the order of the unit."""
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


def to_segment(
    unit: WorkUnit,
    fingerprint: str,
    rows: pa.Table,
    *,
    prompt_rules: int,
    writer: str,
    attempt: int,
    prompt_date: str | None = None,
) -> bytes:
    """Return the bytes of a segment with these rows of the unit (RESULT_SCHEMA).

    Its metadata holds the SegmentRecord, the writer and the attempt. `prompt_rules`: see unit_fields. `prompt_date`:
    see UnitRecord.
    """
    record = SegmentRecord(**unit_fields(unit, prompt_rules), fingerprint=fingerprint, prompt_date=prompt_date)
    said = {**record.fields(), "writer": writer, "attempt": attempt}
    return to_parquet(rows.replace_schema_metadata({RECORD_KEY: json.dumps(said)}))


def from_segment(name: str, data: bytes, unit: WorkUnit, fingerprint: str) -> pa.Table:
    """Return the rows of a segment as a table with RESULT_SCHEMA, without those that were given up because replicas
    died with them. `name`: its file name without the folder.

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
            _check_record(_record_in(file.metadata), unit, fingerprint)
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
    if (positions(unit, table) < 0).any():
        raise NotOursError("it has rows that are not in the unit")
    return _without_condemned(table)


def _without_condemned(table: pa.Table) -> pa.Table:
    """Return the table without rows that were given up because replicas died with them. Only earlier versions saved
    such rows in segments, even if the replicas were the cause, so these rows are tried once more."""
    errors = table["error"]
    keep = pc.or_kleene(pc.is_null(errors), pc.invert(pc.match_substring(errors, ALONE)))
    return table if pc.all(keep).as_py() else table.filter(keep)


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


def _check_record(found: SegmentRecord, unit: WorkUnit, fingerprint: str) -> None:
    """Raise NotOursError if this is not the record of a segment of the unit."""
    for name, value in (("fingerprint", fingerprint), ("schema_version", SCHEMA_VERSION)):
        if (there := getattr(found, name)) != value:
            raise NotOursError(f"its {name} is {there!r}, not {value!r}")
    if wrong := found.difference(unit):
        raise NotOursError(wrong)
