"""Tests sampling: the random generator, the limits, and that a token depends on nothing but its own row."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from model import GenerationParams, Request
from model.checkpoint.reader import open_checkpoint
from model.kernels.logits import Draws, Logits
from model.kernels.plain import VOCAB_SLICE, PlainKernels
from model.kernels.plain_sampling import invert, philox, uniforms
from model.network.sampling import choose
from model.network.tower import Tower
from tests.model.kernels.draws import MASK, choose_from, grouped, make_draws
from tests.model.memory.meter import MemoryMeter

V = 50
SLICE = 16  # slice width for tests that need several slices of a small vocabulary


def draws(
    count: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, key: tuple[int, int] = (1, 2)
) -> Draws:
    """Return draws for `count` positions of one block, all with the same settings."""
    return make_draws(
        temperature=torch.full((count,), temperature),
        top_k=torch.full((count,), top_k),
        top_p=torch.full((count,), top_p, dtype=torch.float64),
        key=torch.tensor([key]).repeat(count, 1),
        counter=torch.stack([torch.zeros(count), torch.zeros(count), torch.arange(count)], dim=1).long(),
    )


def mixed_draws(count: int) -> Draws:
    """Return draws for greedy positions and for others with top_k, top_p, both or neither, at three temperatures."""
    mixed = draws(count)
    at = torch.arange(count)
    mixed.temperature[:] = torch.tensor([1.0, 0.4, 2.0])[at % 3]
    mixed.temperature[::5] = 0
    mixed.top_k[at % 4 == 1] = 5
    mixed.top_p[at % 7 > 4] = 0.6
    return grouped(mixed)


def row_of(all_draws: Draws, i: int) -> Draws:
    return grouped(Draws(*(getattr(all_draws, name)[i : i + 1] for name in Draws.__slots__)))


def sliced(
    logits: Tensor, suppress: Tensor, given: Draws | None, width: int = SLICE, workspace: int | None = None
) -> tuple[Tensor, Tensor]:
    return choose_from(logits, suppress, given, workspace=workspace, width=width)


def free(count: int) -> Tensor:
    """Return a mask by which no position suppresses the mask id."""
    return torch.zeros(count, dtype=torch.bool)


def whole(logits: Tensor, suppress: Tensor, given: Draws) -> tuple[Tensor, Tensor]:
    """Return the same choice, computed plainly row by row over the whole vocabulary in float64."""
    tokens, confidence = [], []
    for i, u in enumerate(uniforms(given.counter, given.key).tolist()):
        row = logits[i].double()
        row[MASK] = -torch.inf if suppress[i] else row[MASK]
        token = int(row.argmax())
        if given.temperature[i] > 0:
            p = (row / given.temperature[i]).softmax(-1)
            order = p.argsort(descending=True, stable=True)
            kept = order[: int(given.top_k[i])] if given.top_k[i] else order
            before = p[kept].cumsum(0) - p[kept]
            kept = kept[before < given.top_p[i] * p[kept].sum()]
            cdf = torch.zeros_like(p).index_copy(0, kept, p[kept]).cumsum(0)
            token = int((cdf <= u * cdf[-1]).sum())
        tokens.append(token)
        confidence.append(float(row.softmax(-1)[token]))
    return torch.tensor(tokens), torch.tensor(confidence)


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
    """The generator gives the known-answer vectors of Philox4x32-10 that its authors publish."""
    assert philox(torch.tensor([counter]), torch.tensor([key]))[0].tolist() == words


def test_uniforms_are_uniform_and_distinct() -> None:
    """For 60,000 neighbouring counters the numbers lie in [0, 1), do not repeat, and are flat in 20 bins (chi-square
    with 19 degrees of freedom, p < 1e-6 at 68)."""
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


@pytest.mark.parametrize("width", [SLICE, VOCAB_SLICE])
def test_sampled_shares_match_the_softmax(width: int) -> None:
    """40,000 draws at temperature 0.7 fall on each token as often as its probability says, within 5 sigma.

    This holds if the vocabulary is one slice, and if it is three slices and a part of one.
    """
    logits = torch.randn(V, generator=torch.Generator().manual_seed(0))
    n = 40_000
    tokens, _ = sliced(logits.repeat(n, 1), free(n), draws(n, temperature=0.7), width)
    share = torch.bincount(tokens, minlength=V) / n
    probability = (logits / 0.7).softmax(-1)
    assert torch.all((share - probability).abs() <= 5 * (probability * (1 - probability) / n).sqrt() + 1e-9)


def test_top_k_and_top_p_keep_what_they_say() -> None:
    """Every draw is among the k most probable tokens, or in the smallest set that reaches p, and each of these tokens
    is drawn."""
    logits = torch.randn(V, generator=torch.Generator().manual_seed(1))
    order = logits.argsort(descending=True).tolist()
    n = 20_000
    many = logits.repeat(n, 1)
    assert set(choose_from(many, free(n), draws(n, top_k=4))[0].tolist()) == set(order[:4])
    reach = logits.softmax(-1)[order].cumsum(0)
    nucleus = order[: int((reach < 0.6).sum()) + 1]
    assert set(choose_from(many, free(n), draws(n, top_p=0.6))[0].tolist()) == set(nucleus)
    assert set(choose_from(many, free(n), draws(n, top_p=1e-9))[0].tolist()) == {order[0]}
    assert set(choose_from(many, free(n), draws(n, temperature=1e-6))[0].tolist()) == {order[0]}


def test_greedy_confidence_and_the_mask_id() -> None:
    """Greedy takes the best token. If the mask id is suppressed, it is not chosen and has no probability."""
    logits = torch.zeros(2, V)
    logits[:, MASK] = 9.0
    logits[:, 7] = 2.0
    tokens, confidence = choose_from(logits, torch.tensor([True, False]), None)
    assert tokens.tolist() == [7, MASK]
    others = V - 2
    e2, e9 = torch.tensor([2.0, 9.0]).exp()
    assert confidence[0] == pytest.approx(float(e2 / (e2 + others)), rel=1e-6)
    assert confidence[1] == pytest.approx(float(e9 / (e9 + e2 + others)), rel=1e-6)


def test_confidence_ignores_temperature_and_limits() -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(2)).repeat(100, 1)
    tokens, confidence = choose_from(logits, free(100), draws(100, temperature=3.0, top_k=10))
    assert len(set(tokens.tolist())) > 3
    assert torch.allclose(confidence, logits[0].softmax(-1)[tokens])


@pytest.mark.parametrize("size", [SLICE - 1, SLICE, SLICE + 1, 2 * SLICE, 3 * SLICE + 5])
def test_slices_choose_what_the_whole_vocabulary_chooses(size: int) -> None:
    """300 positions of every kind get the tokens that the whole vocabulary gives, wherever in a slice it ends, and also
    in several pieces."""
    n = 300
    logits = torch.randn(n, size, generator=torch.Generator().manual_seed(size)) * 2
    suppress = torch.arange(n) % 2 == 0
    logits[::4, MASK] = 20.0
    mixed = mixed_draws(n)
    expected, sure = whole(logits, suppress, mixed)
    tokens, confidence = sliced(logits, suppress, mixed)
    assert torch.equal(tokens, expected)
    assert torch.allclose(confidence, sure, rtol=1e-5)
    small = sliced(logits, suppress, mixed, workspace=20 * 1024)
    assert torch.equal(small[0], tokens)
    assert torch.equal(small[1], confidence)


@pytest.mark.parametrize("first", [0, SLICE - 1, SLICE, 2 * SLICE + 7])
def test_the_first_of_equal_logits_wins_across_slices(first: int) -> None:
    """The first of equal logits wins, as with argmax over the whole vocabulary."""
    logits = torch.zeros(1, V)
    logits[0, [first, 2 * SLICE + 9, V - 1]] = 4.0
    assert sliced(logits, free(1), None)[0].item() == first


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
@pytest.mark.parametrize("top_k", [0, 4])
def test_an_id_without_probability_is_never_drawn(uniform: float, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest and the largest uniform number draw a possible id, although slices begin with, end with or consist
    of impossible ones."""
    logits = torch.full((1, V), -torch.inf)
    possible = [SLICE + 2, SLICE + 5, 2 * SLICE + 1]
    logits[0, possible] = torch.tensor([1.0, 2.0, 3.0])
    least_or_greatest = staticmethod(lambda *_: torch.tensor([uniform], dtype=torch.float64))
    monkeypatch.setattr(PlainKernels, "uniforms", least_or_greatest)
    token, confidence = sliced(logits, torch.tensor([True]), draws(1, top_k=top_k))
    assert token.item() == possible[0 if uniform == 0 else -1]
    assert confidence[0] == pytest.approx(float(logits[0].softmax(-1)[token]), rel=1e-6)


