"""Reads the rows of work units: Parquet in, memory bounded by a unit."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InputError, StorageError
from pipeline.job import InputSection
from pipeline.paths import safe_url
from pipeline.prompts import CellError, PromptMaker, read_cells
from pipeline.schema import is_text, plain_type
from pipeline.storage import split_url
from pipeline.types import Row, WorkUnit

BATCH_ROWS = 1024
READ_BUFFER_BYTES = 1 << 20
_BUILT_BADLY = ("dictionary<", "list_view<")
"""Stored Arrow types that pyarrow is not asked to build: a dictionary with one value that is not UTF-8 costs the whole
batch, and a view of lists comes out broken."""


@dataclass(frozen=True, slots=True)
class UnitData:
    """A unit as read: one Row per input row in order, and the columns that go to the output as they are."""

    unit: WorkUnit
    rows: list[Row]
    columns: pa.Table
    """`id` and the carried columns, a row for each of `rows`."""


class UnitReader:
    """Reads units of one job. Keeps the last file open: units taken in order are read in one pass over the file."""

    def __init__(self, settings: InputSection) -> None:
        self._prompts = PromptMaker(settings.prompt_column, settings.template)
        self._id_column = settings.id_column
        self._carry = settings.carry
        wanted = [*self._prompts.columns, *([self._id_column] if self._id_column else []), *self._carry]
        self._columns = list(dict.fromkeys(wanted))
        self._file: _RowStream | None = None

    def read(self, unit: WorkUnit) -> UnitData:
        """The unit's rows; a bad row is a Row with `error`.

        Raises InputError where the file is gone, has changed since planning or cannot be decoded, StorageError where
        it cannot be reached.
        """
        table = self._read_table(unit)
        columns, errors = self._output_columns(unit, table)
        rows = []
        for index, (prompt, error) in enumerate(self._prompts.make(table)):
            error = error or errors.get(index)
            source_row = unit.first_row + index
            prompt = None if error else prompt
            rows.append(Row(f"{unit.name}#{source_row}", index, source_row, prompt, error))
        return UnitData(unit, rows, columns)

    def close(self) -> None:
        """Closes the open file, if any."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read_table(self, unit: WorkUnit) -> pa.Table:
        last = unit.first_row + unit.row_count - 1
        try:
            if self._file is None or self._file.path != unit.file:
                self.close()
                self._file = _RowStream(unit, self._columns)
            return self._file.take(unit.first_row, unit.row_count)
        except (InputError, StorageError):
            self.close()
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            self.close()  # its position is lost
            cause = " ".join(str(error).split())
            raise InputError(
                f"input {safe_url(unit.file)}, rows {unit.first_row} to {last}: cannot be decoded: {cause}"
            ) from error

    def _output_columns(self, unit: WorkUnit, table: pa.Table) -> tuple[pa.Table, dict[int, str]]:
        """`id` and the carried columns, cleaned, and the rows (by index) that they make unusable."""
        names = [f"{unit.name}#{unit.first_row + i}" for i in range(table.num_rows)] if not self._id_column else []
        columns: dict[str, Any] = {"id": pa.chunked_array([pa.array(names, pa.string())])}
        errors: dict[int, str] = {}
        for target, source in [("id", self._id_column), *((name, name) for name in self._carry)]:
            if source is not None:
                columns[target], bad = _clean(table[source])
                errors |= {index: f"column '{source}' {reason}" for index, reason in bad.items()}
        return pa.table(columns), errors


