"""Copies arrays between host and device without waiting: through pinned memory on CUDA. If the device is the CPU,
nothing is copied.

`tensor.to("cuda")` from ordinary memory waits for all work that the stream has been given before. So the inputs of a
forward go to the device in one copy, and its results come back in one copy, both queued after the work that has been
launched already.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


def to_device(x: Tensor | Array, device: torch.device) -> Tensor:
    """Return x, which is on the host, on the device, for work launched after this on the device's current stream. On a
    CPU the result shares the memory of x."""
    tensor = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    if device.type != "cuda":
        return tensor.to(device)
    # pinned memory comes from a cache that does not reuse a piece before the copy from it is done
    return tensor.pin_memory().to(device, non_blocking=True)


def send(device: torch.device, *arrays: Array) -> list[Tensor]:
    """Send one-dimensional arrays of int64, float64 or bool to the device in one copy. Return them as tensors of the
    same types, but int64 for bool."""
    flat = np.concatenate([a.astype(np.int64) if a.dtype == bool else a.view(np.int64) for a in arrays])
    parts = to_device(flat, device).split([len(a) for a in arrays])
    return [p.view(torch.float64) if a.dtype == np.float64 else p for p, a in zip(parts, arrays, strict=True)]


def to_host(x: Tensor) -> Tensor:
    """Return x on the host. A tensor from CUDA may be read only once the work launched so far on the current stream is
    done, because the copy does not wait for it."""
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
