"""Holds the state of an assignment on a replica: its rows to submit, its finished rows and its saved rows."""

import uuid
from array import array
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import pyarrow as pa

from model.requests import Completion, EngineError, GenerationParams
from pipeline.core.events import UnitProgress
from pipeline.core.types import Assignment, RowResult, RowSetting, UnitResult
from pipeline.input.unit_reader import UnitData
from pipeline.output.part import row_key, tally
from workers.units.counts import RowCounts
from workers.units.tries import Try, best, judge

PAUSES_S = (1.0, 5.0, 15.0, 60.0, 120.0)
"""The seconds to wait after the first, second, … failure at the storage without a success between them; after more
failures, the last value is used. Within each try, the storage itself retries for a while, so the tries together survive
a storage that is unavailable for minutes."""
FEW_TABLES = 64
"""The most separate tables of saved rows per assignment; more are merged into one, as every table has a fixed cost."""


@dataclass(frozen=True, slots=True)
class QueuedRow:
    """A row with a usable prompt that waits to be submitted to the engine, or that is in the engine."""

    index: int
    """The position in the unit, from 0."""
    ids: "array[int]"
    """The token ids of the prompt, stored compactly with 4 bytes per token."""
    prefix_tokens: int
    """The number of first tokens of the prompt that the engine computes once for many rows (Request.prefix_tokens)."""
    params: GenerationParams
    """The settings of the current try."""
    settings: tuple[RowSetting, ...] = ()
    """The settings that come from columns of the row. `params` contains them; texts of errors name the columns."""
    failures: int = 0
    """The number of failed forwards that this row was lost in, in the current try."""
    tries: tuple[Try, ...] = ()
    """The earlier tries of the row, oldest first (`on_degenerate: retry`)."""

    def refusal(self, error: Exception) -> str:
        """Return the text for column `error` of a row that the engine refused with this error.

        If the error names a setting that comes from a column, the text names the column too.
        """
        named = [f"{one.name} is that of column '{one.column}'" for one in self.settings if one.name in str(error)]
        return f"{error} ({', '.join(named)})" if named else str(error)


@dataclass(slots=True)
class StorageRetry:
    """Counts the failures of one operation at the storage (reading, flushing or publishing a unit), and says when the
    operation may be tried again. The pauses grow with the failures."""

    failures: int = 0
    """The number of failures since the last success."""
    not_before: float = float("-inf")
    """The time before which there is no new try, by the runner's clock; -inf if nothing has failed since the last
    success."""
    error: str = ""
    """The text of the last error that was passed to `failed`; "" if there was none. A success does not clear it."""

    @property
    def exhausted(self) -> bool:
        """Return True if all PAUSES_S have been used: there are more failures since the last success than pauses."""
        return self.failures > len(PAUSES_S)

    @property
    def pause(self) -> float:
        """Return the seconds from the last failure to the next try. Only valid after a failure."""
        return PAUSES_S[min(self.failures, len(PAUSES_S)) - 1]

    def failed(self, now: float, error: Exception) -> None:
        """Record a failure and set the time before which there is no new try."""
        self.failures += 1
        self.error, self.not_before = str(error), now + self.pause

    def succeeded(self) -> None:
        """Record a success: after the next failure, the pauses start from the first one again."""
        self.failures, self.not_before = 0, float("-inf")


