"""Reads the rows of one open Parquet file in pieces of bounded size."""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import InputError, StorageError
from pipeline.core.schema import cast_column, plain_type
from pipeline.core.types import Piece
from pipeline.input import limits
from pipeline.storage.storage import FileInfo, Storage, split_path, split_url
from pipeline.storage.urls import safe_url

READ_BUFFER_BYTES = 1 << 20
TAIL_BYTES = 8
"""The number of bytes after the footer of a Parquet file: 4 for the footer's length and 4 for the magic word."""
_BUILT_BADLY = ("dictionary<", "list_view<")
"""Stored Arrow types that are read as plain types instead: pyarrow fails on a whole batch if one value of a dictionary
is not UTF-8, and it returns broken list views."""


class RowStream:
    """An open Parquet file of the input whose rows are taken in small batches, usually from front to back.

    A step back, or into another row group, starts again at the row group of the first row that is wanted.
    """

    def __init__(self, piece: Piece, columns: list[str], data: bytes | None = None) -> None:
        """Open the file of a piece to read these columns. The piece's range of rows does not matter here.

        `data`: the bytes of the whole file, from fetch_whole; None to read the file as needed. Raises InputError if the
        file is gone or has changed since it was planned, ValueError if its footer cannot be true, StorageError if the
        storage fails, and whatever pyarrow raises if the file is not Parquet.
        """
        self.path = piece.file
        """The path or URL of the file."""
        self.too_long: dict[int, str] = {}
        """The reason for each row of the last take that has a cell set to null because it was too large, by the row's
        position in that take."""
        self._piece, self._fetched = piece, data is not None
        self._source: pa.NativeFile
        if data is not None:
            size, self._source = len(data), pa.BufferReader(data)
        else:
            size = check_unchanged(piece)
            storage, name = split_url(piece.file)
            self._source = storage.open(name, size)
        buffer_bytes = 0 if data is not None else READ_BUFFER_BYTES  # bytes in memory need no buffer
        self._parquet = pq.ParquetFile(self._source, pre_buffer=False, buffer_size=buffer_bytes)
        self._metadata = self._parquet.metadata
        groups = limits.check_footer(self._metadata, size)
        stored = self._parquet.schema_arrow
        types = [stored.field(name).type for name in columns]
        self._schema = pa.schema([(name, plain_type(kind)) for name, kind in zip(columns, types, strict=True)])
        if any(mark in str(kind) for kind in types for mark in _BUILT_BADLY):
            plain = _without_arrow_schema(self._source, size)
            self._parquet = pq.ParquetFile(self._source, metadata=plain, pre_buffer=False, buffer_size=buffer_bytes)
        self._columns = columns
        self._group_starts = list(accumulate(groups, initial=0))
        self._batches: Any = iter(())
        self._pending: pa.RecordBatch | None = None
        self._position = self._end = 0  # the next row, and the row after the last batch

    def take(self, first_row: int, count: int) -> pa.Table:
        """Return `count` rows from row `first_row` of the file on, with plain types, and set `too_long` for them.

        Raises InputError if the file has changed or the rows are too large together, ValueError if the footer cannot be
        true, StorageError if the storage fails, and whatever pyarrow raises.
        """
        end = first_row + count
        if end > self._group_starts[-1]:
            raise InputError(
                f"input {safe_url(self.path)} has changed since the job was planned "
                f"(it has {self._group_starts[-1]} rows, the plan reads up to row {end - 1})"
            )
        self._skip_to(first_row, end - 1)
        taken: list[pa.RecordBatch] = []
        self.too_long = {}
        size = 0
        while self._position < end:
            if self._position == self._end:
                self._start(self._position, end - 1)
            first = self._position - first_row
            rows = self._next_rows(end - self._position)
            if not rows.schema.equals(self._schema, check_metadata=True):  # a cast costs as much as a small file
                rows = self._cast(rows)
            rows, too_long = limits.drop_long_cells(rows)
            self.too_long |= {first + index: reason for index, reason in too_long.items()}
            size += rows.nbytes + rows.num_rows * limits.ROW_BYTES
            if size > limits.UNIT_BYTES:
                raise InputError(
                    f"input {safe_url(self.path)}, rows {first_row} to {end - 1}: the first {first + rows.num_rows} "
                    f"take more than {limits.UNIT_BYTES >> 20} MiB: lower output.rows_per_file (or target_mb)"
                )
            taken.append(rows)
        if not self._fetched:
            check_unchanged(self._piece)  # a file rewritten while it is open gives rows of both versions
        return pa.Table.from_batches(taken)

    def close(self) -> None:
        """Close the file."""
        self._batches = iter(())
        self._pending = None
        self._parquet.close()
        self._source.close()

    def _skip_to(self, row: int, last: int) -> None:
        ahead = self._position <= row < self._end and self._group_of(self._position) == self._group_of(row)
        if not ahead:
            self._start(row, last)
        while self._position < row:
            self._next_rows(row - self._position)

    def _start(self, row: int, last: int) -> None:
        """Begin to read new batches: from the row group that holds `row` to the one that holds `last`, inclusive."""
        groups = range(self._group_of(row), self._group_of(last) + 1)
        batch_rows = limits.batch_rows(
            self._source, self._metadata, groups, self._columns, lambda group: next(self._iterate([group], 1), None)
        )
        self._batches = self._iterate(list(groups), batch_rows)
        self._pending = None
        self._position, self._end = self._group_starts[groups.start], self._group_starts[groups.stop]

    def _iterate(self, groups: list[int], batch_rows: int) -> Iterator[pa.RecordBatch]:
        batches: Iterator[pa.RecordBatch] = self._parquet.iter_batches(
            batch_size=batch_rows, row_groups=groups, columns=self._columns, use_threads=False
        )
        return batches

    def _group_of(self, row: int) -> int:
        return bisect_right(self._group_starts, row) - 1  # groups before it that start at the same row are empty

    def _next_rows(self, at_most: int) -> pa.RecordBatch:
        batch: pa.RecordBatch | None = self._pending if self._pending is not None else next(self._batches, None)
        if batch is None:
            raise InputError(f"input {safe_url(self.path)}: the data ends before the rows that its footer promises")
        rows = batch.slice(0, at_most)
        self._pending = batch.slice(at_most) if at_most < batch.num_rows else None
        self._position += rows.num_rows
        return rows.select(self._columns)

    def _cast(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Return the rows with plain types."""
        columns = [cast_column(rows[field.name], field.type) for field in self._schema]
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)


def check_unchanged(planned: Piece) -> int:
    """Return the size in bytes of a piece's file. Raises InputError if the file is gone or is not the one that was
    planned, StorageError if the storage fails."""
    storage, name = split_url(planned.file)
    return _compare(planned, storage.stat(name))


def fetch_whole(piece: Piece, storage: Storage | None = None) -> bytes:
    """Return the bytes of a piece's whole file, which must have the size that was planned.

    `storage`: the folder of the file, if it is open already. Raises InputError and StorageError as check_unchanged
    does.
    """
    folder, name = split_path(piece.file)
    storage = storage or Storage(folder)
    try:
        data, info = storage.read_version(name, piece.size)
    except StorageError:
        _compare(piece, storage.stat(name))  # says so if the file is gone or shorter now
        raise
    _compare(piece, info)
    return data


def _compare(planned: Piece, info: FileInfo | None) -> int:
    """Return the size of a file, given its facts now. Raises InputError if it is not the one that was planned."""
    if info is None:
        raise InputError(f"input {safe_url(planned.file)} is gone: it was there when the job was planned")
    # The stamp is a checksum only for files in Ray's package. Nobody rewrites these, so their size is enough.
    changed = info.stamp != planned.stamp and not planned.stamp.startswith("sha256:")
    if planned.size >= 0 and (info.size != planned.size or changed):
        raise InputError(
            f"input {safe_url(planned.file)} has changed since the job was planned ({planned.size} bytes, "
            f"{planned.stamp} then; {info.size} bytes, {info.stamp} now): submit the job again"
        )
    return info.size


def _without_arrow_schema(source: pa.NativeFile, size: int) -> pq.FileMetaData:
    """Return the footer without the Arrow schema that the writer of the file stored in it, so that pyarrow reads plain
    types. `size`: the bytes of the file."""
    source.seek(size - TAIL_BYTES)
    tail = source.read(TAIL_BYTES)
    length = int.from_bytes(tail[:4], "little")
    source.seek(size - TAIL_BYTES - length)
    # Build a file that holds only the footer. pyarrow's own footer writer crashes on footers that its reader accepts.
    footer = source.read(length).replace(b"\x0cARROW:schema", b"\x0c_____:schema")
    return pq.read_metadata(pa.BufferReader(tail[4:] + footer + tail))
