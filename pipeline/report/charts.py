"""Draws the charts of report.html as SVG: histograms of measures, and throughput over time."""

from collections.abc import Sequence

import numpy as np

from pipeline.core.text import TimeScale, number
from pipeline.pages.chart import LARGE, SMALL, TOP, Chart, Scale
from pipeline.report.measures import Histogram
from pipeline.report.timeline import Array, Timeline


def histogram_chart(found: Histogram, label: str) -> str:
    """Return a chart with one bar for each bin, as high as the bin's share of all values, and a line at the median.

    `label`: the name of the measure, for the x axis.
    """
    total = int(found.counts.sum())
    shares = found.counts / total
    x = Scale(float(found.edges[0]), float(found.edges[-1]))
    chart = Chart(SMALL, x, Scale(0, 100 * float(shares.max()) * 1.12), f"distribution of {label}")
    chart.axes(label, "% of all", whole=found.whole)
    for index, share in enumerate(shares):
        start, end = float(found.edges[index]), float(found.edges[index + 1])
        first, last = (start + 0.5, end - 0.5) if found.whole else (start, end)
        shown = number(first) if first == last else f"{number(first)} to {number(last)}"
        if found.cut and index == len(shares) - 1:
            shown = f"{number(first)} and more"
        chart.bar(start, end, 100 * float(share), f"{shown}: {share:.1%}")
    chart.vertical(found.median, "rule")
    where = chart.x(found.median)
    right = where > chart.width * 0.6
    chart.text(where + (-5 if right else 5), TOP + 9, f"median {number(found.median)}", "end" if right else "start")
    return chart.svg()


def throughput_chart(timeline: Timeline, legend: Sequence[tuple[str, Array]]) -> str:
    """Return a chart of completion tokens/s over time, in which the series are stacked on top of each other.

    `legend`: (name, tokens/s in each bin) of each series, the lowest first.
    """
    areas, below = [], np.zeros(len(timeline.rates))
    for index, (name, rates) in enumerate(legend):
        areas.append((below, below + rates, f"s{index} fill", name))
        below = below + rates
    return _over_time(timeline, "completion tokens/s", areas)


def spread_chart(timeline: Timeline) -> str:
    """Return a chart that shows how much the places differ in their completion tokens/s, over time.

    For each bin it shows the median, and a band from the 10th to the 90th percentile, of the places that generated
    tokens in that bin; 0 if none did.
    """
    rates = np.array([place.rates for place in timeline.places])  # (places, bins)
    low, middle, high = (
        np.array([np.quantile(column[column > 0], share) if (column > 0).any() else 0.0 for column in rates.T])
        for share in (0.1, 0.5, 0.9)
    )
    band = (low, high, "s0 band", "10th to 90th percentile")
    return _over_time(timeline, "completion tokens/s of a replica", [band], middle)


def _over_time(
    timeline: Timeline, measure: str, areas: Sequence[tuple[Array, Array, str, str]], line: Array | None = None
) -> str:
    """Return a chart of a measure over the time at work, with filled areas and, if given, one line.

    `areas`: (low, high, CSS classes, title) of each area, at least one. All arrays have one value for each bin, shape
    (bins,). A dashed line stands at each idle time that was cut out.
    """
    scale = TimeScale(timeline.seconds)
    end, most = scale.of(timeline.seconds), max(float(high.max()) for _, high, *_ in areas)
    chart = Chart(LARGE, Scale(0, end), Scale(0, most * 1.1), f"{measure} over time")
    chart.axes(f"{scale.unit} at work", measure)
    x = np.repeat(np.linspace(0, end, len(timeline.rates) + 1), 2)[1:-1]
    for low, high, css, title in areas:
        chart.area(x, np.repeat(low, 2), np.repeat(high, 2), css, title)
    if line is not None:
        chart.path(zip(x, np.repeat(line, 2), strict=True), "s0 line")
    for where, _ in timeline.gaps:
        chart.vertical(scale.of(where), "rule dashed")
    return chart.svg()
