"""Which masked positions a denoiser step commits: pure functions on whole batches of blocks.

Shapes: R rows, S positions of the longest block among them; a shorter block's tail is simply never masked.
"""

import torch
from torch import Tensor


def commit_counts(masked: Tensor, above: Tensor, steps_left: Tensor) -> Tensor:
    """How many positions each row commits now; all arguments and the result (R,) int64.

    clamp(max(above or 1, ceil(masked / steps left)), at most masked), and all of them on the last step: the rule of the
    released inference code. `above` counts masked positions whose confidence exceeds the threshold.
    """
    on_schedule = (masked + steps_left - 1) // steps_left  # on the last step: all of them
    return torch.minimum(torch.maximum(above.clamp(min=1), on_schedule), masked)


def positions_to_commit(masked: Tensor, confidence: Tensor, threshold: Tensor, steps_left: Tensor) -> Tensor:
    """masked (R, S) bool, confidence (R, S) float32, threshold (R,), steps_left (R,) int64 -> (R, S) bool.

    The most confident masked positions are committed; among equal confidences the later position goes first, as in the
    released code, which sorts ascending and masks again from the front.
    """
    above = (masked & (confidence > threshold[:, None])).sum(-1)
    counts = commit_counts(masked.sum(-1), above, steps_left)
    ranked = confidence.masked_fill(~masked, -torch.inf).argsort(dim=-1, stable=True)
    rank = torch.empty_like(ranked)
    places = torch.arange(masked.shape[-1], device=masked.device).expand_as(ranked)
    rank.scatter_(-1, ranked, places)  # 0 = least confident
    return masked & (rank >= masked.shape[-1] - counts[:, None])
