"""Defines the arguments and options that several commands share."""

from typing import Annotated, Literal

import typer

JobFile = Annotated[str, typer.Argument(metavar="JOB", help="A job file, such as jobs/demo.yaml.")]

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, such as engine.max_rows=32. Repeatable."),
]

Debug = Annotated[
    bool, typer.Option("--debug", envvar="TWOTOWER_DEBUG", help="Show the traceback of an error.", show_envvar=True)
]

Local = Annotated[bool, typer.Option("--local", help="Run one replica in this process, without Ray.")]

LogEvery = Annotated[
    float, typer.Option("--log-every", min=0.1, metavar="SECONDS", help="Time between progress lines in a log.")
]

LogFormat = Annotated[
    Literal["text", "json"],
    typer.Option(
        "--log-format", envvar="TWOTOWER_LOG", help="json: log lines of driver and replicas are JSON records."
    ),
]


def _given(path: str) -> str:
    """Return the path of an output folder. Raises BadParameter (wrong usage) if it is empty or blank."""
    if not path.strip():  # the value of an unset shell variable, which would otherwise mean the current directory
        raise typer.BadParameter("it is empty: give the output folder of a job")
    return path


OutputPath = Annotated[str, typer.Argument(metavar="OUTPUT", help="The output folder of a job.", callback=_given)]
