"""Runs forwards through the stages of the model, so that several forwards are in progress at once.

A stage runs its forwards in the order of their launch. So states and pages need no lock, and a forward may be launched
before the one that it builds on has come back. On a CPU a stage is a thread; with a single stage everything runs in the
launching thread, because a second thread would gain nothing. On CUDA a stage is a stream, and the launching thread
feeds all of them: nothing waits for a device but `Flight.result` and `Flight.wait`.

On CUDA a part runs with the device and stream of its stage as the current ones, after the work that the launching
thread has given to its own current stream. A part may use tensors that it makes itself, and tensors that live until the
forward is over. It must not use others: memory that is freed earlier is reused in the order of the stream on which it
was allocated, without regard to the stream of the stage. The result of a part is copied before the stage's next part
runs, so it may be in a buffer that each part overwrites.
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
"""The work of one stage in a forward. It takes what the part before it returned (in the first stage, what was given to
`launch`): usually hidden states, or tokens in the first stage. It returns hidden states, or in the last stage whatever
the forward produces."""


class Flight:
    """A forward that has been launched. Its result can be taken once, by `result` or by `wait`."""

    def __init__(self, finish: Callable[[Any], Any]) -> None:
        """Make a flight to which `Stages.launch` adds the parts. finish: makes the result of the forward, in the thread
        that asks for it, from what the last part returned."""
        self._finish = finish
        self.seconds = 0.0
        """Duration in seconds, valid once the result is there. On a CPU: from the start on the first stage to the end
        on the last one. On CUDA: the sum of the parts' durations without the waits between them, because the events of
        two devices have no common clock."""
        self._last: Future[Any] = Future()
        self._began = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []  # on CUDA, events before and after each part

    def result(self) -> Any:
        """Wait for the forward and return what `finish` makes of it. Raises what `wait` and `finish` raise."""
        return self._finish(self.wait())

    def wait(self) -> Any:
        """Wait for the forward and return what its last part returned. A second call would wait forever.

        Raises the error of any part that failed, at launch or on the device. The forward is over afterwards, whether it
        failed or not.
        """
        last, self._last = self._last, Future()  # not kept: an error in it would keep the tensors of its frames alive
        if self._marks:
            self._marks[-1][1].synchronize()
        result = last.result()
        if self._marks:
            self.seconds = sum(begin.elapsed_time(end) for begin, end in self._marks) / 1000
        return result


class Cuda:
    """The functions of torch.cuda that the stages need; tests replace them to run the work in every order that a device
    may choose."""

    stream = staticmethod(torch.cuda.Stream)
    current = staticmethod(torch.cuda.current_stream)
    use = staticmethod(torch.cuda.stream)  # also makes the stream's device the current one
    synchronize = staticmethod(torch.cuda.synchronize)

    @staticmethod
    def event() -> torch.cuda.Event:
        """Return an event that lets the waiting thread sleep. A thread that spins would see the end of a forward
        slightly earlier, but would keep a core from reading, writing and tokenizing."""
        return torch.cuda.Event(enable_timing=True, blocking=True)

    @staticmethod
    def start(x: Any, device: torch.device) -> Any:
        """Return the input of a forward's first part; a tensor on the host is sent to `device`."""
        return to_device(x, device) if isinstance(x, Tensor) and not x.is_cuda else x

    @staticmethod
    def copy(x: Tensor, device: torch.device) -> Tensor:
        """Return a copy of x on `device`. Between two devices torch copies on the current stream of the device of x;
        that stream and the current stream of `device` wait for each other before and after the copy."""
        return torch.empty_like(x, device=device).copy_(x, non_blocking=True)


class Stages:
    """The threads or streams on which a model's stages run their forwards: one per device of the list, which may name a
    device several times.

    They end with this object. Raises RequestError if the devices are of several kinds. cuda: for tests.
    """

    def __init__(self, devices: Sequence[torch.device], cuda: Cuda | None = None) -> None:
        kinds = {device.type for device in devices}
        if len(kinds) > 1:
            raise RequestError(f"devices are {', '.join(map(str, devices))}: all must be 'cpu', or all 'cuda:N'")
        self._streams = _Streams(devices, cuda or Cuda()) if kinds == {"cuda"} else None
        self._threads = [ThreadPoolExecutor(1, f"stage-{i}") for i in range(len(devices)) if not self._streams]

    def launch(self, parts: Sequence[Part], start: Any, finish: Callable[[Any], Any] = lambda x: x) -> Flight:
        """Launch a forward that sends `start` through the parts: part i runs on stage i, later ones on the last stage.

        finish: see Flight. On CUDA `start` must be a tensor on the host or on the first stage's device, and parts must
        return tensors. An error of a part is not raised here but by the flight's `result`.
        """
        flight = Flight(finish)
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
    """Run a part on a CPU after the part before it; if it is the first or the last one, time the flight."""
    x = before.result()
    if first:
        flight._began = time.perf_counter()
    try:
        with torch.inference_mode():  # must be set in each thread
            return part(x)
    finally:
        if last:
            flight.seconds = time.perf_counter() - flight._began


def _done(call: Callable[[], Any]) -> "Future[Any]":
    """Return a finished future with the result of the call, or with its error if that is an Exception."""
    done: Future[Any] = Future()
    try:
        done.set_result(call())
    except Exception as error:  # raised again by result(), as if it came from a thread
        done.set_exception(error)
    return done


class _Streams:
    """One stream for each stage.

    The result of a part is copied to the next stage on the stream of the stage that made it, into memory that belongs
    to a second stream of the next stage's device. In memory of the next stage's own stream, the copy would have to wait
    for all work that this stream has been given.
    """

    def __init__(self, devices: Sequence[torch.device], cuda: Cuda) -> None:
        self._cuda = cuda
        self._streams = [cuda.stream(device) for device in devices]
        self._arrivals = [cuda.stream(device) for device in devices]
        for device in devices:  # weights and states were made on other streams, perhaps by other threads
            cuda.synchronize(device)
        weakref.finalize(self, _drain, self._streams).atexit = False

    def send(self, parts: Sequence[Part], x: Any, flight: Flight) -> Any:
        """Queue the parts on the streams of their stages, with events around each, and return what the last one
        returned; its work may not have begun yet."""
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
        """Return a copy of x for the stage, made after the work that is queued on `source`."""
        target = self._streams[stage]
        with self._cuda.use(self._arrivals[stage]), self._cuda.use(source):  # the inner one counts if devices are equal
            copy = self._cuda.copy(x, target.device)
        copy.record_stream(target)
        return copy


def _drain(streams: Sequence[torch.cuda.Stream]) -> None:
    """Wait for all work on these streams, if their device still works."""
    # the states are freed with the stages: no forward may still write to that memory when it is used again
    with contextlib.suppress(RuntimeError):  # a lost device does not write any more
        for stream in streams:
            stream.synchronize()
