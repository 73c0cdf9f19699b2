"""Records what one fault did to a job, and counts it by fault for the table of the suite."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.chaos.check import WrongRows

HEADS = ("fault", "tried", "survived", "lost", "doubled", "changed", "condemned")
"""The columns of the table. The last four count rows; condemned are healthy rows that became error rows."""


@dataclass(slots=True)
class Record:
    """What one fault, or several of one kind, did to the jobs that they hit."""

    fault: str
    tried: int = 0
    """The number of faults."""
    survived: int = 0
    """The number of faults after which every row was right and every promise was kept."""
    lost: int = 0
    doubled: int = 0
    changed: int = 0
    condemned: int = 0
    """The number of healthy rows that became error rows."""
    said: list[str] = field(default_factory=list)
    """One text for each broken promise, and for each state in which submitting again did not help."""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Return True if all faults were survived, and no row is wrong."""
        return self.tried == self.survived and not any((self.lost, self.doubled, self.changed, self.condemned))

    def add_rows(self, wrong: WrongRows) -> None:
        """Count the wrong rows of one output."""
        self.lost += len(wrong.lost)
        self.doubled += len(wrong.doubled)
        self.changed += len(wrong.changed)
        self.condemned += len(wrong.condemned)

    def cells(self) -> tuple[object, ...]:
        """Return the values of the columns HEADS."""
        return self.fault, self.tried, self.survived, self.lost, self.doubled, self.changed, self.condemned

    def __add__(self, other: "Record") -> "Record":
        names = ("tried", "survived", "lost", "doubled", "changed", "condemned", "said", "seconds")
        return Record(self.fault, **{name: getattr(self, name) + getattr(other, name) for name in names})


def by_fault(records: Iterable[Record]) -> list[Record]:
    """Return the sum of the records of each fault, in the order in which the faults first come."""
    found: dict[str, Record] = {}
    for record in records:
        found[record.fault] = found[record.fault] + record if record.fault in found else record
    return list(found.values())


def table(records: Iterable[Record]) -> str:
    """Return the table of the records, one line for each."""
    lines = [HEADS, *(record.cells() for record in records)]
    widths = [max(len(str(line[column])) for line in lines) for column in range(len(HEADS))]
    return "\n".join(
        "  ".join(
            f"{cell!s:<{width}}" if column == 0 else f"{cell!s:>{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def as_json(records: Iterable[Record]) -> list[dict[str, object]]:
    """Return the table in the form of tests/chaos/out/chaos.json."""
    return [dict(zip(HEADS, record.cells(), strict=True)) for record in records]
