"""How tests wait: for what they need, not for a while, and with a deadline that only what hangs comes to."""

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 240.0
"""A machine may be busy with other work: what takes a second alone takes many there. It is below pytest's own limit, so
that the message of the test is seen and not that of pytest."""
PAUSE_S = 0.02


def wait_until(met: Callable[[], T], said: Callable[[], object] | None = None, pause_s: float = PAUSE_S) -> T:
    """Return what `met` gives, as soon as that is true. Fails after PATIENCE_S, with what `said`
    gives, such as a log."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := met()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"it has not come within {PATIENCE_S:g} s: {said() if said else found!r}")
        time.sleep(pause_s)
    return found


def wait_for(process: "subprocess.Popen[str]", met: Callable[[], T]) -> T:
    """As wait_until, of something that a process brings about, whose output is a pipe. Fails at once where it has
    ended, and shows what it printed."""

    def look() -> T:
        ended = process.poll() is not None  # asked first: what it did last of all still counts
        found = met()
        assert found or not ended, f"it ended with {process.returncode}: {last_words(process)}"
        return found

    return wait_until(look, lambda: last_words(process))


def last_words(process: "subprocess.Popen[str]") -> str:
    """All that a process printed, which is killed where it still runs."""
    process.kill()
    return process.communicate()[0]
