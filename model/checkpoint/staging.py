"""Allocates host buffers through which weights are loaded, and copies the weights from them to a device.

For CUDA the buffers are pinned, and the copies run on their own stream while other buffers are filled.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

import torch
from torch import Tensor


class Copies(Protocol):
    """The protocol for copies of weights from host buffers to the tensors that they are loaded into, the targets."""

    def buffer(self, size: int) -> Tensor:
        """Return a new buffer on the host: (size,) uint8, uninitialised."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Start a copy of `source`, a slice of a buffer viewed in its stored dtype, to `target`.

        Values are rounded once, to the target's dtype, on the target's device.
        """

    def mark(self) -> Callable[[], object]:
        """Return a function that waits until all copies started so far are done."""


class HostCopies:
    """The copies to targets on the CPU. Each copy is done when `copy` returns."""

    def buffer(self, size: int) -> Tensor:
        """Return a buffer of `size` bytes; see Copies."""
        return torch.empty(size, dtype=torch.uint8)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy `source` to `target`; see Copies."""
        target.copy_(source)

    def mark(self) -> Callable[[], object]:
        """Return a function that does nothing, because all copies are done; see Copies."""
        return lambda: None


class CudaCopies:
    """The copies to targets on GPUs, which run on one stream per GPU, and to targets on the CPU."""

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self._streams = {device: torch.cuda.Stream(device) for device in devices if device.type == "cuda"}
        for device, stream in self._streams.items():
            # unfinished work on the current stream may still use memory that the allocator has given to a target
            stream.wait_stream(torch.cuda.current_stream(device))

    def buffer(self, size: int) -> Tensor:
        """Return a buffer of `size` bytes in pinned memory; see Copies."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Start a copy of `source` to `target`; see Copies.

        If the dtypes differ, the device also holds `source` in its stored dtype until the conversion is done.
        """
        if not target.is_cuda:
            target.copy_(source)
            return
        with torch.cuda.stream(self._streams[target.device]):
            if source.dtype != target.dtype:
                source = source.to(target.device, non_blocking=True)
            target.copy_(source, non_blocking=True)

    def mark(self) -> Callable[[], object]:
        """Return a function that waits for the copies that all streams have got so far; see Copies."""
        events = [stream.record_event() for stream in self._streams.values()]
        return lambda: [event.synchronize() for event in events]


def copies_to(devices: Iterable[torch.device]) -> Copies:
    """Return the implementation of Copies for targets on these devices: CudaCopies if one of them is a GPU."""
    found = set(devices)
    return CudaCopies(found) if any(device.type == "cuda" for device in found) else HostCopies()
