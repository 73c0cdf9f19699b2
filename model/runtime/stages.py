"""A forward on its way through the stages, so that several forwards are under way at once.

A stage runs what it is given in the order in which forwards were launched. So states and pages need no lock, and a
forward may be launched before the one that it builds on has come back. On a CPU a stage is a thread; with one stage
everything runs where it is launched, as a second thread would gain nothing. On CUDA a stage is a stream, and the thread
that launches feeds all of them: nothing waits for a device but `Flight.result`.

There a part runs with its stage's device and stream as the current ones, behind what the launching thread has given to
its own current stream. It may use tensors that it makes, and those that live until the forward is over: memory freed
earlier is given out again in the order of the stream that it was made on, which knows nothing of the stage's. What it
hands on is copied before the stage's next part runs, so that it may be a buffer that each part writes anew.
"""

import contextlib
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from model.errors import RequestError
from model.runtime.transfer import to_device

Part = Callable[[Any], Any]


class Flight:
    """One launched forward."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Once the result is there: on a CPU from the start on the first stage to the end on the last; on CUDA what the
        parts took together, without waits between them, as the events of two devices have no common clock."""
        self._last: Future[Any] = Future()
        self._began = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # around each part, on CUDA

    def result(self) -> Any:
        """Waits -> what the last part returned. Raises what any of them raised, when launched or on the device.

        Either way nothing of the forward is under way any more.
        """
        last, self._last = self._last, Future()  # not kept: an error in it would hold all that it holds
        if self._marks:
            self._marks[-1][1].synchronize()
        result = last.result()
        if self._marks:
            self.seconds = sum(begin.elapsed_time(end) for begin, end in self._marks) / 1000
        return result


class Cuda:
    """What the stages need of torch.cuda: a seam, so that tests can run the work in every order that a device may."""

    stream = staticmethod(torch.cuda.Stream)
    current = staticmethod(torch.cuda.current_stream)
    use = staticmethod(torch.cuda.stream)  # sets the stream's device as well
    synchronize = staticmethod(torch.cuda.synchronize)

    @staticmethod
    def event() -> torch.cuda.Event:
        """Who waits for it sleeps: a thread that spins would see the end of a forward of milliseconds some microseconds
        earlier, and take a core from those that read, write and tokenise."""
        return torch.cuda.Event(enable_timing=True, blocking=True)

    @staticmethod
    def start(x: Any, device: torch.device) -> Any:
        return to_device(x, device) if isinstance(x, Tensor) and not x.is_cuda else x

    @staticmethod
    def copy(x: Tensor, device: torch.device) -> Tensor:
        """A copy on `device`. Between two devices torch makes it on the current stream of x's, and lets this one and
        the current one of `device` wait for each other before and after it."""
        return torch.empty_like(x, device=device).copy_(x, non_blocking=True)


class Stages:
    """A stage for each of the devices, which may be named several times. Threads and streams end with this object.

    Raises RequestError for devices of several kinds.
    """

    def __init__(self, devices: Sequence[torch.device], cuda: Cuda | None = None) -> None:
        kinds = {device.type for device in devices}
        if len(kinds) > 1:
            raise RequestError(f"devices are {', '.join(map(str, devices))}: all must be 'cpu', or all 'cuda:N'")
        self._streams = _Streams(devices, cuda or Cuda()) if kinds == {"cuda"} else None
        self._threads = [ThreadPoolExecutor(1, f"stage-{i}") for i in range(len(devices)) if not self._streams]

    def launch(self, parts: Sequence[Part], start: Any) -> Flight:
        """Sends `start` through the parts: part i runs on stage i, later ones on the last stage.

        On CUDA `start` is a tensor on the host or on the first stage's device, and parts hand on tensors.
        """
        flight = Flight()
        if self._streams:
            flight._last = _done(partial(self._streams.send, parts, start, flight))
            return flight
        flight._last = _done(lambda: start)
        for i, part in enumerate(parts):
            run = partial(_run, part, flight._last, flight, i == 0, i == len(parts) - 1)
            several = len(self._threads) > 1
            flight._last = self._threads[min(i, len(self._threads) - 1)].submit(run) if several else _done(run)
        return flight


def _run(part: Part, before: "Future[Any]", flight: Flight, first: bool, last: bool) -> Any:
    x = before.result()
    if first:
        flight._began = time.perf_counter()
    try:
        with torch.inference_mode():  # a setting of the thread
            return part(x)
    finally:
        if last:
            flight.seconds = time.perf_counter() - flight._began


def _done(call: Callable[[], Any]) -> "Future[Any]":
    done: Future[Any] = Future()
    try:
        done.set_result(call())
    except Exception as error:  # raised again where the result is asked for, as from a thread
        done.set_exception(error)
    return done


class _Streams:
    """A stream a stage. What crosses to the next is copied on the stream of the stage that made it, into memory of a
    second stream of the one that takes it: in memory of the first it would wait for all that this has been given."""

    def __init__(self, devices: Sequence[torch.device], cuda: Cuda) -> None:
        self._cuda = cuda
        self._streams = [cuda.stream(device) for device in devices]
        self._arrivals = [cuda.stream(device) for device in devices]
        for device in devices:  # weights and states were made on other streams, maybe by other threads
            cuda.synchronize(device)
        weakref.finalize(self, _drain, self._streams).atexit = False

    def send(self, parts: Sequence[Part], x: Any, flight: Flight) -> Any:
        cuda, last = self._cuda, len(self._streams) - 1
        for i, part in enumerate(parts):
            stage, begin, end = min(i, last), cuda.event(), cuda.event()
            stream = self._streams[stage]
            stream.wait_stream(cuda.current(stream.device))
            if flight._marks:
                stream.wait_event(flight._marks[-1][1])
            flight._marks.append((begin, end))
            with torch.inference_mode(), cuda.use(stream):
                begin.record(stream)
                try:
                    x = part(x if i else cuda.start(x, stream.device))
                    if stage < last and i + 1 < len(parts):
                        x = self._copied(x, stream, stage + 1)
                finally:
                    end.record(stream)
        return x

    def _copied(self, x: Tensor, source: torch.cuda.Stream, stage: int) -> Tensor:
        target = self._streams[stage]
        with self._cuda.use(self._arrivals[stage]), self._cuda.use(source):  # of one device the inner one counts
            copy = self._cuda.copy(x, target.device)
        copy.record_stream(target)
        return copy


def _drain(streams: Sequence[torch.cuda.Stream]) -> None:
    # the states go with the stages: no forward may write there when their memory is another's
    with contextlib.suppress(RuntimeError):  # a device that is lost writes nothing any more
        for stream in streams:
            stream.synchronize()
