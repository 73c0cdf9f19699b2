"""The command line: run, plan, calibrate, status, report, verify, retry-errors, clean, canary, doctor. The
composition root: it alone brings pipeline and workers together.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 and 143 stopped by SIGINT and SIGTERM.
"""

import contextlib
import functools
import shlex
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.endings import StopSignals, one_line_errors

if TYPE_CHECKING:  # everything heavier is imported by the command that needs it: --help and status start fast
    from pipeline.calibration.bench import Bench
    from pipeline.calibration.options import Options
    from pipeline.dispatch import Pool
    from pipeline.job import Job
    from pipeline.plan import Plan
    from pipeline.run import Outcome

app = typer.Typer(
    help="Batch generation with TwoTower block diffusion: prompts in Parquet, completions in Parquet.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

JobFile = Annotated[str, typer.Argument(metavar="JOB", help="A job file, such as jobs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as engine.max_rows=32. Repeatable."),
]
Debug = Annotated[
    bool, typer.Option("--debug", envvar="TWOTOWER_DEBUG", help="Show the traceback of an error.", show_envvar=True)
]
Local = Annotated[bool, typer.Option("--local", help="One replica in this process, without Ray.")]
LogEvery = Annotated[
    float, typer.Option("--log-every", min=0.1, metavar="SECONDS", help="Time between progress lines in a log.")
]

LogFormat = Annotated[
    Literal["text", "json"],
    typer.Option("--log-format", envvar="TWOTOWER_LOG", help="json: records, of the driver and of the replicas."),
]


def _given(path: str) -> str:
    if not path.strip():  # an unset shell variable would mean the current directory
        raise typer.BadParameter("it is empty: give the output folder of a job")
    return path


OutputPath = Annotated[str, typer.Argument(metavar="OUTPUT", help="The output folder of a job.", callback=_given)]


@app.command()
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
        from pipeline.jobfile import load_job
        from pipeline.paths import safe_url
        from pipeline.progress import open_progress
        from pipeline.run import run_job
        from workers.metrics import RayMetrics

        settings = load_job(job, overrides or ())
        typer.echo(f"job {settings.name}: {safe_url(settings.input.path)} -> {safe_url(settings.output.path)}")
        with StopSignals() as signals:
            as_json = log_format == "json"
            make_pool = functools.partial(_make_pool, settings, local, signals.install, json_logs=as_json)
            make_progress = functools.partial(open_progress, interval_s=log_every, as_json=as_json)
            sinks = [] if local else [RayMetrics(settings.name or "")]
            with signals.one_line("what was not written down is generated again at the next run"):
                outcome = run_job(settings, make_pool, signals.stop, make_progress, sinks)
        for line in _summary(settings, outcome):
            typer.echo(line)


@app.command()
def plan(
    job: JobFile,
    overrides: Overrides = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration", metavar="FOLDER", help="Hours and cost by this one; <output>-calibration if not given."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Show what a job would do, and write nothing. Exit code 1 where input files cannot be read."""
    with one_line_errors(debug):
        from pipeline.jobfile import load_job
        from pipeline.preview import preview

        shown = preview(load_job(job, overrides or ()), calibration)
        for line in shown.lines():
            typer.echo(line)
        for name, reason in shown.unreadable:
            typer.echo(f"error: input file {name} cannot be read: {reason}", err=True)
        if shown.unreadable:
            raise typer.Exit(1)


@app.command()
def calibrate(
    job: JobFile,
    overrides: Overrides = None,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="FOLDER", help="Where to; <output>-calibration if not given."),
    ] = None,
    sample: Annotated[int, typer.Option("--sample", metavar="ROWS", help="Rows of the input to run.")] = 64,
    minutes: Annotated[float, typer.Option("--minutes", help="Time for measuring, once the model is loaded.")] = 30.0,
    price: Annotated[
        float | None,
        typer.Option("--price", help="Of a GPU-hour, 2.5 if not given; on CPUs, of an hour of a replica."),
    ] = None,
    currency: Annotated[str, typer.Option("--currency", help="Of the price.")] = "USD",
    thresholds: Annotated[
        str, typer.Option("--thresholds", metavar="LIST", help="Confidence thresholds to try.")
    ] = "0.7,0.8,0.9,0.95,0.99",
    steps: Annotated[str, typer.Option("--steps", metavar="LIST", help="Limits of steps a block to try.")] = "4,8,16",
    rows: Annotated[
        str, typer.Option("--rows", metavar="LIST", help="Row limits to try; max: as many as the memory holds.")
    ] = "1,16,max",
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", metavar="TOKENS", help="Cut rows earlier than the job does."),
    ] = None,
    min_agreement: Annotated[
        float, typer.Option("--min-agreement", metavar="SHARE", help="Of the tokens that must be as AR writes them.")
    ] = 0.95,
    local: Local = False,
    log_every: LogEvery = 5.0,
    debug: Debug = False,
) -> None:
    """Measure before you spend: quality and speed of AR and diffusion on a sample of the job's own prompts.

    Writes all measurements, a report and the job file with the fastest settings that keep AR's quality. Run it again to
    go on after any stop.
    """
    with one_line_errors(debug):
        from pipeline.calibration import options
        from pipeline.jobfile import load_job

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
    from pipeline.calibration.show import open_show

    setup = prepare(job, options)
    with StopSignals() as signals, contextlib.ExitStack() as closing:
        show = open_show(interval_s=log_every)
        closing.callback(show.close)
        with signals.one_line("the points measured so far are kept"):
            outcome = measure(setup, functools.partial(_make_bench, local, signals.install), show, signals.stop)
    for line in finish(outcome, job_file, overrides):
        typer.echo(line)
    if outcome.failure is not None:
        from pipeline.errors import JobFailed

        raise JobFailed(f"{outcome.failure}; the points measured so far are kept: run it again to go on")
    if outcome.stopped and signals.received is not None:
        raise typer.Exit(128 + signals.received)


