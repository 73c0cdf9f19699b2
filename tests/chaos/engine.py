"""Provides an engine without weights: the real loop and scheduler over a backend that makes up completions.

A completion depends only on the row's key, prompt and seed, as in the real engine, so that a test can check that faults
change no row. Some prompts crash the process, and a flag makes every forward fail (tests.chaos.sabotage). Each process
writes what it does to a log of its own, which survives a kill -9.
"""

import ctypes
import functools
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from model.engine.backend import Batch, BlockReport
from model.engine.loop import Loop
from model.engine.scheduler import Scheduler
from model.engine.sequence import ActiveRow
from model.errors import RequestError
from model.requests import Completion, GenerationParams, Request
from model.runtime.page_allocator import PREFIX_SLOTS, PageAllocator
from pipeline.core.types import Row
from tests.chaos import sabotage
from workers.replica.build import ReplicaSpec
from workers.units.runner import UnitRunner

BLOCK, EOS, MAX_TOKENS = 16, 0, 48
TOO_LONG = 400
"""The largest number of prompt tokens that the engine accepts."""
MAX_ROWS, PAGES, PREFILL_TOKENS = 64, 4096, 4096
MARK = "kill the process by "
KILLERS = ("exit", "kill", "fault")
"""A prompt that begins with MARK and one of these words ends the process that generates it."""


class Encoder:
    """An encoder that makes one token of each byte."""

    def encode(self, rows: Sequence[Row]) -> list[list[int]]:
        """See EncoderLike."""
        return [list((row.prompt or "").encode()) for row in rows]


