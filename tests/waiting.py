"""Lets tests wait for a condition instead of a fixed time, with a deadline that only a hanging test reaches."""

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 240.0
"""Seconds until a wait fails. A busy machine may take many times as long as an idle one. The limit is below pytest's
own, so that the test's message is shown and not that of pytest."""
PAUSE_S = 0.02


def wait_until(met: Callable[[], T], said: Callable[[], object] | None = None, pause_s: float = PAUSE_S) -> T:
    """Call `met` until its result is true, and return that.

    Raises AssertionError after PATIENCE_S, with the result of `said`, such as a log.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not (found := met()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"it has not come within {PATIENCE_S:g} s: {said() if said else found!r}")
        time.sleep(pause_s)
    return found


def wait_for(process: "subprocess.Popen[str]", met: Callable[[], T]) -> T:
    """Wait like `wait_until` for something that a process does. The process's output is a pipe.

    Raises AssertionError with that output if the process ends before the condition holds.
    """

    def look() -> T:
        ended = process.poll() is not None  # checked first, so that what the process did just before its end counts
        found = met()
        assert found or not ended, f"it ended with {process.returncode}: {last_words(process)}"
        return found

    return wait_until(look, lambda: last_words(process))


def last_words(process: "subprocess.Popen[str]") -> str:
    """Kill the process if it still runs, and return all that it printed."""
    process.kill()
    return process.communicate()[0]
