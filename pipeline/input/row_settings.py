"""Settings that a row brings along (`input.row_settings`): which column types can hold them, and what the cells say.

Which values are possible is model.requests' to say.
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
from pipeline.prompts.values import CellError, one_line, read_cells

_WHOLE = ("max_new_tokens", "seed")

Settings = tuple[RowSetting, ...]


def misfit(setting: str, kind: pa.DataType) -> str | None:
    """What the column of this setting must be, where one of this type cannot hold it."""
    whole = pa.types.is_integer(plain_type(kind))
    if setting in _WHOLE:
        return None if whole else "an integer column"
    if setting == "stop":
        return None if is_text(kind) or _holds_texts(plain_type(kind)) else "a string column or one of lists of strings"
    return None if whole or pa.types.is_floating(plain_type(kind)) else "an integer or float column"


def read_settings(table: pa.Table, columns: Mapping[str, str]) -> list[tuple[Settings, str | None]]:
    """For each row of a table that has the columns: (its settings, None), or ((), what is wrong with a cell).

    `columns`: column by setting; each fits (see misfit). Rows with the same settings share one object.
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
    """The job's settings with those of a row."""
    values: dict[str, Any] = {setting.name: setting.value for setting in settings}
    return replace(params, **values) if values else params


def _holds_texts(kind: pa.DataType) -> bool:
    if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind)):
        return False
    return is_text(kind.value_type) or pa.types.is_null(kind.value_type)  # null: all lists of one file are empty


def _judge(name: str, column: str, cells: "pa.ChunkedArray[Any]") -> list[RowSetting | str | None]:
    """For each cell: the setting, what is wrong with it, or None for null."""
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
    """Python values that can be keys of a dict; of a list one string more than may be, however many it has."""
    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        short: Any = pc.list_slice(column, 0, MAX_STOPS + 1, return_fixed_size_list=False)
        return [tuple(cell) if isinstance(cell, list) else cell for cell in read_cells(short)]
    return [(cell,) if isinstance(cell, str) else cell for cell in read_cells(column)]


def _check(setting: RowSetting) -> RowSetting | str:
    """The setting, or what is wrong with its value."""
    values: dict[str, Any] = {setting.name: setting.value}
    try:
        GenerationParams(**values)
    except RequestError as error:
        return f"column '{setting.column}': {one_line(error)}"
    return setting
