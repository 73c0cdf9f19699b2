"""Ends a command that fails or is stopped: the project's own errors in one line, stop signals and exit codes."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import typer

from model.errors import TwoTowerError
from pipeline.core.limits import is_limit, limit_text
from pipeline.core.text import one_line


@contextlib.contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Turn the project's own errors into one line on stderr, with their advice below it, and exit code 1.

    So is an error of the machine: no more processes, threads or memory are allowed. With `debug` they keep their
    traceback, as all other errors do, because those are bugs.
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
    except (MemoryError, OSError, RuntimeError) as error:
        if debug or not is_limit(error):
            raise
        typer.echo(f"error: {limit_text(error)}; what is saved stays: then run it again", err=True)
        raise typer.Exit(1) from None


class StopSignals:
    """A handler that sets `stop` on the first SIGINT, SIGTERM or SIGHUP. A second SIGINT or SIGTERM raises
    KeyboardInterrupt.

    SIGHUP, which says that the terminal is gone, is left alone if it is ignored already, as under `nohup`. It never
    counts as the second signal: shells, the kernel and systemd may all send it, some of them beside SIGTERM, and nobody
    who is impatient sends it.

    `install` is called before Ray starts and again after it, because ray.init() installs a handler of its own. The end
    of the `with` block restores the handlers that were there before.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.received: int | None = None
        """The number of the first signal; None if there was none."""
        self._impatient = False  # whether the next SIGINT or SIGTERM is the second one
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "StopSignals":
        return self

    def install(self) -> None:
        """Install the handler for SIGINT, SIGTERM and, unless it is ignored, SIGHUP. May be called more than once, on
        the main thread only."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            ignored = number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN
            if number in self._before or not ignored:  # the first call decides, because Ray may change it later
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
        if number != signal.SIGHUP:
            if self._impatient:
                raise KeyboardInterrupt
            self._impatient = True
        if self.received is None:
            self.received = number
            self.stop.set()
