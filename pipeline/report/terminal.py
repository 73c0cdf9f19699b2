"""Formats the report as lines of text, for a terminal or a log."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from pipeline.core.text import number, one_line
from pipeline.pages.page import shown
from pipeline.report import summary
from pipeline.report.measures import Histogram, histogram, histogram_of_counts
from pipeline.report.rows import MEASURES, Sample
from pipeline.report.summary import LABELS, Report
from pipeline.report.timeline import Array

BARS = " ▁▂▃▄▅▆▇█"
"""Characters of a sparkline, from nothing to the full height."""
REPLICAS, UNITS, KINDS = 8, 5, 5
"""Maximum number of replicas, of the slowest units, and of kinds of errors that are shown."""


def lines(report: Report) -> Iterator[str]:
    """Yield the lines of the report, a shorter form of report.html.

    Charts become sparklines. At most REPLICAS replicas, UNITS units and KINDS kinds of errors are listed. The spread
    over the replicas, the shares of a row's time, the notes on the throughput chart and the settings are left out.
    """
    facts, time = report.facts, report.timeline
    yield f"{shown(facts.name, summary.NAME_CHARS)}: {summary.verdict(facts)}"
    yield from (f"- {_one_line(note)}" for note in summary.notes(report))
    yield from _aligned([(value, label) for label, value in summary.tiles(report)], left=())
    yield from _aligned([(text, name) for name, _, text in summary.reasons(facts)], left=())
    if time.seconds > 0:
        yield ""
        yield f"tokens/s, {number(float(time.rates.max()))} at most, over {summary.took(time.seconds)} at work"
        yield f"  {sparkline(time.rates)}"
        yield ""
        slow = sorted(time.places, key=lambda place: (place.tokens_per_s, place.name))
        yield from _aligned([summary.PLACE_HEADS, *map(summary.place_cells, slow[:REPLICAS])])
        if len(slow) > REPLICAS:
            yield f"  the {REPLICAS} slowest of {len(slow):,} replicas"
    if report.sample.rows:
        yield ""
        yield summary.about_sample(facts, report.sample)
        yield from _aligned([(*summary.MEASURE_HEADS, ""), *_measures(report.sample)], left=(0, -1))
    yield ""
    yield summary.about_errors(facts, report.errors)
    kinds = report.errors.kinds[:KINDS]
    yield from _aligned([(f"{kind.rows:,}", kind.example) for kind in kinds], left=(1,))
    if facts.units:
        yield ""
        yield f"Slowest units. {summary.about_slowest(facts)}"
        yield from _aligned([summary.UNIT_HEADS, *summary.slowest(facts)[:UNITS]])
    if told := summary.last_run(facts):
        yield ""
        yield "The last run, as its driver saw it"
        yield from _aligned(told, left=(0, 1))


def sparkline(values: Array) -> str:
    """Return one of BARS for each value, as high as its share of the largest value. Any value above 0 is visible."""
    most = float(values.max()) if len(values) else 0.0
    if most <= 0:
        return " " * len(values)
    return "".join(BARS[int(np.ceil(value / most * (len(BARS) - 1) - 1e-9))] for value in values)


def _measures(sample: Sample) -> Iterator[list[str]]:
    """Yield for each measure the cells under MEASURE_HEADS, and its histogram as a sparkline."""
    found: dict[str, Histogram | None] = {LABELS[name]: histogram(sample.values[name]) for name in MEASURES}
    found[LABELS["steps_per_block"]] = histogram_of_counts(sample.steps)
    for label, numbers in summary.summaries(sample):
        one = found[label]
        yield [*summary.measure_cells(label, numbers), "" if one is None else sparkline(one.counts.astype(float))]


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> Iterable[str]:
    """Yield the rows of a table as indented lines with aligned columns. Spaces at the end of a line are removed.

    `left`: indexes of the columns that are aligned to the left, -1 being the last; if it is empty, the last column is.
    """
    if not rows:
        return
    cells = [[_one_line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    begin = {index % len(widths) for index in left} or {len(widths) - 1}
    for row in cells:
        placed = (
            cell.ljust(width) if index in begin else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield f"  {'  '.join(placed)}".rstrip()


def _one_line(text: str) -> str:
    return shown(one_line(text), summary.TEXT_CHARS)
