"""Tests the Triton attention and its plans against float64 and the plain kernels, in the interpreter or on a GPU."""

import random
from array import array
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model.checks import definition
from model.checks.definition import relative_error
from model.checks.kernels import OUTPUT_TOLERANCE, check_kernels
from model.kernels.plain import PlainKernels
from model.kernels.triton import attention_plan
from model.kernels.triton.attention import JOINED_SLOTS, attend, attend_paged, heads_of
from model.kernels.triton.attention_plan import PROGRAMS, Heads, Paged, Room, plan_attention
from model.network.two_tower import load_model
from model.runtime.page_allocator import PAGE_SIZE, pages_for
from model.runtime.ragged_batch import RaggedBatch

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
DTYPES = [torch.float32, torch.bfloat16]
NOISE, TINY, ODD, RELEASED = (4, 2, 32), (6, 2, 32), (5, 1, 24), (32, 2, 128)  # query heads, kv heads, head_dim


class Case:
    """Random rows over pages in random order. All that lies after a row's context, and every page of no row, is NaN."""

    def __init__(
        self, lengths: Sequence[int], context: Sequence[int], heads: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        generator = torch.Generator().manual_seed(sum(lengths) + sum(context))
        needed = [pages_for(one + before) for one, before in zip(lengths, context, strict=True)]
        free = torch.randperm(sum(needed) + 1, generator=generator).tolist()
        tables = tuple(tuple(free.pop() for _ in range(count)) for count in needed)
        count = len(lengths)
        self.rows = RaggedBatch(tuple(range(count)), (-1,) * count, tuple(lengths), tuple(context), tables)
        query_heads, kv_heads, head_dim = heads

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

        self.q = normal(sum(lengths), query_heads, head_dim)
        self.k, self.v = normal(2, sum(lengths), kv_heads, head_dim)
        self.pages = normal(2, len(free) + sum(needed), PAGE_SIZE, kv_heads, head_dim).fill_(torch.nan)
        for table, before in zip(tables, context, strict=True):
            held = self.pages[:, list(table)].flatten(1, 2)
            held[:, :before] = normal(2, before, kv_heads, head_dim)
            self.pages[:, list(table)] = held.unflatten(1, (-1, PAGE_SIZE))

    def defined(self, *, causal: bool) -> Tensor:
        """Return the outputs by the definition, in float64 and row by row."""
        out, lengths = [], list(self.rows.lengths)
        for row, (q, k, v) in enumerate(zip(*(x.split(lengths) for x in (self.q, self.k, self.v)), strict=True)):
            context = self.pages[:, list(self.rows.pages[row])].flatten(1, 2)[:, : self.rows.context[row]]
            keys, values = torch.cat([context[0], k]), torch.cat([context[1], v])
            out.append(definition.attend(q, keys, values, causal=causal))
        return torch.cat(out)

    def check(self, *, causal: bool, plan: Paged | None = None) -> Tensor:
        """Check the outputs against the definition and the pages against the plain kernels; restore the pages and
        return the outputs."""
        before, expected, wanted = self.pages.clone(), self.pages.clone(), self.defined(causal=causal)
        arguments = self.q, self.k, self.v
        PlainKernels().attend(*arguments, expected, self.rows, causal=causal, store=causal)
        if plan is None:
            got = attend(*arguments, self.pages, self.rows, causal=causal, store=causal)
        else:
            got = attend_paged(*arguments, self.pages, plan, causal=causal, store=causal)
        assert got.dtype == self.q.dtype
        assert relative_error(got, wanted, self.rows.lengths) < OUTPUT_TOLERANCE[self.q.dtype]
        assert torch.equal(self.pages.nan_to_num(), expected.nan_to_num())
        assert causal != torch.equal(self.pages.nan_to_num(), before.nan_to_num())
        self.pages.copy_(before)
        return got


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [NOISE, ODD])
def test_ragged_rows_attend_as_defined(heads: tuple[int, int, int], dtype: torch.dtype, *, causal: bool) -> None:
    """Blocks of different lengths, denoised or committed, attend as defined, with contexts that end before, at and
    after the end of a page."""
    Case((16, 1, 5, 11), (PAGE_SIZE, 0, PAGE_SIZE - 1, 5 * PAGE_SIZE + 1), heads, dtype).check(causal=causal)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_a_row_attends_as_defined(dtype: torch.dtype) -> None:
    """A step of AR mode attends as defined, also for a row with an empty context."""
    Case((1,) * 3, (0, 200, 2 * PAGE_SIZE), RELEASED, dtype).check(causal=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_prompts_attend_as_defined(dtype: torch.dtype) -> None:
    """Prompts attend as defined with several tiles of queries in a row and several pages of own tokens in a tile. One
    prompt continues after a context."""
    Case((150, 40, 70), (0, 0, 2 * PAGE_SIZE), NOISE, dtype).check(causal=True)


@pytest.mark.parametrize("length", [1, 16])
def test_a_long_context_is_split_and_joined(length: int) -> None:
    """A long context gives more partial results than a join takes at a time, the last one from a page that is not
    full."""
    case = Case((length,), (33 * PAGE_SIZE + 7,), TINY, torch.float32)
    heads = heads_of(case.q, case.k, case.pages)
    plan = plan_attention(case.rows, heads)
    assert plan.room.slots == plan.room.items == JOINED_SLOTS + 1
    case.check(causal=False)


def test_no_rows_are_no_work() -> None:
    case = Case((), (), NOISE, torch.float32)
    assert attend(case.q, case.k, case.v, case.pages, case.rows, causal=True, store=True).shape == (0, 4 * 32)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy warns in the interpreter
def test_nothing_of_a_row_reaches_another() -> None:
    """A row of NaN does not change a bit of the rows beside it."""
    case = Case((16, 3, 16), (70, 0, 3 * PAGE_SIZE), NOISE, torch.float32)
    sound = case.check(causal=True)
    for x in (case.q, case.k, case.v):
        x[16:19] = torch.nan
    got = attend(case.q, case.k, case.v, case.pages, case.rows, causal=True, store=True)
    assert got[16:19].isnan().all()
    assert torch.equal(got[:16], sound[:16])
    assert torch.equal(got[19:], sound[19:])


def test_tensors_of_a_wider_projection_need_no_copy() -> None:
    """q, k and v may be views into one product, as a fused projection gives them."""
    case = Case((16, 7), (70, 0), NOISE, torch.float32)
    sound = case.check(causal=False)
    whole = torch.cat([case.q, case.k, case.v], dim=1)
    q, k, v = whole.split([4, 2, 2], dim=1)
    assert torch.equal(attend(q, k, v, case.pages, case.rows, causal=False, store=False), sound)


def test_the_start_up_check_passes() -> None:
    """The kernel passes model.checks.kernels with the sizes of a model."""

    class WithTriton(PlainKernels):
        attend = staticmethod(attend)

    pair = load_model("builtin:noise", "bfloat16", devices=[DEVICE], towers="context")
    for layer in pair.context.layers:
        layer.mixer.kernels = WithTriton()  # type: ignore[union-attr]
    check_kernels(pair)


def test_a_plan_in_tensors_of_a_fixed_room_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan in tensors of fixed size, as a CUDA graph needs it, gives the same bits for forwards of fewer rows, one
    after another."""
    monkeypatch.setattr(attention_plan, "PROGRAMS", 16)  # programs without work take time in the interpreter
    heads = Heads(2, 2, PAGE_SIZE)
    room = Room.of(heads, rows=5, longest=16, pages=8)
    static = plan_attention(Case((16,) * 5, (0,) * 5, NOISE, torch.float32).rows, heads, room).to(torch.device(DEVICE))
    for lengths, context in (((16, 3, 16), (5 * PAGE_SIZE + 3, 0, 70)), ((2, 16), (0, 130))):
        case = Case(lengths, context, NOISE, torch.float32)
        static.fill(plan_attention(case.rows, heads, room))
        exact = plan_attention(case.rows, Heads(2, 2, PAGE_SIZE, queries=room.tile * 2)).to(torch.device(DEVICE))
        assert torch.equal(case.check(causal=True, plan=static), case.check(causal=True, plan=exact))


def test_plans_cover_every_page_once_and_fit_their_room() -> None:
    """In plans of random forwards, the items of each tile cover its context without a gap, joins name their slots, and
    everything fits its room."""
    draw = random.Random(0)
    for _ in range(60):
        heads, rows, most = _drawn(draw)
        plan, exact = plan_attention(rows, heads, _room(draw, heads, rows, most)), plan_attention(rows, heads)
        assert exact.room.items - len(_tiles_of(exact)) <= PROGRAMS // heads.kv
        for each in (plan, exact):
            covered = _tiles_of(each)
            tokens_of = dict(zip(rows.starts, rows.lengths, strict=True))
            pages_of = {start: pages_for(one) for start, one in zip(rows.starts, rows.context, strict=True)}
            assert sum(min(each.room.tile, tokens_of[row] - first) for row, first in covered) == sum(rows.lengths)
            joined = {start: (tokens, slot, slots) for start, tokens, slot, slots in each.joins.tolist() if slots}
            for (row, first), parts in covered.items():
                assert [begin for begin, _, _ in parts] == [0, *(end for _, end, _ in parts[:-1])]
                assert parts[-1][1] == pages_of[row]
                slots = [slot for _, _, slot in parts]
                if len(parts) == 1:
                    assert slots == [-1]
                    assert row + first not in joined
                else:
                    tokens, slot, number = joined[row + first]
                    assert slots == list(range(slot, slot + number))
                    assert tokens == min(each.room.tile, tokens_of[row] - first)
            used = Counter(slot for parts in covered.values() for _, _, slot in parts if slot >= 0)
            assert not used or (max(used.values()) == 1 and max(used) < each.room.slots)


def _tiles_of(plan: Paged) -> dict[tuple[int, int], list[tuple[int, int, int]]]:
    """Return the items of each tile in order, as (first page, end page, slot), by (start of the row, first token)."""
    tiles: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for start, length, _, _, first, begin, end, slot in plan.items.tolist():
        if length:
            tiles.setdefault((start, first), []).append((begin, end, slot))
    return {tile: sorted(parts) for tile, parts in tiles.items()}


def test_plans_are_those_of_plain_loops() -> None:
    """Plans of random forwards equal those of plain loops number by number, in exact room, in fixed room, and written
    over an old plan."""
    draw = random.Random(1)
    for _ in range(100):
        heads, rows, most = _drawn(draw)
        room = _room(draw, heads, rows, most)
        filled = Paged(torch.full((8 * room.items + 4 * room.joins + room.pages,), -7, dtype=torch.int32), room, 0)
        filled.fill(plan_attention(rows, heads, room))
        for plan in (plan_attention(rows, heads), plan_attention(rows, heads, room), filled):
            items, joins, table = _looped(rows, heads, plan.room.tile)
            assert plan.items.tolist() == items + [[0] * 8] * (plan.room.items - len(items))
            assert plan.joins.tolist() == joins + [[0] * 4] * (plan.room.joins - len(joins))
            assert plan.table[: len(table)].tolist() == table


def _looped(rows: RaggedBatch, heads: Heads, tile: int) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Return the items, joins and table that `plan_attention` should make, computed one by one."""
    tiles, start = [], 0
    table: list[int] = []
    for row, (length, context) in enumerate(zip(rows.lengths, rows.context, strict=True)):
        fixed = start, length, context, len(table)
        tiles += [(fixed, first, pages_for(context)) for first in range(0, length, tile)]
        table += rows.pages[row][: pages_for(length + context)]
        start += length
    share = max(attention_plan.MIN_PAGES, -(-sum(pages for _, _, pages in tiles) * heads.kv // PROGRAMS))
    items, joins, slots = [], [], 0
    for (start, length, context, place), first, pages in tiles:
        parts = max(1, (2 * pages + share) // (2 * share))
        cuts = [pages * part // parts for part in range(parts + 1)]
        for part in range(parts):
            own = first // heads.page_size if part == parts - 1 else 0
            slot = slots + part if parts > 1 else -1
            item = [start, length, context, place, first, cuts[part], cuts[part + 1], slot]
            items.append((cuts[part + 1] - cuts[part] + own, item))
        if parts > 1:
            joins.append([start + first, min(tile, length - first), slots, parts])
            slots += parts
    return [item for _, item in sorted(items, key=lambda item: -item[0])], joins, table


def _drawn(draw: random.Random) -> tuple[Heads, RaggedBatch, int]:
    """Return random head sizes, rows of random lengths over contexts of all sizes, and the largest number of pages of a
    row."""
    heads = Heads(draw.choice([1, 2, 8]), draw.choice([1, 3, 16]), PAGE_SIZE, draw.choice([64, 256]))
    count, longest = draw.randint(1, 40), draw.choice([1, 3, 16, 32, 100])
    lengths = [draw.randint(1, longest) for _ in range(count)]
    context = [int(draw.choice([0, 1, 64, 130, 3_000, 130_000]) * draw.random()) for _ in range(count)]
    needed = [pages_for(one + before) for one, before in zip(lengths, context, strict=True)]
    held = [draw.choice([pages_for(before), pages + 2]) for before, pages in zip(context, needed, strict=True)]
    tables = [range(row, row + pages) for row, pages in enumerate(held)]  # some rows have no page for their own tokens
    shown = tuple(tuple(table) if row % 2 else array("i", table) for row, table in enumerate(tables))
    return heads, RaggedBatch(tuple(range(count)), (-1,) * count, tuple(lengths), tuple(context), shown), max(needed)


def _room(draw: random.Random, heads: Heads, rows: RaggedBatch, most: int) -> Room:
    longest = max(draw.choice([1, 16, 128]), *rows.lengths)
    return Room.of(heads, len(rows.lengths) + draw.randint(0, 9), longest, most + draw.randint(0, 9))


@pytest.mark.parametrize("contexts", [[4_096], [131_072 - 64]])
def test_a_lone_row_fills_the_gpu(contexts: list[int]) -> None:
    """At the released sizes a lone row is split over at least half of the programs if it has enough pages. 384 rows of
    the same length are not split, so nothing is joined."""
    heads = Heads(2, 16, PAGE_SIZE)
    lone = RaggedBatch((0,), (-1,), (16,), tuple(contexts), (tuple(range(3_000)),))
    assert plan_attention(lone, heads).room.items * heads.kv >= min(PROGRAMS // 2, contexts[0] // PAGE_SIZE)
    many = RaggedBatch(tuple(range(384)), (-1,) * 384, (16,) * 384, tuple(contexts) * 384, (tuple(range(3_000)),) * 384)
    assert plan_attention(many, heads).room.joins == 0


@on_a_gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("lengths", "context"),
    [
        ((16,), (131_072 - 64,)),
        ((32, 7, 16, 1) * 8, (100, 0, 4_096, 8_191) * 8),
        ((1,) * 64, tuple(range(0, 6_400, 100))),
        ((1_500, 64, 300), (0, 1_024, 4_096)),
        ((16,) * 384, tuple(range(0, 768, 2))),
    ],
)
def test_released_sizes(lengths: tuple[int, ...], context: tuple[int, ...], *, causal: bool) -> None:
    Case(lengths, context, RELEASED, torch.bfloat16).check(causal=causal)


@on_a_gpu
def test_a_captured_forward_replays_with_other_rows() -> None:
    """One CUDA graph, replayed with other rows, lengths, contexts and pages, gives the same bits as launches without a
    graph."""
    heads = Heads(2, 16, PAGE_SIZE)
    room = Room.of(heads, rows=8, longest=16, pages=128)
    first = Case((16,) * 8, (1_000,) * 8, RELEASED, torch.bfloat16)
    static = plan_attention(first.rows, heads, room).to(torch.device(DEVICE))
    q, k, v = (x.clone() for x in (first.q, first.k, first.v))
    pages = q.new_empty(2, 1_500, PAGE_SIZE, 2, 128)
    attend_paged(q, k, v, pages, static, causal=True, store=True)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend_paged(q, k, v, pages, static, causal=True, store=True)
    for lengths, context in (((16,) * 8, (7_000,) * 8), ((3, 16), (0, 8_000)), ((16,), (90,))):
        case = Case(lengths, context, RELEASED, torch.bfloat16)
        plan = plan_attention(case.rows, heads, room)
        right = case.check(causal=True, plan=plan.to(torch.device(DEVICE)))
        for mine, new in ((q, case.q), (k, case.k), (v, case.v)):
            mine[: len(new)] = new
        pages[:, : case.pages.shape[1]] = case.pages
        static.fill(plan)
        graph.replay()
        assert torch.equal(out[: len(right)], right)
