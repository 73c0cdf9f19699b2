"""Counts the rows that end on a replica, and how much of its engine is in use, for the monitoring of the job."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from model.requests import Completion
from pipeline.core.error_kinds import ErrorKinds
from pipeline.core.events import EngineRoom, ReplicaStats

if TYPE_CHECKING:
    from model import Engine


@dataclass(slots=True)
class RowCounts:
    """The counts of rows that ended in one attempt at a unit, or on a replica. Not thread-safe.

    Rows that segments held already do not count. A row that was generated several times counts once, with the values of
    its best completion (workers.units.tries).
    """

    rows: int = 0
    errors: int = 0
    """The error rows among them."""
    prompt_tokens: int = 0
    tokens: int = 0
    """The completion tokens of the rows."""
    forwards: int = 0
    """The denoiser forwards, each counted once for every row that took part in it."""
    batched: int = 0
    """The rows that took part in a forward after their prefill, alone or with other rows."""
    batch_rows: float = 0.0
    """The sum of Completion.batch_rows, the mean number of rows in a row's forwards, over the `batched` rows."""
    forward_retries: int = 0
    """The number of times that a row was submitted again because its forward failed."""
    loop_retries: int = 0
    """The number of times that a row was generated again because its completion was a loop."""
    kinds: ErrorKinds = field(default_factory=ErrorKinds)
    """The error rows by kind of error."""

    def add(self, completion: Completion) -> None:
        """Count a row that has ended with this completion."""
        self.rows += 1
        self.prompt_tokens += completion.prompt_tokens
        self.tokens += len(completion.token_ids)
        self.forwards += completion.denoiser_forwards
        if completion.batch_rows:
            self.batched += 1
            self.batch_rows += completion.batch_rows
        if completion.finish_reason == "error":
            self.errors += 1
            self.kinds.add(completion.key, completion.error or "")

    def merge(self, other: "RowCounts") -> None:
        """Add other counts to these, such as those of one attempt to those of the replica."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.kinds.merge(other.kinds.counts())

    def stats(self, **now: Any) -> ReplicaStats:
        """Return the counts in the form that is sent to the driver. `now`: by name, the fields of ReplicaStats that are
        not counted here."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return ReplicaStats(**counts, error_kinds=self.kinds.counts(), **now)


_COUNTS = tuple(name for name in RowCounts.__dataclass_fields__ if name != "kinds")


def engine_room(engine: "Engine") -> EngineRoom:
    """Return how many slots and pages of the engine are in use, and counts of its work.

    It only reads counters, so any thread may call it while a step of the engine runs.
    """
    allocator, stats = engine.cache.allocator, engine.stats
    return EngineRoom(
        slots_used=allocator.slots - allocator.free_slots,
        slots=allocator.slots,
        pages_used=allocator.pages - allocator.free_pages,
        pages=allocator.pages,
        prefill_tokens=stats.prefill_tokens,
        padded_tokens=stats.padded_tokens,
        preemptions=stats.preemptions,
    )
