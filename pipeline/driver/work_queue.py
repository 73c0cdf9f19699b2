"""Keeps the state of the driver's loop: which replica holds which work, and what is left to do.

It does no I/O, so that its rules can be tested alone. Units are handed out by expected work, the largest first and
equal ones in the order of the plan, so that no long unit begins last. A unit is first handed out as a whole. If it has
cost too many replicas, it is handed out as ranges of its rows, which become smaller with every loss and whose rows go
to segments. When all ranges are done, the whole unit is handed out again, to be published from the segments.

A replica gets so many units that the rows left in them keep its engine full (pipeline.driver.holding).
"""

import heapq
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.core.events import Event, RangeDone, ReplicaLost, ReplicaReady, UnitDone, UnitFailed, UnitProgress
from pipeline.core.types import Assignment, UnitResult, WorkKey, WorkUnit
from pipeline.driver.holding import Holding, Supply
from pipeline.driver.retry import RetryPolicy


@dataclass(slots=True)
class _Split:
    """A unit that was handed out as ranges."""

    unit: WorkUnit
    attempt: int
    """The highest attempt number of its ranges."""
    open: set[WorkKey] = field(default_factory=set)
    """The ranges that are not done. If there are none, the unit is handed out as a whole again."""


class WorkQueue:
    """The state of the driver's loop: the work that waits, the work that each replica holds, and the results so far.

    The methods that record something raise JobFailed if the retry policy gives up.
    """

    def __init__(self, units: Sequence[WorkUnit], finished: Mapping[str, UnitResult], policy: RetryPolicy) -> None:
        self.results: dict[str, UnitResult] = dict(finished)
        self._policy = policy
        self._total = len(units)
        left = (unit for unit in units if unit.id not in finished)
        self._waiting = deque(Assignment(unit) for unit in sorted(left, key=lambda unit: -unit.expected_work))
        self._waiting_rows = sum(work.unit.row_count for work in self._waiting)
        self._largest = max((work.unit.row_count for work in self._waiting), default=0)  # rows of the largest unit
        self._suspects: deque[Assignment] = deque()
        self._held: dict[str, Holding] = {}  # by ready replica
        self._splits: dict[str, _Split] = {}  # by unit id
        # by unit id: error rows so far of work that is held and of ranges that are done; only numbers above 0
        self._live_errors: dict[str, dict[WorkKey, int]] = {}
        self._live_total = 0  # the sum of all these numbers
        self._rows = sum(result.totals.rows for result in finished.values())
        self._errors = sum(result.totals.errors for result in finished.values())
        self._started = False  # whether any replica ever became ready
        self._start_failures = 0  # one after the other, while no replica is ready
        self._condemned_in_a_row = 0

    @property
    def open(self) -> bool:
        """Return whether any unit is still to be done."""
        return bool(self._waiting or self._suspects) or any(self._held.values())

    @property
    def busy(self) -> list[str]:
        """Return the names of the replicas that hold work."""
        return [replica for replica, held in self._held.items() if held]

    def summary(self) -> str:
        """Return text such as `3 of 10 units are done`."""
        return f"{len(self.results)} of {self._total} units are done"

    def hand_out(self) -> Iterator[tuple[str, Assignment]]:
        """Yield (replica, work) for all work to assign now. Every replica gets a first work before any gets a second.

        Work that is yielded counts as held by the replica. Further units go one at a time to the replica that has the
        fewest rows left, as long as it wants more (Holding.wants_more). A suspect (Assignment.suspect) is given to a
        replica that holds nothing, and that replica gets no other work beside it. For each suspect that waits, one
        replica is given nothing beside what it holds, so that it becomes free.
        """
        for replica, held in self._held.items():
            if not held and (queue := self._suspects or self._waiting):
                yield replica, self._give(held, queue)
        if not self._waiting:
            return
        supply = self._supply()
        hungry = [name for name, held in self._held.items() if held.wants_more(supply) and not held.suspect]
        spared = hungry[len(self._suspects) :]
        # The position breaks ties: replicas with equally many rows left get work in the order in which they joined.
        heap = [(self._held[replica].left, position, replica) for position, replica in enumerate(spared)]
        heapq.heapify(heap)
        while heap and self._waiting:
            _, position, replica = heap[0]
            held = self._held[replica]
            if held.wants_more(self._supply()):
                yield replica, self._give(held, self._waiting)
                heapq.heapreplace(heap, (held.left, position, replica))
            else:
                heapq.heappop(heap)

    def take(self, event: Event) -> None:
        """Update the state for one event. Reports on work that the replica no longer holds change nothing, except that
        a published part always counts. Raises JobFailed if the policy gives up."""
        match event:
            case ReplicaReady(replica, max_rows):
                self._held[replica] = Holding(max_rows)
                self._started, self._start_failures = True, 0
            case UnitProgress(replica, key, rows, errors) if (held := self._held.get(replica)) and held.get(key):
                if event.tokens > event.kept_tokens:
                    self._condemned_in_a_row = 0
                held.report(key, rows, begun=event.begun)
                self._set_errors(key, errors)
                self._check_errors()
            case UnitDone(result):
                self._done(result)
            case RangeDone(replica, key):
                if work := self._pop(replica, key):
                    self._range_done(work)
            case UnitFailed(replica, work, reason):
                if known := self._pop(replica, work.key):
                    self._set_errors(work.key, 0)
                    self._put_back(self._policy.after_failure(known, reason))
            case ReplicaLost():
                self._lost(event)

    def check_end(self) -> None:
        """Check the share of error rows once more when no unit is left. Raises JobFailed if it is too high."""
        self._policy.check_errors(self._errors, self._rows, ended=True)

    def _supply(self) -> Supply:
        return Supply(len(self._waiting), len(self._held), self._waiting_rows, self._largest)

    def _give(self, held: Holding, queue: deque[Assignment]) -> Assignment:
        work = queue.popleft()
        if queue is self._waiting:
            self._waiting_rows -= work.unit.row_count
        held.give(work)
        return work

    def _pop(self, replica: str, key: WorkKey) -> Assignment | None:
        """Take back the work with this key from the replica; None if it does not hold it."""
        held = self._held.get(replica)
        return held.pop(key) if held is not None else None

    def _done(self, result: UnitResult) -> None:
        unit_id = result.unit_id
        if unit_id in self.results:
            return
        if not any(self._pop(replica, (unit_id, None)) for replica in (result.replica, *self._held)):
            # A published part counts, whoever reports it: perhaps a replica that has just been given up as lost.
            self._waiting = deque(work for work in self._waiting if work.unit.id != unit_id)
            self._waiting_rows = sum(work.unit.row_count for work in self._waiting)
            self._suspects = deque(work for work in self._suspects if work.unit.id != unit_id)
            for held in self._held.values():
                held.pop_unit(unit_id)
        self._forget(unit_id)
        self.results[unit_id] = result
        self._rows += result.totals.rows
        self._errors += result.totals.errors
        self._condemned_in_a_row = 0
        self._check_errors()

    def _range_done(self, work: Assignment) -> None:
        if work.condemned is None:
            self._condemned_in_a_row = 0
        else:
            self._set_errors(work.key, 1)
            self._check_errors()
        split = self._splits[work.unit.id]
        split.open.discard(work.key)
        if not split.open:
            self._forget_errors(work.unit.id)  # the whole unit will report the errors of its ranges as its own
            self._put_back(Assignment(work.unit, split.attempt + 1))

    def _lost(self, event: ReplicaLost) -> None:
        held = self._held.pop(event.replica, None)
        if held is None:  # it never became ready
            working = bool(self._held)
            self._start_failures = 0 if working else self._start_failures + 1
            refused = event.refused and not self._started  # if others could start, the cause is the node
            self._policy.check_start(self._start_failures, refused=refused, working=working, reason=event.reason)
            return
        reason = f"replica {event.replica} was lost: {event.reason}"
        for each in reversed(list(held)):
            work = each.work
            self._set_errors(work.key, 0)
            split = self._splits.get(work.unit.id)
            finished = split is not None and not split.open
            # Rows that never came to a slot cannot have killed the replica, and neither can those that have ended.
            begun = each.begun and (work.rows is not None or each.left > 0)
            followers = self._policy.after_loss(work, reason, excused=event.excused, finished=finished, begun=begun)
            if followers[0].condemned is not None and work.condemned is None:
                self._condemned_in_a_row += 1
                self._policy.check_condemned(self._condemned_in_a_row, reason)
            if followers[0].rows is not None:
                self._split(work, followers)
            for follower in reversed(followers):
                self._put_back(follower)

    def _split(self, work: Assignment, ranges: Sequence[Assignment]) -> None:
        split = self._splits.setdefault(work.unit.id, _Split(work.unit, 0))
        split.attempt = max(split.attempt, ranges[0].attempt)
        split.open.discard(work.key)
        split.open.update(each.key for each in ranges)

    def _put_back(self, work: Assignment) -> None:
        # At the front: a unit that can never succeed then ends the job early, and no old unit is left for the end.
        if work.suspect:
            self._suspects.appendleft(work)
        else:
            self._waiting.appendleft(work)
            self._waiting_rows += work.unit.row_count

    def _forget(self, unit_id: str) -> None:
        """Forget the ranges of a unit and its error rows so far."""
        self._splits.pop(unit_id, None)
        self._forget_errors(unit_id)

    def _forget_errors(self, unit_id: str) -> None:
        self._live_total -= sum(self._live_errors.pop(unit_id, {}).values())

    def _set_errors(self, key: WorkKey, errors: int) -> None:
        """Record the number of error rows so far of one assignment."""
        of_unit = self._live_errors.get(key[0], {})
        self._live_total += errors - of_unit.pop(key, 0)
        if errors:
            of_unit[key] = errors
            self._live_errors[key[0]] = of_unit
        elif not of_unit:
            self._live_errors.pop(key[0], None)

    def _check_errors(self) -> None:
        errors = self._errors + self._live_total
        if errors <= self._policy.max_error_rate * self._rows:  # within the limit even without the rows counted below
            return
        begun = sum(held.unit_rows for held in self._held.values())
        begun += sum(split.unit.row_count for split in self._splits.values() if split.open)
        self._policy.check_errors(errors, self._rows + begun)
