"""A backend of the engine's loop that fills blocks by script, and holds the loop to the rules of the forwards.

It keeps what a real one keeps, tokens instead of states: every slot's state and every page hold the tokens that were
put there: a forward that reads a wrong slot, page or prefix, or that comes before what it builds on, is an
AssertionError.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from model.loop import Kind, Loop, Seen
from model.scheduler import ActiveRow, Prefix, Scheduler
from model.slots import PAGE_SIZE, PREFIX_SLOTS, Slots
from tests.unit.engine_scripts import MASK, Script, confidence, size_of

Fault = Literal["launch", "collect", "launch oom", "collect oom", "launch interrupt"]


class ScriptedError(RuntimeError):
    """A forward that failed by script."""


class NoMemoryError(RuntimeError):
    """A forward that found no memory, by script."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A scripted forward. It takes a second."""

    kind: Kind
    number: int
    rows: list[ActiveRow | Prefix]
    fills: list[ActiveRow] = field(default_factory=list)
    poisoned: list[ActiveRow] = field(default_factory=list)
    """Rows that it computed behind a forward that failed."""
    fault: Fault | None = None
    seconds: float = 1.0
    collected: bool = False


@dataclass(slots=True)
class _Block:
    number: int
    needed: int
    room: int
    steps: int = 0
    full: bool = False


