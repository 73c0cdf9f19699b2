"""Computes activations and norms in plain torch; an element gets the same bits wherever it is in a tensor.

torch's own silu, softplus and sigmoid use a different formula for the last few elements of a CPU tensor (observed with
torch 2.13), so a row's result would depend on the number of rows. exp and log1p do not have this problem.
"""

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x))."""
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    """Return x * sigmoid(x), computed at least in float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * sigmoid(wide)).to(x.dtype)


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), without overflow."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x * rsqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 (arXiv 1910.07467)."""
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * weight.float()).to(x.dtype)


def gated_group_norm(y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Return norm(y * silu(gate)): the gate first, then RMSNorm over each of `groups` contiguous groups of channels.

    y, gate (N, inner), weight (inner,) -> (N, inner) in the gate's dtype.
    """
    gated: Tensor = (y.float() * silu(gate.float())).unflatten(-1, (groups, -1))
    normed: Tensor = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.float()).to(gate.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift."""
    return x * (1 + scale) + shift
