"""Tests the check of the kernels: it passes correct kernels and names each of the known faults of wrong ones."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.checks import definition
from model.checks.definition import relative_error
from model.checks.kernels import KernelError, check_kernels
from model.kernels import plain
from model.kernels.plain import PlainKernels
from model.kernels.protocol import ScanInputs
from model.network.two_tower import TwoTower, load_model
from model.runtime.ragged_batch import RaggedBatch
from tests.model.golden_cases import CHECKPOINT
from tests.model.reference import Reference

pytestmark = pytest.mark.slow

CHUNK = 128  # chunk_size of builtin:noise


def model(dtype: str = "float32", **arguments: Any) -> TwoTower:
    return load_model("builtin:noise", dtype, **arguments)


def with_kernels(kernels: PlainKernels, pair: TwoTower, tower: str = "both") -> TwoTower:
    towers = {"both": [pair.context, pair.denoiser], "denoiser": [pair.denoiser]}[tower]
    for each in towers:
        assert each is not None
        for layer in each.layers:
            layer.mixer.kernels = kernels  # type: ignore[union-attr]
            if layer.kind == "attention":
                layer.mixer.k_proj.kernels = kernels  # type: ignore[union-attr]
    return pair


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_right_kernels_pass(dtype: str) -> None:
    check_kernels(model(dtype))
    check_kernels(load_model(str(CHECKPOINT), dtype))


def test_only_what_is_loaded_is_checked_once_a_device() -> None:
    """Three stages on one device are checked once. Without the denoiser, only the context tower is checked."""
    counted: list[str] = []

    class Counting(PlainKernels):
        def mamba_scan(self, inputs: ScanInputs) -> Tensor:
            counted.append("scan")
            return super().mamba_scan(inputs)

    check_kernels(with_kernels(Counting(), model(devices=["cpu"] * 3)))
    both = len(counted)
    one_tower = model(towers="context")
    for layer in one_tower.context.layers:
        layer.mixer.kernels = Counting()  # type: ignore[union-attr]
    check_kernels(one_tower)
    assert len(counted) - both == both // 2 == 3


def with_rows(inputs: ScanInputs, **changes: Any) -> ScanInputs:
    """Return the inputs with these fields of the rows changed."""
    return replace(inputs, rows=replace(inputs.rows, **changes, _made={}))


class IgnoresSeedsOfShortRows(PlainKernels):
    """Kernels that ignore the seeds of rows shorter than a chunk, as an open-source chunk scan does with
    initial_states."""

    def mamba_scan(self, inputs: ScanInputs) -> Tensor:
        rows = inputs.rows
        seeds = tuple(-1 if n < CHUNK else seed for seed, n in zip(rows.seeds, rows.lengths, strict=True))
        return super().mamba_scan(with_rows(inputs, seeds=seeds))


class StoresIntoTheSeeds(PlainKernels):
    """Kernels whose denoiser forward, which should store nothing, leaves its states in the slots of the context."""

    def mamba_scan(self, inputs: ScanInputs) -> Tensor:
        if not inputs.store:
            inputs = replace(with_rows(inputs, slots=inputs.rows.seeds), store=True)
        return super().mamba_scan(inputs)


class ReadsLeftovers(PlainKernels):
    """Kernels that seed a row that begins from whatever its slot holds."""

    def mamba_scan(self, inputs: ScanInputs) -> Tensor:
        rows = inputs.rows
        seeds = tuple(slot if seed < 0 else seed for seed, slot in zip(rows.seeds, rows.slots, strict=True))
        return super().mamba_scan(with_rows(inputs, seeds=seeds))


class ForgetsToStore(PlainKernels):
    """Kernels that do not store the states after a prompt."""

    def mamba_scan(self, inputs: ScanInputs) -> Tensor:
        return super().mamba_scan(replace(inputs, store=False))


class SeesLaterTokens(PlainKernels):
    def attend(self, *arguments: Any, causal: bool, store: bool) -> Tensor:
        del causal
        return super().attend(*arguments, causal=False, store=store)


class SeesNoLaterTokens(PlainKernels):
    def attend(self, *arguments: Any, causal: bool, store: bool) -> Tensor:
        del causal
        return super().attend(*arguments, causal=True, store=store)


class StoresBlocks(PlainKernels):
    """Kernels that write the keys of a block that is being denoised to the pages."""

    def attend(self, *arguments: Any, causal: bool, store: bool) -> Tensor:
        del store
        return super().attend(*arguments, causal=causal, store=True)


class TakesTheWrongExpert(PlainKernels):
    """Kernels that take a wrong expert for one choice of one token."""

    def experts(self, x: Tensor, choice: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        choice = choice.clone()
        choice[0, 0] = (choice[0, 0] + 1) % len(up)
        return super().experts(x, choice, weight, up, down)


class MultipliesInHalf(PlainKernels):
    """Kernels that round the input of a float32 product to bfloat16."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return super().linear(x.bfloat16().to(x.dtype), weight)

    def experts(self, *arguments: Tensor) -> Tensor:
        return PlainKernels().experts(*arguments)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kernels", "fault"),
    [
        (IgnoresSeedsOfShortRows(), "mamba_scan .*: outputs of seeded blocks shorter than chunk_size 128 are off by "),
        (StoresIntoTheSeeds(), "mamba_scan .*: convolution inputs in the slots after seeded blocks .* are not what"),
        (ReadsLeftovers(), "mamba_scan .*: outputs of rows that begin are not finite"),
        (ForgetsToStore(), "mamba_scan .*: states stored by rows that begin are not finite"),
        (SeesLaterTokens(), "attend .*: outputs of prompts are off by "),
        (SeesNoLaterTokens(), "attend .*: outputs of blocks are off by "),
        (StoresBlocks(), "attend .*: keys and values in the pages after blocks are not what"),
        (TakesTheWrongExpert(), "experts .*: outputs are off by "),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, PlainKernels) else "",
)
def test_wrong_kernels_are_named(kernels: PlainKernels, fault: str, dtype: str) -> None:
    with pytest.raises(KernelError, match=rf"^kernel {fault}.*; nothing was generated: ") as raised:
        check_kernels(with_kernels(kernels, model(dtype)))
    assert f"of {type(kernels).__name__} is wrong on cpu in {dtype} (context tower): " in str(raised.value)
    assert "\n" not in str(raised.value)


