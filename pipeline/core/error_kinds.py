"""Counts error rows by kind of error, with one example each, in bounded memory.

An error text may quote the content of a row, as exceptions of a template do. Quotations are left out here, because
these texts go to logs, metrics and `status`. The full text is in column `error` of the part.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.core.text import one_line, shorten

KINDS = 20
"""The number of kinds that are counted separately; error rows of any further kind count as OTHER."""
KIND_CHARS = 100
EXAMPLE_CHARS = 200
OTHER = "other errors"
_QUOTED = re.compile(r"""(?<!column )(?<!\w)(?:'(?:\\.|[^'\\])*(?:'|$)|"(?:\\.|[^"\\])*(?:"|$))""")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True, slots=True)
class ErrorCount:
    """The number of error rows of one kind, with an example."""

    kind: str
    """The error text with N for every number and … for every quotation, or OTHER."""
    rows: int
    example: str
    """`file#row: text` of one such row, without quotations."""


def without_quotations(text: str) -> str:
    """Return the text on one line with … in place of every quotation; quoted column names are kept."""
    return _QUOTED.sub("'…'", one_line(text))


class ErrorKinds:
    """A counter of error rows by kind. Not thread-safe."""

    def __init__(self, counts: Iterable[ErrorCount] = ()) -> None:
        self._rows: dict[str, int] = {}
        self._examples: dict[str, str] = {}
        self.merge(counts)

    def add(self, key: str, text: str) -> None:
        """Count one error row; `key` names it as `file#row`."""
        said = without_quotations(text)
        self._add(shorten(_NUMBER.sub("N", said), KIND_CHARS), 1, shorten(f"{key}: {said}", EXAMPLE_CHARS))

    def merge(self, counts: Iterable[ErrorCount]) -> None:
        """Add the counts of another replica or part."""
        for count in counts:
            self._add(count.kind, count.rows, count.example)

    def counts(self) -> tuple[ErrorCount, ...]:
        """Return the counts, the most frequent kind first."""
        ordered = sorted(self._rows.items(), key=lambda item: (-item[1], item[0]))
        return tuple(ErrorCount(kind, rows, self._examples[kind]) for kind, rows in ordered)

    def _add(self, kind: str, rows: int, example: str) -> None:
        if kind not in self._rows and len(self._rows) >= KINDS:
            kind = OTHER
        self._rows[kind] = self._rows.get(kind, 0) + rows
        self._examples.setdefault(kind, example)
