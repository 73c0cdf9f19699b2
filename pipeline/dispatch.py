"""The driver's loop: hands units to replicas and hears what became of them. It sees counts, never rows.

`Pool` is the seam: workers.pool runs replicas on Ray, workers.local_pool one in this process, tests a scripted fake.
`Board` is the state (who holds what, what is left) and decides; it does no I/O, so its rules are tested without a pool.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.errors import JobFailed
from pipeline.retry import RetryPolicy
from pipeline.types import Assignment, UnitResult, WorkKey, WorkUnit

UNITS_A_REPLICA = 2
"""One in the engine, and the next already read and tokenised, so that the engine never drains between them."""
POLL_S = 0.5
"""The longest that a stop signal waits for the loop, in seconds."""


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """A replica has loaded the model and takes units."""

    replica: str


@dataclass(frozen=True, slots=True)
class UnitProgress:
    """Where an assignment stands: counts since its attempt began, not since the last report.

    So a repeated or lost report changes nothing, and what a lost replica had reported is taken back with it.
    """

    replica: str
    key: WorkKey
    rows: int
    """Finished, those that an earlier attempt left in segments included."""
    errors: int
    tokens: int
    """Completion tokens of these rows."""
    kept_rows: int = 0
    """Of `rows`, those that stand in segments of earlier attempts and were not generated again."""
    kept_tokens: int = 0


@dataclass(frozen=True, slots=True)
class UnitDone:
    """A unit's part is published."""

    result: UnitResult
    kept_rows: int = 0
    """Of its rows, those that this attempt found in segments."""
    kept_tokens: int = 0


@dataclass(frozen=True, slots=True)
class RangeDone:
    """All rows of a range stand in segments."""

    replica: str
    key: WorkKey


@dataclass(frozen=True, slots=True)
class UnitFailed:
    """A unit could not be read or published; the replica lives on and has let go of it."""

    replica: str
    work: Assignment
    reason: str


@dataclass(frozen=True, slots=True)
class ReplicaActive:
    """Sent with every report of a replica."""

    replica: str
    beats: int
    """Changes whenever the replica got further: engine steps, rows and units finished."""
    doing: str
    """In a few words, for the operator of a job that stands still."""


@dataclass(frozen=True, slots=True)
class ReplicaNote:
    """Something that the operator should know of."""

    replica: str
    text: str


@dataclass(frozen=True, slots=True)
class ReplicaLost:
    """A replica is gone, with all that it held."""

    replica: str
    reason: str
    refused: bool = False
    """It would not start, with one of the project's own errors: another one would not either."""


Event = ReplicaReady | UnitProgress | UnitDone | RangeDone | UnitFailed | ReplicaActive | ReplicaNote | ReplicaLost


class Pool(Protocol):
    """Replicas that work on units. A name is used for one life of a replica; its replacement has a new one."""

    def assign(self, replica: str, work: Assignment) -> None:
        """Give work to a ready replica. Never waits; where the replica is gone, its ReplicaLost follows."""

    def wait(self, timeout_s: float) -> Sequence[Event]:
        """What happened since the last call, in order; [] after `timeout_s`.

        Raises ClusterError where no replica can ever run.
        """

    def drop(self, replica: str, reason: str) -> None:
        """Throw a replica away, whatever it does; its ReplicaLost, with this reason, comes from the next wait."""

    def close(self) -> None:
        """Let go of all replicas, once they have flushed the rows that they finished; safe to call twice."""


