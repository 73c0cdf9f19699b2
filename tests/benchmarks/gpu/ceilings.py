"""What the device can do at best, measured: copy bandwidth and bfloat16 products. Forwards are held against them."""

import statistics
import time
from collections.abc import Callable

import torch

from tests.benchmarks.roofline import Hardware

COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 2**24}
MATMUL_SIZE = {"cuda": 8192, "cpu": 256}


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Median time of one call, on the device's own clock where it has one; two unmeasured calls first."""
    for _ in range(2):
        call()
    times: list[float] = []
    for _ in range(repeats):
        if device.type == "cuda":
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            call()
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def ceilings(device: torch.device) -> Hardware:
    """The device as a roofline without deductions: nothing is expected to beat its own copies and products."""
    return Hardware(_copy(device), _matmul(device), bandwidth_share=1.0, flops_share=1.0, layer_overhead_s=0.0)


def _copy(device: torch.device) -> float:
    """Bytes a second, read and written."""
    source = torch.ones(COPY_BYTES[device.type] // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def _matmul(device: torch.device) -> float:
    """Operations a second."""
    size = MATMUL_SIZE[device.type]
    a = torch.randn(size, size, device=device).bfloat16()
    return 2 * size**3 / seconds(lambda: a @ a, device)
