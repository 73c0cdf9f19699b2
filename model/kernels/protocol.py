"""What a device must be able to do: the protocol behind which plain torch and Triton stand."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from model.kernels.logits import Choice, Draws, Logits
from model.runtime.ragged_batch import RaggedBatch

HEAD_WORKSPACE: Mapping[str, int] = {"cuda": 2**30, "cpu": 256 * 2**20}
"""Bytes that the logits of a forward, and what is made of them, may take. On a GPU they are held as they are: 4,096
positions of the released vocabulary in bfloat16, 256 rows with a whole block each."""


class Kernels(Protocol):
    """What a device must be able to do. Shapes as in model.runtime.ragged_batch; see `model.kernels.plain` for the
    formulas."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (N, in), weight (out, in) -> (N, out). A row's result does not depend on the other rows."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x (N, H), weight (H,) float32 -> as x; see model.network.layers.norm."""
        ...

    def modulated_norm(
        self,
        x: Tensor,  # (N, H)
        weight: Tensor,
        eps: float,
        conditioning: Tensor,  # (R, 3, H): shift, scale, gate
        row_of_token: Tensor,  # (N,) int64
        *,
        norm_first: bool,
    ) -> Tensor:
        """norm(x * (1 + scale) + shift), or where norm_first norm(x) * (1 + scale) + shift -> as x."""
        ...

    def gated_add(self, x: Tensor, mixed: Tensor, conditioning: Tensor, row_of_token: Tensor) -> Tensor:
        """x + gate * mixed, as x."""
        ...

    def gated_norm(self, y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        """norm(y * silu(gate)) over each group of channels -> (N, inner) as gate; see model.network.layers.norm."""
        ...

    def mamba_scan(
        self,
        xbc: Tensor,  # (N, conv_dim) raw conv inputs
        dt: Tensor,  # (N, heads) before bias and softplus
        weights: "ScanWeights",
        conv_states: Tensor,  # (slots, conv_dim, conv_kernel)
        ssm_states: Tensor,  # (slots, heads, head_dim, state) float32
        rows: RaggedBatch,
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
        rows: RaggedBatch,
        *,
        causal: bool,
        store: bool,
    ) -> Tensor:
        """Attention of each row's tokens over [its context | its tokens] -> (N, query heads * head_dim).

        causal: a token sees its row's context and its row's tokens up to itself; otherwise all of its row's tokens.
        store: the rows' k and v are appended to their pages.
        """
        ...

    def choose_experts(
        self, logits: Tensor, bias: Tensor, per_token: int, scale: float, *, normalise: bool
    ) -> tuple[Tensor, Tensor]:
        """The experts with the highest sigmoid(logits) + bias, best first, and their weights without the bias.

        logits (N, E) float64, bias (E,) -> choice (N, K) int64, weight (N, K) float32: times `scale`, and where
        normalise over their sum.
        """
        ...

    def experts(self, x: Tensor, choice: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Sum of each token's chosen experts, down(relu(up(x))^2), by weight.

        x (N, H), choice (N, K) int64, weight (N, K) float32, up (E, F, H), down (E, H, F) -> (N, H).
        """
        ...

    def squared_relu(self, x: Tensor) -> Tensor:
        """relu(x)^2, as x, which may be overwritten."""
        ...

    @property
    def head_workspace(self) -> int: ...  # bytes, for `Logits.workspace`
    @property
    def vocab_slice(self) -> int: ...  # columns, for `Logits.width`

    def uniforms(self, counter: Tensor, key: Tensor) -> Tensor:
        """counter (M, 3): block, step, position; key (M, 2) -> (M,) float64 in [0, 1), 53 random bits.

        int64, of which the low 32 bits count: the same numbers on every device.
        """
        ...

    def choose_tokens(self, logits: Logits, draws: Draws | None, uniform: Tensor | None) -> Choice:
        """The likeliest token of each position, or the one that `uniform` (M,) draws; draws None: all greedy.

        Of equal logits the first is the likeliest. A drawn token inverts, in vocabulary order, the CDF of
        softmax(logits / temperature) within the k likeliest, and then within the fewest of those that reach top_p; an
        id without probability is never drawn. A NaN is the largest logit; a row that has one, inf, or nothing above
        -inf gets an id, and a probability of NaN.
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
