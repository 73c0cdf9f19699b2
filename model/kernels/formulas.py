"""Computes activations and norms in plain torch; an element gets the same bits wherever it is in a tensor.

torch's own silu, softplus and sigmoid use a different formula for the last few elements of a CPU tensor (observed with
torch 2.13), so a row's result would depend on the number of rows. exp and log1p do not have this problem.
"""

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)), in the dtype of x."""
    return 1 / (1 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    """Return x * sigmoid(x) in the dtype of x, computed in float64 if x is float64, and otherwise in float32."""
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * sigmoid(wide)).to(x.dtype)


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), in the dtype of x; a large x does not overflow."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x * rsqrt(mean(x^2) + eps) * weight, with the mean over the last dimension (RMSNorm, arXiv 1910.07467).

    x (…, H), weight (H,) -> the shape and dtype of x. Computed in float32.
    """
    x32 = x.float()
    x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
    return (x32 * weight.float()).to(x.dtype)


def gated_group_norm(y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Return norm(y * silu(gate)): the gate first, then RMSNorm over each of `groups` contiguous groups of channels.

    y, gate (N, inner), weight (inner,) -> (N, inner) in the gate's dtype. Computed in float32. `inner` must be a
    multiple of `groups`.
    """
    gated: Tensor = (y.float() * silu(gate.float())).unflatten(-1, (groups, -1))
    normed: Tensor = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + eps)
    return (normed.flatten(-2) * weight.float()).to(gate.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x * (1 + scale) + shift, element by element: the effect of the time on a layer's input."""
    return x * (1 + scale) + shift
