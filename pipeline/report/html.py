"""Builds the page report.html of a job: its template, its charts, and the values for both."""

from typing import Any

from pipeline.core.text import when
from pipeline.output.records import now
from pipeline.pages import page
from pipeline.pages.chart import SERIES
from pipeline.pages.page import shown
from pipeline.report import charts, summary
from pipeline.report.measures import histogram, histogram_of_counts
from pipeline.report.rows import Errors, Sample
from pipeline.report.summary import LABELS, NAME_CHARS, TEXT_CHARS, Report
from pipeline.report.timeline import Array, Timeline

_STYLE = """
.thirds { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 4px 20px; }
.thirds figure { margin: 8px 0; }
.stack { display: flex; height: 22px; border-radius: 4px; overflow: hidden; max-width: 620px; margin: 6px 0; }
.stack span { background: var(--ink); }
"""

_BODY = """{% macro stack(parts) %}<div class="stack">
{%- for _, share, _ in parts %}<span class="s{{ loop.index0 }}" style="flex-grow: {{ share }}"></span>{% endfor %}</div>
<p class="soft">{% for label, _, shown in parts %}{{ key("s" ~ loop.index0 ~ " fill", label ~ " " ~ shown) }}
{%- endfor %}</p>{% endmacro %}
{% if throughput %}<h2>Throughput</h2>
<div class="pair">
{{ figure(throughput, "", legend) }}
{% if spread %}{{ figure(spread, "Median of the replicas at work, with a band from the 10th to the 90th percentile.") }}
{% endif %}
</div>
{% for line in about_time %}<p class="soft">{{ line }}</p>
{% endfor %}
{{ table(replica_heads, replicas) }}
{% if more_replicas %}<p class="soft">{{ more_replicas }}</p>{% endif %}
{% endif %}
{% if reasons %}<h2>How rows ended</h2>
{{ stack(reasons) }}{% endif %}
{% if charts %}<h2>Distributions</h2>
<p class="soft">{{ about_sample }}</p>
<div class="thirds">
{% for chart, caption in charts %}{{ figure(chart, caption) }}
{% endfor %}</div>
{% if spent %}<h3>Where a row's time went</h3>
{{ stack(spent) }}
<p class="soft">Shares of the sum of all latencies, which last from submission to end. A row counts the whole time of
each forward that it took part in, although other rows shared that forward.</p>{% endif %}
{{ table(measure_heads, measures) }}
{% endif %}
<h2>Errors</h2>
<p>{{ about_errors }}</p>
{% if errors %}{{ table(["rows", "error", "example"], errors, (1, 2)) }}{% endif %}
{% if slowest %}<h2>Slowest units</h2>
<p class="soft">{{ about_slowest }}</p>
{{ table(slowest_heads, slowest, (8,)) }}{% endif %}
{% if last_run %}<h2>The last run</h2>
<p class="soft">These figures are from the last driver, about the replicas that it had at its end.</p>
{{ table(["figure", "value"], last_run, (1,), "settings") }}{% endif %}
<h2>The job</h2>
{{ table(["setting", "value"], settings, (1,), "settings") }}
"""
REPLICAS_SHOWN = 16
"""Maximum number of replicas in the table of replicas."""
_CHARTS = {
    "tokens_per_forward": "Completion tokens of a row per denoiser forward. Each forward commits at least one token.",
    "steps_per_block": "Number of denoiser forwards until a block was complete.",
    "latency_s": "Seconds from the submission of a row in its replica to its end, waiting included.",
    "prompt_tokens": "",
    "completion_tokens": "",
    "batch_rows": "Number of rows computed together: the mean over the forwards of a row after its prefill.",
    "tokens_per_s": "Completion tokens divided by latency.",
    "mean_confidence": "Mean probability of the tokens of a row when they were committed.",
    "forced_commits": "Number of tokens of a row that were committed at or below the confidence threshold.",
}
"""The measures that have a chart, with their captions, in the order on the page."""


def make_html(report: Report) -> bytes:
    """Return report.html as UTF-8 HTML. A section without values, such as throughput without units, is left out."""
    facts, time = report.facts, report.timeline
    name = shown(facts.name, NAME_CHARS)
    legend = _legend(time)
    dated = time.seconds > 0
    context = {
        "heading": name,
        "verdict": summary.verdict(facts),
        "tiles": summary.tiles(report),
        "notes": summary.notes(report),
        "throughput": charts.throughput_chart(time, legend) if dated else None,
        "legend": [(f"s{index} fill", label) for index, (label, _) in enumerate(legend)],
        "spread": charts.spread_chart(time) if len(time.places) > SERIES else None,
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
    return page.render(_BODY, context, title=f"Report of {name}", style=_STYLE, complete=facts.complete)


def _legend(time: Timeline) -> list[tuple[str, Array]]:
    """Return (name, tokens/s in each bin) of each replica, or of all together if they are more than the colours."""
    if len(time.places) > SERIES:
        return [(f"all {len(time.places):,} replicas", time.rates)]
    return [(shown(place.name, NAME_CHARS), place.rates) for place in time.places]


def _replicas(time: Timeline) -> dict[str, Any]:
    """Return the template values for the table of replicas: the REPLICAS_SHOWN slowest, the slowest first."""
    ordered = sorted(time.places, key=lambda place: (place.tokens_per_s, place.name))
    more = len(ordered) - REPLICAS_SHOWN
    said = f"Shown are the {REPLICAS_SHOWN} slowest; {more:,} more were faster." if more > 0 else ""
    return {"replicas": [summary.place_cells(place) for place in ordered[:REPLICAS_SHOWN]], "more_replicas": said}


def _charts(sample: Sample) -> list[tuple[str, str]]:
    """Return (SVG, caption) of a histogram for each measure of _CHARTS that has values."""
    found: list[tuple[str, str]] = []
    for name, caption in _CHARTS.items():
        counted = name == "steps_per_block"
        one = histogram_of_counts(sample.steps) if counted else histogram(sample.values[name])
        if one is not None:
            rest = " The last bar also counts all larger values." if one.cut else ""
            found.append((charts.histogram_chart(one, LABELS[name]), (caption + rest).strip()))
    return found


def _errors(errors: Errors) -> list[tuple[str, str, str]]:
    return [(f"{kind.rows:,}", shown(kind.kind, TEXT_CHARS), shown(kind.example, TEXT_CHARS)) for kind in errors.kinds]
