"""Renders templates in a separate process, so that a bad template can fail its row but never the replica.

A row may take ROW_SECONDS of CPU time and MEMORY_BYTES of memory. If it takes more time, the operating system ends the
process; if it needs more memory, the process ends itself. The rest of the batch is then sent to a new process, one row
at a time. A row that ends the process at a limit while it is alone gets no prompt. If the process ends in another way,
the machine may be the cause, so the row is rendered once more, and gets no prompt if the process ends again. The
process also ends when its parent ends, because its input pipe closes.
"""

import os
import resource
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow as pa

from pipeline.core.errors import InputError
from pipeline.prompts.rendering.frames import FRAME, LENGTH, NO_MEMORY, REASON, pack_setup, unpack_prompt
from pipeline.prompts.setup import PromptSetup
from pipeline.prompts.template import names_in
from pipeline.prompts.values import Outcome
from pipeline.storage.storage import read_text

ROW_SECONDS = 2.0
"""The seconds of CPU time that a row may take. Waiting does not count, so a busy machine makes no difference."""
MEMORY_BYTES = 1 << 30
"""The bytes of memory that the process may take beyond those that it has when it is ready (on Linux)."""
SILENT_SECONDS = 120.0
"""The seconds of clock time without an answer after which the process is ended. This limits its start, and a row that
takes long without computing."""
ENDED_ROWS_AT_MOST = 50
"""The most rows of one unit that may end the process; with one more, the unit fails. It is small because each of
them takes seconds."""
BATCH_ROWS, BATCH_BYTES = 256, 1 << 22
"""The most rows, and about the most bytes, that are sent to the process at once."""
READ_BYTES = 1 << 20
_PASSED_ON = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
"""The environment variables that the process gets; none of them holds credentials."""


class Renderer:
    """Renders the template, or the chat template, of one setup for the rows of tables. It starts its process at the
    first row. For one thread only."""

    def __init__(self, setup: PromptSetup) -> None:
        """Raise ValueError if the template is wrong."""
        names_in(setup)
        self._setup, self._name = setup, "template" if setup.chat is None else "chat template"
        self._child: _Child | None = None

    def make(self, table: pa.Table) -> Iterator[Outcome]:
        """Yield (prompt, None) or (None, reason) for each row of a table that has the columns of the setup.

        Raises InputError if the process does not start, or if more than ENDED_ROWS_AT_MOST rows end it.
        """
        whole = False
        try:
            yield from self._make(table.select(self._setup.columns))
            whole = True
        finally:
            if not whole:  # otherwise the answers left in the pipe would be taken for those of the next rows
                self.close()

    def _make(self, table: pa.Table) -> Iterator[Outcome]:
        ended = 0
        for batch in _batches(table):
            done, alone, accused = 0, False, -1
            while done < batch.num_rows:
                if self._child is None:
                    self._child = _Child(self._setup)
                before = done
                for prompt in self._child.render(batch.slice(done, 1 if alone else None)):
                    done += 1
                    yield prompt
                why = self._child.ended
                if why is None:
                    continue
                by_itself = self._child.ended_by_itself
                self._child = None
                if alone and done == before and (by_itself or accused == done):
                    done, ended = done + 1, ended + 1
                    yield None, f"{self._name}: {why}"
                elif alone:
                    accused = done
                alone = True
                if ended > ENDED_ROWS_AT_MOST:
                    raise InputError(
                        f"{self._name}: {ended} rows of one unit could not be rendered, the last: {why}; fix it"
                    )

    def close(self) -> None:
        """End the process, if there is one."""
        if self._child is not None:
            self._child.end()
            self._child = None


