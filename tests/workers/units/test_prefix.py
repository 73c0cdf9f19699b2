"""Tests of the prefix that the rows of a unit name: it agrees with its definition, and the rows do name it."""

from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.runtime.page_allocator import PAGE_SIZE
from pipeline.core.types import Assignment
from tests.workers.fakes import FakeEngine, make_runner, work_all
from tests.workers.jobs import open_job
from workers.units import prefix
from workers.units.prefix import FORWARD_TOKENS, best_prefix, has_prefix

Prompt = tuple[int, ...]
# prompts are whole pages of one token each, with a piece of a page after them, so that common prefixes are frequent
prompts = st.builds(
    lambda pages, rest: tuple(page for page in pages for _ in range(PAGE_SIZE)) + (9,) * rest,
    st.lists(st.integers(1, 2), max_size=5),
    st.integers(0, PAGE_SIZE),
)
known_prefixes = st.lists(st.integers(1, 2), min_size=1, max_size=3).map(
    lambda pages: tuple(page for page in pages for _ in range(PAGE_SIZE))
)


def ints(tokens: Sequence[int]) -> "array[int]":
    return array("i", tokens)


def saved(prompts: list[Prompt], tokens: Prompt, known: list[Prompt], forward: int) -> int:
    """Return the number of tokens that need not be computed if all rows that can begin with these tokens do."""
    rows = sum(prompt[: len(tokens)] == tokens and len(prompt) > len(tokens) for prompt in prompts)
    return len(tokens) * rows - (0 if tokens in known else len(tokens) + forward)


@given(st.lists(prompts, max_size=12), st.lists(known_prefixes, max_size=2), st.sampled_from([0, 100, FORWARD_TOKENS]))
def test_no_prefix_saves_more(rows: list[Prompt], known: list[Prompt], forward: int) -> None:
    """No other whole pages at the beginning of a prompt save more. If nothing is saved, there is no prefix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix, "FORWARD_TOKENS", forward)
        found = tuple(best_prefix([ints(row) for row in rows], [ints(tokens) for tokens in known]))
    every = {row[:end] for row in rows for end in range(PAGE_SIZE, len(row) + 1, PAGE_SIZE)}
    most = max((saved(rows, tokens, known, forward) for tokens in every | set(known)), default=0)
    if most <= 0:
        assert found == ()
    else:
        assert found in every
        assert saved(rows, found, known, forward) == most


def test_a_few_odd_rows_do_not_spoil_the_prefix_of_the_others() -> None:
    template = [*range(300)]
    rows = [ints([*template, i]) for i in range(1000)] + [ints([]), ints([5]), ints(template[:100]), ints(template[1:])]
    found = best_prefix(rows)
    assert [*found] == template[:256]
    assert [has_prefix(row, found) for row in rows] == [True] * 1000 + [False] * 4


def test_a_page_shared_by_chance_makes_no_second_prefix() -> None:
    """If the template is known, a small unit that shares one more page takes the template, and a large unit does
    not."""
    template = [*range(512)]
    longer = [*template, *[7] * PAGE_SIZE]
    known = [ints(template)]
    assert best_prefix([ints([*longer, i]) for i in range(10)], known) == known[0]
    assert best_prefix([ints([*longer, i]) for i in range(100)], known) == ints(longer)
    assert best_prefix([ints([*longer, 1])], known) == known[0]


def test_too_little_in_common_is_no_prefix() -> None:
    """Two rows have too little in common, and so have many rows that share less than a page."""
    assert not best_prefix([])
    assert not best_prefix([ints(range(PAGE_SIZE + 1))] * 2)
    assert not best_prefix([ints([*range(PAGE_SIZE - 1), 1000 + i, 0]) for i in range(1000)])


TEMPLATE = "Answer the question in one sentence. " * 6


def test_rows_name_the_prefix_that_their_unit_shares(tmp_path: Path) -> None:
    """The prefix is of whole pages, and the same for both units, although the second unit's rows share one more page.
    Odd rows name no prefix."""
    prompts = [f"{TEMPLATE[:150]}{'?' * (i % 40)}{i}" for i in range(30)]
    prompts[3], prompts[5], prompts[7] = "hi", TEMPLATE[:128], TEMPLATE[1:150]
    more = [TEMPLATE[:195] for _ in range(4)] + ["bye"]
    small = open_job(tmp_path, [*prompts, *more], rows_per_file=30)
    engine = FakeEngine()
    runner = make_runner(small, engine)
    for unit in small.plan.units:
        runner.add(Assignment(unit, 1))
    work_all(runner)
    assert engine.prefixes == {(): 4, tuple(TEMPLATE[:128].encode()): 31}
    assert [row["completion"] for row in small.rows()] == [prompt[::-1] for prompt in [*prompts, *more]]
