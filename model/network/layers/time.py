"""Defines the denoiser's time conditioning, which maps t to shift, scale and gate (adaLN-single, arXiv 2310.00426).

The time t of a row is the masked fraction of its block.
"""

import math

import torch
from torch import Tensor, nn

from model.checkpoint.config import TIME_EMBEDDING_SIZE, TwoTowerConfig
from model.kernels.formulas import silu
from model.kernels.protocol import Kernels


class BiasedLinear(nn.Module):
    """A linear map with bias, x (R, in) -> (R, out)."""

    def __init__(self, size_in: int, size_out: int, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(size_out, dtype=dtype))
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.weight) + self.bias


def sinusoids(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the embedding (R, 256) of t (R,) in [0, 1] float32: cosines, then sines, of t * 1000 * 10000^(-i / 128).

    t is rounded to the model's dtype before the multiplication, as in the reference. The angles go up to 1000 rad and
    are computed in float32.
    """
    half = TIME_EMBEDDING_SIZE // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000.0) / half))
    angles = (t.to(dtype) * 1000).float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


class TimeConditioning(nn.Module):
    """The t_embedder and t_block of the checkpoint, which all layers share. Conditioning adds the layer's table."""

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.embed_in = BiasedLinear(TIME_EMBEDDING_SIZE, hidden, dtype, kernels)
        self.embed_out = BiasedLinear(hidden, hidden, dtype, kernels)
        self.block = BiasedLinear(hidden, 3 * hidden, dtype, kernels)
        self.dtype = dtype

    def forward(self, t: Tensor) -> Tensor:
        """Return shift, scale and gate (R, 3, H) for t (R,), before a layer's table is added."""
        embedded = self.embed_out(silu(self.embed_in(sinusoids(t, self.dtype))))
        out: Tensor = self.block(silu(embedded)).unflatten(-1, (3, -1))
        return out


class Conditioning:
    """The shift, scale and gate of each row at the layers of a stage, computed when a layer asks for them.

    All layers at once would take 320 MB for 384 rows of the released model.
    """

    def __init__(self, shared: Tensor, plain: Tensor, tables: Tensor, which: Tensor | None = None) -> None:
        """Keep what the layers' values are computed from.

        shared (U, 3, H): the result of TimeConditioning for U times. plain (U,) bool: True for each time that must have
        no effect: shift 0, scale 0 and gate 1 at all layers. tables (layers, 3, H): one for each layer of the stage.
        which (R,): the index of each row's time; None if row r has time r.
        """
        plain = plain[:, None, None]
        neutral = (torch.arange(3, device=shared.device) == 2)[:, None].to(shared.dtype)  # shift 0, scale 0, gate 1
        self.shared = torch.where(plain, neutral, shared)
        self.takes_table = (~plain).to(shared.dtype)
        self.tables, self.which = tables, which

    def __getitem__(self, layer: int) -> Tensor:
        """Return shift, scale and gate (R, 3, H) for one layer, given by its place in the stage."""
        made = torch.addcmul(self.shared, self.takes_table, self.tables[layer])
        return made if self.which is None else made.index_select(0, self.which)