@dataclass(frozen=True, slots=True)
class Story:
    """The completion that the backend makes up for one request."""

    tokens: tuple[int, ...]
    """Tokens for all blocks of the row: letters, and an EOS if the text ends before the last one."""
    steps: tuple[int, ...]
    """The number of denoiser forwards that each block takes."""
    confidences: tuple[float, ...]

    @classmethod
    def of(cls, request: Request) -> "Story":
        """Return the story of a request, which depends only on its seed, key and prompt."""
        rng = random.Random(repr((request.sampling_key, bytes(request.prompt_ids))))
        blocks = -(-request.params.max_new_tokens // BLOCK)
        tokens = [rng.randrange(97, 123) for _ in range(blocks * BLOCK)]
        if (end := rng.randrange(1, 2 * len(tokens))) < len(tokens):
            tokens[end] = EOS
        steps = tuple(rng.randrange(1, 5) for _ in range(blocks))
        return cls(tuple(tokens), steps, tuple(rng.random() for _ in tokens))


@dataclass(slots=True)
class Forward:
    """A launched forward, which has its result at once: the reports on the blocks that it completes."""

    reports: Sequence[BlockReport] = ()
    seconds: float = 0.0

    def result(self) -> Sequence[BlockReport]:
        """See model.engine.backend.Launched."""
        return self.reports


class Backend:
    """A backend of model.engine.loop.Loop that plays the stories of the rows. It has only rows in mode diffusion."""

    def __init__(self, slots: PageAllocator, crash: Callable[[str], None] | None) -> None:
        """Set up the backend.

        `crash`, if given, is called with the start of the row's prompt for each completed block. It may end the
        process.
        """
        self.slots, self.crash = slots, crash
        self.forwards = 0
        """The denoiser forwards, each counted once for every row that took part in it."""
        self._stories: dict[str, Story] = {}
        self._taken: dict[ActiveRow, int] = {}  # forwards of the row's current block so far

    def add_slots(self, count: int) -> None:
        """See model.engine.backend.Backend."""
        self.slots.add_slots(count)

    def enter(self, rows: Sequence[ActiveRow]) -> None:
        """See model.engine.backend.Backend."""
        for row in rows:
            self._stories[row.request.key] = Story.of(row.request)

    def begin(self, rows: Sequence[ActiveRow], ar_tokens: int = 1) -> None:
        """See model.engine.backend.Backend."""
        del ar_tokens
        for row in rows:
            self._taken[row] = 0

    def extend(self, batch: Batch, fill: Sequence[ActiveRow]) -> Forward:
        """See model.engine.backend.Backend."""
        assert not fill, "AR rows are not made up"
        self.slots.grow([item.slot for item, _ in batch], [count for _, count in batch])
        return Forward()

    def denoise(self, rows: Sequence[ActiveRow]) -> Forward:
        """See model.engine.backend.Backend."""
        self.forwards += len(rows)
        reports = []
        for row in rows:
            self._taken[row] += 1
            if self._taken[row] >= self._needed(row):
                reports.append(self._see(row))
                if self.crash:
                    self.crash(bytes(row.request.prompt_ids[:40]).decode(errors="replace"))
        return Forward(reports)

    def _needed(self, row: ActiveRow) -> int:
        return self._stories[row.request.key].steps[len(row.tokens) // BLOCK]

    def _see(self, row: ActiveRow) -> BlockReport:
        story, start, steps = self._stories[row.request.key], len(row.tokens), self._taken.pop(row)
        tokens, confidences = list(story.tokens[start : start + BLOCK]), list(story.confidences[start : start + BLOCK])
        may_end = EOS in tokens or row.room <= BLOCK
        return BlockReport(row, BLOCK, True, may_end, False, steps, tokens, confidences)

    def forget(self, key: str) -> None:
        """Drop the story of a row that has ended."""
        del self._stories[key]

    def out_of_memory(self, error: BaseException) -> bool:
        """See model.engine.backend.Backend."""
        del error
        return False


class Log:
    """A log of one replica's process, with one line per step: time, forwards counted per row, keys of rows that ended.

    Its first line is `head`. It is written without buffers, so a killed process loses no line.
    """

    def __init__(self, path: Path, head: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(self._file, f"{head}\n".encode())

    def add(self, forwards: int, keys: Sequence[str]) -> None:
        """Write the line of a step."""
        os.write(self._file, f"{time.time():.3f} {forwards} {' '.join(keys)}\n".encode())

    def crash_if_told(self, prompt: str) -> None:
        """If the prompt begins with MARK, log `crash` and end this process in the way that the prompt names."""
        if not prompt.startswith(MARK):
            return
        os.write(self._file, b"crash\n")
        how = prompt.removeprefix(MARK).split()[0]
        if how == "exit":
            os._exit(3)
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        ctypes.string_at(0)


class Engine(Loop):
    """The engine without weights. `turn_s`: the seconds that each step waits, as if a device computed.

    Without a log, no prompt ends the process. `begin_step`, if given, is called before each step
    and may fail.
    """

    def __init__(
        self, log: Log | None = None, turn_s: float = 0.0, begin_step: Callable[[], None] | None = None
    ) -> None:
        slots = PageAllocator(MAX_ROWS + PREFIX_SLOTS, PAGES)
        self.made_up = Backend(slots, log.crash_if_told if log else None)
        super().__init__(self.made_up, Scheduler(slots, MAX_ROWS, PREFILL_TOKENS), _text)
        self._log, self._turn_s, self._begin_step = log, turn_s, begin_step

    def check_request(self, request: Request) -> None:
        """See Loop."""
        if len(request.prompt_ids) > TOO_LONG:
            raise RequestError(f"the prompt has {len(request.prompt_ids)} tokens, above {TOO_LONG}")

    def step(self) -> list[Completion]:
        """See Loop."""
        time.sleep(self._turn_s)
        if self._begin_step:
            self._begin_step()
        before = self.made_up.forwards
        done = super().step()
        for completion in done:
            self.made_up.forget(completion.key)
        if self._log:
            self._log.add(self.made_up.forwards - before, [completion.key for completion in done])
        return done


def _text(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


class Maker:
    """Makes the runners of replicas with this engine; picklable, so that it can be sent to actors.

    Each runner writes a log `<run>_<replica>_<process id>` to the folder `logs`. With `flags`, the faults of
    tests.chaos.sabotage hit the process of the runner.
    """

    def __init__(
        self, spec: ReplicaSpec, logs: Path, run: int, turn_s: float, flags: sabotage.Flags | None = None
    ) -> None:
        self.spec, self.logs, self.run, self.turn_s, self.flags = spec, logs, run, turn_s, flags

    def __call__(self, replica: str) -> UnitRunner:
        if self.flags is not None:
            sabotage.install(self.flags, Path(self.spec.job.output.path))
        log = Log(self.logs / f"{self.run}_{replica}_{os.getpid()}", f"{time.time():.3f} {_node()}")
        return UnitRunner(
            Engine(log, self.turn_s, functools.partial(self.flags.fail_if_sick, replica) if self.flags else None),
            Encoder(),
            self.spec.open_store(replica),
            params_of(self.spec),
            replica=replica,
            flush=self.spec.job.flush,
        )


def params_of(spec: ReplicaSpec) -> GenerationParams:
    """Return the job's generation settings, with the engine's EOS."""
    return spec.job.generation.params((EOS,))


def _node() -> str:
    """Return the id of the Ray node that this process runs on, or "-" without Ray."""
    if "ray" not in sys.modules:  # a local run, whose start would be slower with Ray
        return "-"
    import ray

    return str(ray.get_runtime_context().get_node_id()) if ray.is_initialized() else "-"
