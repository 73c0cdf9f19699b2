"""Tests of calls for many files: results keep the order, long calls share threads, and the first error ends it."""

import threading
from itertools import chain, cycle
from types import SimpleNamespace

import pytest

from pipeline.storage import parallel
from pipeline.storage.parallel import ALONE_S, FAILING_S, LONG_CALL_S, call_each
from tests.waiting import PATIENCE_S


@pytest.fixture(params=["short", "long"])
def _calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every call for a short one, or the first one for a long one."""
    monkeypatch.setattr(parallel, "time", clock(0.0 if request.param == "short" else 2 * FAILING_S))


def clock(*seconds: float) -> SimpleNamespace:
    """Return a clock by which the calls take these seconds, again and again from the front."""
    moments = chain.from_iterable((0.0, each) for each in cycle(seconds))  # each call begins at 0
    return SimpleNamespace(perf_counter=lambda: next(moments))


@pytest.mark.usefixtures("_calls")
@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_each_result_stands_at_the_place_of_its_item(count: int) -> None:
    called: list[int] = []

    def square(number: int) -> int:
        called.append(number)
        return number**2

    assert call_each(square, range(count), 4) == [number**2 for number in range(count)]
    assert sorted(called) == list(range(count))


@pytest.mark.usefixtures("_calls")
def test_the_error_of_the_first_item_that_fails_is_raised() -> None:
    called: list[int] = []

    def fail(number: int) -> None:
        called.append(number)
        if number >= 20:
            raise ValueError(f"item {number}")

    with pytest.raises(ValueError, match=r"^item 20$"):
        call_each(fail, range(100_000), 4)
    assert set(range(21)) <= set(called)
    assert len(called) < 100  # the calls after the failed ones are not made


@pytest.mark.parametrize(
    "seconds", [(LONG_CALL_S / 2,), (0.9 * FAILING_S, 2 * LONG_CALL_S, 0.0)], ids=["short", "sometimes long"]
)
def test_calls_that_are_not_all_long_stay_in_the_calling_thread(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...]
) -> None:
    """A busy machine delays single calls."""
    monkeypatch.setattr(parallel, "time", clock(*seconds))
    assert set(call_each(thread_of, range(1000), 4)) == {threading.get_ident()}


def thread_of(_: object) -> int:
    return threading.get_ident()


@pytest.mark.parametrize(
    ("seconds", "alone"), [(2 * FAILING_S, 1), (0.9 * FAILING_S, 3), (0.4 * ALONE_S, 3), (0.15 * ALONE_S, 7)]
)
def test_long_calls_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch, seconds: float, alone: int) -> None:
    """The first calls, which show that calls are long, run alone."""
    monkeypatch.setattr(parallel, "time", clock(seconds))
    together = threading.Barrier(4)

    def meet(number: int) -> int:
        """Wait until four calls have come here."""
        return together.wait(PATIENCE_S) if number >= alone else -1

    assert sorted(call_each(meet, range(alone + 4), 4)[alone:]) == [0, 1, 2, 3]
