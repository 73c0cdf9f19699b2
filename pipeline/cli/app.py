"""Defines the command line: run, plan, preview, calibrate, status, show, report, verify, retry-errors, clean, canary,
doctor.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 3 `verify` found only leftovers, 129 stopped by
SIGHUP, 130 by SIGINT, 143 by SIGTERM.
"""

import typer

from pipeline.cli.calibrate import calibrate
from pipeline.cli.job import doctor, plan, run
from pipeline.cli.model import canary
from pipeline.cli.output import clean, report, retry_errors, show, status, verify
from pipeline.cli.preview import preview
from pipeline.core.streams import never_fail

READERS = ("status", "show")
"""Commands that only show something, and without end or at length. If nobody reads it any more, they end."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.callback()
def begin(context: typer.Context) -> None:
    """Batch generation with TwoTower block diffusion: prompts in Parquet, completions in Parquet."""
    if context.invoked_subcommand not in READERS:
        never_fail()  # a line that cannot be written ends no job, and does not change its exit code


for command in (run, plan, preview, calibrate, status, show, report, verify, retry_errors, clean, canary, doctor):
    app.command()(command)
