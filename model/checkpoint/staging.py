"""Host memory through which weights pass on their way to a device, and the copies out of it.

On CUDA it is pinned, and copies go on a stream of their own beside the reads that fill the other buffers.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor


class Copies(Protocol):
    """How what stands in host buffers reaches its destination."""

    def buffer(self, size: int) -> Tensor:
        """`size` bytes of host memory, uint8."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Begins target <- source, part of a buffer; rounded once, to the target's dtype, on the target's device."""

    def mark(self) -> Callable[[], object]:
        """What waits, when called, until all copies begun so far are done."""


class HostCopies:
    """To the CPU: a copy is done when `copy` returns."""

    def buffer(self, size: int) -> Tensor:
        """See Copies."""
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See Copies."""
        target.copy_(source)

    def mark(self) -> Callable[[], object]:
        """See Copies."""
        return lambda: None


class CudaCopies:
    """To GPUs, a stream each, and to the CPU."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._streams = {device: torch.cuda.Stream(device) for device in devices if device.type == "cuda"}
        for device, stream in self._streams.items():
            # the allocator may have taken a target's memory from work that is still to end on the other stream
            stream.wait_stream(torch.cuda.current_stream(device))

    def buffer(self, size: int) -> Tensor:
        """See Copies."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """See Copies. What is converted is a second time on the device, for as long as that takes."""
        if not target.is_cuda:
            target.copy_(source)
            return
        with torch.cuda.stream(self._streams[target.device]):
            if source.dtype != target.dtype:
                source = source.to(target.device, non_blocking=True)
            target.copy_(source, non_blocking=True)

    def mark(self) -> Callable[[], object]:
        """See Copies."""
        events = [stream.record_event() for stream in self._streams.values()]
        return lambda: [event.synchronize() for event in events]


def copies_to(devices: Iterable[torch.device]) -> Copies:
    """The copies for targets on these devices."""
    found = set(devices)
    return CudaCopies(found) if any(device.type == "cuda" for device in found) else HostCopies()
