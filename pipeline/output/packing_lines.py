"""Converts the units of a plan to the lines that plan.json holds, and back.

A line is one unit. It names files by their position in the plan's list of files, from 0: `7` for the whole of a file,
`7-9` for three whole files one after the other, and `7:100+50` for 50 rows from row 100 on.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from pipeline.core.types import WorkUnit
from pipeline.planning.packing import Packing, Span

_PIECE = re.compile(r"(?P<file>\d+)(?:-(?P<last>\d+)|:(?P<first>\d+)\+(?P<rows>\d+))?")


def to_lines(units: Sequence[WorkUnit], files: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return a line for each unit. `files`: the position and the number of rows of each file, by its name."""
    return [" ".join(_words(unit, files)) for unit in units]


def from_lines(lines: Sequence[str], files: Sequence[tuple[str, int]]) -> Packing:
    """Return the units in these lines. `files`: name and number of rows of each file of the plan.

    Raises ValueError if a line cannot be read, names no rows or names a file twice, or if the units together do not
    hold every row once.
    """
    packing = [tuple(_spans(line, files)) for line in lines]
    ends = dict.fromkeys((name for name, _ in files), 0)
    for span in sorted(chain.from_iterable(packing)):
        if span.first_row != ends[span.file]:
            raise ValueError(f"its units do not hold each row of {span.file} once")
        ends[span.file] += span.rows
    if missing := next((name for name, rows in files if ends[name] != rows), None):
        raise ValueError(f"its units do not hold each row of {missing} once")
    for line, spans in zip(lines, packing, strict=True):
        if not all(span.rows for span in spans) or not 0 < len(spans) == len({span.file for span in spans}):
            raise ValueError(f"its unit {line[:60]!r} has no rows of a file, or names a file twice")
    return packing


def _words(unit: WorkUnit, files: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    first = last = -1  # the whole files that are collected, as a range of positions
    for piece in unit.pieces:
        number, rows = files[piece.name]
        whole = piece.row_count == rows
        if whole and first >= 0 and number == last + 1:
            last = number
            continue
        if first >= 0:
            yield f"{first}-{last}" if last > first else f"{first}"
        first, last = (number, number) if whole else (-1, -1)
        if not whole:
            yield f"{number}:{piece.first_row}+{piece.row_count}"
    if first >= 0:
        yield f"{first}-{last}" if last > first else f"{first}"


def _spans(line: str, files: Sequence[tuple[str, int]]) -> Iterator[Span]:
    words = line.split(" ")
    for word in words:
        match = _PIECE.fullmatch(word)
        last = int(match["last"] or match["file"]) if match else len(files)
        if match is None or last >= len(files):
            raise ValueError(f"its unit {line[:60]!r} cannot be read")
        if match["first"] is not None:
            yield Span(files[last][0], int(match["first"]), int(match["rows"]))
        else:
            yield from (Span(name, 0, rows) for name, rows in files[int(match["file"]) : last + 1])
