"""Reads what a report shows, and puts it into the words and numbers that report.html and the terminal share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.text import counted, duration, number, one_line, share, when
from pipeline.pages.page import shown
from pipeline.report.facts import Facts, Unit, read_facts
from pipeline.report.measures import QUANTILES, Summary, summary, summary_of_counts
from pipeline.report.rows import MEASURES, Errors, Sample, read_errors, read_sample
from pipeline.report.timeline import Place, Timeline, timeline_of
from pipeline.storage.storage import Storage
from pipeline.storage.urls import safe_url

SLOWEST = 10
"""Maximum number of units in the table of the slowest units."""
LABELS = {
    "tokens_per_forward": "tokens per denoiser forward",
    "steps_per_block": "steps per block",
    "prompt_tokens": "prompt tokens",
    "completion_tokens": "completion tokens",
    "latency_s": "latency (s)",
    "tokens_per_s": "tokens/s of a row",
    "batch_rows": "batch rows",
    "mean_confidence": "mean confidence",
    "forced_commits": "forced commits",
    "repetition": "repetition",
    "queue_s": "queue (s)",
    "prefill_s": "prefill (s)",
    "denoise_s": "denoise (s)",
    "commit_s": "commit (s)",
}
"""The names of the measures that users see, by column of the output."""
UNIT_HEADS = ("unit", "rows", "errors", "tokens", "took", "tokens/s", "replica", "attempt", "from")
"""Heads of the table of the slowest units."""
TEXT_CHARS, NAME_CHARS = 400, 120
"""Maximum number of characters that are shown of a text, such as an error or a setting, and of a name."""


@dataclass(frozen=True, slots=True)
class Report:
    """Everything about a job that is read from its output for a report, or computed from what was read."""

    output: str
    """Path or URL of the output folder, without credentials."""
    facts: Facts
    timeline: Timeline
    sample: Sample
    errors: Errors


def read_report(output_path: str) -> Report:
    """Return the report of the job with this output.

    Raises OutputError if the folder is not a job's output, StorageError if the storage fails.
    """
    facts, storage = read_facts(output_path), Storage(output_path)
    sample, errors = read_sample(storage, facts.units), read_errors(storage, facts.units)
    return Report(safe_url(output_path).rstrip("/"), facts, timeline_of(facts.units), sample, errors)


def verdict(facts: Facts) -> str:
    """Return one or two sentences that say whether the job is complete, and how many of its rows are ok or failed."""
    totals, plan = facts.totals, facts.plan
    counts = f"{totals.ok:,} ok, {counted(totals.errors, 'error')}"
    if facts.complete:
        ended = f", finished {when(facts.finished)}" if facts.finished else ""
        return f"Complete{ended}: {totals.rows:,} rows, {counts}."
    done = f"{totals.rows:,} of {plan.rows:,} rows ({share(totals.rows, plan.rows)}) are in parts: {counts}."
    return f"Not complete: {done} If the job is not running, submit it again: it continues where it stopped."


def tiles(report: Report) -> list[tuple[str, str]]:
    """Return (label, value) of each figure at the top of the report. A figure that is not known is left out."""
    facts, time = report.facts, report.timeline
    totals = facts.totals
    work = sum(place.work_s for place in time.places)
    gpus = facts.setting("workers", "gpus")
    found = [
        ("rows", f"{totals.rows:,}"),
        ("errors", _part_of(totals.errors, totals.rows)),
        ("completion tokens", number(totals.completion_tokens)),
        ("prompt tokens", number(totals.prompt_tokens)),
    ]
    if totals.denoiser_forwards:
        # not the mean over the rows: each row counts by its number of forwards, so a short row has little weight
        found.append(("tokens per denoiser forward", f"{totals.completion_tokens / totals.denoiser_forwards:.3f}"))
    if time.seconds:
        found += [
            ("tokens/s during the time at work", number(sum(place.tokens for place in time.places) / time.seconds)),
            ("time at work", duration(time.seconds)),
            ("replicas at work", f"{work / time.seconds:.1f} on average, {int(time.working.max())} at most"),
        ]
        if isinstance(gpus, int) and gpus > 0:
            found.append(("GPU-hours of replicas at work", number(gpus * work / 3600)))
        else:
            found.append(("replica-hours at work", number(work / 3600)))
    found.append(("rows that loop (degenerate)", _part_of(totals.degenerate, totals.rows)))
    return found


def _part_of(count: int, whole: int) -> str:
    return f"{count:,} ({share(count, whole)})" if count else "0"


def notes(report: Report) -> list[str]:
    """Return the warnings in the manifest, then notes about parts that were left out and about missing or equal ids."""
    facts = report.facts
    said = [f"Warning: {shown(warning, TEXT_CHARS)}" for warning in facts.warnings]
    if facts.strange_parts:
        left_out = counted(facts.strange_parts, "part")
        said.append(f"Left out: {left_out} (broken, or of another job). To see which, run twotower verify.")
    if report.sample.unreadable:
        unread = counted(report.sample.unreadable, "part")
        said.append(f"Left out of the distributions: {unread} that cannot be read. To see why, run twotower verify.")
    if facts.totals.null_ids:
        said.append(f"Rows without an id: {facts.totals.null_ids:,}.")
    if facts.totals.duplicate_ids:
        said.append(f"Rows that repeat an id of their unit: {facts.totals.duplicate_ids:,}; the manifest counts all.")
    return said


def last_run(facts: Facts) -> list[tuple[str, str]]:
    """Return (label, value) of the figures in `live.json`, which the driver of the last run wrote; empty if none.

    Most of them count the work of the replicas that were alive at the end of that run.
    """
    if (live := facts.live) is None:
        return []
    stats = [replica.stats for replica in live.replicas]
    rooms = [one.room for one in stats]
    filled, padded = sum(room.prefill_tokens for room in rooms), sum(room.padded_tokens for room in rooms)
    found = [
        ("how it ended", shown(live.ended or "it still runs, or was killed", TEXT_CHARS)),
        ("padding, as a share of the tokens in prefill forwards", share(padded - filled, padded)),
        ("rows put back into the queue because memory pages ran out", f"{sum(room.preemptions for room in rooms):,}"),
        ("rows generated again because they looped", f"{sum(one.loop_retries for one in stats):,}"),
        ("rows submitted again because a forward failed", f"{sum(one.forward_retries for one in stats):,}"),
        ("failed storage operations of replicas, usually tried again", f"{live.storage_retries:,}"),
        ("units put back into the queue", f"{live.unit_retries:,}"),
        ("replicas lost", f"{live.replicas_lost:,}"),
    ]
    return found + [("a lost replica", shown(one_line(loss), TEXT_CHARS)) for loss in live.losses]


def about_time(time: Timeline) -> list[str]:
    """Return sentences that explain the throughput chart: how tokens are spread over time, and what is left out."""
    said = [
        "A unit's tokens are spread evenly over the time of the attempt that published it, including the tokens of "
        "rows that earlier attempts finished."
    ]
    if time.gaps:
        idle = sum(length for _, length in time.gaps)
        said.append(
            "Each dashed line marks a time in which no unit was in progress. These times are cut out of the time axis: "
            f"{duration(idle)} in all."
        )
    if time.undated:
        said.append(f"Left out here: {counted(time.undated, 'unit')} of an earlier version, which saved no times.")
    return said


def about_sample(facts: Facts, sample: Sample) -> str:
    """Return sentences that say which rows the distributions are made from: all without errors, or a sample of them."""
    if sample.rows == facts.totals.ok:
        return f"From all {counted(sample.rows, 'row')} without errors."
    return (
        f"From {sample.rows:,} of the {counted(facts.totals.ok, 'row')} without errors: one row group per part, from "
        f"{sample.parts:,} of {counted(sample.of_parts, 'part')}, drawn at random."
    )


def about_errors(facts: Facts, errors: Errors) -> str:
    """Return sentences that say how many rows failed, from how many parts errors were read, and what can be done."""
    total = facts.totals.errors
    if not total:
        return "No row failed."
    said = f"{total:,} of {facts.totals.rows:,} rows failed ({share(total, facts.totals.rows)})."
    if errors.parts < errors.of_parts:
        said += f" Shown are the errors in {errors.parts:,} of the {counted(errors.of_parts, 'part')} with errors."
    return f"{said} To generate these rows again, run twotower retry-errors."


def reasons(facts: Facts) -> list[tuple[str, float, str]]:
    """Return (finish reason, its share of all rows, number and share as text), the most frequent reason first."""
    counts = sorted(facts.totals.finish_reasons.items(), key=lambda item: -item[1])
    rows = facts.totals.rows
    return [(shown(name, NAME_CHARS), count / rows, f"{count:,} ({share(count, rows)})") for name, count in counts]


def time_spent(sample: Sample) -> list[tuple[str, float, str]]:
    """Return (activity, its share of the latency of all sampled rows, share as text); empty if there is no latency."""
    sums = {name: float(sample.values[f"{name}_s"].sum(dtype=np.float64)) for name in _STAGES}
    whole = max(float(sample.values["latency_s"].sum(dtype=np.float64)), sum(sums.values()))
    if whole <= 0:
        return []
    sums["between forwards"] = whole - sum(sums.values())
    return [(name, seconds / whole, f"{seconds / whole:.1%}") for name, seconds in sums.items()]


_STAGES = ("queue", "prefill", "denoise", "commit")
"""Activities whose seconds the output has, in the columns `queue_s` and so on, in the order of a row's life."""


