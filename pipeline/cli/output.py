"""Defines the commands that take an output folder: status, show, report, verify, retry-errors, clean."""

import contextlib
import shlex
import shutil
from collections.abc import Callable, Iterator
from typing import Annotated

import typer

from pipeline.cli.options import Debug, OutputPath
from pipeline.cli.signals import one_line_errors
from pipeline.core.text import counted, one_line, printable

SHOWN_FINDINGS = 10
"""The most findings of one kind that `verify` prints."""
LEFTOVERS_EXIT = 3
"""Exit code of `verify` if all rows are right and there are files that do not belong in the folder."""


def status(
    output: OutputPath,
    watch: Annotated[
        bool, typer.Option("--watch", help="Repeat until the job ends; exit code 1 if it did not complete.")
    ] = False,
    every: Annotated[
        float, typer.Option("--every", min=0.1, metavar="SECONDS", help="Time between two looks with --watch.")
    ] = 5.0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each look instead of text.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Show how far a job is, whether it is running, what its replicas do and what failed. Reads only the output
    folder.

    A driver on another machine is running if its report changes, because the clocks of two machines may differ: this
    may take 10 seconds, and 30 seconds if it is dead.
    """
    with one_line_errors(debug):
        from pipeline.monitoring.status_view import show

        try:
            well = show(output, watch=watch, every_s=every, as_json=as_json, waiting=_say_waiting)
        except KeyboardInterrupt:  # Ctrl-C is the usual way to leave --watch
            raise typer.Exit(130) from None
        if not well:
            raise typer.Exit(1)


def _say_waiting() -> None:
    from pipeline.monitoring.live import DEAD_AFTER_S

    said = f"looking for up to {DEAD_AFTER_S:g} s whether the driver, on another machine, still writes its report"
    typer.echo(said, err=True)


def _conditions(texts: list[str] | None) -> list[str] | None:
    """Return the conditions. Raises BadParameter (wrong usage) if one is not `COLUMN=VALUE`."""
    for text in texts or ():
        if "=" not in text:
            raise typer.BadParameter(f"{text!r} is not COLUMN=VALUE")
    return texts


def show(
    output: OutputPath,
    most: Annotated[int, typer.Option("-n", min=1, metavar="N", help="The number of rows to show at most.")] = 5,
    errors: Annotated[bool, typer.Option("--errors", help="Show only error rows.")] = False,
    where: Annotated[
        list[str] | None,
        typer.Option(
            "--where",
            metavar="COLUMN=VALUE",
            callback=_conditions,
            help="Show only rows with this value, such as finish_reason=length or error=null. If it is repeated, all "
            "must hold.",
        ),
    ] = None,
    full: Annotated[
        bool, typer.Option("--full", help="Show whole texts, instead of the beginning and the end of long ones.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Show rows of an output, finished or not, with prompt (if it is in the output), completion and statistics."""
    with one_line_errors(debug):
        from pipeline.report.row_search import RowSearch
        from pipeline.report.row_view import row_lines

        search, found = RowSearch(output, errors=errors, where=where or ()), 0
        width = shutil.get_terminal_size().columns  # 80 if there is no terminal
        for found, row in enumerate(search.rows(most + 1), 1):
            if found > most:
                typer.echo(
                    f"\nmore rows match: -n {2 * most} shows more" if errors or where else f"\n-n {2 * most} shows more"
                )
                break
            text = "\n".join(row_lines(row, search.carried, width, full=full))
            typer.echo(text if found == 1 else f"\n{text}")
        if not found:
            published = f"{search.published:,} of {counted(search.planned, 'row')} are published"
            typer.echo(f"{'no row matches' if search.published else 'there is no row yet'}: {published}")


def report(
    output: OutputPath,
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Show the report in the terminal and write nothing.")
    ] = False,
    to: Annotated[
        str | None,
        typer.Option("--to", metavar="FILE", help="Write this file instead of _job/report.html in the output folder."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Report on a job, finished or not, in one HTML file: totals, throughput, distributions, errors and slowest
    units."""
    with one_line_errors(debug):
        if terminal:
            from pipeline.report.summary import read_report
            from pipeline.report.terminal import lines

            for line in lines(read_report(output)):
                typer.echo(line)
            return
        from pipeline.report.write import write_report

        typer.echo(write_report(output, to))


def verify(
    output: OutputPath,
    every: Annotated[
        bool, typer.Option("--all", help=f"Print every finding, instead of the first {SHOWN_FINDINGS} of each kind.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Check that an output has each input row once and that its files are intact. If not, list what is wrong.

    The exit code is 1 if anything is wrong with the rows, and 3 if all rows are right but there are leftovers: files
    that dead runs left behind, or that are not from this project.
    """
    with one_line_errors(debug):
        from pipeline.maintenance.verify import verify

        with _parts_bar() as progress:
            found = verify(output, progress)
        for line in found.lines(None if every else SHOWN_FINDINGS):
            typer.echo(printable(one_line(line)))
        left = [counted(found.leftovers, "leftover file")] if found.leftovers else []
        if found.wrong:
            said = " and ".join([counted(found.wrong, "problem"), *left])
            typer.echo(f"error: {said} found, {counted(found.parts, 'part')} checked", err=True)
            raise typer.Exit(1)
        typer.echo(found.summary())
        if left:
            typer.echo(f"{left[0]} found, and nothing wrong with the rows: the exit code is {LEFTOVERS_EXIT}", err=True)
            raise typer.Exit(LEFTOVERS_EXIT)


def retry_errors(
    output: OutputPath,
    to: Annotated[str, typer.Option("--to", metavar="FOLDER", help="A new or empty folder for the new job.")],
    debug: Debug = False,
) -> None:
    """Make a new job of the rows that failed: a copy of their input rows, and a job file with the same settings except
    retry.max_error_rate, which is 1."""
    with one_line_errors(debug):
        from pipeline.maintenance.retry_errors import make_retry_job
        from pipeline.storage.urls import is_local, safe_url

        made = make_retry_job(output, to)
        if made.units_left:
            left = counted(made.units_left, "unit")
            typer.echo(f"the job is not complete: rows that fail in the {left} left are not included", err=True)
        if not made.rows:
            typer.echo("no row of a finished part failed: nothing was written")
            return
        typer.echo(f"{counted(made.rows, 'row')} failed; most frequent errors:")
        for text, count in made.reasons:
            typer.echo(f"{count:>12,} {one_line(text)}")
        if is_local(made.job_file):
            typer.echo(f"run them again: twotower run {shlex.quote(made.job_file)}")
        else:
            typer.echo(f"run them again: copy {safe_url(made.job_file)} to a local file and `twotower run` it")


def clean(
    output: OutputPath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be removed, and remove nothing.")] = False,
    debug: Debug = False,
) -> None:
    """Remove files that dead runs left behind, but never parts, records, the plan or the manifest."""
    with one_line_errors(debug):
        from pipeline.maintenance.clean import find_leftovers, remove_leftovers

        leftovers = find_leftovers(output)
        if not dry_run:
            remove_leftovers(output, leftovers)
        for leftover in leftovers:
            typer.echo(f"{'would remove' if dry_run else 'removed'} {leftover.line()}")
        if not leftovers:
            typer.echo("nothing to remove")


@contextlib.contextmanager
def _parts_bar() -> "Iterator[Callable[[int, int], None]]":
    """Show a progress bar over the parts while the `with` block runs, if stderr is a terminal. Yield the function that
    updates it with (parts done, all parts)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("parts", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
