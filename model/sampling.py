"""From logits to tokens: greedy or sampled, and the confidence of what was chosen. Pure functions.

A sampled token depends on the row's logits and on one uniform number, and that number on (seed, row key, block, step,
position) alone: whatever batch, replica or attempt the row is computed in, it draws the same.

At a vocabulary of 131,072 the logits of 4,096 positions would take 2 GiB and each copy as much again. So the head is
asked for slices of the vocabulary, of a fixed width, and only sums over a slice are kept. Their order, and with it a
row's bits, depends on the vocabulary alone, not on the other rows. On a GPU one kernel makes the sums of a slice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF

HEAD_WORKSPACE = 256 * 2**20  # bytes
VOCAB_SLICE = 8192  # columns; below 32,768, from which on torch splits the sum of a lone row among its threads
CUDA_SLICE = 16384  # one tile of 128 columns for nearly each of the 132 multiprocessors of an H100, also for few rows;
# 1,024 rows of it fill the workspace: narrower ones start more kernels, wider ones read the head more often
SLICE_BYTES = 16  # of workspace for a logit of a slice: float32, what it is made of, and a float64 weight
LIMITED_BYTES = 48  # for one that is also sorted: two float32, two float64, an order (int64), and room to sort

Head = Callable[[slice | Tensor, slice], Tensor]  # (positions, columns) -> logits, float32 or bfloat16


@dataclass(frozen=True, slots=True)
class Draws:
    """How each of M positions is sampled; temperature 0 means greedy."""

    temperature: Tensor  # (M,) float32
    top_k: Tensor  # (M,) int64, 0 for no limit
    top_p: Tensor  # (M,) float64, 1 for no limit
    key: Tensor  # (M, 2) int64, 32 bits each
    counter: Tensor  # (M, 3) int64: block, step, position


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10: counter (M, 4), key (M, 2), 32-bit words in int64 -> (M, 4).

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. int64 products wrap, which keeps all 64 bits.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        p0, p1 = c0 * _PHILOX_M[0], c2 * _PHILOX_M[1]
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = k0 + _PHILOX_W[0] & _LOW, k1 + _PHILOX_W[1] & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1)


def uniforms(counter: Tensor, key: Tensor) -> Tensor:
    """counter (M, 3): block, step, position; key (M, 2) -> (M,) float64 in [0, 1), 53 random bits."""
    words = philox(torch.nn.functional.pad(counter, (0, 1)), key)
    return ((words[:, 0] << 21) | (words[:, 1] >> 11)).double() / 2**53


def choose(
    head: Head,
    count: int,
    vocab: int,
    suppress: Tensor,
    mask_id: int,
    draws: Draws | None,
    workspace: int = HEAD_WORKSPACE,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens (M,) int64 of M = `count` positions and their confidence (M,) float32; (M, V) logits are never held.

    head(positions, columns) gives logits (len(positions), len(columns)), a tensor that may be overwritten; it is asked
    for `width` columns at a time (default: what suits the device), and more than once. suppress (M,) bool: where the
    mask id must not be chosen and takes no probability. draws: None for all greedy. workspace: the most bytes that the
    logits and what is made of them may take; only a single row may go beyond it.

    Confidence is the chosen token's probability at temperature 1, over the whole vocabulary. A logit of -inf is a
    probability of 0; a row with a logit of NaN or inf, or with none above -inf, gives an id and the confidence NaN.
    """
    width = width or (CUDA_SLICE if suppress.is_cuda else VOCAB_SLICE)
    columns = [slice(at, min(at + width, vocab)) for at in range(0, vocab, width)]
    logits = _Logits(head, suppress, mask_id, columns, workspace)
    parts = _survey(logits, count, None if draws is None else draws.temperature)
    top, part = parts.best.max(-1)
    tokens, chosen = _pick(parts.at, part), top.clone()
    if draws is not None:
        uniform = uniforms(draws.counter, draws.key)
        sampled, limits = draws.temperature > 0, (draws.top_k > 0) | (draws.top_p < 1)
        _draw_by_slice(logits, parts, (sampled & ~limits).nonzero()[:, 0], draws, uniform, tokens, chosen)
        _draw_within_limits(logits, (sampled & limits).nonzero()[:, 0], draws, uniform, tokens, chosen)
    total = (parts.total * (parts.best - top[:, None]).exp()).sum(-1)
    return tokens, ((chosen - top).exp() / total).clamp(max=1)


