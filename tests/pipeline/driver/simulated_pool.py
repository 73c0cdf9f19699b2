"""Simulates a pool without replicas: rows are finished, flushed, or lost together with their replica, all by chance."""

import random
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from pipeline.core.events import Event, RangeDone, ReplicaLost, ReplicaReady, UnitDone, UnitFailed, UnitProgress
from pipeline.core.types import Assignment, Totals, UnitResult, WorkKey, WorkUnit
from pipeline.driver.holding import MOST_UNITS, UNITS_AHEAD
from tests.pipeline.cases import one_piece


def make_units(count: int, rows: int = 10) -> list[WorkUnit]:
    return [one_piece(f"u{i}", "/in/a.parquet", "a.parquet", i * rows, rows) for i in range(count)]


def result_of(unit: WorkUnit, replica: str, attempt: int, errors: int = 0) -> UnitResult:
    totals = Totals(rows=unit.row_count, ok=unit.row_count - errors, errors=errors)
    return UnitResult(unit.id, totals, 1.0, "0" * 64, replica, attempt)


@dataclass
class Life:
    """The state of a replica."""

    held: list[Assignment] = field(default_factory=list)
    finished: dict[str, set[int]] = field(default_factory=dict)
    """The finished rows that are not flushed yet, by unit."""
    announced: set[WorkKey] = field(default_factory=set)
    """The keys of the assignments that were reported as begun."""


class SimulatedPool:
    """A pool whose replicas finish rows in any order. A row in `killers` ends its replica, whose rows since its last
    flush are lost.

    At each turn a replica is lost with the chance faults / 3 (half of these losses are excused), and its work fails
    with the chance faults / 6. Every assignment is checked: it overlaps with no other, and a suspect is alone.
    """

    def __init__(
        self,
        replicas: int,
        seed: int,
        killers: Set[tuple[str, int]] = frozenset(),
        faults: float = 0,
        max_rows: int = 0,
    ) -> None:
        self.random, self.killers, self.faults, self.max_rows = random.Random(seed), killers, faults, max_rows
        self.lives: dict[str, Life] = {}
        self.segments: dict[str, set[int]] = {}
        self.condemned: dict[str, set[int]] = {}
        self.published: dict[str, int] = {}
        """The number of times that each unit was published."""
        self.kills: dict[tuple[str, int], int] = {}
        self.assigned: list[tuple[str, Assignment]] = []
        self.started = 0
        self.events: list[Event] = []
        for _ in range(replicas):
            self._start()

    def _start(self) -> None:
        self.started += 1
        self.lives[f"r{self.started}"] = Life()
        self.events.append(ReplicaReady(f"r{self.started}", self.max_rows))

    def assign(self, replica: str, work: Assignment) -> None:
        self.assigned.append((replica, work))
        for life in self.lives.values():
            for other in life.held:
                assert not (rows_of(other) & rows_of(work) and other.unit.id == work.unit.id)
        held = self.lives[replica].held
        held.append(work)
        assert len(held) <= (MOST_UNITS if self.max_rows else UNITS_AHEAD)
        assert len(held) == 1 or not any(each.suspect for each in held)

    def wait(self, timeout_s: float) -> Sequence[Event]:  # noqa: ARG002
        events, self.events = self.events, []
        busy = [replica for replica, life in self.lives.items() if life.held]
        if not events and busy:
            self._turn(self.random.choice(busy))
        return events

    def _turn(self, replica: str) -> None:
        life, draw = self.lives[replica], self.random.random()
        work = self.random.choice(life.held)
        if draw < self.faults / 3:
            self._flush(life) if draw < self.faults / 6 else None
            self._lose(replica, excused=draw < self.faults / 6)
        elif draw < self.faults / 2:
            life.held.remove(work)
            self.events.append(UnitFailed(replica, work, "storage said no"))
        elif work.condemned is not None:
            assert work.rows is not None
            self.condemned.setdefault(work.unit.id, set()).add(work.rows[0])
            self._end(replica, work)
        else:
            self._generate(replica, work)

    def _generate(self, replica: str, work: Assignment) -> None:
        life, unit = self.lives[replica], work.unit.id
        if work.key not in life.announced:
            life.announced.add(work.key)
            self.events.append(UnitProgress(replica, work.key, 0, 0, 0))
            return
        done = life.finished.setdefault(unit, set())
        kept = self.segments.setdefault(unit, set()) | self.condemned.get(unit, set())
        left = sorted(rows_of(work) - kept - done)
        for row in self.random.sample(left, self.random.randint(0, len(left))):
            if (unit, row) in self.killers:
                self.kills[unit, row] = self.kills.get((unit, row), 0) + 1
                self._lose(replica)
                return
            done.add(row)
            if work.suspect or self.random.random() < 0.1:
                self._flush(life)
        there = self.segments[unit] | kept | done
        self.events.append(UnitProgress(replica, work.key, len(rows_of(work) & there), 0, len(there), 0, len(kept)))
        if rows_of(work) <= there:
            self._end(replica, work)

    def _end(self, replica: str, work: Assignment) -> None:
        life, unit = self.lives[replica], work.unit
        life.held.remove(work)
        self._flush(life)
        if work.rows is not None:
            self.events.append(RangeDone(replica, work.key))
            return
        condemned = self.condemned.get(unit.id, set())
        assert not self.segments[unit.id] & condemned
        assert self.segments[unit.id] | condemned == rows_of(work)
        self.published[unit.id] = self.published.get(unit.id, 0) + 1
        self.events.append(UnitDone(result_of(unit, replica, work.attempt, len(condemned))))

    def _flush(self, life: Life) -> None:
        for unit, rows in life.finished.items():
            self.segments.setdefault(unit, set()).update(rows)
            rows.clear()

    def _lose(self, replica: str, excused: bool = False) -> None:
        del self.lives[replica]
        self.events.append(ReplicaLost(replica, "killed", excused=excused))
        self._start()

    def drop(self, replica: str, reason: str) -> None:
        raise AssertionError(f"{replica} is dropped: {reason}")

    def close(self) -> None:
        pass


def rows_of(work: Assignment) -> set[int]:
    return set(range(*work.span))
