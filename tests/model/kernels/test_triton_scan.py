"""Tests the Triton scan against float64 and the plain kernels, on a GPU or in the interpreter."""

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from model.checks import definition
from model.checks.definition import relative_error
from model.checks.kernels import SCAN_TOLERANCE
from model.kernels.plain import PlainKernels
from model.kernels.protocol import ScanInputs
from model.kernels.triton import scan
from model.runtime.ragged_batch import RaggedBatch

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = 1000.0
"""Size of the states, while inputs have size 1, as in model.checks.kernels."""
APART = 5
"""Number of channels between the inputs of two tokens, which are part of a larger product."""


@dataclass(frozen=True)
class Sizes:
    """The numbers of heads, channels of a head, groups, states, and taps of the convolution."""

    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int = 4

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        return self.inner + 2 * self.groups * self.state


SMALL = Sizes(heads=2, head_dim=16, groups=1, state=16)
ODD = Sizes(heads=2, head_dim=24, groups=2, state=40, taps=3)  # two tiles of states, one of them used in part
RELEASED = Sizes(heads=64, head_dim=64, groups=8, state=128)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="the released sizes take minutes where Triton is interpreted")


class Weights:
    """Random `ScanWeights`, with decays from almost none to 16 a step, as in the released model."""

    dt_limit = (0.0, float("inf"))

    def __init__(self, sizes: Sizes, generator: torch.Generator, dtype: torch.dtype) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE)

        self.conv_weight = normal(sizes.conv_dim, sizes.taps).to(dtype)
        self.conv_bias = normal(sizes.conv_dim).to(dtype)
        self.decay = -torch.linspace(0.01, 16, sizes.heads).to(DEVICE)
        self.dt_bias, self.D = normal(sizes.heads) - 3, normal(sizes.heads)
        self.groups = sizes.groups


class Case:
    """A forward with row r in slot r. A seed is a slot, or -1. The slot after those of the rows is a prefix's."""

    def __init__(self, sizes: Sizes, lengths: Sequence[int], seeds: Sequence[int], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(sum(lengths))
        count = len(lengths)
        self.sizes, self.lengths = sizes, list(lengths)
        self.weights = Weights(sizes, generator, dtype)
        self.xbc, self.dt = (
            torch.randn(sum(lengths), size + APART, generator=generator).to(DEVICE, dtype)[:, 2:-3]
            for size in (sizes.conv_dim, sizes.heads)
        )
        self.conv = torch.randn(count + 1, sizes.conv_dim, sizes.taps, generator=generator).to(DEVICE, dtype)
        shape = count + 1, sizes.heads, sizes.head_dim, sizes.state
        self.ssm = torch.randn(*shape, generator=generator).mul_(LARGE).to(DEVICE)
        for slot in set(range(count + 1)) - set(seeds):  # earlier rows may leave anything there
            self.conv[slot], self.ssm[slot] = torch.nan, torch.nan
        self.rows = RaggedBatch(tuple(range(count)), tuple(seeds), tuple(lengths), (0,) * count, ((),) * count)
        self.before = self.conv.clone(), self.ssm.clone()

    def inputs(self, conv: Tensor, ssm: Tensor, *, store: bool) -> ScanInputs:
        return ScanInputs(self.xbc, self.dt, self.weights, conv, ssm, self.rows, store)

    def right(self) -> tuple[Tensor, Tensor]:
        """Return the outputs (N, M D) and the last states (R, M, D, S), computed in float64 token by token."""
        y, _, states = definition.mamba_scan(self.inputs(*self.before, store=False))
        return y, states

    def run(self, *, store: bool) -> Tensor:
        return scan.mamba_scan(self.inputs(self.conv, self.ssm, store=store))

    def plain(self) -> tuple[Tensor, Tensor]:
        """Return the outputs of the plain kernels, and the windows (slots, …) after they have stored theirs."""
        conv, ssm = (state.clone() for state in self.before)
        y = PlainKernels().mamba_scan(self.inputs(conv, ssm, store=True))
        return y, conv

    def check(self, *, store: bool) -> None:
        """Check the outputs and all slots: stored slots must be right, and all others unchanged bit for bit."""
        got, (y, states) = self.run(store=store), self.right()
        assert relative_error(got, y, self.lengths) < SCAN_TOLERANCE
        plain, windows = self.plain()
        assert relative_error(got, plain, self.lengths) < SCAN_TOLERANCE
        expected_conv, expected_ssm = self.before
        if store:
            count = len(self.lengths)
            assert relative_error(self.ssm[:count], states, (1,) * count) < SCAN_TOLERANCE
            expected_conv, expected_ssm[:count] = windows, self.ssm[:count]
        assert torch.equal(self.conv.nan_to_num(), expected_conv.nan_to_num())
        assert torch.equal(self.ssm.nan_to_num(), expected_ssm.nan_to_num())


CASES: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "one token a row (AR)": ((1, 1, 1), (0, -1, 3)),
    "one row": ((16,), (0,)),
    "blocks": ((16, 16, 16), (0, -1, 3)),
    "ragged, shorter than the convolution": ((1, 2, 16, 3), (4, -1, 2, 3)),
    "blocks of up to 32": ((32, 17, 1), (0, 3, 2)),
    "a prompt in chunks": ((1, 67, 33), (0, -1, 3)),
}


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_scan_is_right_over_slots_full_of_nan(case: str, *, store: bool) -> None:
    """The scan is right in forwards that store nothing (denoise) and that store (commit), seeded by the row's own slot,
    by a prefix's and by nothing."""
    Case(SMALL, *CASES[case], torch.float32).check(store=store)


