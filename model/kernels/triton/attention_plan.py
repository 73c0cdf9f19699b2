"""Plans a forward's attention over paged contexts on the host, without waiting for the device.

The queries of a row are cut into tiles. The query heads that share a key/value head are next to each other in a tile,
so that keys and values are read once for all of them. Long contexts are split: the tile then has several items, each of
which covers some pages and leaves a partial result, and a join combines these results. The last item of a tile also
covers the row's own tokens. The device reads the plan from one int32 tensor, whose size can be fixed in advance
(`Room`) for CUDA graphs.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.runtime.ragged_batch import RaggedBatch
from model.runtime.transfer import Array, to_device

QUERIES = 256  # limit per tile: query heads times tokens
MIN_QUERIES = 16  # the smallest size that Triton accepts in a matrix product
PROGRAMS = 264  # two for each multiprocessor of an H100 or H200; contexts are split into about so many items
MIN_PAGES = 2  # the smallest share that a context is split into; with less, joining would cost more than reading
ITEM, JOIN = 8, 4  # int32 numbers per item and per join: multiples of 16 bytes, which the compiler relies on


@dataclass(frozen=True, slots=True)
class Heads:
    """The sizes of the attention layers that a plan depends on. All layers have the same, so they share one plan."""

    kv: int
    """Number of key/value heads."""
    shared: int
    """Query heads that share one key/value head."""
    page_size: int
    queries: int = QUERIES
    """Limit per tile: query heads times tokens."""

    def tile(self, longest: int) -> int:
        """Return the tokens per tile, a power of two, for a forward whose longest row has `longest` tokens."""
        shared = power_of_two(self.shared)
        return max(1, MIN_QUERIES // shared, min(power_of_two(longest), self.queries // shared))


@dataclass(frozen=True, slots=True)
class Room:
    """The limits of a plan, from which the sizes of all tensors follow. A CUDA graph serves all plans of one Room."""

    longest: int
    """Limit of the tokens of a row in the forward."""
    tile: int
    """Number of tokens of a tile."""
    items: int
    """Limit of the number of items."""
    joins: int
    """Limit of the number of joins."""
    pages: int
    """Limit of the pages of all rows together, for their contexts and their own tokens."""
    slots: int
    """Limit of the number of partial results, each of one item and all key/value heads."""

    @classmethod
    def of(cls, heads: Heads, rows: int, longest: int, pages: int) -> "Room":
        """Return the room for any forward with at most `rows` rows, and `longest` tokens and `pages` pages per row.

        Splitting adds at most PROGRAMS items, counted over all key/value heads, whatever the contexts are.
        """
        tile = heads.tile(longest)
        more = PROGRAMS // heads.kv if pages > MIN_PAGES else 0
        return cls(longest, tile, rows * -(-longest // tile) + more, more, rows * pages, 2 * more)


@dataclass(frozen=True, slots=True)
class Paged:
    """The plan of a forward's attention: which program reads which queries and pages, and which results are combined.

    Items and joins that are all zeros do nothing.
    """

    packed: Tensor  # (8 I + 4 J + P,) int32; items, joins and table are views of it
    room: Room
    used: int
    """Length of the used part of `packed`. The rest is room for larger plans and is never read."""

    @property
    def items(self) -> Tensor:
        """The items (I, 8), each of one tile of a row.

        The columns: the row's first token among the N, its length, its context and its first place in `table`; the
        tile's first query in the row; the item's first page and the page after its last one, counted in the row; the
        slot of its partial result, or -1 if it is the only item of its tile.
        """
        return self.packed[: ITEM * self.room.items].view(-1, ITEM)

    @property
    def joins(self) -> Tensor:
        """The joins (J, 4), each of one tile with several items.

        The columns: the tile's first token among the N, its number of tokens, the slot of its first partial result, and
        the number of its partial results, which are in consecutive slots.
        """
        begin = ITEM * self.room.items
        return self.packed[begin : begin + JOIN * self.room.joins].view(-1, JOIN)

    @property
    def table(self) -> Tensor:
        """The pages of the rows (P,), row after row."""
        return self.packed[ITEM * self.room.items + JOIN * self.room.joins :]

    def to(self, device: torch.device) -> "Paged":
        """Return a copy on `device` of this plan, which is on the host."""
        return Paged(to_device(self.packed, device), self.room, self.used)

    def fill(self, plan: "Paged") -> None:
        """Copy a plan from the host into this plan's tensor, which a CUDA graph reads.

        Raises AssertionError if the plan was made for another room.
        """
        assert plan.room == self.room, f"a plan of {plan.room} does not fit into {self.room}"
        self.packed[: plan.used] = to_device(plan.packed[: plan.used], self.packed.device)


def plan_attention(rows: RaggedBatch, heads: Heads, room: Room | None = None) -> Paged:
    """Return the plan of a forward, on the host. If `room` is None, its tensor is just as large as this plan needs.

    Raises AssertionError if the plan does not fit into `room`.
    """
    lengths, context = (np.array(column, dtype=np.int64) for column in (rows.lengths, rows.context))
    longest = max(rows.lengths, default=1)
    tile = room.tile if room else heads.tile(longest)
    used = -(-(context + lengths) // heads.page_size)  # (R,) pages; a row that does not store may have fewer
    both = zip(rows.pages, used.tolist(), strict=True)
    tables = PageTables(table if len(table) <= count else table[:count] for table, count in both)
    items, joins = _plan(lengths, context, tables.begin, heads, tile)
    pages, slots = len(tables.flat), int(joins[:, 3].sum())
    room = room or Room(longest, tile, len(items), len(joins), pages, slots)
    needed = longest, len(items), len(joins), pages, slots
    there = room.longest, room.items, room.joins, room.pages, room.slots
    assert all(one <= at_most for one, at_most in zip(needed, there, strict=True)), f"{needed} exceed {room}"

    packed = np.zeros(ITEM * room.items + JOIN * room.joins + room.pages, dtype=np.int32)
    packed[: items.size] = items.ravel()
    packed[ITEM * room.items :][: joins.size] = joins.ravel()
    real = len(packed) - room.pages + pages
    packed[real - pages : real] = tables.flat
    return Paged(torch.from_numpy(packed), room, real)


def _plan(lengths: Array, context: Array, place: Array, heads: Heads, tile: int) -> tuple[Array, Array]:
    """Return the items (I, 8), the longest first, and the joins (J, 4).

    lengths, context, place (R,): each row's tokens, its context, and its first place in the table.
    """
    row, tile_of_row = expand(-(-lengths // tile))  # (T,), one entry per tile, in order
    first = tile_of_row * tile
    start, tokens = (lengths.cumsum() - lengths)[row], np.minimum(tile, lengths[row] - first)
    pages = -(-context // heads.page_size)[row]
    # pages per item if all pages were shared evenly among PROGRAMS items, counted over all key/value heads
    share = max(MIN_PAGES, -(-int(pages.sum()) * heads.kv // PROGRAMS))
    parts = np.maximum(1, (2 * pages + share) // (2 * share))
    slots = np.where(parts > 1, parts, 0)
    slot = np.where(parts > 1, slots.cumsum() - slots, -1)
    joins = np.stack([start + first, tokens, slot, slots], axis=1)[parts > 1]

    each, part = expand(parts)  # (I,), one entry per item
    begin, end = pages[each] * part // parts[each], pages[each] * (part + 1) // parts[each]
    columns = np.stack([start, lengths[row], context[row], place[row], first], axis=1)[each]
    items = np.column_stack([columns, begin, end, slot[each] + part])
    own = np.where(part == parts[each] - 1, first[each] // heads.page_size, 0)
    # the longest first, so that the device does not wait at the end for a long item that began late
    return items[np.argsort(begin - end - own, kind="stable")], joins


class PageTables:
    """The pages of several rows as one array (`flat`), with the place where each row begins and its number of pages."""

    def __init__(self, tables: Iterable[Sequence[int]]) -> None:
        # joins the bytes of C ints, because a loop over ints is far slower
        parts = [table if isinstance(table, array) else array("i", table) for table in tables]
        self.flat = np.frombuffer(b"".join(parts), dtype=np.int32)  # row after row
        self.sizes = np.fromiter(map(len, parts), np.int64, len(parts))  # (R,)
        self.begin = self.sizes.cumsum() - self.sizes  # (R,) into `flat`

    def first(self, rows: Array, count: int) -> Array:
        """Return the first `count` pages of the given rows: (len(rows), count) int64, 0 after a row's last page."""
        at = np.arange(count)
        flat = self.flat.take(self.begin[rows, None] + at, mode="clip") if len(self.flat) else 0
        return np.where(at < self.sizes[rows, None], flat, 0).astype(np.int64)


def expand(counts: Array) -> tuple[Array, Array]:
    """Number the entries of a sequence that has counts[i] entries for each i, in order.

    Returns two arrays: the i of each entry, and its index among the entries of that i. Counts (2, 1) give (0, 0, 1) and
    (0, 1, 0).
    """
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - (counts.cumsum() - counts)[of]


def power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least `count`."""
    return 1 << max(0, count - 1).bit_length()
