"""Tests that the roofline's counts are the published ones, and that its times follow from the counts."""

import pytest

from tests.benchmarks.roofline import Hardware, Roofline, Work, released


@pytest.fixture(scope="module")
def model() -> Roofline:
    return Roofline(released(), Hardware(layer_overhead_s=0.0))


def test_parameters_are_those_published(model: Roofline) -> None:
    assert model.parameters() == pytest.approx(31.58e9, rel=1e-3)
    assert model.active_parameters() == pytest.approx(3.58e9, rel=2e-3)


def test_a_row_has_48_mb_of_states(model: Roofline) -> None:
    assert model.row_state_bytes(range(52)) == pytest.approx(48e6, rel=0.05)


def test_one_token_reads_the_active_parameters_once(model: Roofline) -> None:
    """A forward of one token takes the time to read the active weights (all but the embedding) and its states."""
    read = 2 * (model.active_parameters() - model.head) + 48e6
    seconds = model.seconds(range(52), Work(rows=1, tokens=1, logits=1))
    assert seconds == pytest.approx(read / (3.35e12 * 0.8), rel=0.02)


def test_many_tokens_take_the_time_of_their_operations(model: Roofline) -> None:
    """With 100,000 tokens a forward is bound by its operations: two for each token and active parameter."""
    seconds = model.seconds(range(52), Work(rows=1, tokens=100_000))
    least = 2e5 * (model.active_parameters() - 2 * model.head) / (989e12 * 0.6)
    assert least <= seconds <= 1.2 * least


def test_two_stages_together_take_what_one_takes(model: Roofline) -> None:
    work = Work(rows=128, tokens=2048, context=128 * 600, pairs=2048 * 616, logits=1500)
    halves = model.seconds(range(26), work) + model.seconds(range(26, 52), work)
    assert halves == pytest.approx(model.seconds(range(52), work))


def test_experts_reached_lies_between_top_6_and_all(model: Roofline) -> None:
    assert model.experts_reached(1) == pytest.approx(6)
    assert model.experts_reached(16) == pytest.approx(128 * (1 - (122 / 128) ** 16))
    assert model.experts_reached(4096) == pytest.approx(128)
