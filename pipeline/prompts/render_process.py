"""The process that renders templates: `python -m pipeline.prompts.render_process SECONDS`.

pipeline.prompts.renderer starts it and exchanges these messages with it over its standard input and output:

in    the template, then record batches as Arrow streams, each preceded by its length in bytes
out   READY, then one frame for each row: PROMPT with the prompt, or REASON with the reason why there is none
"""

import os
import signal
import struct
import sys
import time
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa

from pipeline.prompts.template import Template
from pipeline.prompts.values import CellError, error_line, judge, read_cells

SEND_BYTES, SEND_SECONDS = 1 << 16, 1.0
"""Limits of the finished frames that wait to be sent. After each new frame, all of them are sent if they have more than
SEND_BYTES bytes together, or if more than SEND_SECONDS have passed since the last sending or the start of the batch.
The rest is sent at the end of the batch."""
LENGTH, FRAME = struct.Struct("<Q"), struct.Struct("<BQ")
"""The head of a message to the process (length in bytes), and of a frame from it (kind, length in bytes)."""
READY, PROMPT, REASON = range(3)
"""The kinds of frames."""
NO_MEMORY = 3
"""The exit status of the process if it runs out of memory."""


def main() -> None:
    """Render batches until the input ends. SECONDS, the argument of the command, is the CPU time that a row may take;
    then SIGPROF ends the process."""
    out = os.dup(1)
    os.dup2(2, 1)  # what a library prints goes to stderr and not among the frames
    # With the default action, this signal ends the process even in the middle of a long call into C.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    try:
        _serve(sys.stdin.buffer, out, float(sys.argv[1]))
    except MemoryError:
        os._exit(NO_MEMORY)
    except BrokenPipeError:  # the parent has closed the pipe
        os._exit(0)


def _serve(source: BinaryIO, out: int, row_seconds: float) -> None:
    template = Template(_receive(source).decode())
    # Arrow and jinja2 load some of their code on first use. This must happen before READY: the parent then limits the
    # memory.
    table = pa.table({"a": ["x"]})
    _serialised(table)
    _send(out, FRAME.pack(READY, 0))
    while data := _receive(source):
        signal.setitimer(signal.ITIMER_PROF, row_seconds)
        with pa.ipc.open_stream(data) as stream:
            table = stream.read_all()
        frames, sent = bytearray(), time.monotonic()
        for kind, text in _render(template, table):
            frames += FRAME.pack(kind, len(text)) + text
            if len(frames) > SEND_BYTES or time.monotonic() > sent + SEND_SECONDS:
                _send(out, frames)
                frames, sent = bytearray(), time.monotonic()
            signal.setitimer(signal.ITIMER_PROF, row_seconds)
        _send(out, frames)


def _serialised(table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    with pa.ipc.open_stream(sink.getvalue()) as reader:
        read_cells(reader.read_all()["a"])


def _render(template: Template, table: pa.Table) -> Iterator[tuple[int, bytes]]:
    columns = [read_cells(table[name]) for name in template.columns]
    for cells in zip(*columns, strict=True):
        bad = [(name, cell) for name, cell in zip(template.columns, cells, strict=True) if isinstance(cell, CellError)]
        if bad:
            name, cell = bad[0]
            yield REASON, f"column '{name}' {cell.reason}".encode()
            continue
        try:
            text = template.render(cells)
        except MemoryError:
            raise
        except Exception as error:  # a template is the user's code: it can raise anything, and only its row fails
            yield REASON, f"template: {error_line(error)}".encode()
            continue
        prompt, reason = judge(text)
        yield (PROMPT, prompt.encode()) if prompt is not None else (REASON, (reason or "").encode())


def _receive(source: BinaryIO) -> bytes:
    """Return the next message without its length; empty bytes at the end of the input."""
    head = source.read(LENGTH.size)
    return source.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def _send(out: int, data: bytes | bytearray) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(out, view) :]


if __name__ == "__main__":
    main()
