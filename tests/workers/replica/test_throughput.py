"""Tests of the measured speed of a full engine, with an engine whose speed is known: each step takes a second and gives
one token per row."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from model.requests import Completion, EngineError, GenerationParams, Request
from pipeline.calibration.bench import Run, Tick
from tests.pipeline.calibration.cases import FakeClock
from workers.replica import throughput


class SteadyEngine:
    """An engine in which a row needs a step for its prompt, and then gives one token per step, max_new_tokens in
    all."""

    def __init__(self, max_rows: int, clock: FakeClock, fails_at: int = -1, halves_at: int = -1) -> None:
        self.max_rows, self.clock, self.fails_at, self.halves_at = max_rows, clock, fails_at, halves_at
        self.queue: deque[Request] = deque()
        self.slots: dict[str, tuple[Request, int]] = {}  # with its tokens so far, or -1 before its prompt is read
        self.steps = self.free_steps = 0

    @property
    def waiting(self) -> int:
        return len(self.queue)

    def tokens_in_slots(self) -> int:
        return sum(max(0, tokens) for _, tokens in self.slots.values())

    def submit(self, request: Request) -> None:
        assert request.key not in self.slots
        assert all(request.key != other.key for other in self.queue)
        self.queue.append(request)

    def cancel(self, key: str) -> bool:
        self.queue = deque(request for request in self.queue if request.key != key)
        return self.slots.pop(key, None) is not None

    def step(self) -> Sequence[Completion]:
        self.steps += 1
        self.clock.now += 1
        if self.steps == self.fails_at:
            raise EngineError("the forward failed")
        if self.steps == self.halves_at:
            self.max_rows //= 2
        while self.queue and len(self.slots) < self.max_rows:
            request = self.queue.popleft()
            self.slots[request.key] = request, -1
        self.free_steps += len(self.slots) < self.max_rows
        done = []
        for key, (request, tokens) in list(self.slots.items()):
            self.slots[key] = request, tokens + 1
            if tokens + 1 == request.params.max_new_tokens:
                del self.slots[key]
                done.append(Completion(key=key, token_ids=(1,) * (tokens + 1), finish_reason="length"))
        return done


def requests(lengths: Sequence[int]) -> list[Request]:
    params = GenerationParams()
    return [Request(f"f#{i}", [1], replace(params, max_new_tokens=length)) for i, length in enumerate(lengths)]


def no_tick(_done: int, _expected: int) -> None:
    pass


def measure(
    engine: SteadyEngine, lengths: Sequence[int], *, whole: bool = True, window_s: float = 1.0, tick: Tick = no_tick
) -> Run:
    tokens, clock = engine.tokens_in_slots, engine.clock
    run = throughput.measure(engine, requests(lengths), tokens, whole=whole, window_s=window_s, tick=tick, clock=clock)
    assert not engine.slots
    assert not engine.queue
    return run


@pytest.mark.parametrize(
    ("rows", "lengths", "expected"),
    [
        (4, [9] * 3, 4 * 9 / 10),  # fewer rows than slots, all alike: they begin and end together for ever
        (4, [9] * 50, 4 * 9 / 10),
        (1, [19] * 5, 19 / 20),
        (16, list(range(4, 25)), 16 * 14 / 15),  # rows of many lengths
    ],
)
def test_the_speed_is_that_of_a_full_engine(rows: int, lengths: list[int], expected: float) -> None:
    """Neither the rows that begin together nor those that run out at the end make it slower."""
    run = measure(SteadyEngine(rows, FakeClock()), lengths)
    assert run.speed is not None
    assert run.speed.tokens_per_s == pytest.approx(expected, rel=0.06)
    assert run.speed.window_rows >= max(throughput.TURNS * rows, throughput.LEAST_ROWS)


def test_no_slot_is_empty_while_it_is_measured() -> None:
    engine = SteadyEngine(8, FakeClock())
    run = measure(engine, [5, 9, 3], whole=False)
    assert engine.free_steps == 0
    assert run.speed is not None
    assert run.speed.window_s < engine.clock.now == run.speed.seconds


def test_a_window_is_as_long_as_it_was_asked_for() -> None:
    run = measure(SteadyEngine(2, FakeClock()), [5] * 4, whole=False, window_s=300)
    assert run.speed is not None
    assert 300 <= run.speed.window_s < 310


def test_whole_gives_every_row_once_in_its_order() -> None:
    lengths = [3 + i * 7 % 20 for i in range(40)]
    run = measure(SteadyEngine(4, FakeClock()), lengths)
    assert [done.key for done in run.rows] == [f"f#{i}" for i in range(40)]
    assert [len(done.token_ids) for done in run.rows] == lengths
    assert measure(SteadyEngine(4, FakeClock()), lengths, whole=False).rows == ()


def test_an_uneven_speed_has_a_larger_error() -> None:
    even = measure(SteadyEngine(8, FakeClock()), list(range(10, 30)), window_s=200).speed
    uneven = measure(SteadyEngine(1, FakeClock()), [1] * 60 + [100]).speed
    assert even is not None
    assert uneven is not None
    assert even.error < 0.01 < uneven.error


def test_where_memory_runs_out_there_is_no_speed() -> None:
    engine = SteadyEngine(8, FakeClock(), halves_at=7)
    assert measure(engine, [9] * 20).speed is None


def test_an_error_of_the_engine_or_of_a_tick_leaves_nothing_in_it() -> None:
    engine = SteadyEngine(4, FakeClock(), fails_at=5)
    with pytest.raises(EngineError):
        measure(engine, [9] * 8)
    assert not engine.slots

    def tick(_done: int, _expected: int) -> None:
        raise TimeoutError

    calls: list[Callable[[SteadyEngine], object]] = [
        lambda engine: measure(engine, [9] * 8, tick=tick),
        lambda engine: throughput.run_once(engine, requests([9] * 8), tick),
    ]
    for call in calls:
        engine = SteadyEngine(4, FakeClock())
        with pytest.raises(TimeoutError):
            call(engine)
        assert not engine.slots
        assert not engine.queue


def test_run_once_gives_completions_in_order() -> None:
    done = throughput.run_once(SteadyEngine(3, FakeClock()), requests([5, 2, 9, 1]), no_tick)
    assert [len(completion.token_ids) for completion in done] == [5, 2, 9, 1]
