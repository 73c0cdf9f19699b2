"""Holds the state of a unit, or of a range of its rows, on a replica: rows to submit, finished rows, saved rows."""

import uuid
from array import array
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import pyarrow as pa

from model.requests import Completion, GenerationParams
from pipeline.core.events import UnitProgress
from pipeline.core.types import Assignment, RowResult, RowSetting, UnitResult
from pipeline.input.unit_reader import UnitData
from pipeline.output.part import row_key, tally
from workers.units.counts import RowCounts
from workers.units.tries import Try, best, judge

PAUSES_S = (1.0, 5.0, 15.0, 60.0, 120.0)
"""Seconds to wait after each try that failed at the storage; later tries use the last value. The storage layer retries
for seconds within each try, so all tries together survive a storage that is unavailable for minutes."""
FEW_TABLES = 64
"""Largest number of separate tables of saved rows; more are merged into one, because every table has a fixed cost."""


@dataclass(frozen=True, slots=True)
class QueuedRow:
    """A row that waits to be submitted to the engine, or that is in the engine."""

    index: int
    """Position in the unit, from 0."""
    ids: "array[int]"
    """Token ids of the prompt, stored compactly with 4 bytes per token."""
    prefix_tokens: int
    params: GenerationParams
    """Settings of the current try."""
    settings: tuple[RowSetting, ...] = ()
    """The settings that come from the row's own columns instead of the job."""
    failures: int = 0
    """Number of failed forwards that this row took part in, in the current try."""
    tries: tuple[Try, ...] = ()
    """The earlier tries of the row."""

    def refusal(self, error: Exception) -> str:
        """Return the text of an error with which the engine refused the row.

        If the error names settings that the row brought along, the text names their columns too.
        """
        named = [f"{one.name} is that of column '{one.column}'" for one in self.settings if one.name in str(error)]
        return f"{error} ({', '.join(named)})" if named else str(error)


@dataclass(slots=True)
class StorageRetry:
    """The state of an operation at the storage that is retried after growing pauses."""

    failures: int = 0
    """Number of failures since the last success."""
    not_before: float = float("-inf")
    error: str = ""
    """Text of the last failure."""

    @property
    def exhausted(self) -> bool:
        """Return True if all pauses have been used."""
        return self.failures > len(PAUSES_S)

    @property
    def pause(self) -> float:
        """Return the seconds from the last failure to the next try."""
        return PAUSES_S[min(self.failures, len(PAUSES_S)) - 1]

    def failed(self, now: float, error: Exception) -> None:
        """Record a failure and set the time before which there is no new try."""
        self.failures += 1
        self.error, self.not_before = str(error), now + self.pause

    def succeeded(self) -> None:
        """Record a success: the pauses start from the first one again."""
        self.failures, self.not_before = 0, float("-inf")


class OpenUnit:
    """An assignment whose rows have been read. Not thread-safe: the runner's lock guards it."""

    def __init__(
        self,
        work: Assignment,
        data: UnitData | None,
        kept: pa.Table,
        rows: int,
        *,
        params: GenerationParams,
        replica: str,
        now: float,
    ) -> None:
        """Open an assignment.

        `data` is None if the rows go to segments only, as those of a range do. `kept` holds the assignment's rows that
        segments hold already. `rows` is the number of all rows of the assignment, the kept ones included. `params` are
        the job's settings.
        """
        self.work, self.data, self.started = work, data, now
        self.writer = uuid.uuid4().hex
        self.queue: deque[QueuedRow] = deque()
        """Rows to submit. Those with the most tokens to compute come first, so that rows of similar length are
        prefilled together."""
        self.finished: list[RowResult] = []
        """Finished rows that are in no segment yet, without the rows of the running flush."""
        self.saved = [kept]
        """Tables of the rows that segments hold."""
        self.rows = self.kept_rows = kept.num_rows
        totals = tally(kept)
        self.errors = totals.errors
        self.tokens = self.kept_tokens = totals.completion_tokens
        self.counts = RowCounts()
        """Counts of the rows that ended in this attempt."""
        self.flush: Future[pa.Table] | None = None
        self.flushing: list[RowResult] = []
        """The rows of the running flush."""
        self.flushes = 0
        self.flushed_at = now
        """Time at which the last flush began; before the first flush, the time at which the unit was opened."""
        self.flush_retry = StorageRetry()
        self.publishing: Future[UnitResult] | None = None
        self.publish_retry = StorageRetry()
        self._wanted, self._params, self._replica = rows, params, replica

    @property
    def complete(self) -> bool:
        """Return True if all rows of the assignment are finished."""
        return self.rows == self._wanted

    def add(self, index: int, tries: Sequence[Try]) -> None:
        """Record a finished row with all its tries; the best one becomes its result."""
        kept = best(tries)
        completion, attempt = kept.completion, self.work.attempt + len(tries) - 1
        result = RowResult(index, completion, kept.params.mode, attempt, self._replica, kept.repetition)
        self.finished.append(result)
        self.counts.add(completion)
        self.rows += 1
        self.errors += completion.finish_reason == "error"
        self.tokens += len(completion.token_ids)

    def add_error(self, index: int, error: str, prompt_tokens: int = 0) -> None:
        """Record a row that cannot be generated as an error row."""
        key = row_key(self.work.unit, index)
        done = Completion(key=key, finish_reason="error", error=error, prompt_tokens=prompt_tokens)
        self.add(index, [judge(self._params, done)])

    def save(self, rows: pa.Table) -> None:
        """Record that a segment holds these rows now."""
        self.saved.append(rows)
        if len(self.saved) > FEW_TABLES:
            self.saved = [pa.concat_tables(self.saved).combine_chunks()]

    def progress(self) -> UnitProgress:
        """Return the progress of the assignment."""
        return UnitProgress(
            self._replica, self.work.key, self.rows, self.errors, self.tokens, self.kept_rows, self.kept_tokens
        )

    def describe(self, in_engine: int) -> str:
        """Return a text for the operator that says what is being done with the assignment."""
        what = name_of(self.work)
        if self.complete:
            return f"{'publishing' if self.work.rows is None else 'saving'} {what}"
        return f"generating {what}: {self.rows} of {self._wanted} rows, {in_engine} in the engine"


def name_of(work: Assignment) -> str:
    """Return the assignment's name for notes. Rows are positions in the unit; the last one is included."""
    if work.rows is None:
        return f"unit {work.unit.id}"
    first, end = work.rows
    return (
        f"row {first} of unit {work.unit.id}" if end == first + 1 else f"rows {first}-{end - 1} of unit {work.unit.id}"
    )
