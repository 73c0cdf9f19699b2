"""Defines the command calibrate, which measures quality and speed before a job runs."""

import contextlib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli import compose
from pipeline.cli.options import Debug, JobFile, Local, LogEvery, Overrides
from pipeline.cli.signals import StopSignals, one_line_errors

if TYPE_CHECKING:  # heavy modules are imported inside the command that needs them, so that --help and status start fast
    from pipeline.calibration.options import Options
    from pipeline.config.job import Job


def calibrate(
    job: JobFile,
    overrides: Overrides = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="FOLDER", help="Folder for the results; <output>-calibration if not given."),
    ] = None,
    sample: Annotated[int, typer.Option("--sample", metavar="ROWS", help="Number of input rows to generate.")] = 64,
    minutes: Annotated[float, typer.Option("--minutes", help="Time for measuring, once the model is loaded.")] = 30.0,
    price: Annotated[
        float | None,
        typer.Option("--price", help="Price of a GPU per hour, 2.5 if not given; on CPUs, of a replica."),
    ] = None,
    currency: Annotated[str, typer.Option("--currency", help="Currency of the price.")] = "USD",
    thresholds: Annotated[
        str, typer.Option("--thresholds", metavar="LIST", help="Confidence thresholds to try.")
    ] = "0.7,0.8,0.9,0.95,0.99",
    steps: Annotated[str, typer.Option("--steps", metavar="LIST", help="Step limits of a block to try.")] = "4,8,16",
    rows: Annotated[
        str, typer.Option("--rows", metavar="LIST", help="Row limits to try; max means as many as the memory holds.")
    ] = "1,16,max",
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", metavar="TOKENS", help="End rows after fewer tokens than the job does."),
    ] = None,
    min_agreement: Annotated[
        float, typer.Option("--min-agreement", metavar="SHARE", help="Share of tokens that must be the same as AR's.")
    ] = 0.95,
    local: Local = False,
    log_every: LogEvery = 5.0,
    debug: Debug = False,
) -> None:
    """Measure quality and speed of AR and diffusion on a sample of the job's own prompts, before you pay for the job.

    Writes all measurements, a report, and a job file with the fastest settings that keep the quality of AR. To continue
    after a stop, run it again.
    """
    with one_line_errors(debug):
        from pipeline.calibration import options
        from pipeline.config.loader import load_job

        asked = options.Options(
            to=to,
            sample=sample,
            minutes=minutes,
            price=price,
            currency=currency,
            thresholds=options.numbers("--thresholds", thresholds),
            steps=options.whole_numbers("--steps", steps),
            rows=options.row_limits("--rows", rows),
            max_new_tokens=max_new_tokens,
            min_agreement=min_agreement,
        )
        _calibrate(load_job(job, overrides or ()), asked, job, overrides or (), local, log_every)


def _calibrate(
    job: "Job", options: "Options", job_file: str, overrides: Sequence[str], local: bool, log_every: float
) -> None:
    from pipeline.calibration.finish import finish
    from pipeline.calibration.run import measure
    from pipeline.calibration.setup import prepare
    from pipeline.monitoring.progress import open_display

    setup = prepare(job, options)
    with StopSignals() as signals, contextlib.ExitStack() as closing:
        display = open_display(interval_s=log_every, in_pieces=True)
        closing.callback(display.close)
        with signals.one_line("the points measured so far are kept"):
            outcome = measure(setup, functools.partial(compose.make_bench, local, signals), display, signals.stop)
    for line in finish(outcome, job_file, overrides):
        typer.echo(line)
    if outcome.failure is not None:
        from pipeline.core.errors import JobFailed

        raise JobFailed(f"{outcome.failure}; the points measured so far are kept: run it again to continue")
    if outcome.stopped and signals.received is not None:
        raise typer.Exit(128 + signals.received)