class _RowStream:
    """One open Parquet file, read forward in small batches; a jump reopens at the row group of its target."""

    def __init__(self, unit: WorkUnit, columns: list[str]) -> None:
        self.path = unit.file
        storage, name = split_url(unit.file)
        info = storage.stat(name)
        if info is None:
            raise InputError(f"input {safe_url(unit.file)} is gone: it was there when the job was planned")
        if unit.size >= 0:
            changed_etag = unit.stamp.startswith("etag:") and info.stamp != unit.stamp
            if info.size != unit.size or changed_etag:
                raise InputError(
                    f"input {safe_url(unit.file)} has changed since the job was planned "
                    f"({unit.size} bytes then, {info.size} now): submit the job again"
                )
        self._source = storage.open(name, info.size)
        metadata = pq.read_metadata(self._source)
        stored = metadata.schema.to_arrow_schema()
        self._schema = pa.schema([(name, plain_type(stored.field(name).type)) for name in columns])
        if any(mark in str(stored.field(name).type) for name in columns for mark in _BUILT_BADLY):
            metadata = _without_arrow_schema(metadata)
        self._parquet = pq.ParquetFile(self._source, metadata=metadata, pre_buffer=False, buffer_size=READ_BUFFER_BYTES)
        self._columns = columns
        self._group_starts = [0]
        for group in range(metadata.num_row_groups):
            self._group_starts.append(self._group_starts[-1] + metadata.row_group(group).num_rows)
        self._batches: Any = iter(())
        self._pending: pa.RecordBatch | None = None
        self._position = self._end = 0  # the row that comes next, and the one where the batches end

    def take(self, first_row: int, count: int) -> pa.Table:
        """Rows first_row to first_row + count - 1. Raises what pyarrow raises, InputError where the file is shorter."""
        if first_row + count > self._group_starts[-1]:
            raise InputError(
                f"input {safe_url(self.path)} has changed since the job was planned "
                f"(it has {self._group_starts[-1]} rows, the plan reads up to row {first_row + count - 1})"
            )
        self._skip_to(first_row, first_row + count - 1)
        taken: list[pa.RecordBatch] = []
        end = first_row + count
        while self._position < end:
            if self._position == self._end:
                self._start(self._position, end - 1)
            taken.append(self._next_rows(end - self._position))
        return pa.Table.from_batches(taken)

    def close(self) -> None:
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
        """Begins at the row group that holds `row`; goes no further than the one that holds `last`."""
        groups = range(self._group_of(row), self._group_of(last) + 1)
        self._batches = self._parquet.iter_batches(
            batch_size=BATCH_ROWS, row_groups=list(groups), columns=self._columns, use_threads=False
        )
        self._pending = None
        self._position, self._end = self._group_starts[groups.start], self._group_starts[groups.stop]

    def _group_of(self, row: int) -> int:
        return bisect_right(self._group_starts, row) - 1  # of empty groups the last: it is followed by the row

    def _next_rows(self, at_most: int) -> pa.RecordBatch:
        batch: pa.RecordBatch | None = self._pending if self._pending is not None else next(self._batches, None)
        if batch is None:
            raise InputError(f"input {safe_url(self.path)}: the data ends before the rows that its footer promises")
        rows = batch.slice(0, at_most)
        self._pending = batch.slice(at_most) if at_most < batch.num_rows else None
        self._position += rows.num_rows
        return rows.select(self._columns).cast(self._schema)


def _without_arrow_schema(metadata: pq.FileMetaData) -> pq.FileMetaData:
    """The footer without the Arrow types that the writer stored."""
    sink = pa.BufferOutputStream()
    metadata.write_metadata_file(sink)
    data = sink.getvalue().to_pybytes()
    return pq.read_metadata(pa.BufferReader(data.replace(b"\x0cARROW:schema", b"\x0c_____:schema")))


def _clean(column: "pa.ChunkedArray[Any]") -> tuple["pa.ChunkedArray[Any]", dict[int, str]]:
    """The column; cells that would make a part unreadable are replaced, with reasons by index."""
    try:
        column.validate(full=True)  # strings that are not UTF-8 are found here, nested ones too
    except pa.ArrowInvalid:
        cells = read_cells(column)
    else:
        return column, {}
    bad = {i: cell.reason for i, cell in enumerate(cells) if isinstance(cell, CellError)}
    for index in bad:
        # A string keeps what can be read of it; anything else that holds such bytes is dropped.
        raw = column[index].cast(pa.binary()).as_py() if is_text(column.type) else None
        cells[index] = raw.decode("utf-8", "replace") if raw is not None else None
    return pa.chunked_array([pa.array(cells, column.type)]), bad
