"""The rows of one forward: their tokens lie end to end, so that layers that mix nothing compute no padding.

Shapes in this package: R rows of the forward, N their tokens together, L the longest row's tokens,
H hidden size, V vocabulary.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from model.runtime.transfer import Array, to_device

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RowIndex:
    """`Rows` as index tensors on one device, all views of one."""

    packed: Tensor  # (4 R + N,) int64
    slots: Tensor  # (R,)
    seeds: Tensor  # (R,); a slot, or -1
    starts: Tensor  # (R,)
    lengths: Tensor  # (R,)
    row_of_token: Tensor  # (N,)

    @classmethod
    def of(cls, packed: Tensor, rows: int) -> "RowIndex":
        """The views of what `Rows.packed` has made."""
        return cls(packed, *packed.tensor_split([rows, 2 * rows, 3 * rows, 4 * rows]))


class Padding(NamedTuple):
    """How rows of unlike lengths become a rectangle, and back."""

    pad: Tensor  # (R, L) int64 into the N tokens
    unpad: Tensor  # (N,) int64 into R * L


@dataclass(frozen=True)
class RaggedBatch:
    """Which slots take part in a forward and with how many tokens each.

    Row r owns tokens [starts[r], starts[r] + lengths[r]) of the forward. `context[r]` tokens stand in the context cache
    before the forward; its keys and values lie, or will lie, in `pages[r]`. Its Mamba states are read from slot
    `seeds[r]` (its own, that of the prefix it shares, or -1 where nothing stands before) and written to `slots[r]`.
    """

    slots: tuple[int, ...]
    seeds: tuple[int, ...]
    lengths: tuple[int, ...]
    context: tuple[int, ...]
    pages: tuple[Sequence[int], ...]
    _made: dict[Hashable, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def starts(self) -> list[int]:
        starts = [0]
        for length in self.lengths[:-1]:
            starts.append(starts[-1] + length)
        return starts

    def on(self, device: torch.device) -> RowIndex:
        """The index tensors on `device`, made once a forward and device."""
        return self.once(device, lambda: self._index(device))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` returns, made once a forward and key: for plans that all layers of a kind share."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def alike(self, device: torch.device, step: int) -> list[tuple["RaggedBatch", Tensor]]:
        """The rows in groups of like length, for layers that pad, each with the places of its tokens among the N.

        Counted in steps of `step` tokens, a group's longest row is at most a quarter longer than its shortest.
        """
        starts, groups = self.starts, list[list[int]]()
        longest = 0.0
        for row in sorted(range(len(self.lengths)), key=lambda row: -self.lengths[row]):
            steps = -(-self.lengths[row] // step)
            if not groups or steps < 0.8 * longest:
                groups.append([])
                longest = steps
            groups[-1].append(row)
        columns = (self.slots, self.seeds, self.lengths, self.context, self.pages)
        made = []
        for group in groups:
            places = [place for row in group for place in range(starts[row], starts[row] + self.lengths[row])]
            rows = RaggedBatch(*(tuple(column[row] for row in group) for column in columns))  # type: ignore[arg-type]
            made.append((rows, to_device(np.array(places), device)))
        return made

    def _index(self, device: torch.device) -> RowIndex:
        return RowIndex.of(to_device(self.packed(), device), len(self.lengths))

    def packed(self, rows: int | None = None, tokens: int | None = None) -> Array:
        """What `RowIndex.of` takes, for a forward of `rows` rows and `tokens` tokens: those beyond its own are empty
        rows, and tokens of no row, said to be the first row's."""
        real, lengths = len(self.lengths), np.array(self.lengths, dtype=np.int64)
        rows, count = rows or real, int(lengths.sum())
        packed = np.zeros(4 * rows + (tokens or count), dtype=np.int64)
        slots, seeds, starts, sizes = packed[: 4 * rows].reshape(4, rows)
        seeds[:], starts[:] = -1, count
        slots[:real], seeds[:real], sizes[:real] = self.slots, self.seeds, lengths
        starts[:real] = lengths.cumsum() - lengths
        packed[4 * rows : 4 * rows + count] = np.repeat(np.arange(real), lengths)
        return packed

    def padding(self, device: torch.device) -> Padding | None:
        """How to pad the rows to the longest, made once a forward and device; None where all are equally long."""
        return self.once(("padding", device), lambda: self._padding(device))

    def _padding(self, device: torch.device) -> Padding | None:
        longest = max(self.lengths)
        if min(self.lengths) == longest:
            return None
        lengths, starts = np.array(self.lengths), np.array(self.starts)
        # a padding position repeats the row's last token: finite, and masked wherever it could touch a state
        pad = starts[:, None] + np.minimum(np.arange(longest), lengths[:, None] - 1)
        row_of_token = np.repeat(np.arange(len(lengths)), lengths)
        unpad = row_of_token * longest + np.arange(len(row_of_token)) - starts[row_of_token]
        return Padding(to_device(pad, device), to_device(unpad, device))

    def padded(self, x: Tensor) -> Tensor:
        """(N, …) -> (R, L, …), rows padded on the right with copies of their last token."""
        padding = self.padding(x.device)
        if padding is None:
            return x.reshape(len(self.lengths), -1, *x.shape[1:])
        padded: Tensor = x.index_select(0, padding.pad.flatten()).unflatten(0, padding.pad.shape)
        return padded

    def flat(self, x: Tensor) -> Tensor:
        """(R, L, …) -> (N, …): the inverse of `padded`."""
        padding = self.padding(x.device)
        x = x.reshape(-1, *x.shape[2:])
        return x if padding is None else x.index_select(0, padding.unpad)
