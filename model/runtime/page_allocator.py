"""Who owns which slot and which pages of the context cache. Free of torch.

A slot holds a row's Mamba states; its keys and values lie in pages of `PAGE_SIZE` tokens, all attention layers using
the same page numbers. A prefix that many rows begin with has a slot and pages of its own; those rows read its states
and share its pages, which nobody writes to any more. One owner of all of it, with an integrity check.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

PAGE_SIZE = 64
"""Tokens a page. Prompts are cut, and prefixes shared, at multiples of it alone, so that a prompt is computed in the
same pieces, and gives the same bits, whatever company it has."""
PREFIX_SLOTS = 2
"""Slots, beside those of the rows, for prefixes that many rows begin with."""


@dataclass(slots=True)
class _Held:
    """What one slot has."""

    table: "array[int]"
    """Its pages in the order of its tokens, as C ints; the first `shared` of them belong to its prefix."""
    shared: int
    prefix: int
    """The slot of the prefix it began with, or -1."""
    seed: int
    """The slot whose Mamba states stand for its context, or -1 before the first token."""
    length: int
    """Tokens in its context."""


class PageAllocator:
    """`slots` slots and `pages` pages."""

    def __init__(self, slots: int, pages: int) -> None:
        self.slots, self.pages = slots, pages
        self._free_slots = list(range(slots))[::-1]
        self._free_pages = list(range(pages))[::-1]
        self._held: dict[int, _Held] = {}
        self._users: dict[int, int] = {}  # prefix slot -> rows that began with it

    @property
    def free_pages(self) -> int:
        """Pages that nobody has."""
        return len(self._free_pages)

    @property
    def free_slots(self) -> int:
        """Slots that nobody has."""
        return len(self._free_slots)

    def acquire(self, tokens: int, prefix: int = -1) -> int | None:
        """A slot with pages for `tokens` tokens of context, those of `prefix` counted; None where there is no room.

        prefix: the slot of a whole number of pages that the row begins with; all of them count as filled, though a
        forward that fills them may still be to come.
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

    def reserve(self, slot: int, tokens: int) -> bool:
        """Takes the pages that the slot lacks for `tokens` tokens; False, and none taken, where too few are free."""
        return self.reserve_more(slot, tokens - self._held[slot].length)

    def reserve_more(self, slot: int, tokens: int) -> bool:
        """`reserve` for so many tokens more than its context has."""
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
        """Gives the slot and its own pages back. A prefix must have no users."""
        assert not self._users.get(slot), f"prefix slot {slot} has users"
        held = self._held.pop(slot)
        self._users.pop(slot, None)
        if held.prefix >= 0:
            self._users[held.prefix] -= 1
        # reversed, as they are taken from the end: the next row finds adjoining pages in order again
        self._free_pages.extend(reversed(held.table[held.shared :]))
        self._free_slots.append(slot)

    def grow(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Notes that a forward stores `lengths[i]` more tokens in `slots[i]`."""
        for slot, length in zip(slots, lengths, strict=True):
            held = self._held[slot]
            held.length += length
            held.seed = slot
            assert held.length <= len(held.table) * PAGE_SIZE, f"slot {slot}: {held.length} tokens exceed its pages"

    def users(self, slot: int) -> int:
        """Rows that began with the prefix in this slot."""
        return self._users.get(slot, 0)

    def length(self, slot: int) -> int:
        """Tokens in the slot's context."""
        return self._held[slot].length

    def seed(self, slot: int) -> int:
        """The slot whose Mamba states stand for this slot's context; -1 before the first token."""
        return self._held[slot].seed

    def table(self, slot: int) -> tuple[int, ...]:
        """The slot's pages, in the order of its tokens."""
        return tuple(self._held[slot].table)

    def view(self, slots: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...], tuple["array[int]", ...]]:
        """Of each slot, as it is now: its seed, its length, and its pages."""
        held = [self._held[slot] for slot in slots]
        return tuple(h.seed for h in held), tuple(h.length for h in held), tuple(h.table[:] for h in held)

    def add_slots(self, count: int) -> None:
        """More slots, numbered on."""
        self._free_slots[:0] = range(self.slots + count - 1, self.slots - 1, -1)
        self.slots += count

    def check(self) -> None:
        """Integrity: each slot and page is free or owned once, shared pages are the prefix's own. AssertionError."""
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
    """Pages that `tokens` tokens take."""
    return -(-tokens // PAGE_SIZE)