class _Child:
    """A process that runs pipeline.prompts.rendering.process for one setup. When it has ended, a new one is needed."""

    def __init__(self, setup: PromptSetup) -> None:
        self.ended: str | None = None
        """The reason why the process ended, as a text that follows `template: `; None until then."""
        self.ended_by_itself = False
        """True if the process ended at its limit of CPU time or memory: then the row is the cause, not the machine."""
        root = str(Path(__file__).parents[2])
        passed = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        # Other memory pools of Arrow reserve gigabytes of address space, which count towards the limit. The fixed hash
        # seed makes sets print in the same order in every process, and the fixed zone makes times the same everywhere.
        environment = {**passed, "ARROW_DEFAULT_MEMORY_POOL": "system", "PYTHONHASHSEED": "0", "TZ": "UTC"}
        process = subprocess.Popen(
            [sys.executable, "-m", "pipeline.prompts.rendering.process", str(ROW_SECONDS)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            cwd=root,
            env=environment,
            process_group=0,  # ^C at a terminal must reach only the parent
        )
        self.end = weakref.finalize(self, _end, process)
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._in, self._out = process, process.stdin, process.stdout.fileno()
        self._poll = select.poll()
        self._poll.register(self._out, select.POLLIN)
        self._buffer = bytearray()
        if not self._send(pack_setup(setup)) or self._frame() is None:
            raise InputError(f"the process that renders templates did not start: {self._why()}")
        _limit_memory(process.pid)

    def render(self, batch: pa.RecordBatch) -> Iterator[Outcome]:
        """Yield (prompt, None) or (None, reason) for each row of the batch. If the process ends before the last row,
        the rest is missing and `ended` says why."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, batch.schema) as stream:
            stream.write_batch(batch)
        if self._send(sink.getvalue()):
            for _ in range(batch.num_rows):
                frame = self._frame()
                if frame is None:
                    break
                kind, content = frame
                yield (unpack_prompt(kind, content), None) if kind != REASON else (None, content.decode())
            else:
                return
        self.ended = self._why()

    def _send(self, data: "bytes | pa.Buffer") -> bool:
        try:
            for piece in (LENGTH.pack(len(data)), data):
                view = memoryview(piece)
                while view:
                    view = view[self._in.write(view) or 0 :]
        except BrokenPipeError:
            return False
        return True

    def _frame(self) -> tuple[int, bytes] | None:
        """Return (kind, content) of the next frame; None if the process ends or gives no answer for SILENT_SECONDS."""
        while True:
            if len(self._buffer) >= FRAME.size:
                kind, length = FRAME.unpack_from(self._buffer)
                end = FRAME.size + length
                if len(self._buffer) >= end:
                    content = bytes(memoryview(self._buffer)[FRAME.size : end])
                    del self._buffer[:end]
                    return kind, content
            if not self._poll.poll(SILENT_SECONDS * 1000):
                return None
            data = os.read(self._out, READ_BYTES)
            if not data:
                return None
            self._buffer += data

    def _why(self) -> str:
        """End the process and return the reason why it ended."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)  # its pipe closes shortly before it ends
        status = self._process.poll()
        self.ended_by_itself = status in (-signal.SIGPROF, NO_MEMORY)
        self.end()
        if status is None:
            return f"gives no answer for {SILENT_SECONDS:g} s"
        if status == -signal.SIGPROF:
            return f"takes more than {ROW_SECONDS:g} s of computing"
        if status == NO_MEMORY:
            return f"takes more than {MEMORY_BYTES >> 20} MiB of memory"
        return f"ends its process ({signal.Signals(-status).name if status < 0 else f'exit status {status}'})"


def _batches(table: pa.Table) -> Iterator[pa.RecordBatch]:
    """Yield the table in batches of at most BATCH_ROWS rows and about BATCH_BYTES bytes, but at least one row."""
    waiting = list(reversed(table.to_batches(max_chunksize=BATCH_ROWS)))
    while waiting:
        batch = waiting.pop()
        if batch.nbytes > BATCH_BYTES and batch.num_rows > 1:
            half = batch.num_rows // 2
            waiting += [batch.slice(half), batch.slice(0, half)]
        else:
            yield batch


def _limit_memory(pid: int) -> None:
    if sys.platform != "linux":
        return
    with suppress(ProcessLookupError, FileNotFoundError):  # the process has ended; the next read finds that out
        pages = int(read_text(f"/proc/{pid}/statm").split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        _, hard = resource.prlimit(pid, resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or hard > limit:
            resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
