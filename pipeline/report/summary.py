"""Puts a report into the words and numbers that the HTML page and the terminal both show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core.text import duration, number, one_line, share, when
from pipeline.pages.page import shown
from pipeline.report.facts import Facts, Unit, read_facts
from pipeline.report.measures import QUANTILES, Summary, summary, summary_of_counts
from pipeline.report.rows import MEASURES, Errors, Sample, read_errors, read_sample
from pipeline.report.timeline import Place, Timeline, timeline_of
from pipeline.storage.storage import Storage
from pipeline.storage.urls import safe_url

SLOWEST = 10
LABELS = {
    "tokens_per_forward": "tokens a denoiser forward",
    "steps_per_block": "steps a block",
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
UNIT_HEADS = ("unit", "rows", "errors", "tokens", "took", "tokens/s", "replica", "attempt", "from")
TEXT_CHARS, NAME_CHARS = 400, 120


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that is read from an output for a report."""

    output: str
    """Path or URL of the output folder, without credentials."""
    facts: Facts
    timeline: Timeline
    sample: Sample
    errors: Errors


def read_report(output_path: str) -> Report:
    """Read the report of a job's output.

    Raises OutputError if the folder is not a job's output, StorageError if the storage fails.
    """
    facts, storage = read_facts(output_path), Storage(output_path)
    sample, errors = read_sample(storage, facts.units), read_errors(storage, facts.units)
    return Report(safe_url(output_path).rstrip("/"), facts, timeline_of(facts.units), sample, errors)


def verdict(facts: Facts) -> str:
    """Return one or two sentences that say how far the job is."""
    totals, plan = facts.totals, facts.plan
    counts = f"{totals.ok:,} ok, {totals.errors:,} errors"
    if facts.complete:
        ended = f", finished {when(facts.finished)}" if facts.finished else ""
        return f"Complete{ended}: {totals.rows:,} rows, {counts}."
    done = f"{totals.rows:,} of {plan.rows:,} rows ({share(totals.rows, plan.rows)}) are in parts: {counts}."
    return f"Not complete: {done} If the job is not running, submit it again: it goes on where it was."


def tiles(report: Report) -> list[tuple[str, str]]:
    """Return (label, value) for each of the figures at the top of the report."""
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
        # the sums are divided, so that a short row has little weight
        found.append(("tokens a denoiser forward", f"{totals.completion_tokens / totals.denoiser_forwards:.3f}"))
    if time.seconds:
        found += [
            ("tokens/s while at work", number(sum(place.tokens for place in time.places) / time.seconds)),
            ("at work", duration(time.seconds)),
            ("replicas at work: mean, most", f"{work / time.seconds:.1f}, {int(time.working.max())}"),
        ]
        if isinstance(gpus, int) and gpus > 0:
            found.append(("GPU-hours of replicas at work", number(gpus * work / 3600)))
        else:
            found.append(("replica-hours at work", number(work / 3600)))
    found.append(("degenerate (a loop)", _part_of(totals.degenerate, totals.rows)))
    return found


def _part_of(count: int, whole: int) -> str:
    return f"{count:,} ({share(count, whole)})" if count else "0"


def notes(report: Report) -> list[str]:
    """Return warnings and notes about this output."""
    facts = report.facts
    said = [f"Warning: {shown(warning, TEXT_CHARS)}" for warning in facts.warnings]
    if facts.strange_parts:
        said.append(f"{facts.strange_parts:,} part(s), broken or another job's, are left out: run twotower verify.")
    if report.sample.unreadable:
        said.append(
            f"{report.sample.unreadable:,} part(s) drawn for distributions cannot be read: run twotower verify."
        )
    if facts.totals.null_ids:
        said.append(f"Rows without an id: {facts.totals.null_ids:,}.")
    if facts.totals.duplicate_ids:
        said.append(f"Ids that stand again within their unit: {facts.totals.duplicate_ids:,}; the manifest counts all.")
    return said


def last_run(facts: Facts) -> list[tuple[str, str]]:
    """Return (label, value) for the figures that the driver of the last run wrote last; empty if it wrote none."""
    if (live := facts.live) is None:
        return []
    stats = [replica.stats for replica in live.replicas]
    rooms = [one.room for one in stats]
    filled, padded = sum(room.prefill_tokens for room in rooms), sum(room.padded_tokens for room in rooms)
    found = [
        ("how it ended", shown(live.ended or "it goes on, or was killed", TEXT_CHARS)),
        ("padding, of the tokens in prefill forwards", share(padded - filled, padded)),
        ("rows that went back to the queue for want of memory pages", f"{sum(room.preemptions for room in rooms):,}"),
        ("rows generated again: a loop", f"{sum(one.loop_retries for one in stats):,}"),
        ("rows submitted again: a forward failed", f"{sum(one.forward_retries for one in stats):,}"),
        ("storage operations of replicas tried again", f"{live.storage_retries:,}"),
        ("units that went back to the queue", f"{live.unit_retries:,}"),
        ("replicas lost", f"{live.replicas_lost:,}"),
    ]
    return found + [("lost, such as", shown(one_line(loss), TEXT_CHARS)) for loss in live.losses]


