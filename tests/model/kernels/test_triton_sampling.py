"""Tests the Triton kernels that choose tokens against the plain ones and float64, also on a GPU."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.kernels.logits import Draws, Parts
from model.kernels.plain import PlainKernels
from model.kernels.plain_sampling import survey_slice, uniforms
from tests.model.kernels.draws import MASK, choose_from, logits_of, make_draws

pytest.importorskip("triton")
from model.kernels.triton import sampling as triton_head
from model.kernels.triton.kernels import CudaKernels

# the interpreter computes with NumPy, which warns of infinities and overflows that are intended
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.* encountered:RuntimeWarning")]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
V = 50
SLICE = 32  # V is one whole slice and a part
TINY = 1e-44


def random(rows: int, vocab: int, dtype: torch.dtype) -> Tensor:
    """Return random logits in steps of a quarter, so that some are equal."""
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 12
    return (x.round() / 4).to(DEVICE, dtype)


SETTINGS = [  # temperature, top_k, top_p
    (1.0, 0, 1.0),
    (3.0, 5, 1.0),
    (0.0, 0, 1.0),
    (2.0, 0, 0.7),
    (TINY, 0, 1.0),
    (0.5, 12, 0.95),
    (3.0, 0, 1.0),
    (1.0, 2 * V, 1e-9),
]


def mixed(count: int, kind: str = "mixed") -> Draws:
    """Return draws for greedy, free and limited rows, with each limit alone and with both.

    If kind is "free", no row has a limit; if it is "limited", every row has one.
    """
    settings = [s for s in SETTINGS if kind == "mixed" or (s[1] > 0 or s[2] < 1) == (kind == "limited")]
    temperature, top_k, top_p = zip(*(settings[i % len(settings)] for i in range(count)), strict=True)
    at = torch.arange(count)
    draws = make_draws(
        temperature=torch.tensor(temperature),
        top_k=torch.tensor(top_k),
        top_p=torch.tensor(top_p),
        key=torch.tensor([[2**32 - 1, 2]]).repeat(count, 1),
        counter=torch.stack([at * 0, at * 0 + 7, at], dim=1),
    )
    return on_device(draws)


def on_device(draws: Draws) -> Draws:
    return Draws(*(getattr(draws, name).to(DEVICE) for name in Draws.__slots__))


def cdf_of(row: Tensor, draws: Draws, i: int) -> Tensor:
    """Return the cumulative probabilities of row i in vocabulary order, within its limits, computed plainly in
    float64."""
    p = (row.double() / draws.temperature[i].double()).softmax(-1)
    order = p.argsort(descending=True, stable=True)
    kept = order[: int(draws.top_k[i])] if draws.top_k[i] else order
    before = p[kept].cumsum(0) - p[kept]
    kept = kept[before < draws.top_p[i] * p[kept].sum()]
    cdf = torch.zeros_like(p).index_copy(0, kept, p[kept]).cumsum(0)
    return cdf / cdf[-1]


def assert_drawn(x: Tensor, suppress: Tensor, draws: Draws, tokens: Tensor) -> None:
    """Check that each row's uniform number lies in its token's part of [0, 1), to 1e-6 at the ends of the part. A
    greedy row must have its best token."""
    x = x.cpu().float().clone()
    x[suppress.cpu(), MASK] = -torch.inf
    draws = Draws(*(getattr(draws, name).cpu() for name in Draws.__slots__))
    for i, u in enumerate(uniforms(draws.counter, draws.key).tolist()):
        token = int(tokens[i])
        if draws.temperature[i] == 0:
            assert token == int(x[i].argmax())
            continue
        cdf = torch.nn.functional.pad(cdf_of(x[i], draws, i), (1, 0))
        assert cdf[token] - 1e-6 <= u <= cdf[token + 1] + 1e-6, i
        assert cdf[token] < cdf[token + 1], i


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heated", [True, False])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 4), (5, 68), (2, 64), (3, 20)])
def test_slices_are_surveyed_as_by_the_plain_code(rows: int, vocab: int, heated: bool, dtype: torch.dtype) -> None:
    """One slice, whole slices and a part of a slice give what the plain code gives: the largest logit and its place
    exactly, sums to 1e-6. The settings of earlier rows are not read."""
    x, begin = random(rows, vocab, dtype), 2
    suppress = torch.arange(begin + rows, device=DEVICE) % 2 == 0
    heat = torch.tensor([9.0, 9.0, 0.7, 2.0, TINY, 0.0, 1.0], device=DEVICE)[: begin + rows] if heated else None
    compare(x, begin, suppress, heat)


def compare(x: Tensor, begin: int, suppress: Tensor, heat: Tensor | None) -> None:
    logits = logits_of(x, suppress, 2**30, SLICE)
    got = triton_head.survey(x, begin, logits, heat)
    right = Parts.empty(len(x), got.best.shape[1], x.device, mass=heat is not None)
    wide = x.float().clone()
    wide[suppress[begin:], MASK] = -torch.inf
    for i, first in enumerate(range(0, x.shape[1], SLICE)):
        some = None if heat is None else heat[begin:]
        survey_slice(wide[:, first : first + SLICE].clone(), first, some, right.of(slice(None), i))
    assert torch.equal(got.best.nan_to_num(nan=1e30), right.best.nan_to_num(nan=1e30))
    assert torch.equal(got.at, right.at)
    assert torch.allclose(got.total, right.total, rtol=1e-6, atol=0, equal_nan=True)
    if got.mass is not None and right.mass is not None:
        assert torch.allclose(got.mass, right.mass, rtol=2e-6, atol=0, equal_nan=True)


def test_slices_that_are_not_finite_are_surveyed_as_by_the_plain_code() -> None:
    """Slices with NaN, infinity, both, or nothing but -inf give what the plain code gives, also the first and the last
    one, and if a NaN is that of the suppressed mask id."""
    x = random(8, V, torch.float32)
    x[0, V - 1], x[1, 20], x[2, 5] = torch.nan, torch.inf, -torch.inf
    x[3, 2], x[3, 4], x[3, 1] = torch.nan, torch.nan, torch.inf
    x[4] = -torch.inf
    x[5] = -torch.inf
    x[5, MASK] = 1.0
    x[6, MASK], x[7, MASK] = torch.nan, torch.nan
    suppress = torch.tensor([False] * 5 + [True, True, False], device=DEVICE)
    compare(x, 0, suppress, torch.full((8,), 0.7, device=DEVICE))


def test_uniform_numbers_are_the_same_bits() -> None:
    """The uniform numbers of 300 positions, which take more than one program, have the bits of the plain code, with all
    32 bits of the words in use."""
    words = torch.randint(0, 2**32, (300, 5), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    counter, key = words[:, :3], words[:, 3:]
    assert torch.equal(triton_head.uniforms(counter, key), uniforms(counter, key))
    assert triton_head.uniforms(counter[:0], key[:0]).shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "vocab", "dtype"), [(8, V, torch.bfloat16), (4, SLICE - 1, torch.float32), (1, 2 * SLICE, torch.bfloat16)]
)
def test_tokens_are_those_of_the_plain_kernels(count: int, vocab: int, dtype: torch.dtype) -> None:
    """Greedy, free and limited rows together get the plain tokens, with many equal logits at every limit, all at once
    or in pieces.

    A token may differ only if its uniform number is so near the border of two tokens (1e-6 of all) that the order of
    addition decides. With these seeds none does.
    """
    x, draws = random(count, vocab, dtype), mixed(count)
    suppress = torch.arange(count, device=DEVICE) % 2 == 0
    room = (count // 2 + 1) * vocab * x.element_size()
    tokens, confidence = choose_from(x, suppress, draws, CudaKernels(), width=SLICE, workspace=room)
    assert_drawn(x, suppress, draws, tokens)
    right, sure = choose_from(x, suppress, draws, PlainKernels(), width=SLICE)
    assert torch.equal(tokens, right)
    assert torch.allclose(confidence, sure, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["greedy", "free", "limited"])
def test_each_kind_by_itself(kind: str) -> None:
    """Rows without limits, rows with limits, and greedy rows without draws get the plain tokens in one piece."""
    x, suppress = random(4, V, torch.bfloat16), torch.ones(4, dtype=torch.bool, device=DEVICE)
    draws = None if kind == "greedy" else mixed(4, kind)
    assert draws is None or len(draws.free if kind == "free" else draws.limited) == (3 if kind == "free" else 4)
    tokens, confidence = choose_from(x, suppress, draws, CudaKernels(), width=SLICE)
    right, sure = choose_from(x, suppress, draws, PlainKernels(), width=SLICE)
    assert torch.equal(tokens, right)
    assert torch.allclose(confidence, sure, rtol=1e-6, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (4, 1.0), (0, 0.999)])
def test_an_id_without_probability_is_never_drawn(uniform: float, top_k: int, top_p: float) -> None:
    """The smallest and the largest uniform number draw a possible id, although slices begin with, end with or consist
    of impossible ones."""
    x = torch.full((1, V), -torch.inf, device=DEVICE)
    possible = [SLICE - 2, SLICE + 2, V - 2]
    x[0, possible] = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    place = torch.zeros(1, 3, dtype=torch.int64)
    settings = (torch.tensor([1.0]), torch.tensor([top_k]), torch.tensor([top_p]))
    draws = on_device(make_draws(*settings, place[:, :2], place))
    logits = logits_of(x, torch.tensor([True], device=DEVICE), 2**30, SLICE)
    choice = CudaKernels().choose_tokens(logits, draws, torch.tensor([uniform], dtype=torch.float64, device=DEVICE))
    assert choice.tokens.item() == possible[0 if uniform == 0 else -1]
    assert choice.logit == x[0, choice.tokens]


@pytest.mark.slow
def test_rows_that_are_not_finite_get_an_id_and_no_probability() -> None:
    """Greedy, free and limited rows with NaN or infinity, or without a possible id, get some id and the confidence NaN.
    The rows beside them do not change."""
    x, draws = random(12, V, torch.bfloat16), mixed(12)
    fine = x.clone()
    x[torch.arange(1, 12, 3), torch.tensor([2, 20, 40, V - 1])] = torch.tensor(
        [torch.inf, torch.nan, torch.nan, torch.inf]
    ).to(x)
    x[2::3] = -torch.inf
    suppress = torch.zeros(12, dtype=torch.bool, device=DEVICE)
    tokens, confidence = choose_from(x, suppress, draws, CudaKernels(), width=SLICE)
    right, sure = choose_from(fine, suppress, draws, PlainKernels(), width=SLICE)
    assert ((tokens >= 0) & (tokens < V)).all()
    assert (confidence[1::3].isnan() & confidence[2::3].isnan()).all()
    assert torch.equal(tokens[::3], right[::3])
    assert torch.allclose(confidence[::3], sure[::3], rtol=1e-6, atol=0)


class NoWaiting(TorchDispatchMode):
    """A mode that fails at each operation that makes the host wait for a GPU, because it asks the GPU for a number or a
    size."""

    WAITS = ("_local_scalar_dense", "nonzero", "item", "unique", "masked_select", "repeat_interleave", "bincount")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch gives its modes no types

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and importing dynamo is slow

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in func.name() for name in self.WAITS), f"{func.name()} waits for the device"
        assert not any(isinstance(a, Tensor) and a.dtype == torch.bool for a in _indices(func, args)), func.name()
        return func(*args, **(kwargs or {}))


def _indices(func: Any, args: Any) -> Iterator[Any]:
    if "index" in func.name() and len(args) > 1:
        yield from args[1] if isinstance(args[1], list | tuple) else ()


def test_nothing_waits_for_the_device() -> None:
    """The Triton kernels run under a mode that refuses operations that wait. The plain kernels do wait, which shows
    that the mode notices it."""
    x, suppress, draws = random(3, 20, torch.bfloat16), torch.ones(3, dtype=torch.bool, device=DEVICE), mixed(3)
    assert len(draws.free) == len(draws.limited) == 1
    with NoWaiting():
        choose_from(x, suppress, draws, CudaKernels(), width=SLICE)
        choose_from(x, suppress, None, CudaKernels(), width=SLICE)
    with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
        choose_from(x, suppress, draws, PlainKernels(), width=SLICE)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the released vocabulary is too much for the interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 512])
def test_released_vocabulary(rows: int, dtype: torch.dtype) -> None:
    """Rows of every kind are drawn as float64 says, without a wait that CUDA itself would report, and twice with the
    same bits."""
    vocab = 131_072
    x = (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 3).to(DEVICE, dtype)
    suppress, draws = torch.ones(rows, dtype=torch.bool, device=DEVICE), mixed(rows)
    choose_from(x, suppress, draws, CudaKernels())  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        got, again = (choose_from(x, suppress, draws, CudaKernels()) for _ in range(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got[0], again[0])
    assert torch.equal(got[1], again[1])
    assert_drawn(x, suppress, draws, got[0])
