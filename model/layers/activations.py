"""Activations that give an element the same bits wherever it lies in a tensor.

torch's own silu, softplus and sigmoid compute the last few elements of a CPU tensor by another formula than the rest
(measured with torch 2.13), so that a row's result would depend on how many rows there are. exp and log1p do not.
"""

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), computed in float32 at least."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * sigmoid(wide)).to(x.dtype)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), without overflow."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
