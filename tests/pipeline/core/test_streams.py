"""Tests of streams that cannot be written: what is printed there is lost, and nothing is raised."""

import io
import logging
import os
import sys
from collections.abc import Iterator

import pytest
from rich.console import Console

from pipeline.core.streams import never_fail, say, say_traceback
from pipeline.monitoring.logs import LOG, log
from pipeline.monitoring.progress import BarDisplay, Display, JsonDisplay, LineDisplay, Progress


class FullDisk(io.StringIO):
    """A stream on a full disk."""

    def write(self, _text: str, /) -> int:
        raise OSError(28, "No space left on device")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def latin() -> io.TextIOWrapper:
    """Return a stream whose encoding lacks the characters of a progress line."""
    return io.TextIOWrapper(io.BytesIO(), encoding="ascii")


STREAMS = {"full": FullDisk, "closed": closed, "ascii": latin}


@pytest.fixture(params=STREAMS)
def stream(request: pytest.FixtureRequest) -> Iterator[io.TextIOBase]:
    handlers, level = LOG.handlers[:], LOG.level
    yield STREAMS[request.param]()
    LOG.handlers[:] = handlers
    LOG.setLevel(level)


@pytest.mark.parametrize("make", [LineDisplay, JsonDisplay, lambda out: BarDisplay(Console(file=out, width=80))])
def test_a_display_that_cannot_be_written_raises_nothing(make: type, stream: object) -> None:
    display: Display = make(stream)
    display.show(Progress("1 · 2", 1, 2))
    display.tell("…")
    display.close()


def test_a_line_that_cannot_be_written_raises_nothing(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    say("1 · 2", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    say_traceback(ValueError("…"))
    JsonDisplay(stream)
    log((logging.INFO, "…", {}))


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_the_streams_of_a_process_drop_what_cannot_be_written(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes to a pipe arrive while it has a reader, in its encoding or as escapes, and raise nothing after that."""
    reader, writer = os.pipe()
    for each in ("stdout", "stderr"):
        monkeypatch.setattr(sys, each, os.fdopen(writer, "w", encoding="ascii", closefd=False))
    never_fail()
    stream = getattr(sys, name)
    print("a·b", file=stream, flush=True)
    assert os.read(reader, 100) == b"a\\xb7b\n"
    os.close(reader)
    print("lost", file=stream, flush=True)
    os.close(writer)
    print("lost", file=stream, flush=True)  # the descriptor is closed, too


def test_a_pipe_that_does_not_block_drops_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that share a pipe may have set it so. Its reader is stopped."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    monkeypatch.setattr("pipeline.core.streams.WAIT_MS", 1)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writer, "w", closefd=False))
    never_fail()
    print("x" * 1_000_000, flush=True)
    assert 0 < len(os.read(reader, 2_000_000)) < 1_000_000
    print("here", flush=True)
    assert os.read(reader, 2_000_000).endswith(b"here\n")
    os.close(reader)
    os.close(writer)
