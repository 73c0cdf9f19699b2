"""Provides a backend of the engine's loop that fills blocks by script and checks that the loop keeps the rules of
forwards.

It stores tokens in place of states: every slot and every page holds the tokens that were put there. A forward that
reads a wrong slot, page or prefix, or that runs before the forwards it depends on, raises AssertionError.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from model.engine.backend import Batch, BlockReport
from model.engine.loop import Loop
from model.engine.scheduler import Scheduler
from model.engine.sequence import ActiveRow, Prefix
from model.runtime.page_allocator import PAGE_SIZE, PREFIX_SLOTS, PageAllocator
from tests.model.engine.launches import Fault, Launch, NoMemoryError, ScriptedError, Ticket, error_of, row_of
from tests.model.engine.scripts import MASK, Script, confidence, size_of


@dataclass(slots=True)
class _Block:
    number: int
    """Index of the block in its row; in AR mode, index of its first token."""
    size: int
    needed: int
    room: int
    steps: int = 0
    full: bool = False


class ScriptedBackend:
    """The backend that the module describes. Launches are numbered from 0."""

    def __init__(
        self,
        scheduler: Scheduler,
        scripts: dict[str, Script],
        *,
        faults: dict[int, Fault] | None = None,
        failing_calls: dict[str, set[int]] | None = None,
    ) -> None:
        """Start without rows. failing_calls: which calls of "begin", "enter" and "add_slots" fail, counted from 0."""
        self.scheduler, self.slots, self.scripts, self.faults = scheduler, scheduler.allocator, scripts, faults or {}
        self.failing_calls, self._calls = failing_calls or {}, {"begin": 0, "enter": 0, "add_slots": 0}
        self.tickets: list[Ticket] = []
        self.entered: list[ActiveRow] = []
        self.launches: list[Launch] = []
        self._states: dict[int, list[int]] = {}
        self._pages: dict[int, list[int]] = {}
        self._blocks: dict[ActiveRow, _Block] = {}
        self._poison: set[int] = set()
        self._entered: set[ActiveRow] = set()
        self.ended_rows = 0
        self.call_error: type[BaseException] = ScriptedError

    # -- the host's calls --------------------------------------------------------------------------------------------

    def add_slots(self, count: int) -> None:
        """See Backend."""
        self._call("add_slots")
        assert all(ticket.collected for ticket in self.tickets), "slots were added while forwards were in progress"
        self.slots.add_slots(count)

    def enter(self, rows: Sequence[ActiveRow]) -> None:
        """See Backend."""
        if not rows:
            return
        self._call("enter")
        assert len(self.scheduler.running) <= self.scheduler.max_rows, "a row got in above max_rows"
        oldest_waiting = min((row.number for row in self.scheduler.waiting), default=1 << 60)
        assert all(row.number < oldest_waiting for row in rows), "an older row still waits"
        for row in rows:
            assert self.slots.table(row.slot), "no pages"
        self.entered.extend(rows)
        self._entered.update(rows)

    def begin(self, rows: Sequence[ActiveRow], ar_tokens: int = 1) -> None:
        """See Backend."""
        self._call("begin")
        assert rows, "no rows begin"
        for row in rows:
            assert not row.ended
            assert row in self._entered, f"{row.request.key!r} begins a block in a slot that was not set up for it"
            block = self._blocks.get(row)
            step = block.size if block and row.mode == "ar" else 1
            number = block.number + step if block else 0
            size = min(ar_tokens, row.room) if row.mode == "ar" else size_of(row.request.params)
            assert row.tokens == self.scripts[row.request.key].block(0, len(row.tokens))
            assert block is None or block.full, "a block begins before the last one is full"
            needed = self.scripts[row.request.key].needed(row.request.params, number)
            self._blocks[row] = _Block(number, size, needed, row.room)

    def _call(self, name: str) -> None:
        number = self._calls[name]
        self._calls[name] += 1
        if number in self.failing_calls.get(name, ()):
            raise self.call_error(f"{name} {number}")

    # -- forwards ----------------------------------------------------------------------------------------------------

    def extend(self, batch: Batch, fill: Sequence[ActiveRow]) -> Ticket:
        """See Backend."""
        self._check_alive([item for item, _ in batch])
        pieces = [(item, count) for item, count in batch if self._is_read(item)]
        blocks = [(item, count) for item, count in batch if not self._is_read(item)]
        assert pieces + blocks == list(batch), "prompts come first"
        assert [row for row, _ in blocks][len(blocks) - len(fill) :] == list(fill), "AR rows come last"
        assert [row for row, _ in blocks if row_of(row).mode == "ar"] == list(fill)
        self._check_pieces(pieces)
        self._check_blocks(blocks)
        ticket = self._launch(Launch("context", pieces, blocks))
        ticket.fills = list(fill)
        for item, count in batch:
            end = self._store(ticket, item, item.pending[:count])
            assert end % PAGE_SIZE == 0 or count == len(item.pending), f"cut at token {end}"
            if isinstance(item, ActiveRow) and not self._is_read(item) and (item.mode != "ar" or not end % 16):
                self._check_pages(item)
        for row in fill:  # store the tokens that the row makes now, except the last one
            if more := self.scripts[row.request.key].block(len(row.tokens), self._blocks[row].size)[:-1]:
                self._store(ticket, row, more)
        return ticket

    def _check_alive(self, rows: Sequence[ActiveRow | Prefix]) -> None:
        # counted as well, because the loop does not report errors of rows that have ended
        self.ended_rows += sum(isinstance(row, ActiveRow) and row.ended for row in rows)
        assert not self.ended_rows, "a row that has ended"

    def _is_read(self, item: ActiveRow | Prefix) -> bool:
        """Return whether the item is in prefill."""
        return isinstance(item, Prefix) or item in self.scheduler.prefilling

    def _check_pieces(self, pieces: Batch) -> None:
        counts = [count for _, count in pieces]
        assert not counts or min(counts) > 0, "an item without tokens"
        assert len(counts) * max(counts, default=0) <= self.scheduler.prefill_budget, "above the prefill budget"
        for item, count in pieces:
            assert item in self.scheduler.prefilling
            assert count <= len(item.pending)
            if item.prefix:  # complete before this forward, which reads all states before it writes any
                whole = len(item.prefix.tokens)
                assert self.slots.length(item.prefix.slot) == whole, "behind a prefix that is not there yet"

    def _check_blocks(self, blocks: Batch) -> None:
        assert len({row_of(row).lane for row, _ in blocks}) <= 1, "rows of two lanes"
        for row, count in blocks:
            assert isinstance(row, ActiveRow)
            assert 0 < count == len(row.pending), "a finished block goes into the context whole"
            length = len(row.request.prompt_ids) + len(row.tokens) - (row.mode == "mock_ar")
            assert self.slots.length(row.slot) + count == length, "other tokens than its last block"
            block = self._blocks[row]
            if row.mode == "ar":
                assert not block.steps, "an AR row's block has not begun"
            else:
                assert block.full, "a block that is being filled goes into the context"

    def denoise(self, rows: Sequence[ActiveRow]) -> Ticket:
        """See Backend."""
        self._check_alive(rows)
        ticket = self._launch(Launch("denoise", [], [(row, size_of(row.request.params)) for row in rows]))
        ticket.fills = list(rows)
        for row in rows:
            assert row.mode != "ar"
            block, seed = self._blocks[row], self.slots.seed(row.slot)
            assert not block.full, "a full block is denoised"
            context = len(row.request.prompt_ids) + len(row.tokens) - (row.mode == "mock_ar")
            assert self.slots.length(row.slot) == context, f"{row.request.key!r}: context not complete"
            if seed in self._poison:
                ticket.poisoned.append(row)
            elif not block.steps:
                assert self._states.get(seed, []) == self._sequence(row)[:context]
                self._check_pages(row)
        return ticket

    def _launch(self, launch: Launch) -> Ticket:
        rows = [row for row, _ in launch.work]
        assert rows, f"{launch.kind} of no rows"
        assert len({row.slot for row in rows}) == len(rows), "a slot twice in one forward"
        flying = {row for ticket in self.tickets if not ticket.collected for row in ticket.fills}
        assert not flying & set(rows), "a row's block is in two forwards at once"
        number = len(self.launches)
        self.launches.append(launch)
        ticket = Ticket(launch.kind, number, self._collect, fault=self.faults.get(number))
        if ticket.fault and ticket.fault.startswith("launch"):
            raise error_of(ticket)
        self.tickets = [other for other in self.tickets if not other.collected] + [ticket]
        return ticket

    def _store(self, ticket: Ticket, item: ActiveRow | Prefix, tokens: list[int]) -> int:
        """Append tokens to the item's context and return the new length of the context."""
        slot, seed, length = item.slot, self.slots.seed(item.slot), self.slots.length(item.slot)
        table, end = self.slots.table(slot), length + len(tokens)
        assert not item.prefix or len(item.prefix.tokens) <= length, "inside its prefix"
        if ticket.fault or seed in self._poison:  # a fault at the launch has been raised already
            self._poison.add(slot)
            if isinstance(item, ActiveRow):
                ticket.poisoned.append(item)
        else:
            self._poison.discard(slot)
            state = [*self._states[seed], *tokens] if seed >= 0 else list(tokens)
            assert len(state) == end, f"{end} tokens stored in {table}, but the states have seen {len(state)}"
            assert state == self._sequence(item, end)[:end], "other tokens than its own"
            self._states[slot] = state
        at = length
        while at < end:
            page, offset = table[at // PAGE_SIZE], at % PAGE_SIZE
            take = tokens[at - length : at - length + PAGE_SIZE - offset]
            self._pages[page] = self._pages[page][:offset] + take if offset else take
            at += len(take)
        self.slots.grow([slot], [len(tokens)])
        return end

    def _check_pages(self, row: ActiveRow) -> None:
        length = self.slots.length(row.slot)
        if self.slots.seed(row.slot) in self._poison:
            return
        pages = self.slots.table(row.slot)[: -(-length // PAGE_SIZE)]
        held = [token for page in pages for token in self._pages[page]]
        assert held[:length] == self._sequence(row)[:length], f"{row.request.key!r}: its pages hold other tokens"

    def _sequence(self, item: ActiveRow | Prefix, end: int = 0) -> list[int]:
        """Return the item's tokens; in AR mode up to `end` at least, if the row is ahead of the tokens reported to
        it."""
        if isinstance(item, Prefix):
            return list(item.tokens)
        prompt = item.request.prompt_ids
        count = max(len(item.tokens), end - len(prompt)) if item.mode == "ar" else len(item.tokens)
        return [*prompt, *self.scripts[item.request.key].block(0, count)]

    # -- results -----------------------------------------------------------------------------------------------------

    def _collect(self, ticket: Ticket) -> Sequence[BlockReport]:
        assert not ticket.collected, "collected twice"
        ticket.collected = True
        if ticket.fault:
            raise error_of(ticket)
        assert all(row.ended for row in ticket.poisoned), "a row continues although a forward that it needs has failed"
        return [seen for row in ticket.fills if not row.ended and (seen := self._fill(row))]

    def _fill(self, row: ActiveRow) -> BlockReport | None:
        script, block = self.scripts[row.request.key], self._blocks[row]
        size, numbers = block.size, range(block.number, block.number + (block.size if row.mode == "ar" else 1))
        block.steps += 1
        broken = script.broken_block in numbers
        ready = size * block.steps // block.needed
        if broken and script.broken_block is not None:
            ready = script.broken_block - block.number
        block.full = ready == size
        tokens = script.block(len(row.tokens), size)[:ready] + [MASK] * (size - ready)
        may_end = ready >= block.room or bool(set(tokens) & set(row.request.params.eos_ids))
        may_end = may_end or (bool(row.request.params.stop) and bool(ready))
        if not (broken or block.full or may_end):
            return None
        steps = block.steps if row.mode != "ar" else 0
        return BlockReport(
            row, ready, block.full, may_end, broken, steps, tokens, [confidence(token) for token in tokens]
        )

    def out_of_memory(self, error: BaseException) -> bool:
        """See Backend."""
        return isinstance(error, NoMemoryError)


class Clock:
    """A clock that advances by one second each time it is read."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def make_loop(
    scripts: dict[str, Script],
    *,
    rows: int = 4,
    pages: int = 1000,
    budget: int = 4096,
    lanes: int = 1,
    extend_every: int = 1,
    ar_tokens: int = 1,
    overlap_rows: int | None = None,
    faults: dict[int, Fault] | None = None,
    failing_calls: dict[str, set[int]] | None = None,
) -> tuple[Loop, ScriptedBackend]:
    """Return a loop over a scripted backend, and the backend. Each token id is a character of the text."""
    scheduler = Scheduler(PageAllocator(rows + PREFIX_SLOTS, pages), rows, budget, lanes)
    backend = ScriptedBackend(scheduler, scripts, faults=faults, failing_calls=failing_calls)
    loop = Loop(
        backend,
        scheduler,
        lambda ids: "".join(map(chr, ids)),
        extend_every=extend_every,
        ar_tokens=ar_tokens,
        overlap_rows=overlap_rows,
        clock=Clock(),
    )
    return loop, backend