def summaries(sample: Sample) -> list[tuple[str, Summary]]:
    """Return (label, summary) of every measure that has values in the sample, and of the steps per block."""
    found = [(name, summary(sample.values[name])) for name in MEASURES]
    found.insert(1, ("steps_per_block", summary_of_counts(sample.steps)))
    return [(LABELS[name], one) for name, one in found if one is not None]


MEASURE_HEADS = ("measure", "mean", *(f"p{100 * quantile:.0f}" for quantile in QUANTILES), "most")
"""Heads of the table of summaries."""


def measure_cells(label: str, of: Summary) -> list[str]:
    """Return the cells of a measure for the row of the table under MEASURE_HEADS."""
    return [label, *map(number, (of.mean, *of.quantiles, of.most))]


def slowest(facts: Facts) -> list[list[str]]:
    """Return the rows of the table under UNIT_HEADS: the units that took longest, at most SLOWEST of them, the slowest
    first."""
    units = sorted(facts.units, key=lambda unit: (-unit.seconds, unit.id))[:SLOWEST]
    return [_unit_cells(unit) for unit in units]


def about_slowest(facts: Facts) -> str:
    """Return sentences with the median time of all units, to compare the slowest units with."""
    seconds = [unit.seconds for unit in facts.units]
    middle = float(np.median(seconds)) if seconds else 0.0
    return f"The median time of all units is {took(middle)}. A replica has several units in progress at the same time."