class Board:
    """Which units wait, who holds which, which are done. Raises JobFailed where the retry policy gives up."""

    def __init__(self, units: Sequence[WorkUnit], finished: Mapping[str, UnitResult], policy: RetryPolicy) -> None:
        self.results: dict[str, UnitResult] = dict(finished)
        self._policy = policy
        self._total = len(units)
        self._waiting = deque(Assignment(unit, 1) for unit in units if unit.id not in finished)
        self._held: dict[str, dict[WorkKey, Assignment]] = {}  # ready replica -> what it holds
        self._live_errors: dict[WorkKey, int] = {}  # error rows so far, of what is held
        self._rows = sum(result.totals.rows for result in finished.values())
        self._errors = sum(result.totals.errors for result in finished.values())
        self._start_failures = 0

    @property
    def open(self) -> bool:
        """Whether units are left."""
        return bool(self._waiting) or any(self._held.values())

    def summary(self) -> str:
        return f"{len(self.results)} of {self._total} units are done"

    def hand_out(self) -> Iterator[tuple[str, Assignment]]:
        """What to assign to whom now. Every replica gets its first unit before any gets a second."""
        for depth in range(UNITS_A_REPLICA):
            for replica, held in self._held.items():
                if self._waiting and len(held) <= depth:
                    work = self._waiting.popleft()
                    held[work.key] = work
                    yield replica, work

    def take(self, event: Event) -> None:
        """Record one event."""
        match event:
            case ReplicaReady(replica):
                self._held[replica] = {}
                self._start_failures = 0
            case UnitProgress(replica, key, _, errors):
                if key in self._held.get(replica, {}):
                    self._live_errors[key] = errors
                    self._check_errors()
            case UnitDone(result):
                self._done(result)
            case UnitFailed(replica, work, reason):
                if self._held.get(replica, {}).pop(work.key, None):
                    self._again(work, reason)
            case ReplicaLost(replica, reason, refused):
                self._lost(replica, reason, refused)

    def check_end(self) -> None:
        """The last judgement of the error rate, over all rows. Raises JobFailed."""
        self._policy.check_errors(self._errors, self._rows, ended=True)

    def _done(self, result: UnitResult) -> None:
        if result.unit_id in self.results:
            return
        key = result.unit_id, None
        if self._held.get(result.replica, {}).pop(key, None) is None:
            # A part is the truth, whoever reports it: also that of a replica given up for lost a moment before.
            self._waiting = deque(work for work in self._waiting if work.unit.id != result.unit_id)
            for held in self._held.values():
                held.pop(key, None)
        self._live_errors.pop(key, None)
        self.results[result.unit_id] = result
        self._rows += result.totals.rows
        self._errors += result.totals.errors
        self._check_errors()

    def _lost(self, replica: str, reason: str, refused: bool) -> None:
        held = self._held.pop(replica, None)
        if held is None:  # it never became ready
            self._start_failures += 1
            self._policy.check_start(self._start_failures, refused=refused, working=bool(self._held), reason=reason)
            return
        for work in reversed(held.values()):
            self._again(work, f"replica {replica} was lost: {reason}")

    def _again(self, work: Assignment, reason: str) -> None:
        self._live_errors.pop(work.key, None)
        attempt = self._policy.next_attempt(work.unit, work.attempt, reason)
        # To the front: a unit that can never succeed ends the job early, and no old unit is left for the job's tail.
        self._waiting.appendleft(Assignment(work.unit, attempt))

    def _check_errors(self) -> None:
        begun = sum(work.unit.row_count for held in self._held.values() for work in held.values())
        self._policy.check_errors(self._errors + sum(self._live_errors.values()), self._rows + begun)


def dispatch(
    units: Sequence[WorkUnit],
    finished: Mapping[str, UnitResult],
    pool: Pool,
    policy: RetryPolicy,
    stop: threading.Event,
    on_event: Callable[[Event | None], None] = lambda _event: None,
) -> dict[str, UnitResult]:
    """Run every unit that is not in `finished`; returns the results of all of them by unit id.

    `on_event` hears every event, and None once a turn. Raises JobFailed (attempts or error rate exceeded, no replica
    starts, `stop` set) and ClusterError. Closing the pool is the caller's.
    """
    board = Board(units, finished, policy)
    while board.open:
        if stop.is_set():
            raise JobFailed(f"stopped; {board.summary()}; submit the same job again to resume")
        for replica, work in board.hand_out():
            pool.assign(replica, work)
        for event in pool.wait(POLL_S):
            on_event(event)
            board.take(event)
        on_event(None)
    board.check_end()
    return board.results
