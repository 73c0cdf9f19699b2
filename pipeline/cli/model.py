"""Defines the command that takes a checkpoint: canary."""

from typing import Annotated

import typer

from pipeline.cli import compose
from pipeline.cli.options import Debug
from pipeline.cli.signals import one_line_errors


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
    """Record what a checkpoint generates, so that every replica can check at its start that it generates the same."""
    with one_line_errors(debug):
        made = compose.make_canary(
            model, prompts=prompts or (), tokens=tokens, dtype=dtype, gpus=gpus, out=out, force=force
        )
        for line in made:
            typer.echo(line)
