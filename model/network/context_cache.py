"""Holds the context cache: tensors that the context tower fills for rows and prefixes, in preallocated slots and pages.

model.runtime.page_allocator records which row owns which slot and pages; this module holds the tensors. Only forwards
read and write them, and a stage runs its forwards in order. So a slot can be given to the next row without clearing its
tensors: a row whose context is empty does not read them.
"""

from collections.abc import Sequence

import torch

from model.checkpoint.config import TwoTowerConfig
from model.network.layers.attention import AttentionState
from model.network.layers.mamba2 import MambaState
from model.network.layers.moe import NoState
from model.runtime.page_allocator import PAGE_SIZE, PageAllocator, pages_for
from model.runtime.ragged_batch import RaggedBatch

LayerState = MambaState | AttentionState | NoState


class ContextCache:
    """The states of all layers for rows and shared prefixes, in `slots` slots, and the allocator of slots and pages.

    The pages have room for the keys and values of `kv_tokens` tokens of all rows together, rounded up to whole pages.
    devices: the device of each layer's state.
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
        self.allocator = PageAllocator(slots, pages_for(kv_tokens))
        self.layers = [self._layer_state(config, layer, dtype, device) for layer, device in enumerate(devices)]

    def _layer_state(self, config: TwoTowerConfig, layer: int, dtype: torch.dtype, device: torch.device) -> LayerState:
        kind = config.layer_kinds[layer]
        if kind == "mamba":
            return MambaState(config, self.allocator.slots, dtype, device)
        if kind == "attention":
            return AttentionState(config, self.allocator.pages, PAGE_SIZE, dtype, device)
        return NoState()

    def rows(self, slots: Sequence[int], lengths: Sequence[int]) -> RaggedBatch:
        """Return a forward's batch: `lengths[r]` tokens for the row in `slots[r]`, with the contexts as they are."""
        seeds, context, pages = self.allocator.view(slots)
        return RaggedBatch(tuple(slots), seeds, tuple(lengths), context, pages)

    def grow(self, rows: RaggedBatch) -> None:
        """Record that a launched forward stores the rows' tokens, so that later forwards append after them."""
        self.allocator.grow(rows.slots, rows.lengths)

    def add_slots(self, count: int) -> None:
        """Add `count` slots, but no pages. The states move to larger tensors, so no forward may be running."""
        for layer in self.layers:
            if isinstance(layer, MambaState):
                layer.add_slots(count)
        self.allocator.add_slots(count)  # last: if memory runs out above, every slot still has its tensors
