"""Computes attention over [paged context | own tokens] in Triton, by one kernel for prompts, blocks and single tokens.

The plan says which program does what, see model.kernels.triton.attention_plan. Nothing here depends on numbers that
only the device has, so a forward can be captured in a CUDA graph. Scores, softmax and sums are float32. Products use
the dtype of the inputs; float32 inputs are multiplied in full float32, because TensorFloat-32 is less accurate than
model.checks.kernels allows.

Shapes in the kernels: M queries of a tile (its tokens times the heads that share a key/value head); T keys at a time; D
channels of a head. All are powers of two, padded if the model's sizes are not.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.triton.attention_plan import MIN_QUERIES, QUERIES, Heads, Paged, plan_attention, power_of_two
from model.runtime.ragged_batch import RaggedBatch

FLOAT32_TILE = 2048  # queries x channels; float32 products use no tensor cores and keep their operands in registers
JOINED_QUERIES = 4  # queries per program of a join
JOINED_SLOTS = 16  # partial results per step of a join


def attend(q: Tensor, k: Tensor, v: Tensor, pages: Tensor, rows: RaggedBatch, *, causal: bool, store: bool) -> Tensor:
    """Implement `model.kernels.protocol.Kernels.attend`."""
    heads = heads_of(q, k, pages)
    plan = rows.once((q.device, heads), lambda: plan_attention(rows, heads).to(q.device))
    return attend_paged(q, k, v, pages, plan, causal=causal, store=store)


def heads_of(q: Tensor, k: Tensor, pages: Tensor) -> Heads:
    """Return the sizes that a plan for these tensors depends on. Raises AssertionError if k does not fit into pages."""
    assert k.shape[1:] == pages.shape[3:], f"keys {tuple(k.shape)} do not fit into pages {tuple(pages.shape)}"
    return heads_over(q.shape[1], pages)


def heads_over(query_heads: int, pages: Tensor) -> Heads:
    """Return the sizes that a plan depends on, for `query_heads` query heads over `pages`, in the dtype of `pages`."""
    page_size, kv_heads, head_dim = pages.shape[2:]
    queries = QUERIES if pages.dtype.itemsize == 2 else FLOAT32_TILE // power_of_two(head_dim)
    return Heads(kv_heads, query_heads // kv_heads, page_size, queries)


def attend_paged(
    q: Tensor,  # (N, query heads, head_dim); q, k and v may be slices of one wider tensor
    k: Tensor,  # (N, kv heads, head_dim)
    v: Tensor,
    pages: Tensor,  # (2, pages, page_size, kv heads, head_dim)
    plan: Paged,
    *,
    causal: bool,
    store: bool,
) -> Tensor:
    """Compute `attend` with a plan that is on q's device and was made for `heads_of(q, k, pages)`.

    Returns (N, query heads * head_dim). The results of tokens that belong to no row are undefined. Raises
    AssertionError if page_size is no power of two from 16 on, or if the tensors lie in memory in another way than the
    kernel reads them.
    """
    tokens, query_heads, head_dim = q.shape
    page_size, kv_heads = pages.shape[2:4]
    assert page_size == power_of_two(page_size) >= MIN_QUERIES, f"pages of {page_size}: powers of two from 16 are known"
    assert pages.is_contiguous(), "pages must be contiguous"
    assert all(x.stride()[1:] == (head_dim, 1) for x in (q, k, v)), "the heads of a token must lie one behind another"
    assert k.stride() == v.stride(), "k and v must lie alike"
    room, shared = plan.room, query_heads // kv_heads
    wide, dim = power_of_two(shared), max(MIN_QUERIES, power_of_two(head_dim))
    queries = room.tile * wide
    out = q.new_empty(tokens, query_heads * head_dim)
    mixed = q.new_empty(room.slots, kv_heads, queries, dim, dtype=torch.float32)
    best, total = q.new_empty(2, room.slots, kv_heads, queries, dtype=torch.float32)
    sizes = {"HEADS": kv_heads, "SHARED": shared, "WIDE": wide, "DIM": head_dim, "D": dim, "TILE": room.tile}
    with torch.cuda.device_of(q):
        if room.items:
            _attend[(room.items * kv_heads,)](
                *(out, q, k, v, pages[0], pages[1], plan.table, plan.items, best, total, mixed),
                *(q.stride(0), k.stride(0), math.log2(math.e) / math.sqrt(head_dim)),
                **sizes,
                PAGE=page_size,
                OWN=min(page_size, max(MIN_QUERIES, power_of_two(room.longest))),
                CAUSAL=causal,
                STORE=store,
                SPLIT=room.slots > 0,
                WIDEN=triton.knobs.runtime.interpret,  # the interpreter would multiply the bits of bfloat16 as integers
                num_warps=min(16, max(4, queries // 16)),
                num_stages=3 if q.dtype.itemsize == 2 else 1,
            )
        if room.joins:
            _join[(room.joins * kv_heads * (queries // JOINED_QUERIES),)](
                *(out, plan.joins, best, total, mixed), **sizes, SOME=JOINED_QUERIES, SLOTS=JOINED_SLOTS
            )
    return out


@triton.jit
def _attend(
    out: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    key_pages: tl.tensor,
    value_pages: tl.tensor,
    table: tl.tensor,
    items: tl.tensor,
    all_best: tl.tensor,
    all_total: tl.tensor,
    all_mixed: tl.tensor,
    q_stride: int,
    kv_stride: int,
    scale: float,
    HEADS: tl.constexpr,  # key/value heads
    SHARED: tl.constexpr,  # query heads per key/value head
    WIDE: tl.constexpr,  # SHARED, rounded up to a power of two
    DIM: tl.constexpr,  # channels of a head
    D: tl.constexpr,  # DIM, rounded up to a power of two, at least 16
    TILE: tl.constexpr,  # tokens of a tile
    PAGE: tl.constexpr,
    OWN: tl.constexpr,  # own tokens that are read at a time
    CAUSAL: tl.constexpr,
    STORE: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
) -> None:
    """Compute one item of the plan for one key/value head: its pages and, in a tile's last item, the row's own tokens.

    If STORE, the last item also writes its tile's keys and values to their pages. If the tile has several items, the
    results go to all_best, all_total and all_mixed, for `_join`; otherwise to `out`.
    """
    head, item = tl.program_id(0) % HEADS, items + tl.program_id(0) // HEADS * 8
    start, length, context = tl.load(item).to(tl.int64), tl.load(item + 1), tl.load(item + 2)
    table += tl.load(item + 3)
    first, page_from, page_to = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    if length == 0:
        return
    query, dim = tl.arange(0, TILE * WIDE), tl.arange(0, D)
    token = first + query // WIDE
    shown = ((token < length) & (query % WIDE < SHARED))[:, None] & (dim < DIM)[None, :]
    channel = (head * SHARED + query % WIDE)[:, None] * DIM + dim[None, :]
    tile = tl.load(q + start * q_stride + token[:, None] * q_stride + channel, mask=shown, other=0.0)
    best = tl.full([TILE * WIDE], float("-inf"), tl.float32)
    total = tl.zeros([TILE * WIDE], tl.float32)
    mixed = tl.zeros([TILE * WIDE, D], tl.float32)

    keys, values, index = key_pages + head * DIM, value_pages + head * DIM, tl.arange(0, PAGE)
    place = index[:, None] * (HEADS * DIM) + dim[None, :]
    whole = tl.maximum(page_from, tl.minimum(page_to, context // PAGE))
    for at in range(page_from, whole):
        page = tl.load(table + at).to(tl.int64) * (PAGE * HEADS * DIM)
        best, total, mixed = _fold(
            best, total, mixed, tile, keys + page, values + page, place, index, 0, token, scale, DIM, WIDEN, False
        )
    for at in range(whole, page_to):  # the page in which the context ends, if any; data after the end is arbitrary
        page = tl.load(table + at).to(tl.int64) * (PAGE * HEADS * DIM)
        end = context - at * PAGE
        upto = tl.zeros_like(token) + (end - 1)
        best, total, mixed = _fold(
            best, total, mixed, tile, keys + page, values + page, place, index, end, upto, scale, DIM, WIDEN, True
        )

    own = page_to * PAGE >= context
    keys, values, index = k + head * DIM, v + head * DIM, tl.arange(0, OWN)
    place = index[:, None] * kv_stride + dim[None, :]
    end = tl.minimum(length, first + TILE) if CAUSAL else length
    whole = (first + 1 if CAUSAL else length) // OWN * OWN  # every query sees all of these
    for at in range(0, tl.where(own, whole, 0), OWN):
        here = (start + at) * kv_stride
        best, total, mixed = _fold(
            best, total, mixed, tile, keys + here, values + here, place, index, 0, token, scale, DIM, WIDEN, False
        )
    for at in range(whole, tl.where(own, end, 0), OWN):
        here = (start + at) * kv_stride
        left = length - at
        upto = token - at if CAUSAL else tl.zeros_like(token) + (left - 1)
        best, total, mixed = _fold(
            best, total, mixed, tile, keys + here, values + here, place, index, left, upto, scale, DIM, WIDEN, True
        )

    if STORE:
        new = first + tl.arange(0, TILE)
        stored, position = new < tl.where(own, length, 0), context + new
        page = tl.load(table + position // PAGE, mask=stored, other=0).to(tl.int64)
        place = (page * PAGE + position % PAGE)[:, None] * (HEADS * DIM) + head * DIM + dim[None, :]
        stored = stored[:, None] & (dim < DIM)[None, :]
        here = (start + new)[:, None] * kv_stride + dim[None, :]
        tl.store(key_pages + place, tl.load(keys + here, mask=stored), mask=stored)
        tl.store(value_pages + place, tl.load(values + here, mask=stored), mask=stored)

    slot = tl.load(item + 7)
    if SPLIT and slot >= 0:
        line = (slot * HEADS + head).to(tl.int64) * (TILE * WIDE) + query
        tl.store(all_best + line, best)
        tl.store(all_total + line, total)
        tl.store(all_mixed + line[:, None] * D + dim[None, :], mixed)
    else:
        result = out + (start + token)[:, None] * (HEADS * SHARED * DIM) + channel
        tl.store(result, (mixed / total[:, None]).to(out.dtype.element_ty), mask=shown)


@triton.jit
def _fold(
    best: tl.tensor,
    total: tl.tensor,
    mixed: tl.tensor,
    tile: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    place: tl.tensor,
    index: tl.tensor,
    end: tl.tensor,
    upto: tl.tensor,
    scale: float,
    DIM: tl.constexpr,
    WIDEN: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Add T more keys and values, at `place` (T, D), to the running softmax of the tile (M, D).

    Returns the new best, total and mixed. best: the largest scores so far, times log2(e). total, mixed: sums of weights
    and of weighted values, relative to best. If MASKED, keys whose index (T,) is `end` or higher are not read, and a
    query sees no index above its `upto` (M,). Every query sees at least one key in its first call, so `best` is finite
    from then on.
    """
    read = (tl.arange(0, tile.shape[1]) < DIM)[None, :]
    if MASKED:
        read = read & (index < end)[:, None]
    key = tl.load(keys + place, mask=read, other=0.0)
    scores = _dot(tile, tl.trans(key), None, WIDEN) * scale
    if MASKED:
        scores = tl.where(index[None, :] <= upto[:, None], scores, float("-inf"))
    new = tl.maximum(best, tl.max(scores, 1))
    weight = tl.exp2(scores - new[:, None])
    older = tl.exp2(best - new)
    value = tl.load(values + place, mask=read, other=0.0)
    mixed = _dot(weight.to(value.dtype), value, mixed * older[:, None], WIDEN)
    return new, total * older + tl.sum(weight, 1), mixed


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, added: tl.tensor | None, WIDEN: tl.constexpr) -> tl.tensor:
    """Return a @ b, plus `added` if it is not None, in float32. If WIDEN, a and b are converted to float32 first."""
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, added, input_precision="ieee")