def choose_from(logits: Tensor, suppress: Tensor, mask_id: int, draws: Draws | None) -> tuple[Tensor, Tensor]:
    """`choose` from logits (M, V) float32 that exist already; they stay as they are."""
    count, vocab = logits.shape
    return choose(lambda rows, columns: logits[rows, columns].clone(), count, vocab, suppress, mask_id, draws)


@dataclass(frozen=True, slots=True)
class _Logits:
    """The head with the mask id suppressed, and how much of it is looked at at once."""

    head: Head
    suppress: Tensor  # (M,) bool
    mask_id: int
    columns: list[slice]  # S of them, the whole vocabulary
    workspace: int  # bytes

    def of(self, positions: slice | Tensor, columns: slice) -> Tensor:
        """(len(positions), len(columns)) float32, the caller's to overwrite."""
        return _suppressed(self.head(positions, columns).float(), columns.start, self.suppress[positions], self.mask_id)

    def rows_at_once(self, columns: slice, bytes_each: int) -> int:
        """How many rows of `columns` fit into the workspace, one at least."""
        return max(1, self.workspace // (len(range(columns.start, columns.stop)) * bytes_each))


@dataclass(frozen=True, slots=True)
class Parts:
    """What one pass over the vocabulary keeps of each of its S slices; (M, S) each, or (M,) of a single slice."""

    best: Tensor  # float32, the largest logit
    at: Tensor  # int64, the first id that has it
    total: Tensor  # float32, the sum of exp(logit - best)
    mass: Tensor | None  # float64, the sum of exp((logit - best) / temperature)

    def of(self, rows: slice, part: int) -> "Parts":
        """Views of some rows and one slice."""
        mass = None if self.mass is None else self.mass[rows, part]
        return Parts(self.best[rows, part], self.at[rows, part], self.total[rows, part], mass)


def _survey(logits: _Logits, count: int, temperature: Tensor | None) -> Parts:
    """One pass over all slices. temperature (M,): also the mass at it, which means nothing where it is 0."""
    device, columns = logits.suppress.device, logits.columns
    best, total = (torch.empty(count, len(columns), device=device) for _ in range(2))
    at = torch.empty(count, len(columns), dtype=torch.int64, device=device)
    mass = None if temperature is None else torch.empty(count, len(columns), dtype=torch.float64, device=device)
    parts = Parts(best, at, total, mass)
    step, survey = logits.rows_at_once(columns[0], SLICE_BYTES), _survey_on(device)
    for begin in range(0, count, step):
        rows = slice(begin, min(begin + step, count))
        suppress, heat = logits.suppress[rows], None if temperature is None else temperature[rows]
        for i, part in enumerate(columns):
            survey(logits.head(rows, part), part.start, suppress, logits.mask_id, heat, parts.of(rows, i))
    return parts


def survey_slice(
    logits: Tensor, first: int, suppress: Tensor, mask_id: int, temperature: Tensor | None, parts: Parts
) -> None:
    """logits (M, W) of the ids from `first` on, which it may overwrite -> `parts` of that slice, filled.

    suppress (M,) bool: where the mask id counts as -inf. A NaN is the largest logit. temperature (M,) float32 where the
    parts have a mass.
    """
    x = _suppressed(logits.float(), first, suppress, mask_id)
    torch.max(x, -1, out=(parts.best, parts.at))
    parts.at.add_(first)
    x -= _finite_base(parts.best)[:, None]
    if parts.mass is not None and temperature is not None:
        parts.total.copy_(x.exp().sum(-1))
        x /= temperature[:, None]
        parts.mass.copy_(x.exp_().sum(-1, dtype=torch.float64))
    else:
        parts.total.copy_(x.exp_().sum(-1))


def _survey_on(device: torch.device) -> Callable[[Tensor, int, Tensor, int, Tensor | None, Parts], None]:
    """`survey_slice`, on CUDA in one kernel that reads the logits once."""
    if device.type == "cuda":
        from model.kernels import triton_head

        return triton_head.survey_slice
    return survey_slice


def _suppressed(x: Tensor, first: int, suppress: Tensor, mask_id: int) -> Tensor:
    """x (M, W), the logits of the ids from `first` on, with the mask id's at -inf where it is suppressed; in place."""
    if first <= mask_id < first + x.shape[1]:
        x[:, mask_id - first].masked_fill_(suppress, -torch.inf)
    return x


def _draw_by_slice(
    logits: _Logits, parts: Parts, rows: Tensor, draws: Draws, uniform: Tensor, tokens: Tensor, chosen: Tensor
) -> None:
    """Sampled rows without limits: the slice from the masses, and the token from that slice, computed again.

    Together they invert the CDF of softmax(logits / temperature) in vocabulary order. rows (K,) of the M; writes their
    tokens (M,) and the logits of those, chosen (M,).
    """
    assert parts.mass is not None
    heat, best = draws.temperature[rows], parts.best[rows]
    # less the largest first: a tiny temperature then gives -inf for the others, not inf for all
    less = (best - best.amax(-1, keepdim=True)) / heat[:, None]
    mass = parts.mass[rows] * less.double().exp()  # (K, S)
    cdf = mass.cumsum(-1)
    part, target = _invert(cdf, uniform[rows])
    inside = (target - _pick(cdf - mass, part)) / _pick(mass, part)  # where in the slice, as a share of it
    base = _finite_base(_pick(best, part))
    step = logits.rows_at_once(logits.columns[0], SLICE_BYTES)
    by_part = part.argsort(stable=True).split(torch.bincount(part, minlength=len(logits.columns)).tolist())
    for columns, all_mine in zip(logits.columns, by_part, strict=True):
        for mine in all_mine.split(step) if len(all_mine) else ():
            x = logits.of(rows[mine], columns)
            weights = x.sub(base[mine, None]).div_(heat[mine, None]).exp_().double()
            token, _ = _invert(weights.cumsum_(-1), inside[mine])
            tokens[rows[mine]] = token + columns.start
            chosen[rows[mine]] = _pick(x, token)
            del x, weights


def _draw_within_limits(
    logits: _Logits, rows: Tensor, draws: Draws, uniform: Tensor, tokens: Tensor, chosen: Tensor
) -> None:
    """Sampled rows with top_k or top_p, as many at a time as their whole vocabulary leaves room for.

    Inverts the CDF, in vocabulary order, of softmax(logits / temperature) within the limits. rows (K,) of the M;
    writes their tokens (M,) and the logits of those, chosen (M,).
    """
    vocab = logits.columns[-1].stop
    for mine in rows.split(logits.rows_at_once(slice(0, vocab), LIMITED_BYTES)) if len(rows) else ():
        x = torch.empty(len(mine), vocab, device=rows.device)
        for columns in logits.columns:
            x[:, columns] = logits.of(mine, columns)
        weights = _limited(x, draws.temperature[mine], draws.top_k[mine], draws.top_p[mine])
        token, _ = _invert(weights.cumsum_(-1), uniform[mine])
        tokens[mine], chosen[mine] = token, _pick(x, token)
        del x, weights


def _limited(x: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Logits x (K, V) -> weights (K, V) float64, in proportion to the probabilities at `temperature` (K,).

    0 outside the k likeliest, and then outside the fewest that reach top_p of what is left.
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
    beyond[:, 0] = False  # the likeliest always stays
    weights.masked_fill_(beyond, 0)
    return before.scatter_(-1, order, weights)


def _invert(cdf: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """cdf (K, T) float64, share (K,) -> the first place (K,) whose cdf is above share of the last, and that.

    A place that adds nothing is never taken, not even where rounding leaves the share at 1 or a little below 0. A row
    that is NaN or all 0 gives any place.
    """
    last = cdf[:, -1]
    target = torch.minimum(share.clamp(min=0) * last, torch.nextafter(last, torch.zeros_like(last)))
    place = torch.searchsorted(cdf, target[:, None], right=True)[:, 0]
    return place.clamp(max=cdf.shape[1] - 1), target


def _finite_base(best: Tensor) -> Tensor:
    """best, or 0 where it is -inf: the differences to it are then -inf, not NaN."""
    return best.masked_fill(best == -torch.inf, 0)


def _pick(table: Tensor, place: Tensor) -> Tensor:
    """table (K, T), place (K,) -> (K,)."""
    return table.gather(-1, place[:, None])[:, 0]
