"""Finishes a calibration: writes report.html, job.yaml and calibration.json, and sums up the result in a few lines."""

import shlex
from collections.abc import Sequence

from pipeline.calibration.bench import RowLimit
from pipeline.calibration.choice import Cost, Result, cost_of
from pipeline.calibration.page.content import amount, make_report, remarks
from pipeline.calibration.page.verdict import notes, rate, verdict
from pipeline.calibration.points import AR, Point
from pipeline.calibration.quality import percent
from pipeline.calibration.results import record
from pipeline.calibration.results.folder import JOB_FILE, MEASUREMENTS, REPORT
from pipeline.calibration.run import Outcome
from pipeline.config.job import Job
from pipeline.config.loader import load_job, read_settings
from pipeline.config.writer import to_yaml
from pipeline.core.text import duration, one_line
from pipeline.pages.page import shown
from pipeline.storage.urls import is_local

ROWS_SHOWN = 12
"""Maximum number of points in the table that the command prints."""


def finish(outcome: Outcome, job_file: str, overrides: Sequence[str]) -> list[str]:
    """Write report.html, job.yaml and calibration.json into the folder. Return the lines that the command prints.

    The lines are a table of points, the verdict with notes, and what was chosen, at which cost, in which files.
    `job_file`, `overrides`: the job as the command names it, from which job.yaml is made. Raises JobError if job.yaml
    would be no valid job, StorageError if the storage fails.
    """
    setup, choice = outcome.setup, outcome.choice
    said, remarked = verdict(choice), [*notes(choice), *remarks(outcome)]
    limit = row_limit_to_say(setup.job, choice.best.point, dict(outcome.replica.row_limits).get("auto"))
    comments = [f"Made by `twotower calibrate {shown(one_line(job_file), 500)}`.", said]
    new_job = chosen_job(job_file, overrides, choice.best.point, limit, comments)
    identity = {**setup.identity, **record.of_replica(outcome.replica)}
    fields = record.outcome_fields(choice, setup.workload, setup.sample, said, remarked, outcome.missing)
    setup.folder.write(JOB_FILE, new_job)
    setup.folder.write(REPORT, make_report(outcome))
    setup.folder.write_record(identity, outcome.replica, fields)
    return [*_table(outcome), "", *[one_line(line) for line in (said, *remarked)], "", *_ends(outcome)]


def _ends(outcome: Outcome) -> list[str]:
    setup, choice = outcome.setup, outcome.choice
    folder = setup.folder.shown
    run = f"{setup.folder.path}/{JOB_FILE}"
    how = f"twotower run {shlex.quote(run)}" if is_local(run) else "copy it to a local file and `twotower run` it"
    return [
        f"chosen {choice.best.point.label}: {folder}/{JOB_FILE} ({how})",
        f"job    {_cost(outcome)}",
        f"files  {folder}/{REPORT}, {MEASUREMENTS}, completions/",
    ]


def _cost(outcome: Outcome) -> str:
    workload = outcome.setup.workload
    cost, ar = cost_of(outcome.choice.best, workload), cost_of(outcome.choice.reference, workload)
    several = f"{workload.replicas} replicas" if (workload.replicas or 1) > 1 else "one replica"
    text = f"{workload.rows:,} rows take {_hours(cost.hours)} on {several}: {_priced(cost, outcome)}"
    if outcome.choice.best.point.setting == AR:
        return text
    return f"{text}; with AR {_priced(ar, outcome)}"


def _priced(cost: Cost, outcome: Outcome) -> str:
    gpu = cost.gpu_hours is not None
    text = f"{amount(cost.gpu_hours if gpu else cost.replica_hours)} {'GPU' if gpu else 'replica'}-hours"
    return text if cost.money is None else f"{text}, {amount(cost.money)} {outcome.setup.workload.currency}"


def _hours(hours: float) -> str:
    return duration(3600 * hours)


def _table(outcome: Outcome) -> list[str]:
    """Return the lines of a table of the most useful points: the chosen one, the fastest AR, the job's own, and points
    that no other point beats in both speed and agreement. `*` marks the chosen point, `job` the job's own."""
    choice = outcome.choice
    rows = [("", "point", "tokens/s", "x AR", "agreement", "exact", "tokens/forward", "repetition")]
    for result in _worth_a_look(outcome):
        quality = result.quality
        mark = "*" if result is choice.best else "job" if result.point == outcome.own else ""
        rows.append(
            (
                mark,
                result.point.label,
                rate(result),
                f"{choice.reference.seconds_per_row / result.seconds_per_row:.2f}",
                str(quality.agreement),
                percent(quality.exact.mean),
                "-" if quality.tokens_per_forward is None else f"{quality.tokens_per_forward:.2f}",
                f"{quality.repetition:.3f}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for mark, label, *cells in rows:
        numbers = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[2:], strict=True))
        lines.append(f"{mark.ljust(widths[0])} {label.ljust(widths[1])}  {numbers}")
    return lines


def _worth_a_look(outcome: Outcome) -> list[Result]:
    choice = outcome.choice
    own = [result for result in choice.results if result.point == outcome.own]
    must = dict.fromkeys(result.point for result in (choice.best, choice.reference, *own))
    front: list[Result] = []  # the fastest first; each agrees better with AR than the one before it, or is in `must`
    for result in sorted(choice.results, key=lambda r: r.seconds_per_row):
        better = not front or result.quality.agreement.mean > front[-1].quality.agreement.mean
        if better or result.point in must:
            front.append(result)
    spare = [result for result in front if result.point not in must][: max(0, ROWS_SHOWN - len(must))]
    return [result for result in front if result.point in must or result in spare]


def chosen_job(file: str, overrides: Sequence[str], best: Point, max_rows: RowLimit, comments: Sequence[str]) -> bytes:
    """Return the job file as YAML, with its overrides and the best point applied. Keys keep their order; its comments
    are lost.

    Variables are not replaced by their values, so that no secret is written that is not in the file itself. `max_rows`:
    the row limit to write. `comments`: lines for the top of the new file. Raises JobError if the result is not a valid
    job.
    """
    sets = [*overrides, f"generation.mode={best.setting.mode}", f"engine.max_rows={max_rows}"]
    if best.setting.threshold is not None:
        sets += [
            f"generation.confidence_threshold={best.setting.threshold!r}",
            f"generation.steps_per_block={best.setting.steps}",
        ]
    job = load_job(file, sets)
    settings = read_settings(file, sets)
    if settings.get("name") is None:  # the job's name was that of the file
        settings = {"name": job.name, **{key: value for key, value in settings.items() if key != "name"}}
    return to_yaml(settings, comments)


def row_limit_to_say(job: Job, best: Point, auto_rows: int | None) -> RowLimit:
    """Return the row limit to write into the job file: `auto` if the job says `auto` and the best point has as many
    rows as that gives, else the point's number of rows."""
    return "auto" if job.engine.max_rows == "auto" and best.max_rows == auto_rows else best.max_rows
