"""Provides hand-written stand-ins for the model: an engine without weights, a byte tokenizer, and a runner of both."""

import functools
import os
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from model.errors import RequestError
from model.requests import Completion, EngineError, GenerationParams, Request
from pipeline.core.types import Row, UnitResult
from pipeline.driver.dispatcher import dispatch
from pipeline.driver.retry import RetryPolicy
from pipeline.monitoring.progress import LineDisplay
from pipeline.output.unit_store import UnitStore
from tests.waiting import PATIENCE_S, wait_until
from tests.workers.jobs import SmallJob
from workers.replica.build import ReplicaSpec
from workers.replica.local_pool import LocalPool
from workers.units.protocols import EngineLike
from workers.units.runner import UnitRunner
from workers.units.saver import Outcome

TOO_LONG = 200
"""The largest number of prompt tokens that the fake engine accepts."""


class FakeEncoder:
    """An encoder with one token per byte. A prompt of spaces has no tokens."""

    def encode(self, rows: Sequence[Row]) -> list[list[int]]:
        return [list((row.prompt or "").strip(" ").encode()) for row in rows]


class FakeEngine:
    """An engine that ends each row after 1 to 7 steps, which depends only on its key. The completion is the prompt
    reversed.

    step_s: seconds that a step takes once the engine has finished `free_rows` rows. A test that interrupts an engine
    needs both: some rows are finished soon, and the rest is not done before the interruption, even on a busy machine.
    fail_at: the steps, counted from 1, whose rows are lost to an EngineError.
    """

    def __init__(
        self, max_rows: int = 4, step_s: float = 0.0, fail_at: Container[int] = (), free_rows: int = 0
    ) -> None:
        self.max_rows, self.step_s, self.fail_at, self.free_rows = max_rows, step_s, fail_at, free_rows
        self.before_step: Callable[[], object] | None = None
        """A function that is called before each step, for tests that need events in a certain order."""
        self.ended = 0
        """The number of rows that have ended."""
        self.queue: deque[Request] = deque()
        self.slots: dict[str, tuple[Request, int]] = {}
        self.steps = 0
        self.most_waiting = 0
        self.short_steps = 0
        """The number of steps with a free slot."""
        self.order: deque[str] = deque(maxlen=1000)
        self.prefixes: Counter[tuple[int, ...]] = Counter()
        """The number of rows by the prefix that they named."""

    @property
    def waiting(self) -> int:
        return len(self.queue)

    @property
    def active(self) -> int:
        return len(self.slots)

    def submit(self, request: Request) -> None:
        assert request.key not in self.slots, f"{request.key} is in the engine"
        if len(request.prompt_ids) > TOO_LONG:
            raise RequestError(f"{len(request.prompt_ids)} prompt tokens exceed {TOO_LONG}")
        self.queue.append(request)
        self.most_waiting = max(self.most_waiting, len(self.queue))
        self.order.append(request.key)
        self.prefixes[tuple(request.prompt_ids[: request.prefix_tokens])] += 1

    def step(self) -> list[Completion]:
        if self.before_step:
            self.before_step()
        self.steps += 1
        if self.step_s and self.ended >= self.free_rows:
            time.sleep(self.step_s)
        while self.queue and len(self.slots) < self.max_rows:
            request = self.queue.popleft()
            self.slots[request.key] = request, 1 + crc32(request.key.encode()) % 7
        self.short_steps += len(self.slots) < self.max_rows
        done = []
        for key, (request, left) in list(self.slots.items()):
            if left > 1:
                self.slots[key] = request, left - 1
                continue
            del self.slots[key]
            done.append(_complete(request))
        self.ended += len(done)
        if self.steps in self.fail_at:
            lost = tuple(self.slots)
            self.slots.clear()
            raise EngineError("the forward failed", lost, tuple(done))
        return done


def _complete(request: Request) -> Completion:
    ids = tuple(reversed(request.prompt_ids))
    return Completion(
        key=request.key,
        token_ids=ids,
        text=bytes(ids).decode(errors="replace"),
        finish_reason="length",
        prompt_tokens=len(ids),
        denoiser_forwards=3,
        steps_per_block=(3,),
        latency_s=0.5,
    )


