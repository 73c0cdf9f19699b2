"""Tests which rows get slots, which prompts are prefilled together, and which rows are preempted when pages run out."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.engine.scheduler import MANY, Scheduler, longest_context
from model.engine.sequence import ActiveRow, Lane, Prefix
from model.errors import RequestError
from model.runtime.page_allocator import PAGE_SIZE, PREFIX_SLOTS, PageAllocator, pages_for
from tests.model.engine.scripts import request


def make(rows: int = 4, pages: int = 100, budget: int = 4096, lanes: int = 1) -> Scheduler:
    """Return a scheduler with slots of its own."""
    return Scheduler(PageAllocator(rows + PREFIX_SLOTS, pages), rows, budget, lanes)


def prefill(scheduler: Scheduler) -> list[tuple[str, int]]:
    """Launch a prefill batch and return (key, tokens) of each item; the key of a prefix is empty."""
    batch = scheduler.prefill_batch()
    for item, count in batch:
        scheduler.allocator.grow([item.slot], [count])
    scheduler.prefilled(batch)
    return [(item.request.key if isinstance(item, ActiveRow) else "", count) for item, count in batch]


lengths = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 200)), min_size=1, max_size=25)


@pytest.mark.slow
@settings(max_examples=100)
@given(lengths, st.integers(1, 4), st.integers(0, 1 << 30))
def test_every_row_gets_in_and_out_once(shapes: list[tuple[int, int]], rows: int, seed: int) -> None:
    """Rows of any length pass through few slots and pages and leave in any order. They are admitted in the order of
    arrival."""
    rng, scheduler = random.Random(seed), make(rows, 8)
    requests = [request(f"r{i}", prompt, max_new_tokens=new) for i, (prompt, new) in enumerate(shapes)]
    for each in requests:
        scheduler.submit(each, 0.0)
    admitted: list[str] = []
    while scheduler.waiting or scheduler.running:
        admitted += [row.request.key for row in scheduler.admit(1.0)]
        scheduler.check(set())
        assert scheduler.running, "no row runs, though every one fits alone"
        assert len(scheduler.running) <= rows
        scheduler.remove(rng.choice(list(scheduler.running.values())))
    assert admitted == [each.key for each in requests]
    assert (scheduler.allocator.free_pages, scheduler.allocator.free_slots) == (8, rows + PREFIX_SLOTS)


@pytest.mark.slow
@settings(max_examples=100)
@given(st.lists(st.integers(1, 1500), min_size=1, max_size=14), st.integers(64, 1000))
def test_prefill_batches_keep_to_the_budget(prompts: list[int], budget: int) -> None:
    """The number of items times the longest stays within max_prefill_tokens, longer prompts are cut at whole pages, and
    the oldest prompt comes first."""
    scheduler = make(14, 14 * 30, budget)
    for i, length in enumerate(prompts):
        scheduler.submit(request(f"r{i}", length, max_new_tokens=1), 0.0)
    scheduler.admit(0.0)
    got = dict.fromkeys((f"r{i}" for i in range(len(prompts))), 0)
    left = {f"r{i}": length for i, length in enumerate(prompts)}
    while any(left.values()):
        short = [key for key in left if 0 < left[key] <= scheduler.prefill_budget]
        long = [key for key in left if left[key] > scheduler.prefill_budget]
        batch = prefill(scheduler)
        counts = [count for _, count in batch]
        assert len(counts) * max(counts) <= budget
        assert batch[0][0] in (short[:1] + long[:1])
        for key, count in batch:
            got[key] += count
            left[key] -= count
            assert not left[key] or not got[key] % PAGE_SIZE
    assert [got[f"r{i}"] for i in range(len(prompts))] == prompts
    assert not scheduler.prefill_batch()
    assert scheduler.stats.prefill_tokens == sum(prompts)
    assert scheduler.stats.padded_tokens >= sum(prompts)


def test_prompts_of_like_lengths_go_together() -> None:
    """The oldest prompt is batched with those nearest to it in length, whatever came in between, so that padding stays
    small."""
    scheduler = make(6, 200, 1024)
    for key, length in {"a": 100, "x": 900, "b": 110, "y": 10, "c": 95, "z": 500}.items():
        scheduler.submit(request(key, length), 0.0)
    scheduler.admit(0.0)
    first, second = prefill(scheduler), prefill(scheduler)
    assert [key for key, _ in first] == ["a", "c", "b", "y"]
    assert [key for key, _ in second] == ["x"]
    assert scheduler.stats.padding_share == pytest.approx(1 - (315 + 900) / (440 + 900))


def test_long_and_short_prompts_take_turns() -> None:
    """While a long prompt is read in pieces, every second batch has short prompts. A long prompt alone does not
    wait."""
    scheduler = make(6, 400, 128)
    for key, length in {"long": 1000, "a": 100, "b": 100, "c": 60, "d": 60}.items():
        scheduler.submit(request(key, length), 0.0)
    scheduler.admit(0.0)
    kinds = [[key for key, _ in prefill(scheduler)] for _ in range(8)]
    assert kinds[:6] == [["long"], ["a"], ["long"], ["b"], ["long"], ["c", "d"]]
    assert kinds[6:] == [["long"], ["long"]]


def test_a_new_row_does_not_push_out_those_that_run() -> None:
    """When a row is admitted, one page for each running row stays free, so that their next blocks have room."""
    scheduler = make(4, 16)
    scheduler.submit(request("a", 8 * PAGE_SIZE - 8, max_new_tokens=100), 0.0)
    scheduler.submit(request("b", 8 * PAGE_SIZE - 8, max_new_tokens=100), 0.0)
    assert [row.request.key for row in scheduler.admit(0.0)] == ["a"]
    assert [row.request.key for row in scheduler.waiting] == ["b"]
    assert not scheduler.admit(0.0)


def test_the_youngest_goes_back_to_its_place_in_the_queue() -> None:
    """The youngest row is preempted if an older row needs pages. It keeps its place before later rows, and next time
    takes all pages that it can ever need."""
    scheduler = make(3, 10)
    for key in "abcd":
        scheduler.submit(request(key, PAGE_SIZE - 8, max_new_tokens=2 * PAGE_SIZE), 0.0)
    a, _, _ = scheduler.admit(0.0)
    while scheduler.allocator.free_pages:
        scheduler.allocator.reserve_more(a.slot, PAGE_SIZE * (len(scheduler.allocator.table(a.slot)) + 1))
    while prefill(scheduler):
        pass
    scheduler.allocator.grow([a.slot], [len(scheduler.allocator.table(a.slot)) * PAGE_SIZE - 56])
    a.pending = [1] * 8
    assert scheduler.make_room(a)
    assert list(scheduler.running) == ["a", "b"]
    assert [(row.request.key, row.preemptions) for row in scheduler.waiting] == [("c", 1), ("d", 0)]
    assert scheduler.stats.preemptions == 1
    scheduler.check(set())
    scheduler.remove(a)
    (c, _d) = scheduler.admit(0.0)
    assert len(scheduler.allocator.table(c.slot)) == pages_for(longest_context(c.request))


def test_an_unused_prefix_goes_before_any_row() -> None:
    """Pages for a running row come from a prefix that no row uses, not from a younger row."""
    scheduler = make(3, 8)
    scheduler.submit(request("p", 140, shared=range(1000, 1128), prefix_tokens=128), 0.0)
    scheduler.admit(0.0)
    while prefill(scheduler):
        pass
    scheduler.cancel("p")
    for key in "ab":
        scheduler.submit(request(key, PAGE_SIZE - 8, max_new_tokens=4 * PAGE_SIZE), 0.0)
    a, b = scheduler.admit(0.0)
    prefill(scheduler)
    assert scheduler.allocator.reserve_more(b.slot, 4 * PAGE_SIZE + 8)
    scheduler.allocator.grow([a.slot], [8])
    a.pending = [1] * 8
    assert not scheduler.allocator.free_pages
    assert scheduler.make_room(a)
    assert list(scheduler.running) == ["a", "b"]
    assert not scheduler.prefixes
    scheduler.check(set())


def test_a_row_may_be_the_one_that_goes_back() -> None:
    """If the youngest row itself needs a page, it is preempted, and the older row keeps all its pages."""
    scheduler = make(2, 4)
    for key in "ab":
        scheduler.submit(request(key, PAGE_SIZE - 8, max_new_tokens=2 * PAGE_SIZE), 0.0)
    a, b = scheduler.admit(0.0)
    prefill(scheduler)
    assert scheduler.allocator.reserve_more(a.slot, 2 * PAGE_SIZE + 8)
    scheduler.allocator.grow([b.slot], [8])
    b.pending = [1] * 8
    assert not scheduler.make_room(b)
    assert b.ended
    assert list(scheduler.running) == ["a"]
    assert [row.request.key for row in scheduler.waiting] == ["b"]


def test_a_key_is_in_the_engine_once() -> None:
    """A key is refused while a request with it waits or runs, and is free once the request is cancelled."""
    scheduler = make(1)
    row = request("a", 10)
    for _ in range(2):
        scheduler.submit(row, 0.0)
        with pytest.raises(RequestError, match="in the engine already"):
            scheduler.submit(row, 0.0)
        scheduler.admit(0.0)
        with pytest.raises(RequestError, match="in the engine already"):
            scheduler.submit(row, 0.0)
        assert scheduler.cancel("a")
        assert not scheduler.cancel("a")
    scheduler.check(set())


def test_clear_keeps_whole_prefixes_alone() -> None:
    """clear() removes the rows and the prefixes that are only partly computed, and keeps complete prefixes."""
    scheduler = make(2, 40, 64)
    tokens = range(1000, 1128)
    scheduler.submit(request("a", 140, shared=tokens, prefix_tokens=128), 0.0)
    scheduler.admit(0.0)
    assert prefill(scheduler) == [("", 64)]
    scheduler.clear()
    assert not scheduler.prefixes
    assert not scheduler.prefilling
    scheduler.submit(request("a", 140, shared=tokens, prefix_tokens=128), 0.0)
    scheduler.admit(0.0)
    assert [prefill(scheduler) for _ in range(3)] == [[("", 64)], [("", 64)], [("a", 12)]]
    scheduler.clear()
    scheduler.check(set())
    (prefix,) = scheduler.prefixes.values()
    assert isinstance(prefix, Prefix)
    assert scheduler.allocator.free_pages == 38


def test_halving_ends() -> None:
    """Rows and prefill tokens are halved down to one row and one page; then nothing is left to halve."""
    scheduler = make(8, 100, 1000)
    seen = []
    while scheduler.halve():
        seen.append((scheduler.max_rows, scheduler.prefill_budget))
    assert seen[0] == (1, 448)  # no row runs: one is enough
    assert seen[-1] == (1, 64)


def lane_turn(lane: Lane, extend_every: int) -> tuple[list[ActiveRow], list[ActiveRow]]:
    """Take one turn of the lane; return the rows that are extended, and those that begin a block for the denoiser."""
    extended = lane.take_extending() if lane.due(extend_every) else []
    lane.extended(extended)
    return extended, lane.take_fresh()


def test_a_lane_does_not_wait_when_it_has_nothing_else() -> None:
    """With extend_every=3, finished blocks wait for the third turn only while other blocks are being filled."""
    lane = Lane()
    assert lane.due(3), "a lane without rows has no reason to wait"
    lane = Lane()
    a, b = (ActiveRow(request(key, 10), number, 0.0) for number, key in enumerate("ab"))
    lane.put(a)
    lane.put(b)
    assert lane_turn(lane, 3) == ([], [a, b])
    lane.block_done(a, [1])
    assert lane_turn(lane, 3) == ([], [])
    assert lane_turn(lane, 3) == ([a], [a])
    lane.block_done(a, [1])
    lane.block_done(b, [1])
    assert lane_turn(lane, 3) == ([a, b], [a, b])
    assert list(lane.filling) == [a, b]


def test_rows_in_ar_mode_wait_for_no_turn_and_come_last() -> None:
    """AR rows do not wait, because a context forward fills their blocks. Finished blocks of other rows go into the same
    forward, before them."""
    lane = Lane()
    ar, *others = (ActiveRow(request(key, 10, mode=mode), 0, 0.0) for key, mode in (("r", "ar"), ("a", "diffusion")))
    other = ActiveRow(request("b", 10), 0, 0.0)
    for row in (ar, *others, other):
        lane.put(row)
    assert lane_turn(lane, 3) == ([ar], [*others, other])
    for _ in range(4):
        lane.block_done(ar, [1])
        lane.block_done(other, [1])
        assert lane_turn(lane, 3) == ([other, ar], [other])
        assert list(lane.filling) == [*others, other]
    assert lane_turn(lane, 6) == ([], [])


def test_many_prompts_are_those_of_a_share_of_the_rows() -> None:
    """One prompt among many rows waits for its turn; one prompt for every MANY rows does not. Prompts that have been
    read do not count."""
    scheduler = make(2 * MANY, 400)

    def many_wait() -> bool:  # mypy would assume that the attribute keeps the value it was asserted to have
        return scheduler.many_prompts_wait

    assert not many_wait()
    for i in range(2 * MANY):
        scheduler.submit(request(f"r{i}", 60), 0.0)
    scheduler.admit(0.0)
    assert many_wait()
    scheduler.prefilled([(item, 60) for item in list(scheduler.prefilling)[2:]])
    assert many_wait()
    scheduler.prefilled([(next(iter(scheduler.prefilling)), 60)])
    assert not many_wait()


@pytest.mark.parametrize("break_it", ["lost", "doubled", "key", "slot"])
def test_the_check_finds_what_is_wrong(break_it: str) -> None:
    """The check finds a row in no place or in two, a row whose key is missing, and a slot without an owner."""
    scheduler = make()
    scheduler.submit(request("a", 10), 0.0)
    scheduler.submit(request("b", 10), 0.0)
    scheduler.admit(0.0)
    prefill(scheduler)
    scheduler.check(set())
    lane, row = scheduler.lanes[0], scheduler.running["a"]
    if break_it == "lost":
        del lane.fresh[row]
    elif break_it == "doubled":
        lane.filling[row] = None
    elif break_it == "key":
        scheduler._keys.discard("b")
    else:
        scheduler.allocator.acquire(10)
    with pytest.raises(AssertionError):
        scheduler.check(set())