class OpenUnit:
    """An assignment that has been read: a unit or a range of it, with the state of its rows.

    A row is in `queue` or in the engine until it is finished; then in `finished`, in `flushing` and, once a segment
    holds it, in `saved`. Not thread-safe: the runner's lock guards it.
    """

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

        `data` has what the part needs beside the results, or is None if the rows go to segments only, as those of a
        range do. `kept` holds the assignment's rows that segments hold already. `rows` is the number of all rows of the
        assignment, the kept ones included. `params` are the job's generation settings. `replica` is the replica's name.
        `now` is the time by the runner's clock.
        """
        self.work, self.data, self.started = work, data, now
        self.writer = uuid.uuid4().hex
        self.queue: deque[QueuedRow] = deque()
        """The rows to submit. Those with the most tokens to compute come first, so that rows of similar length are
        prefilled together."""
        self.finished: list[RowResult] = []
        """The finished rows that are in no segment yet, without the rows of the running flush."""
        self.given_up: list[RowResult] = []
        """The error rows of condemned rows. They are in no segment, so that a new run tries these rows once more."""
        self.saved = [kept]
        """The tables of the rows that segments hold, those of earlier attempts included."""
        self.rows = self.kept_rows = kept.num_rows
        totals = tally(kept)
        self.errors = totals.errors
        self.tokens = self.kept_tokens = totals.completion_tokens
        self.counts = RowCounts()
        """The counts of the rows that ended in this attempt."""
        self.held_bytes = data.columns.nbytes if data is not None else 0
        """The bytes of the columns that wait for the part (the id, the carried columns and the prompts, if kept) and of
        the token ids."""
        self.begun = False
        """Whether rows of it may have been in slots of the engine."""
        self.flush: Future[pa.Table] | None = None
        self.flushing: list[RowResult] = []
        """The rows of the running flush."""
        self.flushes = 0
        self.flushed_at = now
        """The time at which the last flush began; before the first flush, the time at which the unit was opened."""
        self.flush_retry = StorageRetry()
        self.publishing: Future[UnitResult] | None = None
        self.publish_retry = StorageRetry()
        self._wanted, self._params, self._replica = rows, params, replica
        self._condemned = frozenset(position for position, _ in work.condemned)

    @property
    def complete(self) -> bool:
        """Return True if all rows of the assignment are finished."""
        return self.rows == self._wanted

    def add(self, index: int, tries: Sequence[Try]) -> None:
        """Record that the row at position `index` of the unit is finished. The best of its tries becomes its result."""
        kept = best(tries)
        completion, attempt = kept.completion, self.work.attempt + len(tries) - 1
        result = RowResult(index, completion, kept.params.mode, attempt, self._replica, kept.repetition)
        (self.given_up if index in self._condemned else self.finished).append(result)
        self.counts.add(completion)
        self.rows += 1
        self.errors += completion.finish_reason == "error"
        self.tokens += len(completion.token_ids)

    def end_control(self, completion: Completion) -> None:
        """Record that the prompt of a control was generated; its completion is thrown away.

        Raises EngineError if it has none, which ends the replica.
        """
        if completion.finish_reason == "error":
            raise EngineError(f"the control prompt could not be generated: {completion.error}")
        self.rows += 1

    def add_error(self, index: int, error: str, prompt_tokens: int = 0) -> None:
        """Record that the row at position `index` of the unit cannot be generated: it becomes an error row.

        `error`: the text for column `error`. `prompt_tokens`: the length of its prompt; 0 if it was not tokenised.
        """
        key = row_key(self.work.unit, index)
        done = Completion(key=key, finish_reason="error", error=error, prompt_tokens=prompt_tokens)
        self.add(index, [judge(self._params, done)])

    def save(self, rows: pa.Table) -> None:
        """Record that a segment holds these rows now. They are kept in memory for the part."""
        self.saved.append(rows)
        if len(self.saved) > FEW_TABLES:
            self.saved = [pa.concat_tables(self.saved).combine_chunks()]

    def progress(self) -> UnitProgress:
        """Return the progress of the assignment as the driver gets it, rows of earlier attempts included."""
        kept = self.kept_rows, self.kept_tokens
        return UnitProgress(self._replica, self.work.key, self.rows, self.errors, self.tokens, *kept, self.begun)

    def describe(self, in_engine: int) -> str:
        """Return a text for the operator that says what is being done with the assignment, and how far it is.

        `in_engine`: the number of its rows that are in the engine.
        """
        what = name_of(self.work)
        if self.complete:
            return f"{'publishing' if self.work.rows is None else 'saving'} {what}"
        return f"generating {what}: {self.rows} of {self._wanted} rows, {in_engine} in the engine"


def name_of(work: Assignment) -> str:
    """Return the name of an assignment in messages: `unit a`, `row 3 of unit a`, `rows 3-7 of unit a` or `the control
    prompt`.

    The rows are positions in the unit, from 0; the last one is included.
    """
    if work.rows is None:
        return f"unit {work.unit.id}"
    first, end = work.rows
    if work.control:
        return "the control prompt"
    return (
        f"row {first} of unit {work.unit.id}" if end == first + 1 else f"rows {first}-{end - 1} of unit {work.unit.id}"
    )