def _unit_cells(unit: Unit) -> list[str]:
    totals = unit.totals
    more = f" and {counted(unit.files - 1, 'more file')}" if unit.files > 1 else ""
    return [
        shown(unit.id, NAME_CHARS),
        f"{totals.rows:,}",
        f"{totals.errors:,}",
        number(totals.completion_tokens),
        took(unit.seconds),
        number(unit.tokens_per_s),
        shown(unit.replica, NAME_CHARS),
        f"{unit.attempt:,}",
        f"{shown(unit.file, NAME_CHARS)}#{unit.first_row}{more}",
    ]


def took(seconds: float) -> str:
    """Return a time in seconds as text: `3m20s`, or with two significant digits if it is below 10 seconds: `4.2s`."""
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g}s"


PLACE_HEADS = ("replica", "units", "rows", "tokens", "at work", "tokens/s", "processes")
"""Heads of the table of replicas."""


def place_cells(place: Place) -> list[str]:
    """Return the cells of a replica and of those that replaced it, for the row of the table under PLACE_HEADS."""
    name, counts = shown(place.name, NAME_CHARS), (f"{place.units:,}", f"{place.rows:,}", number(place.tokens))
    return [name, *counts, took(place.work_s), number(place.tokens_per_s), f"{place.processes:,}"]


def settings(report: Report) -> list[tuple[str, str]]:
    """Return (name, value) of what identifies the job (output, fingerprint, times, input), then of all its settings.

    The settings are those in the plan, with names such as `workers.gpus`.
    """
    plan = report.facts.plan
    found: list[tuple[str, Any]] = [
        ("output", report.output),
        ("fingerprint", plan.fingerprint.digest),
        ("begun", when(plan.created)),
        ("finished", when(report.facts.finished or "-")),
        ("input files, rows, units", f"{len(plan.files):,}, {plan.rows:,}, {plan.units:,}"),
        ("checkpoint identity", plan.fingerprint.fields.get("model.checkpoint", "-")),
        *_flat(plan.job, ""),
    ]
    return [(shown(name, NAME_CHARS), shown(_plain(value), TEXT_CHARS)) for name, value in found]


def _flat(values: Mapping[str, Any], prefix: str) -> Sequence[tuple[str, Any]]:
    """Return (dotted name, value) of each setting in nested sections."""
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _plain(value: Any) -> str:
    return "-" if value is None else str(value)