def test_products_with_too_few_digits_are_found() -> None:
    with pytest.raises(KernelError, match=r"^kernel linear .*: outputs for token count 1 are off by "):
        check_kernels(with_kernels(MultipliesInHalf(), model()))


def test_a_fault_of_the_denoiser_alone_is_found() -> None:
    with pytest.raises(KernelError, match=r"\(denoiser tower\): outputs of seeded blocks"):
        check_kernels(with_kernels(IgnoresSeedsOfShortRows(), model(), tower="denoiser"))


def in_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def in_tensor_float(x: Tensor) -> Tensor:
    """Return the numbers rounded to 10 bits of mantissa, as TensorFloat-32 does."""
    return ((x.float().contiguous().view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("x", "states", "case"),
    [
        (in_bfloat16, in_bfloat16, "rows that begin"),
        (in_bfloat16, lambda states: states, "rows that begin"),
        (lambda x: x, in_bfloat16, "seeded blocks"),
        (in_tensor_float, lambda states: states, "rows that begin"),
    ],
    ids=["all of it", "inputs", "seed", "TensorFloat-32"],
)
def test_a_scan_that_computes_with_fewer_digits_is_named(
    x: Any, states: Any, case: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scan that rounds its inputs or its seed is found even if the model is in bfloat16, because the scan must run in
    float32."""
    right = plain._scan_chunks

    def rounded(*parts: Tensor) -> tuple[Tensor, Tensor]:
        values, dt, decay, B, C, seed = parts
        return right(x(values), dt, decay, x(B), x(C), states(seed))

    monkeypatch.setattr(plain, "_scan_chunks", rounded)
    with pytest.raises(KernelError, match=rf"^kernel mamba_scan .*: outputs of {case}.* are off by 0\.00\d+ "):
        check_kernels(model(dtype))


def test_a_scan_that_overflows_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check finds a scan in half precision: large seeded states become infinite, and NaN after one more product."""
    right = plain._scan_chunks

    def half(*parts: Tensor) -> tuple[Tensor, Tensor]:
        values, dt, decay, B, C, seed = parts
        y, last = right(values, dt, decay, B, C, (seed * 1000).half().float() / 1000)
        return y, last

    monkeypatch.setattr(plain, "_scan_chunks", half)
    with pytest.raises(KernelError, match="outputs of seeded blocks shorter than chunk_size 128 are not finite"):
        check_kernels(model())


def test_rows_are_measured_one_by_one() -> None:
    """Each row is compared by itself, so that a row of large numbers does not hide an error in a row of small ones."""
    right = torch.tensor([[1e6], [1.0]])
    assert relative_error(right + torch.tensor([[0.0], [0.5]]), right, [1, 1]) == 0.5
    assert relative_error(torch.tensor([[torch.nan], [1.0]]), right, [1, 1]) == float("inf")


def test_definitions_agree_with_the_reference_that_golden_vectors_prove() -> None:
    """The definition of the scan agrees with the scan of tests.model.reference, which the golden vectors prove
    right."""
    reference = Reference("builtin:noise", torch.float64)
    mixer = model().context.layers[0].mixer
    c = reference.config
    generator = torch.Generator().manual_seed(0)
    raw, dt, conv, ssm = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in (
            (21, c.conv_dim),
            (21, c.mamba_num_heads),
            (c.conv_dim, c.conv_kernel),
            (c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size),
        )
    )
    row = RaggedBatch((0,), (0,), (21,), (0,), ((),))
    inputs = ScanInputs(raw, dt, mixer, conv[None], ssm[None], row, store=False)  # type: ignore[arg-type]
    got, _, last = definition.mamba_scan(inputs)
    name = "context_tower.layers.0.mixer"
    line = torch.cat([conv, raw.T], dim=1)
    taps = reference.weights[f"{name}.conv1d.weight"][:, 0]
    windows = torch.stack([line[:, i + 1 : i + 1 + c.conv_kernel] for i in range(21)])
    xbc = torch.nn.functional.silu((windows * taps).sum(-1) + reference.weights[f"{name}.conv1d.bias"])
    wanted, right = reference._scan(name, xbc, dt, ssm)
    assert relative_error(got, wanted, [1] * 21) < 1e-6  # the mixer keeps its decays in float32
    assert relative_error(last[0], right, [1] * c.mamba_num_heads) < 1e-6
