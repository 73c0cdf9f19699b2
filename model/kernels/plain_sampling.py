"""Chooses tokens from logits in plain torch (greedy, sampled, sampled within limits) and generates uniform numbers.

The logits are computed in slices of the vocabulary of a fixed width, and only sums over each slice are kept. The order
of summation, and so the bits of a position's result, depends on the vocabulary size alone, not on the other positions.
"""

import torch
from torch import Tensor

from model.kernels.logits import Choice, Draws, Logits, Parts

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF

SLICE_BYTES = 16  # workspace per logit of a slice: the head's output, a float32 copy, and a float64 weight
LIMITED_BYTES = 48  # workspace per logit that is also sorted: two float32, two float64, an int64 order, sort buffers


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Compute Philox4x32-10: counter (M, 4), key (M, 2), 32-bit words in int64 -> (M, 4).

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. int64 products wrap around, so that all 64
    bits of a product are kept.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        p0, p1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = k0 + _PHILOX_W[0] & _LOW, k1 + _PHILOX_W[1] & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1)


def uniforms(counter: Tensor, key: Tensor) -> Tensor:
    """Implement `model.kernels.protocol.Kernels.uniforms`."""
    words = philox(torch.nn.functional.pad(counter, (0, 1)), key)
    return ((words[:, 0] << 21) | (words[:, 1] >> 11)).double() / 2**53


def choose_tokens(logits: Logits, draws: Draws | None, uniform: Tensor | None) -> Choice:
    """Implement `model.kernels.protocol.Kernels.choose_tokens` without ever holding all (M, V) logits."""
    parts = _survey(logits, draws.temperature if draws is not None and len(draws.free) else None)
    top, part = parts.best.max(-1)
    tokens, chosen = _pick(parts.at, part), top.clone()
    if draws is not None and uniform is not None:
        if len(draws.free):
            _draw_by_slice(logits, parts, draws, uniform, tokens, chosen)
        for mine in draws.limited.split(logits.rows_at_once(logits.vocab, LIMITED_BYTES)):
            if len(mine):
                _draw_within_limits(logits, mine, draws, uniform, tokens, chosen)
    return Choice(tokens, chosen, top, (parts.total * (parts.best - top[:, None]).exp()).sum(-1))


def _survey(logits: Logits, temperature: Tensor | None) -> Parts:
    """Return the `Parts` (M, S) of all slices, from one pass over the vocabulary.

    If temperature (M,) is given, they include the mass at that temperature. The mass of a position with temperature 0
    is meaningless.
    """
    columns, count = logits.columns, logits.count
    parts = Parts.empty(count, len(columns), logits.device, mass=temperature is not None)
    step = logits.rows_at_once(len(range(columns[0].start, columns[0].stop)), SLICE_BYTES)
    for begin in range(0, count, step):
        rows = slice(begin, min(begin + step, count))
        heat = None if temperature is None else temperature[rows]
        for i, part in enumerate(columns):
            survey_slice(_logits_of(logits, rows, part), part.start, heat, parts.of(rows, i))
    return parts


def survey_slice(x: Tensor, first: int, temperature: Tensor | None, parts: Parts) -> None:
    """Fill `parts` of one slice from x (M, W) float32, the logits of the ids from `first` on. Overwrites x.

    A NaN counts as the largest logit. temperature (M,) float32 is needed if the parts have a mass.
    """
    torch.max(x, -1, out=(parts.best, parts.at))
    parts.at.add_(first)
    x -= _finite_base(parts.best)[:, None]
    if parts.mass is not None and temperature is not None:
        parts.total.copy_(x.exp().sum(-1))
        x /= temperature[:, None]
        parts.mass.copy_(x.exp_().sum(-1, dtype=torch.float64))
    else:
        parts.total.copy_(x.exp_().sum(-1))


def _logits_of(logits: Logits, positions: slice | Tensor, columns: slice) -> Tensor:
    """Return float32 logits (len(positions), len(columns)), which the caller may overwrite.

    A suppressed mask id has -inf.
    """
    x = logits.head(positions, columns).float()
    if columns.start <= logits.mask_id < columns.stop:
        x[:, logits.mask_id - columns.start].masked_fill_(logits.suppress[positions], -torch.inf)
    return x


