"""Tokens a second of the whole engine: AR, diffusion at a fixed number of steps a block, and lockstep."""

import time
from dataclasses import dataclass, replace

import torch

from model import Engine, EngineLimits, Request
from model.params import Mode
from model.stages import Flight
from model.two_tower import TwoTower
from tests.benchmarks import lockstep
from tests.benchmarks.workload import requests


@dataclass(frozen=True, slots=True)
class Rate:
    """One run."""

    what: str
    rows: int
    tokens_per_s: float
    host_share: float | None
    """Share of the time in which the device had nothing to do; None on a CPU and in lockstep."""


def rate(pair: TwoTower, rows: int, mode: Mode, steps: int, *, prompt: int, new: int, batches: int = 2) -> Rate:
    """The engine over `batches * rows` requests; steps: of every block, whatever the logits (diffusion)."""
    work = _work(pair, rows * batches, mode, steps, prompt, new)
    engine = Engine(pair, EngineLimits(max_rows=rows, max_context_tokens=prompt + new, lanes=1))
    engine.generate(work[:rows])  # compiles what is compiled at first use
    busy = _Busy(engine, pair.devices[-1])
    began = time.perf_counter()
    engine.generate(work)
    busy.wait()
    took = time.perf_counter() - began
    name = mode if mode != "diffusion" else f"diffusion, {steps} steps"
    return Rate(name, rows, len(work) * new / took, busy.idle_share(took))


def lockstep_rate(pair: TwoTower, rows: int, steps: int, *, prompt: int, new: int, batches: int = 2) -> Rate:
    """Static batches on the same forwards."""
    work = _work(pair, rows * batches, "diffusion", steps, prompt, new)
    lockstep.serve(pair, work[:rows], rows)
    began = time.perf_counter()
    lockstep.serve(pair, work, rows)
    took = time.perf_counter() - began
    return Rate(f"lockstep, {steps} steps", rows, len(work) * new / took, None)


def _work(pair: TwoTower, count: int, mode: Mode, steps: int, prompt: int, new: int) -> list[Request]:
    made = requests(count, prompt_tokens=prompt, max_new_tokens=new, vocabulary=pair.config.vocab_size, mode=mode)
    if mode != "diffusion":
        return made
    # no confidence exceeds 1: positions are committed on schedule alone
    return [
        replace(request, params=replace(request.params, confidence_threshold=1.0, steps_per_block=steps))
        for request in made
    ]


class _Busy:
    """Times each forward of an engine on the device's clock."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self._device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if device.type != "cuda":
            return
        stages, launch = engine.backend.stages, engine.backend.stages.launch

        def timed(*args: object) -> Flight:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            flight = launch(*args)  # type: ignore[arg-type]
            end.record()
            self._events.append((begin, end))
            return flight

        stages.launch = timed  # type: ignore[method-assign, assignment]

    def wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def idle_share(self, seconds: float) -> float | None:
        if not self._events:
            return None
        return 1 - sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3 / seconds
