"""Tests of the choice of a point, of its cost, and of the texts about it."""

import math
import random
from collections.abc import Sequence

import pytest

from pipeline.calibration.bench import Speed
from pipeline.calibration.choice import Choice, Result, Workload, choose, cost_of
from pipeline.calibration.page.verdict import notes, verdict
from pipeline.calibration.points import AR, Point, Setting
from pipeline.calibration.quality import KNOWN, Quality, share_of

GPU_JOB = Workload(rows=1_000_000, replicas=4, gpus=2, price=2.5, currency="USD")


def result(
    tokens_per_s: float,
    agreement: float = 1.0,
    threshold: float | None = None,
    *,
    steps: int = 16,
    rows: int = 16,
    error: float = 0.001,
    repetition: float = 0.0,
    tokens: float = 100.0,
    cut: float = 0.0,
    sample: Sequence[float] | None = None,
) -> Result:
    """Return a result; it is one of AR if no threshold is given. The agreement of each row is in `sample`; without a
    sample, it is `agreement` for all of 64 rows."""
    values = tuple(sample or [agreement] * 64)
    share = KNOWN if threshold is None else share_of(values, [1.0] * len(values))
    setting = AR if threshold is None else Setting("diffusion", threshold, steps)
    quality = Quality(share, share, values, repetition, tokens, 50.0, None, None, 1 - cut, cut, 0.0)
    return Result(Point(setting, rows), Speed(tokens_per_s, error, 10.0, 1000, 20, 20.0), quality, "2026")


def chosen(*results: Result, min_agreement: float = 0.95) -> Choice:
    return choose(results, min_agreement)


def test_the_fastest_point_that_agrees_is_chosen() -> None:
    best = result(240, 0.97, 0.8)
    choice = chosen(result(100), best, result(300, 0.90, 0.7), result(150, 0.99, 0.9))
    assert choice.best is best
    assert choice.speedup == pytest.approx(2.4)
    assert verdict(choice).startswith("Diffusion with threshold 0.8, 16 steps, 16 rows at a time is 2.40 times as fast")
    assert "240 tokens/s against 100" in verdict(choice)


def test_ar_that_is_faster_is_chosen_and_said_plainly() -> None:
    ar = result(400)
    choice = chosen(ar, result(200, 1.0, 0.8), result(100, rows=1))
    assert choice.best is ar
    assert verdict(choice).startswith("AR alone is faster for this workload: 400 tokens/s against 200 of the fastest")
    assert "2.00 times as fast" in verdict(choice)


def test_where_faster_points_do_not_agree_ar_is_chosen_and_the_nearest_named() -> None:
    ar = result(100)
    choice = chosen(ar, result(300, 0.5, 0.7), result(200, 0.9, 0.9))
    assert choice.best is ar
    text = verdict(choice)
    assert "diffusion is up to 3.00 times as fast here (threshold 0.7" in text
    assert "Nearest to AR is threshold 0.9, 16 steps, with 90%" in text
    assert "at 2.00 times AR's speed" in text
    assert any("--min-agreement" in note for note in notes(choice))


def test_a_point_that_repeats_itself_more_than_ar_is_not_chosen() -> None:
    loops = result(300, 0.99, 0.7, repetition=0.2)
    clean = result(200, 0.99, 0.9, repetition=0.11)
    assert chosen(result(100, repetition=0.1), loops, clean).best is clean


def test_among_points_about_as_fast_the_most_careful_is_chosen() -> None:
    careful = result(239, 0.96, 0.9)
    assert chosen(result(100), result(240, 0.96, 0.8), careful, result(238, 0.96, 0.8, steps=32)).best is careful
    few_rows = result(239, 0.96, 0.8, rows=8)
    assert chosen(result(100), result(240, 0.96, 0.8), few_rows).best is few_rows
    ar = result(100)
    assert chosen(ar, result(101, 1.0, 0.8)).best is ar
    assert "about as fast" in verdict(chosen(ar, result(101, 1.0, 0.8)))


