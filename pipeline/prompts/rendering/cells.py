"""Makes the values that templates work with of the cells of Arrow columns. Only the process that renders templates uses
this module.

Nulls become objects of pipeline.prompts.rendering.nulls, binary values become text, lists, structs and maps print as
JSON, and 32-bit floats print with their own digits. All other values are those of pyarrow, and print as Python prints
them.
"""

import json
from collections.abc import Callable, ItemsView, KeysView, ValuesView
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np
import pyarrow as pa
from jinja2 import Undefined

from pipeline.core.schema import is_text, plain_type, text_type
from pipeline.prompts.rendering.marks import escape_all, may_hold_marks
from pipeline.prompts.rendering.nulls import Null
from pipeline.prompts.values import CellError, read_cells, text_column

Convert = Callable[[Any, str], Any]
"""A function that converts a value other than null; its arguments are the value and its path inside the cell."""


HAVE_TEXT = (str, int, float, Decimal, date, time, timedelta, UUID)
"""The types of values whose str() is their text in a prompt."""
LISTS = (list, tuple, dict, range, set, KeysView, ValuesView, ItemsView)
"""The types of values whose text is JSON."""


def no_text(value: Any) -> TypeError:
    """Return the error about a value that has no text of its own, such as a function."""
    return TypeError(f"an expression prints a {type(value).__name__}: it has no text; a filter may need `| list`")


class ListCell(list[Any]):
    """A list from a cell. Its text is JSON."""

    def __str__(self) -> str:
        return to_json(self)


class StructCell(dict[Any, Any]):
    """A struct or a map from a cell. Its text is JSON."""

    def __str__(self) -> str:
        return to_json(self)


# Errors of a template name the types of its values, and users read them.
ListCell.__name__, StructCell.__name__ = "list", "struct"
ListCell.__module__ = StructCell.__module__ = "builtins"


def to_json(
    value: Any,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
    ensure_ascii: bool = False,
) -> str:
    """Return the value as JSON (the filter `tojson`): not escaped for HTML or ASCII, keys in the order of the input.

    Nulls become `null`, NaN becomes `NaN`, and values that JSON does not have, such as dates, become their text. Raises
    UndefinedError if there is an undefined name among the values.
    """
    return json.dumps(
        value,
        default=_json_value,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
        ensure_ascii=ensure_ascii,
    )


def to_chat_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return the value as JSON, as `to_json` does. The filter `tojson` of chat templates is this one: its parameters
    have the order that the transformers library gives them."""
    return to_json(value, indent, separators, sort_keys, ensure_ascii)


def _json_value(value: Any) -> Any:
    if isinstance(value, Null):
        return None
    if isinstance(value, Undefined):  # its text is empty in a chat template, which would hide a wrong name
        value._fail_with_undefined_error()
    if hasattr(value, "__next__") or isinstance(value, LISTS):  # the result of a filter such as `map`, or of `keys()`
        return list(value)
    if isinstance(value, HAVE_TEXT):
        return str(value)
    raise no_text(value)


def _is_plain(kind: pa.DataType) -> bool:
    """Return whether values of this type are never texts."""
    return bool(pa.types.is_primitive(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind))


def _stored_texts(column: "pa.ChunkedArray[Any]") -> "pa.ChunkedArray[Any]":
    """Return a column of an extension type that stores texts, such as JSON, as a column of strings."""
    kind: Any = column.type
    if not isinstance(kind, pa.BaseExtensionType) or not is_text(text_type(kind.storage_type)):
        return column
    chunks: Any = column.chunks
    stored: Any = pa.chunked_array([chunk.storage for chunk in chunks])
    return text_column(stored.cast(plain_type(kind.storage_type)))


def _data_of(array: "pa.Array[Any]") -> bytes:
    """Return the bytes of the texts of a string array, and those around them in the same buffer."""
    data = array.buffers()[2]
    return b"" if data is None else data.to_pybytes()


class CellReader:
    """Reads the columns of a batch as values for templates."""

    def __init__(self, null: type[Null], escape: bool) -> None:
        """Take the class of nulls, and whether characters that could be taken for marks are escaped in texts."""
        self._null, self._escape = null, escape

    def read(self, name: str, column: "pa.ChunkedArray[Any]") -> list[Any]:
        """Return the values of a column. A cell that cannot be read is a CellError."""
        column = text_column(_stored_texts(column))
        if pa.types.is_float32(column.type):  # 0.1 must not become 0.10000000149011612
            column = column.cast(pa.string()).cast(pa.float64())
        cells = read_cells(column)
        convert = self._converter(name, column.type)
        if convert is not None and pa.types.is_string(column.type):
            # Texts are converted only to escape them.
            convert = convert if any(may_hold_marks(_data_of(chunk)) for chunk in column.chunks) else None
        if convert is None:
            if column.null_count == 0:
                return cells
            null = self._null(name)
            return [null if cell is None else cell for cell in cells]
        return [self._whole(name, cell, convert) for cell in cells]

    def _whole(self, name: str, cell: Any, convert: Convert) -> Any:
        if cell is None:
            return self._null(name)
        if isinstance(cell, CellError):
            return cell
        try:
            return convert(cell, "")
        except UnicodeDecodeError as error:
            return CellError(f"holds bytes that are not UTF-8 (byte {error.start})")

    def _converter(self, name: str, kind: pa.DataType) -> Convert | None:
        """Return the function that converts values of this type in column `name`; None if they stay as they are."""
        kind = plain_type(kind)
        if pa.types.is_struct(kind):
            return self._struct(name, {field.name: self._converter(name, field.type) for field in kind})
        if pa.types.is_map(kind):
            return self._map(name, self._converter(name, kind.item_type), self._converter(name, kind.key_type))
        if isinstance(kind, pa.BaseExtensionType):
            return self._converter(name, kind.storage_type)
        if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            return self._list(name, self._converter(name, kind.value_type))
        if pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
            return lambda value, _: escape_all(value.decode()) if self._escape else value.decode()
        if pa.types.is_float32(kind) or pa.types.is_float16(kind):
            number = np.float32 if pa.types.is_float32(kind) else np.float16
            return lambda value, _: float(str(number(value)))
        if self._escape and not _is_plain(kind):
            return lambda value, _: escape_all(value) if isinstance(value, str) else value
        return None

    def _item(self, name: str, value: Any, convert: Convert | None, place: str) -> Any:
        if value is None:
            return self._null(name, place)
        return value if convert is None else convert(value, place)

    def _struct(self, name: str, converters: dict[str, Convert | None]) -> Convert:
        def convert(value: dict[str, Any], place: str) -> StructCell:
            return StructCell(
                {
                    escape_all(key) if self._escape else key: self._item(name, item, converters[key], f"{place}.{key}")
                    for key, item in value.items()
                }
            )

        return convert

    def _map(self, name: str, inner: Convert | None, keys: Convert | None) -> Convert:
        def convert(value: list[tuple[Any, Any]], place: str) -> StructCell:
            cell = StructCell()
            for key, item in value:
                known = key if keys is None else keys(key, place)
                known = known if isinstance(known, str | int | float) else str(known)
                cell[known] = self._item(name, item, inner, f"{place}[{known!r}]")
            return cell

        return convert

    def _list(self, name: str, inner: Convert | None) -> Convert:
        def convert(value: list[Any], place: str) -> ListCell:
            return ListCell(self._item(name, item, inner, f"{place}[{i}]") for i, item in enumerate(value))

        return convert
