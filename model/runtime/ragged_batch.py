"""Describes the rows of one forward: their tokens lie end to end, so layers that do not mix tokens compute no padding.

Shapes in this package: R rows of the forward, N tokens of all rows together, L tokens of the longest row, H hidden
size, V vocabulary size.
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
    """The data of a RaggedBatch as index tensors on one device, all of them views of one tensor."""

    packed: Tensor  # (4 R + N,) int64
    slots: Tensor  # (R,)
    seeds: Tensor  # (R,), a slot or -1
    starts: Tensor  # (R,), the row's first token among the N
    lengths: Tensor  # (R,)
    row_of_token: Tensor  # (N,), from 0 to R - 1

    @classmethod
    def of(cls, packed: Tensor, rows: int) -> "RowIndex":
        """Return the views of `packed`, an array of `RaggedBatch.packed` for `rows` rows, as a tensor on the device."""
        return cls(packed, *packed.tensor_split([rows, 2 * rows, 3 * rows, 4 * rows]))


class Padding(NamedTuple):
    """Index tensors that turn the rows' tokens (N, …) into a rectangle (R, L, …) and back."""

    pad: Tensor  # (R, L) int64, indices into the N tokens
    unpad: Tensor  # (N,) int64, indices into R * L


@dataclass(frozen=True)
class RaggedBatch:
    """The rows of a forward: which slots take part, and with how many tokens each.

    Row r owns tokens [starts[r], starts[r] + lengths[r]) of the forward. Before the forward, `context[r]` tokens are in
    the context cache; its keys and values are, or will be, in `pages[r]`. Its Mamba states are read from slot
    `seeds[r]` (its own slot, the slot of the prefix that it shares, or -1 if its context is empty) and written to
    `slots[r]`.
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
        """Return the batch's data as index tensors on `device`, made once per device."""
        return self.once(device, lambda: self._index(device))

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """Return the result of `make`, which is called only once per key and batch: layers of the same kind share a
        plan in this way."""
        if key not in self._made:
            self._made[key] = make()
        made: T = self._made[key]
        return made

    def alike(self, device: torch.device, step: int) -> list[tuple["RaggedBatch", Tensor]]:
        """Return the rows in groups of similar length, the longest first, for layers that pad.

        Each group is a batch of its own, with the indices of its tokens among the N on `device`. If lengths are counted
        in steps of `step` tokens, the longest row of a group is at most a quarter longer than its shortest row.
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
        """Return the array that `RowIndex.of` takes, (4 * rows + tokens,) int64, for a forward of `rows` rows and
        `tokens` tokens. If one of them is None, it is the number that the batch has. Rows beyond the batch's own are
        empty. Tokens beyond its own belong to no row, and their `row_of_token` is 0."""
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
        """Return the index tensors that pad the rows to the longest one and back, made once per device; None if all
        rows are equally long."""
        return self.once(("padding", device), lambda: self._padding(device))

    def _padding(self, device: torch.device) -> Padding | None:
        longest = max(self.lengths)
        if min(self.lengths) == longest:
            return None
        lengths, starts = np.array(self.lengths), np.array(self.starts)
        # a padding position repeats the row's last token: it is finite, and masked wherever it could change a state
        pad = starts[:, None] + np.minimum(np.arange(longest), lengths[:, None] - 1)
        row_of_token = np.repeat(np.arange(len(lengths)), lengths)
        unpad = row_of_token * longest + np.arange(len(row_of_token)) - starts[row_of_token]
        return Padding(to_device(pad, device), to_device(unpad, device))

    def padded(self, x: Tensor) -> Tensor:
        """Return x (N, …) as (R, L, …), with rows padded on the right with copies of their last token."""
        padding = self.padding(x.device)
        if padding is None:
            return x.reshape(len(self.lengths), -1, *x.shape[1:])
        padded: Tensor = x.index_select(0, padding.pad.flatten()).unflatten(0, padding.pad.shape)
        return padded

    def flat(self, x: Tensor) -> Tensor:
        """Return x (R, L, …) as (N, …): the inverse of `padded`."""
        padding = self.padding(x.device)
        x = x.reshape(-1, *x.shape[2:])
        return x if padding is None else x.index_select(0, padding.unpad)