def about_time(time: Timeline) -> list[str]:
    """Return sentences that explain the throughput chart."""
    said = ["A unit's tokens are spread evenly over its seconds, also those of rows that an earlier attempt finished."]
    if time.gaps:
        idle = sum(length for _, length in time.gaps)
        said.append(f"Dashed: where no unit was under way for a while; {duration(idle)} in all are cut out.")
    if time.undated:
        said.append(f"{time.undated:,} unit(s), published by an earlier version, say no time and are left out here.")
    return said


def about_sample(facts: Facts, sample: Sample) -> str:
    """Return a sentence that says from which rows the distributions were made."""
    if sample.rows == facts.totals.ok:
        return f"From all {sample.rows:,} rows that are no error rows."
    return (
        f"From {sample.rows:,} of {facts.totals.ok:,} rows that are no error rows: one row group of each of "
        f"{sample.parts:,} of {sample.of_parts:,} parts, drawn at random."
    )


def about_errors(facts: Facts, errors: Errors) -> str:
    """Return sentences that say how many rows failed and from how many parts their errors were read."""
    total = facts.totals.errors
    if not total:
        return "No row failed."
    said = f"{total:,} of {facts.totals.rows:,} rows failed ({share(total, facts.totals.rows)})."
    if errors.parts < errors.of_parts:
        said += f" Counted are those of {errors.parts:,} parts of {errors.of_parts:,} that have any, drawn at random."
    return f"{said} To run them again: twotower retry-errors."


def reasons(facts: Facts) -> list[tuple[str, float, str]]:
    """Return (finish reason, share of rows, share as text), the most frequent reason first."""
    counts = sorted(facts.totals.finish_reasons.items(), key=lambda item: -item[1])
    rows = facts.totals.rows
    return [(shown(name, NAME_CHARS), count / rows, f"{count:,} ({share(count, rows)})") for name, count in counts]


def time_spent(sample: Sample) -> list[tuple[str, float, str]]:
    """Return (activity, share of all latency, share as text). The list is empty if no latency was measured."""
    sums = {name: float(sample.values[f"{name}_s"].sum(dtype=np.float64)) for name in _STAGES}
    whole = max(float(sample.values["latency_s"].sum(dtype=np.float64)), sum(sums.values()))
    if whole <= 0:
        return []
    sums["between forwards"] = whole - sum(sums.values())
    return [(name, seconds / whole, f"{seconds / whole:.1%}") for name, seconds in sums.items()]


_STAGES = ("queue", "prefill", "denoise", "commit")


def summaries(sample: Sample) -> list[tuple[str, Summary]]:
    """Return (label, summary) of every measure that has values."""
    found = [(name, summary(sample.values[name])) for name in MEASURES]
    found.insert(1, ("steps_per_block", summary_of_counts(sample.steps)))
    return [(LABELS[name], one) for name, one in found if one is not None]


MEASURE_HEADS = ("measure", "mean", *(f"p{100 * quantile:.0f}" for quantile in QUANTILES), "most")


def measure_cells(label: str, of: Summary) -> list[str]:
    """Return the cells of a measure under MEASURE_HEADS."""
    return [label, *map(number, (of.mean, *of.quantiles, of.most))]


def slowest(facts: Facts) -> list[list[str]]:
    """Return the cells under UNIT_HEADS of the units that took longest."""
    units = sorted(facts.units, key=lambda unit: (-unit.seconds, unit.id))[:SLOWEST]
    return [_unit_cells(unit) for unit in units]


def about_slowest(facts: Facts) -> str:
    """Return the median time of all units in words, to compare the slowest units with."""
    seconds = [unit.seconds for unit in facts.units]
    middle = float(np.median(seconds)) if seconds else 0.0
    return f"The median unit took {took(middle)}. A replica may have two units under way at a time."


def _unit_cells(unit: Unit) -> list[str]:
    totals = unit.totals
    return [
        shown(unit.id, NAME_CHARS),
        f"{totals.rows:,}",
        f"{totals.errors:,}",
        number(totals.completion_tokens),
        took(unit.seconds),
        number(unit.tokens_per_s),
        shown(unit.replica, NAME_CHARS),
        f"{unit.attempt:,}",
        f"{shown(unit.file, NAME_CHARS)}#{unit.first_row}",
    ]


def took(seconds: float) -> str:
    """Return a time in seconds as text for people, with two digits if it is below 10 seconds."""
    return duration(seconds) if seconds >= 10 else f"{seconds:.2g}s"


PLACE_HEADS = ("replica", "units", "rows", "tokens", "at work", "tokens/s", "processes")


def place_cells(place: Place) -> list[str]:
    """Return the cells of a place under PLACE_HEADS."""
    name, counts = shown(place.name, NAME_CHARS), (f"{place.units:,}", f"{place.rows:,}", number(place.tokens))
    return [name, *counts, took(place.work_s), number(place.tokens_per_s), f"{place.processes:,}"]


def settings(report: Report) -> list[tuple[str, str]]:
    """Return (name, value) of the job's identity and of all its settings in the plan."""
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
    found: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value))
    return found


def _plain(value: Any) -> str:
    return "-" if value is None else str(value)
