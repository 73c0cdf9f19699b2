"""Defines the command canary, which takes a checkpoint instead of a job."""

from typing import Annotated

import typer

from pipeline.cli import compose
from pipeline.cli.options import Debug
from pipeline.cli.signals import one_line_errors


def canary(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint that you know to be right.")],
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", metavar="TEXT", help="A prompt to use instead of the built-in ones. Repeatable."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens in each completion.")] = 20,  # 1.25 blocks
    dtype: Annotated[str, typer.Option("--dtype", help="Type of the weights: float32 or bfloat16.")] = "float32",
    gpus: Annotated[int, typer.Option("--gpus", min=0, help="GPUs to run it on; 0 means the CPU.")] = 0,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="Write this file instead of canary.json beside the weights."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")] = False,
    debug: Debug = False,
) -> None:
    """Record what a checkpoint generates, so that every replica can check at its start that it generates the same."""
    with one_line_errors(debug):
        make_canary = compose.canary_maker()
        made = make_canary(model, prompts=prompts or (), tokens=tokens, dtype=dtype, gpus=gpus, out=out, force=force)
        for line in made:
            typer.echo(line)
