"""Defines the inputs and outputs of `Kernels.choose_tokens`: logits on demand, sampling parameters, the chosen tokens.

Shapes: M positions at which a token is chosen, V ids of the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Head = Callable[[slice | Tensor, slice], Tensor]
"""A function that computes the logits of some of the M positions, at some columns of the vocabulary, when they are
needed. It returns a new, contiguous tensor (positions, columns) in float32 or bfloat16, which may be overwritten."""


@dataclass(frozen=True, slots=True)
class Draws:
    """The sampling parameters of M positions. A position with temperature 0 is greedy and takes the most likely token.

    `free` and `limited` list the sampled positions, although the other fields already determine them: their lengths are
    known on the host, so that nothing has to be read back from the device.
    """

    temperature: Tensor  # (M,) float32
    top_k: Tensor  # (M,) int64, 0 for no limit
    top_p: Tensor  # (M,) float64, 1 for no limit
    key: Tensor  # (M, 2) int64, 32 bits each: the key of the random numbers of the position's row
    counter: Tensor  # (M, 3) int64: block, step, position
    free: Tensor  # (K,) int64, the positions that are sampled without top_k and top_p
    limited: Tensor  # (L,) int64, the positions that are sampled with top_k, top_p or both


@dataclass(frozen=True, slots=True)
class Logits:
    """The logits of M positions, which `head` computes on demand, and the limit of the memory that they may take."""

    head: Head
    count: int  # M, the number of positions
    vocab: int  # V, the size of the vocabulary
    suppress: Tensor  # (M,) bool: True at positions where the mask id's logit counts as -inf
    mask_id: int
    dtype: torch.dtype  # dtype of the head's results
    workspace: int  # bytes that the logits and their temporaries may take; only a single position may exceed it
    width: int  # columns of a slice of the vocabulary, a power of two on CUDA

    @property
    def device(self) -> torch.device:
        return self.suppress.device

    @property
    def columns(self) -> list[slice]:
        """The slices of `width` columns that together cover the vocabulary, in order; the last one may be narrower."""
        return [slice(at, min(at + self.width, self.vocab)) for at in range(0, self.vocab, self.width)]

    def rows_at_once(self, columns: int, bytes_each: int) -> int:
        """Return the number of positions whose logits fit into the workspace together, but at least 1.

        Each of them has `columns` logits of `bytes_each` bytes, temporaries included.
        """
        return max(1, self.workspace // (columns * bytes_each))


class Choice(NamedTuple):
    """The chosen token of each of M positions, with its probability in three numbers: exp(logit - top) / total."""

    tokens: Tensor  # (M,) int64
    logit: Tensor  # (M,) float32, the token's logit
    top: Tensor  # (M,) float32, the largest logit
    total: Tensor  # (M,) float32, the sum of exp(logit - top) over the vocabulary


@dataclass(frozen=True, slots=True)
class Parts:
    """The results of one pass over the logits: a few numbers for each of M positions and each of S vocabulary slices.

    They replace the logits, which are not kept: a greedy token follows from them, and so does the slice in which a
    sampled token lies. Every tensor is (M, S), or (M,) for one slice.
    """

    best: Tensor  # float32, the largest logit
    at: Tensor  # int64, the first id that has it
    total: Tensor  # float32, the sum of exp(logit - best)
    mass: Tensor | None  # float64, the sum of exp((logit - best) / temperature); None if it is not needed

    @classmethod
    def empty(cls, count: int, slices: int, device: torch.device, *, mass: bool) -> "Parts":
        """Return uninitialised tensors (count, slices), all with the same strides. If not `mass`, the mass is None."""
        best, total = torch.empty(2, count, slices, device=device)
        at = torch.empty(count, slices, dtype=torch.int64, device=device)
        return cls(best, at, total, torch.empty(count, slices, dtype=torch.float64, device=device) if mass else None)

    def of(self, rows: slice, part: int) -> "Parts":
        """Return views of the positions `rows` at the slice with index `part`: tensors (rows,) that can be filled."""
        mass = None if self.mass is None else self.mass[rows, part]
        return Parts(self.best[rows, part], self.at[rows, part], self.total[rows, part], mass)
