"""Between host and device without waiting: through pinned memory on CUDA, and no copy at all on a CPU.

`tensor.to("cuda")` from ordinary memory waits for everything that the stream has been given before. What a forward
needs therefore goes in one piece, and what it gives comes back in one piece, both behind the work already launched.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]


def to_device(x: Tensor | Array, device: torch.device) -> Tensor:
    """x on the device, for work launched after this on its current stream. On a CPU it shares x's memory."""
    tensor = torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    if device.type != "cuda":
        return tensor.to(device)
    # pinned memory comes from a cache that gives none out again before the copy from it is done
    return tensor.pin_memory().to(device, non_blocking=True)


def send(device: torch.device, *arrays: Array) -> list[Tensor]:
    """Flat arrays of int64, float64 or bool -> as tensors on the device, int64 for bool, by one copy."""
    flat = np.concatenate([a.astype(np.int64) if a.dtype == bool else a.view(np.int64) for a in arrays])
    parts = to_device(flat, device).split([len(a) for a in arrays])
    return [p.view(torch.float64) if a.dtype == np.float64 else p for p, a in zip(parts, arrays, strict=True)]


def to_host(x: Tensor) -> Tensor:
    """x on the host: filled, on CUDA, once what was launched on the current stream so far is done."""
    if not x.is_cuda:
        return x
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
