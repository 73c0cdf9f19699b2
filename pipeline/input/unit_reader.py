"""Reads the rows of work units from the input files and makes their prompts, one unit at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config.job import InputSection
from pipeline.core.errors import InputError, StorageError
from pipeline.core.schema import PROMPT_COLUMN, concat_columns, is_text
from pipeline.core.types import Piece, Row, WorkUnit
from pipeline.input import limits
from pipeline.input.fetcher import Fetch, Fetcher
from pipeline.input.parquet_rows import RowStream
from pipeline.input.row_settings import read_settings
from pipeline.prompts.prompts import PromptMaker
from pipeline.prompts.setup import PromptSetup
from pipeline.prompts.values import CellError, error_line, read_cells, text_column
from pipeline.storage.urls import safe_url

BATCH_ROWS, BATCH_BYTES = 1024, 16 << 20
"""The most rows, and the most bytes of their columns, of several pieces whose prompts are made together."""


@dataclass(frozen=True, slots=True)
class UnitData:
    """The data of a work unit: its rows with their prompts, and the columns that are copied to the output."""

    unit: WorkUnit
    rows: list[Row]
    """One Row per input row, in input order, unusable rows included."""
    columns: pa.Table
    """The `id` column, the carried columns and, if the job keeps them, the texts of the prompts, with one row for each
    of `rows`."""


class UnitReader:
    """A reader of the work units of one job. Only one thread may use it, but `fetch` may be called from others.

    It keeps the last large file open, so units that are read in order need one pass over the file. The small files of a
    unit with several pieces are fetched in parallel.
    """

    def __init__(self, settings: InputSection, prompts: PromptSetup, *, keep_prompt: bool = False) -> None:
        """Take the settings of the input, and how prompts are made (Plan.prompts). With `keep_prompt`, the texts of the
        prompts are among the columns of the units."""
        self._prompts, self._keep_prompt = PromptMaker(prompts), keep_prompt
        self._id_column = settings.id_column
        self._carry, self._settings = settings.carry, settings.row_settings.columns
        self._columns = settings.columns_with(prompts.columns)
        self._file: RowStream | None = None
        self._fetcher = Fetcher()

    def fetch(self, unit: WorkUnit) -> Fetch:
        """Begin to fetch the files of a unit that will be read soon."""
        return self._fetcher.fetch(unit)

    def read(self, unit: WorkUnit, fetch: Fetch | None = None) -> UnitData:
        """Return the rows and the output columns of the unit. A row that cannot be used has the reason in `Row.error`.

        `fetch`: the result of `fetch` for this unit; None to begin with that now. Raises InputError if a file is gone,
        has changed since it was planned or cannot be decoded, if the unit is too large for the memory limits, or if
        templates cannot be rendered at all. Raises StorageError if the storage fails.
        """
        rows: list[Row] = []
        columns: list[pa.Table] = []
        size = characters = 0
        for batch in self._batches(fetch or self.fetch(unit)):
            table = batch.table()
            size += table.nbytes + table.num_rows * limits.ROW_BYTES
            _check_size(unit, size)
            places = batch.places()
            more, errors = self._output_columns([f"{name}#{number}" for name, number in places], table)
            texts: list[str | None] = []
            for row, text in self._make_rows(places, len(rows), table, batch.too_long, errors):
                characters += len(text or "")
                _check_size(unit, characters)  # at each row, because a template may make long prompts of little data
                rows.append(row)
                texts.append(text if self._keep_prompt else None)
            if self._keep_prompt:
                more = more.append_column(PROMPT_COLUMN, pa.chunked_array([pa.array(texts, pa.string())]))
            columns.append(more)
        try:
            return UnitData(unit, rows, concat_columns(columns))
        except (pa.ArrowException, ValueError) as error:
            raise InputError(f"input {unit.describe()}: {error_line(error)}") from error

    def close(self) -> None:
        """Close the open file, if any, and end the process that renders templates, if any."""
        self._fetcher.close()
        self._prompts.close()
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _batches(self, fetch: Fetch) -> Iterator["_Batch"]:
        """Yield the pieces with their columns, as many together as a batch may hold."""
        batch = _Batch()
        for piece, data in fetch:
            table, too_long = self._read_table(piece, data)
            if not batch.takes(table):
                yield batch
                batch = _Batch()
            batch.add(piece, table, too_long)
        yield batch

    def _read_table(self, piece: Piece, data: bytes | None) -> tuple[pa.Table, dict[int, str]]:
        """Return the columns that the job needs for the rows of a piece. Cells that are too large become null; the dict
        gives the reason for each such row, by its position in the piece."""
        try:
            stream = self._open(piece) if data is None else RowStream(piece, self._columns, data)
            return stream.take(piece.first_row, piece.row_count), stream.too_long
        except (InputError, StorageError):
            self._close_file()
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            self._close_file()  # its position is unknown now
            raise InputError(f"{_rows_of(piece)}: cannot be decoded: {error_line(error)}") from error

    def _open(self, piece: Piece) -> RowStream:
        """Return the file of a piece, which stays open for the next pieces."""
        if self._file is None or self._file.path != piece.file:
            self._close_file()
            self._file = RowStream(piece, self._columns)
        return self._file

    def _make_rows(
        self,
        places: Sequence[tuple[str, int]],
        start: int,
        table: pa.Table,
        too_long: Mapping[int, str],
        errors: Mapping[int, str],
    ) -> Iterator[tuple[Row, str | None]]:
        """Yield (row, text of its prompt) for each row of a table, with the text even if the row cannot be used.

        `places`: name of the file and number in the file of each row. `start`: the position of the first row in the
        unit. `too_long` and `errors`: reasons why rows cannot be used, by their position in the table.
        """
        made = zip(self._prompts.make(table), read_settings(table, self._settings), places, strict=True)
        for index, ((prompt, error), (settings, wrong), (name, number)) in enumerate(made):
            error = too_long.get(index) or error or wrong or errors.get(index)
            text = prompt.text if prompt is not None else None
            if error or prompt is None:
                yield Row(f"{name}#{number}", start + index, number, None, error, settings), text
            else:
                yield Row(f"{name}#{number}", start + index, number, text, None, settings, prompt.control), text

    def _output_columns(self, keys: list[str], table: pa.Table) -> tuple[pa.Table, dict[int, str]]:
        """Return the `id` column, which holds the keys if the job has none, and the carried columns of a table.

        Cells that would make a part unreadable, such as text that is not UTF-8, are replaced; the dict gives the reason
        for each row with such a cell, by its position in the table.
        """
        ids = keys if not self._id_column else []
        columns: dict[str, Any] = {"id": pa.chunked_array([pa.array(ids, pa.string())])}
        errors: dict[int, str] = {}
        for target, source in [("id", self._id_column), *((name, name) for name in self._carry)]:
            if source is not None:
                columns[target], bad = _clean(text_column(table[source]) if target == "id" else table[source])
                errors |= {index: f"column '{source}' {reason}" for index, reason in bad.items()}
        return pa.table(columns), errors


class _Batch:
    """Pieces that follow each other in a unit, with their columns. Their prompts are made together, because each call
    for that costs more than a row does."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.too_long: dict[int, str] = {}
        """The reason for each row with a cell that was too large, by the row's position in the batch."""
        self._tables: list[pa.Table] = []
        self._schema: pa.Schema | None = None
        self._rows = self._bytes = 0

    def takes(self, table: pa.Table) -> bool:
        """Return whether the batch has room for these rows, and columns of these types. A column that is all null in
        one file has any type."""
        if self._schema is None:
            return True
        if self._rows + table.num_rows > BATCH_ROWS or self._bytes + table.nbytes > BATCH_BYTES:
            return False
        if table.schema == self._schema:
            return True
        try:
            self._schema = pa.unify_schemas([self._schema, table.schema])
        except pa.ArrowException:
            return False
        return True

    def add(self, piece: Piece, table: pa.Table, too_long: dict[int, str]) -> None:
        """Add the rows of a piece. The dict gives reasons by the rows' positions in the piece."""
        self._schema = self._schema or table.schema
        self.pieces.append(piece)
        self._tables.append(table)
        self.too_long |= {self._rows + index: reason for index, reason in too_long.items()}
        self._rows, self._bytes = self._rows + table.num_rows, self._bytes + table.nbytes

    def places(self) -> list[tuple[str, int]]:
        """Return the name of the file and the number in the file of each row."""
        return [
            (piece.name, number)
            for piece in self.pieces
            for number in range(piece.first_row, piece.first_row + piece.row_count)
        ]

    def table(self) -> pa.Table:
        """Return all rows, and release the tables of the pieces."""
        tables, self._tables = self._tables, []
        return tables[0] if len(tables) == 1 else concat_columns(tables).combine_chunks()


