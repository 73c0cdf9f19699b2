"""Defines the commands that take a job file: run, plan, doctor."""

import functools
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli import compose
from pipeline.cli.options import Debug, JobFile, Local, LogEvery, LogFormat, Overrides
from pipeline.cli.signals import StopSignals, one_line_errors

if TYPE_CHECKING:  # heavy modules are imported inside the command that needs them, so that --help and status start fast
    from pipeline.config.job import Job
    from pipeline.driver.run import Outcome


def run(
    job: JobFile,
    overrides: Overrides = None,
    local: Local = False,
    log_every: LogEvery = 5.0,
    log_format: LogFormat = "text",
    debug: Debug = False,
) -> None:
    """Run a job, or what is left of it. To resume after any stop, run it again."""
    with one_line_errors(debug):
        from pipeline.config.loader import load_job
        from pipeline.driver.run import run_job
        from pipeline.monitoring.progress import open_display
        from pipeline.storage.urls import safe_url

        settings = load_job(job, overrides or ())
        typer.echo(f"job {settings.name}: {safe_url(settings.input.path)} -> {safe_url(settings.output.path)}")
        with StopSignals() as signals:
            as_json = log_format == "json"
            make_pool = functools.partial(compose.make_pool, settings, local, signals, json_logs=as_json)
            make_display = functools.partial(open_display, interval_s=log_every, as_json=as_json)
            sinks = compose.make_sinks(settings, local)
            with signals.one_line("rows that were not saved are generated again by the next run"):
                outcome = run_job(settings, make_pool, signals.stop, make_display, sinks)
        for line in _summary(settings, outcome):
            typer.echo(line)


def plan(
    job: JobFile,
    overrides: Overrides = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration", metavar="FOLDER", help="Calibration for hours and cost; <output>-calibration if not given."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Show what a job would do, with three of its prompts, and write nothing. The exit code is 1 if input files cannot
    be read or too many rows have no usable prompt."""
    with one_line_errors(debug):
        from pipeline.cli.plan_view import view_plan
        from pipeline.config.loader import load_job

        shown = view_plan(load_job(job, overrides or ()), calibration)
        for line in shown.lines():
            typer.echo(line)
        for name, reason in shown.unreadable:
            typer.echo(f"error: input file {name} cannot be read: {reason}", err=True)
        if shown.refusal:
            typer.echo(f"error: {shown.refusal}", err=True)
        if shown.unreadable or shown.refusal:
            raise typer.Exit(1)


def doctor(
    job: Annotated[
        str | None, typer.Argument(metavar="[JOB]", help="A job file whose needs are checked as well.")
    ] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Check what this machine can run: at least one line for each check, with the fix. The exit code is 1 if a line is
    FAIL."""
    from pipeline.checks.findings import examine, report
    from pipeline.checks.job import job_checks, open_job
    from pipeline.checks.machine import machine_checks

    settings, checks = open_job(job, overrides or ())
    checks = [*machine_checks(settings), *compose.device_and_cluster_checks(settings), *checks]
    if settings is not None:
        checks += job_checks(settings)
    if not report(examine(checks), typer.echo, as_json=as_json):
        raise typer.Exit(1)


def _summary(job: "Job", outcome: "Outcome") -> list[str]:
    """Return the last lines of `run`: the counts, the warnings, the files, and a query to begin with."""
    from pipeline.core.text import counted, duration
    from pipeline.output.layout import MANIFEST
    from pipeline.storage.urls import safe_url

    totals, output = outcome.totals, safe_url(job.output.path).rstrip("/")
    rows = f"{counted(totals.rows, 'row')}: {totals.ok:,} ok, {counted(totals.errors, 'error')}"
    lines = [f"job {job.name} was complete already, nothing was run: {rows}"]
    if outcome.ran_units:
        rate = outcome.tokens / outcome.seconds if outcome.seconds else 0.0
        resumed = outcome.units - outcome.ran_units
        lines = [
            f"job {job.name} is complete: {rows}"
            + (f" ({resumed} of {counted(outcome.units, 'unit')} done before)" if resumed else ""),
            f"tokens   {totals.prompt_tokens:,} prompt, {totals.completion_tokens:,} completion; "
            f"{rate:,.0f} tokens/s over {duration(outcome.seconds)}, start-up included",
        ]
    elif outcome.manifest is not None:
        lines = [f"job {job.name} is complete, its manifest was missing: {rows}"]
    lines += [f"warning  {warning}" for warning in outcome.warnings]
    query = f"SELECT finish_reason, count(*) FROM '{output}/part-*.parquet' GROUP BY 1"
    files = [f"output   {output}", f"manifest {output}/{MANIFEST}"]
    files += [f"report   {outcome.report}"] if outcome.report else []
    return [*lines, *files, f'query    duckdb -c "{query}"']
