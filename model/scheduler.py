"""Who is in the engine and what each row needs next. Free of torch.

A row is waiting, then holds a slot and is in one phase at a time:

    prefill  its prompt is not in the context yet
    denoise  it needs a denoiser forward: a block with masks left, or the next mock-AR token
    extend   tokens are ready for its context: a finished block, or the last token in the AR modes

No row waits for another: each phase takes whatever rows are in it.
"""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal, Protocol

from model.errors import RequestError
from model.params import Completion, FinishReason, Request

Phase = Literal["prefill", "denoise", "extend"]


class Slots(Protocol):
    """What the scheduler needs of the context cache."""

    def has_room(self, tokens: int) -> bool: ...
    def acquire(self, tokens: int) -> int: ...
    def release(self, slot: int) -> None: ...


@dataclass(slots=True, eq=False)
class ActiveRow:
    """One request on its way: what it has, what it needs, what it has cost. Changed by the engine only."""

    request: Request
    submitted: float
    slot: int = -1
    phase: Phase = "prefill"
    pending: list[int] = field(default_factory=list)
    """Tokens to put into the context next."""
    tokens: list[int] = field(default_factory=list)
    """Finished tokens: whole blocks, or single tokens in the AR modes."""
    confidences: list[float] = field(default_factory=list)
    """Of each of `tokens`, when it was committed."""
    block: list[int] = field(default_factory=list)
    """The block being denoised."""
    masked: list[bool] = field(default_factory=list)
    block_confidences: list[float] = field(default_factory=list)
    broken: bool = False
    """Logits that this row needed were not finite."""
    checked: int = 0
    """How many of the committed tokens are known not to end the row."""
    key: tuple[int, int] = (0, 0)
    steps: list[int] = field(default_factory=list)
    forwards: int = 0
    trace: list[tuple[int, ...]] = field(default_factory=list)
    queue_s: float = 0.0
    prefill_s: float = 0.0
    denoise_s: float = 0.0
    commit_s: float = 0.0
    shared_rows: int = 0
    shared_forwards: int = 0

    def __post_init__(self) -> None:
        params = self.request.params
        self.key = self.request.sampling_key
        prompt = list(self.request.prompt_ids)
        # the AR modes keep the last token out of the context: it is the input of the next forward
        self.pending = prompt if params.mode == "diffusion" else prompt[:-1]

    @property
    def last_token(self) -> int:
        """The newest token of prompt and completion."""
        return self.tokens[-1] if self.tokens else self.request.prompt_ids[-1]

    @property
    def steps_left(self) -> int:
        """Denoiser forwards this block may still take, the coming one included."""
        return self.request.params.steps_per_block - self.steps[-1]

    def start_block(self, mask_id: int) -> None:
        """All masks; nothing of it done."""
        size = self.request.params.block_size
        self.block, self.masked, self.block_confidences = [mask_id] * size, [True] * size, [0.0] * size
        self.steps.append(0)

    def finish_block(self) -> None:
        """The block, nothing masked in it, becomes finished tokens, pending for the context."""
        self.pending = self.block
        self.tokens, self.confidences = self.tokens + self.block, self.confidences + self.block_confidences
        self.block, self.masked, self.block_confidences = [], [], []

    def committed_prefix(self) -> list[int]:
        """Tokens that will not change any more and have nothing masked before them."""
        stop = self.masked.index(True) if True in self.masked else len(self.masked)
        return self.tokens + self.block[:stop]

    def took_part(self, rows: int) -> None:
        """Notes a forward after the prefill, shared by `rows` rows."""
        self.shared_rows += rows
        self.shared_forwards += 1

    def completion(self, reason: FinishReason, token_ids: list[int], text: str | None, error: str | None) -> Completion:
        """The row's end, with what it has cost."""
        kept = (self.confidences + self.block_confidences)[: len(token_ids)]
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
            forced_commits=sum(c <= threshold for c in kept) if self.steps else 0,
            mean_confidence=sum(kept) / len(kept) if kept else None,
            queue_s=self.queue_s,
            prefill_s=self.prefill_s,
            denoise_s=self.denoise_s,
            commit_s=self.commit_s,
            latency_s=time.perf_counter() - self.submitted,
            batch_rows=self.shared_rows / self.shared_forwards if self.shared_forwards else 0.0,
            trace=tuple(self.trace),
        )


class Scheduler:
    """First come, first served; a row that does not fit yet holds the ones behind it back, so none starves."""

    def __init__(self, slots: Slots, max_prefill_tokens: int) -> None:
        self.slots = slots
        self.max_prefill_tokens = max_prefill_tokens
        self.waiting: deque[ActiveRow] = deque()
        self.running: dict[str, ActiveRow] = {}
        self._keys: set[str] = set()

    def submit(self, request: Request) -> None:
        """Queues a request. Raises RequestError where its key is in the engine already."""
        if request.key in self._keys:
            raise RequestError(f"request key {request.key!r} is in the engine already: keys must be unique")
        self._keys.add(request.key)
        self.waiting.append(ActiveRow(request, submitted=time.perf_counter()))

    def admit(self) -> None:
        """Gives slots to waiting rows, in order, while there is room."""
        while self.waiting and self.slots.has_room(longest_context(self.waiting[0].request)):
            row = self.waiting.popleft()
            row.slot = self.slots.acquire(longest_context(row.request))
            row.queue_s = time.perf_counter() - row.submitted
            self.running[row.request.key] = row

    def in_phase(self, phase: Phase) -> list[ActiveRow]:
        """The rows that need this forward now."""
        return [row for row in self.running.values() if row.phase == phase]

    def prefill_batch(self) -> list[ActiveRow]:
        """Rows to prefill together, oldest first; a prompt above max_prefill_tokens goes alone.

        Padding counts, rows x longest: a long prompt among many short ones would otherwise take memory for all of them.
        """
        batch: list[ActiveRow] = []
        longest = 0
        for row in self.in_phase("prefill"):
            longest = max(longest, len(row.pending))
            if batch and (len(batch) + 1) * longest > self.max_prefill_tokens:
                break
            batch.append(row)
        return batch

    def clear(self) -> None:
        """Takes all rows out."""
        for row in list(self.running.values()):
            self.remove(row)
        self._keys.difference_update(row.request.key for row in self.waiting)
        self.waiting.clear()

    def remove(self, row: ActiveRow) -> None:
        """Takes a row out; its slot is free at once."""
        del self.running[row.request.key]
        self._keys.discard(row.request.key)
        self.slots.release(row.slot)


def longest_context(request: Request) -> int:
    """Tokens of context that the request can come to need."""
    return len(request.prompt_ids) + request.params.max_new_tokens
