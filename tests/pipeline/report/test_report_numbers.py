"""Tests of the numbers of a report: throughput over time, distributions, and how numbers are written."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.text import TimeScale, number, share
from pipeline.core.types import Totals
from pipeline.pages.chart import ticks
from pipeline.report.charts import histogram_chart
from pipeline.report.facts import Unit
from pipeline.report.measures import histogram, histogram_of_counts, summary, summary_of_counts
from pipeline.report.terminal import sparkline
from pipeline.report.timeline import timeline_of
from pipeline.storage.storage import FileInfo


def unit(place: str, began: float, ended: float | None, tokens: int = 100, name: str = "u") -> Unit:
    totals = Totals(10, 10, completion_tokens=tokens)
    seconds = 5.0 if ended is None else ended - began
    return Unit(FileInfo("p", "/p", 1, ""), name, "a", 0, 1, totals, place, 1, seconds, ended)


def test_throughput_is_spread_over_each_units_time() -> None:
    time = timeline_of([unit("r0", 0, 60, 600), unit("r1", 30, 60, 600), unit("r0.2", 60, 120, 60)])
    assert time.seconds == pytest.approx(120)
    assert time.rates[:15] == pytest.approx(np.full(15, 10.0))
    assert time.rates[15:30] == pytest.approx(np.full(15, 30.0))
    assert time.rates[30:] == pytest.approx(np.full(30, 1.0))
    assert [(place.name, place.units, place.processes, place.work_s) for place in time.places] == [
        ("r0", 2, 2, 120.0),
        ("r1", 1, 1, 30.0),
    ]
    assert time.working.tolist() == [1.0] * 15 + [2.0] * 15 + [1.0] * 30


def test_times_at_which_the_job_did_not_run_are_cut_out() -> None:
    week = 7 * 86400.0
    time = timeline_of([unit("r0", 0, 100), unit("r0", 130, 200), unit("r0", week, week + 100), unit("r0", 0, None)])
    assert time.seconds == pytest.approx(300)
    assert len(time.gaps) == 1
    assert time.gaps[0] == pytest.approx((200, week - 200))
    assert time.undated == 1


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["r0", "r1", "r2.3"]), st.floats(0, 1e6), st.floats(0, 1e4), st.integers(0, 10**6)),
        min_size=1,
        max_size=12,
    )
)
def test_no_token_is_lost_on_the_timeline(spans: list[tuple[str, float, float, int]]) -> None:
    time = timeline_of([unit(place, began, began + took, tokens) for place, began, took, tokens in spans])
    made = sum(tokens for *_, tokens in spans)
    assert time.rates.sum() * time.seconds / len(time.rates) == pytest.approx(made, rel=1e-6, abs=1e-6)
    assert (time.rates >= -1e-6).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), max_size=60))
def test_a_histogram_counts_every_value_once(values: list[float]) -> None:
    array = np.array(values, np.float32)
    found = histogram(array)
    if found is None:
        assert not values
        return
    assert found.counts.sum() == len(values)
    assert (np.diff(found.edges) > 0).all()
    assert found.edges[0] <= array.min()


def test_whole_numbers_have_bins_of_their_own_and_an_outlier_does_not_flatten_the_rest() -> None:
    found = histogram(np.array([1, 2, 2, 3], np.float32))
    assert found is not None
    assert (found.counts.tolist(), found.edges.tolist(), found.cut) == ([1, 2, 1], [0.5, 1.5, 2.5, 3.5], False)
    found = histogram(np.array([*np.linspace(0, 1, 999), 1e6], np.float32))
    assert found is not None
    assert found.cut
    assert found.edges[-1] < 2
    assert found.counts.sum() == 1000


def test_bars_of_whole_numbers_say_so_and_others_do_not_even_if_the_smallest_ends_in_a_half() -> None:
    def titles(values: list[float]) -> list[str]:
        found = histogram(np.array(values, np.float32))
        assert found is not None
        return re.findall("<title>(.*?):", histogram_chart(found, "x"))

    assert titles([1, 2, 2, 3]) == ["1", "2", "3"]
    assert titles([*range(64)])[:2] == ["0 to 1", "2 to 3"]
    assert titles([2.5, 3.1, 5.7])[0] == "2.5 to 2.6"


def test_counted_numbers_say_what_the_numbers_themselves_would() -> None:
    values = np.random.default_rng(0).integers(1, 17, 1001)
    counts = np.bincount(values, minlength=65)
    assert summary_of_counts(counts) == summary(values.astype(np.float32))
    found = histogram_of_counts(counts)
    assert found is not None
    assert (found.counts.sum(), found.median) == (1001, np.median(values))
    assert summary_of_counts(np.zeros(65, np.int64)) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12.345, "12.3"),
        (9999, "9,999"),
        (21985, "22k"),
        (999_499, "999k"),
        (999_500, "1M"),
        (1.5e9, "1.5G"),
        (0.00012, "1.2e-04"),
        (None, "-"),
    ],
)
def test_numbers_are_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_shares_ticks_and_time_are_round() -> None:
    assert [share(0, 5), share(5, 5), share(1, 3), share(1, 10**6), share(999_999, 10**6), share(1, 0)] == [
        *("0%", "100%", "33.33%", "<0.01%", ">99.99%", "-")
    ]
    assert ticks(0, 97, 5) == [0, 20, 40, 60, 80]
    assert ticks(1, 1, 5) == [1]
    assert [TimeScale(seconds).unit for seconds in (5, 500, 9_000, 10**6)] == ["seconds", "minutes", "hours", "days"]
    assert sparkline(np.array([0.0, 0.01, 1.0])) == " ▁█"
