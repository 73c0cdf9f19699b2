"""Decides which predicted tokens a forward commits: pure functions on whole batches of blocks, on any device.

Shapes: R rows, S positions of the longest block among them, M predicted positions. The positions beyond the end of a
shorter block are never masked. Nothing here waits for the device.
"""

import torch
from torch import Tensor


def commit_counts(masked: Tensor, above: Tensor, steps_left: Tensor) -> Tensor:
    """Return how many positions each row commits in this step; all arguments and the result are (R,) int64.

    masked: the number of masked positions. above: the number of those whose confidence exceeds the threshold.
    steps_left: this step included. The result is min(masked, max(1, above, ceil(masked / steps_left))), so the last
    step commits all of them. This is the rule of the released inference code.
    """
    on_schedule = (masked + steps_left - 1) // steps_left  # on the last step: all of them
    return torch.minimum(torch.maximum(above.clamp(min=1), on_schedule), masked)


def positions_to_commit(masked: Tensor, confidence: Tensor, threshold: Tensor, steps_left: Tensor) -> Tensor:
    """Return which positions are committed in this step, (R, S) bool.

    masked: (R, S) bool. confidence: (R, S) float32. threshold: (R,). steps_left: (R,) int64. The most confident masked
    positions are committed, as many as commit_counts returns. Among equal confidences the later position goes first, as
    in the released code, which sorts in ascending order and masks again from the front.
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
    """Return what one denoiser step commits in all rows, in one tensor that can be copied to the host at once.

    The result is (2, R, S) int32: token ids, and the bits of float32 confidences. An id is -1 if nothing is committed
    there. All ids of a row are -1 if one of its confidences is NaN, because its logits were not finite. Confidences are
    given for all masked positions and are 0 elsewhere.

    width: S. place: (M,) int64, the masked positions as indices into R * S. tokens: (M,) int64 and confidence: (M,)
    float32, the predictions there. threshold, steps_left: (R,).
    """
    masked, ids, sure = _blocks(place, tokens, confidence, len(threshold), width)
    taken = positions_to_commit(masked, sure, threshold, steps_left) & ~sure.isnan().any(-1, keepdim=True)
    return torch.stack([ids.masked_fill_(~taken, -1), sure.view(torch.int32)])


def commit_in_order(place: Tensor, tokens: Tensor, confidence: Tensor, rows: int, width: int) -> Tensor:
    """Return a result like that of `commit` for the tokens of AR mode, which were predicted one after the other.

    No threshold applies: in each row, all tokens before the first one whose confidence is NaN are committed. rows: R.
    width: S. The other arguments are those of `commit`.
    """
    _, ids, sure = _blocks(place, tokens, confidence, rows, width)
    broken = sure.isnan().cumsum(-1) > 0
    return torch.stack([ids.masked_fill_(broken, -1), sure.view(torch.int32)])


def _blocks(place: Tensor, tokens: Tensor, confidence: Tensor, rows: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return three (R, S) tensors: which positions are predicted (`place`), their ids or -1, their confidences or 0."""
    masked = torch.zeros(rows * width, dtype=torch.bool, device=place.device).index_fill_(0, place, True)
    ids = torch.full((rows * width,), -1, dtype=torch.int32, device=place.device)
    ids.index_copy_(0, place, tokens.int())
    sure = torch.zeros(rows * width, device=place.device).index_copy_(0, place, confidence)
    return masked.view(rows, width), ids.view(rows, width), sure.view(rows, width)
