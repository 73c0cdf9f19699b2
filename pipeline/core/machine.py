"""Tells whether two processes run on the same machine, and gives them a clock that they share."""

import contextlib
import functools
import sys
import time
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@functools.cache
def boot_id() -> str:
    """Return a text that is the same for two processes only if they run under the same kernel since the same start of
    it, also if they are in different containers. "" if this system has no such text."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return _BOOT_ID.read_text().strip()
    return ""


def uptime() -> float:
    """Return the seconds since the machine started, sleep included. Processes with the same `boot_id` can compare them,
    and nobody sets this clock."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if sys.platform == "linux" else time.monotonic()
