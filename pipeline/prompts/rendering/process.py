"""The process that renders templates: `python -m pipeline.prompts.rendering.process SECONDS`.

pipeline.prompts.renderer starts it and exchanges the messages of pipeline.prompts.rendering.frames with it over its
standard input and output.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.abc import MetaPathFinder
from typing import Any, BinaryIO

import pyarrow as pa

from pipeline.prompts.rendering.cells import CellReader
from pipeline.prompts.rendering.chat import Chat, MessagesError, read_messages
from pipeline.prompts.rendering.compiled import Template
from pipeline.prompts.rendering.frames import FRAME, LENGTH, NO_MEMORY, READY, REASON, pack_prompt, unpack_setup
from pipeline.prompts.rendering.nulls import NULLS, Null, NullError
from pipeline.prompts.setup import PromptSetup
from pipeline.prompts.values import NOT_UNICODE, CellError, Prompt, error_line, flaw_of

SEND_BYTES, SEND_SECONDS = 1 << 16, 1.0
"""Limits of the finished frames that wait to be sent. After each new frame, all of them are sent if they have more than
SEND_BYTES bytes together, or if more than SEND_SECONDS have passed since the last sending or the start of the batch.
The rest is sent at the end of the batch."""


def main() -> None:
    """Render batches until the input ends. SECONDS, the argument of the command, is the CPU time that a row may take;
    then SIGPROF ends the process."""
    sys.meta_path.insert(0, _WithoutPandas())
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


class _WithoutPandas(MetaPathFinder):
    """Hides pandas, because pyarrow makes other values of times where it is installed."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        """See MetaPathFinder. Raises ImportError for pandas."""
        del path, target
        if fullname == "pandas":
            raise ImportError(fullname)


def _serve(source: BinaryIO, out: int, row_seconds: float) -> None:
    rows = RowRenderer(unpack_setup(_receive(source)))
    # Arrow and jinja2 load some of their code on first use. This must happen before READY: the parent then limits the
    # memory.
    _warm_up()
    _send(out, FRAME.pack(READY, 0))
    while data := _receive(source):
        signal.setitimer(signal.ITIMER_PROF, row_seconds)
        with pa.ipc.open_stream(data) as stream:
            table = stream.read_all()
        frames, sent = bytearray(), time.monotonic()
        for kind, content in rows.render(table):
            frames += FRAME.pack(kind, len(content)) + content
            if len(frames) > SEND_BYTES or time.monotonic() > sent + SEND_SECONDS:
                _send(out, frames)
                frames, sent = bytearray(), time.monotonic()
            signal.setitimer(signal.ITIMER_PROF, row_seconds)
        _send(out, frames)


def _warm_up() -> None:
    table = pa.table({"a": ["x"]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    with pa.ipc.open_stream(sink.getvalue()) as reader:
        CellReader(Null, escape=True).read("a", reader.read_all()["a"])


class RowRenderer:
    """Renders the template, or the chat template, of a setup for the rows of tables."""

    def __init__(self, setup: PromptSetup) -> None:
        self._template, self._columns, self._null = Template(setup), setup.columns, NULLS[setup.nulls]
        self._chat = None if setup.chat is None else Chat(setup.chat, self._template.tokens, self._template.marks)
        self._name = "template" if setup.chat is None else "chat template"
        self._reader = CellReader(self._null, escape=bool(self._template.marks))

    def render(self, table: pa.Table) -> Iterator[tuple[int, bytes]]:
        """Yield the kind and the content of the frame of each row."""
        columns = [self._reader.read(name, table[name]) for name in self._columns]
        flawed = any(isinstance(cell, CellError) for cells in columns for cell in cells)
        for cells in zip(*columns, strict=True):
            try:
                if flawed:
                    self._check(cells)
                prompt = self._prompt(cells)
                reason = flaw_of(prompt.text)
                frame = pack_prompt(prompt) if reason is None else (REASON, reason.encode())
            except MemoryError:
                raise
            except UnicodeEncodeError:
                frame = REASON, NOT_UNICODE.encode()
            except _UnusableError as error:
                frame = REASON, str(error).encode()
            except Exception as error:  # a template is the user's code: it can raise anything, and only its row fails
                frame = REASON, f"{self._name}: {self._said(error)}{self._null_columns(error, cells)}".encode()
            yield frame

    def _check(self, cells: Sequence[Any]) -> None:
        for name, cell in zip(self._columns, cells, strict=True):
            if isinstance(cell, CellError):
                raise _UnusableError(f"column '{name}' {cell.reason}")

    def _prompt(self, cells: Sequence[Any]) -> Prompt:
        if self._chat is None:
            return self._template.render(dict(zip(self._columns, cells, strict=True)))
        (column,) = self._columns
        try:
            messages = read_messages(column, cells[0], self._null, self._template.marks)
        except MessagesError as error:
            raise _UnusableError(f"column '{column}' {error}") from None
        return self._template.render(self._chat.values(messages))

    def _said(self, error: Exception) -> str:
        """Return the error's text, in which control tokens are spelled out."""
        said: str = self._template.marks.spelled(error_line(error))
        return said

    def _null_columns(self, error: Exception, cells: Sequence[Any]) -> str:
        """Return a text that names the columns with null cells, which may be the cause of an error that does not."""
        if isinstance(error, NullError) or "Null" not in str(error):  # the error is about something else
            return ""
        named = [f"column '{name}'" for name, cell in zip(self._columns, cells, strict=True) if isinstance(cell, Null)]
        return f" (null in this row: {', '.join(named)})" if named else ""


class _UnusableError(ValueError):
    """A row has no usable prompt, for the reason that is the message."""


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
