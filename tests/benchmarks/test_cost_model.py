"""Tests the simulated devices under the engine's own loop."""

from collections.abc import Sequence

import numpy as np
import pytest

from tests.benchmarks.cost_model import BLOCK, Instant, Kind, Layers, Steps, Towers
from tests.benchmarks.roofline import Hardware, Roofline, Work, released
from tests.benchmarks.simulate import Mix, lockstep, padding_share, replay


def evenly() -> Steps:
    """Return steps from 1 to 16 a block, all equally frequent."""
    return Steps(dict.fromkeys(range(1, 17), 1))


@pytest.fixture(scope="module")
def roofline() -> Roofline:
    return Roofline(released(), Hardware())


def same(count: int, *, prompt: int, completion: int) -> Mix:
    """Return requests that are all alike."""
    return Mix(np.full(count, prompt), np.full(count, completion))


def test_one_row_takes_the_sum_of_its_forwards(roofline: Roofline) -> None:
    """On one lane, a row of two blocks of three steps takes one prefill, six denoiser forwards and one extension."""
    calls: list[tuple[Kind, float]] = []

    class Counted(Layers):
        def route(self, kind: Kind, work: Work) -> Sequence[tuple[int, float]]:
            parts = super().route(kind, work)
            calls.append((kind, sum(seconds for _, seconds in parts)))
            return parts

    layers = Counted(roofline)
    run, _ = replay(layers, same(1, prompt=100, completion=2 * BLOCK), Steps({3: 1}), rows=1, lanes=1)
    assert sorted(kind for kind, _ in calls) == ["context"] * 2 + ["denoise"] * 6
    computed = sum(seconds for _, seconds in calls)
    assert sum(run.busy) * run.seconds == pytest.approx(computed)
    # a denoiser forward can follow a context forward stage by stage; every other forward waits for the one before it
    assert computed - 2 * max(seconds for _, seconds in calls) <= run.seconds < computed


@pytest.mark.slow
def test_two_lanes_keep_both_devices_busy(roofline: Roofline) -> None:
    """With work of equal size, one lane leaves a device idle while the other computes; two lanes keep both busy."""
    mix, layers = same(512, prompt=256, completion=128), Layers(roofline)
    one, two = (replay(layers, mix, evenly(), rows=128, lanes=lanes)[0] for lanes in (1, 2))
    assert min(two.busy) > 0.9 > max(one.busy)


@pytest.mark.slow
def test_layers_across_devices_beat_towers_and_lockstep(roofline: Roofline) -> None:
    """For requests of mixed lengths, splitting the layers across devices is faster than one tower on each device, which
    is faster than lockstep. The design rests on this order."""
    mix = Mix.draw(1024)
    layers = replay(Layers(roofline), mix, evenly(), rows=128)[0]
    towers = replay(Towers(roofline), mix, evenly(), rows=128)[0]
    assert layers.tokens_per_s > towers.tokens_per_s > lockstep(roofline, mix, evenly(), rows=128).tokens_per_s


def test_a_handover_delays_the_rows_that_it_carries(roofline: Roofline) -> None:
    """A slower link between the towers lowers the tokens per second, with nothing else changed."""
    slow = Roofline(released(), Hardware(link=45e9))
    mix = same(64, prompt=64, completion=128)
    fast_run, slow_run = (replay(Towers(r), mix, Steps({2: 1}), rows=32)[0] for r in (roofline, slow))
    assert fast_run.tokens_per_s > 1.05 * slow_run.tokens_per_s


@pytest.mark.slow
def test_replay_commits_every_token_once() -> None:
    """Without devices no time passes, but each request gets its completion and each prompt token is prefilled once."""
    mix = Mix.draw(300)
    run, stats = replay(Instant(), mix, evenly(), rows=16, lanes=2)
    assert run.seconds == 0
    assert stats.prefill_tokens == mix.prompts.sum() <= stats.padded_tokens


def test_units_are_fed_longest_first() -> None:
    mix = Mix.draw(100, unit=50)
    assert all((np.diff(part) <= 0).all() for part in (mix.prompts[:50], mix.prompts[50:]))
    assert sorted(mix.prompts) == sorted(Mix.draw(100, unit=1).prompts)


def test_sorted_prompts_are_padded_less() -> None:
    assert padding_share(600, sort=True) < padding_share(600, sort=False)


def test_steps_follow_their_histogram() -> None:
    drawn = Steps({2: 3, 16: 1}).draw(100_000)
    assert set(drawn) == {2, 16}
    assert (drawn == 2).mean() == pytest.approx(0.75, abs=0.01)