def test_noise_of_the_speeds_makes_a_tie_but_not_of_any_size() -> None:
    ar = result(100, error=0.03)
    assert chosen(ar, result(108, 1.0, 0.8, error=0.03)).best is ar
    faster = result(115, 1.0, 0.8, error=0.5)
    assert chosen(result(100, error=0.5), faster).best is faster


def test_speed_is_that_of_the_whole_job() -> None:
    """More tokens per second are no gain if the rows only become longer."""
    choice = chosen(result(100, tokens=100), result(150, 1.0, 0.8, tokens=200))
    assert choice.best.point.setting == AR


def test_a_point_that_generates_nothing_is_never_chosen() -> None:
    choice = chosen(result(100), result(0, 1.0, 0.8, tokens=0))
    assert choice.best.point.setting == AR
    assert math.isinf(choice.results[1].seconds_per_row)


def test_ar_alone_is_a_choice() -> None:
    assert verdict(chosen(result(100))).startswith("Nothing but AR was measured: 100 tokens/s")


def test_the_cost_of_the_whole_job() -> None:
    """A million rows of 100 tokens at 1,000 tokens/s take 10^5 s on one replica, and a replica has two GPUs."""
    cost = cost_of(result(1000), GPU_JOB)
    assert cost.replica_hours == pytest.approx(1e5 / 3600)
    assert cost.hours == pytest.approx(1e5 / 3600 / 4)
    assert cost.gpu_hours == pytest.approx(2e5 / 3600)
    assert cost.money == pytest.approx(2.5 * 2e5 / 3600)
    assert cost.most == 1


def test_on_cpus_the_price_is_that_of_a_replica() -> None:
    cost = cost_of(result(1000), Workload(1_000_000, None, 0, 0.1, "EUR"))
    assert cost.gpu_hours is None
    assert cost.hours == cost.replica_hours
    assert cost.money == pytest.approx(0.1 * 1e5 / 3600)
    assert cost_of(result(1000), Workload(1_000_000, None, 0, None, "EUR")).money is None


def test_rows_that_were_cut_make_the_cost_a_lower_bound() -> None:
    """Half of the rows were cut at 100 tokens, and the job allows 300 more."""
    workload = Workload(1000, 1, 0, None, "USD", extra_tokens=300)
    assert cost_of(result(1000, cut=0.5), workload).most == pytest.approx(2.5)


def test_a_sample_too_small_for_the_limit_is_said() -> None:
    unsure = [1.0] * 62 + [0.0] * 2
    said = list(notes(chosen(result(100), result(240, threshold=0.8, sample=unsure))))
    assert said[0].startswith("64 rows cannot tell whether the agreement of the chosen point, 96.9%")
    assert "is above 95%" in said[0]
    sure = chosen(result(100), result(240, 0.999, 0.8))
    assert not list(notes(sure))


def test_a_sample_too_small_to_tell_two_points_apart_is_said() -> None:
    rng = random.Random(1)
    one = [rng.choice((0.90, 1.0)) for _ in range(64)]
    two = [rng.choice((0.89, 1.0)) for _ in range(64)]
    limit = (sum(one) + sum(two)) / 128
    good, bad = result(200, threshold=0.9, sample=one), result(300, threshold=0.8, sample=two)
    assert sum(one) > sum(two)
    said = list(notes(chosen(result(100), good, bad, min_agreement=limit)))
    assert any("too small to tell the two apart" in note and "1.50 times as fast" in note for note in said)


def test_a_speed_that_is_hardly_known_is_said() -> None:
    said = list(notes(chosen(result(100), result(240, 0.999, 0.8, error=0.1))))
    assert said == [
        "The speed of the chosen point is known to ± 20% only: its rows differ much, or something else ran on the "
        "machine."
    ]
