"""How the plain kernels cut the attention of a forward into pieces of equal shapes.

A piece is some queries of one row over the first keys of that row. Its shapes follow from the row alone: queries are
cut every page from the forward's first token, their number is padded to a power of two, and the keys to whole pages.
So a piece is the same product, and has the same bits, in whatever company and however the prompt before it was cut at
whole pages; and pieces of the same shapes are computed together.
"""

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from model.rows import Rows

MIN_QUERIES = 4  # with fewer, the order in which torch sums depends on the number of threads
MAX_GATHERED = 2**15  # keys copied at once: bounds the memory of a forward
QUERIES = 256  # of a piece on an accelerator, where nothing promises equal bits and small products are slow


@dataclass(frozen=True, slots=True)
class Pieces:
    """B pieces of W queries over T keys, as index tensors."""

    table: Tensor  # (B * T / page size,) pages
    own: Tensor  # (Z,) into B * T: the keys that do not come from pages, but from the forward's tokens
    token: Tensor  # (Z,) into the N tokens: what stands there; behind the last visible key a copy of it
    query: Tensor  # (B * W,) into the N tokens; padding repeats the last
    visible: Tensor  # (B, W), or (B, 1) for all queries: each sees so many of the first keys
    seen: int  # all queries see so many
    real: Tensor | None  # (Y,) into B * W: what is no padding; None where all are real
    target: Tensor  # (Y,) into the N tokens: the queries that are real


@dataclass(frozen=True, slots=True)
class _Piece:
    """Queries [first, last) of the forward's tokens, of a row whose tokens start at `start`."""

    row: int
    start: int
    first: int
    last: int
    context: int
    keys: int  # the last query sees so many


def place_tokens(rows: Rows, page_size: int) -> Tensor:
    """(N,) where each token's key lies among pages * page_size places."""
    places = []
    for length, context, table in zip(rows.lengths, rows.context, rows.pages, strict=True):
        position = torch.arange(context, context + length)
        places.append(torch.tensor(table)[position // page_size] * page_size + position % page_size)
    return torch.cat(places)


def plan_pieces(rows: Rows, page_size: int, device: torch.device, *, causal: bool, stored: bool) -> list[Pieces]:
    """All pieces of a forward, those of equal shapes together.

    causal: a query sees no later token. stored: the rows' own tokens stand in their pages already.
    """
    size = page_size if device.type == "cpu" else max(page_size, QUERIES)
    alike = defaultdict(list)
    for row, (start, length, context) in enumerate(zip(rows.starts, rows.lengths, rows.context, strict=True)):
        step = size if causal else length
        for first in range(start, start + length, step):
            last = min(first + step, start + length)
            piece = _Piece(row, start, first, last, context, context + last - start)
            width = 1 << max(MIN_QUERIES - 1, last - first - 1).bit_length()
            alike[width, -(-piece.keys // page_size)].append(piece)
    plans = []
    for (width, pages), pieces in alike.items():
        most = max(1, MAX_GATHERED // (pages * page_size))
        for begin in range(0, len(pieces), most):
            some = pieces[begin : begin + most]
            tables = [(*rows.pages[piece.row][:pages], *[0] * (pages - len(rows.pages[piece.row]))) for piece in some]
            plans.append(_plan(some, width, page_size, torch.tensor(tables), device, causal=causal, stored=stored))
    return plans


def _plan(
    pieces: list[_Piece], width: int, page_size: int, table: Tensor, device: torch.device, *, causal: bool, stored: bool
) -> Pieces:
    start, first, last, context, keys = torch.tensor(
        [(piece.start, piece.first, piece.last, piece.context, piece.keys) for piece in pieces]
    ).T[..., None]  # (B, 1) each
    total = table.shape[1] * page_size
    begin = keys if stored else context
    own = int(begin.min()) + torch.arange(total - int(begin.min()))  # candidates
    inside = own >= begin  # (B, …)
    offset = torch.arange(width)
    query = torch.minimum(first + offset, last - 1)
    real = first + offset < last
    visible = query - start + context + 1 if causal else keys
    return Pieces(
        table=table.flatten().to(device),
        own=(own + torch.arange(len(pieces))[:, None] * total)[inside].to(device),
        token=(start + torch.minimum(own, keys - 1) - context)[inside].to(device),
        query=query.flatten().to(device),
        visible=visible.to(device),
        seen=int(visible.min()),
        real=None if real.all() else real.flatten().nonzero()[:, 0].to(device),
        target=query[real].to(device),
    )
