"""Decides which rows are in the engine and what each row needs next. Does not import torch.

A row first waits in the queue. When it holds a slot, its prompt goes into the context in pieces (prefill). Then it
belongs to one lane and alternates between filling a block and putting the finished block into the context (extend). No
row waits for the block of another row.

Rows are admitted in the order of their arrival. A row that does not fit yet holds back the rows behind it, so that no
row waits forever. Pages are taken as a row grows. If there are none left, the youngest row is preempted: it goes back
to the queue and starts again. Its sampling depends only on its own seed, key and positions, so it generates the same
tokens again. The oldest row is never preempted for the pages of another one.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from model.engine.sequence import ActiveRow, Lane, Prefix
from model.errors import RequestError
from model.requests import Request
from model.runtime.page_allocator import PAGE_SIZE, PREFIX_SLOTS, PageAllocator, pages_for

MANY = 4  # many prompts wait if, for every so many running rows, at least one row or prefix is in prefill
PREFILL_WINDOW = 32
"""The largest number of rows and prefixes in prefill among which a batch of similar lengths is sought; it limits the
time that a turn takes."""


@dataclass(slots=True)
class Stats:
    """Counters of an engine's prefill and preemptions since it was made."""

    prefill_tokens: int = 0
    """Prompt tokens put into contexts; those of a shared prefix count once."""
    padded_tokens: int = 0
    """The same count if every piece of a prompt were as long as the longest one in its forward."""
    shared_tokens: int = 0
    """Prompt tokens that were not computed for a row, because a shared prefix held them."""
    preemptions: int = 0
    """Number of times that a row was put back into the queue."""

    @property
    def padding_share(self) -> float:
        """Return the share of the padded tokens that is padding; 0 before the first prefill."""
        return 1 - self.prefill_tokens / self.padded_tokens if self.padded_tokens else 0.0


