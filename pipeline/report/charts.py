"""Draws the report's charts as SVG for an HTML page.

Text in a chart stays text, and the page's CSS sets the colours. matplotlib is not used, because a report is made at the
end of every job and must be quick.
"""

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from pipeline.core.text import TimeScale, number
from pipeline.report.measures import Histogram
from pipeline.report.timeline import Array, Timeline

LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 36
SMALL, LARGE = (360, 190), (560, 270)
SERIES = 6
"""Number of different colours that the page has for series."""


class Chart:
    """A chart: the range of each axis and the SVG elements drawn so far. The y axis begins at 0."""

    def __init__(self, size: tuple[int, int], x: tuple[float, float], y_most: float, about: str) -> None:
        """Start an empty chart. `about`: its description for readers who cannot see it."""
        self.width, self.height = size
        self._x0, self._x1 = x if x[1] > x[0] else (x[0], x[0] + 1)
        self._y1 = y_most if y_most > 0 else 1.0
        self._about = about
        self._made: list[str] = []

    def x(self, value: float) -> float:
        """Return the horizontal position of an x value, in units of the SVG."""
        return LEFT + (value - self._x0) / (self._x1 - self._x0) * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return the vertical position of a y value, in units of the SVG."""
        return self.height - BOTTOM - value / self._y1 * (self.height - TOP - BOTTOM)

    def text(self, x: float, y: float, text: str, anchor: str = "middle") -> None:
        """Add a text, which is escaped, at a position in units of the SVG."""
        self._made.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>')

    def line(self, x0: float, y0: float, x1: float, y1: float, css: str) -> None:
        """Add a straight line between two positions in units of the SVG."""
        self._made.append(f'<line class="{css}" x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"/>')

    def bar(self, x0: float, x1: float, value: float, title: str) -> None:
        """Add a bar from 0 up to `value`, between two x values. A pointer that rests on the bar shows the title."""
        left, width, top = self.x(x0), max(0.5, self.x(x1) - self.x(x0) - 0.7), self.y(value)
        tall = self.height - BOTTOM - top
        self._made.append(
            f'<rect class="f0" x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{tall:.1f}">'
            f"<title>{escape(title)}</title></rect>"
        )

    def area(self, x: Array, low: Array, high: Array, css: str, title: str) -> None:
        """Add the filled area between two lines through the given values."""
        there = [f"{self.x(at):.1f},{self.y(value):.1f}" for at, value in zip(x, high, strict=True)]
        back = [f"{self.x(at):.1f},{self.y(value):.1f}" for at, value in zip(x[::-1], low[::-1], strict=True)]
        self._made.append(
            f'<polygon class="{css}" points="{" ".join(there + back)}"><title>{escape(title)}</title></polygon>'
        )

    def path(self, x: Array, y: Array, css: str) -> None:
        """Add a line through points that are given as x and y values."""
        points = " ".join(f"{self.x(at):.1f},{self.y(value):.1f}" for at, value in zip(x, y, strict=True))
        self._made.append(f'<polyline class="{css}" points="{points}"/>')

    def axes(self, x_label: str, *, whole: bool = False) -> None:
        """Add ticks and grid lines for y, and ticks and a label for x. `whole`: x shows only whole numbers."""
        for tick in ticks(0.0, self._y1, 4):
            self.line(LEFT, self.y(tick), self.width - RIGHT, self.y(tick), "grid")
            self.text(LEFT - 5, self.y(tick) + 4, number(tick), "end")
        for tick in ticks(self._x0, self._x1, 5):
            if not whole or tick == round(tick):
                self.text(self.x(tick), self.height - BOTTOM + 15, number(tick))
        self.text((LEFT + self.width - RIGHT) / 2, self.height - 4, x_label)

    def svg(self) -> str:
        """Return the chart as SVG text."""
        return (
            f'<svg viewBox="0 0 {self.width} {self.height}" role="img" aria-label="{escape(self._about)}">'
            f"{''.join(self._made)}</svg>"
        )


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return roughly `about` round numbers between `low` and `high`."""
    raw = (high - low) / about
    if not (raw > 0 and math.isfinite(raw)):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def histogram_chart(found: Histogram, label: str) -> str:
    """Return a chart with one bar for each bin, as high as the bin's share of the values, and a line at the median."""
    total = int(found.counts.sum())
    shares = found.counts / total
    low, high = float(found.edges[0]), float(found.edges[-1])
    chart = Chart(SMALL, (low, high), 100 * float(shares.max()) * 1.12, f"distribution of {label}")
    chart.axes(f"{label}; % of all", whole=found.whole)
    for index, share in enumerate(shares):
        start, end = float(found.edges[index]), float(found.edges[index + 1])
        first, last = (start + 0.5, end - 0.5) if found.whole else (start, end)
        shown = number(first) if first == last else f"{number(first)} to {number(last)}"
        if found.cut and index == len(shares) - 1:
            shown = f"{number(first)} and more"
        chart.bar(start, end, 100 * float(share), f"{shown}: {share:.1%}")
    where = chart.x(min(max(found.median, low), high))
    chart.line(where, TOP, where, chart.height - BOTTOM, "mid")
    right = where > chart.width * 0.6
    chart.text(where + (-5 if right else 5), TOP + 9, f"median {number(found.median)}", "end" if right else "start")
    return chart.svg()


def throughput_chart(timeline: Timeline, legend: Sequence[tuple[str, Array]]) -> str:
    """Return a chart of completion tokens/s over time, with the series of `legend` stacked on top of each other."""
    scale = TimeScale(timeline.seconds)
    chart = Chart(LARGE, (0.0, scale.of(timeline.seconds)), float(timeline.rates.max()) * 1.1, "tokens/s over time")
    chart.axes(f"{scale.unit} at work")
    edges = np.linspace(0.0, scale.of(timeline.seconds), len(timeline.rates) + 1)
    x, below = np.repeat(edges, 2)[1:-1], np.zeros(2 * len(timeline.rates))
    for index, (name, rates) in enumerate(legend):
        above = below + np.repeat(rates, 2)
        chart.area(x, below, above, f"f{index}", name)
        below = above
    _draw_gaps(chart, timeline, scale)
    return chart.svg()


def spread_chart(timeline: Timeline) -> str:
    """Return a chart of the tokens/s of one place over time, taken over the places that are at work.

    It shows the median and a band from the 10th to the 90th percentile.
    """
    scale = TimeScale(timeline.seconds)
    rates = np.array([place.rates for place in timeline.places])  # (places, bins)
    low, middle, high = (
        np.array([np.quantile(column[column > 0], share) if (column > 0).any() else 0.0 for column in rates.T])
        for share in (0.1, 0.5, 0.9)
    )
    chart = Chart(LARGE, (0.0, scale.of(timeline.seconds)), float(high.max()) * 1.1, "tokens/s a replica over time")
    chart.axes(f"{scale.unit} at work")
    edges = np.linspace(0.0, scale.of(timeline.seconds), len(middle) + 1)
    x = np.repeat(edges, 2)[1:-1]
    chart.area(x, np.repeat(low, 2), np.repeat(high, 2), "band", "10th to 90th percentile")
    chart.path(x, np.repeat(middle, 2), "line0")
    _draw_gaps(chart, timeline, scale)
    return chart.svg()


def _draw_gaps(chart: Chart, timeline: Timeline, scale: TimeScale) -> None:
    for where, _ in timeline.gaps:
        x = chart.x(scale.of(where))
        chart.line(x, TOP, x, chart.height - BOTTOM, "gap")
