"""Tests that the forward scan of mamba-ssm, in Triton's interpreter, gives the plain scan, and that blocks do not use
it.

A call is slow in the interpreter, so the sizes are small; on a GPU, model.checks.kernels runs it at full size.
"""

import contextlib
from importlib.util import find_spec
from typing import Any, cast

import pytest
import torch

from model.kernels.plain import PlainKernels, selective_scan
from model.kernels.protocol import ScanInputs
from model.kernels.triton import prefill_scan

pytestmark = pytest.mark.slow

HAS_GPU = torch.cuda.is_available()


@pytest.fixture
def mamba_ssm(monkeypatch: pytest.MonkeyPatch) -> None:
    if not HAS_GPU:
        monkeypatch.setattr(torch.cuda, "device", lambda *_: contextlib.nullcontext())
    found = prefill_scan.prefill_scan_of_mamba_ssm()
    assert found is not None, "make test installs mamba-ssm, without its compiled part"
    assert find_spec("mamba_ssm") is not None, "others, as doctor, may still ask for it"


@pytest.mark.usefixtures("mamba_ssm")
def test_seeded_rows_of_unlike_lengths_give_the_plain_scan() -> None:
    """Seeded rows of a little more than a chunk, one of them padded, give the plain scan. The seeds are large, as in
    model.checks.kernels."""
    device = "cuda" if HAS_GPU else "cpu"
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    rows, length, heads, dim, groups, state = 2, prefill_scan.CHUNK + 6, 2, 16, 1, 16
    x, dt = normal(rows, length, heads, dim), normal(rows, length, heads).abs() / 10
    dt[1, 40:] = 0
    B, C, seeds = (
        normal(rows, length, groups, state),
        normal(rows, length, groups, state),
        normal(rows, heads, dim, state),
    )
    decay = -normal(heads).exp()
    got = prefill_scan.scan_prompts(x, dt, decay, B, C, seeds * 1000)
    wanted = selective_scan(x, dt, decay, B, C, seeds * 1000)
    for mine, right in zip(got, wanted, strict=True):
        assert float((mine - right).abs().max() / right.abs().max()) < 2e-6


def test_a_block_goes_through_the_kernel_for_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a forward that reads a prompt of 40 tokens beside blocks of 16, the blocks go through the kernel for
    blocks."""
    from model.kernels.triton import kernels as cuda
    from model.kernels.triton import scan as triton_scan
    from model.runtime.ragged_batch import RaggedBatch

    seen: list[tuple[str, int]] = []

    def block_scan(inputs: ScanInputs) -> torch.Tensor:
        seen.append(("block", len(inputs.xbc)))
        return torch.zeros(len(inputs.xbc), 4)

    def prompt_scan(_kernels: object, inputs: ScanInputs) -> torch.Tensor:
        seen.append(("prompt", len(inputs.xbc)))
        return torch.zeros(len(inputs.xbc), 4)

    monkeypatch.setattr(cuda, "prefill_scan_of_mamba_ssm", lambda: prompt_scan)
    monkeypatch.setattr(triton_scan, "mamba_scan", block_scan)
    monkeypatch.setattr(PlainKernels, "_scan", prompt_scan)
    kernels, weights = cuda.CudaKernels(), cast(Any, None)
    states = torch.zeros(4, 3, 4), torch.zeros(4, 1, 4, 4)
    for lengths in ((40, 16, 16), (16, 16)):
        count, tokens, slots = len(lengths), sum(lengths), tuple(range(len(lengths)))
        rows = RaggedBatch(slots, slots, lengths, (0,) * count, ((),) * count)
        xbc, dt = torch.zeros(tokens, 3), torch.zeros(tokens, 1)
        kernels.mamba_scan(ScanInputs(xbc, dt, weights, *states, rows, store=True))
    assert seen == [("prompt", 40), ("block", 32), ("block", 32)]
