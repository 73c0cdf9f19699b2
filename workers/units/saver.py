"""Saves finished rows while the engine runs: in segments until the unit is complete, then in its part.

For each assignment, one flush or one publication runs at a time. If the storage fails, the rows stay in memory and the
write is retried after growing pauses. An assignment fails only if all its rows are finished and its part (for a range:
its last segment) cannot be written.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import pyarrow as pa

from model.errors import TwoTowerError
from pipeline.config.job import FlushSection
from pipeline.core.errors import StorageError
from pipeline.core.events import RangeDone, UnitDone, UnitFailed
from pipeline.core.text import counted
from pipeline.core.types import RowResult, UnitResult
from pipeline.output.part import result_table
from pipeline.output.unit_store import UnitStore
from workers.units.unit import OpenUnit, name_of

PUBLISHERS = 4
"""The number of parts that are published at the same time. Every part takes a few requests to the storage one after the
other, so that one thread would hold up an engine that finishes many small units."""
Outcome = UnitDone | RangeDone | UnitFailed
"""The end of an assignment on this replica, which the driver is told."""
NEVER = float("inf")
"""The time of something that is not due; -NEVER is the time of something that is due at once."""


class Saver:
    """Decides when finished rows are written and writes them: segments in one thread, parts in a few others.

    No segment therefore waits behind a part. Not thread-safe: all methods must be called under one lock.
    """

    def __init__(
        self,
        store: UnitStore,
        settings: FlushSection,
        *,
        replica: str,
        tell: Callable[[str], None],
        done: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """Create a saver with its threads.

        `settings`: when finished rows are flushed. `tell` is called with messages for the operator. `done` is called
        when a flush or a publication has ended, usually in the thread that ran it, so that somebody calls `settle`.
        """
        self._store, self._settings, self._replica = store, settings, replica
        self._tell, self._done, self._clock = tell, done, clock
        self._flusher = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flush")
        self._publisher = ThreadPoolExecutor(max_workers=PUBLISHERS, thread_name_prefix="publish")
        self._quiet_until = -NEVER  # the time until which further failures of publications are not told
        self.ended = 0
        """The number of flushes and publications that have ended, failed ones included."""
        self.failures = 0
        """The number of flushes and publications that failed at the storage."""

    def settle(self, opened: OpenUnit) -> Outcome | None:
        """Process a write that has ended, start the next one that is due, and return the outcome of the assignment, or
        None while it is in progress.

        After a StorageError the write is tried again later. When the tries of a publication or of a range's last
        segment are used up, the outcome is UnitFailed. For any other of the project's own errors in a publication it
        is UnitFailed at once. All other errors of a write are raised.
        """
        if opened.flush and opened.flush.done():
            self.end_flush(opened)
        if opened.publishing and opened.publishing.done() and (outcome := self._end_publishing(opened)):
            return outcome
        if opened.flush or opened.publishing:
            return None
        if opened.complete and opened.work.rows is not None:
            if not opened.finished:
                return RangeDone(self._replica, opened.work.key)
            if opened.flush_retry.exhausted:
                retry = opened.flush_retry
                return UnitFailed(self._replica, opened.work, f"{retry.error} ({retry.failures} times)", "save")
        now = self._clock()
        if now >= self._flush_at(opened):
            self.begin_flush(opened)
        elif now >= self._publish_at(opened):
            self._begin_publishing(opened)
        return None

    def due_at(self, opened: OpenUnit) -> float:
        """Return the time at which `settle` must be called even if no write has ended.

        It is NEVER if a write is in progress or there is nothing to write.
        """
        if opened.flush or opened.publishing:
            return NEVER
        return min(self._flush_at(opened), self._publish_at(opened))

    def begin_flush(self, opened: OpenUnit) -> None:
        """Start to write the finished rows as a segment, in the flush thread."""
        opened.flushing, opened.finished = opened.finished, []
        opened.flushed_at = self._clock()
        opened.flushes += 1
        opened.flush = self._flusher.submit(self._flush, opened, opened.flushing, opened.flushes)
        opened.flush.add_done_callback(lambda _future: self._done())

    def end_flush(self, opened: OpenUnit) -> int:
        """Take in the result of a flush that has ended, and return how many rows it wrote.

        If the storage failed, these are none, and the rows go back to the finished rows that wait to be saved. Raises
        any other error of the flush.
        """
        assert opened.flush is not None
        flush, rows = opened.flush, opened.flushing
        opened.flush, opened.flushing = None, []
        self.ended += 1
        try:
            opened.save(flush.result())
        except StorageError as error:
            opened.finished[:0] = rows
            self.failures += 1
            if not opened.flush_retry.failures:
                self._tell(
                    f"{name_of(opened.work)}: {counted(len(rows), 'finished row')} kept in memory, as saving failed: "
                    f"{error}"
                )
            opened.flush_retry.failed(self._clock(), error)
            return 0
        if opened.flush_retry.failures:
            self._tell(f"{name_of(opened.work)}: the storage works again, and its finished rows are saved")
        opened.flush_retry.succeeded()
        return len(rows)

    def close(self) -> None:
        """Shut down the threads without waiting for them. Writes that have not begun are dropped."""
        for threads in (self._flusher, self._publisher):
            threads.shutdown(wait=False, cancel_futures=True)

    def _flush_at(self, opened: OpenUnit) -> float:
        """Return the time at which the next flush is due; NEVER if there are no rows for one, or if they go straight
        into the part."""
        into_part = opened.complete and opened.work.rows is None and not opened.publish_retry.failures
        if into_part or not opened.finished:
            return NEVER
        at = opened.flushed_at + self._settings.seconds
        most = self._settings.rows
        # If the unit may kill replicas, or is complete but could not be published, its rows are saved at once.
        if opened.work.suspect or opened.complete or (most is not None and len(opened.finished) >= most):
            at = -NEVER
        return max(at, opened.flush_retry.not_before)

    def _publish_at(self, opened: OpenUnit) -> float:
        """Return the time at which the publication is due; NEVER if the unit is not complete or is only a range."""
        ready = opened.complete and opened.work.rows is None
        return opened.publish_retry.not_before if ready else NEVER

    def _flush(self, opened: OpenUnit, rows: Sequence[RowResult], number: int) -> pa.Table:
        """Write the rows as a segment and return them as a table. Runs in the flush thread."""
        work = opened.work
        table = result_table(work.unit, rows)
        self._store.write_segment(work.unit, table, writer=opened.writer, number=number, attempt=work.attempt)
        return table

    def _begin_publishing(self, opened: OpenUnit) -> None:
        """Start to publish the part of a complete unit, in one of the publish threads."""
        saved, finished = list(opened.saved), [*opened.finished, *opened.given_up]
        opened.publishing = self._publisher.submit(self._publish, opened, saved, finished)
        opened.publishing.add_done_callback(lambda _future: self._done())

    def _publish(self, opened: OpenUnit, saved: Sequence[pa.Table], finished: Sequence[RowResult]) -> UnitResult:
        """Publish the unit's part and return its result. Runs in one of the publish threads."""
        assert opened.data is not None
        work, rows = opened.work, [*saved, result_table(opened.work.unit, finished)]
        seconds = self._clock() - opened.started
        part = self._store.make_part(opened.data, rows, writer=opened.writer, attempt=work.attempt, seconds=seconds)
        return self._store.publish(work.unit, part)

    def _end_publishing(self, opened: OpenUnit) -> Outcome | None:
        """Take in the result of a publication that has ended, and return the outcome; None if it is to be retried."""
        publishing: Future[UnitResult] | None = opened.publishing
        assert publishing is not None
        opened.publishing = None
        self.ended += 1
        retry, work = opened.publish_retry, opened.work
        try:
            result = publishing.result()
        except StorageError as error:
            self.failures += 1
            retry.failed(self._clock(), error)
            if retry.exhausted:
                return UnitFailed(self._replica, work, f"{error} ({retry.failures} times)", "save")
            if self._clock() >= self._quiet_until:  # one note about an outage, not one for each of many units
                self._tell(
                    f"unit {work.unit.id}: its part could not be published; next try in {retry.pause:g} s: {error}"
                )
                self._quiet_until = retry.not_before
            return None
        except TwoTowerError as error:
            return UnitFailed(self._replica, work, str(error), "part")
        if result.published_by_other:
            self._tell(
                f"unit {work.unit.id}: replica {result.replica} published its part first, in attempt {result.attempt}; "
                f"that of attempt {work.attempt} is dropped"
            )
        return UnitDone(result, opened.kept_rows, opened.kept_tokens)
