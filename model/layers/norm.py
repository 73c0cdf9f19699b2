"""RMSNorm, plain and gated."""

import torch
from torch import Tensor, nn

from model.kernels import Kernels
from model.layers.activations import silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x * rsqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 (arXiv 1910.07467)."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * weight.float()).to(x.dtype)


def gated_group_norm(y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """norm(y * silu(gate)): gate first, then RMSNorm over each of `groups` contiguous groups of channels.

    y, gate (N, inner), weight (inner,) -> (N, inner) in the gate's dtype.
    """
    gated: Tensor = (y.float() * silu(gate.float())).unflatten(-1, (groups, -1))
    normed: Tensor = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.float()).to(gate.dtype)


class RMSNorm(nn.Module):
    """RMSNorm with its weight kept in float32."""

    def __init__(self, size: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.float32))
        self.eps = eps
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """x (N, size) -> the same shape and dtype."""
        return self.kernels.rms_norm(x, self.weight, self.eps)
