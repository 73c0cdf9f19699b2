"""Counts the rows that a replica finishes and the use of its engine, for the monitoring of the job."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from model.requests import Completion
from pipeline.core.error_kinds import ErrorKinds
from pipeline.core.events import EngineRoom, ReplicaStats

if TYPE_CHECKING:
    from model import Engine


@dataclass(slots=True)
class RowCounts:
    """The counts of rows that ended on this replica, without rows that segments held already. Not thread-safe."""

    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    """Completion tokens of the rows."""
    forwards: int = 0
    """Denoiser forwards, added up over the rows that took part in them."""
    batched: int = 0
    """Rows that took part in a forward after their prefill, alone or in a batch."""
    batch_rows: float = 0.0
    """Sum, over the `batched` rows, of the mean number of rows computed together (Completion.batch_rows)."""
    forward_retries: int = 0
    loop_retries: int = 0
    kinds: ErrorKinds = field(default_factory=ErrorKinds)

    def add(self, completion: Completion) -> None:
        """Count a row that has ended."""
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
        """Add other counts to these, such as those of a unit."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.kinds.merge(other.kinds.counts())

    def stats(self, **now: Any) -> ReplicaStats:
        """Return the counts as the driver gets them; `now` gives the other fields of ReplicaStats."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return ReplicaStats(**counts, error_kinds=self.kinds.counts(), **now)


_COUNTS = tuple(name for name in RowCounts.__dataclass_fields__ if name != "kinds")


def engine_room(engine: "Engine") -> EngineRoom:
    """Return how much of the engine is in use. Only reads counters, so any thread may call it while a step runs."""
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
