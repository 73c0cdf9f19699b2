"""Computes experts on a GPU: sorts the (token, choice) pairs by expert, then two grouped products and a weighted sum.

Nothing here waits for the device, and shapes depend on the number of tokens alone, so everything can be captured in a
CUDA graph. There are no atomic operations: the same input gives the same bits.

The products use torch.nn.functional.grouped_mm if it is fast (`grouped_mm_is_fast`), and otherwise `grouped_product`,
which gathers its input rows and squares inside the product. The requirements of grouped_mm
(ATen/native/GroupedMMUtils.h, cuda/GroupedBlas.cpp and cuda/GroupMM.cu of torch 2.11 to 2.13; its documentation):
- bfloat16 input and output, on compute capability 9.0 or 10.0. It computes anything else, such as float32, in a loop
  over experts after copying the offsets to the host, which is slow and impossible while a graph is captured;
- addresses and strides that are multiples of 16 bytes: H and F must be multiples of 8 (up to 2.12 on a CPU, too);
- fewer than 1024 experts; int32 offsets that say where each expert's rows end. Experts without rows are allowed.

The time cannot be shorter than reading the weights of each chosen expert once. If few tokens are computed, each expert
has one or two rows in a tile of 64. This costs nothing: up to about 200 rows per expert (990 TFLOP/s over 4.8 TB/s, the
figures of an H200), reading takes longer than computing.

Legend: N tokens, K choices per token, P = N K pairs, E experts, H hidden size, F expert width.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

SORT_BLOCK = 1024
SUM_BLOCK = 1024
PRODUCT_ROWS, PRODUCT_COLUMNS, PRODUCT_DEPTH = 64, 64, 32


def grouped_experts(x: Tensor, choice: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Implement `model.kernels.protocol.Kernels.experts`.

    x (N, H), choice (N, K), weight (N, K) float32, up (E, F, H), down (E, H, F) -> (N, H). The ids in `choice` must be
    from 0 to E - 1. The sum over a token's choices is in float32.
    """
    if not len(x):
        return torch.empty_like(x)
    with torch.cuda.device_of(x):  # Triton launches on the current device, not on that of its arguments
        ends, place, token = by_expert(choice, len(up))
        if grouped_mm_is_fast(x, up):
            hidden = F.grouped_mm(x.index_select(0, token), up.transpose(-1, -2), offs=ends)
            outputs = F.grouped_mm(squared_relu_(hidden), down.transpose(-1, -2), offs=ends)
        else:
            hidden = grouped_product(x, up, ends, len(token), rows=token, squared=True)
            outputs = grouped_product(hidden, down, ends, len(token))
        return weighted_sum(outputs, place, weight)


def grouped_mm_is_fast(x: Tensor, weight: Tensor) -> bool:
    """Return True if torch's grouped product takes x (N, H) and weight (E, F, H) without waiting for the device."""
    if x.dtype != torch.bfloat16 or any(size % 8 for size in weight.shape[1:]) or len(weight) >= 1024:
        return False
    return x.device.type == "cpu" or torch.cuda.get_device_capability(x.device) in ((9, 0), (10, 0))


