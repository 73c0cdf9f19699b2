"""Tests of the comparison of completions and of its intervals, against definitions and published values."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.calibration.quality import (
    MOST_WORTH,
    Share,
    difference,
    percent,
    rows_to_tell,
    share_of,
    similarity,
    wilson,
)


def distance(one: list[int], other: list[int]) -> int:
    """Return the Levenshtein distance, computed by its definition."""
    row = list(range(len(other) + 1))
    for i, token in enumerate(one, 1):
        above, row[0] = row[:], i
        for j, against in enumerate(other, 1):
            row[j] = min(above[j - 1] + (token != against), above[j] + 1, row[j - 1] + 1)
    return row[-1]


tokens = st.lists(st.integers(0, 3), max_size=20)


@settings(max_examples=50, deadline=None)
@given(tokens, tokens)
def test_similarity_is_the_edit_distance_over_the_longer_length(one: list[int], other: list[int]) -> None:
    longer = max(len(one), len(other))
    assert similarity(one, other) == pytest.approx(1 - distance(one, other) / longer if longer else 1.0)


def test_a_first_difference_does_not_lose_all_that_follows() -> None:
    rest = list(range(100, 199))
    assert similarity([1, *rest], [2, *rest]) == 0.99
    assert similarity(rest, [7, *rest]) == 0.99


def test_wilson_is_as_published() -> None:
    """The expected values are the 95% intervals of 81 in 263 and of 0 in 20 in Newcombe, Statistics in Medicine 17
    (1998), table I."""
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_shares_of_yes_and_no_have_the_interval_of_a_proportion() -> None:
    found = share_of([1.0] * 60 + [0.0] * 4, [1 / 64] * 64)
    assert (found.low, found.high) == pytest.approx(wilson(60 / 64, 64))
    assert share_of([1.0] * 64, [1 / 64] * 64).low == pytest.approx(wilson(1.0, 64)[0])


def test_values_that_vary_less_have_a_narrower_interval_within_bounds() -> None:
    rng = random.Random(3)
    values = [rng.uniform(0.9, 1.0) for _ in range(64)]
    found = share_of(values, [1 / 64] * 64)
    assert found.low < 0.95 < found.high
    assert (found.low, found.high) == pytest.approx(wilson(found.mean, 64 * MOST_WORTH))


def test_unequal_weights_count_as_fewer_rows() -> None:
    even, skewed = share_of([1.0, 0.0] * 8, [1.0] * 16), share_of([1.0, 0.0] * 8, [9.0] * 2 + [1.0] * 14)
    assert skewed.high - skewed.low > even.high - even.low


def test_the_interval_holds_the_truth_in_most_samples() -> None:
    """One row in twenty does not agree at all, and the others agree to 90 or 100%. The interval holds the true mean in
    at least 92% of the samples."""
    rng = random.Random(0)
    inside = 0
    for _ in range(400):
        values = [0.0 if rng.random() < 0.05 else rng.choice((0.9, 1.0)) for _ in range(64)]
        found = share_of(values, [1.0] * 64)
        inside += found.low <= 0.95 * 0.95 <= found.high
    assert inside >= 0.92 * 400


def test_a_difference_over_the_same_rows_cancels_what_is_hard_for_both() -> None:
    rng = random.Random(1)
    one = [rng.random() for _ in range(50)]
    gap, half = difference(one, [value - 0.01 for value in one], [1.0] * 50)
    assert gap == pytest.approx(0.01)
    assert half < 1e-9


def test_more_rows_narrow_an_interval_to_the_limit() -> None:
    share = share_of([1.0] * 62 + [0.0] * 2, [1.0] * 64)
    more = rows_to_tell(share, 0.95, 64)
    assert share.low < 0.95
    assert more > 64
    assert wilson(share.mean, 2 * more)[0] > 0.95


@pytest.mark.parametrize(
    ("share", "text"), [(1.0, "100%"), (0.9999, "99.9%"), (0.953, "95.3%"), (0.95, "95%"), (0.874, "87%"), (0.0, "0%")]
)
def test_all_rows_alone_are_100_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_a_share_is_shown_with_its_interval() -> None:
    assert str(Share(0.97, 0.91, 0.99)) == "97% (91% to 99%)"
    assert str(Share(1.0, 1.0, 1.0)) == "100%"
