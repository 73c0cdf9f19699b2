"""Keeps the state of the driver's loop: which replica holds which work, and what is left to do.

It does no I/O, so that its rules can be tested alone. Units are handed out by expected work, the largest first and
equal ones in the order of the plan, so that no long unit begins last. A unit is first handed out as a whole. If it has
cost too many replicas, it is handed out as ranges of its rows, which become smaller with every loss and whose rows go
to segments. When all ranges are done, the whole unit is handed out again, to be published from the segments. A unit
that cannot be read is handed out as ranges of whole files, and what cannot be read then is set aside.

Suspects go only to replicas that have generated a row or a control, so that a row is never blamed for a sick replica
(docs/decisions/killing-row.md). A replica gets so many units that the rows left in them keep its engine full
(pipeline.driver.holding).
"""

import heapq
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.core.events import (
    WARNING,
    Event,
    RangeDone,
    ReplicaActive,
    ReplicaLost,
    ReplicaNote,
    ReplicaReady,
    SlotLeftOut,
    UnitDone,
    UnitFailed,
    UnitProgress,
)
from pipeline.core.types import CONTROL, Assignment, UnitResult, WorkKey, WorkUnit
from pipeline.driver.error_rows import LiveErrors
from pipeline.driver.holding import Holding, Supply
from pipeline.driver.retry import CONDEMNED_IN_A_ROW, PIECES, RetryPolicy, describe
from pipeline.driver.set_aside import SetAsideError, Unread
from pipeline.driver.slots import Slots, slot_of


@dataclass(slots=True)
class _Split:
    """A unit that was handed out as ranges."""

    unit: WorkUnit
    attempt: int
    """The highest attempt number of its ranges."""
    open: set[WorkKey] = field(default_factory=set)
    """The ranges that are not done. If there are none, the unit is handed out as a whole again."""
    condemned: dict[int, str] = field(default_factory=dict)
    """The rows that are given up, by position, with their error texts."""
    unread: dict[tuple[int, int], str] = field(default_factory=dict)
    """The ranges that could not be read, with the reasons."""


