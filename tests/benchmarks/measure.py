"""Measures the figures of `make bench` on the small models; the two sides of a ratio run alternately.

Ratios are medians over the rounds. Time is the processor time of this process. All work runs on one thread and nothing
waits, so on an idle machine this is the wall clock, and on a busy one other processes do not count.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from model import Engine, EngineLimits, Request, load_model
from model.network.two_tower import TwoTower
from model.requests import Completion, Mode
from tests.benchmarks import lockstep
from tests.benchmarks.workload import THRESHOLDS, requests

BATCHES = 12  # requests per row of a comparison: many, because the end of a long corpus hardly counts


LENGTHS = (16, 64, 112, 32, 80, 48, 96)
"""Lengths of completions in tokens, 64 on average: a corpus has short and long ones, which are not known beforehand."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The engine against the baseline with one number of rows. Rates are useful tokens per second."""

    ratio: float
    engine: float
    lockstep: float
    range: tuple[float, float]
    """The smallest and the largest ratio of a round."""
    steps: dict[int, int]
    """Steps per block -> number of blocks, over the engine's rows."""


def seconds(run: Callable[[], object]) -> float:
    """Return the processor time of one call in seconds."""
    began = time.process_time()
    run()
    return time.process_time() - began


def alternate(sides: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Return the seconds of each side in each round. Sides run alternately, in reversed order in every second round;
    one round before is not measured."""
    for side in sides:
        side()
    times: list[list[float]] = [[] for _ in sides]
    for number in range(rounds):
        order = range(len(sides)) if number % 2 == 0 else reversed(range(len(sides)))
        for place in order:
            times[place].append(seconds(sides[place]))
    return times


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """Return the ratio of each round."""
    return [a / b for a, b in zip(slow, fast, strict=True)]


def vs_lockstep(
    pair: TwoTower,
    rows: int,
    *,
    rounds: int,
    lengths: Sequence[int] = LENGTHS,
    thresholds: Sequence[float] = THRESHOLDS,
) -> Comparison:
    """Run the same requests through the engine and static batches of `rows`; completions take `lengths` in turn."""
    longest = max(lengths)
    work = [
        replace(request, params=replace(request.params, max_new_tokens=lengths[i % len(lengths)]))
        for i, request in enumerate(
            requests(
                BATCHES * rows,
                prompt_tokens=32,
                max_new_tokens=longest,
                vocabulary=pair.config.vocab_size,
                thresholds=thresholds,
            )
        )
    ]
    engine = Engine(pair, EngineLimits(max_rows=rows, max_context_tokens=32 + longest))
    completions: list[Completion] = []

    def ours() -> None:
        completions[:] = engine.generate(work)

    ours_s, theirs_s = alternate([ours, lambda: lockstep.serve(pair, work, rows)], rounds)
    tokens = sum(len(completion.token_ids) for completion in completions)
    assert tokens == sum(request.params.max_new_tokens for request in work), (
        "every request runs to its length on both sides"
    )
    rounds_s = ratios(theirs_s, ours_s)
    return Comparison(
        statistics.median(rounds_s),
        tokens / statistics.median(ours_s),
        tokens / statistics.median(theirs_s),
        (min(rounds_s), max(rounds_s)),
        dict(sorted(Counter(n for completion in completions for n in completion.steps_per_block).items())),
    )


def prefix_speedup(pair: TwoTower, *, rounds: int, template: int = 1000, own: int = 50, rows: int = 64) -> float:
    """Return the time without a shared prefix divided by the time with it, for one short completion of each row."""

    def generate(prefix_tokens: int) -> Callable[[], list[Completion]]:
        work: list[Request] = requests(
            rows,
            prompt_tokens=template + own,
            max_new_tokens=16,
            vocabulary=pair.config.vocab_size,
            template=template,
            prefix_tokens=prefix_tokens,
        )
        engine = Engine(pair, EngineLimits(max_rows=rows, max_context_tokens=template + own + 16))
        return lambda: engine.generate(work)

    shared, apart = alternate([generate(template), generate(0)], rounds)
    return statistics.median(ratios(apart, shared))


def mode_rates(pair: TwoTower, *, rounds: int, rows: int = 16) -> dict[Mode, float]:
    """Return the tokens per second of each mode on `2 * rows` requests."""
    modes: tuple[Mode, ...] = ("ar", "mock_ar", "diffusion")
    engine = Engine(pair, EngineLimits(max_rows=rows, max_context_tokens=128))

    def generate(mode: Mode) -> Callable[[], list[Completion]]:
        work = requests(2 * rows, prompt_tokens=32, max_new_tokens=64, vocabulary=pair.config.vocab_size, mode=mode)
        return lambda: engine.generate(work)

    times = alternate([generate(mode) for mode in modes], rounds)
    return {mode: 2 * rows * 64 / statistics.median(spent) for mode, spent in zip(modes, times, strict=True)}


def bfloat16_differences(uri: str, *, count: int, rows: int = 16) -> int:
    """Return how many of `count` bfloat16 requests, half of them sampled, get other tokens alone than among `rows`."""
    pair = load_model(uri, dtype="bfloat16")
    work = [
        replace(request, params=replace(request.params, temperature=0.8 * (i % 2)))
        for i, request in enumerate(
            requests(count, prompt_tokens=40, max_new_tokens=48, vocabulary=pair.config.vocab_size)
        )
    ]
    limits = (EngineLimits(max_rows=1), EngineLimits(max_rows=rows, max_prefill_tokens=256))
    alone, together = (Engine(pair, limit).generate(work) for limit in limits)
    return sum(a.token_ids != b.token_ids for a, b in zip(alone, together, strict=True))
