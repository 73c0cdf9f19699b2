"""The plan of a forward's attention over paged contexts, made on the host from what the host knows: no device is asked.

The queries of a row are cut into tiles. The query heads that share a key/value head lie beside each other in a tile, so
that keys and values are read once for all of them. Long contexts are split: a tile then has several items that cover
some pages each and leave partial results, which a join puts together. The last item sees the row's own tokens too.
What a device reads lies in one int32 tensor; its size can be fixed beforehand (`Room`), for CUDA graphs.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.runtime.ragged_batch import RaggedBatch
from model.runtime.transfer import Array, to_device

QUERIES = 256  # of a tile at most, query heads times tokens
MIN_QUERIES = 16  # the least that Triton takes in a matrix product
PROGRAMS = 264  # two for each multiprocessor of an H100 or H200: contexts are split until there are so many
MIN_PAGES = 2  # of an item beside others of its tile: with fewer, joining them would cost more than reading
ITEM, JOIN = 8, 4  # numbers that describe one: multiples of 16 bytes, which the compiler builds upon


@dataclass(frozen=True, slots=True)
class Heads:
    """What a plan must know of the attention layers, which are all alike."""

    kv: int
    shared: int
    """Query heads that share one key/value head."""
    page_size: int
    queries: int = QUERIES
    """Of a tile at most."""

    def tile(self, longest: int) -> int:
        """Tokens of a tile where the longest row has so many: a power of two."""
        shared = power_of_two(self.shared)
        return max(1, MIN_QUERIES // shared, min(power_of_two(longest), self.queries // shared))


@dataclass(frozen=True, slots=True)
class Room:
    """The sizes of a plan's tensors."""

    longest: int
    """Tokens of a row at most."""
    tile: int
    """Tokens of a tile."""
    items: int
    joins: int
    pages: int
    """Of all rows' contexts with their own tokens."""
    slots: int
    """Partial results, each of one tile and all key/value heads."""

    @classmethod
    def of(cls, heads: Heads, rows: int, longest: int, pages: int) -> "Room":
        """For any forward of at most so many rows, tokens of a row, and pages of a row.

        Splitting makes at most PROGRAMS items more, over all key/value heads, whatever the contexts are.
        """
        tile = heads.tile(longest)
        more = PROGRAMS // heads.kv if pages > MIN_PAGES else 0
        return cls(longest, tile, rows * -(-longest // tile) + more, more, rows * pages, 2 * more)


@dataclass(frozen=True, slots=True)
class Paged:
    """A plan. Items and joins that are all zeros do nothing."""

    packed: Tensor  # (8 I + 4 J + P,) int32: all of the others, which are views of it
    room: Room
    used: int
    """Of `packed`: behind it is room for other plans, which nobody looks at."""

    @property
    def items(self) -> Tensor:
        """(I, 8): the row's start, length, context and first place in `table`, first query, pages from and to, slot.

        A slot of -1 means that the item is the only one of its tile.
        """
        return self.packed[: ITEM * self.room.items].view(-1, ITEM)

    @property
    def joins(self) -> Tensor:
        """(J, 4): first token among the N, tokens, first slot, slots."""
        begin = ITEM * self.room.items
        return self.packed[begin : begin + JOIN * self.room.joins].view(-1, JOIN)

    @property
    def table(self) -> Tensor:
        """(P,) the pages of the rows, row after row."""
        return self.packed[ITEM * self.room.items + JOIN * self.room.joins :]

    def to(self, device: torch.device) -> "Paged":
        """The plan, which is on the host, on a device."""
        return Paged(to_device(self.packed, device), self.room, self.used)

    def fill(self, plan: "Paged") -> None:
        """Takes over a plan of the same room, which is on the host, into its own tensor, which a CUDA graph reads."""
        assert plan.room == self.room, f"a plan of {plan.room} does not fit into {self.room}"
        self.packed[: plan.used] = to_device(plan.packed[: plan.used], self.packed.device)


def plan_attention(rows: RaggedBatch, heads: Heads, room: Room | None = None) -> Paged:
    """The plan of a forward, on the host, in a tensor of the size of `room`, else in one just as large."""
    lengths, context = (np.array(column, dtype=np.int64) for column in (rows.lengths, rows.context))
    longest = max(rows.lengths, default=1)
    tile = room.tile if room else heads.tile(longest)
    used = -(-(context + lengths) // heads.page_size)  # (R,) pages; a row that stores nothing may have fewer
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
    """The items (I, 8), the longest first, and the joins (J, 4). All (R,): place: the row's first in the table."""
    row, tile_of_row = expand(-(-lengths // tile))  # (T,) for every tile, in order
    first = tile_of_row * tile
    start, tokens = (lengths.cumsum() - lengths)[row], np.minimum(tile, lengths[row] - first)
    pages = -(-context // heads.page_size)[row]
    # an even share of all pages, had each key/value head its part of PROGRAMS
    share = max(MIN_PAGES, -(-int(pages.sum()) * heads.kv // PROGRAMS))
    parts = np.maximum(1, (2 * pages + share) // (2 * share))
    slots = np.where(parts > 1, parts, 0)
    slot = np.where(parts > 1, slots.cumsum() - slots, -1)
    joins = np.stack([start + first, tokens, slot, slots], axis=1)[parts > 1]

    each, part = expand(parts)  # (I,) for every item
    begin, end = pages[each] * part // parts[each], pages[each] * (part + 1) // parts[each]
    columns = np.stack([start, lengths[row], context[row], place[row], first], axis=1)[each]
    items = np.column_stack([columns, begin, end, slot[each] + part])
    own = np.where(part == parts[each] - 1, first[each] // heads.page_size, 0)
    # the longest first, so that nobody waits for one that began late
    return items[np.argsort(begin - end - own, kind="stable")], joins


class PageTables:
    """The pages of rows as one array."""

    def __init__(self, tables: Iterable[Sequence[int]]) -> None:
        # C ints, joined as bytes: a walk over ints is far slower
        parts = [table if isinstance(table, array) else array("i", table) for table in tables]
        self.flat = np.frombuffer(b"".join(parts), dtype=np.int32)  # row after row
        self.sizes = np.fromiter(map(len, parts), np.int64, len(parts))  # (R,)
        self.begin = self.sizes.cumsum() - self.sizes  # (R,) into `flat`

    def first(self, rows: Array, count: int) -> Array:
        """(len(rows), count) int64: their first pages, 0 behind the last."""
        at = np.arange(count)
        flat = self.flat.take(self.begin[rows, None] + at, mode="clip") if len(self.flat) else 0
        return np.where(at < self.sizes[rows, None], flat, 0).astype(np.int64)


def expand(counts: Array) -> tuple[Array, Array]:
    """Of `counts[i]` things for each i, one after another: their i, and how many of it came before."""
    of = np.repeat(np.arange(len(counts)), counts)
    return of, np.arange(len(of)) - (counts.cumsum() - counts)[of]


def power_of_two(count: int) -> int:
    """The next power of two, `count` itself where it is one."""
    return 1 << max(0, count - 1).bit_length()
