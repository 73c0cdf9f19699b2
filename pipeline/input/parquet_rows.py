"""Reads the rows of one open Parquet file in pieces of bounded size."""

import errno
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.errors import InputError
from pipeline.core.schema import cast_column, plain_type
from pipeline.core.text import one_line
from pipeline.core.types import Piece
from pipeline.input import limits
from pipeline.input.planned_file import check_unchanged, fetch_whole
from pipeline.storage import retrying
from pipeline.storage.retrying import call_with_retries
from pipeline.storage.storage import split_url
from pipeline.storage.urls import is_local, safe_url

T = TypeVar("T")
DAMAGED_PATIENCE_S = 30.0
"""Seconds for which data whose checksum is wrong is read again from a store behind a URL.

It is shorter than the patience with failing requests, because the damage may be in the stored file, where it stays.
"""
READ_BUFFER_BYTES = 1 << 20
TAIL_BYTES = 8
"""The number of bytes after the footer of a Parquet file: 4 for the footer's length and 4 for the magic word."""
_BUILT_BADLY = ("dictionary<", "list_view<")
"""Stored Arrow types that are read as plain types instead: pyarrow fails on a whole batch if one value of a dictionary
is not UTF-8, and it returns broken list views."""
_WRONG_CHECKSUM = "CRC checksum verification failed"
"""The part of pyarrow's message that tells a page with a wrong checksum from other failures."""
_UNDECODABLE = (pa.ArrowException, OSError, ValueError, KeyError)
"""The errors that wrong bytes cause, beside DamagedPageError."""
_log = logging.getLogger(__name__)


class DamagedPageError(OSError):
    """A page of a Parquet file does not have the checksum that its header states."""

    def __init__(self, groups: str) -> None:
        """Take a text that names the row groups that it may be in, by their numbers in the file."""
        super().__init__(errno.EIO, "the checksum of a page is wrong: copy the file again if this stays so")
        self.groups = groups


