"""From logits to tokens: greedy or sampled, and the confidence of what was chosen. Pure functions.

A sampled token depends on the row's logits and on one uniform number, and that number on (seed, row key, block, step,
position) alone: whatever batch, replica or attempt the row is computed in, it draws the same.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_PHILOX_M = (0xD2511F53, 0xCD9E8D57)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


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


def choose(logits: Tensor, suppress: Tensor, mask_id: int, draws: Draws | None) -> tuple[Tensor, Tensor]:
    """logits (M, V) float32, suppress (M,) bool -> tokens (M,) int64 and their confidence (M,) float32.

    suppress: where the mask id must not be chosen and takes no probability. Confidence is the chosen token's
    probability at temperature 1, over the whole vocabulary. draws: None for all greedy. A row of logits that is not
    finite gives a confidence that is NaN.
    """
    logits = logits.clone()
    logits[:, mask_id] = logits[:, mask_id].masked_fill(suppress, -torch.inf)
    tokens = logits.argmax(-1)
    if draws is not None:
        sampled = draws.temperature > 0
        tokens[sampled] = _sample(logits[sampled], Draws(*(getattr(draws, f)[sampled] for f in Draws.__slots__)))
    total = logits.logsumexp(-1)
    confidence = (logits.gather(-1, tokens[:, None])[:, 0] - total).exp()
    return tokens, confidence.masked_fill(~total.isfinite(), torch.nan)


def _sample(logits: Tensor, draws: Draws) -> Tensor:
    """Inverts the CDF, in vocabulary order, of softmax(logits / temperature) within top_k and top_p."""
    # less the largest first: a tiny temperature then gives -inf for the others, not inf for all
    probs = ((logits - logits.amax(-1, keepdim=True)) / draws.temperature[:, None]).softmax(-1).double()
    limited = (draws.top_k > 0) | (draws.top_p < 1)
    if bool(limited.any()):
        probs[limited] = _limit(probs[limited], draws.top_k[limited], draws.top_p[limited])
    cdf = probs.cumsum(-1)
    target = uniforms(draws.counter, draws.key)[:, None] * cdf[:, -1:]
    # a NaN row compares false everywhere: token 0, whose confidence is NaN too
    return (cdf <= target).sum(-1).clamp(max=logits.shape[-1] - 1)


def _limit(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Zeroes what lies outside the k likeliest, and then outside the fewest that reach top_p of what is left."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(probs.shape[-1], device=probs.device)
    keep = (top_k[:, None] == 0) | (place < top_k[:, None])
    ordered = ordered * keep
    before = ordered.cumsum(-1) - ordered
    keep &= before < top_p[:, None] * ordered.sum(-1, keepdim=True)
    keep |= place == 0  # the likeliest always stays
    return torch.zeros_like(probs).scatter(-1, order, ordered * keep)
