"""report.html: what stands on the page."""

from typing import Any

from pipeline.manifest import now
from pipeline.page import shown
from pipeline.report import page, summary, svg
from pipeline.report.measures import histogram, histogram_of_counts
from pipeline.report.rows import Errors, Sample
from pipeline.report.summary import LABELS, NAME_CHARS, TEXT_CHARS, Report
from pipeline.report.timeline import Array, Timeline
from pipeline.report.units import when

REPLICAS_SHOWN = 16
_CHARTS = {
    "tokens_per_forward": "Of a row. A forward commits at least one token of the block.",
    "steps_per_block": "Denoiser forwards until a block was done.",
    "latency_s": "From submission to the replica to the row's end, waiting included.",
    "prompt_tokens": "",
    "completion_tokens": "",
    "batch_rows": "Rows computed together: the mean over a row's forwards.",
    "tokens_per_s": "Completion tokens over latency.",
    "mean_confidence": "Of the committed tokens, at the time they were.",
    "forced_commits": "Tokens of a row that were committed at or below the confidence threshold.",
}


def make_html(report: Report) -> bytes:
    """The page."""
    facts, time = report.facts, report.timeline
    name = shown(facts.name, NAME_CHARS)
    legend = _legend(time)
    dated = time.seconds > 0
    context = {
        "name": name,
        "complete": facts.complete,
        "verdict": summary.verdict(facts),
        "tiles": summary.tiles(report),
        "notes": summary.notes(report),
        "throughput": svg.throughput_chart(time, legend) if dated else None,
        "legend": [label for label, _ in legend],
        "spread": svg.spread_chart(time) if len(time.places) > svg.SERIES else None,
        "about_time": summary.about_time(time),
        "replica_heads": summary.PLACE_HEADS,
        **_replicas(time),
        "reasons": summary.reasons(facts),
        "about_sample": summary.about_sample(facts, report.sample),
        "charts": _charts(report.sample),
        "spent": summary.time_spent(report.sample),
        "measure_heads": summary.MEASURE_HEADS,
        "measures": [summary.measure_cells(*one) for one in summary.summaries(report.sample)],
        "about_errors": summary.about_errors(facts, report.errors),
        "errors": _errors(report.errors),
        "slowest_heads": summary.UNIT_HEADS,
        "about_slowest": summary.about_slowest(facts),
        "slowest": summary.slowest(facts),
        "last_run": summary.last_run(facts),
        "settings": [*summary.settings(report), ("report written", when(now()))],
    }
    return page.render(context, f"Report of {name}")


def _legend(time: Timeline) -> list[tuple[str, Array]]:
    """(name, tokens/s by bin) of what is drawn: each place, or all as one where the page has no colours for them."""
    if len(time.places) > svg.SERIES:
        return [(f"all {len(time.places):,} replicas", time.rates)]
    return [(shown(place.name, NAME_CHARS), place.rates) for place in time.places]


def _replicas(time: Timeline) -> dict[str, Any]:
    """The slowest replicas; all of them where they are few."""
    ordered = sorted(time.places, key=lambda place: (place.tokens_per_s, place.name))
    more = len(ordered) - REPLICAS_SHOWN
    said = f"The {REPLICAS_SHOWN} slowest; {more:,} others are faster." if more > 0 else ""
    return {"replicas": [summary.place_cells(place) for place in ordered[:REPLICAS_SHOWN]], "more_replicas": said}


def _charts(sample: Sample) -> list[tuple[str, str]]:
    """(SVG, caption) of each measure that has values."""
    found: list[tuple[str, str]] = []
    for name, caption in _CHARTS.items():
        counted = name == "steps_per_block"
        one = histogram_of_counts(sample.steps) if counted else histogram(sample.values[name])
        if one is not None:
            rest = " The last bar is of all that is above it, too." if one.cut else ""
            found.append((svg.histogram_chart(one, LABELS[name]), (caption + rest).strip()))
    return found


def _errors(errors: Errors) -> list[tuple[str, str, str]]:
    return [(f"{kind.rows:,}", shown(kind.kind, TEXT_CHARS), shown(kind.example, TEXT_CHARS)) for kind in errors.kinds]
