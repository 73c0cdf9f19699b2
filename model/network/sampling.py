"""Chooses tokens from logits, greedily or by sampling, and computes the confidence of each; pure functions only.

A sampled token depends on the row's logits and on one uniform random number. That number depends only on the seed, the
row key, the block, the step and the position. So a row gets the same tokens in any batch, on any replica and in any
attempt.

With a vocabulary of 131,072 the logits of 4,096 positions take 1 GiB in bfloat16, and each copy in float32 takes 2 GiB.
So a GPU holds the logits once, in the model's dtype, and the kernels read them there. A CPU holds only slices of the
vocabulary. No function here waits for the device.
"""

from torch import Tensor

from model.kernels.logits import Draws, Logits
from model.kernels.protocol import Kernels


def choose(kernels: Kernels, logits: Logits, draws: Draws | None) -> tuple[Tensor, Tensor]:
    """Return the chosen token of each of M positions (M,) int64, and its confidence (M,) float32.

    If `draws` is None, all positions are greedy.

    The confidence is the chosen token's probability at temperature 1, over the whole vocabulary. A logit of -inf means
    a probability of 0. If a position has a logit of NaN or inf, or none above -inf, it gets some id and the confidence
    NaN.
    """
    uniform = None if draws is None else kernels.uniforms(draws.counter, draws.key)
    choice = kernels.choose_tokens(logits, draws, uniform)
    return choice.tokens, ((choice.logit - choice.top).exp() / choice.total).clamp(max=1)