class RowStream:
    """An open Parquet file of the input whose rows are taken in small batches, usually from front to back.

    A step back, or into another row group, starts again at the row group of the first row that is wanted.

    The checksums of pages are verified, if the file has any. Bytes that are wrong may have been damaged on their way
    here, so they are read again from the storage before the file counts as damaged: with a wrong checksum for
    DAMAGED_PATIENCE_S, and once if they cannot be decoded, because most files that cannot be decoded stay so.
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
        self._piece, self._columns, self._fetched = piece, columns, data is not None
        self._to_close: list[Any] = []
        try:
            self._open(data)
        except _UNDECODABLE as error:
            self._read_once_more(error, lambda: None)

    def _open(self, data: bytes | None = None) -> None:
        """Open the file, from these bytes or, if None, from the storage."""
        self.close()
        self._source: pa.NativeFile
        if self._fetched:
            data = fetch_whole(self._piece) if data is None else data
            size, self._source = len(data), pa.BufferReader(data)
        else:
            size = check_unchanged(self._piece)
            storage, name = split_url(self._piece.file)
            self._source = storage.open(name, size)
        self._to_close.append(self._source)
        self._parquet = self._parquet_file(None)
        self._metadata = self._parquet.metadata
        groups = limits.check_footer(self._metadata, size)
        stored = self._parquet.schema_arrow
        types = [stored.field(name).type for name in self._columns]
        self._schema = pa.schema([(name, plain_type(kind)) for name, kind in zip(self._columns, types, strict=True)])
        if any(mark in str(kind) for kind in types for mark in _BUILT_BADLY):
            self._parquet = self._parquet_file(_without_arrow_schema(self._source, size))
        self._group_starts = list(accumulate(groups, initial=0))
        self._batch_rows = 1
        self._position = self._end = 0  # the next row, and the row after the last batch

    def _parquet_file(self, metadata: pq.FileMetaData | None) -> pq.ParquetFile:
        file = pq.ParquetFile(
            self._source,
            metadata=metadata,
            pre_buffer=False,
            buffer_size=0 if self._fetched else READ_BUFFER_BYTES,  # bytes in memory need no buffer
            page_checksum_verification=True,
        )
        self._to_close.insert(0, file)
        return file

    def take(self, first_row: int, count: int) -> pa.Table:
        """Return `count` rows from row `first_row` of the file on, with plain types, and set `too_long` for them.

        Raises InputError if the file has changed or the rows are too large together, ValueError if the footer cannot be
        true, StorageError if the storage fails or the checksum of a page stays wrong, and whatever pyarrow raises.
        """
        try:
            return self._take(first_row, count)
        except DamagedPageError as error:
            return self._read_until_right(error, lambda: self._take(first_row, count))
        except _UNDECODABLE as error:
            return self._read_once_more(error, lambda: self._take(first_row, count))

    def close(self) -> None:
        """Close the file."""
        self._batches: Any = iter(())
        self._pending: pa.RecordBatch | None = None
        for file in self._to_close:
            file.close()
        self._to_close.clear()

    def _read_once_more(self, error: Exception, call: Callable[[], T]) -> T:
        """Open the file anew and return the result of `call`. Raises `error` if its bytes cannot be decoded again."""
        try:
            self._open()
            result = call()
        except _UNDECODABLE:
            raise error from None
        _log.warning("input %s: it could be decoded only when it was read again: %s", self._shown, one_line(error))
        return result

    def _read_until_right(self, error: DamagedPageError, call: Callable[[], T]) -> T:
        """Open the file anew and return the result of `call`, again and again while checksums are wrong."""
        before = [error]

        def read() -> T:
            if before:
                raise before.pop()  # so that the first try, which has failed, counts
            self._open()
            return call()

        shown = f"{self._shown}, {error.groups}"
        patience_s = retrying.LOCAL_PATIENCE_S if is_local(self.path) else DAMAGED_PATIENCE_S
        result = call_with_retries(f"cannot read {shown}", min(patience_s, retrying.PATIENCE_S), read)
        _log.warning("input %s: the checksum of a page was wrong, and right when it was read again", shown)
        return result

    @property
    def _shown(self) -> str:
        return safe_url(self.path)

    def _take(self, first_row: int, count: int) -> pa.Table:
        end = first_row + count
        if end > self._group_starts[-1]:
            raise InputError(
                f"input {self._shown} has changed since the job was planned "
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
                    f"input {self._shown}, rows {first_row} to {end - 1}: the first {first + rows.num_rows} "
                    f"take more than {limits.UNIT_BYTES >> 20} MiB: lower output.rows_per_file (or target_mb)"
                )
            taken.append(rows)
        if not self._fetched:
            check_unchanged(self._piece)  # a file rewritten while it is open gives rows of both versions
        return pa.Table.from_batches(taken)

    def _skip_to(self, row: int, last: int) -> None:
        ahead = self._position <= row < self._end and self._group_of(self._position) == self._group_of(row)
        if not ahead:
            self._start(row, last)
        while self._position < row:
            self._next_rows(row - self._position)

    def _start(self, row: int, last: int) -> None:
        """Begin to read new batches: from the row group that holds `row` to the one that holds `last`, inclusive."""
        groups = range(self._group_of(row), self._group_of(last) + 1)
        self._position, self._end = self._group_starts[groups.start], self._group_starts[groups.stop]
        self._pending = None
        self._batch_rows = limits.batch_rows(
            self._source, self._metadata, groups, self._columns, lambda group: self._next_of(self._iterate([group], 1))
        )
        self._batches = self._iterate(list(groups), self._batch_rows)

    def _iterate(self, groups: list[int], batch_rows: int) -> Iterator[pa.RecordBatch]:
        batches: Iterator[pa.RecordBatch] = self._parquet.iter_batches(
            batch_size=batch_rows, row_groups=groups, columns=self._columns, use_threads=False
        )
        return batches

    def _group_of(self, row: int) -> int:
        return bisect_right(self._group_starts, row) - 1  # groups before it that start at the same row are empty

    def _next_rows(self, at_most: int) -> pa.RecordBatch:
        batch: pa.RecordBatch | None = self._pending if self._pending is not None else self._next_of(self._batches)
        if batch is None:
            raise InputError(f"input {self._shown}: the data ends before the rows that its footer promises")
        rows = batch.slice(0, at_most)
        self._pending = batch.slice(at_most) if at_most < batch.num_rows else None
        self._position += rows.num_rows
        return rows.select(self._columns)

    def _next_of(self, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
        """Return the next batch, or None at the end. Raises DamagedPageError if the checksum of a page is wrong."""
        try:
            return next(batches, None)
        except OSError as error:
            if _WRONG_CHECKSUM not in str(error):
                raise
            raise DamagedPageError(self._damaged_groups()) from error

    def _damaged_groups(self) -> str:
        """Return a text that names the row group of the failing batch. A batch may reach into several groups, so each
        of them is read alone then; if none fails again, all are named."""
        first = self._group_of(self._position)
        last = self._group_of(min(self._position + self._batch_rows, self._end) - 1)
        for group in range(first, last + 1) if first < last else ():
            try:
                for _ in self._iterate([group], self._batch_rows):
                    pass
            except OSError:
                return f"row group {group}"
        return f"row group {first}" if first == last else f"row groups {first} to {last}"

    def _cast(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Return the rows with plain types."""
        columns = [cast_column(rows[field.name], field.type) for field in self._schema]
        return pa.RecordBatch.from_arrays(columns, schema=self._schema)


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
