"""Cuts the attention of a forward into pieces of equal shapes for the plain kernels.

A piece is some queries of one row over the first keys of that row. On a CPU its shapes depend on the row alone: causal
queries are cut after every page of tokens, counted from the row's first token in the forward, their number is padded to
a power of two, and the keys are padded to whole pages. So a piece is the same product with the same bits, whatever
other rows there are and at whichever whole pages the prompt before it was cut. Elsewhere causal pieces are larger (see
QUERIES). Pieces of the same shapes are computed together.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.kernels.triton.attention_plan import PageTables, expand, power_of_two
from model.runtime.ragged_batch import RaggedBatch
from model.runtime.transfer import Array, to_device

MIN_QUERIES = 4  # with fewer, the order in which torch sums depends on the number of threads
MAX_GATHERED = 2**15  # keys that are copied at once; limits the memory of a forward
QUERIES = 256  # per causal piece on an accelerator, where equal bits are not promised and small products are slow


@dataclass(frozen=True, slots=True)
class Pieces:
    """B pieces of attention with the same shapes, which are computed together.

    Each holds W queries of one row and the first T keys of that row, padding included; the tensors say where these
    queries and keys are.
    """

    table: Tensor  # (B * T / page size,) the pages that contain the keys
    own: Tensor  # (Z,) into B * T: the keys that come from the forward's tokens instead of pages
    token: Tensor  # (Z,) into the N tokens: the token of each of these keys; padding repeats the last visible one
    query: Tensor  # (B * W,) into the N tokens; padding repeats the last query
    visible: Tensor  # (B, W), or (B, 1) if equal for all queries: number of first keys that a query sees
    seen: int  # number of first keys that every query sees
    real: Tensor | None  # (Y,) into B * W: the queries that are not padding; None if no query is padding
    target: Tensor  # (Y,) into the N tokens: the queries that are not padding


def place_tokens(rows: RaggedBatch, page_size: int) -> Tensor:
    """Return where the key and the value of each token are stored: page * page_size + offset in the page.

    The result is (N,) int64 on the host. A token's offset follows from its row's context and its place in the row.
    """
    pages = PageTables(rows.pages)
    row, ordinal = expand(np.array(rows.lengths, dtype=np.int64))
    page, place = np.divmod(np.array(rows.context, dtype=np.int64)[row] + ordinal, page_size)
    assert (page < pages.sizes[row]).all(), "a row has fewer pages than its tokens need"
    return torch.from_numpy(pages.flat[pages.begin[row] + page].astype(np.int64) * page_size + place)


def plan_pieces(rows: RaggedBatch, page_size: int, device: torch.device, *, causal: bool, stored: bool) -> list[Pieces]:
    """Return all pieces of a forward, with pieces of the same shapes together, as many as MAX_GATHERED allows.

    causal: a query sees no later token. stored: the rows' own tokens are already in their pages; otherwise their keys
    are taken from the forward's tokens.
    """
    size = page_size if device.type == "cpu" else max(page_size, QUERIES)
    lengths, context = (np.array(column, dtype=np.int64) for column in (rows.lengths, rows.context))
    step = np.full_like(lengths, size) if causal else lengths
    row, ordinal = expand(-(-lengths // step))  # one entry per piece
    start = (lengths.cumsum() - lengths)[row]
    first = start + ordinal * step[row]
    last = np.minimum(first + step[row], start + lengths[row])  # exclusive
    keys = context[row] + last - start  # number of keys that the last query sees
    alike = defaultdict[tuple[int, int], list[int]](list)
    for piece, (queries, seen) in enumerate(zip((last - first).tolist(), keys.tolist(), strict=True)):
        alike[power_of_two(max(MIN_QUERIES, queries)), -(-seen // page_size)].append(piece)
    columns, tables = np.stack([start, first, last, context[row], keys]), PageTables(rows.pages)
    plans = []
    for (width, pages), pieces in alike.items():
        most = max(1, MAX_GATHERED // (pages * page_size))
        for begin in range(0, len(pieces), most):
            some = pieces[begin : begin + most]
            table = tables.first(row[some], pages)
            plans.append(_plan(columns[:, some, None], width, page_size, table, device, causal=causal, stored=stored))
    return plans


def _plan(
    columns: Array, width: int, page_size: int, table: Array, device: torch.device, *, causal: bool, stored: bool
) -> Pieces:
    """Return the index tensors, on `device`, of B pieces with W = `width` queries each.

    columns (5, B, 1): start of the row, first query, last query (exclusive), context, keys. table (B, T / page_size).
    """
    start, first, last, context, keys = columns
    total = table.shape[1] * page_size
    begin = keys if stored else context
    own = np.arange(begin.min(), total)  # candidates
    inside = own >= begin  # (B, …)
    offset = np.arange(width)
    query = np.minimum(first + offset, last - 1)
    real = first + offset < last
    visible = query - start + context + 1 if causal else keys
    own_of, token_of = own + np.arange(len(table))[:, None] * total, start + np.minimum(own, keys - 1) - context

    def sent(x: Array) -> Tensor:
        return to_device(x, device)

    return Pieces(
        table=sent(table.ravel()),
        own=sent(own_of[inside]),
        token=sent(token_of[inside]),
        query=sent(query.ravel()),
        visible=sent(visible),
        seen=int(visible.min()),
        real=None if real.all() else sent(np.flatnonzero(real)),
        target=sent(query[real]),
    )
