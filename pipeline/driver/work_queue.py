"""Who holds what and what is left: the state of the driver's loop. It does no I/O, so its rules are tested alone.

Units go out by expected work, the longest first, equal ones as planned, so that no long one is begun last. A unit goes
out whole. Once it has cost too many replicas it goes out as ranges of its rows, smaller with every loss, whose rows end
in segments; when all ranges are done it goes out whole again, to be published from the segments.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.core.events import Event, RangeDone, ReplicaLost, ReplicaReady, UnitDone, UnitFailed, UnitProgress
from pipeline.core.types import Assignment, UnitResult, WorkKey, WorkUnit
from pipeline.driver.retry import RetryPolicy

UNITS_A_REPLICA = 2
"""One in the engine, and the next already read and tokenised, so that the engine never drains between them."""


@dataclass(slots=True)
class _Split:
    """A unit that went out as ranges."""

    unit: WorkUnit
    attempt: int
    """The highest of its ranges."""
    open: set[WorkKey] = field(default_factory=set)
    """Ranges that are not done. Empty: the unit is out whole again."""


class WorkQueue:
    """Which work waits, who holds which, which is done. Raises JobFailed where the retry policy gives up."""

    def __init__(self, units: Sequence[WorkUnit], finished: Mapping[str, UnitResult], policy: RetryPolicy) -> None:
        self.results: dict[str, UnitResult] = dict(finished)
        self._policy = policy
        self._total = len(units)
        left = (unit for unit in units if unit.id not in finished)
        self._waiting = deque(Assignment(unit) for unit in sorted(left, key=lambda unit: -unit.expected_work))
        self._suspects: deque[Assignment] = deque()
        self._held: dict[str, dict[WorkKey, Assignment]] = {}  # ready replica -> what it holds
        self._begun: dict[str, WorkKey] = {}  # replica -> the lone row that it has read
        self._splits: dict[str, _Split] = {}  # by unit id
        # error rows so far, where there are any, of what is held and of ranges that are done
        self._live_errors: dict[WorkKey, int] = {}
        self._rows = sum(result.totals.rows for result in finished.values())
        self._errors = sum(result.totals.errors for result in finished.values())
        self._started = False  # whether any replica ever became ready
        self._start_failures = 0  # in a row, while none is ready
        self._condemned_in_a_row = 0

    @property
    def open(self) -> bool:
        """Whether units are left."""
        return bool(self._waiting or self._suspects) or any(self._held.values())

    @property
    def busy(self) -> list[str]:
        """The replicas that hold work."""
        return [replica for replica, held in self._held.items() if held]

    def summary(self) -> str:
        return f"{len(self.results)} of {self._total} units are done"

    def hand_out(self) -> Iterator[tuple[str, Assignment]]:
        """What to assign to whom now. Every replica gets its first work before any gets a second.

        A suspect goes to a replica that holds nothing, and that one gets nothing beside it. As many replicas as
        suspects wait are left to run dry for them.
        """
        for replica, held in self._held.items():
            if not held and (queue := self._suspects or self._waiting):
                yield replica, self._give(held, queue)
        dry = len(self._suspects)
        for replica, held in self._held.items():
            if not self._waiting or len(held) >= UNITS_A_REPLICA or any(work.suspect for work in held.values()):
                continue
            if dry:
                dry -= 1
            else:
                yield replica, self._give(held, self._waiting)

    def take(self, event: Event) -> None:
        """Record one event."""
        match event:
            case ReplicaReady(replica):
                self._held[replica] = {}
                self._started, self._start_failures = True, 0
            case UnitProgress(replica, key, _, errors) if key in self._held.get(replica, {}):
                if event.tokens > event.kept_tokens:
                    self._condemned_in_a_row = 0
                if self._held[replica][key].lone:
                    self._begun[replica] = key
                self._live_errors.pop(key, None)
                if errors:
                    self._live_errors[key] = errors
                self._check_errors()
            case UnitDone(result):
                self._done(result)
            case RangeDone(replica, key):
                if work := self._held.get(replica, {}).pop(key, None):
                    self._range_done(work)
            case UnitFailed(replica, work, reason):
                if known := self._held.get(replica, {}).pop(work.key, None):
                    self._live_errors.pop(work.key, None)
                    self._put_back(self._policy.after_failure(known, reason))
            case ReplicaLost():
                self._lost(event)

    def check_end(self) -> None:
        """The last judgement of the error rate, over all rows. Raises JobFailed."""
        self._policy.check_errors(self._errors, self._rows, ended=True)

    def _give(self, held: dict[WorkKey, Assignment], queue: deque[Assignment]) -> Assignment:
        work = queue.popleft()
        held[work.key] = work
        return work

    def _done(self, result: UnitResult) -> None:
        unit_id = result.unit_id
        if unit_id in self.results:
            return
        if self._held.get(result.replica, {}).pop((unit_id, None), None) is None:
            # A part is the truth, whoever reports it: also that of a replica given up for lost a moment before.
            self._waiting = deque(work for work in self._waiting if work.unit.id != unit_id)
            self._suspects = deque(work for work in self._suspects if work.unit.id != unit_id)
            for held in self._held.values():
                for key in [key for key in held if key[0] == unit_id]:
                    del held[key]
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
            self._live_errors[work.key] = 1
            self._check_errors()
        split = self._splits[work.unit.id]
        split.open.discard(work.key)
        if not split.open:
            self._forget_errors(work.unit.id)  # the whole unit reports those of its ranges with its own
            self._put_back(Assignment(work.unit, split.attempt + 1))

    def _lost(self, event: ReplicaLost) -> None:
        held, begun = self._held.pop(event.replica, None), self._begun.pop(event.replica, None)
        if held is None:  # it never became ready
            working = bool(self._held)
            self._start_failures = 0 if working else self._start_failures + 1
            refused = event.refused and not self._started  # where others could start, it is the node
            self._policy.check_start(self._start_failures, refused=refused, working=working, reason=event.reason)
            return
        reason = f"replica {event.replica} was lost: {event.reason}"
        for work in reversed(held.values()):
            self._live_errors.pop(work.key, None)
            split = self._splits.get(work.unit.id)
            finished = split is not None and not split.open
            followers = self._policy.after_loss(
                work, reason, excused=event.excused, finished=finished, begun=begun == work.key
            )
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
        # To the front: a unit that can never succeed ends the job early, and no old unit is left for the job's tail.
        (self._suspects if work.suspect else self._waiting).appendleft(work)

    def _forget(self, unit_id: str) -> None:
        """Drops what is known of a unit on its way."""
        self._splits.pop(unit_id, None)
        self._forget_errors(unit_id)

    def _forget_errors(self, unit_id: str) -> None:
        self._live_errors = {key: errors for key, errors in self._live_errors.items() if key[0] != unit_id}

    def _check_errors(self) -> None:
        errors = self._errors + sum(self._live_errors.values())
        if errors <= self._policy.max_error_rate * self._rows:  # fine without the rows that are counted below
            return
        begun = {work.unit.id: work.unit.row_count for held in self._held.values() for work in held.values()}
        begun |= {unit_id: split.unit.row_count for unit_id, split in self._splits.items()}
        self._policy.check_errors(errors, self._rows + sum(begun.values()))
