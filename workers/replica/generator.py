"""Generates the rows of a preview on a replica, without saving them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from model.errors import RequestError
from model.requests import Completion, Request
from pipeline.calibration.bench import Tick
from pipeline.config.job import Job
from workers.checks.self_check import self_check
from workers.replica.build import load_pair, make_engine
from workers.replica.throughput import run_once

if TYPE_CHECKING:
    from model import Engine


class ReplicaGenerator:
    """A pipeline.preview.generator.Generator whose model and engine are in this process."""

    def __init__(self, job: Job) -> None:
        """Create a generator; this loads nothing yet."""
        self._job = job
        self._engine: Engine | None = None

    def start(self, tick: Tick) -> str:
        """See Generator. Raises what load_pair, self_check and make_engine raise."""
        tick(0, 0)
        pair, tokenizer = load_pair(self._job)
        tick(0, 0)
        checked = self_check(pair, tokenizer, self._job.model.checkpoint)
        tick(0, 0)
        self._engine = make_engine(pair, self._job)
        return checked

    def generate(self, requests: Sequence[Request], tick: Tick) -> Sequence[Completion]:
        """See Generator. Raises EngineError if a forward fails."""
        assert self._engine is not None, "not started"
        accepted: list[Request] = []
        ended: dict[str, Completion] = {}
        for request in requests:
            try:
                self._engine.check_request(request)
                accepted.append(request)
            except RequestError as error:
                count = len(request.prompt_ids)
                ended[request.key] = Completion(
                    key=request.key, finish_reason="error", error=str(error), prompt_tokens=count
                )
        ended |= {completion.key: completion for completion in run_once(self._engine, accepted, tick)}
        return [ended[request.key] for request in requests]

    def close(self) -> None:
        """See Generator."""
        self._engine = None
