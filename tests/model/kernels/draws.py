"""Makes draws whose groups follow from their settings, as the engine does, and chooses tokens from existing logits."""

import dataclasses

import torch
from torch import Tensor

from model.kernels import kernels_for
from model.kernels.logits import Draws, Logits
from model.kernels.protocol import Kernels
from model.network.sampling import choose

MASK = 3


def grouped(draws: Draws) -> Draws:
    """Return the draws with `free` and `limited` computed from the settings."""
    sampled, limits = draws.temperature > 0, (draws.top_k > 0) | (draws.top_p < 1)
    free, limited = ((sampled & which).nonzero()[:, 0] for which in (~limits, limits))
    return dataclasses.replace(draws, free=free, limited=limited)


def make_draws(
    temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, key: torch.Tensor, counter: torch.Tensor
) -> Draws:
    """Return draws made from these settings."""
    nothing = torch.empty(0, dtype=torch.int64)
    return grouped(Draws(temperature, top_k, top_p.double(), key, counter, nothing, nothing))


def logits_of(x: Tensor, suppress: Tensor, workspace: int, width: int) -> Logits:
    """Return logits x (M, V), which stay unchanged, as kernels take them."""
    count, vocab = x.shape
    return Logits(lambda p, c: x[p, c].clone(), count, vocab, suppress, MASK, x.dtype, workspace, width)


def choose_from(
    x: Tensor,
    suppress: Tensor,
    draws: Draws | None,
    kernels: Kernels | None = None,
    *,
    workspace: int | None = None,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose tokens from logits x (M, V), which stay unchanged."""
    kernels = kernels or kernels_for(x.device)
    logits = logits_of(x, suppress, workspace or kernels.head_workspace, width or kernels.vocab_slice)
    return choose(kernels, logits, draws)
