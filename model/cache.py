"""The context cache: what the context tower leaves behind for every row, in preallocated slots and pages.

One owner of both. A slot holds a row's Mamba states; its keys and values lie in pages of `PAGE_SIZE` tokens, all
attention layers using the same page numbers. Pages are taken for a row's whole length at once, so a row that was
admitted never runs out.
"""

from collections.abc import Sequence

import torch

from model.config import TwoTowerConfig
from model.layers.attention import AttentionState
from model.layers.mamba2 import MambaState
from model.layers.moe import NoState
from model.rows import Rows

PAGE_SIZE = 64  # tokens

LayerState = MambaState | AttentionState | NoState


def kv_bytes_per_token(config: TwoTowerConfig, dtype: torch.dtype) -> int:
    """Bytes that one token of context takes in all attention layers."""
    return len(config.layers_of("attention")) * 2 * config.kv_inner * dtype.itemsize


class ContextCache:
    """States of `slots` rows with room for `kv_tokens` tokens of attention context together.

    devices: one a layer, where that layer's state lies.
    """

    def __init__(
        self,
        config: TwoTowerConfig,
        devices: Sequence[torch.device],
        dtype: torch.dtype,
        *,
        slots: int,
        kv_tokens: int,
    ) -> None:
        self.pages = -(-kv_tokens // PAGE_SIZE)
        self.layers = [self._layer_state(config, layer, slots, dtype, device) for layer, device in enumerate(devices)]
        self._free_slots = list(range(slots))[::-1]
        self._free_pages = list(range(self.pages))[::-1]
        self._tables: dict[int, tuple[int, ...]] = {}  # slot -> its pages
        self._lengths: dict[int, int] = {}  # slot -> tokens in its context
        self._slots = slots

    def _layer_state(
        self, config: TwoTowerConfig, layer: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> LayerState:
        kind = config.layer_kinds[layer]
        if kind == "mamba":
            return MambaState(config, slots, dtype, device)
        if kind == "attention":
            return AttentionState(config, self.pages, PAGE_SIZE, dtype, device)
        return NoState()

    def has_room(self, tokens: int) -> bool:
        """Whether a row of `tokens` tokens in all could be taken now."""
        return bool(self._free_slots) and len(self._free_pages) >= pages_for(tokens)

    def acquire(self, tokens: int) -> int:
        """A slot, empty, with pages for `tokens` tokens. Ask `has_room` first."""
        assert self.has_room(tokens), f"no room for a row of {tokens} tokens"
        slot = self._free_slots.pop()
        self._tables[slot] = tuple(self._free_pages.pop() for _ in range(pages_for(tokens)))
        self._lengths[slot] = 0
        for state in self.layers:
            state.reset(slot)
        return slot

    def release(self, slot: int) -> None:
        """Gives the slot and its pages back."""
        # reversed, as they are taken from the end: the next row finds adjoining pages in order again
        self._free_pages.extend(reversed(self._tables.pop(slot)))
        del self._lengths[slot]
        self._free_slots.append(slot)

    def rows(self, slots: Sequence[int], lengths: Sequence[int]) -> Rows:
        """The rows of a forward of `lengths[r]` tokens for each slot."""
        return Rows(
            slots=tuple(slots),
            lengths=tuple(lengths),
            context=tuple(self._lengths[slot] for slot in slots),
            pages=tuple(self._tables[slot] for slot in slots),
        )

    def grow(self, rows: Rows) -> None:
        """Notes that a forward has stored the rows' tokens."""
        for slot, length in zip(rows.slots, rows.lengths, strict=True):
            self._lengths[slot] += length

    def length(self, slot: int) -> int:
        """Tokens in the slot's context."""
        return self._lengths[slot]

    def table(self, slot: int) -> tuple[int, ...]:
        """The slot's pages, in the order of its tokens."""
        return self._tables[slot]

    def check(self) -> None:
        """Integrity: every slot and page is free or owned by one row, never both. Raises AssertionError."""
        slots = self._free_slots + list(self._tables)
        pages = self._free_pages + [page for table in self._tables.values() for page in table]
        assert sorted(slots) == list(range(self._slots)), f"slots lost or doubled: {sorted(slots)}"
        assert sorted(pages) == list(range(self.pages)), "pages lost or doubled"
        assert self._tables.keys() == self._lengths.keys()
        for slot, length in self._lengths.items():
            assert length <= len(self._tables[slot]) * PAGE_SIZE, f"slot {slot} holds {length} tokens, beyond its pages"


def pages_for(tokens: int) -> int:
    """Pages that `tokens` tokens take."""
    return -(-tokens // PAGE_SIZE)
