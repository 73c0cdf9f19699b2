"""What the Triton kernel keeps of a slice of logits, against the plain one; the same file runs on a GPU."""

import pytest
import torch
from torch import Tensor

from model import sampling
from model.sampling import CUDA_SLICE, Draws, Parts, choose, choose_from, survey_slice

triton_head = pytest.importorskip("model.kernels.triton_head", exc_type=ImportError)

# NumPy, with which the interpreter computes, warns of infinities that are meant
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in .*:RuntimeWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASK = 3
NAMES = ("best", "at", "total", "mass")


def random(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Logits with repeated ones among them: a quarter of a unit apart."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(width)) * 12
    return (x.round() / 4).to(DEVICE, dtype)


def tables(rows: int, *, heated: bool) -> Parts:
    """For three slices, so that one slice's columns are strided; full of what must not stay."""
    floats = (torch.full((rows, 3), -7.0, device=DEVICE) for _ in range(3))
    best, at, total = floats
    return Parts(best, at.long(), total, total.double() if heated else None)


def assert_same(got: Parts, right: Parts) -> None:
    """Largest and first exactly; sums, added in another order, to 1e-6; NaN and inf where they are due."""
    assert torch.equal(got.best.nan_to_num(nan=1e30), right.best.nan_to_num(nan=1e30))
    assert torch.equal(got.at, right.at)
    assert torch.allclose(got.total, right.total, rtol=1e-6, atol=0, equal_nan=True)
    if got.mass is not None and right.mass is not None:
        assert torch.allclose(got.mass, right.mass, rtol=2e-6, atol=0, equal_nan=True)


def compare(x: Tensor, first: int, suppress: Tensor, temperature: Tensor | None) -> None:
    got, right = (tables(len(x), heated=temperature is not None) for _ in range(2))
    before = x.clone()
    triton_head.survey_slice(x, first, suppress, MASK, temperature, got.of(slice(None), 1))
    assert torch.equal(x.nan_to_num(), before.nan_to_num())
    survey_slice(before, first, suppress, MASK, temperature, right.of(slice(None), 1))
    assert_same(got, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heated", [True, False])
@pytest.mark.parametrize(("rows", "width", "first"), [(1, 1, 3), (5, 260, 0), (3, 9, 2), (2, 4096 + 5, 1), (2, 16, 4)])
def test_a_slice_is_surveyed_as_by_the_plain_code(
    rows: int, width: int, first: int, heated: bool, dtype: torch.dtype
) -> None:
    """One column, odd widths, more than one block; the mask id first, inside, or in another slice."""
    suppress = torch.arange(rows, device=DEVICE) % 2 == 0
    temperature = torch.tensor([0.7, 2.0, 1e-44, 0.0, 1.0], device=DEVICE)[:rows] if heated else None
    compare(random(rows, width, dtype), first, suppress, temperature)


def test_logits_that_are_not_finite_are_kept_as_by_the_plain_code() -> None:
    """NaN, inf, both, nothing but -inf; in the first block and the last; a NaN that is the suppressed mask id's."""
    x = random(8, 4100, torch.float32)
    x[0, 4099], x[1, 70], x[2, 5] = torch.nan, torch.inf, -torch.inf
    x[3, 2], x[3, 4098], x[3, 1] = torch.nan, torch.nan, torch.inf
    x[4] = -torch.inf
    x[5] = -torch.inf
    x[5, MASK] = 1.0
    x[6, MASK], x[7, MASK] = torch.nan, torch.nan
    suppress = torch.tensor([False] * 5 + [True, True, False], device=DEVICE)
    compare(x, 0, suppress, torch.full((8,), 0.7, device=DEVICE))


def test_no_rows_are_surveyed() -> None:
    compare(random(0, 20, torch.float32), 0, torch.zeros(0, dtype=torch.bool, device=DEVICE), None)


def test_the_choice_is_the_same_with_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled positions, with limits and without, over three slices: the seam carries everything across.

    A head that gives bfloat16, with and without the kernel, against its logits in float32.
    """
    count, vocab = 24, 50
    logits = random(count, vocab, torch.bfloat16)
    at = torch.arange(count)
    draws = Draws(
        temperature=torch.tensor([0.0, 1.0, 2.0])[at % 3].to(DEVICE),
        top_k=(at % 4).to(DEVICE),
        top_p=torch.ones(count, dtype=torch.float64, device=DEVICE),
        key=torch.tensor([[1, 2]], device=DEVICE).repeat(count, 1),
        counter=torch.stack([at * 0, at * 0, at], dim=1).to(DEVICE),
    )
    suppress = (at % 2 == 0).to(DEVICE)
    monkeypatch.setattr(sampling, "_survey_on", lambda _: survey_slice)
    wanted = choose_from(logits.float(), suppress, MASK, draws)
    for survey in (survey_slice, triton_head.survey_slice):
        monkeypatch.setattr(sampling, "_survey_on", lambda _, survey=survey: survey)
        tokens, confidence = choose(
            lambda rows, part: logits[rows, part], count, vocab, suppress, MASK, draws, width=20
        )
        assert torch.equal(tokens, wanted[0])
        assert torch.allclose(confidence, wanted[1], rtol=1e-6, atol=0)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the released vocabulary is too much for the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 384 * 16])
def test_released_sizes(rows: int, dtype: torch.dtype) -> None:
    """A slice of the released vocabulary, all masked positions of the largest batch; twice the same bits."""
    x = random(rows, CUDA_SLICE, dtype)
    suppress = torch.ones(rows, dtype=torch.bool, device=DEVICE)
    got, again, right = (tables(rows, heated=True) for _ in range(3))
    heat = torch.full((rows,), 0.7, device=DEVICE)
    for parts in (got, again):
        triton_head.survey_slice(x, 0, suppress, MASK, heat, parts.of(slice(None), 1))
    survey_slice(x, 0, suppress, MASK, heat, right.of(slice(None), 1))
    assert_same(got, right)
    assert all(torch.equal(getattr(got, name), getattr(again, name)) for name in NAMES)
