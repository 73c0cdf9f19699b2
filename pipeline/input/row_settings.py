"""Reads the generation settings of single rows from input columns (`input.row_settings`).

This module decides which column types can hold a setting; model.requests decides which values are allowed.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from model.errors import RequestError
from model.requests import MAX_STOPS, GenerationParams
from pipeline.core.schema import is_text, plain_type
from pipeline.core.types import RowSetting
from pipeline.prompts.values import CellError, error_line, read_cells

_WHOLE = ("max_new_tokens", "seed")

Settings = tuple[RowSetting, ...]
"""The settings that one row has of its own; empty if the job's settings apply."""


def misfit(setting: str, kind: pa.DataType) -> str | None:
    """Return None if a column of type `kind` can hold the setting, else the needed kind of column as a text."""
    whole = pa.types.is_integer(plain_type(kind))
    if setting in _WHOLE:
        return None if whole else "an integer column"
    if setting == "stop":
        return None if is_text(kind) or _holds_texts(plain_type(kind)) else "a string column or one of lists of strings"
    return None if whole or pa.types.is_floating(plain_type(kind)) else "an integer or float column"


def read_settings(table: pa.Table, columns: Mapping[str, str]) -> list[tuple[Settings, str | None]]:
    """Return for each row of the table (its settings, None), or ((), the reason) if the value of a cell is impossible.

    `columns` maps each setting to its column, whose type must be suitable (see misfit). A null cell gives no setting,
    so the job's value applies. Rows with the same settings share one object.
    """
    if not columns:
        return [((), None)] * table.num_rows
    shared: dict[Settings, Settings] = {}
    rows: list[tuple[Settings, str | None]] = []
    for found in zip(*(_judge(name, column, table[column]) for name, column in columns.items()), strict=True):
        wrong = next((text for text in found if isinstance(text, str)), None)
        settings = tuple(setting for setting in found if isinstance(setting, RowSetting)) if wrong is None else ()
        rows.append((shared.setdefault(settings, settings), wrong))
    return rows


def with_settings(params: GenerationParams, settings: Settings) -> GenerationParams:
    """Return the job's generation settings, `params`, with the settings of a row in place of the job's."""
    values: dict[str, Any] = {setting.name: setting.value for setting in settings}
    return replace(params, **values) if values else params


def _holds_texts(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    return is_text(kind.value_type) or pa.types.is_null(kind.value_type)  # null: all lists of a file are empty


def _judge(name: str, column: str, cells: "pa.ChunkedArray[Any]") -> list[RowSetting | str | None]:
    """Return for each cell its setting, a text about what is wrong with its value, or None if the cell is null."""
    known: dict[Any, RowSetting | str | None] = {None: None}
    found: list[RowSetting | str | None] = []
    for value in _values(cells):
        if isinstance(value, CellError):
            found.append(f"column '{column}' {value.reason}")
            continue
        if value not in known:
            known[value] = _check(RowSetting(name, column, value))
        found.append(known[value])
    return found


def _values(column: "pa.ChunkedArray[Any]") -> list[Any]:
    """Return the cells as hashable Python values; a string becomes a list of one.

    Lists are cut to MAX_STOPS + 1 strings, which is enough to notice that there are too many.
    """
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        short: Any = pc.list_slice(column, 0, MAX_STOPS + 1, return_fixed_size_list=False)
        return [tuple(cell) if isinstance(cell, list) else cell for cell in read_cells(short)]
    return [(cell,) if isinstance(cell, str) else cell for cell in read_cells(column)]


def _check(setting: RowSetting) -> RowSetting | str:
    """Return the setting, or a text that says what is wrong with its value."""
    values: dict[str, Any] = {setting.name: setting.value}
    try:
        GenerationParams(**values)
    except RequestError as error:
        return f"column '{setting.column}': {error_line(error)}"
    return setting