def by_expert(choice: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the (token, choice) pairs of choice (N, K) int64 by expert, with a stable counting sort in one kernel.

    Returns, in int32: where each expert's pairs end in the sorted order (E,), the place of each pair in that order
    (P,), and the token of the pair at each place (P,).
    torch.bincount would wait for the device (pytorch issue 192343), and torch.sort takes several passes.
    """
    ends = torch.empty(experts, dtype=torch.int32, device=choice.device)
    place, token = torch.empty(2, choice.numel(), dtype=torch.int32, device=choice.device)
    pairs, per_token = choice.numel(), choice.shape[1]
    _by_expert_kernel[(experts,)](choice.contiguous(), ends, place, token, pairs, per_token, BLOCK=SORT_BLOCK)
    return ends, place, token


@triton.jit(do_not_specialize=["pairs"])
def _by_expert_kernel(
    choice: tl.tensor,
    ends: tl.tensor,
    place: tl.tensor,
    token: tl.tensor,
    pairs: int,
    per_token: int,
    BLOCK: tl.constexpr,
) -> None:
    """Place the pairs of one expert: count the pairs of experts with lower ids, then number its own pairs."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.int32)
    mine = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pairs, BLOCK):
        pair = start + lane
        chosen = tl.load(choice + pair, mask=pair < pairs, other=2**31 - 1).to(tl.int32)
        before += (chosen < expert).to(tl.int32)
        mine += (chosen == expert).to(tl.int32)
    begin = tl.sum(before, 0)
    tl.store(ends + expert, begin + tl.sum(mine, 0))
    for start in range(0, pairs, BLOCK):
        pair = start + lane
        hit = tl.load(choice + pair, mask=pair < pairs, other=2**31 - 1).to(tl.int32) == expert
        at = begin + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(place + pair, at, mask=hit)
        tl.store(token + at, pair // per_token, mask=hit)
        begin += tl.sum(hit.to(tl.int32), 0)


def squared_relu_(x: Tensor) -> Tensor:
    """Overwrite x with relu(x)^2, in one pass, and return it. Raises AssertionError if x is not contiguous."""
    assert x.is_contiguous()
    if x.numel():
        with torch.cuda.device_of(x):
            _squared_relu_kernel[(triton.cdiv(x.numel(), SUM_BLOCK),)](x, x.numel(), BLOCK=SUM_BLOCK)
    return x


@triton.jit
def _squared_relu_kernel(x: tl.tensor, count: int, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count, other=0).to(tl.float32)
    value = tl.where(value < 0, 0.0, value)  # keeps NaN
    tl.store(x + at, (value * value).to(x.dtype.element_ty), mask=at < count)


def weighted_sum(outputs: Tensor, place: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted sum of each token's expert outputs: (N, H) in the dtype of outputs, added up in float32.

    outputs (P, H) are sorted by expert, place (P,) says where each pair is in them, weight (N, K) is float32.
    """
    (tokens, per_token), size = weight.shape, outputs.shape[1]
    out = outputs.new_empty(tokens, size)
    block = min(SUM_BLOCK, triton.next_power_of_2(size))
    _weighted_sum_kernel[(tokens, triton.cdiv(size, block))](
        outputs, place, weight.contiguous(), out, size, PER_TOKEN=per_token, BLOCK=block
    )
    return out


@triton.jit
def _weighted_sum_kernel(
    outputs: tl.tensor,
    place: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    size: int,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(PER_TOKEN):
        row = tl.load(place + token * PER_TOKEN + k).to(tl.int64)
        value = tl.load(outputs + row * size + column, mask=column < size, other=0).to(tl.float32)
        total += tl.load(weight + token * PER_TOKEN + k) * value
    tl.store(out + token * size + column, total.to(out.dtype.element_ty), mask=column < size)


def grouped_product(
    x: Tensor, weight: Tensor, ends: Tensor, pairs: int, *, rows: Tensor | None = None, squared: bool = False
) -> Tensor:
    """Multiply each pair's input row by the matrix of its expert: weight (E, out, in) -> (P, out).

    x is (P, in) with its rows sorted by expert, or (N, in) if `rows` (P,) gives the row of each pair. ends (E,) int32:
    where each expert's pairs end. squared: apply relu(.)^2 to the product, after rounding to x's dtype as the plain
    kernels do. float32 is multiplied as float32, not as TensorFloat-32.
    """
    (experts, size_out, size_in), x = weight.shape, x.contiguous()
    out = x.new_empty(pairs, size_out)
    tiles = pairs // PRODUCT_ROWS + min(experts, pairs)  # upper limit; surplus programs do nothing
    block = {
        "ROWS": min(PRODUCT_ROWS, max(16, triton.next_power_of_2(pairs))),
        "COLUMNS": min(PRODUCT_COLUMNS, max(16, triton.next_power_of_2(size_out))),
        "DEPTH": min(PRODUCT_DEPTH, max(16, triton.next_power_of_2(size_in))),
    }
    _grouped_product_kernel[(tiles, triton.cdiv(size_out, block["COLUMNS"]))](
        x,
        x if rows is None else rows,
        weight.contiguous(),
        ends,
        out,
        size_out,
        size_in,
        experts,
        GATHER=rows is not None,
        SQUARED=squared,
        WIDE=triton.knobs.runtime.interpret,  # the interpreter would multiply the bits of bfloat16 as integers
        EXPERTS=triton.next_power_of_2(experts),
        **block,
    )
    return out


@triton.jit
def _grouped_product_kernel(
    x: tl.tensor,
    rows: tl.tensor,
    weight: tl.tensor,
    ends: tl.tensor,
    out: tl.tensor,
    size_out: int,
    size_in: int,
    experts: int,
    GATHER: tl.constexpr,
    SQUARED: tl.constexpr,
    WIDE: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two, at least `experts`
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    """Compute one tile: ROWS pairs of one expert by COLUMNS outputs. The program finds its expert from `ends`."""
    tile = tl.program_id(0)
    lane = tl.arange(0, EXPERTS)
    end = tl.load(ends + lane, mask=lane < experts, other=0)
    begin = tl.load(ends + lane - 1, mask=(lane > 0) & (lane < experts), other=0)
    tiles = tl.where(lane < experts, (end - begin + ROWS - 1) // ROWS, 0)
    tiles_end = tl.cumsum(tiles, 0)
    if tile >= tl.sum(tiles, 0):
        return
    expert = tl.sum((tiles_end <= tile).to(tl.int32), 0)
    first = tl.sum(tl.where(lane == expert, begin + (tile - tiles_end + tiles) * ROWS, 0), 0)
    stop = tl.sum(tl.where(lane == expert, end, 0), 0)

    pair = first + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    source = pair.to(tl.int64)
    if GATHER:
        source = tl.load(rows + pair, mask=pair < stop, other=0).to(tl.int64)
    output = expert.to(tl.int64) * size_out + column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, size_in, DEPTH):
        inside = start + depth < size_in
        a = tl.load(
            x + source[:, None] * size_in + (start + depth)[None, :],
            mask=(pair < stop)[:, None] & inside[None, :],
            other=0,
        )
        b = tl.load(
            weight + output[None, :] * size_in + (start + depth)[:, None],
            mask=(column < size_out)[None, :] & inside[:, None],
            other=0,
        )
        if WIDE:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    result = total.to(out.dtype.element_ty)
    if SQUARED:
        value = result.to(tl.float32)
        value = tl.where(value < 0, 0.0, value)
        result = (value * value).to(out.dtype.element_ty)
    place = out + pair.to(tl.int64)[:, None] * size_out + column[None, :]
    tl.store(place, result, mask=(pair < stop)[:, None] & (column < size_out)[None, :])


def choose_experts(
    logits: Tensor, bias: Tensor, per_token: int, scale: float, *, normalise: bool
) -> tuple[Tensor, Tensor]:
    """Implement `model.kernels.protocol.Kernels.choose_experts` in one kernel.

    logits (N, E) float64, bias (E,) -> experts (N, K) int64, weights (N, K) float32. Of equal scores the first expert
    is chosen. The ids are always from 0 to E - 1, even if logits are NaN.
    """
    tokens, experts = logits.shape
    choice = torch.empty(tokens, per_token, dtype=torch.int64, device=logits.device)
    weight = torch.empty(tokens, per_token, dtype=torch.float32, device=logits.device)
    if not tokens:
        return choice, weight
    with torch.cuda.device_of(logits):
        _choose_experts_kernel[(tokens,)](
            logits.contiguous(),
            bias,
            choice,
            weight,
            experts,
            SCALE=scale,
            NORMALISE=normalise,
            PER_TOKEN=per_token,
            CHOICES=triton.next_power_of_2(per_token),
            EXPERTS=triton.next_power_of_2(experts),
            num_warps=1,
        )
    return choice, weight


@triton.jit
def _choose_experts_kernel(
    logits: tl.tensor,
    bias: tl.tensor,
    choice: tl.tensor,
    weight: tl.tensor,
    experts: int,
    SCALE: tl.constexpr,
    NORMALISE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    CHOICES: tl.constexpr,  # a power of two, at least PER_TOKEN
    EXPERTS: tl.constexpr,  # a power of two, at least `experts`
) -> None:
    """Choose the experts of one token: take the largest score + bias, PER_TOKEN times."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, EXPERTS)
    real = lane < experts
    score = 1.0 / (1.0 + tl.exp(-tl.load(logits + token * experts + lane, mask=real, other=0)))
    rank = score + tl.load(bias + lane, mask=real, other=0).to(tl.float64)
    rank = tl.where(rank != rank, float("inf"), rank)  # like topk, which treats NaN as the largest
    rank = tl.where(real, rank, float("-inf"))
    slot = tl.arange(0, CHOICES)
    chosen = tl.zeros((CHOICES,), tl.int32)
    kept = tl.zeros((CHOICES,), tl.float64)
    for k in tl.static_range(PER_TOKEN):
        at = tl.min(tl.where(rank == tl.max(rank, 0), lane, EXPERTS), 0)
        chosen = tl.where(slot == k, at, chosen)
        kept = tl.where(slot == k, tl.sum(tl.where(lane == at, score, 0.0), 0), kept)
        rank = tl.where(lane == at, float("-inf"), rank)
    if NORMALISE:
        kept = kept / (tl.sum(kept, 0) + 1e-20)
    place = token * PER_TOKEN + slot
    tl.store(choice + place, chosen.to(tl.int64), mask=slot < PER_TOKEN)
    tl.store(weight + place, (kept * SCALE).to(tl.float32), mask=slot < PER_TOKEN)
