"""Tests the plain kernels against float64, and that the results of a row do not depend on other rows."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from model.kernels.plain import PlainKernels, selective_scan
from model.kernels.protocol import ScanInputs
from model.runtime.page_allocator import PAGE_SIZE, PageAllocator, pages_for
from model.runtime.ragged_batch import RaggedBatch


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("strongest", [1.0, 50.0, 1e3, 1e4])
@pytest.mark.parametrize("length", [1, 16, 50])
def test_the_scan_keeps_its_digits_where_decays_are_strong(strongest: float, length: int) -> None:
    """If every fourth token forgets almost everything, with |dt A| up to 10,000, the scan is as exact as otherwise."""
    generator = torch.Generator().manual_seed(length)
    rows, heads, head_dim, groups, state = 2, 4, 8, 2, 8
    x = torch.randn(rows, length, heads, head_dim, generator=generator)
    dt = torch.rand(rows, length, heads, generator=generator) * 0.05
    dt[:, ::4] = strongest / 16
    decay = torch.full((heads,), -16.0)
    B, C = torch.randn(2, rows, length, groups, state, generator=generator)
    seed = torch.randn(rows, heads, head_dim, state, generator=generator)
    y, last = selective_scan(x, dt, decay, B, C, seed)

    s, wanted = seed.double(), []
    for at in range(length):
        b, c = (z[:, at].double().repeat_interleave(heads // groups, dim=1) for z in (B, C))
        step = dt[:, at].double()[..., None, None]
        s = (step * decay.double()[:, None, None]).exp() * s + step * x[:, at].double()[..., None] * b[..., None, :]
        wanted.append((s * c[..., None, :]).sum(-1))
    expected = torch.stack(wanted, dim=1)
    assert float((y - expected).abs().max() / expected.abs().max()) < 2e-6
    assert float((last - s).abs().max() / s.abs().max()) < 2e-6


@pytest.mark.parametrize("size_in", [8, 33, 36, 64])
@pytest.mark.parametrize("size_out", [1, 3, 8, 40])
def test_a_row_of_a_product_is_the_same_at_any_place_among_any_number(size_in: int, size_out: int) -> None:
    """A row of a product has the same bits at any place among any number of rows, even for odd shapes, for which MKL
    would compute a row by its position."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size_out, size_in, generator=generator)
    row = torch.randn(size_in, generator=generator)
    alone = PlainKernels().linear(row[None], weight)[0]
    assert torch.allclose(alone, weight @ row, atol=1e-5)
    for count in (2, 3, 5, 16, 33, 64):
        together = PlainKernels().linear(row.expand(count, -1).contiguous(), weight)
        assert all(torch.equal(got, alone) for got in together)


@pytest.mark.parametrize("sizes", [(48, 97), (512, 128)])
def test_a_row_of_a_float64_product_is_the_same_among_any_number(sizes: tuple[int, int]) -> None:
    """The router's float64 product gives a row the same bits among any number of rows, although MKL computes rows after
    the last multiple of 4 in another order."""
    generator = torch.Generator().manual_seed(0)
    size_in, size_out = sizes
    weight = torch.randn(size_out, size_in, generator=generator, dtype=torch.float64)
    x = torch.randn(70, size_in, generator=generator, dtype=torch.float64)
    together = PlainKernels().linear(x, weight)
    for count in (1, 3, 17, 30, 31, 65):
        assert torch.equal(PlainKernels().linear(x[:count], weight), together[:count])


