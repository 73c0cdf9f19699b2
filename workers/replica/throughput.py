"""Measures the tokens per second of an engine while all its slots are taken, and collects the completions of a sample.

This module needs neither Ray nor torch.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from model.requests import Completion, Request
from pipeline.calibration.bench import Run, Speed, Tick
from workers.units.protocols import EngineLike

LEAST_ROWS = 8
"""Smallest number of rows that must end in the window, even if the engine has only a few slots."""
TURNS = 2
"""Number of new rows that a slot gets in the window on average: the speed includes the cost of filling slots."""
PIECES = 8
"""Number of equal pieces of the window; the differences between their speeds give the error of the speed."""
Mark = tuple[float, int]
"""A reading after an engine step: (time in seconds, number of completion tokens generated so far)."""


class MeasuredEngine(EngineLike, Protocol):
    """The part of model.Engine that the measurement uses."""

    def cancel(self, key: str) -> bool:
        """Remove a request without a completion. Returns False if no request with this key is in the engine."""


def run_once(engine: MeasuredEngine, requests: Sequence[Request], tick: Tick) -> tuple[Completion, ...]:
    """Run every request to its end, and return the completions in the order of the requests.

    Raises what the engine and the tick raise; no request then stays in the engine.
    """
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
    engine: MeasuredEngine,
    requests: Sequence[Request],
    tokens_in_slots: Callable[[], int],
    *,
    whole: bool,
    window_s: float,
    tick: Tick,
    clock: Callable[[], float] = time.perf_counter,
) -> Run:
    """Return the speed of the engine (see pipeline.calibration.bench.Speed); with `whole` also all completions.

    The requests are submitted repeatedly until the window lasts at least `window_s` seconds and enough rows have ended
    in it. `tokens_in_slots` returns the number of completion tokens that the rows in slots have so far. If memory runs
    out, so that the engine lowers its row limit, the result has neither a speed nor completions. Raises what the engine
    and the tick raise. No request stays in the engine.
    """
    watch = _Watch(engine, requests, tokens_in_slots, whole, window_s, clock)
    try:
        return watch.run(tick)
    finally:
        watch.clear()


class _Watch:
    """One measurement: it keeps the engine full, steps it, and collects the marks and the completions."""

    def __init__(
        self,
        engine: MeasuredEngine,
        requests: Sequence[Request],
        tokens_in_slots: Callable[[], int],
        whole: bool,
        window_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._engine, self._requests, self._whole, self._window_s = engine, requests, whole, window_s
        self._tokens_in_slots, self._clock = tokens_in_slots, clock
        self._slots = engine.max_rows
        self._window_rows = max(TURNS * self._slots, LEAST_ROWS)
        self._feed = _again_and_again(requests)
        self._live: set[str] = set()
        self._first: dict[str, Completion] = {}  # by request key; a repeated request has a key of its own
        self._fed = self._ended = self._tokens = 0
        self._marks: list[Mark] = []
        self._rows_before = 0

    def run(self, tick: Tick) -> Run:
        """Measure until enough was seen; with `whole`, then also run the requests of the sample to their ends."""
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
        """Cancel the requests that are still in the engine, except those whose keys are in `keep`."""
        for key in self._live - keep:
            self._engine.cancel(key)
        self._live &= keep

    def _seen_enough(self) -> bool:
        """Return whether the window is long enough and, with `whole`, all requests of the sample were submitted."""
        if not self._marks or (self._whole and self._fed < len(self._requests)):
            return False
        long_enough = self._marks[-1][0] - self._marks[0][0] >= self._window_s
        return long_enough and self._ended - self._rows_before >= self._window_rows

    def _fill(self) -> None:
        """Submit requests until as many wait in the engine as it has slots."""
        while self._engine.waiting < self._slots:
            request = next(self._feed)
            self._engine.submit(request)
            self._live.add(request.key)
            self._fed += 1

    def _step(self) -> None:
        """Run an engine step. Once as many rows have ended as there are slots, the window is open: add a mark."""
        self._engine_step()
        if not self._marks:
            if self._ended < self._slots:
                return
            self._rows_before = self._ended
        self._marks.append((self._clock(), self._tokens + self._tokens_in_slots()))

    def _engine_step(self) -> None:
        for completion in self._engine.step():
            self._live.discard(completion.key)
            self._first.setdefault(completion.key, completion)
            self._ended += 1
            self._tokens += len(completion.token_ids)


def _again_and_again(requests: Sequence[Request]) -> Iterator[Request]:
    """Yield the requests as they are, then again and again with new keys, because keys are unique in the engine."""
    yield from requests
    for turn in itertools.count(2):
        for request in requests:
            yield replace(request, key=f"{request.key}~{turn}")


def speed_of(marks: Sequence[Mark], rows: int, seconds: float) -> Speed:
    """Return the speed between the first and the last mark; its error is 1 if no token was generated between them.

    `rows`: the number of rows that ended between them. `seconds`: the duration of the whole measurement.
    """
    times = np.array([mark[0] for mark in marks])
    tokens = np.array([mark[1] for mark in marks], float)
    edges = np.linspace(times[0], times[-1], PIECES + 1)
    pieces = np.diff(np.interp(edges, times, tokens))
    window_s, window_tokens = float(times[-1] - times[0]), int(tokens[-1] - tokens[0])
    mean = float(pieces.mean())
    error = float(pieces.std(ddof=1)) / PIECES**0.5 / mean if mean > 0 else 1.0
    return Speed(max(0.0, window_tokens / window_s), error, window_s, window_tokens, rows, seconds)
