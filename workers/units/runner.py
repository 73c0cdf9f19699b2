"""Runs the work of one replica: reads units, keeps the engine full, saves finished rows and publishes parts.

    add(unit) -> look (threads) -> read + tokenise (thread) -> rows, longest first -> engine
        -> segments, then part (threads) -> UnitDone

The rows of a unit finish in any order. The driver gives a replica so many units that enough rows wait for the engine
(pipeline.driver.holding), so the engine continues with rows of the next units while the last rows of the first finish.
This also limits how many units are read and kept in memory. Units are opened, and their rows submitted, in the order in
which they were added. Looking at what is saved of a unit, reading, flushing and publishing run in threads beside the
engine. This module does not use Ray.

Rows that are lost in a failed forward are submitted once more. If one of them is lost again, the error is raised and
ends the replica, because the engine is then assumed to be at fault; its units go to other replicas. An error that makes
the GPU unusable (model.runtime.device_errors) is raised at once.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from math import inf
from typing import Literal

from model.errors import RequestError, TwoTowerError
from model.requests import Completion, EngineError, GenerationParams, Request
from model.runtime.device_errors import device_lost
from pipeline.config.job import FlushSection
from pipeline.core.errors import OutputError, StorageError
from pipeline.core.events import EngineRoom, RangeDone, ReplicaStats, UnitDone, UnitFailed, UnitProgress
from pipeline.core.types import CONTROL, Assignment, UnitResult
from pipeline.monitoring.efficiency import ForwardsWatch
from pipeline.output.part import row_key
from pipeline.output.unit_store import UnitStore
from pipeline.prompts.encoder import EncoderLike
from workers.units.counts import RowCounts
from workers.units.loader import Found, UnitLoader
from workers.units.protocols import EngineLike
from workers.units.saver import Outcome, Saver
from workers.units.tries import judge, next_params
from workers.units.unit import OpenUnit, QueuedRow, StorageRetry, name_of

QUEUE_FACTOR = 2
"""The number of rows that may wait in the engine without a slot, in multiples of its row limit at the start. With this
reserve, all slots can get new rows in one step."""
LOOKERS = 8
"""The number of units of which is looked up at the same time what is saved of them. Each look is two requests to the
storage or more, one after the other."""
MOST_READS = 2 * LOOKERS
"""The maximum number of units that are looked up or read at the same time, or wait for that in the threads."""
HELD_BYTES = 512 << 20
"""The most bytes of carried columns and prompts that open units hold, if there are more than UNITS_AHEAD. With small
rows, the rows that the driver gives are fewer long before."""
UNITS_AHEAD = 2
"""The number of units that are open however large they are: one in the engine, and the next one."""
LATER_READS = 2
"""The number of times that a read is retried if the same work has failed at the storage before."""
SHOWN = 3
"""The most assignments that `doing` describes; if there are more, it describes one of each kind and counts the rest."""
MAX_NOTES = 1000
"""The most messages for the operator that are kept until `notes` is called; the oldest are dropped."""
STOP_PAUSE_S = 0.5
"""The seconds that `stop` waits after a failed flush before the next one."""


class UnitRunner:
    """One replica's engine with the units and ranges that it holds, from `add` until their outcome.

    `work` must always be called from the same thread; all other methods may be called from any thread at any time. A
    lock guards the shared state. It is released during an engine step and while `work` waits, so that a step that hangs
    does not block other callers.
    """

    def __init__(
        self,
        engine: EngineLike,
        encoder: EncoderLike,
        store: UnitStore,
        params: GenerationParams,
        *,
        replica: str,
        flush: FlushSection,
        retry_degenerate: bool = False,
        notes: Sequence[str] = (),
        room: Callable[[], EngineRoom] = EngineRoom,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create a runner.

        `encoder` tokenises prompts. `params`: the job's generation settings. `replica`: the replica's name. `flush`:
        when finished rows are saved. If `retry_degenerate` is true, rows whose completion is a loop are generated again
        (workers.units.tries).
        `notes` are the first messages for the operator. `room` returns how much of the engine is in use; it is called
        from any thread.
        """
        self._engine, self._store, self._replica, self._clock = engine, store, replica, clock
        self._retry_degenerate, self._room = retry_degenerate, room
        self._counts = RowCounts()  # counts of the units that have ended
        self._read_failures = 0
        self._watch = ForwardsWatch()
        self._max_rows = engine.max_rows  # the row limit last reported to the operator
        # It stays if the engine lowers its row limit because memory ran out; more rows then wait in the engine.
        self._queue_limit = QUEUE_FACTOR * engine.max_rows
        self._notes = deque(notes, maxlen=MAX_NOTES)
        self._lock = threading.Lock()
        self._idle = threading.Event()  # set while `work` is not running
        self._idle.set()
        self._wake = threading.Event()  # set if there may be something to do for an idle runner
        self._stopped = self._closed = False
        self._steps = self._reads = self._controls = 0
        self._generated = False  # whether any row was generated since the start
        self._loader = UnitLoader(encoder, store, params=params, replica=replica, tell=self._notes.append, clock=clock)
        # Units are read one at a time, in a thread of its own. It takes what the lookers find in the order of `add`.
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read")
        self._lookers = ThreadPoolExecutor(max_workers=LOOKERS, thread_name_prefix="look")
        self._saver = Saver(store, flush, replica=replica, tell=self._notes.append, done=self._wake.set, clock=clock)
        self._units: dict[str, Assignment] = {}  # by unit id, from `add` until the outcome
        self._to_read: dict[str, StorageRetry] = {}
        self._reading: dict[str, Future[OpenUnit | UnitResult]] = {}
        self._open: dict[str, OpenUnit] = {}  # in the order in which they were opened
        self._largest_bytes: int | None = None  # the most held_bytes of any unit that was read
        self._in_engine: dict[str, tuple[OpenUnit, QueuedRow]] = {}  # by row key

    @property
    def busy(self) -> bool:
        """Return True if the runner holds any assignment."""
        return bool(self._units)

    @property
    def max_rows(self) -> int:
        """Return the largest number of rows that the engine generates together now."""
        return self._engine.max_rows

    @property
    def beats(self) -> int:
        """Return a number that changes whenever an engine step, a read, a flush or a publication has ended.

        Failed ones count too, so a replica whose storage is unavailable is not taken for one that hangs.
        """
        return self._steps + self._reads + self._saver.ended

    def notes(self) -> list[str]:
        """Return the messages for the operator that no earlier call has returned, oldest first."""
        with self._lock:
            return [self._notes.popleft() for _ in range(len(self._notes))]

    def add(self, work: Assignment) -> None:
        """Accept an assignment. It is read in the background and generated by `work`.

        Raises ValueError if the runner already holds an assignment of the same unit, because row keys must be unique in
        the engine.
        """
        unit_id = work.unit.id
        with self._lock:
            if unit_id in self._units:
                raise ValueError(f"unit {unit_id} is already on replica {self._replica}")
            self._units[unit_id] = work
            self._to_read[unit_id] = StorageRetry()
        self._wake.set()

    def work(self, seconds: float) -> list[Outcome]:
        """Run the engine until an assignment ends or `seconds` have passed, and return the outcomes, perhaps none.

        It also returns before the first rows of an assignment get slots of the engine, because they may kill the
        replica: the driver then knows which assignments can be the cause. It also returns when the first row since the
        start is generated: the driver then knows that the replica can generate. After `stop` it returns an empty list
        at once. Raises EngineError if a row is lost a second time, if the error names no row, or if the GPU is
        unusable. Raises other errors of the engine, errors of a flush other than StorageError, and errors of a read or
        a publication other than TwoTowerError. After an error only `stop` and `close` may be called.
        """
        deadline = self._clock() + seconds
        with self._lock:
            self._idle.clear()
            try:
                return self._run(deadline)
            finally:
                self._idle.set()

    def progress(self) -> list[UnitProgress]:
        """Return the progress of every assignment on rows that has been read and has no outcome yet."""
        with self._lock:
            return [opened.progress() for opened in self._open.values() if not opened.work.control]

    def stats(self) -> ReplicaStats:
        """Return counts of the rows that ended since the start, and of the rows that the runner holds now."""
        with self._lock:
            counts = RowCounts()
            ended = (opened.counts for opened in self._open.values() if opened.counts.rows)
            for each in (self._counts, *ended):
                counts.merge(each)
            unsaved = [opened for opened in self._open.values() if opened.finished]
            waiting = min(self._engine.waiting, len(self._in_engine))
            return counts.stats(
                controls=self._controls,
                storage_retries=self._read_failures + self._saver.failures,
                queue=waiting + sum(len(opened.queue) for opened in self._open.values()),
                active=len(self._in_engine) - waiting,
                max_rows=self._engine.max_rows,
                unsaved_rows=sum(len(opened.finished) for opened in unsaved),
                unsaved_s=max((self._clock() - opened.flushed_at for opened in unsaved), default=0.0),
                room=self._room(),
            )

    def doing(self) -> str:
        """Return one text about all assignments: `reading unit a; publishing unit b`, or `idle` if there are none.

        If there are more than SHOWN, the text describes the first one of each kind: generating, publishing, saving and
        reading. It ends with `and 37 more` then.
        """
        with self._lock:
            in_engine = Counter(opened.work.unit.id for opened, _ in self._in_engine.values())
            texts = [opened.describe(in_engine[unit_id]) for unit_id, opened in self._open.items()]
            texts += [f"reading {name_of(self._units[unit_id])}" for unit_id in self._to_read]
        if len(texts) > SHOWN:
            kinds: dict[str, str] = {}
            for text in texts:
                kinds.setdefault(text.partition(" ")[0], text)
            texts = [*kinds.values(), f"and {len(texts) - len(kinds)} more"]
        return "; ".join(texts) or "idle"

    def stop(self, seconds: float) -> int:
        """End the work for good, write all finished rows to segments, and return how many rows this call wrote.

        A running `work` returns after its engine step, and every later call of `work` returns at once. A flush that
        fails is repeated. Gives up after `seconds`, and waits at most half of them for the engine step. Call it from
        another thread than `work`. Raises errors of a flush other than StorageError.
        """
        deadline = time.monotonic() + seconds
        self._stopped = True
        self._wake.set()
        self._idle.wait(seconds / 2)
        flushed, failed = 0, False
        while (left := deadline - time.monotonic()) > 0:
            if failed:
                time.sleep(min(left, STOP_PAUSE_S))
            failed = False
            with self._lock:
                for opened in self._open.values():
                    if opened.flush and opened.flush.done():
                        flushed += self._saver.end_flush(opened)
                    failed |= bool(opened.flush_retry.failures)
                    if opened.finished and not opened.flush:
                        self._saver.begin_flush(opened)
                under_way = [opened.flush for opened in self._open.values() if opened.flush]
            if not under_way:
                break
            wait(under_way, max(0, deadline - time.monotonic()), FIRST_COMPLETED)
        return flushed

    def close(self) -> None:
        """Shut down the threads without waiting for them, and close the input.

        Units that are not finished are given up, and their rows that are in no segment are lost. Safe to call twice.
        """
        if self._closed:
            return
        self._closed = True
        for future in self._reading.values():
            future.cancel()
        self._lookers.shutdown(wait=False, cancel_futures=True)
        self._reader.submit(self._store.input.close)  # runs after the read in progress
        self._reader.shutdown(wait=False)
        self._saver.close()

    # The methods below are called with the lock held.

    def _run(self, deadline: float) -> list[Outcome]:
        """Do the work of `work` until the deadline, by the runner's clock."""
        while not self._stopped:
            self._wake.clear()
            self._start_reading()
            outcomes = [*self._collect_read(), *self._settle()]
            self._top_up()
            begun = self._begin()
            left = deadline - self._clock()
            if outcomes or begun or left <= 0:
                return outcomes
            if self._in_engine:
                generated = self._generated
                self._step()
                if self._generated and not generated:
                    deadline = -inf  # the driver trusts a replica only after this
            else:
                self._wait(left)
        return []

    @contextmanager
    def _unlocked(self) -> Iterator[None]:
        """Release the lock for the `with` block."""
        self._lock.release()
        try:
            yield
        finally:
            self._lock.acquire()

    def _wait(self, seconds: float) -> None:
        """Wait until a background task ends, work is added, or a write or read is due, but at most `seconds`."""
        due = [self._saver.due_at(opened) for opened in self._open.values()]
        if self._may_read():
            due += [retry.not_before for unit_id, retry in self._to_read.items() if unit_id not in self._reading]
        seconds = min([seconds, *(at - self._clock() for at in due)])
        with self._unlocked():
            self._wake.wait(max(0, seconds))

    def _start_reading(self) -> None:
        """Start to read assignments that wait for it, in the order of `add`, as far as memory allows.

        One whose read has failed is left out during its pause.
        """
        for unit_id, retry in self._to_read.items():
            if not self._may_read():
                return
            if unit_id not in self._reading and self._clock() >= retry.not_before:
                work = self._units[unit_id]
                look = None if work.control else self._lookers.submit(self._loader.look, work)
                future = self._reader.submit(self._read, work, look)
                future.add_done_callback(lambda _future: self._wake.set())
                self._reading[unit_id] = future

    def _may_read(self) -> bool:
        """Return whether another assignment may be read now. A unit whose bytes are not known yet counts as the largest
        one that was read so far; before any was, as its files."""
        if len(self._open) + len(self._reading) < UNITS_AHEAD:
            return True
        if len(self._reading) >= MOST_READS:
            return False
        held = sum(opened.held_bytes for opened in self._open.values())
        if self._largest_bytes is not None:
            return held + (len(self._reading) + 1) * self._largest_bytes <= HELD_BYTES
        units = [self._units[unit_id].unit for unit_id in self._to_read]
        return sum(piece.size for unit in units[: MOST_READS + 1] for piece in unit.pieces) <= HELD_BYTES

    def _read(self, work: Assignment, look: Future[Found | UnitResult] | None) -> OpenUnit | UnitResult:
        """Wait for the look, which a control does not need, and open the assignment. Runs in the read thread, without
        the lock. Raises what the look and UnitLoader.open raise."""
        if look is None:
            return self._loader.open_control(work)
        found = look.result()
        return self._loader.open(work, found) if isinstance(found, Found) else found

    def _collect_read(self) -> list[Outcome]:
        """Take in the reads that have ended. Return the outcomes of assignments that could not be read, or whose unit
        has its part already."""
        outcomes: list[Outcome] = []
        for unit_id in [unit_id for unit_id, future in self._reading.items() if future.done()]:
            self._reads += 1
            try:
                opened = self._reading.pop(unit_id).result()
            except TwoTowerError as error:
                if unit_id == CONTROL:
                    raise
                if not self._read_again(unit_id, error):
                    stage: Literal["part", "read"] = "part" if isinstance(error, OutputError) else "read"
                    failed = UnitFailed(self._replica, self._units[unit_id], str(error), stage)
                    outcomes.append(self._end(unit_id, failed))
                continue
            del self._to_read[unit_id]
            if isinstance(opened, OpenUnit):
                self._open[unit_id] = opened
                self._largest_bytes = max(self._largest_bytes or 0, opened.held_bytes)
            else:
                outcomes.append(self._end(unit_id, self._published(opened)))
        return outcomes

    def _read_again(self, unit_id: str, error: TwoTowerError) -> bool:
        """Record a failed read, and return True if it is to be retried after a pause.

        Failures of the storage are retried once per pause in PAUSES_S, as those of writes are, because credentials and
        rights, for example, may be renewed meanwhile. Work that has failed before, on this or another replica, has only
        LATER_READS retries, so that a file which stays unreadable does not hold up the end of a job.
        """
        retry, failed_before = self._to_read[unit_id], self._units[unit_id].failures > 0
        retry.failed(self._clock(), error)
        if not isinstance(error, StorageError):
            return False
        self._read_failures += 1
        failing = sum(bool(each.failures) for each in self._to_read.values())
        if retry.failures == 1 and failing == 1:  # one note about an outage, not one for each of many units
            self._notes.append(f"unit {unit_id}: reading it failed and is tried again: {error}")
        return retry.failures <= LATER_READS if failed_before else not retry.exhausted

    def _published(self, result: UnitResult) -> Outcome:
        """Return the outcome of an assignment whose unit has its part already."""
        work = self._units[result.unit_id]
        if work.rows is not None:  # the whole unit is assigned after its ranges, and then finds the part
            return RangeDone(self._replica, work.key)
        return UnitDone(result, result.totals.rows, result.totals.completion_tokens)

    def _settle(self) -> list[Outcome]:
        """Let the saver handle every open unit, and return the outcomes of those that have ended."""
        found = [(unit_id, self._saver.settle(opened)) for unit_id, opened in self._open.items()]
        return [self._end(unit_id, outcome) for unit_id, outcome in found if outcome]

    def _end(self, unit_id: str, outcome: Outcome) -> Outcome:
        """Forget the assignment of this unit, add its counts to those of the runner, and return the outcome."""
        del self._units[unit_id]
        self._to_read.pop(unit_id, None)
        if opened := self._open.pop(unit_id, None):
            self._counts.merge(opened.counts)
        return outcome

    def _top_up(self) -> None:
        """Submit queued rows, first those of the unit that was opened first, until enough rows wait in the engine."""
        for opened in self._open.values():
            while opened.queue and self._engine.waiting < self._queue_limit:
                self._submit(opened, opened.queue.popleft())

    def _begin(self) -> bool:
        """Mark the assignments of which rows may be in slots during the next step, and return whether any of them was
        not marked before.

        The engine gives slots in the order of submission, so these rows are the first ones that it holds.
        """
        waiting = min(self._engine.waiting, len(self._in_engine))
        rows = max(len(self._in_engine) - waiting, self._engine.max_rows)
        new = [opened for opened, _ in islice(self._in_engine.values(), rows) if not opened.begun]
        for opened in new:
            opened.begun = True
        return bool(new)

    def _submit(self, opened: OpenUnit, row: QueuedRow) -> None:
        """Submit a row to the engine. If the engine refuses it, it becomes an error row.

        Raises EngineError for a control that is refused: nothing is saved of it, and it proves nothing.
        """
        key = row_key(opened.work.unit, row.index)
        try:
            self._engine.submit(Request(key, row.ids, row.params, row.prefix_tokens))
        except RequestError as error:
            if opened.work.control:
                raise EngineError(f"the control prompt was refused: {error}") from error
            opened.add_error(row.index, row.refusal(error), prompt_tokens=len(row.ids))
            self._wake.set()  # it may have been the last row of its unit
        else:
            self._in_engine[key] = opened, row

    def _step(self) -> None:
        """Run one engine step, record the rows that ended in it, and queue the rows that it lost once more.

        Raises EngineError as `_put_back` does.
        """
        failure: EngineError | None = None
        try:
            with self._unlocked():
                completions = self._engine.step()
        except EngineError as error:
            failure, completions = error, error.completions
        self._steps += 1
        if (rows := self._engine.max_rows) < (before := self._max_rows):
            self._notes.append(
                f"memory ran out: the engine lowered its max_rows from {before} to {rows}; "
                f"set engine.max_rows to {rows}"
            )
            self._max_rows = rows
        for completion in completions:
            self._take_in(*self._in_engine.pop(completion.key), completion)
        if failure is not None:
            self._put_back(failure)

    def _take_in(self, opened: OpenUnit, row: QueuedRow, completion: Completion) -> None:
        """Record a try of a row that has ended with this completion.

        If the row gets another try, it is submitted at once with the same key, ahead of the queued rows. Otherwise the
        row is finished.
        """
        self._generated |= completion.finish_reason != "error"
        if opened.work.control:
            opened.end_control(completion)
            self._controls += 1
            return
        if warning := self._watch.take(row.params, completion):
            self._notes.append(warning)
        tries = (*row.tries, judge(row.params, completion))
        params = next_params(tries) if self._retry_degenerate else None
        if params is None:
            opened.add(row.index, tries)
        else:
            self._counts.loop_retries += 1
            self._submit(opened, replace(row, params=params, tries=tries, failures=0))

    def _put_back(self, error: EngineError) -> None:
        """Put the rows that a failed step lost back to the front of their queues.

        Raises the error instead if it names no rows, if it names a row that was lost before in the same try, or if the
        GPU is unusable.
        """
        lost = [self._in_engine.pop(key) for key in error.keys]
        if not lost or any(row.failures for _, row in lost) or device_lost(error):
            raise error
        for opened, row in reversed(lost):
            opened.queue.appendleft(replace(row, failures=1))
        self._counts.forward_retries += len(lost)
        self._notes.append(f"{error}; rows that are submitted once more: {len(lost)}")
