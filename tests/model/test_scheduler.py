"""Slots and pages under any arrival order: none leaked, none used twice, every request ends exactly once."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import GenerationParams, Request
from model.cache import PAGE_SIZE, ContextCache, pages_for
from model.scheduler import Scheduler, longest_context
from tests.model.golden_cases import CHECKPOINT


def make_cache(slots: int, kv_tokens: int) -> ContextCache:
    from model.checkpoint import open_checkpoint

    config = open_checkpoint(str(CHECKPOINT)).config
    devices = [torch.device("cpu")] * config.num_layers
    return ContextCache(config, devices, torch.float32, slots=slots, kv_tokens=kv_tokens)


CACHE_TOKENS = 8 * PAGE_SIZE
lengths = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 200)), min_size=1, max_size=25)


@settings(max_examples=60)
@given(lengths, st.integers(1, 4), st.randoms(use_true_random=False))
def test_every_row_gets_in_and_out_once(shapes: list[tuple[int, int]], slots: int, rng: object) -> None:
    """Rows of any length through few slots and few pages, leaving in any order: first come, first served."""
    cache = make_cache(slots, CACHE_TOKENS)
    scheduler = Scheduler(cache, max_prefill_tokens=256)
    requests = [
        Request(f"r{i}", [1] * prompt, GenerationParams(max_new_tokens=new)) for i, (prompt, new) in enumerate(shapes)
    ]
    for request in requests:
        scheduler.submit(request)
    admitted: list[str] = []
    while scheduler.waiting or scheduler.running:
        before = set(scheduler.running)
        scheduler.admit()
        admitted += [key for key in scheduler.running if key not in before]
        cache.check()
        assert scheduler.running, "no row runs, though every one fits alone"
        assert len(scheduler.running) <= slots
        assert sum(pages_for(longest_context(row.request)) for row in scheduler.running.values()) <= cache.pages
        scheduler.remove(rng.choice(list(scheduler.running.values())))  # type: ignore[attr-defined]
    assert admitted == [request.key for request in requests]
    assert cache.has_room(CACHE_TOKENS)


@settings(max_examples=60)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=12), st.integers(1, 500))
def test_prefill_batches_keep_to_the_budget(prompts: list[int], budget: int) -> None:
    """Oldest first, within max_prefill_tokens, padding counted; a longer prompt goes alone; all come in the end."""
    scheduler = Scheduler(make_cache(12, 12 * 1024), budget)
    for i, length in enumerate(prompts):
        scheduler.submit(Request(f"r{i}", [1] * length, GenerationParams(max_new_tokens=1)))
    scheduler.admit()
    order: list[str] = []
    while batch := scheduler.prefill_batch():
        assert len(batch) == 1 or len(batch) * max(len(row.pending) for row in batch) <= budget
        for row in batch:
            row.phase = "denoise"
        order += [row.request.key for row in batch]
    assert order == [f"r{i}" for i in range(len(prompts))]


def test_a_slot_is_clean_for_its_next_row() -> None:
    """Whatever a row left in a slot, the next one starts from zero states and an empty context."""
    cache = make_cache(1, CACHE_TOKENS)
    slot = cache.acquire(100)
    for state in cache.layers:
        for tensor in vars(state).values():
            tensor.fill_(7.0)
    cache.grow(cache.rows([slot], [100]))
    cache.release(slot)
    slot = cache.acquire(50)
    assert cache.length(slot) == 0
    mamba = cache.layers[0]
    assert not mamba.conv[slot].any()  # type: ignore[union-attr]
    assert not mamba.ssm[slot].any()  # type: ignore[union-attr]
