"""Provides the checks of `doctor` that need torch: the devices, their memory, the kernels and a job's memory plan."""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator

from pipeline.checks.findings import Check, Finding, fail, ok, warn
from pipeline.checks.machine import GIB, installed_version
from pipeline.config.job import Job
from pipeline.core.text import counted
from workers.checks.kernels import check_kernels

BUSY = 0.1
"""If more than this share (0 to 1) of a GPU's memory is in use already, its finding is a warning."""
OLDEST = (8, 0)
"""Lowest compute capability of GPUs that can compute in bfloat16."""
NO_GPU = "set workers.gpus: 0 to run on the CPU; else see whether `nvidia-smi` works and torch is built for CUDA"
"""The fix if torch finds no GPU."""


def device_checks(job: Job | None) -> list[Check]:
    """Return the checks of this machine's devices, which load torch and create a CUDA context on each GPU.

    The memory plan is checked only if there is a job. A missing GPU is a warning, unless the job asks for no GPU.
    """
    checks = [
        Check("torch", check_torch, seconds=120),
        Check("memory", check_memory),
        Check("gpus", functools.partial(check_gpus, job), seconds=120),
        Check("kernels", check_kernels, seconds=600),  # kernels for a GPU are compiled first
    ]
    return checks + ([Check("plan", functools.partial(check_plan, job), seconds=120)] if job else [])


def check_torch() -> Iterator[Finding]:
    """Report the versions of torch and Triton; warn if torch has no CUDA on a machine with an NVIDIA driver."""
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    found = f"torch {torch.__version__}, {built}; Triton {installed_version('triton') or 'none'}"
    if torch.version.cuda is None and shutil.which("nvidia-smi"):
        yield warn(f"{found}, on a machine with an NVIDIA driver", "install a build of torch for CUDA")
    else:
        yield ok(found)


def check_memory() -> Iterator[Finding]:
    """Report the free memory of the host, and warn if it is less than 2 GiB."""
    from model.checkpoint.loader import free_memory

    free = free_memory("cpu")
    found = f"{free / GIB:.1f} GiB free on the host, {os.cpu_count()} CPU cores"
    yield ok(found) if free >= 2 * GIB else warn(found, "a replica takes 1 GiB and more: stop what else runs here")


def check_gpus(job: Job | None) -> Iterator[Finding]:
    """Yield one finding for each GPU, after creating a CUDA context on it, or one finding if there is no GPU.

    Warn about a GPU without bfloat16 or with much memory in use, and about no GPU unless the job asks for none.
    """
    import torch

    count = torch.cuda.device_count()
    if not count:
        found = "none: CPU only, for the built-in models"
        yield ok(f"{found}, and the job asks for none") if job and not job.workers.gpus else warn(found, NO_GPU)
        return
    driver = _driver()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = properties.major, properties.minor
        free, total = torch.cuda.mem_get_info(index)
        found = (
            f"cuda:{index} {properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, compute capability "
            f"{capability[0]}.{capability[1]}, driver {driver}"
        )
        if capability < OLDEST:
            yield warn(f"{found}: no bfloat16", "use an Ampere GPU or a later one, or model.dtype: float32")
        elif total - free > BUSY * total:
            yield warn(f"{found}: other processes hold the rest", "see `nvidia-smi`, and stop what else runs there")
        else:
            yield ok(found)


def check_plan(job: Job) -> Iterator[Finding]:
    """Check whether the weights fit on the devices of a replica, and report how many rows fit beside them.

    If this machine has fewer GPUs than a replica needs, fail, or warn if RAY_ADDRESS names a cluster that may have
    them. Raises CheckpointError if the weights do not fit, and RequestError if no row fits beside them.
    """
    import torch

    from model.checkpoint.loader import check_memory, free_memory
    from model.checkpoint.reader import open_checkpoint
    from model.memory.fit import stage_weights
    from model.memory.planner import Planner
    from model.network.two_tower import DTYPES

    gpus, found = job.workers.gpus, torch.cuda.device_count()
    if gpus > found:
        text = f"a replica asks for {counted(gpus, 'GPU')}, this machine has {found}"
        if os.environ.get("RAY_ADDRESS"):
            yield warn(
                f"{text}, and the cluster may have them", "run doctor on a GPU node: ray job submit … doctor JOB"
            )
        else:
            yield fail(text, "lower workers.gpus (0 is the CPU), or set RAY_ADDRESS")
        return
    names = [f"cuda:{index}" for index in range(gpus)] or ["cpu"]
    checkpoint, towers, dtype = open_checkpoint(job.model.checkpoint), job.generation.towers, DTYPES[job.model.dtype]
    weights, stages = stage_weights(checkpoint.config, dtype, names, towers)
    check_memory(checkpoint, towers, dtype, names, weights)
    free = {name: free_memory(name) - need for name, need in zip(names, weights, strict=True)}
    held = dict(zip(names, weights, strict=True))
    plan = Planner(checkpoint.config, dtype, stages, held, free, job.engine.limits()).plan()
    left = min(device.left(plan.max_rows, plan.kv_tokens) for device in plan.devices)
    yield ok(
        f"{max(weights) / GIB:.2f} GiB of weights at most on each of {', '.join(names)}; max_rows {plan.max_rows}, "
        f"kv_tokens {plan.kv_tokens:,}; {left / GIB:.1f} GiB stay free"
    )


def _driver() -> str:
    """Return the version of the NVIDIA driver, or "unknown"."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return lines[0] if lines else "unknown"
