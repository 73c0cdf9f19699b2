"""Provides the check of `doctor` for kernels: which kernels each device uses, and whether their results are correct."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from model.errors import TwoTowerError
from model.runtime.device_errors import first_line
from pipeline.checks.findings import Finding, fail, ok, warn
from pipeline.checks.machine import GIB, installed_version

if TYPE_CHECKING:
    from model import TwoTower


RELEASED_LAYERS = 4 * GIB
"""Free GPU memory, in bytes, that the check at the released model's sizes needs: for weights and the comparison."""

PREFILL_SCAN = "ops/triton/ssd_combined.py"
"""The file of the package mamba-ssm that has its scan for prompts."""


def check_kernels() -> Iterator[Finding]:
    """Yield a finding for each device: which kernels it uses, and whether their results are correct.

    Kernels are checked with builtin:noise; on a GPU they are also checked at the released model's sizes. One more
    finding says whether mamba-ssm's scan is installed; on a machine without GPUs, only if it is.
    """
    import torch

    gpus = torch.cuda.device_count()
    torch.set_num_threads(1)  # the computations are small: more threads would only wait for each other
    yield from (_check_kernels_on(device) for device in ("cpu", *(f"cuda:{index}" for index in range(gpus))))
    spec = find_spec("mamba_ssm")
    folders = spec.submodule_search_locations if spec else None
    if any(os.path.isfile(os.path.join(folder, PREFILL_SCAN)) for folder in folders or ()):
        yield ok(f"mamba-ssm {installed_version('mamba-ssm')} has its Triton scan for prompts")
    elif gpus:
        yield warn(
            "mamba-ssm is not installed: prompts are read more slowly",
            "MAMBA_SKIP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-deps --no-build-isolation mamba-ssm",
        )


def _check_kernels_on(device: str) -> Finding:
    """Return the finding for the kernels of one device, `cpu` or `cuda:N`."""
    import torch

    from model import load_model
    from model.checks.kernels import check_kernels as compare
    from model.kernels import kernels_for

    name, took = type(kernels_for(torch.device(device))).__name__, dict[str, float]()
    dtype = "float32" if device == "cpu" else "bfloat16"
    try:
        pair = load_model("builtin:noise", dtype, [device])
        took["small"] = _seconds(lambda: compare(pair))
        if device != "cpu":
            released = _released_layers(device)
            took["released"] = _seconds(lambda: compare(released))
    except TwoTowerError as error:  # its text says what to do
        return fail(f"{device}: {error}")
    except Exception as error:  # a compiler or a device may raise anything
        text = f"{device}: {name} failed: {type(error).__name__}: {first_line(error)}"
        return fail(text, "compare driver, torch and Triton with a machine where they run, or set workers.gpus: 0")
    compared = ", ".join(f"{seconds:.1f} s for {size} sizes" for size, seconds in took.items())
    return ok(f"{device}: {name}, correct in {dtype}, compiled and compared in {compared}")


def _released_layers(device: str) -> "TwoTower":
    """Return a model with one layer of each kind at the released context tower's sizes, and a small vocabulary.

    Its random weights take 2.6 GiB. Raises RequestError if the device has too little free memory.
    """
    import torch

    from model.checkpoint.loader import free_memory
    from model.checkpoint.released import RELEASED_CONFIG
    from model.errors import RequestError
    from model.network.random_weights import random_pair

    if (free := free_memory(device)) < RELEASED_LAYERS:
        raise RequestError(
            f"{free / GIB:.1f} GiB are free, too few for a layer of each kind at the released sizes "
            f"({RELEASED_LAYERS / GIB:.0f} GiB): stop what else runs there"
        )
    config = replace(RELEASED_CONFIG, layer_kinds=("mamba", "attention", "moe"), vocab_size=512)
    return random_pair(config, torch.bfloat16, [torch.device(device)], "context")


def _seconds(call: Callable[[], object]) -> float:
    """Call the function and return how many seconds it took."""
    started = time.monotonic()
    call()
    return time.monotonic() - started
