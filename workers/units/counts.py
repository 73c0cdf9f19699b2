"""What a replica counts while it works, for those who watch the job."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from model.requests import Completion
from pipeline.core.error_kinds import ErrorKinds
from pipeline.core.events import EngineRoom, ReplicaStats

if TYPE_CHECKING:
    from model import Engine


@dataclass(slots=True)
class RowCounts:
    """Of rows that ended on this replica; those that segments held already are not among them. Not thread-safe."""

    rows: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    """Of completions."""
    forwards: int = 0
    """Of the denoiser, in which the rows took part."""
    batched: int = 0
    """Rows that were computed with others or alone."""
    batch_rows: float = 0.0
    """Added up over these: the mean number of rows computed together."""
    forward_retries: int = 0
    loop_retries: int = 0
    kinds: ErrorKinds = field(default_factory=ErrorKinds)

    def add(self, completion: Completion) -> None:
        """A row has ended."""
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
        """Those of a unit."""
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.kinds.merge(other.kinds.counts())

    def stats(self, **now: Any) -> ReplicaStats:
        """What the driver is told; `now`: the fields of ReplicaStats that are no counts of rows."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        return ReplicaStats(**counts, error_kinds=self.kinds.counts(), **now)


_COUNTS = tuple(name for name in RowCounts.__dataclass_fields__ if name != "kinds")


def engine_room(engine: "Engine") -> EngineRoom:
    """How much of the engine is in use; reads counters alone, so that any thread may ask while a step runs."""
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
