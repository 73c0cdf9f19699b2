"""Hand-written stand-ins for the model: an engine without weights, a byte tokenizer, a runner made of them."""

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
from pipeline.core.types import UnitResult
from pipeline.driver.dispatcher import dispatch
from pipeline.driver.retry import RetryPolicy
from pipeline.monitoring.meter import Meter
from pipeline.monitoring.progress import LogProgress
from tests.waiting import PATIENCE_S, wait_until
from tests.workers.jobs import SmallJob
from workers.replica.build import PartStore, ReplicaSpec
from workers.replica.local_pool import LocalPool
from workers.units.protocols import EngineLike
from workers.units.runner import UnitRunner
from workers.units.saver import Outcome

TOO_LONG = 200
"""Prompt tokens that the fake engine refuses."""


class FakeTokenizer:
    """A token a byte; a prompt of spaces has none."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.strip(" ").encode()) for text in texts]


class FakeEngine:
    """Ends each row after 1 to 7 steps, depending on its key alone. The completion is the prompt reversed.

    step_s: what a step takes, once the engine has finished `free_rows` rows: so one that is to be caught at work soon
    has something to show, and is not done before whoever is to catch it has its turn on a busy machine.
    fail_at: steps, from 1, whose rows are lost to an EngineError.
    """

    def __init__(
        self, max_rows: int = 4, step_s: float = 0.0, fail_at: Container[int] = (), free_rows: int = 0
    ) -> None:
        self.max_rows, self.step_s, self.fail_at, self.free_rows = max_rows, step_s, fail_at, free_rows
        self.before_step: Callable[[], object] | None = None
        """Called before each step, for tests that put what happens in order."""
        self.ended = 0
        """Rows."""
        self.queue: deque[Request] = deque()
        self.slots: dict[str, tuple[Request, int]] = {}
        self.steps = 0
        self.most_waiting = 0
        self.short_steps = 0
        """Steps with a free slot."""
        self.order: deque[str] = deque(maxlen=1000)
        self.prefixes: Counter[tuple[int, ...]] = Counter()
        """Rows by the prefix they named."""

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
    """Puts the first steps of engines in order that are in processes of their own; called before each step.

    A replica that `after` names makes no step before that other replica has come to its first one; two that name each
    other begin together.
    """

    folder: Path
    """Empty at first; a file for each replica that has come to its first step."""
    after: Mapping[str, str]

    def __call__(self, replica: str) -> None:
        (self.folder / replica).touch()
        if (other := self.after.get(replica)) is not None:
            wait_until((self.folder / other).exists)


@dataclass(frozen=True)
class Gate:
    """Holds engines up until a file is there; called before each step."""

    file: Path

    def __call__(self, _replica: str) -> None:
        wait_until(self.file.exists)


class FakeMaker:
    """Makes runners with a fake engine; picklable, so that Ray actors can make theirs.

    `trace` is a folder in which each runner leaves a file named after its replica, holding its process id and GPUs.
    step_s, free_rows: of the engines, see FakeEngine; those of replicas that take the place of a lost one are never
    slow. before_step: called before each step of each engine, with the replica's name.
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
            FakeTokenizer(),
            PartStore(self.spec, replica),
            GenerationParams(),
            replica=replica,
            flush=self.spec.job.flush,
        )

    def make_engine(self, replica: str) -> FakeEngine:
        """The engine of a replica; r0.2 is the one that takes the place of r0."""
        return FakeEngine(self.max_rows, **self.pace(replica))

    def pace(self, replica: str) -> dict[str, Any]:
        """Arguments of an engine: how fast it is."""
        return {"step_s": 0.0 if "." in replica else self.step_s, "free_rows": self.free_rows}


def write_at_once(file: Path, text: str) -> None:
    """For readers who wait until the file is there: it is never there without its content."""
    hidden = file.parent.with_name(f"{file.parent.name}-{file.name}")
    hidden.write_text(text)
    hidden.replace(file)


def run_locally(small: SmallJob, pool: LocalPool, attempts: int = 3) -> dict[str, UnitResult]:
    """Runs the job on this pool, in this process -> what was published, by unit id. Raises JobFailed."""
    progress = LogProgress(Meter(small.plan.rows), sys.stderr)
    try:
        return dispatch(small.plan.units, {}, pool, RetryPolicy(attempts, 0.1), threading.Event(), progress)
    finally:
        pool.close()


def make_runner(small: SmallJob, engine: EngineLike, store: PartStore | None = None, replica: str = "r0") -> UnitRunner:
    """A runner of this engine for the job's units."""
    store = store or PartStore(small.spec, replica)
    params, flush = GenerationParams(), small.job.flush
    return UnitRunner(engine, FakeTokenizer(), store, params, replica=replica, flush=flush)


def work_all(runner: UnitRunner) -> list[Outcome]:
    """Works until the runner's units are finished, PATIENCE_S at most, and closes it."""
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + PATIENCE_S
    while runner.busy:
        assert time.monotonic() < deadline
        outcomes += runner.work(0.5)
    runner.close()
    return outcomes
