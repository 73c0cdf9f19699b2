"""Runs the generation loop: admits rows, launches the forwards that they need, and collects the results.

    lane by lane: collect -> admit -> extend (prompts and finished blocks) -> denoise

In a lane's turn, its last forwards are collected first, and free slots get new rows. Then the loop launches two
forwards and does not wait for them: one of the context tower, over pieces of the waiting prompts and the lane's
finished blocks together, so that the weights are read only once for both; and one of the denoiser tower, over the
blocks that the lane is filling. While they compute, the other lanes have their turns. Each stage of the model runs its
forwards in the order of their launch, so a row may begin its next block before the extend of its last block has come
back.

A device is idle while the host processes results. Two settings reduce that. In AR mode a row generates `ar_tokens`
tokens in one turn, by one forward after the other. In a lane of at least `overlap_rows` rows and without rows in AR
mode, the context forward is launched before the last denoiser forward is collected, so that the device has work while
the host processes the results. A block that this denoiser forward has filled then waits for the next turn, which costs
nothing if the time of a forward grows with its rows.

Does not import torch.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from model.engine.backend import Backend, BlockReport, Launched
from model.engine.scheduler import Scheduler, Stats
from model.engine.sequence import ActiveRow, Lane, Prefix
from model.engine.stopping import Decode, End, find_end
from model.errors import RequestError
from model.requests import Completion, EngineError, FinishReason, Request

Kind = Literal["context", "denoise"]
CALM_STEPS = 1000
"""If memory did not run out in this many steps, halved limits are doubled, because another process may have used the
memory for a short time only. If memory is still short, only one step in this many fails."""
T = TypeVar("T")


@dataclass(slots=True)
class _InFlight:
    """A forward that has been launched and not collected yet, with its lane and its rows."""

    launched: Launched
    lane: Lane
    kind: Kind
    rows: Sequence[ActiveRow | Prefix]
    halvings: int
    """Number of times that the limits had been halved when the forward was launched."""
    reading: Collection[ActiveRow | Prefix]
    """The rows and prefixes of the forward that are in prefill."""


class Loop:
    """The loop that generates completions for requests: it admits rows, launches their forwards on a backend, and
    collects the results.

    decode is None if there is no tokenizer. extend_every: see EngineLimits. ar_tokens, overlap_rows: see the module. If
    overlap_rows is None, forwards are never overlapped. Not thread-safe: one thread must submit and step.
    """

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        decode: Decode | None = None,
        *,
        extend_every: int = 1,
        ar_tokens: int = 1,
        overlap_rows: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.backend, self.scheduler = backend, scheduler
        self._decode, self._extend_every, self._clock = decode, extend_every, clock
        self._ar_tokens, self._overlap_rows = ar_tokens, overlap_rows
        self._in_flight: deque[_InFlight] = deque()  # launched and not collected, in the order of their launch
        self._finished: list[Completion] = []
        self._halvings = 0
        self._calm = 0  # steps since memory ran out, or since the limits were doubled

    @property
    def waiting(self) -> int:
        """Return the number of requests that hold no slot yet."""
        return len(self.scheduler.waiting)

    @property
    def active(self) -> int:
        """Return the number of rows that hold a slot or whose completion has not been returned yet."""
        return len(self.scheduler.running) + len(self._finished)

    @property
    def max_rows(self) -> int:
        """Return the largest number of rows that may run together now; lower than the number that was set while memory
        is short."""
        return self.scheduler.max_rows

    @property
    def stats(self) -> Stats:
        """Return the counters of the work done so far; the object is updated by later steps."""
        return self.scheduler.stats

    def submit(self, request: Request) -> None:
        """Queue a request. Raises RequestError if it could never run or if its key is in the engine already."""
        self.check_request(request)
        self.scheduler.submit(request, self._clock())

    def check_request(self, request: Request) -> None:
        """Accept every request. A subclass raises RequestError here if the request could never run."""

    def cancel(self, key: str) -> bool:
        """Remove the request with this key, waiting or running, and free its slot. It gets no completion.

        Returns False if there is no such request: it has ended, or was never submitted.
        """
        return self.scheduler.cancel(key)

    def set_max_rows(self, rows: int) -> None:
        """Change how many rows may run together. If the new limit is lower, running rows are not stopped.

        Raises RequestError if rows is not a whole number of at least 1. If more slots are needed, raises EngineError if
        a forward in progress fails, and the backend's own error if there is no memory for them; the limit is then
        unchanged.
        """
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise RequestError(f"max_rows is {rows!r}: it must be a whole number of at least 1")
        more = rows - self.scheduler.row_slots
        if more > 0:
            for lane in self.scheduler.lanes:
                self._collect(lane)
            self.backend.add_slots(more)
            self.scheduler.row_slots += more
        self.scheduler.set_max_rows(rows)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Run the requests to their ends, longest prompts first, and return completions in the order of the requests.

        Raises RequestError, and runs none, if one of them could never run, if two keys are equal, or if the engine
        already holds rows (use submit and step then). Raises EngineError as `step` does; the engine then holds no rows.
        """
        if held := self.waiting + self.active:
            raise RequestError(f"generate() needs an engine without rows, but it holds {held}: use submit() and step()")
        for request in requests:
            self.check_request(request)
        keys = Counter(request.key for request in requests)
        if doubled := next((key for key, count in keys.items() if count > 1), None):
            raise RequestError(f"request key {doubled!r} is given {keys[doubled]} times: keys must be unique")
        now = self._clock()
        done: dict[str, Completion] = {}
        try:
            for request in sorted(requests, key=lambda request: -len(request.prompt_ids)):
                self.scheduler.submit(request, now)
            while self.waiting or self.active:
                done |= {completion.key: completion for completion in self.step()}
        finally:
            self.scheduler.clear()  # removes the rows that an error left behind
            self._finished.clear()
        return [done[request.key] for request in requests]

    def step(self) -> list[Completion]:
        """Give every lane one turn and return the completions of rows that have ended since the last call.

        Raises EngineError if a forward or other work for some rows failed: the error names the lost rows and holds the
        completions so far. All other rows continue with the next call. If memory runs out, the affected rows go back to
        the queue and half as many rows run together; later the limits grow again. EngineError is then raised only if
        the limits cannot be halved further. An error that is not an Exception, such as KeyboardInterrupt, is raised as
        it is.
        """
        self._calm += 1
        if self._calm == CALM_STEPS:
            self._calm = 0
            self.scheduler.double()
        for lane in self.scheduler.lanes:
            overlapping = self._overlap_rows is not None and lane.rows >= self._overlap_rows and not lane.ar_rows
            if not overlapping:
                self._collect(lane)
            self._admit()
            self._launch_context(lane, overlapping)
            self._launch_denoiser(lane)
        finished, self._finished = self._finished, []
        return finished

    def check(self) -> None:
        """Raise AssertionError if the records of slots, pages, lanes and keys contradict each other; for tests."""
        self.scheduler.check({row for forward in self._in_flight for row in forward.rows if isinstance(row, ActiveRow)})

    # -- launching ---------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Give free slots to waiting rows and prepare the backend for them."""
        rows = self.scheduler.admit(self._clock())
        self._try("admission", rows, lambda: self.backend.enter(rows))

    def _launch_context(self, lane: Lane, overlapping: bool) -> None:
        """Launch one context forward, if one is due, over pieces of prompts and the tokens that rows of the lane add to
        their context.

        For a row in diffusion or mock_ar mode these come from its finished block, and after the launch it may begin the
        next one. Rows in AR mode begin a block first, and this launch generates its tokens. overlapping: whether the
        lane's earlier forwards are collected after this launch rather than before it.
        """
        due = lane.due(self._extend_every) or self.scheduler.many_prompts_wait
        if due and (waiting := lane.ar_extending()):  # first of all: if it fails, every row is still in its place
            self._begin(lane, waiting, self._tokens_a_turn(lane, waiting))
        pieces = self.scheduler.prefill_batch() if due else []
        extend = lane.take_extending() if due else []
        fill = [row for row in extend if row.mode == "ar"] if lane.ar_rows else []
        # a one-token prompt in an AR mode has no tokens to prefill
        batch = [(item, count) for item, count in (*pieces, *((row, len(row.pending)) for row in extend)) if count]
        items, reading = [item for item, _ in batch], {item for item, _ in pieces}
        sent = bool(batch) and self._send(lane, "context", items, lambda: self.backend.extend(batch, fill), reading)
        if sent or not batch:
            self.scheduler.prefilled(pieces)
        lane.extended(extend)  # before collecting, which may raise: every row must be in its place by then
        if overlapping:
            self._collect(lane, self._in_flight[-1] if sent else None)

    def _launch_denoiser(self, lane: Lane) -> None:
        """Begin a block for the lane's fresh rows, and launch one denoiser forward over all blocks that the lane
        fills."""
        self._begin(lane, lane.take_fresh())
        if rows := list(lane.filling):
            self._send(lane, "denoise", rows, lambda: self.backend.denoise(rows))

    def _tokens_a_turn(self, lane: Lane, rows: Sequence[ActiveRow]) -> int:
        """Return how many tokens these rows in AR mode generate in this turn, and take the pages for them: `ar_tokens`,
        or one if the lane has rows in other modes, many prompts wait, or too few pages are free."""
        ahead = self._ar_tokens
        if ahead > 1 and (lane.rows > lane.ar_rows or self.scheduler.many_prompts_wait):
            return 1
        reserve = self.scheduler.allocator.reserve_more
        return ahead if ahead > 1 and all(reserve(row.slot, min(ahead, row.room)) for row in rows) else 1

    def _begin(self, lane: Lane, rows: Sequence[ActiveRow], ar_tokens: int = 1) -> None:
        """Begin a block for each of these rows of the lane; rows that cannot begin are lost or put back, see _fail."""
        for row in rows:
            if row.until is not lane.clock:  # the lane ran denoiser forwards without this row
                row.rejoin(lane.clock)
        if rows:
            self._try("begin", rows, lambda: self.backend.begin(rows, ar_tokens))

    def _send(
        self,
        lane: Lane,
        kind: Kind,
        rows: Sequence[ActiveRow | Prefix],
        launch: Callable[[], Launched],
        reading: Collection[ActiveRow | Prefix] = (),
    ) -> bool:
        """Launch a forward of the lane over these rows; `reading` are those of them in prefill.

        Returns False if the launch failed and its rows were put back into the queue or had ended. Raises EngineError if
        it failed otherwise.
        """
        launched = self._try(kind, rows, launch)
        if launched is not None:
            self._in_flight.append(_InFlight(launched, lane, kind, rows, self._halvings, reading))
        return launched is not None

    def _try(self, what: str, rows: Sequence[ActiveRow | Prefix], call: Callable[[], T]) -> T | None:
        """Return the result of `call`, which does the work `what` for these rows.

        If it fails, return None if the rows were put back into the queue or have ended; otherwise raise EngineError. An
        error that is not an Exception is raised again.
        """
        try:
            return call()
        except BaseException as error:  # catch everything: whatever a device raises, no row may stay half-computed
            self._fail(what, rows, error, self._halvings)
        return None

    # -- collecting --------------------------------------------------------------------------------------------------

    def _collect(self, lane: Lane, newest: _InFlight | None = None) -> None:
        """Collect the forwards of the lane, except `newest`, and all forwards launched before them.

        Forwards are collected in the order of their launch. Those of other lanes can come first only after a step that
        an error ended.
        """
        while any(forward.lane is lane and forward is not newest for forward in self._in_flight):
            self._take_in(self._in_flight.popleft())

    def _take_in(self, forward: _InFlight) -> None:
        """Wait for a forward, and end or continue the rows that it reports on.

        Raises EngineError, as _fail does, if the forward failed. If looking at single rows failed, as in a tokenizer,
        only these rows are lost.
        """
        try:
            seen = forward.launched.result()
        except BaseException as error:
            self._fail(forward.kind, forward.rows, error, forward.halvings)
            return
        self._share(forward)
        wrong: list[tuple[ActiveRow, Exception]] = []
        for block in seen:
            if not block.row.ended:  # it may just have been preempted
                try:
                    self._look_at(block)
                except Exception as error:  # a tokenizer may raise anything; the other rows continue
                    wrong.append((block.row, error))
                except BaseException as error:
                    self._fail(forward.kind, forward.rows, error, forward.halvings)
        if wrong:
            self._fail("end", [row for row, _ in wrong], wrong[0][1], forward.halvings)

    def _share(self, forward: _InFlight) -> None:
        """Add the duration and the number of rows of a context forward to the costs of each of its rows; for a denoiser
        forward, only to the clock of its lane, from which the rows take their share later."""
        seconds = forward.launched.seconds
        if forward.kind == "denoise":
            forwards, rows, so_far = forward.lane.clock
            forward.lane.clock = forwards + 1, rows + len(forward.rows), so_far + seconds
            return
        for row in forward.rows:
            if isinstance(row, Prefix):
                continue
            if row in forward.reading:
                row.prefill_s += seconds
            else:
                row.commit_s += seconds
                row.shared_rows += len(forward.rows)
                row.shared_forwards += 1

    def _look_at(self, block: BlockReport) -> None:
        """End the block's row if it has ended or its logits were not finite; otherwise, if the block is full, queue the
        row for the context tower; otherwise do nothing."""
        row, ready, complete, may_end, broken, steps, tokens, confidences = block
        if ready < len(tokens):
            tokens, confidences = tokens[:ready], confidences[:ready]
        end: End | None = None
        if may_end:
            so_far = row.tokens + tokens
            end = find_end(so_far, row.request.params, self._decode, row.checked)
            row.checked = len(so_far)
        if not (complete or broken or end):
            return
        row.forwards += steps
        if row.mode == "diffusion":
            row.steps.append(steps)
        if end is not None:
            self._end(row, confidences, end.reason, end.token_ids, end.text)
        elif broken:
            kept = row.tokens + tokens if row.mode == "ar" else row.tokens  # an unfinished block is dropped
            self._end(row, confidences, "error", kept, None, _not_finite(len(kept)))
        else:
            self._go_on(row, tokens, confidences)

    def _go_on(self, row: ActiveRow, tokens: list[int], confidences: list[float]) -> None:
        """Add a full block to the row's tokens, and queue the row for the context tower with what the context still
        lacks: the whole block, or one token in the modes ar and mock_ar. May preempt rows to get pages."""
        lane = row.lane
        assert lane is not None
        # mock-AR keeps its newest token out of the context, because it is the input of the next forward
        pending = [row.last_token] if row.mode == "mock_ar" else tokens[-1:] if row.mode == "ar" else tokens
        row.tokens += tokens
        row.confidences += confidences
        row.checked = len(row.tokens)
        row.until = lane.clock
        lane.block_done(row, pending)
        self.scheduler.make_room(row)

    def _end(
        self,
        row: ActiveRow,
        confidences: list[float],
        reason: FinishReason,
        ids: list[int],
        text: str | None,
        error: str | None = None,
    ) -> None:
        """Remove the row from the engine and keep its completion for the end of the step. confidences: those of the
        tokens of its last block."""
        if row.lane is not None and row.mode != "ar":
            row.until = row.lane.clock
            row.rejoin(row.until)
        completion = row.completion(reason, ids, text, error, confidences, self._clock())
        self.scheduler.remove(row)
        self._finished.append(completion)

    def _fail(self, what: str, rows: Sequence[ActiveRow | Prefix], error: BaseException, halvings: int) -> None:
        """Remove the rows of failed work and raise EngineError; if memory ran out, preempt them and halve the limits
        instead.

        Prefixes among `rows` are dropped, and the rows that use them are treated like the others. what: the work, for
        the message. halvings: how often the limits had been halved when the work began; so they are halved only once
        for all forwards that were in progress together. If they cannot be halved, EngineError is raised. Nothing is
        raised if all the rows had ended already. An error that is not an Exception, such as KeyboardInterrupt, is
        raised again as it is.
        """
        lost = [row for row in rows if isinstance(row, ActiveRow) and not row.ended]
        prefixes = [item for item in rows if isinstance(item, Prefix) and self.scheduler.knows(item)]
        for prefix in prefixes:
            lost += [row for row in self.scheduler.running.values() if row.prefix is prefix]
        again = bool(lost) and isinstance(error, Exception) and self.backend.out_of_memory(error)
        if again and halvings == self._halvings:
            again = self.scheduler.halve()
            self._halvings += again
            self._calm = 0
        for row in lost:
            (self.scheduler.requeue if again else self.scheduler.remove)(row)
        for prefix in prefixes:
            self.scheduler.drop_prefix(prefix)
        if not isinstance(error, Exception):
            raise error
        if again or not lost:
            return
        finished, self._finished = tuple(self._finished), []
        text = f"{what} of {len(rows)} row{'s' * (len(rows) != 1)} failed: {type(error).__name__}: {error}"
        raise EngineError(text, tuple(row.request.key for row in lost), finished) from error


def _not_finite(tokens: int) -> str:
    return (
        f"the model's logits were not finite after {tokens} tokens: "
        "the kernels or the checkpoint are wrong, or the prompt breaks them"
    )
