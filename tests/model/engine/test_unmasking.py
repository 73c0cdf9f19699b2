"""Tests the commit rule against its plain definition in Python."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.engine.unmasking import commit, commit_counts, commit_in_order, positions_to_commit


def expected(masked: list[bool], confidence: list[float], threshold: float, steps_left: int) -> set[int]:
    """Return the positions that one row commits, by the rule as golden/README.md states it."""
    candidates = [i for i, m in enumerate(masked) if m]
    if not candidates:
        return set()
    above = sum(confidence[i] > threshold for i in candidates)
    count = min(max(above or 1, math.ceil(len(candidates) / steps_left)), len(candidates))
    if steps_left == 1:
        count = len(candidates)
    ascending = sorted(candidates, key=lambda i: (confidence[i], i))
    return set(ascending[len(ascending) - count :])


# few distinct confidences, all exact in float32, so that ties and values on the threshold are common
confidences = st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0])
rows = st.lists(
    st.tuples(
        st.lists(st.tuples(st.booleans(), confidences), min_size=1, max_size=16),
        st.sampled_from([0.0, 0.25, 0.5, 1.0]),
        st.integers(1, 20),
    ),
    min_size=1,
    max_size=5,
)


@given(rows)
def test_whole_batches_follow_the_rule(batch: list[tuple[list[tuple[bool, float]], float, int]]) -> None:
    """With blocks of different sizes, thresholds and steps left in one call, each row commits what it would commit
    alone."""
    longest = max(len(block) for block, _, _ in batch)
    padded = [block + [(False, 0.0)] * (longest - len(block)) for block, _, _ in batch]
    masked = torch.tensor([[m for m, _ in block] for block in padded])
    confidence = torch.tensor([[c for _, c in block] for block in padded])
    threshold = torch.tensor([threshold for _, threshold, _ in batch])
    left = torch.tensor([left for _, _, left in batch])
    got = positions_to_commit(masked, confidence, threshold, left)
    for row, (block, gamma, steps) in zip(got, batch, strict=True):
        wanted = expected([m for m, _ in block], [c for _, c in block], gamma, steps)
        assert set(row.nonzero()[:, 0].tolist()) == wanted
    # the same with predictions for the masked positions only; each place predicts token 10 + place
    place = masked.flatten().nonzero()[:, 0]
    ids, bits = commit(place, 10 + place, confidence.flatten()[place], threshold, left, longest)
    places = torch.arange(masked.numel()).view(masked.shape)
    assert torch.equal(ids, torch.where(got, 10 + places, -1).int())
    assert torch.equal(bits.view(torch.float32), confidence.masked_fill(~masked, 0))


def test_a_row_whose_logits_are_not_finite_commits_nothing() -> None:
    """The second of three rows has a NaN and commits nothing; the others go on. If tokens are committed in order, those
    before the NaN count."""
    place = torch.tensor([0, 2, 4, 5, 6, 9])  # of 3 rows of 4; row 0: 0, 2; row 1: 0, 1, 2; row 2: 1
    sure = torch.tensor([0.9, 0.2, 0.9, math.nan, 0.9, 0.1])
    ids, bits = commit(place, place + 10, sure, torch.full((3,), 0.5), torch.tensor([2, 1, 2]), 4)
    assert ids.tolist() == [[10, -1, -1, -1], [-1] * 4, [-1, 19, -1, -1]]
    assert bits.view(torch.float32)[1].isnan().tolist() == [False, True, False, False]
    ids, bits = commit_in_order(place, place + 10, sure, 3, 4)
    assert ids.tolist() == [[10, -1, 12, -1], [14, -1, -1, -1], [-1, 19, -1, -1]]
    assert bits.view(torch.float32)[1].isnan().tolist() == [False, True, False, False]


@given(st.integers(1, 64), st.integers(1, 64))
def test_the_schedule_alone_finishes_in_time(size: int, steps: int) -> None:
    """If no confidence is above the threshold, a block is full after at most `steps` steps."""
    left, masked = steps, size
    while masked:
        assert left > 0
        masked -= int(commit_counts(torch.tensor([masked]), torch.tensor([0]), torch.tensor([left])))
        left -= 1
