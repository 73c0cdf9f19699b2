"""Texts of error rows by kind, for people who watch a job: counts and examples, in bounded memory.

Such a text may quote what stood in a row, as an exception of a template does. What is quoted is left out here, because
these texts go to logs, metrics and `status`. The whole text stands in the part, in column `error`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

KINDS = 20
"""Kinds told apart; rows of further ones count as OTHER."""
KIND_CHARS = 100
EXAMPLE_CHARS = 200
OTHER = "other errors"
_QUOTED = re.compile(r"""(?<!column )(?<!\w)(?:'(?:\\.|[^'\\])*(?:'|$)|"(?:\\.|[^"\\])*(?:"|$))""")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True, slots=True)
class ErrorCount:
    """Error rows of one kind."""

    kind: str
    """The text without quotations and numbers."""
    rows: int
    example: str
    """`file#row: text`, without quotations."""


def without_quotations(text: str) -> str:
    """The text in one line, with … for what it quotes; names of columns are left."""
    return _QUOTED.sub("'…'", " ".join(text.split()))


class ErrorKinds:
    """Counts error rows. Not thread-safe."""

    def __init__(self, counts: Iterable[ErrorCount] = ()) -> None:
        self._rows: dict[str, int] = {}
        self._examples: dict[str, str] = {}
        self.merge(counts)

    def add(self, key: str, text: str) -> None:
        """One row; `key` is its file and row."""
        said = without_quotations(text)
        self._add(_short(_NUMBER.sub("N", said), KIND_CHARS), 1, _short(f"{key}: {said}", EXAMPLE_CHARS))

    def merge(self, counts: Iterable[ErrorCount]) -> None:
        """Those of another replica or part."""
        for count in counts:
            self._add(count.kind, count.rows, count.example)

    def counts(self) -> tuple[ErrorCount, ...]:
        """The most frequent first."""
        ordered = sorted(self._rows.items(), key=lambda item: (-item[1], item[0]))
        return tuple(ErrorCount(kind, rows, self._examples[kind]) for kind, rows in ordered)

    def _add(self, kind: str, rows: int, example: str) -> None:
        if kind not in self._rows and len(self._rows) >= KINDS:
            kind = OTHER
        self._rows[kind] = self._rows.get(kind, 0) + rows
        self._examples.setdefault(kind, example)


def _short(text: str, chars: int) -> str:
    return text if len(text) <= chars else text[: chars - 1] + "…"
