"""Which masked positions a denoiser step commits: pure functions on whole batches of blocks, on any device.

Shapes: R rows, S positions of the longest block among them, M masked positions; a shorter block's tail is simply never
masked. Nothing here waits for the device.
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


def commit(
    place: Tensor, tokens: Tensor, confidence: Tensor, threshold: Tensor, steps_left: Tensor, width: int
) -> Tensor:
    """One step of all rows, as the host takes it: (2, R, S) int32, token ids and the bits of float32 confidences.

    place (M,) int64 into R * S: the masked positions; tokens (M,) int64 and confidence (M,) float32: what is predicted
    there. threshold, steps_left (R,). An id is -1 where nothing is committed, and in all of a row where a confidence is
    NaN: its logits were not finite. Confidences are those of all masked positions.
    """
    masked, ids, sure = _blocks(place, tokens, confidence, len(threshold), width)
    taken = positions_to_commit(masked, sure, threshold, steps_left) & ~sure.isnan().any(-1, keepdim=True)
    return torch.stack([ids.masked_fill_(~taken, -1), sure.view(torch.int32)])


def commit_in_order(place: Tensor, tokens: Tensor, confidence: Tensor, rows: int, width: int) -> Tensor:
    """`commit` of tokens that were predicted one behind the other: all up to the first NaN."""
    _, ids, sure = _blocks(place, tokens, confidence, rows, width)
    broken = sure.isnan().cumsum(-1) > 0
    return torch.stack([ids.masked_fill_(broken, -1), sure.view(torch.int32)])


def _blocks(place: Tensor, tokens: Tensor, confidence: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(R, S) each: what is masked, the ids predicted there or -1, their confidence or 0."""
    masked = torch.zeros(rows * width, dtype=torch.bool, device=place.device).index_fill_(0, place, True)
    ids = torch.full((rows * width,), -1, dtype=torch.int32, device=place.device)
    ids.index_copy_(0, place, tokens.int())
    sure = torch.zeros(rows * width, device=place.device).index_copy_(0, place, confidence)
    return masked.view(rows, width), ids.view(rows, width), sure.view(rows, width)
