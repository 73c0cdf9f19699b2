"""A unit, or a range of it, on its way through a replica: rows still to be submitted, rows finished, what is saved."""

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
"""From one try that failed at the storage to the next; the last one from then on. Storage has tried for seconds each
time: together they outlast a store that is away for minutes."""
FEW_TABLES = 64
"""Tables of saved rows that are kept apart; more become one: each has a cost of its own."""


@dataclass(frozen=True, slots=True)
class QueuedRow:
    """A row to generate."""

    index: int
    """In the unit."""
    ids: "array[int]"
    """Its prompt; compact: 4 bytes a token."""
    prefix_tokens: int
    params: GenerationParams
    """Of its next try."""
    settings: tuple[RowSetting, ...] = ()
    """What of them the row brought along."""
    failures: int = 0
    """Forwards that failed with it, in this try."""
    tries: tuple[Try, ...] = ()
    """Those before."""

    def refusal(self, error: Exception) -> str:
        """Why the engine does not take it, with the columns of the settings that the error names."""
        named = [f"{one.name} is that of column '{one.column}'" for one in self.settings if one.name in str(error)]
        return f"{error} ({', '.join(named)})" if named else str(error)


@dataclass(slots=True)
class Tries:
    """When something that fails at the storage is tried again."""

    failures: int = 0
    """In a row."""
    not_before: float = float("-inf")
    error: str = ""
    """Of the last one."""

    @property
    def exhausted(self) -> bool:
        """Whether every pause was taken."""
        return self.failures > len(PAUSES_S)

    @property
    def pause(self) -> float:
        """Seconds from the last failure to the next try."""
        return PAUSES_S[min(self.failures, len(PAUSES_S)) - 1]

    def failed(self, now: float, error: Exception) -> None:
        """Once more."""
        self.failures += 1
        self.error, self.not_before = str(error), now + self.pause

    def succeeded(self) -> None:
        """From the start again."""
        self.failures, self.not_before = 0, float("-inf")


class OpenUnit:
    """An assignment that has been read. Not thread-safe: the runner's lock guards it."""

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
        """data: None where the rows go to segments alone. kept: rows of the assignment that segments hold already.
        rows: how many the assignment has, these included. params: the job's."""
        self.work, self.data, self.started = work, data, now
        self.writer = uuid.uuid4().hex
        self.queue: deque[QueuedRow] = deque()
        """Rows to submit, those with the most tokens to compute first: rows of like lengths are prefilled together."""
        self.finished: list[RowResult] = []
        """Rows that no segment holds yet, those of a flush under way excepted."""
        self.saved = [kept]
        """Rows that segments hold."""
        self.rows = self.kept_rows = kept.num_rows
        totals = tally(kept)
        self.errors = totals.errors
        self.tokens = self.kept_tokens = totals.completion_tokens
        self.counts = RowCounts()
        """Of the rows that ended here."""
        self.flush: Future[pa.Table] | None = None
        self.flushing: list[RowResult] = []
        """The rows of the flush under way."""
        self.flushes = 0
        self.flushed_at = now
        """When the last flush began."""
        self.flush_tries = Tries()
        self.publishing: Future[UnitResult] | None = None
        self.publish_tries = Tries()
        self._wanted, self._params, self._replica = rows, params, replica

    @property
    def complete(self) -> bool:
        """Whether each of its rows is finished."""
        return self.rows == self._wanted

    def add(self, index: int, tries: Sequence[Try]) -> None:
        """A row is finished, after one try or more."""
        kept = best(tries)
        completion, attempt = kept.completion, self.work.attempt + len(tries) - 1
        result = RowResult(index, completion, kept.params.mode, attempt, self._replica, kept.repetition)
        self.finished.append(result)
        self.counts.add(completion)
        self.rows += 1
        self.errors += completion.finish_reason == "error"
        self.tokens += len(completion.token_ids)

    def add_error(self, index: int, error: str, prompt_tokens: int = 0) -> None:
        """A row cannot be generated."""
        key = row_key(self.work.unit, index)
        done = Completion(key=key, finish_reason="error", error=error, prompt_tokens=prompt_tokens)
        self.add(index, [judge(self._params, done)])

    def save(self, rows: pa.Table) -> None:
        """A segment holds these rows now."""
        self.saved.append(rows)
        if len(self.saved) > FEW_TABLES:
            self.saved = [pa.concat_tables(self.saved).combine_chunks()]

    def progress(self) -> UnitProgress:
        """How far it is."""
        return UnitProgress(
            self._replica, self.work.key, self.rows, self.errors, self.tokens, self.kept_rows, self.kept_tokens
        )

    def describe(self, in_engine: int) -> str:
        """What is being done, for the operator."""
        what = name_of(self.work)
        if self.complete:
            return f"{'publishing' if self.work.rows is None else 'saving'} {what}"
        return f"generating {what}: {self.rows} of {self._wanted} rows, {in_engine} in the engine"


def name_of(work: Assignment) -> str:
    """An assignment as notes name it; rows as positions in the unit, both ends included."""
    if work.rows is None:
        return f"unit {work.unit.id}"
    first, end = work.rows
    return (
        f"row {first} of unit {work.unit.id}" if end == first + 1 else f"rows {first}-{end - 1} of unit {work.unit.id}"
    )
