"""Reads the rows of work units from the input files and makes their prompts, one unit at a time."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.config.job import InputSection
from pipeline.core.errors import InputError, StorageError
from pipeline.core.schema import PROMPT_COLUMN, is_text
from pipeline.core.types import Row, WorkUnit
from pipeline.input import limits
from pipeline.input.parquet_rows import RowStream
from pipeline.input.row_settings import read_settings
from pipeline.prompts.prompts import PromptMaker
from pipeline.prompts.setup import PromptSetup
from pipeline.prompts.values import CellError, error_line, read_cells, text_column
from pipeline.storage.urls import safe_url


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
    """A reader of the work units of one job. Only one thread may use it.

    It keeps the last file open, so units that are read in order need one pass over the file.
    """

    def __init__(self, settings: InputSection, prompts: PromptSetup, *, keep_prompt: bool = False) -> None:
        """Take the settings of the input, and how prompts are made (Plan.prompts). With `keep_prompt`, the texts of the
        prompts are among the columns of the units."""
        self._prompts, self._keep_prompt = PromptMaker(prompts), keep_prompt
        self._id_column = settings.id_column
        self._carry, self._settings = settings.carry, settings.row_settings.columns
        self._columns = settings.columns_with(prompts.columns)
        self._file: RowStream | None = None

    def read(self, unit: WorkUnit) -> UnitData:
        """Return the rows and the output columns of the unit. A row that cannot be used has the reason in `Row.error`.

        Raises InputError if the file is gone, has changed since it was planned or cannot be decoded, if the unit is too
        large for the memory limits, or if templates cannot be rendered at all. Raises StorageError if the storage
        fails.
        """
        table, too_long = self._read_table(unit)
        columns, errors = self._output_columns(unit, table)
        made = zip(self._prompts.make(table), read_settings(table, self._settings), strict=True)
        rows, texts, characters = [], list[str | None](), 0
        for index, ((prompt, error), (settings, wrong)) in enumerate(made):
            error = too_long.get(index) or error or wrong or errors.get(index)
            source_row = unit.first_row + index
            key = f"{unit.name}#{source_row}"
            texts.append(prompt.text if prompt is not None and self._keep_prompt else None)
            characters += len(prompt.text) if prompt is not None else 0
            if error or prompt is None:
                rows.append(Row(key, index, source_row, None, error, settings))
            else:
                rows.append(Row(key, index, source_row, prompt.text, None, settings, prompt.control))
            if characters > limits.UNIT_BYTES:
                raise InputError(
                    f"{_rows_of(unit)}: their prompts are too long together: lower output.rows_per_file (or target_mb)"
                )
        if self._keep_prompt:
            columns = columns.append_column(PROMPT_COLUMN, pa.chunked_array([pa.array(texts, pa.string())]))
        return UnitData(unit, rows, columns)

    def close(self) -> None:
        """Close the open file, if any, and end the process that renders templates, if any."""
        self._prompts.close()
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _read_table(self, unit: WorkUnit) -> tuple[pa.Table, dict[int, str]]:
        """Return the columns that the job needs for the rows of the unit. Cells that are too large become null; the
        dict gives the reason for each such row, by its position in the unit."""
        try:
            if self._file is None or self._file.path != unit.file:
                self._close_file()
                self._file = RowStream(unit, self._columns)
            table = self._file.take(unit.first_row, unit.row_count)
            return table, self._file.too_long
        except (InputError, StorageError):
            self._close_file()
            raise
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            self._close_file()  # its position is unknown now
            raise InputError(f"{_rows_of(unit)}: cannot be decoded: {error_line(error)}") from error

    def _output_columns(self, unit: WorkUnit, table: pa.Table) -> tuple[pa.Table, dict[int, str]]:
        """Return the `id` column and the carried columns of the unit.

        Cells that would make a part unreadable, such as text that is not UTF-8, are replaced; the dict gives the reason
        for each row with such a cell, by its position in the unit.
        """
        names = [f"{unit.name}#{unit.first_row + i}" for i in range(table.num_rows)] if not self._id_column else []
        columns: dict[str, Any] = {"id": pa.chunked_array([pa.array(names, pa.string())])}
        errors: dict[int, str] = {}
        for target, source in [("id", self._id_column), *((name, name) for name in self._carry)]:
            if source is not None:
                columns[target], bad = _clean(text_column(table[source]) if target == "id" else table[source])
                errors |= {index: f"column '{source}' {reason}" for index, reason in bad.items()}
        return pa.table(columns), errors


def _rows_of(unit: WorkUnit) -> str:
    return f"input {safe_url(unit.file)}, rows {unit.first_row} to {unit.first_row + unit.row_count - 1}"


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
