"""Defines the inputs and outputs of the kernels that choose tokens: logits on demand, sampling parameters, the choice.

Shapes: M positions, V ids of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Head = Callable[[slice | Tensor, slice], Tensor]
"""The function (positions, columns) -> contiguous logits in float32 or bfloat16, which may be overwritten."""


@dataclass(frozen=True, slots=True)
class Draws:
    """The sampling parameters of M positions; temperature 0 means greedy.

    `free` and `limited` repeat which positions are sampled: their lengths are known on the host, so that nothing has to
    be read back from the device.
    """

    temperature: Tensor  # (M,) float32
    top_k: Tensor  # (M,) int64, 0 for no limit
    top_p: Tensor  # (M,) float64, 1 for no limit
    key: Tensor  # (M, 2) int64, 32 bits each
    counter: Tensor  # (M, 3) int64: block, step, position
    free: Tensor  # (K,) int64, the positions that are sampled without top_k and top_p
    limited: Tensor  # (L,) int64, the positions that are sampled with top_k, top_p or both


@dataclass(frozen=True, slots=True)
class Logits:
    """The logits of M positions, computed on demand, and how many of them may be in memory at once."""

    head: Head
    count: int  # M
    vocab: int  # V
    suppress: Tensor  # (M,) bool: True if the mask id's logit counts as -inf
    mask_id: int
    dtype: torch.dtype  # dtype of the head's results
    workspace: int  # bytes that the logits and their temporaries may take; only a single row may exceed it
    width: int  # columns of a slice of the vocabulary, a power of two on CUDA

    @property
    def device(self) -> torch.device:
        return self.suppress.device

    @property
    def columns(self) -> list[slice]:
        """The slices of columns that together cover the vocabulary."""
        return [slice(at, min(at + self.width, self.vocab)) for at in range(0, self.vocab, self.width)]

    def rows_at_once(self, columns: int, bytes_each: int) -> int:
        """Return how many rows of so many columns and bytes per logit fit into the workspace, at least one."""
        return max(1, self.workspace // (columns * bytes_each))


class Choice(NamedTuple):
    """The token of each of M positions, and the parts of its probability, which is exp(logit - top) / total."""

    tokens: Tensor  # (M,) int64
    logit: Tensor  # (M,) float32, the token's logit
    top: Tensor  # (M,) float32, the largest logit
    total: Tensor  # (M,) float32, the sum of exp(logit - top) over the vocabulary


@dataclass(frozen=True, slots=True)
class Parts:
    """The results that one pass over the vocabulary keeps for each of its S slices; (M, S) each, or (M,) for one
    slice."""

    best: Tensor  # float32, the largest logit
    at: Tensor  # int64, the first id that has it
    total: Tensor  # float32, the sum of exp(logit - best)
    mass: Tensor | None  # float64, the sum of exp((logit - best) / temperature)

    @classmethod
    def empty(cls, count: int, slices: int, device: torch.device, *, mass: bool) -> "Parts":
        """Return tensors to be filled, all with the same strides; `mass` says whether they include the mass."""
        best, total = torch.empty(2, count, slices, device=device)
        at = torch.empty(count, slices, dtype=torch.int64, device=device)
        return cls(best, at, total, torch.empty(count, slices, dtype=torch.float64, device=device) if mass else None)

    def of(self, rows: slice, part: int) -> "Parts":
        """Return views of some rows and one slice."""
        mass = None if self.mass is None else self.mass[rows, part]
        return Parts(self.best[rows, part], self.at[rows, part], self.total[rows, part], mass)
