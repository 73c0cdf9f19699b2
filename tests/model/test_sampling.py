"""Sampling: the generator, the limits, and that a token depends on nothing but its own row."""

import pytest
import torch

from model import GenerationParams, Request
from model.sampling import Draws, choose, philox, uniforms

V = 50
MASK = 3


def draws(
    count: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, key: tuple[int, int] = (1, 2)
) -> Draws:
    """`count` positions of one block, all with the same settings."""
    return Draws(
        temperature=torch.full((count,), temperature),
        top_k=torch.full((count,), top_k),
        top_p=torch.full((count,), top_p, dtype=torch.float64),
        key=torch.tensor([key] * count),
        counter=torch.stack([torch.zeros(count), torch.zeros(count), torch.arange(count)], dim=1).long(),
    )


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    """The known-answer vectors of Philox4x32-10 that its authors publish."""
    assert philox(torch.tensor([counter]), torch.tensor([key]))[0].tolist() == words


def test_uniforms_are_uniform_and_distinct() -> None:
    """Over 60,000 neighbouring counters: in [0, 1), flat in 20 bins (chi-square 19 df, p < 1e-6 at 68), no repeats."""
    grid = torch.cartesian_prod(torch.arange(60), torch.arange(20), torch.arange(50))
    u = uniforms(grid, torch.tensor([[7, 9]]).expand(len(grid), 2))
    assert u.min() >= 0
    assert u.max() < 1
    assert len(u.unique()) == len(u)
    counts = torch.histc(u.float(), bins=20, min=0, max=1)
    assert float(((counts - 3000) ** 2 / 3000).sum()) < 68


def test_row_keys_differ_by_seed_and_by_row() -> None:
    requests = [Request(key, [1], GenerationParams(seed=seed)) for key in ("a#0", "a#1", "b#0") for seed in (0, 1)]
    assert len({request.sampling_key for request in requests}) == len(requests)


def test_sampled_shares_match_the_softmax() -> None:
    """40,000 draws at temperature 0.7 fall on each token as often as its probability says (5 sigma)."""
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0))
    n = 40_000
    tokens, _ = choose(logits.repeat(n, 1), torch.zeros(n, dtype=torch.bool), MASK, draws(n, temperature=0.7))
    share = torch.bincount(tokens, minlength=V) / n
    probability = (logits / 0.7).softmax(-1)
    assert torch.all((share - probability).abs() <= 5 * (probability * (1 - probability) / n).sqrt() + 1e-9)


def test_top_k_and_top_p_keep_what_they_say() -> None:
    """Every draw lies among the k likeliest, or in the smallest set that reaches p; and each of those is drawn."""
    logits = torch.randn(V, generator=torch.Generator().manual_seed(1))
    order = logits.argsort(descending=True).tolist()
    n = 20_000
    many, free = logits.repeat(n, 1), torch.zeros(n, dtype=torch.bool)
    assert set(choose(many, free, MASK, draws(n, top_k=4))[0].tolist()) == set(order[:4])
    reach = logits.softmax(-1)[order].cumsum(0)
    nucleus = order[: int((reach < 0.6).sum()) + 1]
    assert set(choose(many, free, MASK, draws(n, top_p=0.6))[0].tolist()) == set(nucleus)
    assert set(choose(many, free, MASK, draws(n, top_p=1e-9))[0].tolist()) == {order[0]}
    assert set(choose(many, free, MASK, draws(n, temperature=1e-6))[0].tolist()) == {order[0]}


def test_greedy_confidence_and_the_mask_id() -> None:
    """Greedy takes the best token; where suppressed the mask id is neither chosen nor given any probability."""
    logits = torch.zeros(2, V)
    logits[:, MASK] = 9.0
    logits[:, 7] = 2.0
    tokens, confidence = choose(logits, torch.tensor([True, False]), MASK, None)
    assert tokens.tolist() == [7, MASK]
    others = V - 2
    e2, e9 = torch.tensor([2.0, 9.0]).exp()
    assert confidence[0] == pytest.approx(float(e2 / (e2 + others)), rel=1e-6)
    assert confidence[1] == pytest.approx(float(e9 / (e9 + e2 + others)), rel=1e-6)


def test_confidence_ignores_temperature_and_limits() -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(2)).repeat(100, 1)
    free = torch.zeros(100, dtype=torch.bool)
    tokens, confidence = choose(logits, free, MASK, draws(100, temperature=3.0, top_k=10))
    assert len(set(tokens.tolist())) > 3
    assert torch.allclose(confidence, logits[0].softmax(-1)[tokens])


def test_a_position_draws_the_same_in_any_company() -> None:
    """Rows with other temperatures, limits and greedy ones beside it change nothing."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(12, V, generator=generator)
    mixed = draws(12)
    mixed.temperature[::3] = 0
    mixed.top_k[1::4] = 5
    mixed.top_p[2::4] = 0.5
    suppress = torch.arange(12) % 2 == 0
    together, sure = choose(logits, suppress, MASK, mixed)
    for i in range(12):
        one = Draws(*(getattr(mixed, name)[i : i + 1] for name in Draws.__slots__))
        token, confidence = choose(logits[i : i + 1], suppress[i : i + 1], MASK, one)
        assert token[0] == together[i]
        assert confidence[0] == sure[i]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_show_in_the_confidence(bad: float, temperature: float) -> None:
    """One bad logit makes that row's confidence NaN, its token still an id, and leaves the row beside it alone."""
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(4))
    logits[0, 11] = bad
    tokens, confidence = choose(logits, torch.tensor([True, True]), MASK, draws(2, temperature=temperature))
    assert confidence[0].isnan()
    assert 0 <= int(tokens[0]) < V
    assert confidence[1].isfinite()
