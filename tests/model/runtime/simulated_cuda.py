"""Simulates the streams, events and caching allocator of CUDA.

Work waits in queues and runs one operation at a time. Its order is random among the orders that the waits between
streams allow. Memory consists of cells that hold one number each. When nothing refers to a tensor any more, its cell
goes back at once to the stream on which it was made, as in torch; only the streams that the tensor was recorded for are
waited for.
"""

import contextlib
import random
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

import torch

CUDA0 = torch.device("cuda:0")


class Tensor:
    """A number on a device. Queued operations refer only to its memory cell: as in torch, the cell is held only while
    Python refers to the tensor."""

    def __init__(self, cuda: "SimulatedCuda", device: torch.device, stream: "Stream", cell: int) -> None:
        self.cuda, self.device, self.cell = cuda, device, cell
        self._others: list[Stream] = []
        weakref.finalize(self, cuda.free, stream, cell, self._others).atexit = False

    def record_stream(self, stream: "Stream") -> None:
        if "record_stream" not in self.cuda.broken:
            self._others.append(stream)


class Event:
    """A CUDA event. Waiting for an event that was never recorded returns at once, as in CUDA."""

    def __init__(self, cuda: "SimulatedCuda") -> None:
        self.cuda, self.recorded, self.done, self.device, self.at = cuda, False, False, CUDA0, 0.0

    def record(self, stream: "Stream") -> None:
        def happen() -> None:
            self.done, self.device, self.at = True, stream.device, self.cuda.clocks_ms[stream.device]

        self.recorded = True
        stream.queue.append(happen)

    def synchronize(self) -> None:
        self.cuda.host_waits += 1
        if self.recorded:
            self.cuda.run(until=lambda: self.done)
        if self.cuda.fault is not None:
            raise self.cuda.fault

    def elapsed_time(self, end: "Event") -> float:
        if not (self.done and end.done and self.device == end.device):
            raise RuntimeError("CUDA error: not both done, or of two devices")
        return end.at - self.at


class Stream:
    def __init__(self, cuda: "SimulatedCuda", device: torch.device) -> None:
        self.cuda, self.device = cuda, device
        self.queue = deque[Callable[[], None] | Event]()  # an entry that is an event makes the stream wait for it
        cuda.streams.append(self)

    def wait_event(self, event: Event) -> None:
        if event.recorded and "wait_event" not in self.cuda.broken:
            self.queue.append(event)

    def wait_stream(self, other: "Stream") -> None:
        if "wait_stream" not in self.cuda.broken:
            self.queue.append(other.mark())

    def mark(self) -> Event:
        event = Event(self.cuda)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.mark().synchronize()


class SimulatedCuda:
    """A stand-in for model.runtime.stages.Cuda. `broken` names the operations that are left out."""

    def __init__(self, seed: int, broken: tuple[str, ...] = ()) -> None:
        self.broken, self.host_waits = broken, 0
        self.clocks_ms: dict[torch.device, float] = defaultdict(float)
        self.fault: Exception | None = None
        self.device, self.streams = CUDA0, list[Stream]()
        self._rng = random.Random(seed)
        self._memory: list[int] = []
        self._free: dict[Stream, list[tuple[int, list[Event]]]] = defaultdict(list)
        self._current: dict[torch.device, Stream] = {}

    # -- used by the stages -------------------------------------------------------------------------------------------

    def stream(self, device: torch.device) -> Stream:
        return Stream(self, device)

    def event(self) -> Event:
        return Event(self)

    def current(self, device: torch.device) -> Stream:
        if device not in self._current:
            self._current[device] = Stream(self, device)
        return self._current[device]

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        before = self.device, self.current(stream.device)
        self.device, self._current[stream.device] = stream.device, stream
        try:
            yield
        finally:
            self.device, self._current[stream.device] = before

    def synchronize(self, device: torch.device) -> None:
        for stream in [stream for stream in self.streams if stream.device == device]:
            stream.synchronize()

    def start(self, x: int, device: torch.device) -> Tensor:
        return self.compute(lambda: x, device=device)

    def copy(self, x: Tensor, device: torch.device) -> Tensor:
        if "copy" in self.broken and x.device == device:
            return x
        there, here = self.current(device), self.current(x.device)
        copy = self._empty(device)
        if there is not here and device != x.device:  # torch does the same: copy_device_to_device in Copy.cu
            here.queue.append(there.mark())
        self._operation(here, lambda value: value, copy.cell, (x.cell,))
        if there is not here and device != x.device:
            there.queue.append(here.mark())
        return copy

    # -- used by the parts of forwards --------------------------------------------------------------------------------

    def compute(
        self, f: Callable[..., int], *args: Tensor, out: Tensor | None = None, device: torch.device | None = None
    ) -> Tensor:
        """Queue f(args) on the current stream and return the tensor that gets the result: `out`, or a new one."""
        device = device or self.device
        assert all(arg.device == device for arg in args)
        out = out or self._empty(device)
        self._operation(self.current(device), f, out.cell, tuple(arg.cell for arg in args))
        return out

    def sleep(self, ms: float) -> None:
        """Queue work on the current stream that takes `ms` milliseconds on the clock of the current device."""
        device = self.device

        def work() -> None:
            self.clocks_ms[device] += ms

        self.current(device).queue.append(work)

    def value(self, x: Tensor) -> int:
        """Return a tensor's value as it is now."""
        return self._memory[x.cell]

    # -- running ------------------------------------------------------------------------------------------------------

    def run(self, until: Callable[[], bool] = lambda: False, frozen: tuple[Stream, ...] = ()) -> None:
        """Run queued operations in random order until the condition holds or none can run. `frozen` streams do not run.

        Raises AssertionError if operations wait for each other and no stream is frozen.
        """
        while not until():
            ready = [s for s in self.streams if s.queue and s not in frozen and self._may_run(s)]
            if not ready:
                stuck = [len(s.queue) for s in self.streams if s.queue and s not in frozen]
                assert frozen or not stuck, f"deadlock: {stuck} operations wait for each other"
                return
            operation = self._rng.choice(ready).queue.popleft()
            if not isinstance(operation, Event):
                operation()

    def free(self, stream: Stream, cell: int, others: list[Stream]) -> None:
        self._free[stream].append((cell, [other.mark() for other in others]))

    def _may_run(self, stream: Stream) -> bool:
        head = stream.queue[0]
        return not isinstance(head, Event) or head.done

    def _empty(self, device: torch.device) -> Tensor:
        stream = self.current(device)
        for i, (cell, events) in enumerate(self._free[stream]):
            if all(event.done for event in events):
                del self._free[stream][i]
                return Tensor(self, device, stream, cell)
        self._memory.append(-1)
        return Tensor(self, device, stream, len(self._memory) - 1)

    def _operation(self, stream: Stream, f: Callable[..., int], out: int, args: tuple[int, ...]) -> None:
        def work() -> None:
            self._memory[out] = f(*(self._memory[arg] for arg in args))

        stream.queue.append(work)