class Context:
    """Rows that attend and extend. Their pages are their own, scattered, and full of NaN at first."""

    def __init__(self, tokens: Sequence[int], heads: tuple[int, int, int]) -> None:
        self.heads, self.kv_heads, self.head_dim = heads
        self.slots = PageAllocator(len(tokens), sum(pages_for(count) for count in tokens))
        self.slots._free_pages.sort(key=lambda page: page * 7919 % 31)
        self.pages = torch.full((2, self.slots.pages, PAGE_SIZE, self.kv_heads, self.head_dim), torch.nan)
        for count in tokens:
            self.slots.acquire(count)
        self.mine = sorted(self.slots._held, key=list(self.slots._held).index)

    def attend(self, qkv: Sequence[Sequence[Tensor]], *, causal: bool) -> list[Tensor]:
        """Return the result of each row. qkv: q, k and v of each row, in the order of `tokens`."""
        slots = self.mine[: len(qkv)]
        lengths = [len(q) for q, _, _ in qkv]
        own = self.slots
        rows = RaggedBatch(
            slots=tuple(slots),
            seeds=tuple(own.seed(slot) for slot in slots),
            lengths=tuple(lengths),
            context=tuple(own.length(slot) for slot in slots),
            pages=tuple(own.table(slot) for slot in slots),
        )
        q, k, v = (torch.cat(parts) for parts in zip(*qkv, strict=True))
        out = PlainKernels().attend(q, k, v, self.pages, rows, causal=causal, store=causal)
        if causal:
            own.grow(slots, lengths)
        return list(out.split(lengths))

    def random(self, length: int, seed: int) -> list[Tensor]:
        """Return random q, k and v of `length` tokens."""
        generator = torch.Generator().manual_seed(seed)
        counts = (self.heads, self.kv_heads, self.kv_heads)
        return [torch.randn(length, count, self.head_dim, generator=generator) for count in counts]


def in_float64(qkv: Sequence[Tensor], *, causal: bool, queries: int) -> Tensor:
    """Return the outputs of the last `queries` tokens of attention over all tokens, by its definition."""
    q, k, v = (x.double() for x in qkv)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones(len(q), len(q), dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)[-queries:]


HEADS = [(4, 2, 16), (4, 2, 32), (16, 2, 128), (3, 1, 8)]  # query heads, kv heads, head_dim


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", [1, 64, 150, 700])
def test_a_prompt_has_the_same_attention_however_it_is_cut_at_pages(heads: tuple[int, int, int], length: int) -> None:
    """A prompt has the same attention bit for bit in one forward or in pieces, alone or between other rows, on one
    thread or two, and with pages full of NaN."""
    alone = Context([length], heads)
    qkv = alone.random(length, seed=length)
    whole = alone.attend([qkv], causal=True)[0]
    wanted = in_float64(qkv, causal=True, queries=length)
    assert float((whole - wanted).abs().max()) < 1e-5
    for threads, step in ((1, PAGE_SIZE), (2, 3 * PAGE_SIZE)):
        torch.set_num_threads(threads)
        others = Context([400, length, 400], heads)
        got = []
        for begin in range(0, length, step):
            part = [x[begin : begin + step] for x in qkv]
            beside = [others.random(16 + begin % 7, seed=begin + i) for i in range(2)]
            got.append(others.attend([beside[0], part, beside[1]], causal=True)[1])
        assert torch.equal(torch.cat(got), whole)


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", [1, 16, 100])
@pytest.mark.parametrize("context", [0, 30, 700])
@pytest.mark.parametrize("causal", [False, True])
def test_a_block_attends_alike_in_any_company(
    heads: tuple[int, int, int], length: int, context: int, *, causal: bool
) -> None:
    """The attention of a block is right, and the same bit for bit alone and beside other rows, one of them NaN, on one
    or two threads."""
    got = []
    for threads, rows in ((1, 1), (2, 1), (1, 4)):
        torch.set_num_threads(threads)
        held = Context([context + length, 500, context + length, 500], heads)
        if context:
            held.attend([held.random(context, seed=1)], causal=True)
        block = held.random(length, seed=2)
        beside = [held.random(count, seed=count) for count in (length, 16, 33)]
        beside[0][2][:] = torch.nan
        out = held.attend([block, *beside][:rows], causal=causal)
        got.append(out[0])
        assert all(one.isfinite().all() for one in (out[0], *out[2:]))
    whole = [torch.cat(pair) for pair in zip(held.random(context, seed=1), block, strict=True)]
    assert float((got[0] - in_float64(whole, causal=causal, queries=length)).abs().max()) < 1e-5
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


