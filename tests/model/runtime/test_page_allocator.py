"""Tests that each slot and page is either free or owned once, and that shared prefixes are never written to."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.runtime.page_allocator import PAGE_SIZE, PageAllocator, pages_for

Step = tuple[str, int, int]
steps = st.lists(
    st.tuples(
        st.sampled_from(["row", "row", "prefix", "behind", "grow", "grow", "release", "slots"]),
        st.integers(0, 50),
        st.integers(1, 500),
    ),
    max_size=60,
)


def own_pages(slots: PageAllocator, rows: dict[int, int]) -> list[int]:
    """Return the pages that rows hold in addition to those of their prefixes. rows: number of shared pages by slot."""
    return [page for slot, shared in rows.items() for page in slots.table(slot)[shared:]]


@pytest.mark.slow
@settings(max_examples=200)
@given(steps, st.integers(1, 6), st.integers(1, 40))
def test_each_slot_and_page_is_free_or_owned_once(steps: Sequence[Step], count: int, pages: int) -> None:
    """Rows and prefixes come, grow and go in any order: a refusal takes nothing, and a page in use is never given out
    again."""
    slots = PageAllocator(count, pages)
    rows: dict[int, int] = {}  # slot -> number of pages that it shares with its prefix
    prefixes: list[int] = []
    for what, which, tokens in steps:
        free = slots.free_slots, slots.free_pages
        if what in ("row", "prefix", "behind"):
            prefix = prefixes[which % len(prefixes)] if what == "behind" and prefixes else -1
            tokens = pages_for(tokens) * PAGE_SIZE if what == "prefix" else tokens
            shared = len(slots.table(prefix)) if prefix >= 0 else 0
            slot = slots.acquire(tokens, prefix)
            wanted = max(0, pages_for(tokens) - shared)
            assert (slot is None) == (not free[0] or wanted > free[1])
            if slot is None:
                assert (slots.free_slots, slots.free_pages) == free
                continue
            assert slot not in rows
            rows[slot] = shared
            assert (slots.length(slot), slots.seed(slot)) == (shared * PAGE_SIZE, prefix)
            prefixes += [slot] * (what == "prefix")
        elif what == "slots":
            slots.add_slots(which % 3)
            assert slots.free_slots == free[0] + which % 3
        elif rows:
            move(slots, rows, prefixes, list(rows)[which % len(rows)], tokens if what == "grow" else 0)
        slots.check()
        assert sorted(set(own_pages(slots, rows))) == sorted(own_pages(slots, rows))
        assert len(own_pages(slots, rows)) + slots.free_pages == pages
    for slot in sorted(rows, key=lambda slot: slot in prefixes):
        slots.release(slot)
    slots.check()
    assert (slots.free_slots, slots.free_pages) == (slots.slots, pages)


def move(slots: PageAllocator, rows: dict[int, int], prefixes: list[int], slot: int, tokens: int) -> None:
    """Add `tokens` to the slot, or release it if `tokens` is 0. Prefixes are full, and are kept while rows use them."""
    if slot in prefixes:
        if not tokens and not slots.users(slot):
            slots.release(slot)
            prefixes.remove(slot)
            del rows[slot]
        return
    if not tokens:
        slots.release(slot)
        del rows[slot]
        return
    length, table = slots.length(slot), slots.table(slot)
    if slots.reserve_more(slot, tokens):
        slots.grow([slot], [tokens])
        assert slots.table(slot)[: len(table)] == table
        assert len(slots.table(slot)) == max(len(table), pages_for(length + tokens))
        assert (slots.length(slot), slots.seed(slot)) == (length + tokens, slot)
    else:
        assert slots.table(slot) == table


def test_a_row_begins_behind_a_prefix_that_is_still_to_be_filled() -> None:
    """A row may begin before its prefix is computed. Its context is as long as the whole prefix from the start, and it
    shares the pages of the prefix but adds tokens only to its own."""
    slots = PageAllocator(3, 8)
    prefix = slots.acquire(2 * PAGE_SIZE)
    assert prefix is not None
    row = slots.acquire(3 * PAGE_SIZE, prefix)
    assert row is not None
    assert slots.length(row) == 2 * PAGE_SIZE
    assert slots.table(row)[:2] == slots.table(prefix)
    assert slots.table(row)[2] not in slots.table(prefix)
    assert (slots.seed(row), slots.users(prefix), slots.free_pages) == (prefix, 1, 5)
    slots.grow([prefix], [2 * PAGE_SIZE])
    slots.grow([row], [1])
    assert (slots.seed(row), slots.length(row)) == (row, 2 * PAGE_SIZE + 1)
    with pytest.raises(AssertionError, match="has users"):
        slots.release(prefix)
    slots.release(row)
    slots.release(prefix)
    slots.check()


def test_a_slot_is_clean_for_its_next_row() -> None:
    """The next row in a slot starts without states and with an empty context, whatever the last row left there."""
    slots = PageAllocator(1, 4)
    slot = slots.acquire(100)
    assert slot is not None
    slots.grow([slot], [100])
    slots.release(slot)
    assert slots.acquire(50) == slot
    assert (slots.length(slot), slots.seed(slot)) == (0, -1)


def test_tokens_beyond_the_pages_are_noticed() -> None:
    """Growing a row beyond its pages raises AssertionError, so a forward that would write there cannot go on."""
    slots = PageAllocator(1, 4)
    slot = slots.acquire(10)
    assert slot is not None
    with pytest.raises(AssertionError, match="exceed its pages"):
        slots.grow([slot], [PAGE_SIZE + 1])


@pytest.mark.parametrize("break_it", ["slot", "page", "users"])
def test_the_check_finds_what_is_wrong(break_it: str) -> None:
    """The check finds a slot or page that is free and held at the same time, and a wrong count of a prefix's users."""
    slots = PageAllocator(3, 8)
    prefix = slots.acquire(PAGE_SIZE)
    assert prefix is not None
    assert slots.acquire(100, prefix) is not None
    slots.check()
    if break_it == "slot":
        slots._free_slots.append(prefix)
    elif break_it == "page":
        slots._free_pages.append(slots.table(prefix)[0])
    else:
        slots._users[prefix] += 1
    with pytest.raises(AssertionError):
        slots.check()
