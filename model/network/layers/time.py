"""Time conditioning of the denoiser: t -> shift, scale, gate (adaLN-single, arXiv 2310.00426)."""

import math

import torch
from torch import Tensor, nn

from model.checkpoint.config import TIME_EMBEDDING_SIZE, TwoTowerConfig
from model.kernels.formulas import silu
from model.kernels.protocol import Kernels


class BiasedLinear(nn.Module):
    """x (R, in) -> (R, out), with bias."""

    def __init__(self, size_in: int, size_out: int, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(size_out, dtype=dtype))
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.linear(x, self.weight) + self.bias


def sinusoids(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t (R,) in [0, 1] float32 -> (R, 256): cosines, then sines, of t * 1000 * 10000^(-i / 128).

    t is rounded to the model's dtype before the multiplication, as the reference does; the angles, up to 1000 rad, are
    float32 at least.
    """
    half = TIME_EMBEDDING_SIZE // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(10000.0) / half))
    angles = (t.to(dtype) * 1000).float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


class TimeConditioning(nn.Module):
    """t_embedder and t_block, shared by all layers; each layer adds its own table."""

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype, kernels: Kernels) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.embed_in = BiasedLinear(TIME_EMBEDDING_SIZE, hidden, dtype, kernels)
        self.embed_out = BiasedLinear(hidden, hidden, dtype, kernels)
        self.block = BiasedLinear(hidden, 3 * hidden, dtype, kernels)
        self.dtype = dtype

    def forward(self, t: Tensor) -> Tensor:
        """t (R,) -> (R, 3, H): shift, scale, gate, before a layer's table is added."""
        embedded = self.embed_out(silu(self.embed_in(sinusoids(t, self.dtype))))
        out: Tensor = self.block(silu(embedded)).unflatten(-1, (3, -1))
        return out


class Conditioning:
    """Shift, scale and gate of each row at the layers of a stage, made as each layer asks for them.

    Those of all layers at once would be 320 MB for 384 rows of the released model.
    """

    def __init__(self, shared: Tensor, plain: Tensor, tables: Tensor, which: Tensor | None = None) -> None:
        """shared (U, 3, H) and plain (U,) of U times: those that are plain modulate and gate nothing, whatever the
        layer. tables (layers, 3, H). which (R,): the time of each row; None: row r has time r."""
        plain = plain[:, None, None]
        neutral = (torch.arange(3, device=shared.device) == 2)[:, None].to(shared.dtype)  # a gate of 1 alone
        self.shared = torch.where(plain, neutral, shared)
        self.takes_table = (~plain).to(shared.dtype)
        self.tables, self.which = tables, which

    def __getitem__(self, layer: int) -> Tensor:
        """(R, 3, H) of a layer of the stage."""
        made = torch.addcmul(self.shared, self.takes_table, self.tables[layer])
        return made if self.which is None else made.index_select(0, self.which)
