"""The commit rule, against its plain definition in Python."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from model.unmasking import commit_counts, positions_to_commit


def expected(masked: list[bool], confidence: list[float], threshold: float, steps_left: int) -> set[int]:
    """The rule as golden/README.md words it, one row."""
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
    """Blocks of unequal size, thresholds and steps left in one call: each row as if it were alone."""
    longest = max(len(block) for block, _, _ in batch)
    padded = [block + [(False, 0.0)] * (longest - len(block)) for block, _, _ in batch]
    got = positions_to_commit(
        torch.tensor([[m for m, _ in block] for block in padded]),
        torch.tensor([[c for _, c in block] for block in padded]),
        torch.tensor([threshold for _, threshold, _ in batch]),
        torch.tensor([left for _, _, left in batch]),
    )
    for row, (block, threshold, left) in zip(got, batch, strict=True):
        wanted = expected([m for m, _ in block], [c for _, c in block], threshold, left)
        assert set(row.nonzero()[:, 0].tolist()) == wanted


@given(st.integers(1, 64), st.integers(1, 64))
def test_the_schedule_alone_finishes_in_time(size: int, steps: int) -> None:
    """With no confidence above the threshold a block is done after exactly min(size, steps) or fewer steps."""
    left, masked = steps, size
    while masked:
        assert left > 0
        masked -= int(commit_counts(torch.tensor([masked]), torch.tensor([0]), torch.tensor([left])))
        left -= 1
