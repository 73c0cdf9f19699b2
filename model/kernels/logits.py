"""What the kernels that choose tokens take and give: logits that are computed on demand, how to sample, the choice.

Shapes: M positions, V ids of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draws:
    """How each of M positions is sampled; temperature 0 means greedy.

    Which are sampled is said twice, so that nobody has to ask the device: the lengths of `free` and `limited` tell.
    """

    temperature: Tensor  # (M,) float32
    top_k: Tensor  # (M,) int64, 0 for no limit
    top_p: Tensor  # (M,) float64, 1 for no limit
    key: Tensor  # (M, 2) int64, 32 bits each
    counter: Tensor  # (M, 3) int64: block, step, position
    free: Tensor  # (K,) int64, the positions that are sampled without top_k and top_p
    limited: Tensor  # (L,) int64, those that are sampled with one of them or both


@dataclass(frozen=True, slots=True)
class Logits:
    """The logits of M positions, and how much of them may be looked at at once."""

    head: Callable[[slice | Tensor, slice], Tensor]  # (positions, columns) -> float32 or bfloat16, to be overwritten
    count: int  # M
    vocab: int  # V
    suppress: Tensor  # (M,) bool: where the mask id counts as -inf
    mask_id: int
    dtype: torch.dtype  # of what the head gives
    workspace: int  # bytes that they and what is made of them may take; only a single row may go beyond it
    width: int  # columns of a slice of the vocabulary

    @property
    def device(self) -> torch.device:
        return self.suppress.device

    @property
    def columns(self) -> list[slice]:
        """The slices, of the whole vocabulary together."""
        return [slice(at, min(at + self.width, self.vocab)) for at in range(0, self.vocab, self.width)]

    def rows_at_once(self, columns: int, bytes_each: int) -> int:
        """How many rows of so many columns fit into the workspace, one at least."""
        return max(1, self.workspace // (columns * bytes_each))


class Choice(NamedTuple):
    """A token for each of M positions, and what its probability is made of: exp(logit - top) / total."""

    tokens: Tensor  # (M,) int64
    logit: Tensor  # (M,) float32, of the token
    top: Tensor  # (M,) float32, the largest
    total: Tensor  # (M,) float32, the sum of exp(logit - top) over the vocabulary


@dataclass(frozen=True, slots=True)
class Parts:
    """What one pass over the vocabulary keeps of each of its S slices; (M, S) each, or (M,) of a single slice."""

    best: Tensor  # float32, the largest logit
    at: Tensor  # int64, the first id that has it
    total: Tensor  # float32, the sum of exp(logit - best)
    mass: Tensor | None  # float64, the sum of exp((logit - best) / temperature)

    @classmethod
    def empty(cls, count: int, slices: int, device: torch.device, *, mass: bool) -> "Parts":
        """Tables to be filled; all of the same strides."""
        best, total = torch.empty(2, count, slices, device=device)
        at = torch.empty(count, slices, dtype=torch.int64, device=device)
        return cls(best, at, total, torch.empty(count, slices, dtype=torch.float64, device=device) if mass else None)

    def of(self, rows: slice, part: int) -> "Parts":
        """Views of some rows and one slice."""
        mass = None if self.mass is None else self.mass[rows, part]
        return Parts(self.best[rows, part], self.at[rows, part], self.total[rows, part], mass)
