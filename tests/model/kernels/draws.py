"""Makes draws whose groups follow from their settings, as the engine does."""

import dataclasses

import torch

from model.network.sampling import Draws


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
