"""Simulates a pool without replicas: rows are finished, flushed, or lost together with their replica, all by chance."""

import random
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass, field

from pipeline.core.events import Event, RangeDone, ReplicaLost, ReplicaReady, UnitDone, UnitFailed, UnitProgress
from pipeline.core.types import CONTROL, Assignment, Totals, UnitResult, WorkKey, WorkUnit
from pipeline.driver.holding import MOST_UNITS, UNITS_AHEAD
from pipeline.driver.slots import slot_of
from tests.pipeline.cases import one_piece


def make_units(count: int, rows: int = 10) -> list[WorkUnit]:
    return [one_piece(f"u{i}", "/in/a.parquet", "a.parquet", i * rows, rows) for i in range(count)]


def result_of(unit: WorkUnit, replica: str, attempt: int, errors: int = 0) -> UnitResult:
    ok = unit.row_count - errors
    totals = Totals(rows=unit.row_count, ok=ok, errors=errors, completion_tokens=ok)
    return UnitResult(unit.id, totals, 1.0, "0" * 64, replica, attempt)


@dataclass
class Life:
    """The state of a replica."""

    held: list[Assignment] = field(default_factory=list)
    finished: dict[str, set[int]] = field(default_factory=dict)
    """The finished rows that are not flushed yet, by unit."""
    announced: set[WorkKey] = field(default_factory=set)
    """The keys of the assignments that were reported as begun."""
    made: Counter[str] = field(default_factory=Counter)
    """The number of rows that it has generated, by unit."""
    proven: bool = False
    """Whether it has generated a row or a control."""


class SimulatedPool:
    """A pool whose replicas finish rows in any order. A row in `killers` ends its replica, whose rows since its last
    flush are lost. So does every row and control of a slot in `sick`.

    At each turn a replica is lost with the chance faults / 3 (half of these losses are excused), and its work fails
    with the chance faults / 6. Every assignment is checked: it overlaps with no other, and a suspect is alone, on a
    replica that has generated a row or a control.
    """

    def __init__(
        self,
        replicas: int,
        seed: int,
        killers: Set[tuple[str, int]] = frozenset(),
        faults: float = 0,
        max_rows: int = 0,
        sick: Set[str] = frozenset(),
    ) -> None:
        self.sick = sick
        self.random, self.killers, self.faults, self.max_rows = random.Random(seed), killers, faults, max_rows
        self.lives: dict[str, Life] = {}
        self.segments: dict[str, set[int]] = {}
        self.condemned: dict[str, set[int]] = {}
        self.published: dict[str, int] = {}
        """The number of times that each unit was published."""
        self.kills: dict[tuple[str, int], int] = {}
        self.assigned: list[tuple[str, Assignment]] = []
        self.started = 0
        """The number of replicas that were started."""
        self.deaths: Counter[str] = Counter()
        """The number of replicas that were lost, by slot."""
        self.events: list[Event] = []
        for slot in range(replicas):
            self._start(f"r{slot}")

    def _start(self, slot: str) -> None:
        self.started += 1
        name = f"{slot}.{self.started}"
        self.lives[name] = Life()
        self.events.append(ReplicaReady(name, self.max_rows))

    def assign(self, replica: str, work: Assignment) -> None:
        self.assigned.append((replica, work))
        for life in self.lives.values():
            for other in life.held:
                assert not (rows_of(other) & rows_of(work) and other.unit.id == work.unit.id)
        life = self.lives[replica]
        held = life.held
        held.append(work)
        assert life.proven or work.control or not work.suspect
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
        elif work.control:
            if slot_of(replica) in self.sick:
                self._lose(replica)
                return
            life.held.remove(work)
            if work.unit.id != CONTROL and not self.segments.get(work.unit.id):
                self.events.append(UnitFailed(replica, work, "no row is finished"))
                return
            life.proven = True
            self.events.append(RangeDone(replica, work.key))
        else:
            self._generate(replica, work)

    def _generate(self, replica: str, work: Assignment) -> None:
        life, unit = self.lives[replica], work.unit.id
        if work.key not in life.announced:
            life.announced.add(work.key)
            self.events.append(UnitProgress(replica, work.key, 0, 0, 0))
            return
        done = life.finished.setdefault(unit, set())
        kept = self.segments.setdefault(unit, set()) | {position for position, _ in work.condemned}
        left = sorted(rows_of(work) - kept - done)
        for row in self.random.sample(left, self.random.randint(0, len(left))):
            if (unit, row) in self.killers or slot_of(replica) in self.sick:
                self.kills[unit, row] = self.kills.get((unit, row), 0) + 1
                self._lose(replica)
                return
            done.add(row)
            life.proven = True
            life.made[unit] += 1
            if work.suspect or self.random.random() < 0.1:
                self._flush(life)
        there = self.segments[unit] | kept | done
        counts = len(rows_of(work) & there), len(work.condemned), len(there)
        self.events.append(UnitProgress(replica, work.key, *counts, 0, len(there) - life.made[unit]))
        if rows_of(work) <= there:
            self._end(replica, work)

    def _end(self, replica: str, work: Assignment) -> None:
        life, unit = self.lives[replica], work.unit
        life.held.remove(work)
        self._flush(life)
        if work.rows is not None:
            self.events.append(RangeDone(replica, work.key))
            return
        condemned = {position for position, _ in work.condemned}
        self.condemned[unit.id] = condemned
        assert not self.segments[unit.id] & condemned
        assert self.segments[unit.id] | condemned == rows_of(work)
        self.published[unit.id] = self.published.get(unit.id, 0) + 1
        result = result_of(unit, replica, work.attempt, len(condemned))
        self.events.append(UnitDone(result, kept_tokens=result.totals.completion_tokens - life.made[unit.id]))

    def _flush(self, life: Life) -> None:
        for unit, rows in life.finished.items():
            self.segments.setdefault(unit, set()).update(rows)
            rows.clear()

    def _lose(self, replica: str, excused: bool = False) -> None:
        del self.lives[replica]
        self.deaths[slot_of(replica)] += 1
        self.events.append(ReplicaLost(replica, "killed", excused=excused))
        self._start(slot_of(replica))

    def drop(self, replica: str, reason: str) -> None:
        raise AssertionError(f"{replica} is dropped: {reason}")

    def close(self) -> None:
        pass


def rows_of(work: Assignment) -> set[int]:
    return set(range(*work.span))
