"""Formats rows of an output for a terminal or a log (`show OUTPUT`)."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len

from pipeline.core.schema import PROMPT_COLUMN
from pipeline.core.text import LINE_END, counted, number, visible
from pipeline.prompts.values import CellError

TEXT_LINES = 4
"""The lines that a prompt, a completion or an error gets, unless all of it is shown: it is shortened to the characters
that they hold. It may take a line more, as lines end between words, and Chinese text takes twice as many."""
NAME_CHARS, ID_CHARS = 20, 200
"""The most characters of the name of a column, and of an id."""
LEAST_WIDTH = 40
"""The columns that lines may have at least, however narrow the terminal is."""


def row_lines(row: Mapping[str, Any], carried: Sequence[str], width: int, *, full: bool = False) -> Iterator[str]:
    """Yield a row as lines of at most `width` terminal columns, but LEAST_WIDTH at least.

    `row` and `carried` are as in RowSearch. Prompt, completion and error are shortened in the middle to TEXT_LINES
    lines, and the values of carried columns to one. With `full` nothing is shortened, and line ends in texts end lines.
    """
    width = max(width, LEAST_WIDTH)
    place = visible(f"{row['source_file']}#{row['source_row']}")
    name = _text(row["id"], ID_CHARS)
    known = [place] if name == place else [name, place]
    yield from wrapped("  ".join([*known, _text(row["finish_reason"], ID_CHARS)]), width)
    shown = [(name, row[name], 1) for name in carried if name != PROMPT_COLUMN]
    if PROMPT_COLUMN in carried:
        shown.append((PROMPT_COLUMN, row[PROMPT_COLUMN], TEXT_LINES))
    failed = row["finish_reason"] == "error"
    if row["completion"] or not failed:
        shown.append(("completion", row["completion"], TEXT_LINES))
    shown.append(("error", row["error"], TEXT_LINES) if failed else ("stats", _statistics(row), TEXT_LINES))
    labels = [visible(name, NAME_CHARS) for name, _, _ in shown]
    indent = max(map(len, labels)) + 4
    for label, (_, value, lines) in zip(labels, shown, strict=True):
        text = _text(value, None if full else lines * (width - indent))
        begin = f"  {label}".ljust(indent)
        for line in wrapped(text, width - indent, at_line_ends=full):
            yield f"{begin}{line}".rstrip()
            begin = " " * indent


def _text(value: Any, chars: int | None) -> str:
    """Return a value of a cell as visible text of at most `chars` characters."""
    if value == "":
        return "(empty)"
    if isinstance(value, CellError):
        return visible(f"({value.reason})", chars)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if value is None or isinstance(value, bool | int | float | list | dict):
        value = json.dumps(value, ensure_ascii=False, default=str)
    return visible(str(value), chars)


def _statistics(row: Mapping[str, Any]) -> str:
    """Return the statistics of a row without an error, such as `35 tokens, 9 forwards, 3.89 tokens/forward, 0.53 s,
    attempt 1`. In mode `ar`, which has no denoiser forwards, the mode stands in their place."""
    forwards = [f"mode {row['mode']}"]
    if row["denoiser_forwards"]:
        forwards = [
            counted(row["denoiser_forwards"], "forward"),
            f"{number(row['tokens_per_forward'])} tokens/forward",
        ]
    tokens = counted(row["completion_tokens"], "token")
    return ", ".join([tokens, *forwards, f"{number(row['latency_s'])} s", f"attempt {row['attempt']}"])


def wrapped(text: str, width: int, *, at_line_ends: bool = False) -> Iterator[str]:
    """Yield a visible text as lines of at most `width` terminal columns. A line ends after a blank if it has one, else
    anywhere; with `at_line_ends` also after each LINE_END."""
    start = columns = blank = 0  # `blank`: the position after the last blank of the line
    for position, character in enumerate(text):
        size = 1 if character.isascii() else cell_len(character)  # the same, but faster
        if columns + size > width:
            end = blank or position
            yield text[start:end]
            start, columns, blank = end, cell_len(text[end:position]), 0
        columns += size
        if character == " ":
            blank = position + 1
        if at_line_ends and character == LINE_END:
            yield text[start : position + 1]
            start, columns, blank = position + 1, 0, 0
    if start < len(text):
        yield text[start:]
