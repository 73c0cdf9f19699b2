"""Defines grouped-query attention without positional encoding, over a paged context."""

import torch
from torch import Tensor, nn

from model.checkpoint.config import TwoTowerConfig
from model.kernels.protocol import Kernels
from model.network.layers.linear import Linear
from model.runtime.ragged_batch import RaggedBatch


class AttentionState:
    """The keys and values of the context at one attention layer, for all rows, in pages that rows take and give back.

    `pages` is (2, pages, page_size, kv heads, head_dim): first the keys, then the values.
    """

    def __init__(
        self, config: TwoTowerConfig, pages: int, page_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.pages = torch.zeros(
            2, pages, page_size, config.num_key_value_heads, config.head_dim, dtype=dtype, device=device
        )


class Attention(nn.Module):
    """Grouped-query attention: query head q uses key and value head q // (query heads / kv heads).

    The scale is 1 / sqrt(head_dim).
    """

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        hidden, head_dim = config.hidden_size, config.head_dim
        query, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
        self.q_proj = Linear(hidden, query, dtype, kernels)
        self.k_proj = Linear(hidden, kv, dtype, kernels)
        self.v_proj = Linear(hidden, kv, dtype, kernels)
        self.o_proj = Linear(query, hidden, dtype, kernels)
        self.head_dim = head_dim
        self.kernels = kernels

    def forward(self, x: Tensor, state: AttentionState, rows: RaggedBatch, *, causal: bool) -> Tensor:
        """Return the mixer's output (N, H) for x (N, H). Every token sees the context of its row, which is in `state`.

        If causal, a token also sees its row's tokens up to itself, and is stored in `state`. Otherwise it sees all
        tokens of its row, and nothing is stored.
        """
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        attended = self.kernels.attend(q, k, v, state.pages, rows, causal=causal, store=causal)
        out: Tensor = self.o_proj(attended)
        return out
