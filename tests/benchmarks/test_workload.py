"""Tests the workloads of the benchmarks."""

import numpy as np
import pytest

from tests.benchmarks.workload import log_normal, requests


def test_lengths_have_the_median_and_the_percentile_asked_for() -> None:
    lengths = log_normal(np.random.default_rng(1), 200_000, median=300, p99=4000, longest=100_000)
    assert np.median(lengths) == pytest.approx(300, rel=0.02)
    assert np.percentile(lengths, 99) == pytest.approx(4000, rel=0.05)
    assert lengths.min() >= 1


def test_lengths_are_cut_at_the_longest() -> None:
    assert log_normal(np.random.default_rng(1), 10_000, median=300, p99=4000, longest=500).max() == 500


def test_requests_share_their_template_and_nothing_else() -> None:
    """All requests have one length, one template and then their own tokens; the same seed gives the same requests."""
    made = requests(8, prompt_tokens=40, max_new_tokens=16, vocabulary=256, template=30, prefix_tokens=30)
    assert len({request.prompt_ids[:30] for request in made}) == 1
    assert len({request.prompt_ids[30:] for request in made}) == 8
    assert all(len(request.prompt_ids) == 40 and request.prefix_tokens == 30 for request in made)
    assert made == requests(8, prompt_tokens=40, max_new_tokens=16, vocabulary=256, template=30, prefix_tokens=30)
