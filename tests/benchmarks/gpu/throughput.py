"""Measures tokens per second of the whole engine: AR, diffusion at fixed steps per block, lockstep, two stages."""

import gc
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch

from model import Completion, Engine, EngineLimits, Request
from model.checkpoint.config import TwoTowerConfig
from model.engine.model_runner import ModelRunner
from model.network.random_weights import random_pair
from model.network.two_tower import TwoTower
from model.requests import Mode
from model.runtime.stages import Flight
from tests.benchmarks import lockstep
from tests.benchmarks.workload import requests


@dataclass(frozen=True, slots=True)
class Rate:
    """The figures of one run."""

    what: str
    rows: int
    tokens_per_s: float
    host_share: float | None = None
    """Share of the time in which the device had nothing to do; None on a CPU and in lockstep."""
    host_ms: float | None = None
    """Milliseconds of a turn of the loop without waiting for the device; on a CPU the forwards are included."""
    planned: int | None = None
    """Bytes in the memory plan: weights, states, keys and values, forwards."""
    peak: int | None = None
    """The most bytes that torch had allocated; None on a CPU."""


def rate(pair: TwoTower, rows: int, mode: Mode, steps: int, *, prompt: int, new: int, batches: int = 2) -> Rate:
    """Run the engine over `batches * rows` requests. In diffusion every block takes `steps` steps."""
    name = mode if mode != "diffusion" else f"diffusion, {steps} steps"
    return run(pair, name, work_for(pair, rows * batches, mode, steps, prompt, new), rows, prompt + new, lanes=1)[0]


def run(
    pair: TwoTower, name: str, work: Sequence[Request], rows: int, context: int, lanes: int
) -> tuple[Rate, list[Completion]]:
    """Run the requests through an engine of `rows` rows, after a first batch of them that is not measured."""
    cuda = {device for device in pair.devices if device.type == "cuda"}
    for device in cuda:
        torch.cuda.reset_peak_memory_stats(device)
    engine = Engine(pair, EngineLimits(max_rows=rows, max_context_tokens=context, lanes=lanes))
    engine.generate(work[:rows])  # compiles kernels at their first use
    with _Watch(engine) as watch:
        began = time.perf_counter()
        completions = engine.generate(work)
        for device in cuda:
            torch.cuda.synchronize(device)
        took = time.perf_counter() - began
    plan = engine.memory
    planned = sum(one.weights + one.free - one.left(plan.max_rows, plan.kv_tokens) for one in plan.devices)
    tokens = sum(len(completion.token_ids) for completion in completions)
    return Rate(
        name,
        rows,
        tokens / took,
        host_share=watch.idle_share(took) if cuda else None,
        host_ms=watch.host_ms,
        planned=planned,
        peak=sum(torch.cuda.max_memory_allocated(device) for device in cuda) or None,
    ), completions


def lockstep_rate(pair: TwoTower, rows: int, steps: int, *, prompt: int, new: int, batches: int = 2) -> Rate:
    """Run static batches in lockstep on the same forwards."""
    work = work_for(pair, rows * batches, "diffusion", steps, prompt, new)
    lockstep.serve(pair, work[:rows], rows)
    began = time.perf_counter()
    lockstep.serve(pair, work, rows)
    took = time.perf_counter() - began
    return Rate(f"lockstep, {steps} steps", rows, len(work) * new / took)


def two_stages(config: TwoTowerConfig, device: torch.device, rows: int, **length: int) -> dict[str, Any]:
    """Compare the same weights as one stage and as two on one device, on the same requests.

    Returns the rates and how many rows differ. With one lane both compute the same forwards, so no row may differ. With
    two lanes, by which stages overlap, a row is computed together with other rows, so rounding can change its tokens.
    """
    found: dict[str, Any] = {"rows": rows}
    right: list[Completion] = []
    for stages, lanes in ((1, 1), (2, 1), (2, 2)):
        pair = random_pair(config, torch.bfloat16, [device] * stages)
        work = work_for(pair, 2 * rows, "diffusion", 5, length["prompt"], length["new"])
        what = f"{stages} stage(s), {lanes} lane(s)"
        measured, completions = run(pair, what, work, rows, length["prompt"] + length["new"], lanes)
        right = right or completions
        differ = sum(a.token_ids != b.token_ids for a, b in zip(completions, right, strict=True))
        found[what] = {"tokens_per_s": measured.tokens_per_s, "rows_that_differ": differ, "of": len(work)}
        del pair
        gc.collect()  # before the next model is created
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def work_for(pair: TwoTower, count: int, mode: Mode, steps: int, prompt: int, new: int) -> list[Request]:
    made = requests(count, prompt_tokens=prompt, max_new_tokens=new, vocabulary=pair.config.vocab_size, mode=mode)
    if mode != "diffusion":
        return made
    # no confidence exceeds 1: positions are committed only by the schedule
    return [
        replace(request, params=replace(request.params, confidence_threshold=1.0, steps_per_block=steps))
        for request in made
    ]


class _Watch:
    """Measures an engine while it runs: seconds of forwards, of turns, and of waiting for the device in turns."""

    def __init__(self, engine: Engine) -> None:
        self.flights: list[Flight] = []
        self.turns = 0
        self.turning = self.waiting = 0.0
        assert isinstance(engine.backend, ModelRunner)
        stages = engine.backend.stages
        launch, step, wait = stages.launch, engine.step, Flight.wait

        def launched(*args: Any) -> Flight:
            self.flights.append(launch(*args))
            return self.flights[-1]

        def stepped() -> list[Completion]:
            began = time.perf_counter()
            completions = step()
            self.turning += time.perf_counter() - began
            self.turns += 1
            return completions

        def waited(flight: Flight) -> Any:
            began = time.perf_counter()
            try:
                return wait(flight)
            finally:
                self.waiting += time.perf_counter() - began

        self._stack = ExitStack()
        self._patches: list[AbstractContextManager[object]] = [
            patch.object(stages, "launch", launched),
            patch.object(engine, "step", stepped),
            patch.object(Flight, "wait", waited),
        ]

    def __enter__(self) -> "_Watch":
        for one in self._patches:
            self._stack.enter_context(one)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def idle_share(self, seconds: float) -> float:
        """Return the share of `seconds` in which the device was idle."""
        return 1 - sum(flight.seconds for flight in self.flights) / seconds

    @property
    def host_ms(self) -> float:
        """The milliseconds of a turn, without waiting for the device."""
        return (self.turning - self.waiting) / self.turns * 1e3
