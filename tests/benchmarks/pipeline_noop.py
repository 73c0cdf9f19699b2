"""Makes replicas whose engine computes nothing; a module of its own, so that they do not import Ray Data."""

from collections import deque
from dataclasses import dataclass

from model.requests import Completion, GenerationParams, Request
from tests.workers.fakes import FakeEncoder
from workers.replica.build import ReplicaSpec
from workers.units.runner import UnitRunner

MAX_ROWS = 256
TEXT, TOKENS = "a completion", (5, 6, 7)


class NoOpEngine:
    """An engine that ends MAX_ROWS rows per step, all with the same completion."""

    max_rows = MAX_ROWS

    def __init__(self) -> None:
        self._queue: deque[Request] = deque()

    @property
    def waiting(self) -> int:
        """See EngineLike."""
        return len(self._queue)

    def submit(self, request: Request) -> None:
        """See EngineLike."""
        self._queue.append(request)

    def step(self) -> list[Completion]:
        """See EngineLike."""
        ended = [self._queue.popleft() for _ in range(min(MAX_ROWS, len(self._queue)))]
        return [_completion(request) for request in ended]


@dataclass(frozen=True, slots=True)
class NoOpMaker:
    """A maker of runners with this engine for the pipeline's replicas."""

    spec: ReplicaSpec

    def __call__(self, replica: str) -> UnitRunner:
        """See workers.replica.replica.MakeRunner."""
        store, flush = self.spec.open_store(replica), self.spec.job.flush
        return UnitRunner(NoOpEngine(), FakeEncoder(), store, GenerationParams(), replica=replica, flush=flush)


def _completion(request: Request) -> Completion:
    return Completion(
        key=request.key,
        token_ids=TOKENS,
        text=TEXT,
        finish_reason="stop",
        prompt_tokens=len(request.prompt_ids),
        latency_s=0.0,
    )
