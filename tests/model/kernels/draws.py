"""Draws whose groups are what their settings say, as the engine makes them."""

import dataclasses

import torch

from model.network.sampling import Draws


def grouped(draws: Draws) -> Draws:
    """The same with `free` and `limited` read off the settings."""
    sampled, limits = draws.temperature > 0, (draws.top_k > 0) | (draws.top_p < 1)
    free, limited = ((sampled & which).nonzero()[:, 0] for which in (~limits, limits))
    return dataclasses.replace(draws, free=free, limited=limited)


def make_draws(
    temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, key: torch.Tensor, counter: torch.Tensor
) -> Draws:
    """Draws from their settings alone."""
    nothing = torch.empty(0, dtype=torch.int64)
    return grouped(Draws(temperature, top_k, top_p.double(), key, counter, nothing, nothing))
