"""Defines the command preview, which shows what the model gets and what it answers before a job runs."""

import contextlib
import functools
import shlex
import shutil
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli import compose
from pipeline.cli.options import Debug, JobFile, Local, LogEvery, Overrides
from pipeline.cli.signals import StopSignals, one_line_errors

if TYPE_CHECKING:  # heavy modules are imported inside the command that needs them, so that --help and status start fast
    from pipeline.config.job import Job
    from pipeline.preview.run import Preview

MOST_COLUMNS = 120
"""Maximum width of the text in columns; on a wider terminal, long lines would be hard to read."""


def preview(
    job: JobFile,
    overrides: Overrides = None,
    rows: Annotated[
        int, typer.Option("--rows", min=1, max=100, metavar="ROWS", help="Number of rows to generate: the first ones.")
    ] = 5,
    full: Annotated[bool, typer.Option("--full", help="Do not shorten long prompts.")] = False,
    local: Local = False,
    log_every: LogEvery = 5.0,
    debug: Debug = False,
) -> None:
    """Generate the first rows of a job's input on one replica, and show their prompts and completions. Nothing is
    written.

    Rows that cannot be generated are shown with the reason, and the next rows take their places. At most 20 rows are
    read for each row to generate. The exit code is 1 if no row could be generated.
    """
    with one_line_errors(debug):
        from pipeline.config.loader import load_job

        settings = load_job(job, overrides or ())
        found = _generate(settings, rows, local, log_every)
        sets = [word for override in overrides or () for word in ("--set", override)]
        command = shlex.join(["twotower", "run", job, *sets, *(["--local"] if local else [])])
        _show(found, full, command)


def _generate(job: "Job", rows: int, local: bool, log_every: float) -> "Preview":
    from pipeline.monitoring.progress import open_display
    from pipeline.preview.run import generate_preview

    with StopSignals() as signals, contextlib.ExitStack() as closing:
        display = open_display(interval_s=log_every, in_pieces=True)
        closing.callback(display.close)
        with signals.one_line("nothing was written"):
            make_generator = functools.partial(compose.make_generator, local, signals)
            return generate_preview(job, rows, make_generator, display, signals.stop)


def _show(found: "Preview", full: bool, command: str) -> None:
    """Print the preview. Raises InputError if no row was generated."""
    from pipeline.core.errors import InputError
    from pipeline.preview.view import View, most_frequent
    from pipeline.storage.urls import safe_url

    view = View(found, width=min(shutil.get_terminal_size().columns, MOST_COLUMNS), full=full)
    for line in view.lines():
        typer.echo(line)
    reasons = [reason for reason in map(found.reason, found.rows) if reason is not None]
    if len(reasons) == len(found.rows):
        raise InputError(
            f"input {safe_url(found.job.input.path)}: none of the first {len(reasons):,} rows can be generated: "
            f"{most_frequent(reasons)}"
        )
    for line in view.totals(command):
        typer.echo(line)
