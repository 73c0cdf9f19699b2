"""The seam behind which the heavy operations stand: one protocol, implementations chosen once at start."""

from typing import Protocol

import torch
from torch import Tensor

from model.rows import Rows


class Kernels(Protocol):
    """What a device must be able to do. Shapes as in model.rows; see `model.kernels.plain` for the formulas."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (N, in), weight (out, in) -> (N, out). A row's result does not depend on the other rows."""
        ...

    def mamba_scan(
        self,
        xbc: Tensor,  # (N, conv_dim) raw conv inputs
        dt: Tensor,  # (N, heads) before bias and softplus
        weights: "ScanWeights",
        conv_states: Tensor,  # (slots, conv_dim, conv_kernel)
        ssm_states: Tensor,  # (slots, heads, head_dim, state) float32
        rows: Rows,
        *,
        store: bool,
    ) -> Tensor:
        """Causal conv + SiLU + selective scan -> (N, heads * head_dim) float32.

        Seeded from slots `rows.seeds` (-1: zeros, whatever stands anywhere). store: slots `rows.slots` take the states
        after each row's last token; otherwise all stay as they were.
        """
        ...

    def attend(
        self,
        q: Tensor,  # (N, query heads, head_dim)
        k: Tensor,  # (N, kv heads, head_dim)
        v: Tensor,
        pages: Tensor,  # (2, pages, page_size, kv heads, head_dim): keys and values of the context
        rows: Rows,
        *,
        causal: bool,
        store: bool,
    ) -> Tensor:
        """Attention of each row's tokens over [its context | its tokens] -> (N, query heads * head_dim).

        causal: a token sees its row's context and its row's tokens up to itself; otherwise all of its row's tokens.
        store: the rows' k and v are appended to their pages.
        """
        ...

    def experts(self, x: Tensor, choice: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Sum of each token's chosen experts, down(relu(up(x))^2), by weight.

        x (N, H), choice (N, K) int64, weight (N, K) float32, up (E, F, H), down (E, H, F) -> (N, H).
        """
        ...


class ScanWeights(Protocol):
    """The parameters of a Mamba-2 mixer that the scan needs."""

    @property
    def conv_weight(self) -> Tensor: ...  # (conv_dim, conv_kernel)
    @property
    def conv_bias(self) -> Tensor: ...  # (conv_dim,)
    @property
    def decay(self) -> Tensor: ...  # (heads,) float32, A = -exp(A_log)

    @property
    def dt_bias(self) -> Tensor: ...  # (heads,) float32
    @property
    def D(self) -> Tensor: ...  # noqa: N802 (the paper's name)  (heads,) float32
    @property
    def groups(self) -> int: ...
    @property
    def dt_limit(self) -> tuple[float, float]: ...


def kernels_for(device: torch.device) -> Kernels:  # noqa: ARG001 (the seam: one implementation so far)
    """The kernels that run on `device`: the plain torch ones run on every device."""
    from model.kernels.plain import PlainKernels

    return PlainKernels()
