"""The context cache: what the context tower leaves behind for every row, in preallocated slots and pages.

Who owns which of them is kept by model.runtime.page_allocator; here are the tensors. They are read and written by
forwards alone, in the order in which a stage runs them: giving a slot to the next row touches nothing.
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
        """The rows of a forward of `lengths[r]` tokens for each slot, as their contexts are now."""
        seeds, context, pages = self.allocator.view(slots)
        return RaggedBatch(tuple(slots), seeds, tuple(lengths), context, pages)

    def grow(self, rows: RaggedBatch) -> None:
        """Notes that a forward stores the rows' tokens: later forwards come behind it."""
        self.allocator.grow(rows.slots, rows.lengths)

    def add_slots(self, count: int) -> None:
        """More slots; the states of the others move to larger tensors. No forward may be under way."""
        for layer in self.layers:
            if isinstance(layer, MambaState):
                layer.add_slots(count)
        self.allocator.add_slots(count)  # last: where memory runs out there are tensors without a slot, not the reverse
