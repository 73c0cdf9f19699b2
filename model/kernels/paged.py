"""The plan of a forward's attention over paged contexts, made on the host from what the host knows: no device is asked.

The queries of a row are cut into tiles. The query heads that share a key/value head lie beside each other in a tile, so
that keys and values are read once for all of them. Long contexts are split: a tile then has several items that cover
some pages each and leave partial results, which a join puts together. The last item sees the row's own tokens too.
What a device reads lies in three int32 tensors; their sizes can be fixed beforehand (`Room`), for CUDA graphs.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.rows import Rows

QUERIES = 256  # of a tile at most, query heads times tokens
MIN_QUERIES = 16  # the least that Triton takes in a matrix product
PROGRAMS = 264  # two for each multiprocessor of an H100 or H200: contexts are split until there are so many
MIN_PAGES = 2  # of an item beside others of its tile: with fewer, joining them would cost more than reading


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

    rows: int
    longest: int
    """Tokens of a row at most."""
    tile: int
    """Tokens of a tile."""
    pages: int
    """Of a row's context with its own tokens, at most."""
    items: int
    joins: int
    slots: int
    """Partial results, each of one tile and all key/value heads."""

    @classmethod
    def of(cls, heads: Heads, rows: int, longest: int, pages: int) -> "Room":
        """For any forward of at most so many rows, tokens of a row, and pages of a row.

        Splitting makes at most PROGRAMS items more, over all key/value heads, whatever the contexts are.
        """
        tile = heads.tile(longest)
        more = PROGRAMS // heads.kv if pages > MIN_PAGES else 0
        return cls(rows, longest, tile, pages, rows * -(-longest // tile) + more, more, 2 * more)


@dataclass(frozen=True, slots=True)
class Paged:
    """A plan. Items and joins that are all zeros do nothing."""

    table: Tensor  # (R, P) int32 pages of each row; zeros behind them, which nobody looks at
    items: Tensor  # (I, 8) int32: the row's start, length and context, row, first query, pages from and to, slot or -1
    joins: Tensor  # (J, 4) int32: first token among the N, tokens, first slot, slots
    room: Room

    def to(self, device: torch.device) -> "Paged":
        """The plan on a device."""
        table, items, joins = (x.to(device, non_blocking=True) for x in (self.table, self.items, self.joins))
        return Paged(table, items, joins, self.room)

    def fill(self, plan: "Paged") -> None:
        """Takes over a plan of the same room, into its own tensors, which a CUDA graph reads."""
        assert plan.room == self.room, f"a plan of {plan.room} does not fit into {self.room}"
        for mine, new in ((self.table, plan.table), (self.items, plan.items), (self.joins, plan.joins)):
            mine.copy_(new, non_blocking=True)


@dataclass(frozen=True, slots=True)
class _Tile:
    """`tokens` queries of a row from its token `first` on; `pages` pages of context before the row."""

    row: int
    start: int
    length: int
    context: int
    first: int
    tokens: int
    pages: int


def plan_attention(rows: Rows, heads: Heads, room: Room | None = None) -> Paged:
    """The plan of a forward, on the host, in tensors of the sizes of `room`, else in just as large ones."""
    longest = max(rows.lengths, default=1)
    tile = room.tile if room else heads.tile(longest)
    tiles = list(_tiles(rows, tile, heads.page_size))
    # an even share of all pages, had each key/value head its part of PROGRAMS
    share = max(MIN_PAGES, -(-sum(at.pages for at in tiles) * heads.kv // PROGRAMS))
    items, joins, slots = list[tuple[int, tuple[int, ...]]](), list[tuple[int, ...]](), 0
    for at in tiles:
        parts = max(1, (2 * at.pages + share) // (2 * share))
        cuts = [at.pages * part // parts for part in range(parts + 1)]
        for part in range(parts):
            pages = cuts[part], cuts[part + 1]
            own = at.first // heads.page_size if part == parts - 1 else 0
            slot = slots + part if parts > 1 else -1
            items.append((pages[1] - pages[0] + own, (at.start, at.length, at.context, at.row, at.first, *pages, slot)))
        if parts > 1:
            joins.append((at.start + at.first, at.tokens, slots, parts))
            slots += parts
    items.sort(key=lambda item: -item[0])  # the longest first, so that nobody waits for one that began late
    used = [
        -(-(length + context) // heads.page_size) for length, context in zip(rows.lengths, rows.context, strict=True)
    ]
    most = max(used, default=1)
    room = room or Room(len(used), longest, tile, power_of_two(most), len(items), len(joins), slots)
    needed = longest, most, slots
    assert all(one <= at_most for one, at_most in zip(needed, (room.longest, room.pages, room.slots), strict=True)), (
        room
    )
    return Paged(
        _matrix((table[:count] for table, count in zip(rows.pages, used, strict=True)), room.rows, room.pages),
        _matrix((item for _, item in items), room.items, 8),
        _matrix(joins, room.joins, 4),
        room,
    )


def _tiles(rows: Rows, tile: int, page_size: int) -> Iterator[_Tile]:
    start = 0
    for row, (length, context) in enumerate(zip(rows.lengths, rows.context, strict=True)):
        for first in range(0, length, tile):
            tokens = min(tile, length - first)
            yield _Tile(row, start, length, context, first, tokens, -(-context // page_size))
        start += length


def _matrix(lines: Iterable[Sequence[int]], height: int, width: int) -> Tensor:
    """(height, width) int32 of lines that may be shorter; zeros elsewhere."""
    flat = list[int]()
    for line in lines:
        flat.extend(line)
        flat.extend([0] * (width - len(line)))
    assert len(flat) <= height * width, f"{len(flat) // width} lines are more than {height}"
    flat.extend([0] * (height * width - len(flat)))
    return torch.tensor(flat, dtype=torch.int32).view(height, width)


def power_of_two(count: int) -> int:
    """The next power of two, `count` itself where it is one."""
    return 1 << max(0, count - 1).bit_length()
