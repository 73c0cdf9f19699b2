"""Tests of the SVG of charts: places on linear and logarithmic scales, ticks, and labels that cover nothing."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.pages.chart import LARGE, MARKS, Chart, Scale

Shares = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30)


def test_a_scale_places_values_and_nothing_lies_outside_it() -> None:
    linear, log = Scale(10, 20), Scale(1, 100, log=True)
    assert [linear.share(value) for value in (0, 10, 15, 20, 99)] == [0, 0, 0.5, 1, 1]
    assert [log.share(value) for value in (0, 1, 10, 100)] == pytest.approx([0, 0, 0.5, 1])
    assert Scale(3, 3).share(3) == 0


def test_ticks_of_a_logarithmic_scale_are_round_and_not_too_many() -> None:
    assert Scale(76, 1500, log=True).ticks(5) == [100, 200, 500, 1000]
    assert Scale(0.5, 4e6, log=True).ticks(5) == [1, 10, 100, 1000, 1e4, 1e5, 1e6]
    assert Scale(10, 1000, log=True).ticks(5) == [10, 20, 50, 100, 200, 500, 1000]
    assert Scale(6, 9, log=True).ticks(5) == [6, 7, 8, 9]


@given(Shares)
def test_labels_are_inside_the_axes_and_cover_neither_marks_nor_each_other(places: list[tuple[float, float]]) -> None:
    chart = Chart(LARGE, Scale(0, 1), Scale(0, 1), "a test")
    for x, y in places:
        chart.mark(x, y, MARKS[0], "fill", "")
    for x, y in places:
        chart.label(x, y, "0.95")
    labels = [(float(x), float(y)) for x, y in re.findall(r'<text class="label" x="(.*?)" y="(.*?)"', chart.svg())]
    marks = [(chart.x(x), chart.y(y)) for x, y in places]
    for index, (x, y) in enumerate(labels):  # a text of four letters is at most 34 wide, and its base line is at y
        assert 52 + 17 <= x + 0.1 <= 560 - 17 + 0.2
        assert all(abs(x - a) > 33.8 or abs(y - b) > 12.8 for a, b in labels[:index])
        assert all(abs(x - a) > 20.8 or abs(y - 3.5 - b) > 10.3 for a, b in marks)


def test_a_label_that_must_be_there_is_and_texts_are_escaped() -> None:
    chart = Chart(LARGE, Scale(0, 1), Scale(0, 1), '<"about">')
    for x in range(100):
        for y in range(100):
            chart.mark(x / 100, y / 100, MARKS[0], "fill", "<title>")
    chart.label(0.5, 0.5, "left out")
    chart.label(0.5, 0.5, "<chosen>", must=True)
    assert "left out" not in chart.svg()
    assert ">&lt;chosen&gt;</text>" in chart.svg()
    assert 'aria-label="&lt;&quot;about&quot;&gt;"' in chart.svg()
    assert "<title>&lt;title&gt;</title>" in chart.svg()
