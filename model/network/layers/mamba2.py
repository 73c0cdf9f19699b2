"""Defines the Mamba-2 mixer (arXiv 2405.21060) of the released model."""

import torch
from torch import Tensor, nn

from model.checkpoint.config import TwoTowerConfig
from model.kernels.protocol import Kernels, ScanInputs
from model.network.layers.linear import Linear
from model.network.layers.norm import RMSNorm
from model.runtime.ragged_batch import RaggedBatch


class MambaState:
    """The state of the context at one Mamba layer, for all slots: the last conv inputs and the float32 SSM state."""

    def __init__(self, config: TwoTowerConfig, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.conv = torch.zeros(slots, config.conv_dim, config.conv_kernel, dtype=dtype, device=device)
        self.ssm = torch.zeros(
            slots, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size, device=device
        )

    def add_slots(self, count: int) -> None:
        """Add `count` slots of zeros after the existing ones. The states move to new, larger tensors."""
        self.conv = torch.cat([self.conv, self.conv.new_zeros(count, *self.conv.shape[1:])])
        self.ssm = torch.cat([self.ssm, self.ssm.new_zeros(count, *self.ssm.shape[1:])])


class Mamba2(nn.Module):
    """The Mamba-2 mixer. in_proj gives z | x B C | dt; x, B and C pass through a causal convolution and the scan.

    The result passes through a grouped norm that z gates, and then through out_proj. The properties are those that
    model.kernels.protocol.ScanWeights asks for.
    """

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        heads = config.mamba_num_heads
        self.in_proj = Linear(config.hidden_size, config.in_proj_size, dtype, kernels)
        self.conv1d = nn.Conv1d(
            config.conv_dim, config.conv_dim, config.conv_kernel, groups=config.conv_dim, dtype=dtype
        )
        # kept in float32 whatever the model's dtype: they are small, and sensitive to rounding
        self.dt_bias = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(heads, dtype=torch.float32))
        self.norm = RMSNorm(config.mamba_inner, config.layer_norm_epsilon, kernels)
        self.out_proj = Linear(config.mamba_inner, config.hidden_size, dtype, kernels)
        self.kernels = kernels
        self.split = [config.mamba_inner, config.conv_dim, heads]
        self.groups = config.n_groups
        self.dt_limit = config.time_step_limit

    @property
    def conv_weight(self) -> Tensor:
        return self.conv1d.weight[:, 0]

    @property
    def conv_bias(self) -> Tensor:
        assert self.conv1d.bias is not None
        return self.conv1d.bias

    @property
    def decay(self) -> Tensor:
        return -self.A_log.exp()

    def forward(self, x: Tensor, state: MambaState, rows: RaggedBatch, *, causal: bool) -> Tensor:
        """Return the mixer's output (N, H) for x (N, H). Each row starts from its state in `state`.

        If causal (the context tower), the state after each row's last token is written back; otherwise `state` stays as
        it is. The scan runs forward in both towers, so a token never depends on later ones.
        """
        z, xbc, dt = self.in_proj(x).split(self.split, dim=-1)
        y = self.kernels.mamba_scan(ScanInputs(xbc, dt, self, state.conv, state.ssm, rows, store=causal))
        out: Tensor = self.out_proj(self.kernels.gated_norm(y, z, self.norm.weight, self.groups, self.norm.eps))
        return out
