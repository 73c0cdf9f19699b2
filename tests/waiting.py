"""Lets tests wait for a condition instead of a fixed time, with a deadline that only a test that hangs reaches."""

import subprocess
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
PATIENCE_S = 240.0
"""The seconds after which a wait fails. A busy machine may take many times as long as an idle one. The limit is below
pytest's timeout, so that the message of the wait is shown and not that of pytest."""
PAUSE_S = 0.02
"""The seconds between two looks at a condition."""


def wait_until(met: Callable[[], T], said: Callable[[], object] | None = None, pause_s: float = PAUSE_S) -> T:
    """Call `met` again and again until its result is true, and return the result.

    Raises AssertionError after PATIENCE_S. Its message has the result of `said`, such as a log, or without `said` the
    last result of `met`.
    """
    deadline = time.monotonic() + PATIENCE_S
    while not (found := met()):
        if time.monotonic() >= deadline:
            raise AssertionError(f"the condition was not met within {PATIENCE_S:g} s: {said() if said else found!r}")
        time.sleep(pause_s)
    return found


def wait_for(process: "subprocess.Popen[str]", met: Callable[[], T]) -> T:
    """Wait like `wait_until` for something that a process does. The process must have been started with stdout=PIPE.

    Raises AssertionError with the process's output if the process ends before the condition is met, or after
    PATIENCE_S, when the process is killed.
    """

    def look() -> T:
        ended = process.poll() is not None  # checked first, so that what the process did just before its end counts
        found = met()
        assert found or not ended, f"the process ended with exit code {process.returncode}: {last_words(process)}"
        return found

    return wait_until(look, lambda: last_words(process))


def last_words(process: "subprocess.Popen[str]") -> str:
    """Kill the process if it still runs, and return what it has printed to stdout and nobody has read yet."""
    process.kill()
    return process.communicate()[0]
