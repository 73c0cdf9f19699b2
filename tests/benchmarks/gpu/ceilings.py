"""Measures the most that the device can do, which forwards are compared with: copy bandwidth and bfloat16 products."""

import statistics
import time
from collections.abc import Callable

import torch

from tests.benchmarks.roofline import Hardware

COPY_BYTES = {"cuda": 4 * 2**30, "cpu": 2**24}
MATMUL_SIZE = {"cuda": 8192, "cpu": 256}


def seconds(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Return the median seconds of one call after two unmeasured ones, by the device's own clock if it has one."""
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
    """Return the device as a roofline without deductions: no forward is expected to beat its copies and products."""
    return Hardware(_copy(device), _matmul(device), bandwidth_share=1.0, flops_share=1.0, layer_overhead_s=0.0)


def _copy(device: torch.device) -> float:
    """Return the bytes per second of a copy, read and written bytes together."""
    source = torch.ones(COPY_BYTES[device.type] // 2, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device)


def _matmul(device: torch.device) -> float:
    """Return the operations per second of a bfloat16 matrix product."""
    size = MATMUL_SIZE[device.type]
    a = torch.randn(size, size, device=device).bfloat16()
    return 2 * size**3 / seconds(lambda: a @ a, device)
