"""Converts cells of Arrow columns to Python values, and says what is wrong with bad cells and bad prompts."""

from typing import Any

import pyarrow as pa

from pipeline.core.text import one_line, shorten

MAX_ERROR_CHARS = 300
MAX_PROMPT_CHARS = 16_000_000
"""The most characters of a prompt, far more than any context holds."""

Prompt = tuple[str | None, str | None]
"""(prompt, None), or (None, reason) if there is no prompt."""


class CellError:
    """A cell that cannot become a Python value; `reason` says why."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def read_cells(column: "pa.ChunkedArray[Any]") -> list[Any]:
    """Return the column as Python values; a CellError stands for a cell that Python cannot hold.

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
    """Return the error's text in one line of at most MAX_ERROR_CHARS characters that can be encoded as UTF-8."""
    text = one_line(error) or type(error).__name__
    text = text.encode("utf-8", "backslashreplace").decode()  # the text may contain a lone surrogate
    return shorten(text, MAX_ERROR_CHARS)


def judge(prompt: str | None) -> Prompt:
    """Return the prompt, or the reason why the text cannot be one."""
    if prompt is None:
        return None, "prompt is null"
    if prompt == "":
        return None, "prompt is empty"
    if len(prompt) > MAX_PROMPT_CHARS:
        return None, f"prompt has {len(prompt)} characters or more, above the {MAX_PROMPT_CHARS} of any prompt"
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return None, "prompt holds characters that are not Unicode text (lone surrogate)"
    return prompt, None
