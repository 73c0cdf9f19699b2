"""From logits to tokens: greedy or sampled, and the confidence of what was chosen. Pure functions.

A sampled token depends on the row's logits and on one uniform number, and that number on (seed, row key, block, step,
position) alone: whatever batch, replica or attempt the row is computed in, it draws the same.

At a vocabulary of 131,072 the logits of 4,096 positions take 1 GiB in bfloat16, and each copy in float32 2 GiB. On a
GPU they are held once, as they are, and kernels read them; elsewhere only slices of the vocabulary are. Nothing here
waits for the device.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.kernels import kernels_for
from model.kernels.logits import Draws, Logits
from model.kernels.protocol import Kernels

__all__ = ["Draws", "Head", "choose", "choose_from"]


@dataclass(frozen=True, slots=True)
class Head:
    """The logits of some positions, computed on demand, and the kernels that choose tokens by them."""

    logits: Callable[[slice | Tensor, slice], Tensor]
    """(positions, columns) -> logits (len(positions), len(columns)), contiguous, that may be overwritten."""
    dtype: torch.dtype
    kernels: Kernels


def choose(
    head: Head,
    count: int,
    vocab: int,
    suppress: Tensor,
    mask_id: int,
    draws: Draws | None,
    workspace: int | None = None,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Tokens (M,) int64 of M = `count` positions and their confidence (M,) float32.

    suppress (M,) bool: where the mask id must not be chosen and takes no probability. draws: None for all greedy.
    workspace: the most bytes that the logits and what is made of them may take; only a single row may go beyond it.
    width: columns of a slice, a power of two on CUDA. Both are by default what suits the kernels.

    Confidence is the chosen token's probability at temperature 1, over the whole vocabulary. A logit of -inf is a
    probability of 0; a row with a logit of NaN or inf, or with none above -inf, gives an id and the confidence NaN.
    """
    kernels = head.kernels
    logits = Logits(
        head.logits,
        count,
        vocab,
        suppress,
        mask_id,
        head.dtype,
        workspace or kernels.head_workspace,
        width or kernels.vocab_slice,
    )
    uniform = None if draws is None else kernels.uniforms(draws.counter, draws.key)
    choice = kernels.choose_tokens(logits, draws, uniform)
    return choice.tokens, ((choice.logit - choice.top).exp() / choice.total).clamp(max=1)


def choose_from(logits: Tensor, suppress: Tensor, mask_id: int, draws: Draws | None) -> tuple[Tensor, Tensor]:
    """`choose` from logits (M, V) float32 that exist already; they stay as they are."""
    head = Head(lambda rows, columns: logits[rows, columns].clone(), logits.dtype, kernels_for(logits.device))
    count, vocab = logits.shape
    return choose(head, count, vocab, suppress, mask_id, draws)
