"""What the loop needs computed, computed: the model's forwards over the context cache, and what they predict."""

from collections.abc import Sequence
from functools import partial
from traceback import clear_frames
from typing import NamedTuple

import torch
from torch import Tensor

from model.backend import Batch, Seen
from model.blocks import BlockTable, Filling
from model.cache import ContextCache
from model.faults import out_of_memory
from model.lanes import ActiveRow
from model.sampling import Draws, choose
from model.stages import Flight, Part, Stages
from model.tower import Tower
from model.two_tower import TwoTower


class Handle(NamedTuple):
    """A forward under way and the blocks that it fills, if any."""

    flight: Flight
    filling: Filling | None = None

    @property
    def seconds(self) -> float:
        """What it took, from stage to stage."""
        return self.flight.seconds


class Forwards:
    """The real Backend of model.loop."""

    def __init__(self, pair: TwoTower, cache: ContextCache, *, trace: bool = False) -> None:
        self.pair, self.cache, self.trace = pair, cache, trace
        self.table = BlockTable(cache.slots.slots, pair.config.mask_token_id)
        self.stages = Stages([stage.device for stage in pair.stages])

    def add_slots(self, count: int) -> None:
        """See Backend."""
        self.table.add_slots(count)
        self.cache.add_slots(count)

    def enter(self, rows: Sequence[ActiveRow]) -> None:
        """See Backend."""
        for row in rows:
            self.table.enter(row)

    def begin(self, rows: Sequence[ActiveRow]) -> None:
        """See Backend."""
        self.table.begin(rows)

    def extend(self, batch: Batch, fill: Sequence[ActiveRow]) -> Handle:
        """See Backend."""
        lengths = [count for _, count in batch]
        rows = self.cache.rows([item.slot for item, _ in batch], lengths)
        tokens = torch.tensor([token for item, count in batch for token in item.pending[:count]])
        parts: list[Part] = [*self.pair.extend_parts(self.cache, rows)]
        filling = self.table.take(fill) if fill else None
        if filling is not None:
            last = torch.tensor(lengths).cumsum(0)[-len(fill) :] - 1
            parts = self._predicting(parts, self.pair.context, last, filling)
        flight = self.stages.launch(parts, tokens)
        self.cache.grow(rows)
        return Handle(flight, filling)

    def denoise(self, rows: Sequence[ActiveRow]) -> Handle:
        """See Backend."""
        filling = self.table.take(rows)
        sizes, tokens, t, picked = self.table.inputs(filling)
        if self.trace:
            for row, block in zip(rows, tokens.split(sizes), strict=True):
                row.trace.append(tuple(block.tolist()))
        batch = self.cache.rows(filling.slots.tolist(), sizes)
        parts: list[Part] = [*self.pair.denoise_parts(self.cache, batch, t)]
        assert self.pair.denoiser is not None
        parts = self._predicting(parts, self.pair.denoiser, picked, filling)
        return Handle(self.stages.launch(parts, tokens), filling)

    def _predicting(self, parts: Sequence[Part], tower: Tower, picked: Tensor, filling: Filling) -> list[Part]:
        """The parts of a forward, the last going on to tokens and confidences (M,) at the picked ones of its N."""
        suppress, draws = self.table.draws(filling, self.pair.devices[-1])
        return [*parts[:-1], partial(self._predict, parts[-1], tower, picked, suppress, draws)]

    def _predict(
        self, part: Part, tower: Tower, picked: Tensor, suppress: Tensor, draws: Draws | None, x: Tensor
    ) -> tuple[Tensor, Tensor]:
        hidden = part(x)
        hidden = hidden[picked.to(hidden.device)]
        config = self.pair.config
        return choose(tower.head_on(hidden), len(hidden), config.vocab_size, suppress, config.mask_token_id, draws)

    def collect(self, handle: Handle) -> list[Seen]:
        """See Backend."""
        result = handle.flight.result()
        if handle.filling is None:
            return []
        tokens, confidence = result
        return self.table.fill(handle.filling, tokens.cpu(), confidence.cpu())

    def out_of_memory(self, error: BaseException) -> bool:
        """See Backend."""
        if not isinstance(error, torch.OutOfMemoryError) and not out_of_memory(error):
            return False
        clear_frames(error.__traceback__)  # which hold what the forward had made so far
        torch.cuda.empty_cache()
        return True
