"""Defines the RMSNorm layer."""

import torch
from torch import Tensor, nn

from model.kernels.protocol import Kernels


class RMSNorm(nn.Module):
    """An RMSNorm over the last dimension, whose weight is kept in float32 whatever the model's dtype."""

    def __init__(self, size: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.eps = eps
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised x (N, size), in the same shape and dtype."""
        return self.kernels.rms_norm(x, self.weight, self.eps)