def _check_size(unit: WorkUnit, size: int) -> None:
    """Raise InputError if so many bytes of columns, or characters of prompts, are too many for a unit."""
    if size > limits.UNIT_BYTES:
        raise InputError(
            f"input {unit.describe()}: they or their prompts are too long together: lower output.rows_per_file "
            "(or target_mb)"
        )


def _rows_of(piece: Piece) -> str:
    return f"input {safe_url(piece.file)}, rows {piece.first_row} to {piece.first_row + piece.row_count - 1}"


def _clean(column: "pa.ChunkedArray[Any]") -> tuple["pa.ChunkedArray[Any]", dict[int, str]]:
    """Return the column with the cells replaced that would make a part unreadable, such as text that is not UTF-8; the
    dict gives the reason for each of them, by its position."""
    try:
        column.validate(full=True)  # also finds nested strings that are not UTF-8
    except pa.ArrowInvalid:
        cells = read_cells(column)
    else:
        return column, {}
    bad = {i: cell.reason for i, cell in enumerate(cells) if isinstance(cell, CellError)}
    for index in bad:
        # A string keeps the characters that can be decoded; any other value with such bytes becomes null.
        raw = column[index].cast(pa.binary()).as_py() if is_text(column.type) else None
        cells[index] = raw.decode("utf-8", "replace") if raw is not None else None
    return pa.chunked_array([pa.array(cells, column.type)]), bad