@pytest.mark.parametrize(("share", "place"), [(-1e-17, 1), (0.0, 1), (0.3, 1), (0.5, 2), (1.0, 2), (1.0 + 1e-15, 2)])
def test_rounding_never_leads_to_a_place_without_mass(share: float, place: int) -> None:
    """The first and the last of four places have no mass. A share just outside [0, 1) chooses neither of them."""
    cdf = torch.tensor([[0.0, 0.7, 1.4, 1.4]], dtype=torch.float64)
    got, target = invert(cdf, torch.tensor([share], dtype=torch.float64))
    assert got.item() == place
    assert 0 <= target.item() < 1.4


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-44])
def test_a_tiny_temperature_is_greedy_in_any_slice(temperature: float) -> None:
    """A tiny temperature chooses the greedy token, although the differences to the best logit overflow to -inf."""
    logits = torch.randn(200, V, generator=torch.Generator().manual_seed(7))
    greedy, sure = sliced(logits, free(200), None)
    tokens, confidence = sliced(logits, free(200), draws(200, temperature=temperature))
    assert torch.equal(tokens, greedy)
    assert torch.equal(confidence, sure)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set the number of torch's threads to the test's parameter."""
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize(("n", "size", "width"), [(24, V, SLICE), (8, 5 * VOCAB_SLICE + 3, VOCAB_SLICE)])
def test_a_position_draws_the_same_in_any_company(n: int, size: int, width: int) -> None:
    """Rows beside a position, greedy or with other temperatures and limits, change no bit of its token and
    confidence."""
    logits = torch.randn(n, size, generator=torch.Generator().manual_seed(3))
    mixed = mixed_draws(n)
    suppress = torch.arange(n) % 2 == 0
    together, sure = sliced(logits, suppress, mixed, width)
    for i in range(n):
        one = slice(i, i + 1)
        token, confidence = sliced(logits[one], suppress[one], row_of(mixed, i), width)
        assert token[0] == together[i]
        assert confidence[0] == sure[i]
        if mixed.temperature[i] == 0:  # a call with greedy positions only gives the same
            token, confidence = sliced(logits[one], suppress[one], None, width)
            assert (token[0], confidence[0]) == (together[i], sure[i])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, SLICE, V - 1])
@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 0), (1.0, 4)])
def test_logits_that_are_not_finite_show_in_the_confidence(
    bad: float, where: int, temperature: float, top_k: int
) -> None:
    """One bad logit makes the confidence of its row NaN. The token is still a valid id, and the row beside it does not
    change."""
    logits = torch.randn(2, V, generator=torch.Generator().manual_seed(4))
    logits[0, where] = bad
    given = draws(2, temperature=temperature, top_k=top_k)
    tokens, confidence = sliced(logits, torch.tensor([True, True]), given)
    assert confidence[0].isnan()
    assert 0 <= int(tokens[0]) < V
    assert confidence[1].isfinite()
    alone = sliced(logits[1:], torch.tensor([True]), row_of(given, 1))
    assert (tokens[1], confidence[1]) == (alone[0][0], alone[1][0])


def test_a_row_without_any_possible_token_shows_in_the_confidence() -> None:
    for given in (None, draws(1), draws(1, top_p=0.5)):
        token, confidence = sliced(torch.full((1, V), -torch.inf), free(1), given)
        assert confidence[0].isnan()
        assert 0 <= int(token[0]) < V


def test_no_positions_and_logits_left_as_they_were() -> None:
    tokens, confidence = sliced(torch.zeros(0, V), free(0), draws(0))
    assert tokens.shape == confidence.shape == (0,)
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(5))
    before = logits.clone()
    choose_from(logits, ~free(6), mixed_draws(6))
    assert torch.equal(logits, before)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "workspace"), [("greedy", 1), ("free", 1), ("limited", 24)])
def test_memory_stays_within_the_workspace(kind: str, workspace: int) -> None:
    """At the released vocabulary, memory stays within the workspace, although all logits would take 32 times as much
    (1.3 times if rows must be sorted).

    All positions draw from one slice. The head's weight and the hidden states exist before; 100 bytes for each position
    and slice are allowed in addition.
    """
    vocab, rows, workspace = 131_072, 64, workspace * 2**20
    generator = torch.Generator().manual_seed(6)
    hidden, weight = (torch.rand(size, 16, generator=generator) for size in (rows, vocab))
    weight[VOCAB_SLICE : 2 * VOCAB_SLICE] += 4
    given = {"greedy": None, "free": draws(rows), "limited": draws(rows, top_k=9, top_p=0.9)}[kind]
    with MemoryMeter() as meter:
        sizes = torch.float32, workspace, VOCAB_SLICE
        logits = Logits(lambda p, c: hidden[p] @ weight[c].T, rows, vocab, free(rows), MASK, *sizes)
        choose(PlainKernels(), logits, given)
    assert rows * vocab * 4 > 1.3 * workspace  # bytes
    assert meter.peak <= workspace + 100 * len(range(0, vocab, VOCAB_SLICE)) * rows


@pytest.mark.slow
def test_the_meter_counts_storages_once_until_they_are_freed() -> None:
    """Views add nothing, a tensor from before the meter does not count, and a freed tensor stays only in the peak."""
    older = torch.zeros(1000)
    with MemoryMeter() as meter:
        view = older[1:]
        first = torch.zeros(100) + 1  # two storages of 400 bytes for a moment
        part = first[50:]
        assert (meter.live, meter.peak) == (400, 800)
        del first
        assert meter.live == 400
        del part
        view += 1
        assert meter.live == 0
        meter.reset()
        assert meter.peak == 0


def test_the_head_of_a_tower_gives_its_logits_slice_by_slice() -> None:
    """The head gives the tower's logits for any columns and positions, and a row's slice has the same bits beside any
    other rows."""
    config = dataclasses.replace(open_checkpoint("builtin:noise").config, vocab_size=3 * SLICE + 1)
    tower = Tower(config, [torch.device("cpu")] * config.num_layers, torch.float32, causal=True)
    generator = torch.Generator().manual_seed(8)
    for weight in (tower.head.weight, tower.norm_f.weight):
        weight.copy_(torch.randn(weight.shape, generator=generator))
    hidden = torch.randn(40, config.hidden_size, generator=generator)
    logits = tower.logits(hidden)
    assert logits.shape == (40, 3 * SLICE + 1)
    assert torch.allclose(logits, tower.norm_f(hidden) @ tower.head.weight.T, atol=1e-4)
    head = tower.head_on(hidden)
    for columns in (slice(0, SLICE), slice(3 * SLICE, 3 * SLICE + 1)):
        together = head(slice(0, 40), columns)
        assert torch.allclose(together, logits[:, columns], atol=1e-4)
        assert torch.equal(together, tower.logits(hidden, columns))
        for rows in (slice(7, 8), slice(3, 20), torch.tensor([39, 2, 11])):
            assert torch.equal(head(rows, columns), together[rows])
