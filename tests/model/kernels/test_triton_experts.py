"""Tests the Triton kernels of the experts and of the router against the plain kernels and float64, also on a GPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model.checks import definition
from model.checks.definition import relative_error
from model.checks.kernels import OUTPUT_TOLERANCE
from model.kernels.plain import PlainKernels

pytest.importorskip("triton")
from model.kernels.triton import experts as triton_experts
from model.kernels.triton.kernels import CudaKernels

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [  # tokens, experts, choices, hidden, width
    (1, 8, 2, 64, 8),  # builtin:noise, one token
    (9, 8, 2, 64, 8),
    (5, 8, 2, 128, 64),  # builtin:tiny
    (3, 5, 1, 24, 40),  # many experts without rows
    (20, 3, 3, 36, 20),  # every token chooses all experts; sizes that grouped_mm refuses in bfloat16
    (70, 1, 1, 16, 8),  # one expert, more than one tile of rows
]


class Experts:
    """Random experts, and tokens that choose among them: some experts are chosen far more often than others, and some
    never."""

    def __init__(self, tokens: int, experts: int, per_token: int, hidden: int, width: int, dtype: torch.dtype) -> None:
        generator = torch.Generator(DEVICE).manual_seed(tokens * 1000 + experts)

        def normal(*shape: int, size: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=DEVICE) * size).to(dtype)

        liking = torch.rand(tokens, experts, generator=generator, device=DEVICE)
        self.x = normal(tokens, hidden)
        self.choice = (liking * torch.arange(experts, 0, -1, device=DEVICE)).topk(per_token).indices
        self.weight = torch.rand(tokens, per_token, generator=generator, device=DEVICE)
        self.up, self.down = normal(experts, width, hidden, size=hidden**-0.5), normal(experts, hidden, width)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x, self.choice, self.weight, self.up, self.down))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_experts_are_those_of_the_definition_and_of_the_plain_kernels(
    case: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    given = Experts(*case, dtype)
    got = triton_experts.grouped_experts(*given)
    assert got.dtype == dtype
    ones = (1,) * case[0]
    assert relative_error(got, definition.experts(*given), ones) <= OUTPUT_TOLERANCE[dtype]
    assert relative_error(got, PlainKernels().experts(*given), ones) <= OUTPUT_TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_give_no_outputs(dtype: torch.dtype) -> None:
    given = Experts(1, 8, 2, 64, 8, dtype)
    got = triton_experts.grouped_experts(given.x[:0], given.choice[:0], given.weight[:0], given.up, given.down)
    assert got.shape == (0, 64)


@pytest.mark.parametrize("fast", [True, False])
def test_both_products_agree_in_bfloat16(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's grouped product and the project's own agree with the definition, whichever of them the device would
    use."""
    monkeypatch.setattr(triton_experts, "grouped_mm_is_fast", lambda *_: fast)
    given = Experts(30, 6, 2, 48, 24, torch.bfloat16)
    error = relative_error(triton_experts.grouped_experts(*given), definition.experts(*given), (1,) * 30)
    assert error <= OUTPUT_TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(("tokens", "per_token"), [(1, 1), (7, 3), (600, 2)])
