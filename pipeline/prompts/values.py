"""Converts cells of Arrow columns to Python values, and gives the reason why a cell or a text cannot be used."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.core.text import one_line, shorten

MAX_ERROR_CHARS = 300
"""The most characters of an exception's text in the error text of a row."""
MAX_PROMPT_CHARS = 16_000_000
"""The most characters of a prompt: far more than any context holds. A longer one makes its row an error row."""


class Prompt(NamedTuple):
    """The prompt of a row."""

    text: str
    """The text, in which control tokens are spelled out."""
    control: tuple[tuple[int, int], ...] = ()
    """The ranges of characters (start, end) that are control tokens, in ascending order."""


def with_brackets(text: str, control: Iterable[tuple[int, int]]) -> str:
    """Return the text of a prompt with ⟦ and ⟧ around each control token, for people to read."""
    pieces, end = [], 0
    for start, stop in control:
        pieces += [text[end:start], "⟦", text[start:stop], "⟧"]
        end = stop
    return "".join(pieces) + text[end:]


Outcome = tuple[Prompt, None] | tuple[None, str]
"""The outcome for one row: (prompt, None), or (None, reason) if the row has no usable prompt."""


class CellError:
    """Stands in a list of values for a cell that cannot become a Python value; it is not an exception.

    `reason` says why, and reads on after the name of the column.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason


def read_cells(column: "pa.ChunkedArray[Any]") -> list[Any]:
    """Return the cells of a column as Python values: None for null, and a CellError for a cell that Python cannot hold.

    Such cells are text that is not UTF-8, or a date in the year 99999.
    """
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # UnicodeDecodeError is a ValueError
        return [_read_cell(scalar) for scalar in column]


def _read_cell(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return CellError(f"holds bytes that are not UTF-8 (byte {error.start})")
    except (ValueError, OverflowError) as error:
        if "Nanosecond" in str(error):
            return CellError("holds a time with nanoseconds: make them microseconds")
        return CellError(f"holds a value that cannot be read: {error_line(error)}")


def error_line(error: BaseException) -> str:
    """Return the error's text, or the name of its type if it has none, as one line that can be encoded as UTF-8. It is
    cut off after MAX_ERROR_CHARS characters."""
    text = one_line(error) or type(error).__name__
    text = text.encode("utf-8", "backslashreplace").decode()  # the text may contain a lone surrogate
    return shorten(text, MAX_ERROR_CHARS)


NOT_UNICODE = "prompt holds characters that are not Unicode text (lone surrogate)"


def flaw_of(text: str) -> str | None:
    """Return the reason why a text that can be encoded as UTF-8 cannot be a prompt; None if it can."""
    if not text:
        return "prompt is empty"
    if len(text) > MAX_PROMPT_CHARS:
        return f"prompt has {len(text)} characters or more, above the limit of {MAX_PROMPT_CHARS}"
    return None


def text_column(column: "pa.ChunkedArray[Any]") -> "pa.ChunkedArray[Any]":
    """Return a binary column as one of strings, and any other column as it is. Nothing is checked or copied: a cell may
    hold bytes that are not UTF-8, as a string column may too (see read_cells)."""
    if pa.types.is_large_binary(column.type) or pa.types.is_binary_view(column.type):
        column = column.cast(pa.binary())
    if not pa.types.is_binary(column.type):
        return column
    return pa.chunked_array([chunk.view(pa.string()) for chunk in column.chunks], pa.string())
