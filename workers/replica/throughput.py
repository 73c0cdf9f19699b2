"""How fast an engine is while it is full, and what it makes of a sample on the way. Free of Ray and torch."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from model.requests import Completion, Request
from pipeline.calibration.bench import Run, Speed, Tick

LEAST_ROWS = 8
"""That end in the window, however few run together."""
TURNS = 2
"""Times that every slot gets a new row in the window, on average: so what filling them costs is in the speed."""
PIECES = 8
"""Of the window: how much they differ says how sure the speed is."""
Mark = tuple[float, int]
"""(seconds, tokens so far)."""


class FullEngine(Protocol):
    """What measuring needs of an engine."""

    @property
    def waiting(self) -> int:
        """Requests that are not in a slot yet."""

    @property
    def max_rows(self) -> int:
        """Slots. It falls where memory runs out."""

    @property
    def tokens_under_way(self) -> int:
        """Of the rows in slots, so far."""

    def submit(self, request: Request) -> None: ...

    def step(self) -> Sequence[Completion]: ...

    def cancel(self, key: str) -> bool: ...


def run_once(engine: FullEngine, requests: Sequence[Request], tick: Tick) -> tuple[Completion, ...]:
    """Every request to its end -> completions in order. Raises what the engine and the tick raise."""
    done: dict[str, Completion] = {}
    try:
        for request in requests:
            engine.submit(request)
        while len(done) < len(requests):
            done |= {completion.key: completion for completion in engine.step()}
            tick(len(done), len(requests))
    finally:
        for request in requests:
            engine.cancel(request.key)
    return tuple(done[request.key] for request in requests)


def measure(
    engine: FullEngine,
    requests: Sequence[Request],
    *,
    whole: bool,
    window_s: float,
    tick: Tick,
    clock: Callable[[], float] = time.perf_counter,
) -> Run:
    """The speed of the engine, and with `whole` a completion of each request. See pipeline.calibration.bench.Speed.

    The requests are given again and again until the window is long enough. Raises what the engine and the tick raise.
    """
    watch = _Watch(engine, requests, whole, window_s, clock)
    try:
        return watch.run(tick)
    finally:
        watch.clear()


class _Watch:
    def __init__(
        self,
        engine: FullEngine,
        requests: Sequence[Request],
        whole: bool,
        window_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._engine, self._requests, self._whole, self._window_s = engine, requests, whole, window_s
        self._clock = clock
        self._slots = engine.max_rows
        self._window_rows = max(TURNS * self._slots, LEAST_ROWS)
        self._feed = _again_and_again(requests)
        self._live: set[str] = set()
        self._first: dict[str, Completion] = {}  # of each request when it was given first
        self._fed = self._ended = self._tokens = 0
        self._marks: list[Mark] = []
        self._rows_before = 0

    def run(self, tick: Tick) -> Run:
        started, expected = self._clock(), self._slots + self._window_rows
        if self._whole:
            expected = max(expected, len(self._requests))
        while not self._seen_enough():
            self._fill()
            self._step()
            if self._engine.max_rows < self._slots:
                return Run(None)
            tick(min(self._ended, expected), expected)
        rows = self._ended - self._rows_before
        self.clear(keep={request.key for request in self._requests} if self._whole else set())
        while self._live:
            self._engine_step()
            tick(expected, expected)
        speed = speed_of(self._marks, rows, self._clock() - started)
        return Run(speed, tuple(self._first[request.key] for request in self._requests) if self._whole else ())

    def clear(self, keep: "set[str] | frozenset[str]" = frozenset()) -> None:
        """Takes the rows out that are still in the engine."""
        for key in self._live - keep:
            self._engine.cancel(key)
        self._live &= keep

    def _seen_enough(self) -> bool:
        if not self._marks or (self._whole and self._fed < len(self._requests)):
            return False
        long_enough = self._marks[-1][0] - self._marks[0][0] >= self._window_s
        return long_enough and self._ended - self._rows_before >= self._window_rows

    def _fill(self) -> None:
        while self._engine.waiting < self._slots:
            request = next(self._feed)
            self._engine.submit(request)
            self._live.add(request.key)
            self._fed += 1

    def _step(self) -> None:
        self._engine_step()
        if not self._marks:
            if self._ended < self._slots:
                return
            self._rows_before = self._ended
        self._marks.append((self._clock(), self._tokens + self._engine.tokens_under_way))

    def _engine_step(self) -> None:
        for completion in self._engine.step():
            self._live.discard(completion.key)
            self._first.setdefault(completion.key, completion)
            self._ended += 1
            self._tokens += len(completion.token_ids)


def _again_and_again(requests: Sequence[Request]) -> Iterator[Request]:
    """First as they are, then under other keys, which must be unique in the engine."""
    yield from requests
    for turn in itertools.count(2):
        for request in requests:
            yield replace(request, key=f"{request.key}~{turn}")


def speed_of(marks: Sequence[Mark], rows: int, seconds: float) -> Speed:
    """The speed between the first and the last mark."""
    times = np.array([mark[0] for mark in marks])
    tokens = np.array([mark[1] for mark in marks], float)
    edges = np.linspace(times[0], times[-1], PIECES + 1)
    pieces = np.diff(np.interp(edges, times, tokens))
    window_s, window_tokens = float(times[-1] - times[0]), int(tokens[-1] - tokens[0])
    mean = float(pieces.mean())
    error = float(pieces.std(ddof=1)) / PIECES**0.5 / mean if mean > 0 else 1.0
    return Speed(max(0.0, window_tokens / window_s), error, window_s, window_tokens, rows, seconds)
