"""Simulates many requests: with the engine's own loop on simulated devices, and as static batches in lockstep."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from model.engine.loop import Loop
from model.engine.scheduler import Scheduler, Stats
from model.requests import EngineLimits, GenerationParams, Request
from model.runtime.page_allocator import PREFIX_SLOTS, PageAllocator
from tests.benchmarks.cost_model import BLOCK, CostModel, Instant, Ints, Layout, Steps
from tests.benchmarks.roofline import Roofline, Work
from tests.benchmarks.workload import log_normal

ROWS = 256
EXTEND_EVERY = EngineLimits().extend_every
KV_TOKENS = 1 << 20
MAX_PREFILL_TOKENS = 4096
UNIT = 10_000  # rows of a work unit, which is sorted by length before its rows are submitted
PROMPT = {"median": 300, "p99": 4000, "longest": 16_384}
COMPLETION = {"median": 128, "p99": 600, "longest": 2048}


@dataclass(frozen=True, slots=True)
class Simulated:
    """The rates of a simulated run."""

    tokens_per_s: float
    """Completion tokens per simulated second."""
    busy: tuple[float, ...]
    """The share of the time that each device computed."""
    seconds: float
    """Simulated seconds of the whole run."""
    host_seconds: float = 0.0
    """Seconds that the simulation itself took on this machine."""


@dataclass(frozen=True, slots=True)
class Mix:
    """The lengths of requests in the order of submission: units of 10,000, longest prompts first."""

    prompts: Ints
    completions: Ints

    @classmethod
    def draw(cls, count: int, *, unit: int = UNIT, seed: int = 0) -> "Mix":
        """Draw the lengths of `count` requests; with unit 1 they stay in the order of arrival."""
        rng = np.random.default_rng(seed)
        prompts, completions = log_normal(rng, count, **PROMPT), log_normal(rng, count, **COMPLETION)
        order = np.concatenate(
            [first + np.argsort(-prompts[first : first + unit], kind="stable") for first in range(0, count, unit)]
        )
        return cls(prompts[order], completions[order])

    def requests(self) -> Iterator[Request]:
        """Yield the requests one after the other. Their tokens have no meaning, only their lengths matter."""
        ids = [BLOCK] * int(self.prompts.max())
        lengths = zip(self.prompts.tolist(), self.completions.tolist(), strict=True)
        for number, (prompt, completion) in enumerate(lengths):
            yield Request(str(number), ids[:prompt], GenerationParams(max_new_tokens=completion))


def make_loop(
    layout: Layout, steps: Steps, *, rows: int, lanes: int, host_s: float = 0.0, extend_every: int = EXTEND_EVERY
) -> tuple[Loop, CostModel]:
    """Return the engine's loop over simulated devices, and its backend."""
    slots = PageAllocator(rows + PREFIX_SLOTS, KV_TOKENS // 64)
    backend = CostModel(slots, layout, steps, host_s=host_s)
    scheduler = Scheduler(slots, rows, MAX_PREFILL_TOKENS, lanes)
    return Loop(backend, scheduler, extend_every=extend_every, clock=backend.clock), backend


def replay(
    layout: Layout,
    mix: Mix,
    steps: Steps,
    *,
    rows: int = ROWS,
    lanes: int = 2,
    host_s: float = 0.0,
    extend_every: int = EXTEND_EVERY,
) -> tuple[Simulated, Stats]:
    """Run all requests of the mix to their ends."""
    loop, backend = make_loop(layout, steps, rows=rows, lanes=lanes, host_s=host_s, extend_every=extend_every)
    coming, tokens, ended = mix.requests(), 0, 0
    began = time.perf_counter()
    while True:
        while loop.waiting < rows and (request := next(coming, None)) is not None:
            loop.submit(request)
        if not (loop.waiting or loop.active):
            break
        for completion in loop.step():
            tokens += len(completion.token_ids)
            ended += 1
    assert ended == len(mix.prompts)
    spent = backend.now
    busy = tuple(device.busy / spent for device in backend.devices)
    rate = tokens / spent if spent else 0.0
    return Simulated(rate, busy, spent, time.perf_counter() - began), loop.stats


def lockstep(roofline: Roofline, mix: Mix, steps: Steps, *, rows: int = ROWS) -> Simulated:
    """Simulate static batches with one tower on each device.

    A block takes the steps of its slowest row, a batch the blocks of its longest row. In the baseline's favour, prompts
    are prefilled without padding and in pieces, as in the engine.
    """
    layers, state = range(roofline.config.num_layers), roofline.row_state_bytes(range(roofline.config.num_layers))
    busy, link = np.zeros(2), 0.0
    for first in range(0, len(mix.prompts), rows):
        prompts = mix.prompts[first : first + rows]
        count, context = len(prompts), int(prompts.sum())
        pieces = -(-context // MAX_PREFILL_TOKENS)
        pairs = float((prompts * prompts / 2).sum()) / pieces
        piece = Work(-(-count // pieces), context // pieces, context // pieces, pairs, store=True)
        busy[0] += pieces * roofline.seconds(layers, piece)
        blocks = -(-int(mix.completions[first : first + rows].max()) // BLOCK)
        slowest = steps.draw(blocks * count).reshape(blocks, count).max(1)
        for taken in slowest.tolist():
            tokens = BLOCK * count
            pairs = BLOCK * (context + tokens)
            busy[1] += taken * roofline.seconds(layers, Work(count, tokens, context, pairs, tokens))
            busy[0] += roofline.seconds(layers, Work(count, tokens, context, pairs, store=True))
            link += (count * state + tokens * roofline.kv_bytes_per_token()) / roofline.hardware.link
            context += tokens
    spent = float(busy.sum()) + link  # forwards run one after the other, because a batch has nothing else to compute
    return Simulated(float(mix.completions.sum()) / spent, tuple((busy / spent).tolist()), spent)


def padding_share(count: int, *, sort: bool, seed: int = 0) -> float:
    """Return the share of padding in the prefill forwards of `count` prompts, sorted longest first or unsorted."""
    mix = Mix.draw(count, unit=count if sort else 1, seed=seed)
    _, stats = replay(Instant(), mix, Steps({1: 1}), lanes=1)
    return stats.padding_share


class Timed:
    """A wrapper that measures the time spent in the methods of a backend."""

    def __init__(self, backend: CostModel) -> None:
        self._backend = backend
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._backend, name)

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                self.seconds += time.perf_counter() - began

        setattr(self, name, timed)
        return timed


def turn_ms(rows: int, steps: Steps, *, turns: int) -> tuple[float, float]:
    """Return the milliseconds of one turn of the loop itself with `rows` rows, and those of the stand-in backend."""
    loop, backend = make_loop(Instant(), steps, rows=rows, lanes=1)
    loop.backend = timed = Timed(backend)
    backend.collect = timed.collect  # type: ignore[method-assign]  # which the forwards call
    coming = Mix.draw(turns * rows // 4 + 2 * rows).requests()
    spent = 0.0
    for turn in range(-turns // 10, turns):  # the first turns fill the slots and are not measured
        while loop.waiting < rows:
            loop.submit(next(coming))
        if turn == 0:
            spent = timed.seconds = 0.0
        began = time.perf_counter()
        loop.step()
        spent += time.perf_counter() - began
    return 1e3 * (spent - timed.seconds) / turns, 1e3 * timed.seconds / turns
