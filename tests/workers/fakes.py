"""Hand-written stand-ins for the model: an engine without weights, a byte tokenizer, a runner made of them."""

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from zlib import crc32

from model.errors import EngineError, RequestError
from model.params import Completion, GenerationParams, Request
from workers.build import PartStore, ReplicaSpec
from workers.unit_runner import UnitRunner

TOO_LONG = 200
"""Prompt tokens that the fake engine refuses."""


class FakeTokenizer:
    """A token a byte; a prompt of spaces has none."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.strip(" ").encode()) for text in texts]


class FakeEngine:
    """Ends each row after 1 to 7 steps, depending on its key alone. The completion is the prompt reversed."""

    def __init__(self, max_rows: int = 4, step_s: float = 0.0, fail_at_step: int | None = None) -> None:
        self.max_rows, self.step_s, self.fail_at_step = max_rows, step_s, fail_at_step
        self.queue: deque[Request] = deque()
        self.slots: dict[str, tuple[Request, int]] = {}
        self.steps = 0
        self.most_waiting = 0
        self.short_steps = 0
        """Steps with a free slot."""
        self.order: deque[str] = deque(maxlen=1000)

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

    def step(self) -> list[Completion]:
        self.steps += 1
        if self.step_s:
            time.sleep(self.step_s)
        if self.steps == self.fail_at_step:
            raise EngineError("the forward failed", keys=tuple(self.slots))
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


class FakeMaker:
    """Makes runners with a fake engine; picklable, so that Ray actors can make theirs.

    `trace` is a folder in which each runner leaves a file named after its replica, holding its process id and GPUs.
    """

    def __init__(self, spec: ReplicaSpec, trace: Path | None = None, step_s: float = 0.0, max_rows: int = 4) -> None:
        self.spec, self.trace, self.step_s, self.max_rows = spec, trace, step_s, max_rows
        self.on_start: Callable[[str], None] | None = None

    def __call__(self, replica: str) -> UnitRunner:
        if self.on_start:
            self.on_start(replica)
        if self.trace:
            gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            (self.trace / replica).write_text(f"{os.getpid()} {gpus}")
        return UnitRunner(
            FakeEngine(self.max_rows, self.step_s),
            FakeTokenizer(),
            PartStore(self.spec, replica),
            GenerationParams(),
            replica=replica,
            max_rows=self.max_rows,
        )
