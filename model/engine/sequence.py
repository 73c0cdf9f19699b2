"""What the engine keeps of a request on its way, and the lanes in which rows share their forwards. Free of torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from model.requests import Completion, FinishReason, Mode, Request

Clock = tuple[int, int, float]
"""Of a lane: its denoiser forwards so far, the rows in them together, their seconds."""
NO_TIME: Clock = (0, 0, 0.0)


@dataclass(slots=True, eq=False)
class Prefix:
    """Tokens that several rows begin with, computed once, in a slot of their own."""

    tokens: tuple[int, ...]
    slot: int
    pending: list[int]
    """Tokens that are not on their way into the context yet."""
    last_used: int = 0
    prefix: ClassVar[None] = None


@dataclass(slots=True, eq=False)
class ActiveRow:
    """One request on its way: what it has, what it needs, what it has cost."""

    request: Request
    number: int
    """Its place in the order of arrival."""
    submitted: float
    mode: Mode = "diffusion"
    slot: int = -1
    prefix: Prefix | None = None
    lane: "Lane | None" = None
    ended: bool = False
    """Out of the engine, or back in the queue as another ActiveRow: what a forward under way says of it is void."""
    preemptions: int = 0
    pending: list[int] = field(default_factory=list)
    """Tokens to put into the context next."""
    tokens: list[int] = field(default_factory=list)
    """Finished tokens: whole blocks, or single tokens in the AR modes."""
    confidences: list[float] = field(default_factory=list)
    """Of each of `tokens`, when it was committed."""
    checked: int = 0
    """How many of the committed tokens are known not to end the row."""
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
        """Prompt tokens that go into the context before anything is generated."""
        # the AR modes keep the last token out of it: it is the input of the next forward
        return len(self.request.prompt_ids) - (self.mode != "diffusion")

    @property
    def last_token(self) -> int:
        """The newest token of prompt and completion."""
        return self.tokens[-1] if self.tokens else self.request.prompt_ids[-1]

    @property
    def room(self) -> int:
        """Tokens that the completion may still take, behind `tokens`."""
        return self.request.params.max_new_tokens - len(self.tokens)

    def rejoin(self, clock: Clock) -> None:
        """Notes the denoiser forwards that it took part in, from `since` to `until`, and begins again at `clock`."""
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
        """The row's end, with what it has cost. block_confidences: of the block it ended in."""
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
    """Rows that share their forwards. A row of a lane is in one of three places."""

    def __init__(self) -> None:
        self.fresh: dict[ActiveRow, None] = {}  # begins a block with the next turn
        self.filling: dict[ActiveRow, None] = {}  # its block is being filled by the denoiser
        self.extending: dict[ActiveRow, None] = {}  # its pending tokens go into the context with the next turn
        self.rows = 0
        self.ar_rows = 0  # of the rows, those in AR mode
        self.turns = 0
        self.clock = NO_TIME

    def put(self, row: ActiveRow) -> None:
        """Takes a row whose prompt is in the context, or on its way there."""
        row.lane = self
        self.rows += 1
        if row.mode == "ar":
            self.ar_rows += 1
            row.pending = [row.last_token]
            self.extending[row] = None
        else:
            self.fresh[row] = None

    def block_done(self, row: ActiveRow, pending: list[int]) -> None:
        """The row's block is filled; `pending` goes into its context."""
        row.pending = pending
        self.filling.pop(row, None)
        self.extending[row] = None

    def drop(self, row: ActiveRow) -> None:
        """Takes a row out."""
        self.rows -= 1
        self.ar_rows -= row.mode == "ar"
        for place in (self.fresh, self.filling, self.extending):
            place.pop(row, None)

    def due(self, extend_every: int) -> bool:
        """Counts a turn -> whether it is one with a context forward."""
        self.turns += 1
        if self.turns % extend_every == 0 or not (self.filling or self.fresh):
            return True
        return bool(self.ar_extending())  # for these it is the forward that fills

    def ar_extending(self) -> list[ActiveRow]:
        """Of the rows to be extended, those in AR mode."""
        return [row for row in self.extending if row.mode == "ar"] if self.ar_rows else []

    def take_extending(self) -> list[ActiveRow]:
        """The rows whose pending tokens go into the context now, those in AR mode last."""
        rows = list(self.extending)
        if self.ar_rows:
            rows.sort(key=lambda row: row.mode == "ar")
        self.extending = {}
        return rows

    def extended(self, rows: Iterable[ActiveRow]) -> None:
        """The pending tokens of these rows are on their way; those in AR mode are in no place until they come back."""
        self.fresh.update(dict.fromkeys(row for row in rows if row.mode != "ar" and not row.ended))

    def take_fresh(self) -> list[ActiveRow]:
        """The rows that begin a block for the denoiser: new ones, and those that were extended."""
        begin = list(self.fresh)
        self.fresh = {}
        self.filling.update(dict.fromkeys(begin))
        return begin
