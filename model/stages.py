"""A forward on its way through the stages: a thread for each, so that several forwards are under way at once.

A stage runs what it is given in the order in which forwards were launched. So states and pages need no lock, and a
forward may be launched before the one that it builds on has come back. With one stage everything runs where it is
launched: on a GPU that returns at once, and on a CPU a second thread would gain nothing.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

Part = Callable[[Any], Any]


class Flight:
    """One launched forward."""

    def __init__(self) -> None:
        self._last: Future[Any] = Future()
        self._began = self._ended = 0.0

    @property
    def seconds(self) -> float:
        """From the start on the first stage to the end on the last one."""
        return self._ended - self._began

    def result(self) -> Any:
        """Waits -> what the last part returned. Raises what any of them raised."""
        last, self._last = self._last, Future()  # not kept: an error in it would hold all that it holds
        return last.result()


class Stages:
    """A thread for each stage's device; they end with this object."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._threads = [
            ThreadPoolExecutor(1, thread_name_prefix=f"stage-{i}", initializer=_use, initargs=(device,))
            for i, device in enumerate(devices)
        ]

    def launch(self, parts: Sequence[Part], start: Any) -> Flight:
        """Sends `start` through the parts: part i runs on stage i, later ones on the last stage."""
        flight = Flight()
        before: Future[Any] = Future()
        before.set_result(start)
        for i, part in enumerate(parts):
            stage = min(i, len(self._threads) - 1)
            first, last = i == 0, i == len(parts) - 1
            if len(self._threads) > 1:
                before = self._threads[stage].submit(_run, part, before, flight, first, last)
            else:
                before = _run_here(part, before, flight, first, last)
        flight._last = before
        return flight


def _use(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _run(part: Part, before: "Future[Any]", flight: Flight, first: bool, last: bool) -> Any:
    x = before.result()
    if first:
        flight._began = time.perf_counter()
    try:
        with torch.inference_mode():  # a setting of the thread
            return part(x)
    finally:
        if last:
            flight._ended = time.perf_counter()


def _run_here(part: Part, before: "Future[Any]", flight: Flight, first: bool, last: bool) -> "Future[Any]":
    done: Future[Any] = Future()
    try:
        done.set_result(_run(part, before, flight, first, last))
    except Exception as error:  # raised again where the result is asked for, as from a thread
        done.set_exception(error)
    return done
