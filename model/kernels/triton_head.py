"""The head on a GPU: what is kept of a slice of the vocabulary, in one kernel that reads the logits as they are.

A second pass over the slice takes the sums, once the largest logit is known; it comes from the caches. So nothing is
rescaled on the way, and a row's sums are added up in an order that depends on the slice's width alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.sampling import Parts

BLOCK = 4096


def survey_slice(
    logits: Tensor, first: int, suppress: Tensor, mask_id: int, temperature: Tensor | None, parts: Parts
) -> None:
    """`model.sampling.survey_slice`; logits (M, W) may be bfloat16 and stay as they are.

    The tensors of `parts` may be columns of tables, but of equally many columns.
    """
    (count, width), mass = logits.shape, parts.mass
    heated = mass is not None and temperature is not None
    stride = parts.best.stride(0)
    assert logits.stride(1) == 1
    assert all(part.stride(0) == stride for part in (parts.at, parts.total, parts.mass) if part is not None)
    if not count:
        return
    with torch.cuda.device_of(logits):  # Triton launches on the current device, not on its arguments'
        _survey_kernel[(count,)](
            logits,
            suppress.view(torch.uint8),
            temperature if heated else logits,
            parts.best,
            parts.at,
            parts.total,
            mass if heated else parts.total,
            width,
            logits.stride(0),
            stride,
            first,
            mask_id - first,
            HEATED=heated,
            BLOCK=min(BLOCK, triton.next_power_of_2(width)),
            num_warps=8,
        )


@triton.jit(do_not_specialize=["first", "masked"])
def _survey_kernel(
    logits: tl.tensor,
    suppress: tl.tensor,
    temperature: tl.tensor,
    best: tl.tensor,
    at: tl.tensor,
    total: tl.tensor,
    mass: tl.tensor,
    width: int,
    logits_stride: int,
    stride: int,
    first: int,
    masked: int,
    HEATED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program a row. A NaN is the largest, as in torch.max; the first of equal logits is chosen."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    hidden = tl.where(tl.load(suppress + row) != 0, masked, -1)  # the column that is taken for -inf
    none = 2**31 - 1
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    where = lane
    broken = tl.full((BLOCK,), none, tl.int32)  # the first NaN
    for start in range(0, width, BLOCK):
        column = start + lane
        x = tl.load(logits + row * logits_stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
        x = tl.where(column == hidden, float("-inf"), x)
        where = tl.where(x > largest, column, where)
        largest = tl.where(x > largest, x, largest)
        broken = tl.minimum(broken, tl.where(x != x, column, none))
    top = tl.max(largest, 0)
    place = tl.min(tl.where(largest == top, where, none), 0)
    nan = tl.min(broken, 0)
    top = tl.where(nan < none, float("nan"), top)
    place = tl.where(nan < none, nan, place)
    tl.store(best + row * stride, top)
    tl.store(at + row * stride, place.to(tl.int64) + first)

    base = tl.where(top == float("-inf"), 0.0, top)
    added = tl.zeros((BLOCK,), tl.float32)
    heated = tl.zeros((BLOCK,), tl.float64)
    if HEATED:
        heat = tl.load(temperature + row)
    for start in range(0, width, BLOCK):
        column = start + lane
        x = tl.load(logits + row * logits_stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
        x = tl.where(column == hidden, float("-inf"), x) - base
        added += tl.exp(x)
        if HEATED:
            heated += tl.exp(tl.div_rn(x, tl.zeros((BLOCK,), tl.float32) + heat)).to(tl.float64)
    tl.store(total + row * stride, tl.sum(added, 0))
    if HEATED:
        tl.store(mass + row * stride, tl.sum(heated, 0))