@dataclass(frozen=True)
class Turns:
    """Puts the first steps of engines in different processes in order. It is called before each step.

    A replica that is a key of `after` makes no step before the replica that is its value has come to its first step.
    Two replicas that name each other begin together.
    """

    folder: Path
    """A folder that is empty at first, and gets a file for each replica that has come to its first step."""
    after: Mapping[str, str]

    def __call__(self, replica: str) -> None:
        (self.folder / replica).touch()
        if (other := self.after.get(replica)) is not None:
            wait_until((self.folder / other).exists)


@dataclass(frozen=True)
class Gate:
    """Holds engines up until a file exists. It is called before each step."""

    file: Path

    def __call__(self, _replica: str) -> None:
        wait_until(self.file.exists)


class FakeMaker:
    """Makes runners with a fake engine. It can be pickled, so that Ray actors can make their own runners.

    trace: a folder in which each runner leaves a file, named after its replica, with its process id and GPUs. step_s,
    free_rows: see FakeEngine; engines of replicas that replace a lost one are never slow. before_step: a function that
    is called before each step of each engine, with the replica's name.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        trace: Path | None = None,
        step_s: float = 0.0,
        max_rows: int = 4,
        free_rows: int = 0,
        before_step: Callable[[str], object] | None = None,
    ) -> None:
        self.spec, self.trace, self.step_s, self.max_rows = spec, trace, step_s, max_rows
        self.free_rows, self.before_step = free_rows, before_step
        self.on_start: Callable[[str], None] | None = None

    def __call__(self, replica: str) -> UnitRunner:
        if self.on_start:
            self.on_start(replica)
        if self.trace:
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            write_at_once(self.trace / replica, f"{os.getpid()} {gpus}")
        engine = self.make_engine(replica)
        if self.before_step:
            engine.before_step = functools.partial(self.before_step, replica)
        return UnitRunner(
            engine,
            FakeEncoder(),
            self.spec.open_store(replica),
            GenerationParams(),
            replica=replica,
            flush=self.spec.job.flush,
        )

    def make_engine(self, replica: str) -> FakeEngine:
        """Make the engine of a replica. r0.2 is the replica that replaces r0."""
        return FakeEngine(self.max_rows, **self.pace(replica))

    def pace(self, replica: str) -> dict[str, Any]:
        """Return the arguments that set the speed of a replica's engine."""
        return {"step_s": 0.0 if "." in replica else self.step_s, "free_rows": self.free_rows}


def write_at_once(file: Path, text: str) -> None:
    """Write a file that is never there without its content, for readers that wait until it exists."""
    hidden = file.parent.with_name(f"{file.parent.name}-{file.name}")
    hidden.write_text(text)
    hidden.replace(file)


def run_locally(small: SmallJob, pool: LocalPool, attempts: int = 3) -> dict[str, UnitResult]:
    """Run the job on this pool in this process. Return what was published, by unit id. Raises JobFailed if the job
    fails."""
    hear = LineDisplay(sys.stderr).hear
    try:
        return dispatch(small.plan.units, {}, pool, RetryPolicy(attempts, 0.1), threading.Event(), hear)
    finally:
        pool.close()


def make_runner(small: SmallJob, engine: EngineLike, store: UnitStore | None = None, replica: str = "r0") -> UnitRunner:
    """Make a runner with this engine for the units of the job."""
    store = store or small.spec.open_store(replica)
    params, flush = GenerationParams(), small.job.flush
    return UnitRunner(engine, FakeEncoder(), store, params, replica=replica, flush=flush)


def work_on(runner: UnitRunner) -> list[Outcome]:
    """Work until at least one of the runner's units is finished, for PATIENCE_S seconds at most."""
    deadline = time.monotonic() + PATIENCE_S
    while not (outcomes := runner.work(0.5)):
        assert time.monotonic() < deadline
    return outcomes


def work_all(runner: UnitRunner) -> list[Outcome]:
    """Work until the runner's units are finished, for PATIENCE_S seconds at most, and close it. Return the outcomes."""
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + PATIENCE_S
    while runner.busy:
        assert time.monotonic() < deadline
        outcomes += runner.work(0.5)
    runner.close()
    return outcomes
