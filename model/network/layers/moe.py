"""Defines the mixture of experts: a sigmoid router, squared-ReLU experts without a gate matrix, one shared expert."""

import torch
from torch import Tensor, nn

from model.checkpoint.config import TwoTowerConfig
from model.kernels.protocol import Kernels
from model.network.layers.linear import Linear
from model.runtime.ragged_batch import RaggedBatch


class NoState:
    """The empty state of an MoE layer, which keeps nothing of the context. So all layers are called alike."""


class Router(nn.Module):
    """A router that chooses experts by sigmoid score + correction bias, and weights them by the scores alone.

    This is the router of DeepSeek-V3. It computes in float64, as the reference does, because the scores of two experts
    can be so close that float32 chooses the other one. The weight is stored in float64 (2.6 MiB for each layer of the
    released model), so no forward has to convert it. To compute in float32 and check close scores again would gain
    nothing: by the datasheet, the tensor cores of an H100 multiply float64 as fast as its other cores multiply float32
    (67 TFLOP/s), and 6,144 tokens through 23 layers are only 97 GFLOP.
    """

    def __init__(self, config: TwoTowerConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size, dtype=torch.float64))
        self.e_score_correction_bias = nn.Parameter(torch.empty(config.n_routed_experts, dtype=torch.float32))
        self.per_token = config.num_experts_per_tok
        self.scale = config.routed_scaling_factor
        self.normalise = config.norm_topk_prob

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the experts of each token of x (N, H), best first: (N, K) int64, and their weights (N, K) float32."""
        logits = self.kernels.linear(x.double(), self.weight)  # (N, E)
        bias = self.e_score_correction_bias
        return self.kernels.choose_experts(logits, bias, self.per_token, self.scale, normalise=self.normalise)


class SharedExpert(nn.Module):
    """The expert that every token uses: down(relu(up(x))^2)."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.up_proj = Linear(hidden, width, dtype, kernels)
        self.down_proj = Linear(width, hidden, dtype, kernels)
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.kernels.squared_relu(self.up_proj(x)))
        return out


class MoE(nn.Module):
    """A mixture of experts: the weighted sum of the chosen experts, plus the shared expert."""

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate = Router(config, kernels)
        self.up = nn.Parameter(torch.empty(experts, width, hidden, dtype=dtype))  # all experts in one tensor
        self.down = nn.Parameter(torch.empty(experts, hidden, width, dtype=dtype))
        self.shared_experts = SharedExpert(hidden, config.moe_shared_expert_intermediate_size, dtype, kernels)
        self.kernels = kernels

    def forward(self, x: Tensor, state: NoState, rows: RaggedBatch, *, causal: bool) -> Tensor:  # noqa: ARG002
        """Return the mixer's output (N, H) for x (N, H). Each token is computed alone, so only x is used."""
        choice, weight = self.gate(x)
        out: Tensor = self.kernels.experts(x, choice, weight, self.up, self.down) + self.shared_experts(x)
        return out
