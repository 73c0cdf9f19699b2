"""The commands that pages of the documentation tell to run."""

import re

import typer

from pipeline.cli.app import app


def commands_of(page: str) -> list[str]:
    """Return each line of the sh blocks of a page's text."""
    blocks = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def parse(words: list[str]) -> None:
    """Parse a command line of the program without running it. Raises click's UsageError if it is not one."""
    group = typer.main.get_command(app)
    context = group.make_context("twotower", list(words))
    _, found, rest = group.resolve_command(context, list(words))  # type: ignore[attr-defined]
    found.make_context(words[0], rest, parent=context)
