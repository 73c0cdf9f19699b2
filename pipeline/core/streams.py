"""Lets a process go on if a line for people cannot be written.

The disk of its log may be full, the reader of its pipe may have ended, its terminal may have hung up, or it was started
without standard streams.
"""

import contextlib
import io
import os
import select
import sys
import traceback
from typing import Any, TextIO

WAIT_MS = 1000
"""Milliseconds to wait for a reader that is slow, if the stream does not wait by itself; then the text is dropped."""
UNWRITABLE = (OSError, ValueError)
"""What a stream raises that cannot be written; ValueError if it is closed or its encoding lacks a character."""


def say(text: str, out: TextIO | None = None) -> None:
    """Print a line to `out` (default: stdout) at once. If that fails, the line is lost and nothing is raised."""
    with contextlib.suppress(*UNWRITABLE):
        print(text, file=out, flush=True)


def say_traceback(error: BaseException) -> None:
    """Print an error with its traceback to stderr. If that fails, it is lost and nothing is raised."""
    say("".join(traceback.format_exception(error)).rstrip(), sys.stderr)


def never_fail() -> None:
    """Replace stdout and stderr of this process by streams whose writes never raise: what cannot be written is dropped,
    and a character that the encoding lacks becomes an escape.

    A stream that is no file, as in tests, stays as it is.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with contextlib.suppress(AttributeError, OSError, ValueError):  # no stream, no file, or a closed one
            raw = _LastingFile(stream.fileno(), "w", closefd=False)
            with contextlib.suppress(OSError):
                stream.flush()
            lasting = io.TextIOWrapper(
                io.BufferedWriter(raw),
                encoding=stream.encoding,
                errors="backslashreplace",
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, lasting)


def open_missing() -> None:
    """Open /dev/null for each of stdin, stdout and stderr with which this process was started closed.

    Otherwise the next file or connection that is opened gets the number of that stream, and libraries that write to
    stderr write into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w", closefd=False))


class _LastingFile(io.FileIO):
    """A file that is open for writing and drops what it cannot write."""

    def write(self, data: Any, /) -> int:
        """Write the data as far as possible, and return its whole length in any case."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        with contextlib.suppress(OSError):
            while rest:
                written = super().write(rest)
                if written is None:  # the pipe does not block, and is full
                    poll = select.poll()
                    poll.register(self.fileno(), select.POLLOUT)
                    if not poll.poll(WAIT_MS):
                        break
                    continue
                rest = rest[written:]
        return size