def _make_bench(local: bool, catch_signals: Callable[[], None], job: "Job") -> "Bench":
    catch_signals()
    from workers.calibrate import ReplicaBench

    if local:
        return ReplicaBench(job)
    from workers.ray_bench import RayBench

    bench = RayBench(job, ReplicaBench)
    catch_signals()
    return bench


@app.command()
def status(
    output: OutputPath,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again until the job ends; exit code 1 if it did not complete.")
    ] = False,
    every: Annotated[float, typer.Option("--every", min=0.1, metavar="SECONDS", help="With --watch.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a look instead of lines.")] = False,
    debug: Debug = False,
) -> None:
    """Show how far a job is, whether it runs, what its replicas do and what failed. Reads the folder alone."""
    with one_line_errors(debug):
        from pipeline.status_show import show

        try:
            well = show(output, watch=watch, every_s=every, as_json=as_json)
        except KeyboardInterrupt:  # the usual way to leave --watch
            raise typer.Exit(130) from None
        if not well:
            raise typer.Exit(1)


@app.command()
def report(
    output: OutputPath,
    terminal: Annotated[bool, typer.Option("--terminal", help="Show it here and write nothing.")] = False,
    to: Annotated[
        str | None, typer.Option("--to", metavar="FILE", help="Instead of _job/report.html in the output folder.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Report on a job, finished or not: totals, throughput, distributions, errors, slowest units, as one HTML file."""
    with one_line_errors(debug):
        if terminal:
            from pipeline.report.summary import read_report
            from pipeline.report.terminal import lines

            for line in lines(read_report(output)):
                typer.echo(line)
            return
        from pipeline.report.write import write_report

        typer.echo(write_report(output, to))


@app.command()
def verify(output: OutputPath, debug: Debug = False) -> None:
    """Check an output: each input row once, as made. Exit code 1 and a list where it is not so."""
    with one_line_errors(debug):
        from pipeline.verify import verify

        with _parts_bar() as progress:
            found = verify(output, progress)
        for problem in found.problems:
            typer.echo(" ".join(problem.split()))
        if found.problems:
            typer.echo(f"error: problems: {len(found.problems):,}, parts: {found.parts:,}", err=True)
            raise typer.Exit(1)
        typer.echo(found.summary())


@app.command()
def retry_errors(
    output: OutputPath,
    to: Annotated[str, typer.Option("--to", metavar="FOLDER", help="An empty or new folder for the new job.")],
    debug: Debug = False,
) -> None:
    """Make a new job of the rows that failed. Their input rows and a job file with the same settings but for
    retry.max_error_rate, which is 1."""
    with one_line_errors(debug):
        from pipeline.paths import is_local, safe_url
        from pipeline.retry_errors import make_retry_job

        made = make_retry_job(output, to)
        if made.units_left:
            typer.echo(f"not complete: what fails in the {made.units_left:,} units left is not among these", err=True)
        if not made.rows:
            typer.echo("no row failed: nothing was written")
            return
        typer.echo(f"{made.rows:,} rows failed; most frequent:")
        for text, count in made.reasons:
            typer.echo(f"{count:>12,} {' '.join(text.split())}")
        if is_local(made.job_file):
            typer.echo(f"run them again: twotower run {shlex.quote(made.job_file)}")
        else:
            typer.echo(f"run them again: copy {safe_url(made.job_file)} to a local file and `twotower run` it")


@app.command()
def clean(
    output: OutputPath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, remove nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Remove what dead runs left behind. Never parts, records, plan or manifest."""
    with one_line_errors(debug):
        from pipeline.clean import find_leftovers, remove_leftovers

        leftovers = find_leftovers(output)
        if not dry_run:
            remove_leftovers(output, leftovers)
        for leftover in leftovers:
            typer.echo(f"{'would remove' if dry_run else 'removed'} {leftover.line()}")
        if not leftovers:
            typer.echo("nothing to remove")


@app.command()
def canary(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint that is known to be well.")],
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Instead of built-in ones. Repeatable.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Of each completion.")] = 20,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")] = "float32",
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="To run it on; 0: the CPU.")] = 0,
    out: Annotated[
        str | None, typer.Option("--out", metavar="FILE", help="Instead of canary.json beside the weights.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    debug: Debug = False,
) -> None:
    """Write down what a checkpoint generates, so that each replica can check at its start that it does the same."""
    with one_line_errors(debug):
        from workers.self_check import make_canary

        made = make_canary(model, prompts=prompts or (), tokens=tokens, dtype=dtype, gpus=gpus, out=out, force=force)
        for line in made:
            typer.echo(line)


@app.command()
def doctor(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="A job file, to check what it needs, too.")] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Check what this machine can run: a line each, with the fix. Exit code 1 where anything is FAIL."""
    from pipeline.doctor.findings import examine, report
    from pipeline.doctor.job import job_checks, open_job
    from pipeline.doctor.machine import machine_checks
    from workers.doctor import cluster_checks, device_checks

    settings, checks = open_job(job, overrides or ())
    checks = [*machine_checks(settings), *device_checks(settings), *cluster_checks(settings), *checks]
    if settings is not None:
        checks += job_checks(settings)
    if not report(examine(checks), typer.echo, as_json=as_json):
        raise typer.Exit(1)


@contextlib.contextmanager
def _parts_bar() -> "Iterator[Callable[[int, int], None]]":
    """A bar over the parts on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("parts", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _make_pool(
    job: "Job",
    local: bool,
    catch_signals: Callable[[], None],
    plan: "Plan",
    units: int,
    tell: Callable[[str], None],
    *,
    json_logs: bool,
) -> "Pool":
    catch_signals()
    from workers.build import ReplicaSpec, make_runner

    maker = functools.partial(make_runner, ReplicaSpec(job, plan.fingerprint.digest, plan.schema, json_logs))
    pool: Pool
    if local:
        from workers.local_pool import LocalPool

        pool = LocalPool(maker)
    else:
        from workers.pool import RayPool

        pool = RayPool(maker, job.workers, units, tell)
    catch_signals()
    return pool


def _summary(job: "Job", outcome: "Outcome") -> list[str]:
    from pipeline.layout import MANIFEST
    from pipeline.paths import safe_url
    from pipeline.progress import duration

    totals, output = outcome.totals, safe_url(job.output.path).rstrip("/")
    rows = f"{totals.rows:,} rows: {totals.ok:,} ok, {totals.errors:,} errors"
    lines = [f"job {job.name} was complete already, nothing was run: {rows}"]
    if outcome.ran_units:
        rate = outcome.tokens / outcome.seconds if outcome.seconds else 0.0
        resumed = outcome.units - outcome.ran_units
        lines = [
            f"job {job.name} is complete: {rows}"
            + (f" ({resumed} of {outcome.units} units before)" if resumed else ""),
            f"tokens   {totals.prompt_tokens:,} prompt, {totals.completion_tokens:,} completion; "
            f"{rate:,.0f} tokens/s over {duration(outcome.seconds)}",
        ]
    elif outcome.manifest is not None:
        lines = [f"job {job.name} is complete, its manifest was missing: {rows}"]
    lines += [f"warning  {warning}" for warning in outcome.warnings]
    query = f"SELECT finish_reason, count(*) FROM '{output}/part-*.parquet' GROUP BY 1"
    files = [f"output   {output}", f"manifest {output}/{MANIFEST}"]
    files += [f"report   {outcome.report}"] if outcome.report else []
    return [*lines, *files, f'query    duckdb -c "{query}"']
