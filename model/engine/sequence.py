"""Defines the state of a request in the engine, and the lanes in which rows share their forwards. Does not import
torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from model.requests import Completion, FinishReason, Mode, Request

Clock = tuple[int, int, float]
"""The clock of a lane: the number of its denoiser forwards so far, the sum of their rows, and the sum of their seconds.
The difference of two readings is the share of a row, so that a forward need not be added to each of its rows."""
NO_TIME: Clock = (0, 0, 0.0)


@dataclass(slots=True, eq=False)
class Prefix:
    """Tokens that several rows begin with, computed once and kept in a slot of their own."""

    tokens: tuple[int, ...]
    slot: int
    pending: list[int]
    """Tokens that have not been launched in a context forward yet."""
    last_used: int = 0
    """Number of requests that had been submitted when a row last began with the prefix."""
    prefix: ClassVar[None] = None
    """A prefix begins with no other prefix; the field is here so that rows and prefixes can be treated alike."""


@dataclass(slots=True, eq=False)
class ActiveRow:
    """A request in the engine, waiting or running: its state, and its costs so far. A preempted row starts again as a
    new ActiveRow."""

    request: Request
    number: int
    """The row's place in the order of arrival."""
    submitted: float
    """Time of the loop's clock at which the request was submitted."""
    mode: Mode = "diffusion"
    """The mode of the request, whatever is passed here."""
    slot: int = -1
    """The row's slot; -1 while it waits."""
    prefix: Prefix | None = None
    """The shared prefix that the row began with, if any."""
    lane: "Lane | None" = None
    """The row's lane; None until its whole prompt has been launched."""
    ended: bool = False
    """Whether the row has left the engine, or is back in the queue as another ActiveRow. Results of forwards in
    progress are then ignored for it."""
    preemptions: int = 0
    pending: list[int] = field(default_factory=list)
    """Tokens that go into the context next: the rest of the prompt, then what the last block has added."""
    tokens: list[int] = field(default_factory=list)
    """The generated tokens of all full blocks."""
    confidences: list[float] = field(default_factory=list)
    """The confidence of each of `tokens` when it was committed."""
    checked: int = 0
    """Number of generated tokens, from the first, that are known not to end the row."""
    steps: list[int] = field(default_factory=list)
    """Number of denoiser forwards of each block so far; empty in the modes ar and mock_ar."""
    forwards: int = 0
    """Number of denoiser forwards of all blocks so far."""
    trace: list[tuple[int, ...]] = field(default_factory=list)
    """The token ids of the block as each denoiser forward read them; empty unless the backend traces."""
    since: Clock = NO_TIME
    """The lane's clock when the row joined its denoiser forwards."""
    until: Clock = NO_TIME
    """The lane's clock when the row's newest full block became full."""
    queue_s: float = 0.0
    prefill_s: float = 0.0
    denoise_s: float = 0.0
    commit_s: float = 0.0
    shared_rows: int = 0
    """Sum of the rows in the forwards that `shared_forwards` counts."""
    shared_forwards: int = 0
    """Number of the row's forwards after its prefill; denoiser forwards are added by `rejoin`."""

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
        """Return how many more tokens max_new_tokens allows after `tokens`."""
        return self.request.params.max_new_tokens - len(self.tokens)

    def rejoin(self, clock: Clock) -> None:
        """Add the lane's denoiser forwards from `since` to `until`, in which the row took part, to its costs; count the
        next ones from `clock`."""
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
        """Return the completion of a row that has ended, with its costs.

        block_confidences: the confidences of the last block's tokens, which `confidences` does not hold yet. now: the
        time of the clock that `submitted` was read from.
        """
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
    """A group of rows whose forwards are launched together. Each row is in one of three places: fresh, filling or
    extending. Only a row in AR mode is in none of them while its forward is in progress."""

    def __init__(self) -> None:
        self.fresh: dict[ActiveRow, None] = {}  # rows that begin a block in the next turn
        self.filling: dict[ActiveRow, None] = {}  # rows whose block the denoiser is filling
        self.extending: dict[ActiveRow, None] = {}  # rows whose pending tokens go into the context next
        self.rows = 0
        self.ar_rows = 0  # number of the rows that are in AR mode
        self.turns = 0
        self.clock = NO_TIME

    def put(self, row: ActiveRow) -> None:
        """Add a row whose whole prompt has been launched in context forwards."""
        row.lane = self
        self.rows += 1
        if row.mode == "ar":
            self.ar_rows += 1
            row.pending = [row.last_token]
            self.extending[row] = None
        else:
            self.fresh[row] = None

    def block_done(self, row: ActiveRow, pending: list[int]) -> None:
        """Record that the row's block is full and that the tokens `pending` go into the context next."""
        row.pending = pending
        self.filling.pop(row, None)
        self.extending[row] = None

    def drop(self, row: ActiveRow) -> None:
        """Remove a row from the lane, wherever in it the row is."""
        self.rows -= 1
        self.ar_rows -= row.mode == "ar"
        for place in (self.fresh, self.filling, self.extending):
            place.pop(row, None)

    def due(self, extend_every: int) -> bool:
        """Count a turn and return whether it includes a context forward.

        It does in every `extend_every`-th turn, if the lane has no blocks to denoise, and if rows in AR mode wait.
        """
        self.turns += 1
        if self.turns % extend_every == 0 or not (self.filling or self.fresh):
            return True
        return bool(self.ar_extending())  # their blocks are filled by context forwards

    def ar_extending(self) -> list[ActiveRow]:
        """Return the rows in AR mode whose pending tokens go into the context next."""
        return [row for row in self.extending if row.mode == "ar"] if self.ar_rows else []

    def take_extending(self) -> list[ActiveRow]:
        """Empty `extending` and return its rows, whose pending tokens go into the context now; rows in AR mode come
        last."""
        rows = list(self.extending)
        if self.ar_rows:
            rows.sort(key=lambda row: row.mode == "ar")
        self.extending = {}
        return rows

    def extended(self, rows: Iterable[ActiveRow]) -> None:
        """Record that the pending tokens of these rows have been launched, so that the rows may begin their next block.
        Rows in AR mode are in no place until the results of the forward are there. Ended rows are left out."""
        self.fresh.update(dict.fromkeys(row for row in rows if row.mode != "ar" and not row.ended))

    def take_fresh(self) -> list[ActiveRow]:
        """Move all fresh rows to `filling` and return them: rows that are new to the lane, and rows that were
        extended."""
        begin = list(self.fresh)
        self.fresh = {}
        self.filling.update(dict.fromkeys(begin))
        return begin