def scan(parts: Sequence[Tensor], lengths: Sequence[int], seeds: Sequence[int], states: Sequence[Tensor]) -> Tensor:
    """Run mamba_scan over rows in slots 0, 1, …; the sizes are 6 heads of 16, 2 groups of 16 states and 160
    channels."""
    generator = torch.Generator().manual_seed(3)
    weights = SimpleNamespace(
        conv_weight=torch.randn(160, 4, generator=generator),
        conv_bias=torch.randn(160, generator=generator),
        decay=-torch.rand(6, generator=generator),
        dt_bias=torch.randn(6, generator=generator),
        D=torch.randn(6, generator=generator),
        groups=2,
        dt_limit=(0.0, float("inf")),
    )
    count = len(lengths)
    rows = RaggedBatch(tuple(range(count)), tuple(seeds), tuple(lengths), (0,) * count, ((),) * count)
    x, dt = parts
    conv, ssm = states
    return PlainKernels().mamba_scan(ScanInputs(x, dt, weights, conv, ssm, rows, store=True))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("length", [1, 64, 150, 700])
def test_a_prompt_has_the_same_scan_however_it_is_cut_at_pages(length: int) -> None:
    """A prompt has the same scan bit for bit, convolution included, in one forward or in pieces, beside other rows, and
    with slots full of NaN."""
    generator = torch.Generator().manual_seed(length)
    x, dt = (torch.randn(length, size, generator=generator) for size in (160, 6))
    alone = torch.full((1, 160, 4), torch.nan), torch.full((1, 6, 16, 16), torch.nan)
    whole = scan([x, dt], [length], [-1], alone)
    for threads, step in ((1, PAGE_SIZE), (2, 3 * PAGE_SIZE)):
        torch.set_num_threads(threads)
        beside = torch.full((3, 160, 4), torch.nan), torch.full((3, 6, 16, 16), torch.nan)
        got = []
        for begin in range(0, length, step):
            part = x[begin : begin + step], dt[begin : begin + step]
            others = [[torch.randn(n, z.shape[1], generator=generator) for z in part] for n in (7, 90)]
            mixed = [torch.cat([mine, *more]) for mine, *more in zip(part, *others, strict=True)]
            lengths = [len(part[0]), 7, 90]
            got.append(scan(mixed, lengths, [0 if begin else -1, -1, -1], beside)[: len(part[0])])
        assert torch.equal(torch.cat(got), whole)
        assert all(torch.equal(one[0], many[0]) for one, many in zip(alone, beside, strict=True))


@pytest.mark.parametrize("width", [8, 1])
def test_experts_are_the_weighted_sum_of_the_chosen_in_any_company(width: int) -> None:
    """The experts give the weighted sum of the chosen ones, and a token alone has the same bits as among many."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(90, 64, generator=generator)
    up, down = torch.randn(5, width, 64, generator=generator), torch.randn(5, 64, width, generator=generator)
    choice = torch.rand(90, 5, generator=generator)[:, :4].topk(2).indices  # nobody chooses the last expert
    weight = torch.rand(90, 2, generator=generator)
    together = PlainKernels().experts(x, choice, weight, up, down)
    hidden = torch.einsum("nh,efh->nef", x.double(), up.double()).relu().square()
    every = torch.einsum("nef,ehf->neh", hidden, down.double())
    wanted = (every[torch.arange(90)[:, None], choice] * weight.double()[..., None]).sum(1)
    assert torch.allclose(together.double(), wanted, rtol=1e-4, atol=1e-2)
    for some in (slice(0, 1), slice(40, 57), slice(89, 90)):
        assert torch.equal(PlainKernels().experts(x[some], choice[some], weight[some], up, down), together[some])
