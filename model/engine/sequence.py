"""Defines the state of a request in the engine, and the lanes in which rows share their forwards. Does not import
torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from model.requests import Completion, FinishReason, Mode, Request

Clock = tuple[int, int, float]
"""The clock of a lane: its denoiser forwards so far, the sum of the rows in them, and the sum of their seconds."""
NO_TIME: Clock = (0, 0, 0.0)


@dataclass(slots=True, eq=False)
class Prefix:
    """Tokens that several rows begin with, computed once and kept in a slot of their own."""

    tokens: tuple[int, ...]
    slot: int
    pending: list[int]
    """Tokens that have not been launched in a context forward yet."""
    last_used: int = 0
    prefix: ClassVar[None] = None


@dataclass(slots=True, eq=False)
class ActiveRow:
    """A request in the engine: its state, and its costs so far."""

    request: Request
    number: int
    """The row's place in the order of arrival."""
    submitted: float
    mode: Mode = "diffusion"
    slot: int = -1
    prefix: Prefix | None = None
    lane: "Lane | None" = None
    ended: bool = False
    """Whether the row has left the engine, or is back in the queue as another ActiveRow. Results of forwards in
    progress are then ignored for it."""
    preemptions: int = 0
    pending: list[int] = field(default_factory=list)
    """Tokens to put into the context next."""
    tokens: list[int] = field(default_factory=list)
    """Finished tokens: whole blocks, or single tokens in the AR modes."""
    confidences: list[float] = field(default_factory=list)
    """The confidence of each of `tokens` when it was committed."""
    checked: int = 0
    """Number of committed tokens that are known not to end the row."""
    steps: list[int] = field(default_factory=list)
    forwards: int = 0
    trace: list[tuple[int, ...]] = field(default_factory=list)
    since: Clock = NO_TIME
    """The lane's clock when the row joined its denoiser forwards."""
    until: Clock = NO_TIME
    """The lane's clock when the row's last block was full."""
    queue_s: float = 0.0
    prefill_s: float = 0.0
    denoise_s: float = 0.0
    commit_s: float = 0.0
    shared_rows: int = 0
    shared_forwards: int = 0

    def __post_init__(self) -> None:
        self.mode = self.request.params.mode

    @property
    def prefill_tokens(self) -> int:
        """Return the number of prompt tokens that go into the context before anything is generated."""
        # the AR modes keep the last token out of the context: it is the input of the next forward
        return len(self.request.prompt_ids) - (self.mode != "diffusion")

    @property
    def last_token(self) -> int:
        """Return the newest token of prompt and completion."""
        return self.tokens[-1] if self.tokens else self.request.prompt_ids[-1]

    @property
    def room(self) -> int:
        """Return how many tokens the completion may still take after `tokens`."""
        return self.request.params.max_new_tokens - len(self.tokens)

    def rejoin(self, clock: Clock) -> None:
        """Record the denoiser forwards that the row took part in, from `since` to `until`, and start again at
        `clock`."""
        self.shared_forwards += self.until[0] - self.since[0]
        self.shared_rows += self.until[1] - self.since[1]
        self.denoise_s += self.until[2] - self.since[2]
        self.since = self.until = clock

    def completion(
        self,
        reason: FinishReason,
        token_ids: list[int],
        text: str | None,
        error: str | None,
        block_confidences: list[float],
        now: float,
    ) -> Completion:
        """Return the completion of a row that has ended, with its costs. block_confidences: the confidences in its last
        block."""
        kept = (self.confidences + block_confidences)[: len(token_ids)]
        threshold = self.request.params.confidence_threshold
        return Completion(
            key=self.request.key,
            token_ids=tuple(token_ids),
            text=text,
            finish_reason=reason,
            error=error,
            prompt_tokens=len(self.request.prompt_ids),
            denoiser_forwards=self.forwards,
            steps_per_block=tuple(self.steps),
            forced_commits=len([c for c in kept if c <= threshold]) if self.steps else 0,
            mean_confidence=sum(kept) / len(kept) if kept else None,
            queue_s=self.queue_s,
            prefill_s=self.prefill_s,
            denoise_s=self.denoise_s,
            commit_s=self.commit_s,
            latency_s=now - self.submitted,
            batch_rows=self.shared_rows / self.shared_forwards if self.shared_forwards else 0.0,
            preemptions=self.preemptions,
            trace=tuple(self.trace),
        )


class Lane:
    """A group of rows whose forwards are launched together. A row is in one of three places: fresh, filling or
    extending."""

    def __init__(self) -> None:
        self.fresh: dict[ActiveRow, None] = {}  # rows that begin a block in the next turn
        self.filling: dict[ActiveRow, None] = {}  # rows whose block the denoiser is filling
        self.extending: dict[ActiveRow, None] = {}  # rows whose pending tokens go into the context next
        self.rows = 0
        self.ar_rows = 0  # number of the rows that are in AR mode
        self.turns = 0
        self.clock = NO_TIME

    def put(self, row: ActiveRow) -> None:
        """Add a row whose prompt is in the context, or has been launched to go there."""
        row.lane = self
        self.rows += 1
        if row.mode == "ar":
            self.ar_rows += 1
            row.pending = [row.last_token]
            self.extending[row] = None
        else:
            self.fresh[row] = None

    def block_done(self, row: ActiveRow, pending: list[int]) -> None:
        """Note that the row's block is full and that `pending` goes into the context next."""
        row.pending = pending
        self.filling.pop(row, None)
        self.extending[row] = None

    def drop(self, row: ActiveRow) -> None:
        """Remove a row."""
        self.rows -= 1
        self.ar_rows -= row.mode == "ar"
        for place in (self.fresh, self.filling, self.extending):
            place.pop(row, None)

    def due(self, extend_every: int) -> bool:
        """Count a turn and return whether it includes a context forward."""
        self.turns += 1
        if self.turns % extend_every == 0 or not (self.filling or self.fresh):
            return True
        return bool(self.ar_extending())  # their blocks are filled by context forwards

    def ar_extending(self) -> list[ActiveRow]:
        """Return the rows in AR mode whose pending tokens go into the context next."""
        return [row for row in self.extending if row.mode == "ar"] if self.ar_rows else []

    def take_extending(self) -> list[ActiveRow]:
        """Remove and return the rows whose pending tokens go into the context now; rows in AR mode come last."""
        rows = list(self.extending)
        if self.ar_rows:
            rows.sort(key=lambda row: row.mode == "ar")
        self.extending = {}
        return rows

    def extended(self, rows: Iterable[ActiveRow]) -> None:
        """Note that the pending tokens of these rows have been launched. Rows in AR mode are in no place until they
        come back."""
        self.fresh.update(dict.fromkeys(row for row in rows if row.mode != "ar" and not row.ended))

    def take_fresh(self) -> list[ActiveRow]:
        """Move all fresh rows to `filling` and return them: rows that are new to the lane, and rows that were
        extended."""
        begin = list(self.fresh)
        self.fresh = {}
        self.filling.update(dict.fromkeys(begin))
        return begin
