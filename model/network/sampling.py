"""Chooses tokens from logits, greedily or by sampling, and computes the confidence of each; pure functions only.

A sampled token depends on the row's logits and on one uniform random number. That number depends only on the seed, the
row key, the block, the step and the position. So a row gets the same tokens in any batch, on any replica and in any
attempt.

With a vocabulary of 131,072 the logits of 4,096 positions take 1 GiB in bfloat16, and each copy in float32 takes 2 GiB.
So a GPU holds the logits once, in the model's dtype, and the kernels read them there. A CPU holds only slices of the
vocabulary. No function here waits for the device.
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
    """The logits of some positions, computed on demand, and the kernels that choose tokens from them."""

    logits: Callable[[slice | Tensor, slice], Tensor]
    """Maps (positions, columns) to contiguous logits (len(positions), len(columns)) that may be overwritten."""
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
    """Return the chosen tokens (M,) int64 of M = `count` positions, and their confidence (M,) float32.

    suppress (M,) bool: True for positions at which the mask id must not be chosen and gets no probability. draws: None
    if all positions are greedy. workspace: the most bytes that the logits and the tensors made from them may take; only
    a single position may exceed it. width: the columns of a slice of the vocabulary, a power of two on CUDA. The
    kernels set the defaults of both.

    The confidence is the chosen token's probability at temperature 1, over the whole vocabulary. A logit of -inf means
    a probability of 0. If a position has a logit of NaN or inf, or none above -inf, it gets some id and the confidence
    NaN.
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
    """Run `choose` on existing logits (M, V) float32, which stay unchanged."""
    head = Head(lambda rows, columns: logits[rows, columns].clone(), logits.dtype, kernels_for(logits.device))
    count, vocab = logits.shape
    return choose(head, count, vocab, suppress, mask_id, draws)
