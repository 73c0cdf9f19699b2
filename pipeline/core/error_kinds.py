"""Counts error rows by kind of error, with one example for each kind, in bounded memory.

An error text may quote the content of a row, as exceptions of a template do. Quotations are left out here, because
the counts go to logs, metrics and `status`. The full text is in column `error` of the part.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from pipeline.core.text import one_line, shorten

KINDS = 20
"""The number of kinds that are counted separately; error rows of any further kind count as OTHER."""
KIND_CHARS = 100
"""The most characters in the text of a kind; a longer text is cut off."""
EXAMPLE_CHARS = 200
"""The most characters in an example; a longer one is cut off."""
OTHER = "other errors"
_QUOTED = re.compile(r"""(?<!column )(?<!\w)(?:'(?:\\.|[^'\\])*(?:'|$)|"(?:\\.|[^"\\])*(?:"|$))""")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True, slots=True)
class ErrorCount:
    """The number of error rows of one kind, with an example."""

    kind: str
    """The error text of such rows, with N in place of each number and '…' in place of each quotation except names of
    columns, cut off at KIND_CHARS characters; or OTHER."""
    rows: int
    """The number of error rows of this kind."""
    example: str
    """The first such row as `file#row: text`, with '…' in place of each quotation in the text except names of columns.
    It is cut off at EXAMPLE_CHARS characters."""


def without_quotations(text: str) -> str:
    """Return the text on one line, with … between the quotation marks of each quotation.

    A quotation after the word `column` is the name of a column and is kept.
    """
    return _QUOTED.sub("'…'", one_line(text))


def without_numbers(text: str) -> str:
    """Return the text with N in place of each number, so that texts about different rows are equal."""
    return _NUMBER.sub("N", text)


class ErrorKinds:
    """A counter of error rows by kind, for one replica, part or job. Not thread-safe."""

    def __init__(self, counts: Iterable[ErrorCount] = ()) -> None:
        self._rows: dict[str, int] = {}
        self._examples: dict[str, str] = {}
        self.merge(counts)

    def add(self, key: str, text: str) -> None:
        """Count one error row with the text of its error. `key` is its row key, `file#row`."""
        said = without_quotations(text)
        self._add(shorten(without_numbers(said), KIND_CHARS), 1, shorten(f"{key}: {said}", EXAMPLE_CHARS))

    def merge(self, counts: Iterable[ErrorCount]) -> None:
        """Add other counts to these, such as those of another replica or part. Existing examples are kept."""
        for count in counts:
            self._add(count.kind, count.rows, count.example)

    def counts(self) -> tuple[ErrorCount, ...]:
        """Return the count of each kind, the most frequent kind first, OTHER in its place among them."""
        ordered = sorted(self._rows.items(), key=lambda item: (-item[1], item[0]))
        return tuple(ErrorCount(kind, rows, self._examples[kind]) for kind, rows in ordered)

    def _add(self, kind: str, rows: int, example: str) -> None:
        if kind not in self._rows and len(self._rows) >= KINDS:
            kind = OTHER
        self._rows[kind] = self._rows.get(kind, 0) + rows
        self._examples.setdefault(kind, example)