class Scheduler:
    """The queue, the rows that hold slots with their lanes, and the shared prefixes. It makes decisions and runs no
    forwards."""

    def __init__(self, allocator: PageAllocator, max_rows: int, max_prefill_tokens: int, lanes: int = 1) -> None:
        """Start with an empty queue. allocator: must have PREFIX_SLOTS more slots than max_rows."""
        self.allocator, self.max_rows = allocator, max_rows
        self.row_slots = max_rows  # number of slots for rows; not changed by halving
        self.prefill_budget = max_prefill_tokens // PAGE_SIZE * PAGE_SIZE  # prompt tokens per forward, with padding
        self.waiting: deque[ActiveRow] = deque()  # in the order of arrival
        self.running: dict[str, ActiveRow] = {}  # by key: the rows that hold slots
        self.prefilling: dict[ActiveRow | Prefix, None] = {}  # those with prompt tokens that are not launched yet
        self.prefixes: dict[tuple[int, ...], Prefix] = {}
        self.lanes = [Lane() for _ in range(lanes)]
        self.stats = Stats()
        self._keys: set[str] = set()
        self._arrivals = 0
        self._long_turn = False
        self._before_halving: tuple[int, int] | None = None  # max_rows and prefill_budget before the first halving

    # -- in and out --------------------------------------------------------------------------------------------------

    def submit(self, request: Request, now: float) -> None:
        """Queue a request. Raises RequestError if its key is in the engine already."""
        if request.key in self._keys:
            raise RequestError(f"request key {request.key!r} is in the engine already: keys must be unique")
        self._keys.add(request.key)
        self._arrivals += 1
        self.waiting.append(ActiveRow(request, self._arrivals, now))

    def admit(self, now: float) -> list[ActiveRow]:
        """Give slots to waiting rows, in order, while slots and pages suffice, and return those rows. Creates the
        prefixes that they name, and drops unused ones if room is short."""
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
        """Return the number of context tokens for which a row gets pages when it is admitted."""
        if row.preemptions:  # one preemption is enough: now it takes all pages that it can ever need
            return longest_context(row.request)
        return len(row.request.prompt_ids) + min(row.request.params.block_size, row.request.params.max_new_tokens)

    def _has_room(self, tokens: int) -> bool:
        """Return whether enough pages are free to admit a row that needs pages for `tokens` tokens."""
        # a page for the next block of each running row stays free: otherwise the new row would be preempted next
        spare = min(len(self.running), self.allocator.pages // 8)
        return pages_for(tokens) + spare <= self.allocator.free_pages

    def _take_in(self, row: ActiveRow, prefix: Prefix | None, tokens: int, now: float) -> None:
        """Give the row a slot with pages for `tokens` tokens, those of the prefix included, and put it in prefill."""
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
        """Return the tokens of the prefix that the row's request names, cut to whole pages; empty if there are none."""
        length = min(row.request.prefix_tokens, row.prefill_tokens) // PAGE_SIZE * PAGE_SIZE
        return tuple(row.request.prompt_ids[:length])

    def _make_prefix(self, tokens: tuple[int, ...]) -> Prefix | None:
        """Create a prefix that is still to be computed, or return None if all slots for prefixes are in use."""
        if len(self.prefixes) == PREFIX_SLOTS and not self._drop_unused_prefix():
            return None
        slot = self.allocator.acquire(len(tokens))
        assert slot is not None, "a part of what there is room for"
        prefix = self.prefixes[tokens] = Prefix(tokens, slot, list(tokens))
        self.prefilling[prefix] = None
        return prefix

    def _drop_unused_prefix(self, kept: Prefix | None = None) -> bool:
        """Drop the prefix without users whose last use is longest ago. Returns False if there is none apart from
        `kept`."""
        unused = [p for p in self.prefixes.values() if p is not kept and not self.allocator.users(p.slot)]
        if not unused:
            return False
        self.drop_prefix(min(unused, key=lambda prefix: prefix.last_used))
        return True

    def knows(self, prefix: Prefix) -> bool:
        """Return whether the prefix has not been dropped, so that rows may begin with it."""
        return self.prefixes.get(prefix.tokens) is prefix

    def drop_prefix(self, prefix: Prefix) -> None:
        """Forget a prefix that no row uses, and free its slot and pages."""
        del self.prefixes[prefix.tokens]
        self.prefilling.pop(prefix, None)
        self.allocator.release(prefix.slot)

    def remove(self, row: ActiveRow) -> None:
        """Remove a running row for good: free its slot and pages at once, and its key for another request."""
        self._take_out(row)
        self._keys.discard(row.request.key)

    def cancel(self, key: str) -> bool:
        """Remove the request with this key, waiting or running. Returns False if there is none."""
        if key in self.running:
            self.remove(self.running[key])
        elif key in self._keys:
            self.waiting = deque(row for row in self.waiting if row.request.key != key)
            self._keys.discard(key)
        else:
            return False
        return True

    def clear(self) -> None:
        """Remove all rows, waiting and running, and all prefixes with tokens that have not been launched yet."""
        for row in list(self.running.values()):
            self.remove(row)
        for prefix in [prefix for prefix in self.prefixes.values() if prefix.pending]:
            self.drop_prefix(prefix)
        self._keys.clear()
        self.waiting.clear()

    def _take_out(self, row: ActiveRow) -> None:
        """Free the slot and pages of a running row, and mark it as ended, so that results in progress are ignored."""
        del self.running[row.request.key]
        self.prefilling.pop(row, None)
        if row.lane is not None:
            row.lane.drop(row)
        self.allocator.release(row.slot)
        row.ended = True

    # -- what to compute ---------------------------------------------------------------------------------------------

    @property
    def many_prompts_wait(self) -> bool:
        """Return whether so many prompts are in prefill, compared with the running rows, that they should not wait for
        the next regular context forward."""
        return bool(self.prefilling) and MANY * len(self.prefilling) >= len(self.running)

    def prefill_batch(self) -> list[tuple[ActiveRow | Prefix, int]]:
        """Return the rows and prefixes to prefill in the next forward, and how many tokens of each; empty if none can.

        The batch holds the oldest row or prefix that fits in the prefill budget, and those nearest to it in length, so
        that there is little padding: their number times the longest length is within the budget. A prompt with more
        tokens than the budget goes alone, in pieces, and takes turns with the others, so that they do not have to wait
        for its end.
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
        """Return the oldest row or prefix with more pending tokens than the budget, or None, and the oldest of the
        others, at most PREFILL_WINDOW. Rows whose prefix still has tokens to launch are left out."""
        long, short = None, list[ActiveRow | Prefix]()
        for item in self.prefilling:
            if item.prefix is not None and item.prefix.pending:
                continue  # a row can start only when all of its prefix has been launched
            if len(item.pending) <= self.prefill_budget:
                short.append(item)
                if len(short) == PREFILL_WINDOW:
                    break
            elif long is None:
                long = item
        return long, short

    def prefilled(self, batch: list[tuple[ActiveRow | Prefix, int]]) -> None:
        """Record that these pieces of prompts have been launched, and remove them from what is pending.

        batch: rows and prefixes, each with the number of its tokens in the piece, 0 if it had none to launch. A row
        whose whole prompt has been launched joins the lane with the fewest rows.
        """
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
        """Take pages for the row's pending tokens. If too few are free, drop unused prefixes, then preempt the youngest
        rows.

        Returns False if the row itself was the youngest and was preempted.
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
        """Preempt a running row: put it back into the queue, at its place in the order of arrival, to start again as a
        new ActiveRow."""
        self._take_out(row)
        again = ActiveRow(row.request, row.number, row.submitted, preemptions=row.preemptions + 1)
        at = next((i for i, other in enumerate(self.waiting) if other.number > row.number), len(self.waiting))
        self.waiting.insert(at, again)
        self.stats.preemptions += 1

    def halve(self) -> bool:
        """Halve the limits on rows and on prefill tokens after memory ran out. The row limit becomes half of the rows
        that run now, if these are fewer than the limit. Returns False if nothing is left to halve: both are at their
        least, one row and one page."""
        rows = max(1, min(self.max_rows, len(self.running)) // 2)
        budget = max(1, self.prefill_budget // PAGE_SIZE // 2) * PAGE_SIZE
        if (rows, budget) == (self.max_rows, self.prefill_budget):
            return False
        self._before_halving = self._before_halving or (self.max_rows, self.prefill_budget)
        self.max_rows, self.prefill_budget = rows, budget
        return True

    def double(self) -> None:
        """Double both limits, at most to their values before the first halving; do nothing if they are not halved."""
        if self._before_halving is not None:
            rows, budget = self._before_halving
            self.max_rows = min(rows, 2 * self.max_rows)
            self.prefill_budget = min(budget, 2 * self.prefill_budget)
            if (self.max_rows, self.prefill_budget) == (rows, budget):
                self._before_halving = None

    def set_max_rows(self, rows: int) -> None:
        """Set the limit on rows, and undo all halvings of the prefill budget."""
        if self._before_halving is not None:
            self.prefill_budget, self._before_halving = self._before_halving[1], None
        self.max_rows = rows

    # -- integrity ---------------------------------------------------------------------------------------------------

    def places(self, row: ActiveRow) -> Iterator[str]:
        """Yield the places that a running row is in; there is exactly one if all is well."""
        if row in self.prefilling:
            yield "prefilling"
        for lane in self.lanes:
            for name in ("fresh", "filling", "extending"):
                if row in getattr(lane, name):
                    yield name

    def check(self, in_flight: set[ActiveRow]) -> None:
        """Raise AssertionError if the records of slots, pages, running rows, lanes and keys contradict each other.

        Each slot and page must be owned once, each running row must be in one place, and each key must be there once.
        in_flight: the rows of forwards in progress; a row in AR mode may be in no place until its forward comes back.
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
    """Return the largest number of context tokens that the request can need: its prompt and max_new_tokens."""
    return len(request.prompt_ids) + request.params.max_new_tokens
