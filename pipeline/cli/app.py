"""Defines the command line: run, plan, preview, calibrate, status, show, report, verify, retry-errors, clean, canary,
doctor.

Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 stopped by SIGINT, 143 stopped by SIGTERM.
"""

import typer

from pipeline.cli.calibrate import calibrate
from pipeline.cli.job import doctor, plan, run
from pipeline.cli.model import canary
from pipeline.cli.output import clean, report, retry_errors, show, status, verify
from pipeline.cli.preview import preview

app = typer.Typer(
    help="Batch generation with TwoTower block diffusion: prompts in Parquet, completions in Parquet.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

for command in (run, plan, preview, calibrate, status, show, report, verify, retry_errors, clean, canary, doctor):
    app.command()(command)