@triton.jit
def _join(
    out: tl.tensor,
    joins: tl.tensor,
    all_best: tl.tensor,
    all_total: tl.tensor,
    all_mixed: tl.tensor,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    WIDE: tl.constexpr,
    DIM: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    SOME: tl.constexpr,
    SLOTS: tl.constexpr,
) -> None:
    """Combine the partial results of one tile and key/value head for SOME queries, SLOTS partial results at a time."""
    parts: tl.constexpr = TILE * WIDE // SOME
    number, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    head, join = number % HEADS, joins + number // HEADS * 4
    start, tokens = tl.load(join).to(tl.int64), tl.load(join + 1)
    first, count = tl.load(join + 2), tl.load(join + 3)
    if part * SOME // WIDE >= tokens:
        return
    query, dim = part * SOME + tl.arange(0, SOME), tl.arange(0, D)
    best = tl.full([SOME], float("-inf"), tl.float32)
    total = tl.zeros([SOME], tl.float32)
    mixed = tl.zeros([SOME, D], tl.float32)
    for at in range(0, count, SLOTS):
        slot = at + tl.arange(0, SLOTS)
        line = ((first + slot) * HEADS + head).to(tl.int64)[None, :] * (TILE * WIDE) + query[:, None]  # (SOME, SLOTS)
        there = tl.broadcast_to((slot < count)[None, :], SOME, SLOTS)
        theirs = tl.load(all_best + line, mask=there, other=float("-inf"))
        new = tl.maximum(best, tl.max(theirs, 1))
        weight, older = tl.exp2(theirs - new[:, None]), tl.exp2(best - new)
        total = total * older + tl.sum(weight * tl.load(all_total + line, mask=there, other=0.0), 1)
        some = tl.load(all_mixed + line[:, :, None] * D + dim[None, None, :], mask=there[:, :, None], other=0.0)
        mixed = mixed * older[:, None] + tl.sum(weight[:, :, None] * some, 1)
        best = new
    shown = ((query // WIDE < tokens) & (query % WIDE < SHARED))[:, None] & (dim < DIM)[None, :]
    channel = (head * SHARED + query % WIDE)[:, None] * DIM + dim[None, :]
    place = (start + query // WIDE)[:, None] * (HEADS * SHARED * DIM) + channel
    tl.store(out + place, (mixed / total[:, None]).to(out.dtype.element_ty), mask=shown)