class ScriptedBackend:
    """See the module. Launches are numbered from 0; a forward is done when `late` more have been launched."""

    def __init__(
        self,
        slots: Slots,
        scripts: dict[str, Script],
        *,
        late: int = 0,
        faults: dict[int, Fault] | None = None,
        failing_calls: dict[str, set[int]] | None = None,
    ) -> None:
        """failing_calls: of "begin", "enter" and "add_slots", which calls fail, counted from 0."""
        self.slots, self.scripts, self.late, self.faults = slots, scripts, late, faults or {}
        self.failing_calls, self._calls = failing_calls or {}, {"begin": 0, "enter": 0, "add_slots": 0}
        self.scheduler: Scheduler | None = None
        self.tickets: list[Ticket] = []
        self.entered: list[ActiveRow] = []
        self.launches: list[tuple[Kind, list[tuple[ActiveRow | Prefix, int]]]] = []
        self._ended = -1  # the newest launch that has been waited for
        self._states: dict[int, list[int]] = {}
        self._pages: dict[int, list[int]] = {}
        self._blocks: dict[ActiveRow, _Block] = {}
        self._poison: set[int] = set()
        self._entered: set[ActiveRow] = set()
        self.ended_rows = 0
        self.call_error: type[Exception] = ScriptedError

    # -- the host's calls --------------------------------------------------------------------------------------------

    def add_slots(self, count: int) -> None:
        """See Backend."""
        self._call("add_slots")
        assert all(ticket.collected for ticket in self.tickets), "slots added with forwards under way"
        self.slots.add_slots(count)

    def enter(self, rows: Sequence[ActiveRow]) -> None:
        """See Backend."""
        if not rows:
            return
        self._call("enter")
        if self.scheduler is not None:
            assert len(self.scheduler.running) <= self.scheduler.max_rows, "a row got in above max_rows"
            oldest_waiting = min((row.number for row in self.scheduler.waiting), default=1 << 60)
            assert all(row.number < oldest_waiting for row in rows), "an older row still waits"
        for row in rows:
            assert self.slots.table(row.slot), "no pages"
        self.entered.extend(rows)
        self._entered.update(rows)

    def begin(self, rows: Sequence[ActiveRow]) -> None:
        """See Backend."""
        self._call("begin")
        assert rows, "no rows begin"
        for row in rows:
            assert not row.ended
            assert row in self._entered, f"{row.request.key!r} begins a block in a slot that was not set up for it"
            block = self._blocks.get(row)
            number = block.number + 1 if block else 0
            assert row.tokens == self.scripts[row.request.key].block(0, len(row.tokens))
            assert block is None or block.full, "a block begins before the last one is full"
            needed = self.scripts[row.request.key].needed(row.request.params, number)
            self._blocks[row] = _Block(number, needed, row.room)

    def _call(self, name: str) -> None:
        number = self._calls[name]
        self._calls[name] += 1
        if number in self.failing_calls.get(name, ()):
            raise self.call_error(f"{name} {number}")

    # -- forwards ----------------------------------------------------------------------------------------------------

    def prefill(self, batch: Sequence[tuple[ActiveRow | Prefix, int]]) -> Ticket:
        """See Backend."""
        counts = [count for _, count in batch]
        assert min(counts) > 0, "an item without tokens"
        if self.scheduler is not None:
            assert len(counts) * max(counts) <= self.scheduler.prefill_budget, "above the prefill budget"
        ticket = self._launch("prefill", list(batch))
        for item, count in batch:
            end = self._store(ticket, item, item.pending[:count])
            assert end % PAGE_SIZE == 0 or count == len(item.pending), f"cut at token {end}"
        return ticket

    def extend(self, rows: Sequence[ActiveRow]) -> Ticket:
        """See Backend."""
        ticket = self._launch("extend", [(row, len(row.pending)) for row in rows])
        ticket.fills = [row for row in rows if row.mode == "ar"]
        for row in rows:
            assert row.pending
            end = self._store(ticket, row, row.pending)
            assert end == len(row.request.prompt_ids) + len(row.tokens) - (row.mode == "mock_ar")
            if row.mode != "ar" or not end % 16:
                self._check_pages(row)
        return ticket

    def denoise(self, rows: Sequence[ActiveRow]) -> Ticket:
        """See Backend."""
        ticket = self._launch("denoise", [(row, size_of(row.request.params)) for row in rows])
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

    def _launch(self, kind: Kind, work: list[tuple[ActiveRow | Prefix, int]]) -> Ticket:
        rows = [row for row, _ in work]
        assert rows, f"{kind} of no rows"
        assert len({row.slot for row in rows}) == len(rows), "a slot twice in one forward"
        # noted, too: the loop keeps to itself what goes wrong with rows that have ended
        self.ended_rows += sum(isinstance(row, ActiveRow) and row.ended for row in rows)
        assert not self.ended_rows, "a row that has ended"
        if kind != "prefill":
            flying = {row for ticket in self.tickets if not ticket.collected for row in ticket.fills}
            assert not flying & set(rows), "a row's block is in two forwards at once"
        number = len(self.launches)
        self.launches.append((kind, work))
        ticket = Ticket(kind, number, rows, fault=self.faults.get(number))
        if ticket.fault and ticket.fault.startswith("launch"):
            raise _error(ticket)
        self.tickets = [other for other in self.tickets if not other.collected] + [ticket]
        return ticket

    def _store(self, ticket: Ticket, item: ActiveRow | Prefix, tokens: list[int]) -> int:
        """Puts tokens behind the item's context -> how long that is then."""
        slot, seed, length = item.slot, self.slots.seed(item.slot), self.slots.length(item.slot)
        table, end = self.slots.table(slot), length + len(tokens)
        if isinstance(item, ActiveRow) and item.prefix:
            whole = len(item.prefix.tokens)
            assert self.slots.length(item.prefix.slot) == whole <= length, "behind a prefix that is not there yet"
        if ticket.fault or seed in self._poison:  # a launch's fault has raised already
            self._poison.add(slot)
            if isinstance(item, ActiveRow):
                ticket.poisoned.append(item)
        else:
            self._poison.discard(slot)
            state = [*self._states[seed], *tokens] if seed >= 0 else list(tokens)
            assert len(state) == end, f"{end} tokens stored in {table}, but the states have seen {len(state)}"
            assert state == self._sequence(item)[:end], "other tokens than its own"
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

    def _sequence(self, item: ActiveRow | Prefix) -> list[int]:
        if isinstance(item, Prefix):
            return list(item.tokens)
        return [*item.request.prompt_ids, *self.scripts[item.request.key].block(0, len(item.tokens))]

    # -- what comes back ---------------------------------------------------------------------------------------------

    def done(self, handle: Ticket) -> bool:
        """See Backend."""
        return handle.number <= max(self._ended, len(self.launches) - 1 - self.late)

    def wait(self, handle: Ticket) -> None:
        """See Backend."""
        self._ended = max(self._ended, handle.number)

    def collect(self, handle: Ticket) -> Sequence[Seen]:
        """See Backend."""
        assert self.done(handle), "collected before its end"
        assert not handle.collected, "collected twice"
        handle.collected = True
        if handle.fault:
            raise _error(handle)
        assert all(row.ended for row in handle.poisoned), "a row goes on behind a forward that failed"
        return [seen for row in handle.fills if not row.ended and (seen := self._fill(row))]

    def _fill(self, row: ActiveRow) -> Seen | None:
        script, block, size = self.scripts[row.request.key], self._blocks[row], size_of(row.request.params)
        block.steps += 1
        broken = block.number == script.broken_block
        ready = 0 if broken else size * block.steps // block.needed
        block.full = ready == size
        tokens = script.block(len(row.tokens), size)[:ready] + [MASK] * (size - ready)
        may_end = ready >= block.room or bool(set(tokens) & set(row.request.params.eos_ids))
        may_end = may_end or (bool(row.request.params.stop) and not broken)
        if not (broken or block.full or may_end):
            return None
        steps = block.steps if row.mode != "ar" else 0
        return Seen(row, ready, block.full, may_end, broken, steps, tokens, [confidence(token) for token in tokens])

    def out_of_memory(self, error: BaseException) -> bool:
        """See Backend."""
        return isinstance(error, NoMemoryError)


def _error(ticket: Ticket) -> BaseException:
    assert ticket.fault
    what = f"{ticket.kind} {ticket.number}"
    if ticket.fault.endswith("interrupt"):
        return KeyboardInterrupt(what)
    return NoMemoryError(what) if ticket.fault.endswith("oom") else ScriptedError(what)


class Clock:
    """A second goes by whenever it is read."""

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
    late: int = 0,
    faults: dict[int, Fault] | None = None,
    failing_calls: dict[str, set[int]] | None = None,
) -> tuple[Loop[Ticket], ScriptedBackend]:
    """A loop over a scripted backend; text is its tokens' letters."""
    slots = Slots(rows + PREFIX_SLOTS, pages)
    backend = ScriptedBackend(slots, scripts, late=late, faults=faults, failing_calls=failing_calls)
    scheduler = backend.scheduler = Scheduler(slots, rows, budget, lanes)
    return Loop(
        backend, scheduler, lambda ids: "".join(map(chr, ids)), extend_every=extend_every, clock=Clock()
    ), backend
