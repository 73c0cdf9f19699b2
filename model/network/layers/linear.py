"""Defines a linear map without bias that runs on the chosen kernels."""

import torch
from torch import Tensor, nn

from model.kernels.protocol import Kernels


class Linear(nn.Module):
    """A linear map without bias, x (N, in) -> (N, out), with weight (out, in) as in the checkpoint."""

    def __init__(self, size_in: int, size_out: int, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in, dtype=dtype))
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.weight)
