"""Saves the finished rows of a unit that has no part yet in small files, from which a later attempt continues.

    _job/segments/<unit id>/<writer>-<number>-<checksum>.parquet

A segment is written once, as a whole, under a unique name, so attempts of one unit never disturb each other. A segment
that is damaged or not of this job and unit is left out and reported; its rows are generated again.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import StorageError
from pipeline.core.schema import RESULT_SCHEMA, SCHEMA_VERSION
from pipeline.core.types import WorkUnit
from pipeline.output.layout import SEGMENTS
from pipeline.output.part import to_parquet
from pipeline.output.records import NotOursError, from_json
from pipeline.storage.storage import Storage

RECORD_KEY = "twotower.segment"
IO_THREADS = 8
"""Number of segments of one unit that are read or removed at the same time."""
_NAME = re.compile(r"[0-9a-f]{32}-[0-9]{6,}-(?P<checksum>[0-9a-f]{64})\.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRecord:
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
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def of(cls, unit: WorkUnit, fingerprint: str) -> Self:
        """Return the record for segments of this unit."""
        return cls(
            unit=unit.id,
            file=unit.name,
            first_row=unit.first_row,
            rows=unit.row_count,
            size=unit.size,
            stamp=unit.stamp,
            fingerprint=fingerprint,
        )


@dataclass(frozen=True, slots=True)
class SegmentRows:
    """The rows of all segments of a unit together."""

    table: pa.Table
    """Table with RESULT_SCHEMA: each row once, ordered by source_row."""
    ignored: tuple[str, ...] = ()
    """Segments that were left out and the reason, one line each."""


class Segments:
    """The segments of one job. Methods raise StorageError if the storage fails, and nothing else."""

    def __init__(self, storage: Storage, fingerprint_digest: str) -> None:
        """Use the segments in `storage`, the output folder."""
        self._storage, self._digest = storage, fingerprint_digest

    def write(self, unit: WorkUnit, rows: pa.Table, *, writer: str, number: int, attempt: int) -> None:
        """Write rows (RESULT_SCHEMA) as one segment. `writer` (32 hex digits) and `number` together must be unique."""
        data = to_segment(unit, self._digest, rows, writer=writer, attempt=attempt)
        # If the name exists already, it is this same segment: an earlier try succeeded, but its answer was lost.
        self._storage.create(f"{folder_of(unit.id)}/{segment_name(writer, number, data)}", data)

    def read(self, unit: WorkUnit) -> SegmentRows:
        """Return the rows of all segments of the unit. If several segments hold a row, the first by name counts."""
        tables, ignored = [RESULT_SCHEMA.empty_table()], []
        files = self._storage.list_files(folder_of(unit.id), "*.parquet")
        with ThreadPoolExecutor(IO_THREADS, "segments") as pool:
            for file, data in zip(files, pool.map(self._storage.read_if_exists, (f.name for f in files)), strict=True):
                if data is None:  # another attempt has published the part and removed the segment
                    continue
                try:
                    tables.append(from_segment(file.name.rpartition("/")[2], data, unit, self._digest))
                except NotOursError as error:
                    ignored.append(f"segment {file.name} is left out: {error}; its rows are generated again")
        return SegmentRows(_union(tables), tuple(ignored))

    def remove(self, unit: WorkUnit) -> None:
        """Remove the segments of a unit that has its part. A failure here does not fail the unit: leftovers do no
        harm."""
        with suppress(StorageError), ThreadPoolExecutor(IO_THREADS, "segments") as pool:
            names = [file.name for file in self._storage.list_files(folder_of(unit.id), "*.parquet")]
            list(pool.map(self._storage.remove, names))


def folder_of(unit_id: str) -> str:
    """Return the folder of a unit's segments, relative to the output folder."""
    return f"{SEGMENTS}/{unit_id}"


def segment_name(writer: str, number: int, data: bytes) -> str:
    """Return the file name of a segment with this content. Its checksum covers the footer, unlike Parquet's
    checksums."""
    return f"{writer}-{number:06}-{hashlib.sha256(data).hexdigest()}.parquet"


def to_segment(unit: WorkUnit, fingerprint: str, rows: pa.Table, *, writer: str, attempt: int) -> bytes:
    """Return the rows as the Parquet bytes of a segment, whose metadata has unit, fingerprint, writer and attempt."""
    record = {**asdict(SegmentRecord.of(unit, fingerprint)), "writer": writer, "attempt": attempt}
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
    fields = from_json(pairs[RECORD_KEY.encode()])
    for name, kind in SegmentRecord.__annotations__.items():
        if type(fields.get(name)) is not kind:
            raise NotOursError(f"its {name} is {fields.get(name)!r}")
    return SegmentRecord(**{name: fields[name] for name in SegmentRecord.__annotations__})


def _check_record(found: SegmentRecord, wanted: SegmentRecord) -> None:
    """Raise NotOursError with the first field that differs."""
    for name, value in asdict(wanted).items():
        if (there := getattr(found, name)) != value:
            raise NotOursError(f"its {name} is {there!r}, not {value!r}")


def _check_rows(table: pa.Table, unit: WorkUnit) -> None:
    rows = table["source_row"]
    known = not rows.null_count and set(table["source_file"].unique().to_pylist()) <= {unit.name}
    positions = rows.to_numpy() - unit.first_row
    if not known or not ((positions >= 0) & (positions < unit.row_count)).all():
        raise NotOursError("it has rows that are not in the unit")


def _union(tables: Iterable[pa.Table]) -> pa.Table:
    rows = pa.concat_tables(tables)
    _, first = np.unique(rows["source_row"].to_numpy(), return_index=True)
    return rows.take(first)
