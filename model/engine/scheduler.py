"""Who is in the engine, and what each row needs next. Free of torch.

A row waits, then holds a slot: its prompt goes into the context in pieces (prefill); then, in one lane, it goes round
between a block to fill and a finished block to put into the context (extend). No row waits for another one's block.

Rows come in first come, first served, and a row that does not fit yet holds the ones behind it back, so none starves.
Pages are taken as a row grows. When they run out the youngest row goes back to the queue and starts again: its sampling
depends on nothing but its own coordinates, so it repeats the same tokens. The oldest row always goes on.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from model.engine.sequence import ActiveRow, Lane, Prefix
from model.errors import RequestError
from model.requests import Request
from model.runtime.page_allocator import PAGE_SIZE, PREFIX_SLOTS, PageAllocator, pages_for

MANY = 4  # a quarter of the rows
PREFILL_WINDOW = 32
"""Rows that are looked at to find some of like length: bounds the time that a turn takes."""


@dataclass(slots=True)
class Stats:
    """What an engine has done so far."""

    prefill_tokens: int = 0
    """Prompt tokens put into contexts; those of a shared prefix once."""
    padded_tokens: int = 0
    """The same with every row of a forward as long as the longest."""
    shared_tokens: int = 0
    """Prompt tokens that were not computed, because a prefix held them."""
    preemptions: int = 0

    @property
    def padding_share(self) -> float:
        """Share of the padded tokens that are none."""
        return 1 - self.prefill_tokens / self.padded_tokens if self.padded_tokens else 0.0


class Scheduler:
    """The queue, the rows that hold slots, and the lanes they are in. It decides; it computes nothing."""

    def __init__(self, allocator: PageAllocator, max_rows: int, max_prefill_tokens: int, lanes: int = 1) -> None:
        """allocator: with PREFIX_SLOTS more slots than max_rows."""
        self.allocator, self.max_rows = allocator, max_rows
        self.row_slots = max_rows  # slots that there are for rows
        self.prefill_budget = max_prefill_tokens // PAGE_SIZE * PAGE_SIZE
        self.waiting: deque[ActiveRow] = deque()
        self.running: dict[str, ActiveRow] = {}
        self.prefilling: dict[ActiveRow | Prefix, None] = {}
        self.prefixes: dict[tuple[int, ...], Prefix] = {}
        self.lanes = [Lane() for _ in range(lanes)]
        self.stats = Stats()
        self._keys: set[str] = set()
        self._arrivals = 0
        self._long_turn = False
        self._before_halving: tuple[int, int] | None = None  # max_rows and prefill_budget

    # -- in and out --------------------------------------------------------------------------------------------------

    def submit(self, request: Request, now: float) -> None:
        """Queues a request. Raises RequestError where its key is in the engine already."""
        if request.key in self._keys:
            raise RequestError(f"request key {request.key!r} is in the engine already: keys must be unique")
        self._keys.add(request.key)
        self._arrivals += 1
        self.waiting.append(ActiveRow(request, self._arrivals, now))

    def admit(self, now: float) -> list[ActiveRow]:
        """Gives slots to waiting rows, in order, while there is room -> those rows."""
        admitted = []
        while self.waiting and len(self.running) < self.max_rows:
            row = self.waiting[0]
            begin = self._shareable(row)
            prefix = self.prefixes.get(begin)
            tokens = self._tokens_at_first(row)
            if not self._has_room(tokens - (len(begin) if prefix else 0)):
                if self._drop_unused_prefix(prefix):
                    continue
                break
            if begin and prefix is None:
                prefix = self._make_prefix(begin)
            self._take_in(self.waiting.popleft(), prefix, tokens, now)
            admitted.append(row)
        return admitted

    def _tokens_at_first(self, row: ActiveRow) -> int:
        """The context for which a row gets pages when it comes in."""
        if row.preemptions:  # once is enough: now it takes all it can come to need
            return longest_context(row.request)
        return len(row.request.prompt_ids) + min(row.request.params.block_size, row.request.params.max_new_tokens)

    def _has_room(self, tokens: int) -> bool:
        # a page for each running row's next block stays free, or the newcomer would be the next to go back
        spare = min(len(self.running), self.allocator.pages // 8)
        return pages_for(tokens) + spare <= self.allocator.free_pages

    def _take_in(self, row: ActiveRow, prefix: Prefix | None, tokens: int, now: float) -> None:
        slot = self.allocator.acquire(tokens, prefix.slot if prefix else -1)
        assert slot is not None, "asked for before"
        shared = len(prefix.tokens) if prefix else 0
        if prefix is not None:
            prefix.last_used = self._arrivals
        row.slot, row.prefix, row.queue_s = slot, prefix, now - row.submitted
        row.pending = list(row.request.prompt_ids[shared : row.prefill_tokens])
        self.stats.shared_tokens += shared
        self.running[row.request.key] = row
        self.prefilling[row] = None

    def _shareable(self, row: ActiveRow) -> tuple[int, ...]:
        """The tokens of the prefix that the row names, in whole pages."""
        length = min(row.request.prefix_tokens, row.prefill_tokens) // PAGE_SIZE * PAGE_SIZE
        return tuple(row.request.prompt_ids[:length])

    def _make_prefix(self, tokens: tuple[int, ...]) -> Prefix | None:
        """A new prefix, to be computed; None where all slots for prefixes are in use."""
        if len(self.prefixes) == PREFIX_SLOTS and not self._drop_unused_prefix():
            return None
        slot = self.allocator.acquire(len(tokens))
        assert slot is not None, "a part of what there is room for"
        prefix = self.prefixes[tokens] = Prefix(tokens, slot, list(tokens))
        self.prefilling[prefix] = None
        return prefix

    def _drop_unused_prefix(self, kept: Prefix | None = None) -> bool:
        """Gives the room of the prefix that was longest not used back; False where all are in use, or `kept`."""
        unused = [p for p in self.prefixes.values() if p is not kept and not self.allocator.users(p.slot)]
        if not unused:
            return False
        self.drop_prefix(min(unused, key=lambda prefix: prefix.last_used))
        return True

    def knows(self, prefix: Prefix) -> bool:
        """Whether rows may still begin with it."""
        return self.prefixes.get(prefix.tokens) is prefix

    def drop_prefix(self, prefix: Prefix) -> None:
        """Forgets a prefix that no row uses."""
        del self.prefixes[prefix.tokens]
        self.prefilling.pop(prefix, None)
        self.allocator.release(prefix.slot)

    def remove(self, row: ActiveRow) -> None:
        """Takes a running row out; its slot is free at once."""
        self._take_out(row)
        self._keys.discard(row.request.key)

    def cancel(self, key: str) -> bool:
        """Takes a request out, waiting or running; False where it is not here."""
        if key in self.running:
            self.remove(self.running[key])
        elif key in self._keys:
            self.waiting = deque(row for row in self.waiting if row.request.key != key)
            self._keys.discard(key)
        else:
            return False
        return True

    def clear(self) -> None:
        """Takes all rows out."""
        for row in list(self.running.values()):
            self.remove(row)
        for prefix in [prefix for prefix in self.prefixes.values() if prefix.pending]:
            self.drop_prefix(prefix)
        self._keys.clear()
        self.waiting.clear()

    def _take_out(self, row: ActiveRow) -> None:
        del self.running[row.request.key]
        self.prefilling.pop(row, None)
        if row.lane is not None:
            row.lane.drop(row)
        self.allocator.release(row.slot)
        row.ended = True

    # -- what to compute ---------------------------------------------------------------------------------------------

    @property
    def many_prompts_wait(self) -> bool:
        """Whether so many rows have a prompt to be read that it should not wait for the next context forward."""
        return bool(self.prefilling) and MANY * len(self.prefilling) >= len(self.running)

    def prefill_batch(self) -> list[tuple[ActiveRow | Prefix, int]]:
        """What to prefill together, and how many tokens of each: rows x longest within the budget.

        The oldest, with those nearest to it in length, so that little is padded. One with more tokens than the budget
        goes alone, in pieces, and takes turns with the others, so that they do not wait for its end.
        """
        long, short = self._prefill_candidates()
        self._long_turn = long is not None and not (short and self._long_turn)
        if long is not None and self._long_turn:
            return [(long, self.prefill_budget)]
        if not short:
            return []
        first, *others = short
        batch, longest = [first], len(first.pending)
        for item in sorted(others, key=lambda item: abs(len(item.pending) - len(first.pending))):
            longest = max(longest, len(item.pending))
            if (len(batch) + 1) * longest > self.prefill_budget:
                break
            batch.append(item)
        return [(item, len(item.pending)) for item in batch]

    def _prefill_candidates(self) -> tuple[ActiveRow | Prefix | None, list[ActiveRow | Prefix]]:
        """The oldest one that is longer than the budget, and the oldest of the others."""
        long, short = None, list[ActiveRow | Prefix]()
        for item in self.prefilling:
            if item.prefix is not None and item.prefix.pending:
                continue  # a row begins behind its prefix, once all of that is on its way
            if len(item.pending) <= self.prefill_budget:
                short.append(item)
                if len(short) == PREFILL_WINDOW:
                    break
            elif long is None:
                long = item
        return long, short

    def prefilled(self, batch: list[tuple[ActiveRow | Prefix, int]]) -> None:
        """These pieces are on their way. A row whose whole prompt is goes to the lane with the fewest rows."""
        lengths = [count for _, count in batch if count]
        self.stats.prefill_tokens += sum(lengths)
        self.stats.padded_tokens += len(lengths) * max(lengths, default=0)
        for item, count in batch:
            del item.pending[:count]
            if not item.pending:
                del self.prefilling[item]
                if isinstance(item, ActiveRow):
                    min(self.lanes, key=lambda lane: lane.rows).put(item)

    # -- pages -------------------------------------------------------------------------------------------------------

    def make_room(self, row: ActiveRow) -> bool:
        """Takes pages for the row's pending tokens, from unused prefixes or the youngest rows where none is free.

        False where the row itself was the youngest, and went back to the queue.
        """
        while not self.allocator.reserve_more(row.slot, len(row.pending)):
            if self._drop_unused_prefix():
                continue
            youngest = max(self.running.values(), key=lambda other: other.number)
            self.requeue(youngest)
            if youngest is row:
                return False
        return True

    def requeue(self, row: ActiveRow) -> None:
        """Puts a running row back to the queue, at its place in the order of arrival, to start again."""
        self._take_out(row)
        again = ActiveRow(row.request, row.number, row.submitted, preemptions=row.preemptions + 1)
        at = next((i for i, other in enumerate(self.waiting) if other.number > row.number), len(self.waiting))
        self.waiting.insert(at, again)
        self.stats.preemptions += 1

    def halve(self) -> bool:
        """Half as many rows and prefill tokens from now on; False where there is nothing left to halve."""
        rows = max(1, min(self.max_rows, len(self.running)) // 2)
        budget = max(1, self.prefill_budget // PAGE_SIZE // 2) * PAGE_SIZE
        if (rows, budget) == (self.max_rows, self.prefill_budget):
            return False
        self._before_halving = self._before_halving or (self.max_rows, self.prefill_budget)
        self.max_rows, self.prefill_budget = rows, budget
        return True

    def double(self) -> None:
        """Takes one halving back."""
        if self._before_halving is not None:
            rows, budget = self._before_halving
            self.max_rows = min(rows, 2 * self.max_rows)
            self.prefill_budget = min(budget, 2 * self.prefill_budget)
            if (self.max_rows, self.prefill_budget) == (rows, budget):
                self._before_halving = None

    def set_max_rows(self, rows: int) -> None:
        """A limit of the caller's, which ends what halvings left behind."""
        if self._before_halving is not None:
            self.prefill_budget, self._before_halving = self._before_halving[1], None
        self.max_rows = rows

    # -- integrity ---------------------------------------------------------------------------------------------------

    def places(self, row: ActiveRow) -> Iterator[str]:
        """Where a running row is: one place, if all is well."""
        if row in self.prefilling:
            yield "prefilling"
        for lane in self.lanes:
            for name in ("fresh", "filling", "extending"):
                if row in getattr(lane, name):
                    yield name

    def check(self, in_flight: set[ActiveRow]) -> None:
        """Integrity: slots and pages owned once, each running row in one place, each key once. Raises AssertionError.

        in_flight: rows of forwards under way, whose AR tokens are in no place until they come back.
        """
        self.allocator.check()
        held = [row.slot for row in self.running.values()] + [prefix.slot for prefix in self.prefixes.values()]
        assert len(set(held)) == len(held) == self.allocator.slots - self.allocator.free_slots, "slots without a row"
        for row in self.running.values():
            places = list(self.places(row))
            assert len(places) == 1 or (not places and row in in_flight), f"{row.request.key!r} is in {places}"
            assert not row.ended
        rows = sum(lane.rows for lane in self.lanes) + sum(isinstance(item, ActiveRow) for item in self.prefilling)
        assert rows == len(self.running), "lanes and running rows disagree"
        keys = list(self.running) + [row.request.key for row in self.waiting]
        assert len(keys) == len(set(keys)), "a key is there twice"
        assert set(keys) == self._keys, "keys lost"


def longest_context(request: Request) -> int:
    """Tokens of context that the request can come to need."""
    return len(request.prompt_ids) + request.params.max_new_tokens