def _draw_by_slice(logits: Logits, parts: Parts, draws: Draws, uniform: Tensor, tokens: Tensor, chosen: Tensor) -> None:
    """Draw the tokens of the positions `draws.free`: first a slice of the vocabulary by its mass, then a token in it.

    The two steps together invert the CDF of softmax(logits / temperature) in vocabulary order. The logits of the drawn
    slice are computed a second time. Writes into tokens (M,) and, with the logits of these tokens, into chosen (M,).
    """
    assert parts.mass is not None
    rows, columns = draws.free, logits.columns
    heat, best = draws.temperature[rows], parts.best[rows]
    # subtract the largest before dividing: a tiny temperature then gives -inf for the others, not inf for all
    less = (best - best.amax(-1, keepdim=True)) / heat[:, None]
    mass = parts.mass[rows] * less.double().exp()  # (K, S)
    cdf = mass.cumsum(-1)
    part, target = invert(cdf, uniform[rows])
    inside = (target - _pick(cdf - mass, part)) / _pick(mass, part)  # target as a share of the slice
    base = _finite_base(_pick(best, part))
    step = logits.rows_at_once(len(range(columns[0].start, columns[0].stop)), SLICE_BYTES)
    by_part = part.argsort(stable=True).split(torch.bincount(part, minlength=len(columns)).tolist())
    for some, all_mine in zip(columns, by_part, strict=True):
        for mine in all_mine.split(step) if len(all_mine) else ():
            x = _logits_of(logits, rows[mine], some)
            weights = x.sub(base[mine, None]).div_(heat[mine, None]).exp_().double()
            token, _ = invert(weights.cumsum_(-1), inside[mine])
            tokens[rows[mine]] = token + some.start
            chosen[rows[mine]] = _pick(x, token)
            del x, weights


def _draw_within_limits(
    logits: Logits, rows: Tensor, draws: Draws, uniform: Tensor, tokens: Tensor, chosen: Tensor
) -> None:
    """Draw the tokens of the positions `rows` (L,), which have top_k or top_p.

    The caller passes only as many positions as the workspace has room for (LIMITED_BYTES). Inverts, in vocabulary
    order, the CDF of softmax(logits / temperature) within the limits. Writes into tokens (M,) and, with the logits of
    these tokens, into chosen (M,).
    """
    x = torch.empty(len(rows), logits.vocab, device=rows.device)
    for columns in logits.columns:
        x[:, columns] = _logits_of(logits, rows, columns)
    weights = _limited(x, draws.temperature[rows], draws.top_k[rows], draws.top_p[rows])
    token, _ = invert(weights.cumsum_(-1), uniform[rows])
    tokens[rows], chosen[rows] = token, _pick(x, token)


def _limited(x: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Return weights (K, V) float64 for logits x (K, V), in proportion to the probabilities at `temperature` (K,).

    A weight is 0 outside the top_k most likely ids, and outside the fewest of these that reach top_p of their sum.
    """
    ordered, order = x.sort(dim=-1, descending=True, stable=True)
    ordered -= ordered[:, :1].clone()
    weights = ordered.div_(temperature[:, None]).exp_().double()
    del ordered
    place = torch.arange(x.shape[1], device=x.device)
    weights.masked_fill_((top_k[:, None] > 0) & (place >= top_k[:, None]), 0)
    before = weights.cumsum(-1)
    enough = top_p[:, None] * before[:, -1:]
    beyond = before.sub_(weights) >= enough
    beyond[:, 0] = False  # the most likely id always stays
    weights.masked_fill_(beyond, 0)
    return before.scatter_(-1, order, weights)


def invert(cdf: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first column (K,) whose cdf is above the target, and the target (K,): `share` of the cdf's last value.

    cdf (K, T) float64, share (K,). A column that adds nothing to the cdf is never chosen, even if rounding has made
    the share 1 or slightly negative. A row that is NaN or all 0 gives an arbitrary column.
    """
    last = cdf[:, -1]
    target = torch.minimum(share.clamp(min=0) * last, torch.nextafter(last, torch.zeros_like(last)))
    place = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]
    return place.clamp(max=cdf.shape[1] - 1), target


def _finite_base(best: Tensor) -> Tensor:
    """Return the largest logits with -inf replaced by 0, so that -inf minus it is -inf and not NaN."""
    return best.masked_fill(best == -torch.inf, 0)


def _pick(table: Tensor, place: Tensor) -> Tensor:
    """Return one element of each row: table (K, T), place (K,) -> (K,)."""
    return table.gather(-1, place[:, None])[:, 0]
