"""Converts cells of Arrow columns to Python values, and gives the reason why a cell or a text cannot be used."""

from typing import Any

import pyarrow as pa

from pipeline.core.text import one_line, shorten

MAX_ERROR_CHARS = 300
"""The most characters of an exception's text in the error text of a row."""
MAX_PROMPT_CHARS = 16_000_000
"""The most characters of a prompt: far more than any context holds. A longer one makes its row an error row."""

Prompt = tuple[str | None, str | None]
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
        return CellError(f"holds a value that cannot be read: {error_line(error)}")


def error_line(error: BaseException) -> str:
    """Return the error's text, or the name of its type if it has none, as one line that can be encoded as UTF-8. It is
    cut off after MAX_ERROR_CHARS characters."""
    text = one_line(error) or type(error).__name__
    text = text.encode("utf-8", "backslashreplace").decode()  # the text may contain a lone surrogate
    return shorten(text, MAX_ERROR_CHARS)


def judge(prompt: str | None) -> Prompt:
    """Return (prompt, None) if the text can be a prompt, else (None, reason): it is null, empty, too long or not
    Unicode."""
    if prompt is None:
        return None, "prompt is null"
    if prompt == "":
        return None, "prompt is empty"
    if len(prompt) > MAX_PROMPT_CHARS:
        return None, f"prompt has {len(prompt)} characters or more, above the limit of {MAX_PROMPT_CHARS}"
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return None, "prompt holds characters that are not Unicode text (lone surrogate)"
    return prompt, None
