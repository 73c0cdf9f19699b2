"""`make kernels`: compiles every Triton kernel for an H100 on any machine, because the interpreter accepts more code.

The kernels are those that a model of the released shapes launches (one layer of each kind, narrow experts, a small
vocabulary) in a prefill, an AR step, denoiser forwards and commits, in both dtypes. Triton gets an H100 as its target
instead of asking a driver, and each launch only compiles. Prints registers, stack (spills) and shared memory.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import model.network.tower
import model.network.two_tower
from model.checkpoint.released import RELEASED_CONFIG
from model.kernels.logits import Draws
from model.kernels.triton.kernels import CudaKernels
from model.network.two_tower import TwoTower
from tests.model.kernels.draws import choose_from

SHAPE = replace(
    RELEASED_CONFIG,
    layer_kinds=("mamba", "attention", "moe"),
    vocab_size=512,
    moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=64,
)
MAX_SHARED = 227 * 1024  # bytes for each block of threads on compute capability 9.0
MAX_STACK = 512  # bytes per thread; some float32 variants, which only tests use, come close


class Compiled(NamedTuple):
    """The resources of one compiled variant of a kernel."""

    name: str
    registers: int
    stack: int
    shared: int


class _H100:
    """A stand-in for the driver that Triton asks before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device


@contextmanager
def compiling() -> Iterator[dict[str, Any]]:
    """Make launches compile and do nothing else; yield the kernels by the hash of their variant."""
    found: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        del warmup
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found[kernel.hash] = kernel
        return kernel

    driver.set_active(_H100())
    with patch.object(JITFunction, "run", compile_only):
        yield found


def launch_all(dtype: torch.dtype) -> None:
    """Run every forward of the engine over tensors of the released shapes."""
    kernels = CudaKernels()
    kernels._prefill_scan = None  # mamba-ssm's kernel, which would compile its many variants
    with (
        patch.object(model.network.tower, "kernels_for", lambda _: kernels),
        patch.object(model.network.two_tower, "kernels_for", lambda _: kernels),
    ):
        pair = TwoTower(SHAPE, dtype, [torch.device("cpu")])
    # Kernels do not run, so zeros stand in for their results: later operations use some of them as indices.
    with patch.object(torch, "empty", torch.zeros):
        _forwards(pair)
        _choose(dtype)


def _forwards(pair: TwoTower) -> None:
    for context, lengths in ((0, (40, 16, 1)), (4096, (16, 7)), (200, (32, 32)), (200, (1, 1))):
        cache = pair.new_cache(slots=len(lengths), kv_tokens=len(lengths) * (context + 64))
        slots = [slot for length in lengths if (slot := cache.allocator.acquire(context + length)) is not None]
        cache.allocator.grow(slots, [context] * len(lengths))
        tokens = torch.zeros(sum(lengths), dtype=torch.int64)
        rows = cache.rows(slots, lengths)
        pair.denoise(cache, rows, tokens, torch.full((len(lengths),), 0.5))
        pair.extend(cache, rows, tokens)


def _choose(dtype: torch.dtype) -> None:
    """Choose tokens once with all rows greedy, and once with sampled rows."""
    rows, vocab = 4, RELEASED_CONFIG.vocab_size
    logits, suppress = torch.zeros(rows, vocab, dtype=dtype), torch.ones(rows, dtype=torch.bool)
    places = torch.arange(rows)
    whole, floats = torch.zeros(rows, 3, dtype=torch.int64), torch.ones(rows)
    draws = Draws(floats, places, floats.double(), whole[:, :2], whole, places, places)
    for given in (None, draws):
        choose_from(logits, suppress, given, CudaKernels())


def resources(kernel: Any) -> Compiled:
    """Read the resources of a kernel from its binary with cuobjdump, which comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", told.stdout)
    assert numbers, told.stdout
    return Compiled(kernel.metadata.name, int(numbers[1]), int(numbers[2]), kernel.metadata.shared)


def main() -> None:
    """Compile all kernels, and exit with an error if one does not fit an H100."""
    torch.set_num_threads(1)
    with torch.inference_mode(), compiling() as found:
        for dtype in (torch.bfloat16, torch.float32):
            launch_all(dtype)
    compiled = sorted(resources(kernel) for kernel in found.values())
    for one in compiled:
        print(f"{one.name:28} {one.registers:4} registers {one.stack:5} B of stack {one.shared:7,} B shared")
    wrong = [one for one in compiled if one.shared > MAX_SHARED or one.stack > MAX_STACK]
    if wrong:
        raise SystemExit(f"error: these do not fit an H100: {wrong}")
    print(f"{len(compiled)} variants of {len({one.name for one in compiled})} kernels compile for sm_90")


if __name__ == "__main__":
    main()
