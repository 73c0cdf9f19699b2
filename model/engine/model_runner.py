"""Runs the model's forward passes for the loop: over the context cache, with the choice of the predicted tokens.

Everything that a forward needs from the host is known when it is launched and goes to the device inside the forward's
parts, after the work that is already queued there. The results that the host needs come back in one copy
(model.runtime.transfer). So only `Flight.result` waits for the device.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from traceback import clear_frames
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.engine.backend import Batch
from model.engine.denoising import DenoisingState, Filling, Targets
from model.engine.sequence import ActiveRow
from model.engine.unmasking import commit, commit_in_order
from model.network.context_cache import ContextCache
from model.network.tower import Tower
from model.network.two_tower import TwoTower
from model.runtime.device_errors import out_of_memory
from model.runtime.ragged_batch import RaggedBatch
from model.runtime.stages import Flight, Part, Stages
from model.runtime.transfer import Array, send, to_device, to_host

if TYPE_CHECKING:
    from model.engine.cuda_graphs import Graphs


class _Step(NamedTuple):
    """A forward that predicts tokens: its part on the last stage, and the positions that it predicts."""

    part: Part
    targets: Targets
    again: Array | None = None
    """Indices of the predictions whose tokens are the input of the next step; None if all of them are."""


class ModelRunner:
    """The Backend of the loop that runs the real model. On GPUs it replays CUDA graphs where sizes allow it."""

    def __init__(self, pair: TwoTower, cache: ContextCache, *, trace: bool = False) -> None:
        self.pair, self.cache, self.trace = pair, cache, trace
        self.table = DenoisingState(cache.allocator.slots, pair.config.mask_token_id)
        self.stages = Stages([stage.device for stage in pair.stages])
        self.graphs = _graphs(pair, cache)

    def add_slots(self, count: int) -> None:
        """Make room for `count` more rows. No forward may be in progress. Drops all CUDA graphs."""
        self.table.add_slots(count)
        self.cache.add_slots(count)
        if self.graphs is not None:  # the graphs hold the old addresses of the states
            self.graphs.clear()

    def enter(self, rows: Sequence[ActiveRow]) -> None:
        """Record the settings of rows that have just got their slots."""
        for row in rows:
            self.table.enter(row)

    def begin(self, rows: Sequence[ActiveRow], ar_tokens: int = 1) -> None:
        """Begin a new block for each of these rows; see Backend."""
        self.table.begin(rows, ar_tokens)

    def extend(self, batch: Batch, fill: Sequence[ActiveRow]) -> Flight:
        """Launch a context forward over pieces of prompts and finished blocks; see Backend."""
        lengths = [count for _, count in batch]
        rows = self.cache.rows([item.slot for item, _ in batch], lengths)
        pending = chain.from_iterable(item.pending[:count] for item, count in batch)
        tokens = torch.from_numpy(np.fromiter(pending, np.int64, sum(lengths)))
        parts = self._extend_parts(rows)
        self.cache.grow(rows)
        if not fill:
            return self.stages.launch(parts, tokens, lambda _hidden: [])
        filling = self.table.take(fill)
        last = np.cumsum(lengths)[-len(fill) :] - 1
        parts[-1:] = [self._ar_part(parts[-1], filling, last)]
        return self.stages.launch(parts, tokens, partial(self.table.fill, filling))

    def _extend_parts(self, rows: RaggedBatch) -> list[Part]:
        return self.graphs.extend_parts(rows) if self.graphs else self.pair.extend_parts(self.cache, rows)

    def _denoise_parts(self, rows: RaggedBatch, t: Tensor) -> list[Part]:
        return self.graphs.denoise_parts(rows, t) if self.graphs else self.pair.denoise_parts(self.cache, rows, t)

    def _ar_part(self, part: Part, filling: Filling, last: Array) -> Part:
        """Return a part that runs `part`, the last stage's part of a context forward, and then generates the blocks in
        `filling` in AR mode.

        last: (R,), for each row of `filling`, the index of its last token among the forward's tokens; its block begins
        after that token. The new part predicts the token after it, then the next one, and so on to the end of the
        block.
        """
        which = np.arange(len(last))
        first = _Step(part, self.table.targets(filling, which, np.zeros_like(which), last), _unless_all(filling, 1))
        return partial(self._predict, self.pair.context, filling, chain([first], self._ar_steps(filling)))

    def _ar_steps(self, filling: Filling) -> Iterator[_Step]:
        """Yield the context forwards after the first one, each over one token of the rows with longer blocks; each is
        prepared while the device computes the one before. If there are any, the model must have a single stage, whose
        parts run in the launching thread."""
        for position in range(1, filling.masked.shape[1]):
            which = np.flatnonzero(filling.sizes > position)
            rows = self.cache.rows(filling.slots[which].tolist(), [1] * len(which))
            (part,) = self._extend_parts(rows)
            self.cache.grow(rows)
            targets = self.table.targets(filling, which, np.full_like(which, position), np.arange(len(which)))
            yield _Step(part, targets, _unless_all(filling, position + 1))

    def denoise(self, rows: Sequence[ActiveRow]) -> Flight:
        """Launch a denoiser forward over the blocks that these rows have begun; with `trace`, the rows keep what it
        reads."""
        filling = self.table.take(rows)
        tokens, t = self.table.inputs(filling)
        sizes = filling.sizes.tolist()
        if self.trace:
            for row, block in zip(rows, np.split(tokens, np.cumsum(sizes)[:-1]), strict=True):
                row.trace.append(tuple(block.tolist()))
        batch = self.cache.rows(filling.slots.tolist(), sizes)
        parts = self._denoise_parts(batch, torch.from_numpy(t))
        which, position = np.nonzero(filling.masked)
        starts = np.cumsum(filling.sizes) - filling.sizes
        targets = self.table.targets(filling, which, position, starts[which] + position)
        assert self.pair.denoiser is not None
        parts[-1:] = [partial(self._predict, self.pair.denoiser, filling, [_Step(parts[-1], targets)])]
        return self.stages.launch(parts, torch.from_numpy(tokens), partial(self.table.fill, filling))

    def _predict(self, tower: Tower, filling: Filling, steps: Iterable[_Step], x: Tensor) -> Tensor:
        """Run the forwards in `steps`, choose their tokens, and return what is committed, (2, R, S) int32 as from
        model.engine.unmasking.commit; on CUDA it is still being copied to the host.

        x: the input of the first step's part. A denoiser forward is a single step. In AR mode each further step reads
        the tokens that the step before it predicted.
        """
        device = tower.devices[-1]
        places, predicted = list[Array](), list[tuple[Tensor, Tensor]]()
        for step in steps:
            hidden = step.part(x)
            token, suppress, draws = step.targets.on(device)
            tokens, confidence = tower.choose(hidden.index_select(0, token), suppress, draws)
            places.append(step.targets.place)
            predicted.append((tokens, confidence))
            x = tokens if step.again is None else tokens.index_select(0, to_device(step.again, device))
        tokens, confidence = (torch.cat(some) for some in zip(*predicted, strict=True))
        rows, width = filling.masked.shape
        if tower.causal:
            (place,) = send(device, np.concatenate(places))
            return to_host(commit_in_order(place, tokens, confidence, rows, width))
        place, threshold, left = send(device, *places, filling.threshold.astype(float), filling.steps_left)
        return to_host(commit(place, tokens, confidence, threshold.float(), left, width))

    def out_of_memory(self, error: BaseException) -> bool:
        """Return True if memory ran out, on a device or on the host; in that case also free the memory that the device
        allocator caches."""
        if not isinstance(error, torch.OutOfMemoryError) and not out_of_memory(error):
            return False
        clear_frames(error.__traceback__)  # the frames still hold the tensors that the forward had made
        torch.cuda.empty_cache()
        return True


def _graphs(pair: TwoTower, cache: ContextCache) -> "Graphs | None":
    """Return the CUDA graphs of the model over this cache, or None on a CPU."""
    if pair.stages[0].device.type != "cuda":
        return None
    from model.engine.cuda_graphs import Graphs  # imported here, because it needs Triton

    return Graphs(pair, cache)


def _unless_all(filling: Filling, tokens: int) -> Array | None:
    """Return, among the rows whose blocks have at least `tokens` tokens, the indices of those with more; None if all of
    them have more."""
    sizes = filling.sizes[filling.sizes >= tokens]
    return None if (sizes > tokens).all() else np.flatnonzero(sizes > tokens)
