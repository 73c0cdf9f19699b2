"""Ends a command that fails or is stopped: the project's own errors in one line, stop signals and exit codes."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import typer

from model.errors import TwoTowerError
from pipeline.core.text import one_line


@contextlib.contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turn the project's own errors into one line on stderr, with their advice below it, and exit code 1.

    With `debug` they keep their traceback, as all other errors do, because those are bugs.
    """
    try:
        yield
    except TwoTowerError as error:
        if debug:
            raise
        typer.echo(f"error: {one_line(error)}", err=True)
        if error.advice:
            typer.echo(error.advice, err=True)
        raise typer.Exit(1) from None


class StopSignals:
    """A handler that sets `stop` on the first SIGINT or SIGTERM; a second signal raises KeyboardInterrupt.

    `install` is called before Ray starts and again after it, because ray.init() installs a handler of its own. The end
    of the `with` block restores the handlers that were there before.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.received: int | None = None
        """The number of the first signal; None if there was none."""
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "StopSignals":
        return self

    def install(self) -> None:
        """Install the handler for SIGINT and SIGTERM. May be called more than once, on the main thread only."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before.setdefault(number, signal.signal(number, self._handle))

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def one_line(self, at_once: str) -> Iterator[None]:
        """Turn the error that ends the work after a signal into one line and exit code 128 plus its number.

        `at_once` ends the line after a second signal. Errors without a signal pass.
        """
        try:
            yield
        except TwoTowerError as error:
            if self.received is None:
                raise
            said = str(error)
            typer.echo(said if said.startswith("stopped; ") else f"stopped; {said}", err=True)
            raise typer.Exit(128 + self.received) from None
        except KeyboardInterrupt:
            typer.echo(f"stopped at once; {at_once}", err=True)
            raise typer.Exit(128 + (self.received or signal.SIGINT)) from None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        self.stop.set()