def test_pairs_are_sorted_by_expert_and_keep_their_order(tokens: int, per_token: int) -> None:
    """Pairs of token and expert are in the order of torch's stable sort. The last case takes two passes over blocks of
    pairs."""
    experts = 6
    choice = torch.randint(experts - 1, (tokens, per_token), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    ends, place, token = triton_experts.by_expert(choice, experts)
    chosen, order = choice.flatten().sort(stable=True)
    assert ends.tolist() == torch.bincount(chosen, minlength=experts).cumsum(0).tolist()
    assert token.tolist() == (order // per_token).tolist()
    assert place[order].tolist() == list(range(tokens * per_token))


def test_a_token_that_is_not_finite_leaves_the_others_alone() -> None:
    given = Experts(12, 8, 2, 64, 8, torch.float32)
    clean = triton_experts.grouped_experts(*given)
    given.x[5] = torch.nan
    got = triton_experts.grouped_experts(*given)
    others = torch.arange(12, device=DEVICE) != 5
    assert got[5].isnan().all()
    assert torch.equal(got[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_the_square_behind_the_seam_is_the_plain_one(tokens: int, dtype: torch.dtype) -> None:
    """The squared ReLU equals the plain one, also with more than one program, and NaN stays NaN. In bfloat16 the last
    bit may differ, because the interpreter cuts it off."""
    x = torch.randn(tokens, 40, generator=torch.Generator().manual_seed(tokens)).to(DEVICE, dtype)
    x[:, 3] = torch.nan
    right = PlainKernels().squared_relu(x)
    got = CudaKernels().squared_relu(x)
    assert got.dtype == dtype
    assert torch.allclose(got, right, rtol=0 if dtype == torch.float32 else 2**-7, atol=0, equal_nan=True)


@pytest.mark.parametrize(("tokens", "experts", "per_token"), [(12, 8, 2), (4, 128, 6), (3, 5, 5), (0, 8, 2)])
@pytest.mark.parametrize("normalise", [True, False])
def test_the_choice_is_the_plain_one(tokens: int, experts: int, per_token: int, normalise: bool) -> None:
    """The router's choice equals the plain one, even if the scores of two experts differ by less than float32 can show.
    The last bit of a weight may differ."""
    generator = torch.Generator().manual_seed(experts)
    logits = torch.randn(tokens, experts, generator=generator, dtype=torch.float64).to(DEVICE)
    logits[1::3, 1] = logits[1::3, 0] + 1e-12
    bias = torch.randn(experts, generator=generator).mul(0.1).to(DEVICE)
    bias[:2] = 0.5
    choice, weight = triton_experts.choose_experts(logits, bias, per_token, 2.5, normalise=normalise)
    wanted = PlainKernels().choose_experts(logits, bias, per_token, 2.5, normalise=normalise)
    assert torch.equal(choice, wanted[0])
    assert torch.allclose(weight, wanted[1], rtol=2e-7, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_choose_experts_that_there_are(bad: float) -> None:
    """A row of logits that are not finite chooses existing experts, none of them twice. NaN shows in the row's weights,
    and other rows do not change."""
    logits = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(DEVICE)
    bias = torch.zeros(8, device=DEVICE)
    clean = triton_experts.choose_experts(logits, bias, 3, 2.5, normalise=True)
    logits[1] = bad
    choice, weight = triton_experts.choose_experts(logits, bias, 3, 2.5, normalise=True)
    assert sorted(choice[1].tolist()) == [0, 1, 2]
    assert bool(weight[1].isnan().all()) == (bad != bad)
    assert torch.equal(choice[::2], clean[0][::2])
    assert torch.equal(weight[::2], clean[1][::2])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: the released sizes are too much for the interpreter")
@pytest.mark.parametrize("tokens", [1, 16, 384 * 16])
def test_released_sizes(tokens: int) -> None:
    """With 128 experts of width 1856 in bfloat16, six for each token, the first and the last 16 tokens agree with
    float64."""
    given = Experts(tokens, 128, 6, 2688, 1856, torch.bfloat16)
    got = triton_experts.grouped_experts(*given)
    some = torch.cat([torch.arange(tokens)[:16], torch.arange(tokens)[-16:]]).unique().to(DEVICE)
    right = definition.experts(given.x[some], given.choice[some], given.weight[some], given.up, given.down)
    assert relative_error(got[some], right, (1,) * len(some)) <= OUTPUT_TOLERANCE[torch.bfloat16]
    assert torch.equal(triton_experts.grouped_experts(*given), got)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_run_in_a_cuda_graph(dtype: torch.dtype) -> None:
    """A graph captured for one choice of experts is right for another one, because the host keeps nothing of the
    choice."""
    given, other = Experts(40, 8, 2, 64, 8, dtype), Experts(40, 8, 2, 64, 8, dtype)
    triton_experts.grouped_experts(*given)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = triton_experts.grouped_experts(*given)
    other.choice.copy_(7 - given.choice)
    given.choice.copy_(other.choice)
    graph.replay()
    assert torch.equal(got, triton_experts.grouped_experts(given.x, other.choice, *tuple(given)[2:]))
