"""How a command ends when it does not end well: our own errors in one line, stop signals, exit codes."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import typer

from model.errors import TwoTowerError


@contextlib.contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Our own errors become one line on stderr and exit code 1; all others are faults of ours and keep a traceback."""
    try:
        yield
    except TwoTowerError as error:
        if debug:
            raise
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


class StopSignals:
    """SIGINT and SIGTERM set `stop`; a second one interrupts at once.

    `install` is called before Ray starts and again after it, because ray.init() puts a handler of its own in place.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.received: int | None = None
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> "StopSignals":
        return self

    def install(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before.setdefault(number, signal.signal(number, self._handle))

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def one_line(self, at_once: str) -> Iterator[None]:
        """Makes what ends the work after a signal one line and its exit code; `at_once`: after a second signal."""
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
