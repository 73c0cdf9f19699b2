"""Keeps track of which row owns which slot and which pages of the context cache. Does not import torch.

A slot holds the Mamba states of a row. The row's keys and values are in pages of `PAGE_SIZE` tokens; all attention
layers use the same page numbers. A prefix that many rows begin with has a slot and pages of its own. Those rows read
its states and share its pages, and nothing writes to them any more. The tensors are in model.network.context_cache.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

PAGE_SIZE = 64
"""Tokens per page. Prompts are cut, and prefixes shared, only at multiples of it, so that a prompt is computed in the
same pieces, and gives the same bits, whichever rows share its forwards."""
PREFIX_SLOTS = 2
"""Number of slots for prefixes that many rows begin with; a context cache has them in addition to the slots of the
rows."""


@dataclass(slots=True)
class _Held:
    """The record of one slot that is in use."""

    table: "array[int]"
    """The slot's pages in the order of its tokens, as C ints; the first `shared` of them belong to its prefix."""
    shared: int
    """Number of pages that belong to the prefix."""
    prefix: int
    """The slot of the prefix that the row began with, or -1."""
    seed: int
    """The slot that holds the Mamba states of this context: that of the prefix until the first forward, then its own;
    -1 while the context is empty."""
    length: int
    """Number of tokens in the context, those of the prefix and of forwards in progress included."""


class PageAllocator:
    """The record of one context cache's slots and pages: which are free, and which slot owns which pages."""

    def __init__(self, slots: int, pages: int) -> None:
        self.slots, self.pages = slots, pages
        self._free_slots = list(range(slots))[::-1]
        self._free_pages = list(range(pages))[::-1]
        self._held: dict[int, _Held] = {}
        self._users: dict[int, int] = {}  # prefix slot -> rows that began with it

    @property
    def free_pages(self) -> int:
        """Return the number of free pages."""
        return len(self._free_pages)

    @property
    def free_slots(self) -> int:
        """Return the number of free slots."""
        return len(self._free_slots)

    def acquire(self, tokens: int, prefix: int = -1) -> int | None:
        """Take a free slot and pages for `tokens` tokens of context, and return the slot. Return None, and take
        nothing, if no slot or too few pages are free.

        prefix: the slot of the prefix that the row begins with, or -1. The prefix must fill whole pages. Its tokens are
        part of `tokens` and count as stored, even if a forward that stores them is still to come.
        """
        shared = len(self._held[prefix].table) if prefix >= 0 else 0
        wanted = max(0, pages_for(tokens) - shared)
        if not self._free_slots or wanted > len(self._free_pages):
            return None
        slot = self._free_slots.pop()
        table = self._held[prefix].table[:shared] if shared else array("i")
        self._held[slot] = _Held(table, shared, prefix, prefix, shared * PAGE_SIZE)
        if prefix >= 0:
            self._users[prefix] = self._users.get(prefix, 0) + 1
        self._take(slot, wanted)
        return slot

    def reserve_more(self, slot: int, tokens: int) -> bool:
        """Take the pages that the slot lacks for `tokens` more tokens than its context has now.

        Returns False, and takes none, if too few pages are free.
        """
        held = self._held[slot]
        wanted = -(-(held.length + tokens) // PAGE_SIZE) - len(held.table)
        if wanted > 0:
            if wanted > len(self._free_pages):
                return False
            self._take(slot, wanted)
        return True

    def _take(self, slot: int, pages: int) -> None:
        for _ in range(pages):
            self._held[slot].table.append(self._free_pages.pop())

    def release(self, slot: int) -> None:
        """Free the slot, and its pages except those of the prefix that it began with. Raises AssertionError if the slot
        holds a prefix that rows use."""
        assert not self._users.get(slot), f"prefix slot {slot} has users"
        held = self._held.pop(slot)
        self._users.pop(slot, None)
        if held.prefix >= 0:
            self._users[held.prefix] -= 1
        # reversed, because pages are taken from the end: the next row gets adjoining pages in order again
        self._free_pages.extend(reversed(held.table[held.shared :]))
        self._free_slots.append(slot)

    def grow(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Record that a forward stores `lengths[i]` more tokens in `slots[i]`. The pages must have been taken before:
        otherwise AssertionError is raised."""
        for slot, length in zip(slots, lengths, strict=True):
            held = self._held[slot]
            held.length += length
            held.seed = slot
            assert held.length <= len(held.table) * PAGE_SIZE, f"slot {slot}: {held.length} tokens exceed its pages"

    def users(self, slot: int) -> int:
        """Return the number of rows that began with the prefix in this slot and still hold their own slots."""
        return self._users.get(slot, 0)

    def length(self, slot: int) -> int:
        """Return the number of tokens in the slot's context, those of forwards in progress included."""
        return self._held[slot].length

    def seed(self, slot: int) -> int:
        """Return the slot that holds the Mamba states of this slot's context: its own, or that of its prefix until its
        first forward; -1 while the context is empty."""
        return self._held[slot].seed

    def table(self, slot: int) -> tuple[int, ...]:
        """Return the numbers of the slot's pages in the order of its tokens, those of its prefix first."""
        return tuple(self._held[slot].table)

    def view(self, slots: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple["array[int]", ...]]:
        """Return the seeds, the lengths and the pages of the slots, as copies that later changes do not affect."""
        held = [self._held[slot] for slot in slots]
        return tuple(h.seed for h in held), tuple(h.length for h in held), tuple(h.table[:] for h in held)

    def add_slots(self, count: int) -> None:
        """Add `count` free slots, numbered after the existing ones."""
        self._free_slots[:0] = range(self.slots + count - 1, self.slots - 1, -1)
        self.slots += count

    def check(self) -> None:
        """Raise AssertionError unless each slot and page is free or owned exactly once, contexts fit in their pages,
        and shared pages and the counts of users are right."""
        slots = self._free_slots + list(self._held)
        assert sorted(slots) == list(range(self.slots)), f"slots lost or doubled: {sorted(slots)}"
        pages = self._free_pages + [page for held in self._held.values() for page in held.table[held.shared :]]
        assert sorted(pages) == list(range(self.pages)), "pages lost or doubled"
        users = dict.fromkeys(self._users, 0)
        for slot, held in self._held.items():
            assert held.length <= len(held.table) * PAGE_SIZE, f"slot {slot}: {held.length} tokens exceed its pages"
            if held.prefix >= 0:
                users[held.prefix] += 1
                assert held.table[: held.shared] == self._held[held.prefix].table[: held.shared], f"slot {slot}: prefix"
        assert users == self._users, f"users of prefixes miscounted: {self._users}, but {users}"


def pages_for(tokens: int) -> int:
    """Return the number of pages that `tokens` tokens take, the last one perhaps in part."""
    return -(-tokens // PAGE_SIZE)