class WorkQueue:
    """The state of the driver's loop: the work that waits, the work that each replica holds, and the results so far.

    The methods that record something raise JobFailed if the retry policy gives up.
    """

    def __init__(
        self,
        units: Sequence[WorkUnit],
        finished: Mapping[str, UnitResult],
        policy: RetryPolicy,
        unread: Unread | None = None,
    ) -> None:
        """Begin with all units but the finished ones. The units in `unread` are set aside from the beginning, because
        these ranges cannot be read and their other rows are in segments."""
        self.results: dict[str, UnitResult] = dict(finished)
        self._policy, self._slots = policy, Slots()
        self._total = len(units)
        left = [unit for unit in units if unit.id not in finished]
        self._any_unit = left[0] if left else None
        whole = sorted((unit for unit in left if not (unread or {}).get(unit.id)), key=lambda unit: -unit.expected_work)
        self._waiting = deque(Assignment(unit) for unit in whole)
        self._waiting_rows = sum(work.unit.row_count for work in self._waiting)
        self._largest = max((work.unit.row_count for work in self._waiting), default=0)  # rows of the largest unit
        self._suspects: deque[Assignment] = deque()
        self._held: dict[str, Holding] = {}  # by ready replica
        self._splits: dict[str, _Split] = {}  # by unit id
        self._unjudged: dict[str, int] = {}  # by unit id: rows condemned since a row was last generated anywhere
        self._withheld: list[Assignment] = []  # complete units with such rows
        self._failed_judgements = 0
        self._last_reason = ""  # of the last row that was condemned
        self._distant = 0  # the suspects that were tried for a judgement (_distant_suspect) since the last one
        self._set_aside: dict[str, _Split] = {}
        self._news: list[Event] = []
        self._live_errors = LiveErrors()
        self._rows = sum(result.totals.rows for result in finished.values())
        self._errors = sum(result.totals.errors for result in finished.values())
        self._started = False  # whether any replica ever became ready
        self._start_failures = 0  # one after the other, while no replica is ready
        for unit in left:
            if known := (unread or {}).get(unit.id):
                self._set_aside[unit.id] = _Split(unit, 1, unread=dict(known))

    @property
    def open(self) -> bool:
        """Return whether any unit is still to be done."""
        return bool(self._waiting or self._suspects or self._withheld) or any(self._held.values())

    @property
    def busy(self) -> list[str]:
        """Return the names of the replicas that hold work."""
        return [replica for replica, held in self._held.items() if held]

    def summary(self) -> str:
        """Return text such as `3 of 10 units are done`."""
        return f"{len(self.results)} of {self._total} units are done"

    def news(self) -> list[Event]:
        """Return the events for the operator that no earlier call has returned: slots that are left out, rows that are
        given up and units that are set aside."""
        news, self._news = self._news, []
        return news

    def hand_out(self) -> Iterator[tuple[str, Assignment]]:
        """Yield (replica, work) for all work to assign now. Every replica gets a first work before any gets a second.

        Work that is yielded counts as held by the replica. Further units go one at a time to the replica that has the
        fewest rows left, as long as it wants more (Holding.wants_more). A suspect (Assignment.suspect) is given to a
        replica that holds nothing and has generated a row or a control, and that replica gets no other work beside it.
        For each suspect that waits, one replica is given nothing beside what it holds, so that it becomes free.
        """
        for replica, held in self._held.items():
            if not held and (work := self._first_work(replica, held)):
                held.give(work)
                yield replica, work
        if not self._waiting:
            return
        supply = self._supply()
        hungry = [name for name, held in self._held.items() if held and not held.suspect and held.wants_more(supply)]
        for work in self._suspects:
            if (spared := next((name for name in hungry if self._may_take(name, work)), None)) is not None:
                hungry.remove(spared)
        # The position breaks ties: replicas with equally many rows left get work in the order in which they joined.
        heap = [(self._held[replica].left, position, replica) for position, replica in enumerate(hungry)]
        heapq.heapify(heap)
        while heap and self._waiting:
            _, position, replica = heap[0]
            held = self._held[replica]
            if held.wants_more(self._supply()):
                held.give(work := self._take_waiting())
                yield replica, work
                heapq.heapreplace(heap, (held.left, position, replica))
            else:
                heapq.heappop(heap)

    def take(self, event: Event) -> None:
        """Update the state for one event. Reports on work that the replica no longer holds change nothing, except that
        a published part always counts. Raises JobFailed if the policy gives up."""
        match event:
            case ReplicaReady(replica, max_rows, node):
                self._held[replica] = Holding(max_rows)
                self._slots.ready(replica, node)
                self._started, self._start_failures = True, 0
            case ReplicaActive(replica, stats=stats) if stats is not None and replica in self._held:
                before, self._held[replica].generated = self._held[replica].generated, stats.rows - stats.errors
                if self._held[replica].generated > before:
                    self._generated(replica)
            case UnitProgress(replica, key) if (held := self._held.get(replica)) and held.get(key):
                if held.report(event):
                    self._generated(replica)
                self._live_errors.set(key, event.errors)
                self._check_errors()
            case UnitDone(result):
                if not result.published_by_other and result.totals.completion_tokens > event.kept_tokens:
                    self._generated(result.replica)
                self._done(result)
            case RangeDone(replica, (_, (first, end))) if first == end:
                self._control_done(replica)
            case RangeDone(replica, key):
                if work := self._pop(replica, key):
                    split = self._splits[work.unit.id]
                    split.open.discard(work.key)
                    self._end_ranges(split)
            case UnitFailed(replica, work):
                if known := self._pop(replica, work.key):
                    self._failed(event, known)
            case ReplicaLost():
                self._lost(event)

    def check_end(self) -> None:
        """Check the share of error rows once more when no unit is left. Raises JobFailed if it is too high, and
        SetAsideError if units were set aside."""
        self._policy.check_errors(self._errors, self._rows, ended=True)
        if self._set_aside:
            bad = {unit_id: split.unread for unit_id, split in self._set_aside.items()}
            units = {unit_id: split.unit for unit_id, split in self._set_aside.items()}
            raise SetAsideError(bad, units, self._total)

    @property
    def _unjudged_rows(self) -> int:
        return sum(self._unjudged.values())

    # Work that is given.

    def _first_work(self, replica: str, held: Holding) -> Assignment | None:
        """Take the work for a replica that holds nothing out of what waits; None if there is none for it.

        A replica that has not generated a row yet gets a control, if its slot or node is doubtful or if only suspects
        wait.
        """
        if not held.proven and self._slots.doubtful(replica):
            return self._control() if self._waiting or self._suspects or self._withheld else None
        if held.proven and self._unjudged_rows >= CONDEMNED_IN_A_ROW:
            unit_id = next(reversed(self._unjudged))
            return Assignment(self._splits[unit_id].unit, rows=(0, 0))
        number = next((n for n, work in enumerate(self._suspects) if self._may_take(replica, work)), None)
        if number is not None and held.proven:
            if self._unjudged_rows >= CONDEMNED_IN_A_ROW // 2:
                number = self._distant_suspect(replica, number)
            work = self._suspects[number]
            del self._suspects[number]
            return work
        if self._waiting:
            return self._take_waiting()
        # Only suspects are left, or condemned rows that wait for the judgement.
        busy = any(not held.only_control for held in self._held.values() if held)
        judgement = self._withheld and not self._suspects and not busy
        return self._control() if number is not None or judgement else None

    def _distant_suspect(self, replica: str, first: int) -> int:
        """Return the place of the last range of several rows among the suspects, or `first` if there is none.

        The first suspects are next to the rows that were given up last. One from elsewhere may have a row that can be
        generated, which is the judgement, before too many rows are given up without one. PIECES of them are tried.
        """
        if self._distant >= PIECES:
            return first
        for number in range(len(self._suspects) - 1, first, -1):
            work = self._suspects[number]
            if not work.lone and self._may_take(replica, work):
                self._distant += 1
                return number
        return first

    def _may_take(self, replica: str, work: Assignment) -> bool:
        """Return whether a suspect may go to this replica: it was not lost in its slot, or in every slot there is."""
        return slot_of(replica) not in work.lost_in or not self._elsewhere(work.lost_in)

    def _elsewhere(self, slots: Sequence[str]) -> bool:
        """Return whether a replica that can generate is ready in another slot than these."""
        return any(slot_of(name) not in slots and held.proven for name, held in self._held.items())

    def _control(self) -> Assignment:
        assert self._any_unit is not None
        return Assignment(WorkUnit(CONTROL, self._any_unit.pieces[:1]), rows=(0, 0))

    def _supply(self) -> Supply:
        return Supply(len(self._waiting), len(self._held), self._waiting_rows, self._largest)

    def _take_waiting(self) -> Assignment:
        work = self._waiting.popleft()
        self._waiting_rows -= work.unit.row_count
        return work

    # Work that ends.

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
            self._withheld = [work for work in self._withheld if work.unit.id != unit_id]
            for held in self._held.values():
                held.pop_unit(unit_id)
        for of_unit in (self._splits, self._set_aside, self._unjudged):
            of_unit.pop(unit_id, None)
        self._live_errors.forget(unit_id)
        self.results[unit_id] = result
        self._rows += result.totals.rows
        self._errors += result.totals.errors
        self._check_errors()

    def _end_ranges(self, split: _Split) -> None:
        """Go on with a unit whose ranges may all be done: publish it, withhold it until its condemned rows are judged,
        or set it aside if some of its rows cannot be read."""
        unit = split.unit
        if split.open:
            return
        self._live_errors.forget(unit.id)  # the whole unit will report the errors of its ranges as its own
        if split.unread:
            self._set_aside[unit.id] = self._splits.pop(unit.id)
            self._unjudged.pop(unit.id, None)
            return
        work = Assignment(unit, split.attempt + 1, condemned=tuple(sorted(split.condemned.items())))
        if unit.id in self._unjudged:
            self._withheld.append(work)
        else:
            self._put_back(work)

    def _failed(self, event: UnitFailed, work: Assignment) -> None:
        if work.control:  # no row is finished that could be generated once more for the judgement
            self._policy.check_condemned(self._unjudged_rows, self._last_reason)
            return
        self._live_errors.set(work.key, 0)
        known = self._splits.get(work.unit.id)
        finished = known is not None and not known.open
        followers = self._policy.after_failure(work, event.reason, event.stage, finished=finished)
        if not followers:
            self._news.append(ReplicaNote(event.replica, f"{WARNING}{describe(work)} is set aside: {event.reason}"))
            split = self._splits.setdefault(work.unit.id, _Split(work.unit, work.attempt))
            split.open.discard(work.key)
            split.unread[work.span] = event.reason
            self._end_ranges(split)
            return
        if followers[0].rows != work.rows:
            self._split(work, followers)
        for follower in reversed(followers):
            self._put_back(follower)

    def _lost(self, event: ReplicaLost) -> None:
        held = self._held.pop(event.replica, None)
        if held is None:  # it never became ready
            working = bool(self._held)
            self._start_failures = 0 if working else self._start_failures + 1
            refused = event.refused and not self._started  # if others could start, the cause is the node
            self._policy.check_start(self._start_failures, refused=refused, working=working, reason=event.reason)
            return
        reason = f"replica {event.replica} was lost: {event.reason}"
        self._slots.left(event.replica)
        if not (held.proven or event.excused):
            self._tell(self._slots.lost(event.replica, reason))
        for each in reversed(list(held)):
            if not each.work.control:
                self._blame(each.work, event, reason, begun=each.begun, left=each.left)
            elif held.proven and self._unjudged and not event.excused:  # a row elsewhere may have been the judgement
                self._failed_judgements += 1
                self._policy.check_judgement(self._failed_judgements, self._unjudged_rows, reason)

    def _blame(self, work: Assignment, event: ReplicaLost, reason: str, *, begun: bool, left: int) -> None:
        """Put back what replaces work whose replica was lost. `begun`, `left`: see HeldWork."""
        self._live_errors.set(work.key, 0)
        split = self._splits.get(work.unit.id)
        finished = split is not None and not split.open
        followers = self._policy.after_loss(
            work,
            reason,
            excused=event.excused,
            finished=finished,
            # Rows that never came to a slot cannot have killed the replica, and neither can those that have ended.
            begun=begun and (work.rows is not None or left > 0),
            slot=slot_of(event.replica),
            elsewhere=self._elsewhere,
        )
        if split is not None and work.lone and followers[0].condemned:
            self._condemn(split, followers[0], reason)
            return
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

    # The judgement of condemned rows.

    def _generated(self, replica: str) -> None:
        """Record that a replica has generated a row of the job, which acquits the replicas: condemned rows were the
        cause."""
        if (held := self._held.get(replica)) is not None:
            held.proven = True
            self._tell(self._slots.generated(replica))
        self._failed_judgements = 0
        if self._unjudged:
            self._judge()

    def _control_done(self, replica: str) -> None:
        """Record that a replica has generated a control. If it had generated something before, the control was the
        judgement of condemned rows (_first_work)."""
        held = self._held.get(replica)
        controls = [each.work.key for each in held if each.work.control] if held is not None else []
        if held is None or not controls:
            return
        for key in controls:
            held.pop(key)
        judgement, held.proven = held.proven, True
        self._tell(self._slots.generated(replica))
        if judgement:
            self._judge()

    def _condemn(self, split: _Split, work: Assignment, reason: str) -> None:
        """Give up the row of a lone range. It stays out of all files until the judgement."""
        split.attempt = max(split.attempt, work.attempt)
        split.condemned.update(work.condemned)
        split.open.discard(work.key)
        self._unjudged[work.unit.id] = self._unjudged.get(work.unit.id, 0) + 1
        self._last_reason = reason
        self._news.append(ReplicaNote(work.lost_in[-1], f"{describe(work)} is given up: {work.condemned[0][1]}"))
        self._end_ranges(split)

    def _judge(self) -> None:
        """Let the condemned rows become error rows: they killed replicas that generate other rows."""
        self._failed_judgements = self._distant = 0
        for unit_id in self._unjudged:
            split = self._splits[unit_id]
            for position in split.condemned if split.open else ():
                self._live_errors.set((unit_id, (position, position + 1)), 1)
        self._unjudged.clear()
        withheld, self._withheld = self._withheld, []
        for work in withheld:
            self._put_back(work)
        self._check_errors()

    def _tell(self, event: SlotLeftOut | None) -> None:
        if event is not None:
            self._news.append(event)

    def _check_errors(self) -> None:
        errors = self._errors + self._live_errors.total
        if errors <= self._policy.max_error_rate * self._rows:  # within the limit even without the rows counted below
            return
        begun = sum(held.unit_rows for held in self._held.values())
        begun += sum(split.unit.row_count for split in self._splits.values() if split.open)
        self._policy.check_errors(errors, self._rows + begun)
