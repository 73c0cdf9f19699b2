"""Segments: the finished rows of a unit that has no part yet, in small files that whoever goes on with it reads.

    _job/segments/<unit id>/<writer>-<number>-<checksum>.parquet

A segment is written once, whole, under a name of its own, so attempts of one unit never disturb each other. What is
damaged or not of this job and unit is left out, and said: its rows are generated again.
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
"""Segments of one unit read or removed at a time."""
_NAME = re.compile(r"[0-9a-f]{32}-[0-9]{6,}-(?P<checksum>[0-9a-f]{64})\.parquet")


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRecord:
    """Whose rows a segment holds; stands in its key-value metadata, beside the writer's name of itself."""

    unit: str
    file: str
    """WorkUnit.name."""
    first_row: int
    rows: int
    """Of the unit, not of the segment."""
    size: int
    stamp: str
    """Of the input file, as in WorkUnit: rows of a file that was rewritten are other rows."""
    fingerprint: str
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def of(cls, unit: WorkUnit, fingerprint: str) -> Self:
        """What the segments of this unit say."""
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
    """What the segments of a unit hold together."""

    table: pa.Table
    """RESULT_SCHEMA: each row once, ordered by source_row."""
    ignored: tuple[str, ...] = ()
    """What was left out and why, a line each."""


class Segments:
    """The segments of one job. Methods raise StorageError where the storage fails, and nothing else."""

    def __init__(self, storage: Storage, fingerprint_digest: str) -> None:
        """`storage`: the output folder."""
        self._storage, self._digest = storage, fingerprint_digest

    def write(self, unit: WorkUnit, rows: pa.Table, *, writer: str, number: int, attempt: int) -> None:
        """Writes rows (RESULT_SCHEMA) as one segment; `writer` (32 hex digits) and `number` are used once together."""
        data = to_segment(unit, self._digest, rows, writer=writer, attempt=attempt)
        # A name that exists is this very segment: an acknowledgement was lost.
        self._storage.create(f"{folder_of(unit.id)}/{segment_name(writer, number, data)}", data)

    def read(self, unit: WorkUnit) -> SegmentRows:
        """The union of the unit's segments; of a row that stands in several, the first by name counts."""
        tables, ignored = [RESULT_SCHEMA.empty_table()], []
        files = self._storage.list_files(folder_of(unit.id), "*.parquet")
        with ThreadPoolExecutor(IO_THREADS, "segments") as pool:
            for file, data in zip(files, pool.map(self._storage.read_if_exists, (f.name for f in files)), strict=True):
                if data is None:  # another attempt has published the part meanwhile
                    continue
                try:
                    tables.append(from_segment(file.name.rpartition("/")[2], data, unit, self._digest))
                except NotOursError as error:
                    ignored.append(f"segment {file.name} is left out: {error}; its rows are generated again")
        return SegmentRows(_union(tables), tuple(ignored))

    def remove(self, unit: WorkUnit) -> None:
        """Removes the segments of a unit that has its part. A failure is none of the unit: what stays does no harm."""
        with suppress(StorageError), ThreadPoolExecutor(IO_THREADS, "segments") as pool:
            names = [file.name for file in self._storage.list_files(folder_of(unit.id), "*.parquet")]
            list(pool.map(self._storage.remove, names))


def folder_of(unit_id: str) -> str:
    """Where a unit's segments stand, relative to the output folder."""
    return f"{SEGMENTS}/{unit_id}"


def segment_name(writer: str, number: int, data: bytes) -> str:
    """The file name of a segment with this content. Its checksum covers what Parquet's own do not: the footer."""
    return f"{writer}-{number:06}-{hashlib.sha256(data).hexdigest()}.parquet"


def to_segment(unit: WorkUnit, fingerprint: str, rows: pa.Table, *, writer: str, attempt: int) -> bytes:
    """A segment as Parquet bytes."""
    record = {**asdict(SegmentRecord.of(unit, fingerprint)), "writer": writer, "attempt": attempt}
    return to_parquet(rows.replace_schema_metadata({RECORD_KEY: json.dumps(record)}))


def from_segment(name: str, data: bytes, unit: WorkUnit, fingerprint: str) -> pa.Table:
    """The rows of a segment (RESULT_SCHEMA). Raises NotOursError where it is damaged or not of this job and unit."""
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
    """Whose a segment is and how many rows it has, from its footer.

    Raises NotOursError where that has no such record, or cannot be read.
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
    """Raises NotOursError, naming what differs."""
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
