"""Chooses tokens from logits on a GPU; the logits are stored once, in the model's dtype, and are read in place.

A row is one of the positions. One program per row and slice of the vocabulary computes the sums of that slice, which is
one tile of registers. Then one program per row combines the slices and, if the row is sampled, draws the slice and the
token inside it. Rows with top_k or top_p are not sorted: bisection over all values of a float finds the lowest logit
that is kept. In bfloat16 this takes 16 reads of the row, which come from the caches. Nothing waits for the device, and
the order in which a row's sums are added depends on the vocabulary size alone.

Legend: M rows (positions), C of them at a time, V ids of the vocabulary, S slices of BLOCK ids each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.logits import Choice, Draws, Logits, Parts

SLICE = 4096
"""Columns per program: 16 logits per thread, and 32 programs for a single row of the released vocabulary."""
LIMITS_BLOCK = 2048
"""Columns read at once for top_k and top_p: 16 bytes per thread in bfloat16. Twice as many would use all registers."""
WARPS = 8
UNIFORM_ROWS = 128

# Arguments that change from step to step, or that are parts of one tensor copied to the device and so have no fixed
# alignment. Triton must not compile a variant of a kernel for each of their values and alignments.
VARYING = ["begin", "mask_id", "count"]
UNALIGNED = ["suppress", "temperature", "uniform", "top_k", "top_p", "counter", "key"]
UNALIGNED += ["best", "at", "total", "mass", "tokens", "logit", "tops", "totals"]


def choose_tokens(logits: Logits, draws: Draws | None, uniform: Tensor | None) -> Choice:
    """Implement `model.kernels.protocol.Kernels.choose_tokens`, with as many rows at once as fit into the workspace."""
    count, vocab, device = logits.count, logits.vocab, logits.device
    choice = Choice(torch.empty(count, dtype=torch.int64, device=device), *torch.empty(3, count, device=device))
    step = logits.rows_at_once(vocab, logits.dtype.itemsize)
    with torch.cuda.device_of(choice.tokens):  # Triton launches on the current device, not on that of its arguments
        for begin in range(0, count, step):
            x = logits.head(slice(begin, min(begin + step, count)), slice(0, vocab))
            assert x.is_contiguous()
            parts = survey(x, begin, logits, draws.temperature if draws is not None and len(draws.free) else None)
            _choose(x, begin, logits, parts, draws, uniform, choice)
            if draws is not None and uniform is not None and len(draws.limited):
                _draw_within_limits(x, begin, logits, draws, uniform, choice)
            del x
    return choice


def survey(x: Tensor, begin: int, logits: Logits, temperature: Tensor | None) -> Parts:
    """Return the `Parts` (C, S) of x (C, V), the logits of C rows from row `begin` of the M on.

    If temperature (M,) is given, they include the mass at that temperature. The mass of a row with temperature 0 is
    meaningless.
    """
    block = _block(logits)
    parts = Parts.empty(len(x), triton.cdiv(logits.vocab, block), x.device, mass=temperature is not None)
    _survey_kernel[parts.best.shape](
        x,
        logits.suppress.view(torch.uint8),
        parts.best if temperature is None else temperature,
        parts.best,
        parts.at,
        parts.total,
        parts.total if parts.mass is None else parts.mass,
        begin,
        logits.mask_id,
        VOCAB=logits.vocab,
        HEATED=temperature is not None,
        BLOCK=block,
        num_warps=WARPS,
    )
    return parts


def _choose(
    x: Tensor, begin: int, logits: Logits, parts: Parts, draws: Draws | None, uniform: Tensor | None, choice: Choice
) -> None:
    """Fill `choice` for the rows of x (C, V), which are the rows from `begin` on of the M.

    A row gets a drawn token, without regard to top_k and top_p, if `parts` have a mass and its temperature is above 0;
    otherwise it gets its most likely token.
    """
    unused = parts.best
    _choose_kernel[(len(x),)](
        x,
        logits.suppress.view(torch.uint8),
        unused if draws is None else draws.temperature,
        unused if uniform is None else uniform,
        parts.best,
        parts.at,
        parts.total,
        unused if parts.mass is None else parts.mass,
        *choice,
        begin,
        logits.mask_id,
        VOCAB=logits.vocab,
        SLICES=parts.best.shape[1],
        ALL_SLICES=triton.next_power_of_2(parts.best.shape[1]),
        HEATED=parts.mass is not None,
        BLOCK=_block(logits),
        num_warps=WARPS,
    )


def _draw_within_limits(x: Tensor, begin: int, logits: Logits, draws: Draws, uniform: Tensor, choice: Choice) -> None:
    """Overwrite, in those rows from `begin` on that have top_k or top_p, the tokens and logits in `choice`."""
    _limits_kernel[(len(x),)](
        x,
        logits.suppress.view(torch.uint8),
        draws.temperature,
        draws.top_k,
        draws.top_p,
        uniform,
        choice.top,
        choice.tokens,
        choice.logit,
        begin,
        logits.mask_id,
        VOCAB=logits.vocab,
        BLOCK=min(LIMITS_BLOCK, _block(logits)),
        num_warps=WARPS,
    )


def _block(logits: Logits) -> int:
    return min(logits.width, int(triton.next_power_of_2(logits.vocab)))


def uniforms(counter: Tensor, key: Tensor) -> Tensor:
    """Implement `model.kernels.protocol.Kernels.uniforms`."""
    out = torch.empty(len(key), dtype=torch.float64, device=key.device)
    if len(out):
        with torch.cuda.device_of(out):
            grid = (triton.cdiv(len(out), UNIFORM_ROWS),)
            _uniforms_kernel[grid](counter.contiguous(), key.contiguous(), out, len(out), BLOCK=UNIFORM_ROWS)
    return out


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _uniforms_kernel(counter: tl.tensor, key: tl.tensor, out: tl.tensor, count: int, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    real = row < count
    block = tl.load(counter + row * 3, mask=real, other=0).to(tl.uint32)
    step = tl.load(counter + row * 3 + 1, mask=real, other=0).to(tl.uint32)
    position = tl.load(counter + row * 3 + 2, mask=real, other=0).to(tl.uint32)
    low, high = tl.load(key + row * 2, mask=real, other=0), tl.load(key + row * 2 + 1, mask=real, other=0)
    seed = (high << 32) | (low & 0xFFFFFFFF)
    first, second, _, _ = tl.philox(seed, block, step, position, tl.zeros_like(position))
    bits = (first.to(tl.int64) << 21) | (second.to(tl.int64) >> 11)
    tl.store(out + row, bits.to(tl.float64) * 2.0**-53, mask=real)


@triton.jit
def _tile(x: tl.tensor, column: tl.tensor, hidden: tl.tensor, VOCAB: tl.constexpr) -> tl.tensor:
    """Load the logits of one row at `column` as float32: -inf after the vocabulary and at the id `hidden`.

    `hidden` is the mask id if it is suppressed in this row, and otherwise -1.
    """
    value = tl.load(x + column, mask=column < VOCAB, other=float("-inf")).to(tl.float32)
    return tl.where(column == hidden, float("-inf"), value)


@triton.jit
def _weight(x: tl.tensor, base: tl.tensor, heat: tl.tensor) -> tl.tensor:
    """Return exp((x - base) / heat), rounded as in the plain kernels. A tiny temperature `heat` gives 0 or 1."""
    return tl.exp(tl.div_rn(x - base, tl.zeros_like(x) + heat)).to(tl.float64)


@triton.jit
def _first_above(cdf: tl.tensor, weight: tl.tensor, target: tl.tensor, place: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return the first place with a weight above 0 whose cdf is above the target, and the last place with one.

    They are 2**31 - 1 and -1 if there is no such place. So rounding of the cdf cannot choose a place with weight 0.
    """
    first = tl.min(tl.where((cdf > target) & (weight > 0), place, 2**31 - 1), 0)
    return first, tl.max(tl.where(weight > 0, place, -1), 0)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _survey_kernel(
    logits: tl.tensor,
    suppress: tl.tensor,
    temperature: tl.tensor,
    best: tl.tensor,
    at: tl.tensor,
    total: tl.tensor,
    mass: tl.tensor,
    begin: int,
    mask_id: int,
    VOCAB: tl.constexpr,
    HEATED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Fill the `Parts` of one row and slice. NaN is the largest, as in torch.max; of equal logits the first counts."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    out = row * tl.num_programs(1) + tl.program_id(1)
    hidden = tl.where(tl.load(suppress + begin + row) != 0, mask_id, -1)
    x = _tile(logits + row * VOCAB, column, hidden, VOCAB)
    top = tl.max(tl.where(x == x, x, float("-inf")), 0)
    place = tl.min(tl.where(x == top, column, 2**31 - 1), 0)
    broken = tl.min(tl.where(x != x, column, 2**31 - 1), 0)
    top = tl.where(broken < 2**31 - 1, float("nan"), top)
    tl.store(best + out, top)
    tl.store(at + out, tl.where(broken < 2**31 - 1, broken, place).to(tl.int64))
    base = tl.where(top == float("-inf"), 0.0, top)
    tl.store(total + out, tl.sum(tl.exp(x - base), 0))
    if HEATED:
        tl.store(mass + out, tl.sum(_weight(x, base, tl.load(temperature + begin + row)), 0))


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _choose_kernel(
    logits: tl.tensor,
    suppress: tl.tensor,
    temperature: tl.tensor,
    uniform: tl.tensor,
    best: tl.tensor,
    at: tl.tensor,
    total: tl.tensor,
    mass: tl.tensor,
    tokens: tl.tensor,
    logit: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    begin: int,
    mask_id: int,
    VOCAB: tl.constexpr,
    SLICES: tl.constexpr,
    ALL_SLICES: tl.constexpr,
    HEATED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Choose the token of one row: the most likely one, or a drawn one if HEATED and the temperature is above 0.

    It is drawn in two steps, both with `_first_above`: first a slice, then a token in it.
    """
    row = tl.program_id(0).to(tl.int64)
    out = begin + row
    part = tl.arange(0, ALL_SLICES)
    real = part < SLICES
    top_of = tl.load(best + row * SLICES + part, mask=real, other=float("-inf"))
    top = tl.max(tl.where(top_of == top_of, top_of, float("-inf")), 0)
    first = tl.min(tl.where(real & (top_of == top), part, ALL_SLICES), 0)
    broken = tl.min(tl.where(top_of != top_of, part, ALL_SLICES), 0)
    top = tl.where(broken < ALL_SLICES, float("nan"), top)
    token = tl.load(at + row * SLICES + tl.where(broken < ALL_SLICES, broken, first))
    chosen = top
    total_of = tl.load(total + row * SLICES + part, mask=real, other=0.0)
    tl.store(totals + out, tl.sum(tl.where(real, total_of * tl.exp(top_of - top), 0.0), 0))
    tl.store(tops + out, top)
    if HEATED:
        heat = tl.load(temperature + out)
        if heat > 0:
            # subtract the largest before dividing: a tiny temperature then gives -inf for the others, not inf for all
            mass_of = tl.load(mass + row * SLICES + part, mask=real, other=0.0)
            mass_of *= tl.exp(tl.div_rn(top_of - top, tl.zeros_like(top_of) + heat).to(tl.float64))
            cdf = tl.cumsum(mass_of, 0)
            target = tl.load(uniform + out) * tl.max(cdf, 0)
            drawn, last = _first_above(cdf, mass_of, target, part)
            drawn = tl.maximum(tl.minimum(drawn, last), 0)
            mine = part == drawn
            share = tl.sum(tl.where(mine, mass_of, 0.0), 0)
            inside = (target - tl.sum(tl.where(mine, cdf, 0.0), 0) + share) / share  # target as a share of the slice
            base = tl.max(tl.where(mine, top_of, float("-inf")), 0)

            column = drawn * BLOCK + tl.arange(0, BLOCK)
            hidden = tl.where(tl.load(suppress + out) != 0, mask_id, -1)
            x = _tile(logits + row * VOCAB, column, hidden, VOCAB)
            weight = _weight(x, base, heat)
            cdf = tl.cumsum(weight, 0)
            found, last = _first_above(cdf, weight, inside * tl.max(cdf, 0), column)
            found = tl.minimum(found, tl.where(last < 0, drawn * BLOCK, last))
            chosen = tl.max(tl.where(column == found, x, float("-inf")), 0)
            token = found.to(tl.int64)
    tl.store(tokens + out, token)
    tl.store(logit + out, chosen)


@triton.jit
def _order(x: tl.tensor, HALF: tl.constexpr) -> tl.tensor:
    """Return int32 keys that have the same order as the float32 values, so that the keys can be bisected.

    If HALF, the values must be exact in bfloat16, and the keys are from -32768 to 32767.
    """
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)  # -0 counts as 0
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return key >> 16 if HALF else key


@triton.jit
def _kept(
    x: tl.tensor,
    hidden: tl.tensor,
    base: tl.tensor,
    heat: tl.tensor,
    least: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return number and weight of the ids whose key (see `_order`) is above `least`, then of the ids with this key."""
    above, heavy = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    equal, tied = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, VOCAB, BLOCK):
        value = _tile(x, start + tl.arange(0, BLOCK), hidden, VOCAB)
        key, weight = _order(value, HALF), _weight(value, base, heat)
        above += tl.where(key > least, 1.0, 0.0)
        heavy += tl.where(key > least, weight, 0.0)
        equal += tl.where(key == least, 1.0, 0.0)
        tied += tl.where(key == least, weight, 0.0)
    return tl.sum(above, 0), tl.sum(heavy, 0), tl.sum(equal, 0), tl.sum(tied, 0)


@triton.jit
def _down_to(
    x: tl.tensor,
    hidden: tl.tensor,
    base: tl.tensor,
    heat: tl.tensor,
    need: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    HALF: tl.constexpr,
    WEIGHED: tl.constexpr,
) -> tl.tensor:
    """Return the highest key from `low` to `high` for which enough ids have this key or a higher one (see `_order`).

    They are enough if their number, or if WEIGHED their total weight, is at least `need`. `low` is returned even if
    too few ids have it.
    """
    while low < high:
        middle = (low | high) - ((low ^ high) >> 1)  # the upper of two middles, without overflow
        found = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, VOCAB, BLOCK):
            value = _tile(x, start + tl.arange(0, BLOCK), hidden, VOCAB)
            inside = _order(value, HALF) >= middle
            found += tl.where(inside, _weight(value, base, heat) if WEIGHED else 1.0, 0.0)
        enough = tl.sum(found, 0) >= need
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    return low


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _limits_kernel(
    logits: tl.tensor,
    suppress: tl.tensor,
    temperature: tl.tensor,
    top_k: tl.tensor,
    top_p: tl.tensor,
    uniform: tl.tensor,
    tops: tl.tensor,
    tokens: tl.tensor,
    logit: tl.tensor,
    begin: int,
    mask_id: int,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Draw the token of one row within its limits; a row without limits is left alone.

    If not all ids with the lowest kept logit can be kept, the first of them are.
    """
    HALF: tl.constexpr = logits.dtype.element_ty == tl.bfloat16
    row = tl.program_id(0).to(tl.int64)
    out = begin + row
    heat, count, share = tl.load(temperature + out), tl.load(top_k + out), tl.load(top_p + out)
    if (heat > 0) & ((count > 0) | (share < 1)):
        x = logits + row * VOCAB
        base = tl.load(tops + out)
        hidden = tl.where(tl.load(suppress + out) != 0, mask_id, -1)
        low = tl.full((), -(2**15) if HALF else -(2**31), tl.int32)
        least, high = low, _order(base, HALF)
        if count > 0:
            least = _down_to(x, hidden, base, heat, count.to(tl.float64), low, high, VOCAB, BLOCK, HALF, False)
        above, heavy, equal, tied = _kept(x, hidden, base, heat, least, VOCAB, BLOCK, HALF)
        room = tl.where(count > 0, tl.minimum(count - above, equal), equal)  # number of equal ids that stay
        each = tied / tl.maximum(equal, 1.0)
        if share < 1:
            need = share * (heavy + room * each)
            deep = least
            least = _down_to(x, hidden, base, heat, need, deep, high, VOCAB, BLOCK, HALF, True)
            above, heavy, equal, tied = _kept(x, hidden, base, heat, least, VOCAB, BLOCK, HALF)
            each = tied / tl.maximum(equal, 1.0)
            room = tl.where(least == deep, room, equal)
            room = tl.minimum(room, tl.maximum(tl.ceil((need - heavy) / each), 1.0))

        target = tl.load(uniform + out) * (heavy + room * each)
        none: tl.constexpr = 2**31 - 1
        token, last = tl.full((), none, tl.int32), tl.full((), 0, tl.int32)
        seen, ties = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
        for start in range(0, VOCAB, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = _tile(x, column, hidden, VOCAB)
            key = _order(value, HALF)
            tie = tl.where(key == least, 1.0, 0.0).to(tl.float64)
            stays = (key > least) | ((key == least) & (ties + tl.cumsum(tie, 0) <= room))
            weight = tl.where(stays, _weight(value, base, heat), 0.0)
            found, possible = _first_above(seen + tl.cumsum(weight, 0), weight, target, column)
            token, last = tl.minimum(token, found), tl.maximum(last, possible)
            seen += tl.sum(weight, 0)
            ties += tl.sum(tie, 0)
        token = tl.minimum(token, last)
        tl.store(tokens + out, token.to(tl.int64))
        value = tl.load(x + token).to(tl.float32)
        tl.store(logit + out, tl.where(token == hidden, float("-inf"), value))
