"""Tests of the share of a completion that is a loop: the fast measure agrees with its definition, and ordinary text has
no loops."""

import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.repetition import DEGENERATE, MAX_CYCLE, MIN_CYCLES, MIN_TOKENS, repetition

ROOT = Path(__file__).parents[3]
CYCLES = st.lists(st.integers(0, 2), min_size=1, max_size=MAX_CYCLE + 4)
PIECES = st.tuples(CYCLES, st.integers(1, 12), st.integers(0, MAX_CYCLE)).map(
    lambda piece: (piece[0] * piece[1])[: len(piece[0]) * piece[1] - piece[2]]
)
"""A cycle that is repeated several times, with up to MAX_CYCLE tokens cut off its end."""


def by_definition(tokens: Sequence[int]) -> float:
    """Compute the share by the definition in the docstring of `repetition`, in quadratic time."""
    looped: set[int] = set()
    for n in range(1, MAX_CYCLE + 1):
        for start in range(len(tokens)):
            end = start + n
            while end < len(tokens) and tokens[end] == tokens[end - n]:
                end += 1
            if end - start >= max(MIN_CYCLES * n, MIN_TOKENS):
                looped |= set(range(start, min(end, len(tokens))))
    return len(looped) / len(tokens) if tokens else 0.0


@pytest.mark.slow
@given(st.lists(PIECES, max_size=4))
def test_the_fast_measure_is_the_definition(pieces: list[list[int]]) -> None:
    tokens = [token for piece in pieces for token in piece]
    assert repetition(tokens) == pytest.approx(by_definition(tokens))


@pytest.mark.parametrize("cycle", [1, 2, 7, 31, MAX_CYCLE])
def test_a_loop_is_found_wherever_it_stands(cycle: int) -> None:
    text, loop = list(range(1000, 1100)), (list(range(cycle)) * 203)[:203]  # the last cycle is cut off
    assert repetition(loop) == 1.0
    for tokens in (loop + text, text + loop, text[:50] + loop + text[50:]):
        assert repetition(tokens) == pytest.approx(203 / 303)


def test_two_loops_count_once_each() -> None:
    one, other = [1, 2] * 30, [3, 4, 5] * 20
    assert repetition([*one, 9, *other, 8, 7]) == pytest.approx(120 / 123)


def test_what_people_write_twice_is_no_loop() -> None:
    laugh, sentence = [5, 6] * 5, list(range(30))
    assert repetition([*range(100), *laugh, *range(100)]) == 0.0
    assert repetition(sentence * 2) == 0.0
    assert repetition(sentence * 3) == 1.0
    assert repetition([1] * (MIN_TOKENS - 1)) == 0.0
    assert repetition([1] * MIN_TOKENS) == 1.0
    longer = list(range(MAX_CYCLE + 1))
    assert repetition(longer * 10) == 0.0, "a longer cycle is not looked for"


def test_nothing_and_a_few_tokens() -> None:
    assert repetition([]) == repetition([3]) == repetition((7,) * 5) == 0.0


def test_the_end_of_text_does_not_count() -> None:
    loop = [1, 2] * 20
    assert repetition([*loop, 99], eos_ids={99}) == repetition(loop, eos_ids=(99,)) == 1.0
    assert repetition([*loop, 99], eos_ids=[98]) == pytest.approx(40 / 41)
    assert repetition([99], eos_ids=[99]) == 0.0
    assert repetition([99] * 50) == 1.0, "a job without EOS ids"


def words(text: str) -> list[int]:
    """Split a text about as a byte-pair vocabulary does, into words, runs of one sign or of spaces, and single signs.
    Return their ids."""
    ids: dict[str, int] = {}
    return [ids.setdefault(token[0], len(ids)) for token in re.finditer(r" ?\w+| +|(\W)\1*", text)]


def texts() -> dict[str, str]:
    rng = random.Random(5)
    records = [
        {
            "id": i,
            "kind": rng.choice(["lamp", "chair"]),
            "price": rng.randrange(100, 999) / 10,
            "ok": rng.random() < 0.5,
        }
        for i in range(150)
    ]
    return {
        "prose": (ROOT / "LICENSE").read_text(),
        "source": (ROOT / "pipeline" / "planning" / "plan.py").read_text(),
        "JSON": json.dumps(records),
        "indented JSON": json.dumps(records, indent=4),
        "CSV": "\n".join(",".join(map(str, record.values())) for record in records),
        "Markdown": "\n".join(
            ["| id | kind | price |", "|----|------|-------|"] + [f"| {i} | lamp | 3.5 |" for i in range(80)]
        ),
    }


@pytest.mark.parametrize("kind", texts())
def test_ordinary_text_has_none(kind: str) -> None:
    tokens = words(texts()[kind])
    for start in range(0, len(tokens), 100):
        assert repetition(tokens[start : start + 200]) == 0.0


def test_a_text_that_ends_in_a_loop_is_degenerate() -> None:
    tokens = words(texts()["source"])[:200]
    assert repetition(tokens + [7, 8, 9] * 30) > DEGENERATE > repetition(tokens + [7, 8, 9] * 11) > 0


def test_it_is_fast_on_long_completions() -> None:
    rng = random.Random(1)
    tokens = [rng.randrange(300) for _ in range(10_000)]
    loop = list(range(MAX_CYCLE)) * 320
    started = time.process_time()
    for _ in range(10):
        repetition(tokens)
        repetition(loop)
    assert time.process_time() - started < 2
