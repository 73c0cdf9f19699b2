"""Calls a function for each of very many files, in several threads if the calls take long enough to be worth it."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")
LONG_CALL_S, IN_A_ROW, ALONE_S = 0.001, 3, 0.1
"""The calling thread works alone until at least IN_A_ROW calls in a row that took more than LONG_CALL_S seconds each
have taken ALONE_S seconds together.

Shorter calls hardly wait. Several threads would take longer for them than one, because each of their reads makes a
thread wait for the interpreter's lock. A few long ones, because the machine is busy for a moment, change nothing.
"""
FAILING_S = 1.0
"""A call that takes longer than this, in seconds, also ends the time alone: the storage may be failing, and waiting for
it with one file after the other would take too long."""


def call_each(function: Callable[[T], R], items: Sequence[T], threads: int) -> list[R]:
    """Return the results of `function` for these items, in the order of the items.

    At most `threads` calls run at the same time, and they begin in the order of the items. If calls raise, the error of
    the first such item is raised, and no more calls are begun.
    """
    results: list[Any] = [None] * len(items)
    left = iter(range(len(items)))  # taking the next one is atomic, so threads can share it
    number, long_calls, long_s = -1, 0, 0.0
    for number in left:
        began = time.perf_counter()
        results[number] = function(items[number])
        took = time.perf_counter() - began
        long_calls, long_s = (long_calls + 1, long_s + took) if took > LONG_CALL_S else (0, 0.0)
        if took > FAILING_S or (long_calls >= IN_A_ROW and long_s > ALONE_S):
            break
    failed: dict[int, BaseException] = {}

    def work() -> None:
        for number in left:
            try:
                results[number] = function(items[number])
            except BaseException as error:
                failed[number] = error
                _use_up(left)

    if helpers := min(threads, len(items) - number - 1):
        with ThreadPoolExecutor(helpers) as pool:
            try:
                for worker in [pool.submit(work) for _ in range(helpers)]:
                    worker.result()
            except BaseException:  # the calling thread was interrupted
                _use_up(left)
                raise
    if failed:
        raise failed[min(failed)]
    return results


def _use_up(left: Any) -> None:
    deque(left, maxlen=0)
