"""The rows of one forward: their tokens lie end to end, so that layers that mix nothing compute no padding.

Shapes in this package: R rows of the forward, N their tokens together, L the longest row's tokens,
H hidden size, V vocabulary.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RowIndex:
    """`Rows` as index tensors on one device."""

    slots: Tensor  # (R,) int64
    seeds: Tensor  # (R,) int64; a slot, or -1
    starts: Tensor  # (R,) int64
    lengths: Tensor  # (R,) int64
    row_of_token: Tensor  # (N,) int64
    pad: Tensor | None  # (R, L) int64 into the N tokens; None where all rows are equally long
    unpad: Tensor | None  # (N,) int64 into R * L


@dataclass(frozen=True)
class Rows:
    """Which slots take part in a forward and with how many tokens each.

    Row r owns tokens [starts[r], starts[r] + lengths[r]) of the forward. `context[r]` tokens stand in the context cache
    before the forward; its keys and values lie, or will lie, in `pages[r]`. Its Mamba states are read from slot
    `seeds[r]` (its own, that of the prefix it shares, or -1 where nothing stands before) and written to `slots[r]`.
    """

    slots: tuple[int, ...]
    seeds: tuple[int, ...]
    lengths: tuple[int, ...]
    context: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
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

    def alike(self, device: torch.device, step: int) -> list[tuple["Rows", Tensor]]:
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
            rows = Rows(*(tuple(column[row] for row in group) for column in columns))  # type: ignore[arg-type]
            made.append((rows, torch.tensor(places, device=device)))
        return made

    def _index(self, device: torch.device) -> RowIndex:
        lengths = torch.tensor(self.lengths)
        row_of_token = torch.repeat_interleave(torch.arange(len(self.lengths)), lengths)
        starts = torch.tensor(self.starts)
        pad = unpad = None
        longest = max(self.lengths)
        if min(self.lengths) != longest:
            offsets = torch.arange(longest)
            # a padding position repeats the row's last token: finite, and masked wherever it could touch a state
            pad = (starts[:, None] + torch.minimum(offsets[None, :], lengths[:, None] - 1)).to(device)
            position = torch.arange(len(row_of_token)) - starts[row_of_token]
            unpad = (row_of_token * longest + position).to(device)
        return RowIndex(
            slots=torch.tensor(self.slots, device=device),
            seeds=torch.tensor(self.seeds, device=device),
            starts=starts.to(device),
            lengths=lengths.to(device),
            row_of_token=row_of_token.to(device),
            pad=pad,
            unpad=unpad,
        )

    def padded(self, x: Tensor) -> Tensor:
        """(N, …) -> (R, L, …), rows padded on the right with copies of their last token."""
        index = self.on(x.device)
        if index.pad is None:
            return x.reshape(len(self.lengths), -1, *x.shape[1:])
        padded: Tensor = x.index_select(0, index.pad.flatten()).unflatten(0, index.pad.shape)
        return padded

    def flat(self, x: Tensor) -> Tensor:
        """(R, L, …) -> (N, …): the inverse of `padded`."""
        index = self.on(x.device)
        x = x.reshape(-1, *x.shape[2:])
        return x if index.unpad is None else x.index_select(0, index.unpad)
