"""Provides the Muon optimizer for matrices; AdamW trains all other weights.

Muon (K. Jordan et al., 2024) replaces the momentum of a matrix by the nearest orthogonal matrix, found by five
Newton-Schulz steps, so that an update is equally large in every direction.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_STEPS, _COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return nearly orthogonal matrices with the same singular vectors: (…, rows, columns) -> the same shape, float32.

    Computed in bfloat16, by Newton-Schulz steps.
    """
    a, b, c = _COEFFICIENTS
    wide = matrix.bfloat16() / (matrix.norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    flip = matrix.shape[-2] > matrix.shape[-1]
    wide = wide.mT if flip else wide
    for _ in range(_STEPS):
        square = wide @ wide.mT
        wide = a * wide + (b * square + c * square @ square) @ wide
    orthogonal: Tensor = wide.mT if flip else wide
    return orthogonal.float()


class Muon(torch.optim.Optimizer):
    """The Muon optimizer. Each parameter is a matrix, or a stack of matrices along the first dimension."""

    def __init__(self, parameters: Sequence[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update once, with Nesterov momentum, all parameters that have a gradient. `closure` is ignored."""
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(momentum, group["momentum"]))
                scale = max(1.0, parameter.shape[-2] / parameter.shape[-1]) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * scale)
