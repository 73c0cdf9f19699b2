"""The plain kernels against float64, and against themselves in other company."""

from collections.abc import Iterator

import pytest
import torch

from model.kernels.plain import PlainKernels, _attend_row, selective_scan


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("strongest", [1.0, 50.0, 1e3, 1e4])
@pytest.mark.parametrize("length", [1, 16, 50])
def test_the_scan_keeps_its_digits_where_decays_are_strong(strongest: float, length: int) -> None:
    """Every fourth token forgets almost everything, |dt A| up to 10,000: the rest is as exact as elsewhere."""
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
    """Bit for bit, also for odd shapes, whose rows MKL would compute by their position."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size_out, size_in, generator=generator)
    row = torch.randn(size_in, generator=generator)
    alone = PlainKernels().linear(row[None], weight)[0]
    assert torch.allclose(alone, weight @ row, atol=1e-5)
    for count in (2, 3, 5, 16, 33, 64):
        together = PlainKernels().linear(row.expand(count, -1).contiguous(), weight)
        assert all(torch.equal(got, alone) for got in together)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("length", [1, 2, 16])
@pytest.mark.parametrize("context", [0, 30, 300, 1300])
def test_attention_does_not_depend_on_the_number_of_threads(length: int, context: int) -> None:
    """Bit for bit on one and on two threads, a single query included."""
    generator = torch.Generator().manual_seed(context)
    q = torch.randn(length, 4, 32, generator=generator)
    k, v = torch.randn(2, context + length, 2, 32, generator=generator)
    got = []
    for count in (1, 2):
        torch.set_num_threads(count)
        got.append(_attend_row(q, k, v, causal=True))
    assert got[0].shape == (length, 4, 32)
    assert torch.equal(*got)
