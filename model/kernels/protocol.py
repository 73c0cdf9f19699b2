"""Defines the protocol of the kernels, which the plain torch kernels and the Triton kernels implement."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from model.kernels.logits import Choice, Draws, Logits
from model.runtime.ragged_batch import RaggedBatch

HEAD_WORKSPACE: Mapping[str, int] = {"cuda": 2**30, "cpu": 256 * 2**20}
"""Bytes that the logits of a forward and their temporaries may take, by type of device. A GPU keeps the logits in the
model's dtype: 1 GiB holds 4,096 positions of the released vocabulary in bfloat16, one block for each of 256 rows."""


class Kernels(Protocol):
    """The operations that a device must provide for the layers and for the choice of tokens.

    Shapes are those of model.runtime.ragged_batch. model.kernels.plain and model.kernels.formulas define the results.
    """

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x @ weight.T: x (N, in), weight (out, in) -> (N, out).

        On a CPU, in float32 and float64, the bits of a row's result do not depend on the other rows.
        """
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return the RMSNorm of x (N, H) with weight (H,) float32, in the shape and dtype of x.

        See `model.kernels.formulas.rms_norm`.
        """
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
        """Return norm(x * (1 + scale) + shift), or norm(x) * (1 + scale) + shift if norm_first.

        norm is `rms_norm` with weight and eps; shift and scale are those of each token's row. The result has the shape
        and dtype of x.
        """
        ...

    def gated_add(self, x: Tensor, mixed: Tensor, conditioning: Tensor, row_of_token: Tensor) -> Tensor:
        """Return x + gate * mixed in the shape and dtype of x; the gate is conditioning[:, 2] of each token's row."""
        ...

    def gated_norm(self, y: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
        """Return norm(y * silu(gate)), normalised over each group of channels: (N, inner) in the gate's dtype.

        See `model.kernels.formulas.gated_group_norm`.
        """
        ...

    def mamba_scan(self, inputs: "ScanInputs") -> Tensor:
        """Return the scan's output y for all tokens of a Mamba layer: (N, heads * head_dim) float32.

        A causal convolution with SiLU gives x, B and C; dt becomes softplus(dt + dt_bias), within dt_limit. Then
        s <- exp(dt A) s + dt x (outer) B and y = s C + D x (Mamba-2, arXiv 2405.21060). See ScanInputs for the states.
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
        """Return the attention of each row's tokens over [its context | its tokens]: (N, query heads * head_dim).

        If causal, a token sees its row's context and its row's tokens up to itself; otherwise it sees the context and
        all of its row's tokens. If store, the k and v of the rows are appended to their pages; otherwise the pages stay
        as they are.
        """
        ...

    def choose_experts(
        self, logits: Tensor, bias: Tensor, per_token: int, scale: float, *, normalise: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the K = per_token experts with the highest sigmoid(logits) + bias, best first, and their weights.

        logits (N, E) float64, bias (E,) -> choice (N, K) int64, weight (N, K) float32. A weight is sigmoid(logits),
        without the bias. If normalise, a token's weights are divided by their sum. All are multiplied by `scale`.
        """
        ...

    def experts(self, x: Tensor, choice: Tensor, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Return for each token the weighted sum of its chosen experts, each of which is down(relu(up(x))^2).

        x (N, H), choice (N, K) int64, weight (N, K) float32, up (E, F, H), down (E, H, F) -> (N, H).
        """
        ...

    def squared_relu(self, x: Tensor) -> Tensor:
        """Return relu(x)^2 in the shape and dtype of x. x may be overwritten."""
        ...

    @property
    def head_workspace(self) -> int: ...  # bytes, the value for `Logits.workspace`
    @property
    def vocab_slice(self) -> int: ...  # columns, the value for `Logits.width`

    def uniforms(self, counter: Tensor, key: Tensor) -> Tensor:
        """Return one random number in [0, 1) for each counter and key: (M,) float64 with 53 random bits.

        counter (M, 3): block, step, position; key (M, 2). Both are int64, and only the low 32 bits of each number are
        used. The result is the same on every device.
        """
        ...

    def choose_tokens(self, logits: Logits, draws: Draws | None, uniform: Tensor | None) -> Choice:
        """Return for each position its most likely token or, if it is sampled, the token drawn with `uniform` (M,).

        If draws is None, all positions are greedy. `uniform` is None only then. Of equal logits the first counts as the
        most likely. A token is drawn by inverting, in vocabulary order, the CDF of softmax(logits / temperature),
        limited to the top_k most likely ids and then to the fewest of those that reach top_p. An id with probability 0
        is never drawn. A NaN counts as the largest logit. A position with a logit of NaN or +inf, or with none above
        -inf, gets some id of the vocabulary, and a probability of NaN.
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
    def groups(self) -> int: ...  # groups of heads; the heads of a group share B and C
    @property
    def dt_limit(self) -> tuple[float, float]: ...  # least and largest dt, after softplus


@dataclass(frozen=True, slots=True)
class ScanInputs:
    """The inputs of `Kernels.mamba_scan` for one Mamba layer.

    Each row starts from both states in its slot of `rows.seeds`, or from zeros if that is -1. If store, the states
    after each row's last token are written to the slots `rows.slots`; otherwise no state is changed. In xbc and dt the
    channels of a token must be contiguous; there may be other data between one token and the next.
    """

    xbc: Tensor  # (N, conv_dim) raw conv inputs
    dt: Tensor  # (N, heads) before bias and softplus
    weights: ScanWeights
    conv_states: Tensor  # (slots, conv_dim, conv_kernel), the last conv inputs, newest last
    ssm_states: Tensor  # (slots, heads, head_dim, state) float32
    rows: RaggedBatch
    store: bool