@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (5, 16), (20, 3)])
def test_sizes_that_are_no_powers_of_two_and_bfloat16_inputs(lengths: tuple[int, int], *, store: bool) -> None:
    """The scan is right if channels, states and taps are no powers of two, and with several groups. Its bfloat16 inputs
    are those of the definition, so float32 tolerances hold."""
    Case(ODD, lengths, (0, -1), torch.bfloat16).check(store=store)


@needs_gpu
@pytest.mark.parametrize("store", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [*CASES, "many blocks", "many single tokens"])
def test_the_released_sizes(case: str, dtype: torch.dtype, *, store: bool) -> None:
    """The scan is right at the released sizes, also with enough rows for programs of whole heads."""
    many: dict[str, tuple[Sequence[int], Sequence[int]]] = {
        "many blocks": ((16,) * 9, range(9)),
        "many single tokens": ((1,) * 9, range(9)),
    }
    lengths, seeds = (CASES | many)[case]
    Case(RELEASED, lengths, seeds, dtype).check(store=store)


def test_programs_of_a_whole_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of whole heads, which are used for many rows, give the right scan, too."""
    monkeypatch.setattr(scan, "FEW_PROGRAMS", 0)
    for lengths in ((1, 1), (16, 2)):
        Case(Sizes(2, 32, 1, 16), lengths, (0, -1), torch.float32).check(store=True)


@pytest.mark.parametrize("length", [1, 40])
def test_strong_decays_keep_their_digits(length: int) -> None:
    """If every fourth token forgets almost everything, with |dt A| about 10,000, the scan is as exact as otherwise, and
    nothing overflows."""
    case = Case(SMALL, (length,), (0,), torch.float32)
    case.weights.decay = torch.full((SMALL.heads,), -16.0, device=DEVICE)
    case.dt[::4] = 600
    case.check(store=True)


@pytest.mark.parametrize("length", [1, 16])
def test_small_steps_keep_their_digits(length: int) -> None:
    """Steps of softplus(-15) = 3e-7 keep their digits; computed with 1 + exp(x), they would keep only one."""
    case = Case(SMALL, (length,), (-1,), torch.float32)
    case.weights.D = torch.zeros_like(case.weights.D)
    case.dt[:] = -12  # with a bias of about -3
    case.check(store=True)


def test_a_limit_on_steps_holds() -> None:
    case = Case(SMALL, (4,), (0,), torch.float32)
    case.weights.dt_limit = (0.01, 0.1)
    case.check(store=True)


@pytest.mark.parametrize("length", [1, 16])
def test_a_padding_row_reads_and_writes_nothing(length: int) -> None:
    """A row of length 0 between others, as in a forward captured for more rows, uses neither its slot nor its seed:
    both stay NaN."""
    case = Case(SMALL, (length, 0, length), (0, -1, 2), torch.float32)
    got, (y, states) = case.run(store=True), case.right()
    assert relative_error(got, y, (length, length)) < SCAN_TOLERANCE
    assert relative_error(case.ssm[[0, 2]], states[[0, 2]], (1, 1)) < SCAN_TOLERANCE
    assert case.ssm[[1, 3]].isnan().all()
    assert case.conv[[1, 3]].isnan().all()


def test_no_rows_and_no_tokens() -> None:
    case = Case(SMALL, (), (), torch.float32)
    assert case.run(store=True).shape == (0, SMALL.inner)
    assert case.conv.isnan().all()
