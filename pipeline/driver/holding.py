"""Keeps what one replica holds, and decides whether it needs more work to keep its engine full.

It counts rows, not units: a unit may have one row or 10,000, and an engine is full if enough rows wait for its slots.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.core.events import UnitProgress
from pipeline.core.types import Assignment, WorkKey

ROWS_AHEAD = 4
"""The number of rows that are left to do on a replica while there is enough work, in multiples of the engine's row
limit: one for the rows in slots, two for the reserve that waits in the engine (workers.units.runner.QUEUE_FACTOR), and
one for the rows that are being read and for those that ended since the last report."""
UNITS_AHEAD = 2
"""The number of units that a replica holds even if the first one has more rows than that: the next unit is then read
and tokenised while the first one is in the engine. It is also the most units for a replica whose row limit is not
known."""
MOST_UNITS = 256
"""The maximum number of units that a replica holds. Each of them costs some kilobytes beside its rows, a look in each
turn of the runner and a line in its reports. Units of 4 rows keep an engine of 256 rows full with all its reserves, and
units of one row still fill its slots."""
FINISHED_UNITS = 2
"""The number of largest units whose finished rows a replica may keep in memory until their parts are published; while
it keeps more, as during an outage of the storage, it gets no work beyond UNITS_AHEAD units. For small units the limit
is ROWS_AHEAD times the row limit."""


@dataclass(frozen=True, slots=True)
class Supply:
    """The work that waits to be handed out."""

    units: int
    replicas: int
    """The number of ready replicas that share the work."""
    rows: int
    """The rows of all waiting units."""
    largest: int
    """The rows of the largest unit of the job."""

    def needed(self, least: int, most: int) -> int:
        """Return the number of rows that a replica needs, at least `least` and at most `most`.

        It is `most` until twice as many rows for every replica do not wait any more, and falls with them from then on.
        Slower replicas therefore hold few rows when the faster ones run out of work.
        """
        return most if self.replicas == 1 else max(least, min(most, self.rows // (2 * self.replicas)))


@dataclass(slots=True)
class HeldWork:
    """An assignment that a replica holds, and what the replica has reported about it."""

    work: Assignment
    left: int
    """The rows that are not finished yet."""
    begun: bool = False
    """Whether rows of it may have been in slots of the engine (UnitProgress.begun)."""
    tokens: int = 0
    """The completion tokens that the replica has generated for it, as last reported."""


class Holding:
    """The work that one ready replica holds, in the order in which it was given."""

    def __init__(self, max_rows: int) -> None:
        """Begin with no work. `max_rows`: the row limit of the replica's engine, or 0 if it is not known."""
        self._max_rows, self._most = max_rows, ROWS_AHEAD * max_rows
        self._held: dict[WorkKey, HeldWork] = {}
        self.proven = False
        """Whether the replica has generated a row or a control. Only then does it get suspects."""
        self.generated = 0
        """The rows that the replica has generated, as last reported (ReplicaStats.rows without its errors)."""
        self._rows = 0  # of all held work, finished rows included
        self.left = 0
        """The rows of all held work that are not finished yet."""
        self.unit_rows = 0
        """The rows of the whole units among the held work, finished rows included."""

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[HeldWork]:
        return iter(self._held.values())

    @property
    def suspect(self) -> bool:
        """Return whether the replica holds a suspect, which is then all that it holds."""
        return len(self._held) == 1 and next(iter(self._held.values())).work.suspect

    @property
    def only_control(self) -> bool:
        """Return whether the replica holds a control, which is then all that it holds."""
        return len(self._held) == 1 and next(iter(self._held.values())).work.control

    def get(self, key: WorkKey) -> HeldWork | None:
        """Return the held work with this key, or None."""
        return self._held.get(key)

    def give(self, work: Assignment) -> None:
        """Add work of which nothing is done yet, as far as is known."""
        rows = _rows(work)
        self._held[work.key] = HeldWork(work, rows)
        self._count(work, rows, rows)

    def pop(self, key: WorkKey) -> Assignment | None:
        """Remove the work with this key and return it; None if the replica does not hold it."""
        if (held := self._held.pop(key, None)) is None:
            return None
        self._count(held.work, -_rows(held.work), -held.left)
        return held.work

    def pop_unit(self, unit_id: str) -> None:
        """Remove all work of a unit, whole or in ranges."""
        for key in [key for key in self._held if key[0] == unit_id]:
            self.pop(key)

    def report(self, progress: UnitProgress) -> bool:
        """Record a report on held work. Return whether tokens of it were generated since the last report."""
        held = self._held[progress.key]
        left = _rows(held.work) - progress.rows
        self.left += left - held.left
        held.left, held.begun = left, held.begun or progress.begun
        before, held.tokens = held.tokens, progress.tokens - progress.kept_tokens
        return held.tokens > before

    def wants_more(self, supply: Supply) -> bool:
        """Return whether the replica is to get one more unit, beside what it holds, if this is what waits.

        It gets one while fewer rows are left on it than its engine needs. At the end of the job this number falls to
        the row limit, so that no row waits here while another replica has nothing to do. For the same reason a second
        unit is read in advance only while at least as many units wait as there are replicas.
        """
        count = len(self._held)
        if count < UNITS_AHEAD and (supply.units >= supply.replicas or not self._max_rows):
            return True
        if self.left >= self._most:  # the usual case, if there is enough work
            return False
        finished = self._rows - self.left
        few = self.left < supply.needed(self._max_rows, self._most)
        return few and count < MOST_UNITS and finished < max(self._most, FINISHED_UNITS * supply.largest)

    def _count(self, work: Assignment, rows: int, left: int) -> None:
        self._rows += rows
        self.left += left
        if work.rows is None:
            self.unit_rows += rows


def _rows(work: Assignment) -> int:
    first, end = work.span
    return end - first
